"""What makes generation faster: which pictures stay the same bit for bit, and which change by rounding."""

import functools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from runs import FAST, generate, read_lines
from safetensors import safe_open
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from toy_model import RESOLUTION, toy_pipeline

import generate_defectfill as g
from defectfill import sampling, selection
from defectfill.likeness import Likeness, vae_features
from defectfill.lora import LORA_FILE
from defectfill.runs import report as page
from defectfill.runs import speed
from defectfill.runs.files import save_image
from defectfill_dataset import InputError, tensor_image
from defectfill_dataset.samples import Crop


@pytest.fixture
def other_lora(trained, tmp_path):
    """Another LoRA of the same base and prompts."""
    with safe_open(trained / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) * -2 for name in file.keys()}
    (tmp_path / "other").mkdir()
    save_file(tensors, tmp_path / "other" / LORA_FILE, metadata=header)
    return tmp_path / "other"


def pictures(out) -> dict[tuple, np.ndarray]:
    """The images of a run by LoRA and good image, as int."""
    lines = read_lines(out / "manifest.jsonl")
    return {
        (line["lora_sha256"], line["good_image"]): np.asarray(Image.open(out / line["image"])).astype(int)
        for line in lines
    }


def equal(some: dict[tuple, np.ndarray], others: dict[tuple, np.ndarray]) -> bool:
    return all(np.array_equal(some[key], others[key]) for key in some.keys() & others.keys())


# Options that change pixels by rounding


@pytest.mark.slow
def test_a_fused_lora_leaves_the_weights_as_they_were_for_the_next(
    trained_all, other_lora, inputs, tmp_path, monkeypatch
):
    paint, layers = g.inpaint, []

    def record(pipe, *args, **kwargs):
        layers.append(
            sum(isinstance(m, BaseTunerLayer) for part in (pipe.unet, pipe.text_encoder) for m in part.modules())
        )
        return paint(pipe, *args, **kwargs)

    monkeypatch.setattr(g, "inpaint", record)
    runs = {
        "both": [trained_all, other_lora, "--fuse_lora"],
        "one": [other_lora, "--fuse_lora"],
        "plain": [trained_all, other_lora],
    }
    for name, argv in runs.items():
        layers.clear()
        generate("--lora", *argv, *inputs, "--output_dir", tmp_path / name, *FAST)
        assert all(layers) if name == "plain" else not any(layers)
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert settings["fuse_lora"] == (name != "plain")
    both, one, plain = (pictures(tmp_path / name) for name in runs)
    assert len(both) == len(plain) == 6 and len(one) == 3 and equal(both, one)
    assert max(np.abs(both[key] - plain[key]).max() for key in both) <= 1
    first, second = (np.stack([p.sum() for (sha, _), p in both.items() if sha == s]) for s in {s for s, _ in both})
    assert (first != second).all()
    with pytest.raises(InputError, match="DF320 fuse_lora: the run was started with False, now it is True"):
        generate("--lora", trained_all, other_lora, *inputs, "--output_dir", tmp_path / "plain", *FAST, "--fuse_lora")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--channels_last"], ["--torch_compile"], ["--torch_compile", "unet"]], ids=" ".join
)
def test_layout_and_compiling_change_pixels_by_rounding_alone(
    trained, other_lora, inputs, tmp_path, monkeypatch, flags
):
    """With two LoRAs, fused, so that a compiled UNet must see the second one's weights. No C++ compiler is needed."""
    paint, pipes = g.inpaint, []
    monkeypatch.setattr(g, "compile_unet", functools.partial(g.compile_unet, backend="aot_eager"))
    monkeypatch.setattr(
        g, "inpaint", lambda pipe, *args, **kwargs: (pipes.append(pipe), paint(pipe, *args, **kwargs))[1]
    )
    torch._dynamo.reset()
    counters.clear()
    common = ["--lora", trained, other_lora, *inputs, *FAST, "--fuse_lora", "--output_dir"]
    generate(*common, tmp_path / "plain")
    assert not counters["stats"]
    generate(*common, tmp_path / "fast", *flags)
    fast, plain = pictures(tmp_path / "fast"), pictures(tmp_path / "plain")
    assert len(fast) == 6 and max(np.abs(fast[key] - plain[key]).max() for key in fast) <= 1
    for name, pipe in (("plain", pipes[0]), ("fast", pipes[-1])):
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        told = settings["channels_last"], settings["torch_compile"]
        expected = (flags[0] == "--channels_last", (["blocks", *flags[1:]][-1]) if "compile" in flags[0] else None)
        assert told == (expected if name == "fast" else (False, None))
        for layer in (pipe.unet.conv_in, pipe.vae.decoder.conv_in):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last) == told[0]
    assert bool(counters["stats"]["unique_graphs"]) == ("compile" in flags[0])


# What fetches numbers from the device, each time waiting for it


