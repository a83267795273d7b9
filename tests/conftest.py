"""Fixtures of more than one test module: a toy dataset, a toy base model, a LoRA, generated images; all offline."""

import importlib.util
import os
import signal
from pathlib import Path

from offline import HOME, HUB_PORT, ROOT

import pytest


installed = importlib.util.find_spec("defectfill_scripts")
if not installed or not ROOT.joinpath("scripts/__init__.py").samefile(installed.origin):
    pytest.exit("Install this clone first: pip install -c constraints.txt -e .", returncode=4)

import huggingface_hub.constants  # noqa: E402
import torch  # noqa: E402
from drawn import write_image, write_mask  # noqa: E402
from fake_hub import TOKEN, FakeHub  # noqa: E402
from folders import make_mvtec  # noqa: E402
from generated_folder import make_generated  # noqa: E402
from runs import options, reset_accelerate  # noqa: E402
from torchvision.models import alexnet  # noqa: E402
from toy_model import toy_pipeline  # noqa: E402

import train_defectfill  # noqa: E402
from defectfill import selection  # noqa: E402
from defectfill.selection import LPIPS_FILES  # noqa: E402


torch.set_num_threads(1)  # two threads are no faster at this size, and sums stay the same everywhere


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the tests marked full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """An object 'nut' with four pairs of one defect type, two held out."""
    return make_mvtec(tmp_path / "nut")


@pytest.fixture
def train(base, data, tmp_path):
    """Runs the training script's `main` in this process: train("--rank", "4", output=...) -> output folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def run(*more: str, output: Path = tmp_path / "out", data: Path = data, base: Path = base) -> Path:
        reset_accelerate()
        train_defectfill.main(train_defectfill.parse_args(options(base, data, output, *more)))
        return output

    yield run
    reset_accelerate()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_toy_lora(base: Path, folder: Path, *flags: str) -> Path:
    reset_accelerate()
    rates = ("--learning_rate", "0.01", "--text_encoder_lr", "0.01")
    argv = options(base, make_mvtec(folder / "nut"), folder / "lora", *rates, *flags)
    train_defectfill.main(train_defectfill.parse_args(argv))
    reset_accelerate()
    return folder / "lora"


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory) -> Path:
    """A trained toy LoRA with alpha different from rank, shared by the tests that only read it."""
    return train_toy_lora(base, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained_all(base, tmp_path_factory) -> Path:
    """The same of all layers, with another rank for convolutions."""
    return train_toy_lora(base, tmp_path_factory.mktemp("all"), "--lora_targets", "all", "--conv_rank", "2")


@pytest.fixture(scope="session")
def server():
    server = FakeHub(HUB_PORT)
    yield server
    server.shutdown(), server.server_close()


@pytest.fixture
def hub(server, monkeypatch):
    """The tests' own Hub, reachable, with a token."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # of other processes
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.reset()
    yield server
    server.reset()


@pytest.fixture
def alex(monkeypatch):
    """A random AlexNet where LPIPS looks for its backbone, taken for torchvision's."""
    monkeypatch.setattr(selection, "file_digest", lambda file: file.stem.rpartition("-")[2])
    file = os.path.join(HOME, "hub", "checkpoints", LPIPS_FILES["alex"])
    os.makedirs(os.path.dirname(file), exist_ok=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), file)
    yield Path(file)
    for left in Path(file).parent.glob("*"):
        left.unlink()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve good photographs."""
    for number in range(12):
        write_image(tmp_path / f"photos/{number:03d}.png")
    return tmp_path / "photos"


@pytest.fixture
def generated(tmp_path, photos) -> Path:
    return make_generated(tmp_path / "generated")


@pytest.fixture
def inputs(tmp_path):
    """Three good images of their own sizes with masks of the same names."""
    for i, size in enumerate((48, 70, 33)):
        write_mask(tmp_path / "masks" / f"{i:03d}_mask.png", size)
        write_image(tmp_path / "good" / f"{i:03d}.png", size)
    return ["--image", tmp_path / "good", "--mask", tmp_path / "masks"]
