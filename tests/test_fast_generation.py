"""What makes generation faster: which pictures stay the same bit for bit, and which change by rounding."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import generate, read_lines, write_image, write_mask
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import generate_defectfill as g
from defectfill.lora import LORA_FILE
from defectfill_dataset import InputError


FAST = ["--num_inference_steps", 2, "--num_candidates", 3, "--selection", "rmse"]


@pytest.fixture
def inputs(tmp_path):
    """Three good images of their own sizes with masks of the same names."""
    for i, size in enumerate((48, 70, 33)):
        write_mask(tmp_path / "masks" / f"{i:03d}_mask.png", size)
        write_image(tmp_path / "good" / f"{i:03d}.png", size)
    return ["--image", tmp_path / "good", "--mask", tmp_path / "masks"]


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


def test_a_fused_lora_leaves_the_weights_as_they_were_for_the_next(trained, other_lora, inputs, tmp_path, monkeypatch):
    paint, layers = g.inpaint, []

    def record(pipe, *args, **kwargs):
        layers.append(
            sum(isinstance(m, BaseTunerLayer) for part in (pipe.unet, pipe.text_encoder) for m in part.modules())
        )
        return paint(pipe, *args, **kwargs)

    monkeypatch.setattr(g, "inpaint", record)
    runs = {
        "both": [trained, other_lora, "--fuse_lora"],
        "one": [other_lora, "--fuse_lora"],
        "plain": [trained, other_lora],
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
    with pytest.raises(InputError, match="DF320 fuse_lora: the run began with False, now it is True"):
        generate("--lora", trained, other_lora, *inputs, "--output_dir", tmp_path / "plain", *FAST, "--fuse_lora")


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