class Fetches(TorchDispatchMode):
    """Counts the numbers that Python asks of tensors one by one."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_sampling_step_never_waits_for_the_device():
    pipe, good, grid = toy_pipeline(), torch.zeros(1, 3, RESOLUTION, RESOLUTION), torch.zeros(1, 1, 8, 8)
    pipe.set_progress_bar_config(disable=True)
    grid[..., 2:5, 3:7] = 1
    plain = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    found, painted = {}, []
    for name, scheduler in (("ours", sampling.ddim(pipe.scheduler)), ("plain", plain)):
        pipe.scheduler = scheduler
        for steps in (4, 8):
            with Fetches() as fetches:
                candidates = sampling.inpaint(pipe, good, grid, "a nut", [[1, 2]], steps, guidance_interval=(0, 0.5))
            found[name, steps] = fetches.number
            painted.append(candidates)
    assert found["ours", 8] == found["ours", 4] and found["plain", 8] >= found["plain", 4] + 3 * 4
    assert torch.equal(painted[0], painted[2]) and torch.equal(painted[1], painted[3])


@pytest.mark.parametrize("name", ["lpips", "ssim", "rmse"])
def test_measures_of_more_candidates_ask_the_device_for_no_more_numbers(name, alex):
    scorer = selection.make_scorer(name, "alex", torch.device("cpu"))
    torch.manual_seed(0)
    candidates, source, mask = torch.rand(8, 3, 64, 64), torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 10:30, 20:50] = 1
    statistics = {"mean": [0.1, 0, 0], "covariance": torch.eye(3).tolist(), "strangest": 2.0}
    crop = Crop("a", "hole", tensor_image(source), mask[0].numpy() > 0, (0, 0, 64, 64), (64, 64))
    likeness = Likeness(vae_features(toy_pipeline().vae), [crop] * 3, 64, torch.device("cpu"))
    found, measured = [], []
    for number in (2, 8):
        with Fetches() as fetches:
            some = candidates[:number]
            measured.append(selection.measure(some, source, source + 0.01, mask, scorer, statistics, likeness))
        found.append(fetches.number)
    assert found[0] == found[1]
    for of_two, of_eight in zip(measured[0], measured[1]):
        assert of_two is True or of_eight[:2] == pytest.approx(of_two, rel=1e-5)


def test_lpips_takes_the_sources_features_once(alex, monkeypatch):
    score, model = selection.lpips_scorer("alex", torch.device("cpu")), lpips.LPIPS(net="alex", verbose=False)
    candidates, source, mask = torch.rand(4, 3, 64, 64), torch.rand(3, 64, 64), torch.ones(1, 64, 64)
    rows = []
    monkeypatch.setattr(type(model.net), "forward", record_rows(type(model.net).forward, rows))
    scores = score(candidates, source, mask)
    assert rows == [4, 1]
    one_by_one = [model(candidate[None] * 2 - 1, source[None] * 2 - 1).item() for candidate in candidates]
    assert scores == pytest.approx(one_by_one, rel=1e-5) and len(set(scores)) == 4


def record_rows(forward, rows):
    def recording(self, images):
        rows.append(len(images))
        return forward(self, images)

    return recording


def test_ssim_is_scikit_images():
    torch.manual_seed(0)
    source, mask = torch.rand(3, 40, 40), torch.zeros(1, 40, 40)
    candidates = torch.stack([source, source + 0.1 * torch.rand(3, 40, 40), torch.rand(3, 40, 40)])
    mask[:, :25, 3:40] = 1  # up to three borders
    expected = []
    for candidate in candidates:
        _, each = structural_similarity(
            candidate.double().numpy(), source.double().numpy(), channel_axis=0, data_range=1.0, full=True
        )
        expected.append(1 - each.mean(axis=0)[mask[0].numpy() > 0.5].mean())
    assert selection.ssim_score(candidates, source, mask) == pytest.approx(expected, abs=1e-9)


# What threads do beside the model


def content(folder) -> dict:
    """Every picture's bytes, and the manifest's lines without their times."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "manifest.jsonl")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")} | {"manifest": lines}


