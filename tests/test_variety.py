"""Variety: noise on prompts, a strength of the LoRA for each image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import FAST, content, generate, read_lines
from toy_model import GRID, RESOLUTION, make_batch, make_models, toy_pipeline

import generate_defectfill as g
import train_defectfill as t
from defectfill import sampling
from defectfill.noise_levels import NoiseOptions, noisy_prompts
from defectfill_dataset import InputError


# Noise on prompts


def test_noise_is_each_rows_own_and_as_strong_as_asked():
    embeddings = torch.randn(1, 77, 32) * torch.tensor([3.0, 0.5])[:, None, None]  # two rows of their own spread
    assert noisy_prompts(embeddings, [1, 2], 0) is embeddings
    noisy = noisy_prompts(embeddings, [1, 2], 0.2)
    assert torch.allclose((noisy - embeddings).std(dim=(1, 2)), 0.2 * embeddings.std(dim=(1, 2)), rtol=0.05)
    assert torch.equal(noisy[1:], noisy_prompts(embeddings[1:], [2], 0.2))
    of_one = noisy_prompts(embeddings[:1], [5, 6], 0.2)
    assert of_one.shape == (2, 77, 32) and not torch.allclose(of_one[0], of_one[1], atol=0.1)


def test_a_noisy_candidate_depends_on_its_own_seed_alone():
    pipe = toy_pipeline()
    pipe.scheduler = sampling.ddim(pipe.scheduler)
    images, grids = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1, torch.zeros(2, 1, GRID, GRID)
    grids[..., 2:6, 2:6] = 1

    def inpaint(images, grids, seeds, sigma, **more):
        options = dict(num_inference_steps=3, guidance_interval=(0, 0.5), prompt_noise=sigma)
        return sampling.inpaint(pipe, images, grids, "a nut", seeds, **options, **more)

    both = inpaint(images, grids, [[1, 2], [3, 4]], 0.5, batch_size=3)
    alone = inpaint(images[1:], grids[1:], [[4]], 0.5)
    assert torch.allclose(both[1, 1], alone[0, 0], atol=2e-4)
    plain = inpaint(images, grids, [[1, 2], [3, 4]], 0.0)
    assert (plain - both).abs().amax(dim=(2, 3, 4)).min() > 1e-2


def test_training_noises_each_pass_of_each_sample_by_its_seed_and_measures_without():
    models, batch, options = make_models(), make_batch(2), t.LossOptions()
    seen = []
    models.unet.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["encoder_hidden_states"].detach()), with_kwargs=True
    )
    plain, noisy = (t.sample_noise(models, batch, NoiseOptions(prompt_noise=sigma)) for sigma in (0, 0.1))
    assert torch.equal(plain.noise, noisy.noise) and torch.equal(plain.timesteps, noisy.timesteps)
    assert t.sample_noise(models, batch).prompt_noise == 0
    losses = [t.training_losses(models, batch, sample, options)["loss"].item() for sample in (plain, noisy)]
    assert losses[0] != losses[1]
    noise = seen[1] - seen[0]  # (4, L, D)
    assert len({row.sum().item() for row in noise}) == 4
    one = {k: v[1:] for k, v in batch.items()}
    t.training_losses(models, one, t.sample_noise(models, one, NoiseOptions(prompt_noise=0.1)), options)
    assert torch.allclose(seen[2], seen[1][1::2], atol=1e-5)
    assert {"prompt_noise"} < {*t.IDENTITY}


def images(out) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (out / "images").iterdir()}


def test_a_run_with_noisy_prompts(trained, inputs, tmp_path):
    argv = ["--lora", trained, *inputs, *FAST]
    for name, more in {"plain": [], "off": ["--prompt_noise", 0], "noisy": ["--prompt_noise", 0.5]}.items():
        generate(*argv, *more, "--output_dir", tmp_path / name)
    assert content(tmp_path / "plain") == content(tmp_path / "off")
    plain, noisy = images(tmp_path / "plain"), images(tmp_path / "noisy")
    assert all(plain[name] != noisy[name] for name in plain)
    lines = [read_lines(tmp_path / run / "plan.jsonl") for run in ("plain", "noisy")]
    assert not any("prompt_noise" in line or "lora_scale" in line for line in lines[0])
    assert {line["prompt_noise"] for line in lines[1]} == {0.5}
    with pytest.raises(InputError, match="DF320 prompt_noise"):
        generate(*argv, "--prompt_noise", 0.4, "--output_dir", tmp_path / "noisy")


# Strength of the LoRA


def test_each_image_has_its_own_strength_whatever_the_batch(trained_all, inputs, tmp_path):
    argv = ["--lora", trained_all, *inputs, *FAST]
    generate(*argv, "--output_dir", tmp_path / "plain")
    generate(*argv, "--lora_scale", 1, "--output_dir", tmp_path / "one")
    assert images(tmp_path / "plain") == images(tmp_path / "one")
    generate(*argv, "--lora_scale", 0.2, 1.5, "--output_dir", tmp_path / "range")
    generate(*argv, "--lora_scale", 0.2, 1.5, "--batch_size", 9, "--output_dir", tmp_path / "batched")
    assert images(tmp_path / "range") == images(tmp_path / "batched")
    scales = {line["name"]: line["lora_scale"] for line in read_lines(tmp_path / "range/manifest.jsonl")}
    assert len(set(scales.values())) == 3 and all(0.2 < scale < 1.5 for scale in scales.values())
    assert scales == {line["name"]: line["lora_scale"] for line in read_lines(tmp_path / "batched/plan.jsonl")}
    for name, scale in scales.items():
        single = ["--image", tmp_path / f"good/{name}.png", "--mask", tmp_path / f"masks/{name}_mask.png"]
        out = tmp_path / f"alone-{name}"
        generate("--lora", trained_all, *single, *FAST, "--lora_scale", scale, "--output_dir", out)
        file = f"{name}.png"
        assert images(out)[file] == images(tmp_path / "range")[file] != images(tmp_path / "plain")[file]
    with pytest.raises(InputError, match="DF320 lora_scale"):
        generate(*argv, "--lora_scale", 0.2, 1.4, "--output_dir", tmp_path / "range")


@pytest.mark.slow
def test_a_strength_does_not_last_for_the_next_request_fused_or_not(trained, inputs, tmp_path):
    single = {"image": str(tmp_path / "good/000.png"), "mask": str(tmp_path / "masks/000_mask.png")}
    lines = [single | more for more in ({}, {"lora_scale": [0.3]}, {"lora_scale": 0}, {"seed": 1})]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for run, more in {"plain": [], "fused": ["--fuse_lora"]}.items():
        argv = ["--lora", trained, "--cases", tmp_path / "cases.jsonl", *FAST, *more, "--output_dir", tmp_path / run]
        generate(*argv)
        files = [tmp_path / run / line["image"] for line in read_lines(tmp_path / run / "manifest.jsonl")]
        found[run] = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert len(found["plain"]) == 4
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(found["plain"], found["fused"]))
    full, third, none, last = found["plain"]
    assert (full != third).any() and (third != none).any()
    alone = ["--image", single["image"], "--mask", single["mask"], "--seed", 1, "--output_dir", tmp_path / "alone"]
    generate("--lora", trained, *alone, *FAST)
    assert np.array_equal(last, np.asarray(Image.open(tmp_path / "alone/images/000.png")))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--prompt_noise -1", "--prompt_noise -1.0: must be a finite number of at least 0"),
        ("--prompt_noise nan", "--prompt_noise nan"),
        ("--lora_scale 1 0.5", "--lora_scale 1.0 0.5: give one finite number"),
        ("--lora_scale -1", "give one finite number of at least 0"),
        ("--lora_scale 0 inf", "give one finite number"),
        ("--lora_scale 0.1 0.2 0.3", "or two"),
        ("--lora_scale 0.5 1 --fuse_lora", "leave out --fuse_lora"),
        ("--lora_scale 0.5 1 --torch_compile", "leave out --fuse_lora and --torch_compile"),
    ],
)
def test_values_that_cannot_work_are_refused(capsys, flags, words):
    argv = "--lora x --image y --mask m --output_dir z".split()
    with pytest.raises(SystemExit):
        g.parse_args([*argv, *flags.split()])
    assert words in capsys.readouterr().err
    g.parse_args([*argv, "--lora_scale", "0.5", "--fuse_lora"])
