"""Toy data, a toy base model and runs of the real scripts, all offline."""

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
HOME = tempfile.mkdtemp(prefix="defectfill-tests-")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]
# Before the libraries read them; tests/test_hub.py starts a Hub at that port.
os.environ.update(
    HF_HOME=HOME, TORCH_HOME=HOME, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1",
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_PORT}", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1",
)  # fmt: skip

import pytest  # noqa: E402


installed = importlib.util.find_spec("defectfill_scripts")
if not installed or not ROOT.joinpath("scripts/__init__.py").samefile(installed.origin):
    pytest.exit("Install this clone first: pip install -c constraints.txt -e .", returncode=4)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.models import alexnet  # noqa: E402

import generate_defectfill  # noqa: E402
import train_defectfill  # noqa: E402
from defectfill.selection import LPIPS_FILES  # noqa: E402
from defectfill_scripts.make_tiny_base import Sizes, build_pipeline  # noqa: E402


torch.set_num_threads(1)  # two threads are no faster at this size, and sums stay the same everywhere

RESOLUTION = 32
COLOURS = {"hole": (20, 20, 20), "scratch": (240, 240, 200), "stain": (60, 160, 60)}


def write_image(
    path: Path, size: int = 48, colour: tuple = (150, 90, 60), mask: np.ndarray | None = None, seed: int = 0
):
    """A noisy flat picture; the defect, where the mask is, in its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(-15, 16, (size, size, 3)) + np.array(
        (150, 90, 60)
    )
    if mask is not None:
        pixels[mask] = colour
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_mask(path: Path, size: int = 48, seed: int = 0) -> np.ndarray:
    """A square of 6-12 pixels somewhere inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    side = rng.integers(6, 13)
    top, left = rng.integers(4, size - side - 4, 2)
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    Image.fromarray(mask).convert("L").save(path)
    return mask


def make_mvtec(root: Path, defects: dict[str, int] | None = None, good: int = 3, size: int = 48) -> Path:
    """An object in MVTec AD's layout; returns its folder."""
    for defect, number in (defects or {"hole": 4}).items():
        for i in range(number):
            mask = write_mask(root / "ground_truth" / defect / f"{i:03d}_mask.png", size)
            write_image(root / "test" / defect / f"{i:03d}.png", size, COLOURS[defect], mask)
    for i in range(good):
        write_image(root / "train" / "good" / f"{i:03d}.png", size)
    return root


def make_seed_layout(root: Path, defects: dict[str, int] | None = None, good: int = 3, size: int = 48) -> Path:
    """An object in the tutorial's layout; returns its folder."""
    for defect, number in (defects or {"hole": 4}).items():
        for i in range(number):
            mask = write_mask(root / "train/defective_masks" / defect / f"{i:03d}_mask.png", size)
            write_image(root / "train/defective" / defect / f"{i:03d}.png", size, COLOURS[defect], mask)
    for i in range(good):
        write_image(root / "test" / "good" / f"{i:03d}.png", size)
    return root


TOY = Sizes(
    resolution=RESOLUTION, vae_channels=(8, 16, 16), unet_channels=(16, 32, 32), attention=(True, True, False),
    head=16, text_width=32, context=77,
)  # fmt: skip


def toy_pipeline(**changes):
    """A small random pipeline: 32 px, 8 x 8 latents, decoder attention at 8 and 4."""
    set_seed(0)
    return build_pipeline(dataclasses.replace(TOY, **changes))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """An object 'nut' with four pairs of one defect type, two held out."""
    return make_mvtec(tmp_path / "nut")


def options(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    common = f"""--pretrained_model_name_or_path {base} --train_data_dir {data} --output_dir {output}
        --resolution {RESOLUTION} --max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 2 --rank 4 --lora_alpha 8
        --validation_steps 0 --report_to none --checkpointing_steps 100"""
    return [*common.split(), *map(str, more)]


def reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


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


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory) -> Path:
    """A trained toy LoRA with alpha different from rank, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    reset_accelerate()
    argv = options(
        base, make_mvtec(folder / "nut"), folder / "lora", "--learning_rate", "0.01", "--text_encoder_lr", "0.01"
    )
    train_defectfill.main(train_defectfill.parse_args(argv))
    reset_accelerate()
    return folder / "lora"


@pytest.fixture
def alex():
    """A random AlexNet where LPIPS looks for its backbone."""
    file = os.path.join(HOME, "hub", "checkpoints", LPIPS_FILES["alex"])
    os.makedirs(os.path.dirname(file), exist_ok=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), file)
    yield file
    os.remove(file)


def generate(*argv) -> None:
    generate_defectfill.main(generate_defectfill.parse_args([str(a) for a in argv]))


OURS = ["defectfill", "defectfill_dataset", "defectfill_scripts", "generate_defectfill", "train_defectfill"]


def in_clean_process(code: str, *argv, cwd: Path, **env: str) -> str:
    """Runs Python code that cannot import anything of ours; returns what it prints."""
    code = f"import sys; sys.modules |= dict.fromkeys({OURS})\n{code}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    command = [sys.executable, "-I", "-W", "error::DeprecationWarning:__main__", "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