def test_a_batch_is_painted_while_the_next_is_prepared_and_the_one_before_written(
    trained, inputs, tmp_path, monkeypatch
):
    prepared, written = ({f"{i:03d}": threading.Event() for i in range(3)} for _ in range(2))
    start, paint, write, seen = g.start_canvas, g.inpaint, g.write_image, []

    def start_and_tell(planned, *args):
        canvas = start(planned, *args)
        prepared[planned.name].set()
        return canvas

    def write_and_tell(canvas, *args):
        line = write(canvas, *args)
        written[canvas.planned.name].set()
        return line

    def wait_and_paint(*args, **kwargs):
        place = len(seen)
        beside = [*list(prepared.values())[place + 1 : place + 2], *list(written.values())[max(place - 1, 0) : place]]
        seen.append([event.wait(60) for event in beside])
        return paint(*args, **kwargs)

    for name, function in (("start_canvas", start_and_tell), ("write_image", write_and_tell)):
        monkeypatch.setattr(g, name, function)
    monkeypatch.setattr(g, "inpaint", wait_and_paint)
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST)
    assert seen == [[True], [True, True], [True]]


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(trained, inputs, tmp_path, monkeypatch):
    for number in (1, 8):
        monkeypatch.setattr(g, "WRITERS", number)
        common = ["--lora", trained, *inputs, "--num_images", 9, "--batch_size", 9, *FAST]
        generate(*common, "--output_dir", tmp_path / str(number))
    assert content(tmp_path / "1") == content(tmp_path / "8")
    names = [line["name"] for line in read_lines(tmp_path / "8/manifest.jsonl")]
    assert names == [line["name"] for line in read_lines(tmp_path / "8/plan.jsonl")] and len(names) == 9


@pytest.mark.slow
@pytest.mark.parametrize("where", ["start_canvas", "write_image"])
def test_an_error_in_a_thread_ends_the_run_and_loses_nothing_that_was_written(
    trained, inputs, tmp_path, monkeypatch, where
):
    argv = ["--lora", trained, *inputs, *FAST, "--output_dir"]
    generate(*argv, tmp_path / "whole")
    work, out = getattr(g, where), tmp_path / "out"

    def fail(of, *args):
        if getattr(of, "planned", of).name == "001":
            raise ValueError("a fault")
        return work(of, *args)

    with monkeypatch.context() as patch:
        patch.setattr(g, where, fail)
        with pytest.raises(ValueError, match="a fault"):
            generate(*argv, out)
    kept = [line["name"] for line in read_lines(out / "manifest-part-00000.jsonl")]
    assert kept == (["000"] if where == "start_canvas" else ["000", "002"][: len(kept)]) and kept
    generate(*argv, out)
    assert content(out) == content(tmp_path / "whole")


def test_threads_that_write_leave_the_umask_alone(tmp_path, monkeypatch):
    umask = os.umask

    def slow_umask(mask):
        before = umask(mask)
        time.sleep(0.01)
        return before

    before = umask(0o027)
    monkeypatch.setattr(os, "umask", slow_umask)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: save_image(Image.new("L", (8, 8)), tmp_path / f"{i}.png"), range(8)))
    assert umask(before) == 0o027
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_a_picture_is_compressed_quickly(tmp_path):
    save_image(Image.linear_gradient("L"), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[data.index(b"IDAT") + 4 :][:2] == b"\x78\x01"  # zlib's mark of its fastest level
    assert Image.open(tmp_path / "a.png").tobytes() == Image.linear_gradient("L").tobytes()


# What a run reports of its speed


def test_speed_is_counted_without_loading_and_without_the_first_batch(trained, inputs, tmp_path, monkeypatch):
    now, load, paint = [0.0], g.load_pipeline, g.inpaint
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def taking(seconds, work):
        def run(*args, **kwargs):
            now[0] += seconds.pop(0)
            return work(*args, **kwargs)

        return run

    monkeypatch.setattr(g, "load_pipeline", taking([100.0], load))
    monkeypatch.setattr(g, "inpaint", taking([10.0, 2.0, 3.0], paint))
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    generate(*argv)
    expected = {
        "device": "cpu",
        "processes": 1,
        "images": 3,
        "seconds_per_image": 5.0,
        "warm_seconds_per_image": 2.5,
        "first_batch_seconds": 10.0,
        "loading_seconds": 100.0,
        "peak_memory_bytes": None,
    }
    assert json.loads((tmp_path / "out/speed.json").read_text()) == expected
    told = "The last start generated 3 images on cpu, processes: 1: 5 s per image, not counting model loading."
    assert told in (tmp_path / "out/summary.html").read_text()
    generate(*argv)  # makes nothing
    assert json.loads((tmp_path / "out/speed.json").read_text()) == expected


def test_the_speed_of_several_processes_is_that_of_the_slowest():
    common = {"device": torch.device("cpu"), "first_images": 2}
    speeds = [
        speed.Speed(**common, images=4, seconds=8.0, first_seconds=5.0, peak_memory_bytes=2**30),
        speed.Speed(**common, images=6, seconds=9.0, first_seconds=3.0, peak_memory_bytes=2**31),
        speed.Speed(torch.device("cpu")),
    ]
    found = speed.summarise(speeds)
    assert (found["processes"], found["images"], found["peak_memory_bytes"]) == (3, 10, 2**31)
    assert (found["seconds_per_image"], found["warm_seconds_per_image"]) == (0.9, 1.0)
    assert "peak memory 2.0 GiB" in page.speed_line(found)
    nothing = speed.summarise(speeds[2:])
    assert nothing["images"] == 0 and nothing["seconds_per_image"] is None and page.speed_line(nothing) == ""
