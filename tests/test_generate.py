"""Candidates, selection, compositing and whole runs of the generation script."""

import json
import math
import os
import shutil
import signal
import struct
import zlib
from pathlib import Path

from offline import HOME

import lpips
import numpy as np
import pytest
import torch
from drawn import write_image, write_mask
from folders import make_mvtec
from PIL import Image
from runs import FAST, content, fork, generate, read_lines, wait_for
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models import AlexNet_Weights
from toy_model import RESOLUTION, toy_pipeline

import generate_defectfill as g
from defectfill import base_files, sampling, selection
from defectfill.base_model import read_base
from defectfill.lora import LORA_FILE
from defectfill.runs import files
from defectfill.runs import report as page
from defectfill.seam import feather_alpha
from defectfill_dataset import InputError, image_tensor, pool_mask, upsample_mask


GRID = RESOLUTION // 4


@pytest.fixture(scope="module")
def pipe():
    pipe = toy_pipeline()
    pipe.scheduler = sampling.ddim(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def grid():
    grid = torch.zeros(1, GRID, GRID)
    grid[:, 2:5, 3:7] = 1
    return grid


@pytest.fixture
def good():
    return torch.linspace(-1, 1, RESOLUTION).expand(3, RESOLUTION, RESOLUTION).clone()


# Candidates


def test_a_candidate_depends_on_its_own_seed_alone(pipe, good, grid):
    good, grid = good[None], grid[None]
    [together] = sampling.inpaint(pipe, good, grid, "a nut", [[1, 2, 3]], num_inference_steps=3)
    [in_twos] = sampling.inpaint(pipe, good, grid, "a nut", [[1, 2, 3]], num_inference_steps=3, batch_size=2)
    [alone] = sampling.inpaint(pipe, good, grid, "a nut", [[3]], num_inference_steps=3)
    assert together.shape == (3, 3, RESOLUTION, RESOLUTION) and together.min() >= 0 and together.max() <= 1
    assert torch.allclose(together[2:], alone, atol=2e-4) and torch.allclose(together, in_twos, atol=2e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_pair_comes_out_the_same_among_others_in_its_batch(pipe, good, grid):
    other, elsewhere = good.flip(1), grid.flip(1)
    images, grids = torch.stack([good, other]), torch.stack([grid, elsewhere])
    both = sampling.inpaint(pipe, images, grids, "a nut", [[1, 2], [3, 4]], num_inference_steps=3, batch_size=3)
    assert both.shape == (2, 2, 3, RESOLUTION, RESOLUTION)
    for place, seeds in enumerate(([1, 2], [3, 4])):
        alone = sampling.inpaint(
            pipe, images[place][None], grids[place][None], "a nut", [seeds], num_inference_steps=3
        )
        assert torch.allclose(both[place], alone[0], atol=2e-4)


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
def test_background_latents_follow_the_clean_image_at_each_steps_noise_level(pipe, good, grid, name):
    pipe.scheduler = sampling.SCHEDULERS[name](pipe.scheduler)
    scheduler, seen = sampling.ddim(pipe.scheduler), []  # noise levels, as all of them have them
    record = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoded = pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sampling.inpaint(pipe, good[None], grid[None], "a nut", [[5]], num_inference_steps=4, guidance_scale=1.0)
    record.remove(), decoded.remove()
    pixels = upsample_mask(grid, 4)
    with torch.no_grad():
        both = (
            pipe.vae.encode(torch.stack([good, good * (1 - pixels)])).latent_dist.mode()
            * pipe.vae.config.scaling_factor
        )
        clean, masked = both[:1], both[1:]
        final = pipe.vae.post_quant_conv(clean / pipe.vae.config.scaling_factor)
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(5))[None]
    outside = (grid < 0.5).expand(4, -1, -1)
    assert torch.equal(seen[0][:, :4], noise)  # pure noise to begin with
    for model_input, t in zip(seen[1:4], pipe.scheduler.timesteps[1:]):
        expected = scheduler.add_noise(clean, noise, t[None])
        assert torch.allclose(model_input[0, :4][outside], expected[0][outside], atol=1e-5)
    for model_input in seen[:4]:
        assert torch.equal(model_input[0, 4:5], grid) and torch.allclose(model_input[:, 5:], masked, atol=1e-6)
    assert torch.allclose(seen[4][0][outside], final[0][outside], atol=1e-5)  # the last step is not left noised


@torch.no_grad()
def plain_loop(pipe, image, grid, seed, steps, scale, interval):
    """One candidate by DDIM, guided in `interval`, without the pipeline's loop: the picture, and UNet rows a step."""
    factor = pipe.vae.config.scaling_factor
    both = torch.stack([image, image * (1 - upsample_mask(grid, 4))])
    clean, masked = (pipe.vae.encode(both).latent_dist.mode() * factor).chunk(2)
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(seed))[None]
    embeds, negative = pipe.encode_prompt("a nut", "cpu", 1, True)
    pipe.scheduler.set_timesteps(steps)
    latents, rows, timesteps = noise, [], pipe.scheduler.timesteps
    for i, t in enumerate(timesteps):
        guided = scale > 1 and interval[0] <= i / steps < interval[1]
        texts = [negative, embeds] if guided else [embeds]
        rows.append(len(texts))
        model_input = torch.cat([torch.cat([latents, grid[None], masked], dim=1)] * len(texts))
        pred = pipe.unet(model_input, t, torch.cat(texts)).sample
        if guided:
            empty, text = pred.chunk(2)
            pred = empty + scale * (text - empty)
        latents = pipe.scheduler.step(pred, t, latents).prev_sample
        background = pipe.scheduler.add_noise(clean, noise, timesteps[i + 1 : i + 2]) if i + 1 < steps else clean
        latents = torch.where(grid > 0.5, latents, background)
    return (pipe.vae.decode(latents / factor).sample / 2 + 0.5).clamp(0, 1), rows


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("interval", [None, (0, 1), (0, 0.5), (0.5, 1), (0.3, 0.7), (0.05, 0.1)])
def test_guidance_in_an_interval_is_that_of_a_plain_loop_and_saves_the_unets_work(pipe, good, grid, interval, scale):
    pipe.scheduler, seen = sampling.ddim(pipe.scheduler), []
    record = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    given = {"guidance_interval": interval} if interval else {}
    [painted] = sampling.inpaint(pipe, good[None], grid[None], "a nut", [[5]], 10, scale, **given)
    record.remove()
    expected, rows = plain_loop(pipe, good, grid, 5, 10, scale, interval or (0, 1))
    assert seen == rows and torch.equal(painted, expected)
    begin, end = interval or (0, 1)
    assert sum(rows) == 10 + (scale > 1) * {1: 10, 0.5: 5, 0.4: 4, 0.05: 0}[round(end - begin, 2)]


def test_where_guidance_is_off_pictures_differ_and_a_batch_changes_none(pipe, good, grid):
    images, grids = torch.stack([good, good.flip(1)]), torch.stack([grid, grid.flip(1)])
    whole, half = (
        sampling.inpaint(pipe, images, grids, "a nut", [[1, 2], [3, 4]], 6, batch_size=3, guidance_interval=interval)
        for interval in ((0, 1), (0.5, 1))
    )
    assert not torch.allclose(whole, half, atol=1e-2)
    for place, seeds in enumerate(([1, 2], [3, 4])):
        for k, seed in enumerate(seeds):
            alone, _ = plain_loop(pipe, images[place], grids[place], seed, 6, 7.5, (0.5, 1))
            assert torch.allclose(half[place, k], alone[0], atol=2e-4)


def test_ddim_clips_nothing_whatever_the_bases_scheduler():
    from diffusers import PNDMScheduler

    scheduler = sampling.ddim(PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1))
    assert scheduler.config.clip_sample is False and scheduler.config.steps_offset == 1


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
def test_schedulers_read_the_prediction_as_the_base_means_it(name):
    base = sampling.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    scheduler = sampling.SCHEDULERS[name](base)
    assert (scheduler.config.prediction_type, scheduler.config.beta_schedule) == ("v_prediction", "scaled_linear")


# Selection


def test_the_candidate_least_like_the_normal_image_is_kept():
    assert selection.select([0.1, 0.7, 0.3]) == 1
    assert selection.select([0.1, math.nan, math.inf, 0.3]) == 3
    with pytest.raises(FloatingPointError):
        selection.select([math.nan, math.inf])


@pytest.mark.parametrize("name", ["lpips", "ssim", "rmse"])
def test_scores_grow_with_the_change_and_look_only_inside_the_mask(alex, name):
    score = selection.make_scorer(name, "alex", torch.device("cpu"))
    normal, mask = torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    noise = torch.rand(3, 64, 64)
    steps = [normal + k * (noise - normal) * mask for k in (0.0, 0.3, 1.0)]
    outside = normal + (noise - normal) * (1 - mask)
    scores = score(torch.stack([*steps, outside]), normal, mask)
    assert scores[0] == pytest.approx(0, abs=1e-5) and scores[0] < scores[1] < scores[2]
    assert scores[3] == pytest.approx(0, abs=1e-5 if name != "ssim" else 0.4)  # SSIM's window reaches over the edge


def test_candidates_are_measured_as_they_will_be_pasted():
    """SSIM's window, and the band around a defect that its colours are compared with, reach outside the mask."""
    torch.manual_seed(0)
    source, candidate, other, mask = *torch.rand(3, 3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 10:30, 20:50] = 1
    candidates = torch.stack([candidate, *(torch.where(mask > 0.5, inside, other) for inside in (candidate, source))])
    statistics = {"mean": [0.1, 0, 0], "covariance": torch.eye(3).tolist(), "strangest": 2.0}
    measures = selection.measure(candidates, source, source + 0.01, mask, selection.ssim_score, statistics)
    for of_candidates in (measures.scores, measures.changes, measures.colour_distances):
        assert of_candidates[0] == of_candidates[1] != of_candidates[2]
    assert measures.scores[2] == pytest.approx(0, abs=1e-6) and measures.changes[2] == 0


def test_lpips_is_that_of_image_times_mask(alex):
    normal, other, mask = torch.rand(3, 64, 64), torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 10:30, 20:50] = 1
    model = lpips.LPIPS(net="alex", verbose=False)
    with torch.no_grad():
        expected = model((other * 2 - 1) * mask, (normal * 2 - 1) * mask).item()
    assert selection.lpips_scorer("alex", torch.device("cpu"))(other[None], normal, mask) == [pytest.approx(expected)]


def test_a_missing_lpips_backbone_is_explained(trained, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "load_pipeline", None)  # nothing is loaded before the message
    with pytest.raises(InputError) as caught:
        generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out")
    told = str(caught.value)
    assert told.startswith("DF430") and os.path.join(HOME, "hub", "checkpoints", "alexnet-owt-7be5be79.pth") in told
    assert "--selection ssim, rmse or none" in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize("net", selection.LPIPS_FILES)
@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_a_backbone_file_of_something_else(net, content):
    file = os.path.join(HOME, "hub", "checkpoints", selection.LPIPS_FILES[net])
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(content)
    with pytest.raises(InputError, match=f"DF430 .*{selection.LPIPS_FILES[net]}"):
        selection.lpips_scorer(net, torch.device("cpu"))
    os.remove(file)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.path.join(HOME, "ran"),)


def test_no_code_of_a_backbone_file_is_run(monkeypatch):
    """Not even if its sha256 begins as it should, which is 32 bits."""
    file = os.path.join(HOME, "hub", "checkpoints", selection.LPIPS_FILES["alex"])
    os.makedirs(os.path.dirname(file), exist_ok=True)
    torch.save({"features.0.weight": Evil()}, file)
    try:
        with pytest.raises(InputError, match="DF430 .*sha256 begins with .*, not with 7be5be79"):
            selection.lpips_scorer("alex", torch.device("cpu"))
        monkeypatch.setattr(selection, "file_digest", lambda file: "7be5be79")
        with pytest.raises(InputError, match="DF430 "):
            selection.lpips_scorer("alex", torch.device("cpu"))
    finally:
        os.remove(file)
    assert not os.path.exists(os.path.join(HOME, "ran"))


def test_a_backbone_is_unpickled_once_and_by_nobody_else(alex, monkeypatch):
    load, loads = torch.load, []

    def recording(file, **options):
        loads.append((Path(file).name, options.get("weights_only")))
        return load(file, **options)

    def distances() -> list[float]:
        return selection.lpips_scorer("alex", torch.device("cpu"))(candidates, source, torch.ones(1, 64, 64))

    monkeypatch.setattr(torch, "load", recording)
    candidates, source = torch.rand(2, 3, 64, 64), torch.rand(3, 64, 64)
    first, kept = distances(), alex.with_suffix(".safetensors")
    assert loads == [("alexnet-owt-7be5be79.pth", True), ("alex.pth", True)]  # the second is of the package
    alex.unlink()
    assert distances() == first and kept.exists() and loads[2:] == [("alex.pth", True)]


@pytest.mark.parametrize("change", ["tensor", "source", "half", "none of ours"])
def test_a_swapped_backbone_is_not_used(alex, change):
    expected, kept = selection.read_backbone(alex), alex.with_suffix(".safetensors")
    with safe_open(kept, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    whole, swapped = kept.read_bytes(), tensors | {"features.0.bias": torch.ones(64)}
    if change == "half":
        kept.write_bytes(whole[: len(whole) // 2])
    elif change == "none of ours":
        save_file(swapped, kept)
    elif change == "tensor":
        save_file(swapped, kept, metadata)
    else:
        other = "397923af" + "0" * 56
        save_file(swapped, kept, {"source_sha256": other, "sha256": selection.backbone_seal(swapped, other)})
    found = selection.read_backbone(alex)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    alex.unlink()
    assert selection.read_backbone(alex).keys() == expected.keys()  # it was written anew


def test_a_backbone_is_downloaded_once_with_its_hash(alex, monkeypatch, tmp_path):
    content, asked = alex.read_bytes(), []
    alex.unlink()

    def download(url, to, digest):
        asked.append((url, digest))
        Path(to).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        selection.lpips_scorer("alex", torch.device("cpu"))
        alex.unlink(missing_ok=True)
    assert asked == [(AlexNet_Weights.IMAGENET1K_V1.url, "7be5be79")]


def test_a_cache_that_cannot_be_written_does_not_matter(alex, monkeypatch):
    monkeypatch.setattr(base_files.os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError(13, "no")))
    selection.lpips_scorer("alex", torch.device("cpu"))
    assert not alex.with_suffix(".safetensors").exists()


# Compositing


@pytest.mark.parametrize("size", [(48, 48), (101, 37), (16, 200)])
def test_every_pixel_outside_the_mask_is_the_inputs(size):
    """The whole frame passed through the VAE. Beside `exact`, its alpha is of any strength inside."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    mask = rng.random(size[::-1]) > 0.7
    result = np.asarray(sampling.composite(image, torch.rand(3, 32, 32), mask))
    assert np.array_equal(result[~mask], np.asarray(image)[~mask]) and result.shape == np.asarray(image).shape
    assert (result[mask] != np.asarray(image)[mask]).any(axis=-1).mean() > 0.9
    alpha = rng.integers(0, 256, size[::-1], dtype=np.uint8) * mask
    result = np.asarray(sampling.composite(image, torch.rand(3, 32, 32), alpha))
    assert np.array_equal(result[alpha == 0], np.asarray(image)[alpha == 0])


# Whole runs


def test_a_run_leaves_images_masks_scores_and_a_contact_sheet(trained, inputs, tmp_path):
    """The same seeds for every image; JPEG masks; 256 px output."""
    out = tmp_path / "out"
    generate("--lora", trained, *inputs, "--output_dir", out, *FAST)
    lines = read_lines(out / "manifest.jsonl")
    assert [line["name"] for line in lines] == ["000", "001", "002"]
    for line in lines:
        image, good = (
            np.asarray(Image.open(f)) for f in (out / line["image"], tmp_path / "good" / line["good_image"])
        )
        mask, given = (
            np.asarray(Image.open(f)) for f in (out / line["mask"], tmp_path / "masks" / line["given_mask"])
        )
        assert image.shape == good.shape and np.array_equal(mask, given) and (out / line["mask"]).suffix == ".png"
        assert np.array_equal(image[mask == 0], good[mask == 0]) and not np.array_equal(
            image[mask > 0], good[mask > 0]
        )
        [crop] = line["windows"]
        assert crop["box"] == [0, 0, *good.shape[1::-1]]
        assert len(crop["scores"]) == 3 and crop["chosen"] == int(np.argmax(crop["scores"]))
        assert line["prompt"] == "A photo of sks"
    seeds = [s for line in lines for s in line["windows"][0]["candidate_seeds"]]
    assert len(set(seeds)) == 9
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.size == (5 * (page.CELL + 4) + 4, 3 * (page.CELL + 24))
    red = np.all(np.asarray(sheet) == (255, 0, 0), axis=-1)
    for row, line in enumerate(lines):  # the outline stands around the candidate that was kept
        columns = np.flatnonzero(red[row * (page.CELL + 24) + 50])
        left = 4 + (line["windows"][0]["chosen"] + 2) * (page.CELL + 4)
        assert left - 3 <= columns.min() <= left


def test_the_lora_decides_what_is_painted(trained, base, inputs, tmp_path):
    from defectfill.lora import load_lora, read_lora

    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST)
    line = read_lines(tmp_path / "out/manifest.jsonl")[0]
    pipe = sampling.load_pipeline(read_base(str(base)), None, "no", torch.device("cpu"))
    load_lora(pipe, read_lora(trained))
    image, mask = Image.open(tmp_path / "good/000.png"), np.asarray(Image.open(tmp_path / "masks/000_mask.png")) > 0
    [crop] = line["windows"]
    good, grid = image_tensor(image, RESOLUTION)[None], pool_mask(mask, GRID)[None]
    [candidates] = sampling.inpaint(pipe, good, grid, line["prompt"], [crop["candidate_seeds"]], 2, 7.5)
    expected = sampling.composite(image, candidates[crop["chosen"]], feather_alpha(mask))
    assert np.array_equal(np.asarray(expected), np.asarray(Image.open(tmp_path / "out" / line["image"])))


@pytest.mark.slow
def test_lpips_run(trained, inputs, tmp_path, alex):
    argv = ["--num_inference_steps", 1, "--num_candidates", 2]
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *argv)
    lines = read_lines(tmp_path / "out/manifest.jsonl")
    assert all(score > 0 for line in lines for score in line["windows"][0]["scores"])


def test_one_image_grey_and_turned_by_exif(trained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(
        tmp_path / "a.png", exif=exif
    )
    mask = np.zeros((60, 40), dtype=np.uint8)
    mask[20:30, 10:20] = 1  # coded 0/1
    Image.fromarray(mask).save(tmp_path / "m.png")
    argv = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--output_dir", tmp_path / "out", *FAST]
    generate("--lora", trained / LORA_FILE, *argv, "--selection", "none")
    result = Image.open(tmp_path / "out/images/a.png")
    assert result.mode == "L" and result.size == (40, 60) and not result.getexif()
    good = np.rot90(np.asarray(Image.open(tmp_path / "a.png")), -1)
    assert np.array_equal(np.asarray(result)[mask == 0], good[mask == 0])
    line = read_lines(tmp_path / "out/manifest.jsonl")[0]
    assert line["windows"][0]["chosen"] == 0 and line["windows"][0]["scores"] == [None] * 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_source_without_colour_gets_a_defect_without_colour(trained, tmp_path, monkeypatch, mode):
    """A tinge of colour would tell a detector where the defect is; many cameras save grey as RGB."""
    grey = np.random.default_rng(0).integers(60, 200, (40, 40), dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[5:30, 8:35] = 255
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png"), Image.fromarray(mask).save(tmp_path / "m.png")
    tint = torch.tensor([0.1, 0, -0.05]).view(3, 1, 1)
    measured, measure = [], g.measure
    monkeypatch.setattr(g, "measure", lambda shown, *more: (measured.append(shown), measure(shown, *more))[1])
    monkeypatch.setattr(
        g,
        "inpaint",
        lambda pipe, x, masks, seeds, **_: (0.3 * x + tint + 0.5)[:, None].repeat(1, len(seeds[0]), 1, 1, 1),
    )
    argv = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--output_dir", tmp_path / "out", *FAST]
    generate("--lora", trained / LORA_FILE, *argv)
    result = Image.open(tmp_path / "out/images/a.png")
    pixels = np.asarray(result.convert("RGB"))
    assert result.mode == mode and (pixels == pixels[..., :1]).all()
    assert np.array_equal(pixels[mask == 0, 0], grey[mask == 0]) and not np.array_equal(pixels[..., 0], grey)
    [shown] = measured
    assert torch.equal(shown, shown[:, :1].expand_as(shown))


def test_a_source_of_two_tones_gets_a_defect_in_these_two(trained, tmp_path, monkeypatch):
    """Any other tone would tell a detector where the defect is; so it is with photographs cut to black and white."""
    tones = np.where(np.indices((40, 40)).sum(axis=0) % 16 < 8, 20, 230).astype(np.uint8)
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[5:30, 8:35] = 255
    Image.fromarray(tones).convert("RGB").save(tmp_path / "a.png"), Image.fromarray(mask).save(tmp_path / "m.png")
    argv = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--output_dir", tmp_path / "out", *FAST]
    generate("--lora", trained / LORA_FILE, *argv)
    result = Image.open(tmp_path / "out/images/a.png")
    pixels = np.asarray(result)
    assert result.mode == "RGB" and {*np.unique(pixels)} == {20, 230}
    assert np.array_equal(pixels[mask == 0, 0], tones[mask == 0]) and not np.array_equal(pixels[..., 0], tones)

    def paint(pipe, images, masks, seeds, **_):
        return ((images / 2 + 0.5) * 0.8).unsqueeze(1).expand(*np.shape(seeds), -1, -1, -1)

    monkeypatch.setattr(g, "inpaint", paint)  # greyer, but of the same tones once they are cut: no defect
    monkeypatch.setattr(g, "reconstruct", lambda pipe, images: (images / 2 + 0.5) * 0.99)
    with pytest.raises(SystemExit, match="DF342 a.png: all candidates rejected in 3 attempts: 0 broken, 9 no defect"):
        generate("--lora", trained / LORA_FILE, *argv[:5], tmp_path / "faint", *FAST, "--min_change", "2")


@pytest.mark.slow
def test_random_masks_are_seeded_and_differ(trained, inputs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = ["--mask_source", "random", "--seed", seed, "--output_dir", tmp_path / name, *FAST]
        generate("--lora", trained, *inputs[:2], *argv)
    masks = {n: [(tmp_path / n / "masks" / f"{i:03d}.png").read_bytes() for i in range(3)] for n in "abc"}
    assert masks["a"] == masks["b"] and not set(masks["a"]) & set(masks["c"]) and len(set(masks["a"])) == 3


def test_several_defects_need_a_choice(train, inputs, tmp_path):
    lora = train(data=make_mvtec(tmp_path / "bolt", {"hole": 2, "scratch": 2}))
    argv = ["--lora", lora, *inputs, "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(InputError, match="choose one with --defect: hole, scratch"):
        generate(*argv)
    for more in ([], ["--prompt", "A bolt"]):
        with pytest.raises(InputError, match="Did you mean 'scratch'"):
            generate(*argv, "--defect", "scrtch", *more)
    generate(*argv, "--defect", "scratch")
    assert {line["prompt"] for line in read_lines(tmp_path / "out/manifest.jsonl")} == {"A photo of scratch"}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(trained, inputs, tmp_path):
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "whole", *FAST)
    for fatal in range(1, 1 + len(g.KINDS)):  # killed while a file of the second image is written
        out = tmp_path / f"killed-{fatal}"

        def killed_run(out=out, fatal=fatal):
            flush, calls = files.flush, []

            def flush_or_die(path):
                calls.extend([path] if path.suffix == ".png" else [])
                return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == len(g.KINDS) + fatal else flush(path)

            files.flush = flush_or_die
            generate("--lora", trained, *inputs, "--output_dir", out, *FAST)

        assert wait_for(fork(killed_run)) == -signal.SIGKILL
        part = out / "manifest-part-00000.jsonl"
        assert len(read_lines(part)) == 1 and list(out.rglob(f"{files.TEMPORARY}*"))
        with part.open("a") as lines:
            lines.write('{"name": "001", "sco')  # torn by the kill
        generate("--lora", trained, *inputs, "--output_dir", out, *FAST)
        assert not list(out.rglob(f"{files.TEMPORARY}*")) and not part.exists()
        assert content(out) == content(tmp_path / "whole")


def test_a_finished_run_does_nothing_and_other_settings_are_refused(trained, inputs, tmp_path, monkeypatch):
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    generate(*argv)
    before = content(tmp_path / "out")
    monkeypatch.setattr(g, "load_pipeline", None)
    generate(*argv)
    assert content(tmp_path / "out") == before
    with pytest.raises(InputError, match="DF320 guidance_scale: the run was started with 7.5, now it is 3.0"):
        generate(*argv, "--guidance_scale", "3")


@pytest.mark.parametrize("change", ["image", "mask"])
def test_a_changed_input_is_not_taken_for_done(trained, inputs, tmp_path, change):
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    generate(*argv)
    if change == "image":
        write_image(tmp_path / "good/001.png", 70, seed=5)
    else:
        write_mask(tmp_path / "masks/001_mask.png", 70, seed=5)
    with pytest.raises(InputError, match="DF320 001: was generated from another image or mask"):
        generate(*argv)


@pytest.mark.slow
@pytest.mark.parametrize("kind", g.KINDS)
def test_a_result_that_was_removed_is_painted_again(trained, inputs, tmp_path, kind):
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    generate(*argv)
    before = content(tmp_path / "out")
    (tmp_path / "out" / kind / "001.png").unlink()
    generate(*argv)
    after = content(tmp_path / "out")
    assert after.keys() == before.keys() and all(after[k] == before[k] for k in before if k != "manifest")
    assert sorted(line["name"] for line in after["manifest"]) == ["000", "001", "002"]


def test_a_damaged_manifest_is_told(trained, inputs, tmp_path):
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    generate(*argv)
    manifest = tmp_path / "out/manifest.jsonl"
    manifest.write_text("{]\n" + manifest.read_text())
    with pytest.raises(InputError, match="DF310 .*line 1"):
        generate(*argv)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_inputs_are_never_overwritten(trained, inputs, tmp_path, folder):
    (tmp_path / ("good" if folder == "images" else "masks")).rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    (tmp_path / "moved").rename(tmp_path / "out" / folder)
    paths = {"good": tmp_path / "good", "masks": tmp_path / "masks"}
    paths["good" if folder == "images" else "masks"] = tmp_path / "out" / folder
    before = [f.read_bytes() for f in sorted((tmp_path / "out" / folder).iterdir())]
    with pytest.raises(InputError, match="DF192"):
        argv = ["--image", paths["good"], "--mask", paths["masks"], "--output_dir", tmp_path / "out"]
        generate("--lora", trained, *argv, *FAST)
    assert [f.read_bytes() for f in sorted((tmp_path / "out" / folder).iterdir())] == before


def test_an_image_is_not_its_own_mask(trained, inputs, tmp_path):
    for path in (tmp_path / "good", tmp_path / "good/000.png"):
        with pytest.raises(InputError, match="DF161 .* are the same"):
            generate("--lora", trained, "--image", path, "--mask", path, "--output_dir", tmp_path / "out", *FAST)


def test_runs_on_other_images_of_the_same_names_share_no_seed(trained, inputs, tmp_path):
    for i, size in enumerate((48, 70, 33)):
        write_image(tmp_path / "others" / f"{i:03d}.png", size, seed=9)
    seeds = []
    for name in ("good", "others"):
        argv = ["--image", tmp_path / name, "--mask_source", "random", "--output_dir", tmp_path / f"out-{name}"]
        generate("--lora", trained, *argv, *FAST)
        lines = read_lines(tmp_path / f"out-{name}/manifest.jsonl")
        seeds += [s for line in lines for s in line["windows"][0]["candidate_seeds"]]
    assert len(set(seeds)) == 18
    masks = [(tmp_path / f"out-{name}/masks/000.png").read_bytes() for name in ("good", "others")]
    assert masks[0] != masks[1]


def test_images_alike_in_content_share_no_seed(trained, tmp_path):
    write_image(tmp_path / "good/a.png")
    shutil.copy(tmp_path / "good/a.png", tmp_path / "good/b.png")
    out = tmp_path / "out"
    generate("--lora", trained, "--image", tmp_path / "good", "--mask_source", "random", "--output_dir", out, *FAST)
    seeds = [s for line in read_lines(out / "manifest.jsonl") for s in line["windows"][0]["candidate_seeds"]]
    assert len(set(seeds)) == 6
    assert (out / "masks/a.png").read_bytes() != (out / "masks/b.png").read_bytes()


@pytest.mark.slow
def test_the_scheduler_that_is_asked_for_paints(trained, inputs, tmp_path):
    pictures = set()
    for name in sampling.SCHEDULERS:
        argv = [*FAST, "--num_inference_steps", 5, "--scheduler", name]
        generate("--lora", trained, *inputs, "--output_dir", tmp_path / name, *argv)
        pictures.add((tmp_path / name / "images/000.png").read_bytes())
        assert json.loads((tmp_path / name / "settings.json").read_text())["scheduler"] == name
    assert len(pictures) == len(sampling.SCHEDULERS)


@pytest.mark.slow
def test_bf16_in_small_batches(trained, inputs, tmp_path):
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST, "--mixed_precision", "bf16",
             "--batch_size", 2)  # fmt: skip
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "fp32", *FAST)
    bf16, fp32 = (np.asarray(Image.open(tmp_path / run / "images/000.png")) for run in ("out", "fp32"))
    assert not np.array_equal(bf16, fp32)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["mixed_precision"] == "bf16"


def chosen(out):
    return {line["name"]: line["windows"][0]["chosen"] for line in read_lines(out / "manifest.jsonl")}


def test_a_black_candidate_is_never_kept_even_without_selection(trained, inputs, tmp_path, monkeypatch):
    paint = g.inpaint

    def overflowing(*args, **kwargs):
        candidates = paint(*args, **kwargs)
        candidates[:, 0, 0, 0, 0] = math.nan
        return candidates

    monkeypatch.setattr(g, "inpaint", overflowing)
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST, "--selection", "none")
    assert chosen(tmp_path / "out") == {"000": 1, "001": 1, "002": 1}


def test_candidates_without_a_number_never_win_and_a_case_without_any_is_listed(
    trained, inputs, tmp_path, monkeypatch
):
    def scorer(selection, net, device):
        return lambda candidates, normal, mask: scores.pop(0)

    scores = [[math.nan, 0.2, 0.1], *[[math.nan] * 3] * 3, [0.1, 0.2, math.inf]]  # three attempts at the second
    monkeypatch.setattr(g, "make_scorer", scorer)
    with pytest.raises(SystemExit) as ended:
        generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST)
    assert "DF342 001.png: all candidates rejected in 3 attempts: 9 broken" in str(ended.value)
    assert chosen(tmp_path / "out") == {"000": 1, "002": 1}


# What is refused, before any weight is loaded


def write_deep_rgb(path):
    """A PNG of 16 bits a channel, which Pillow reads as 8."""
    pixels = np.full((70, 70, 3), 40000, dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 70, 70, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    "break_inputs, code",
    [
        (lambda d: shutil.rmtree(d / "good"), "DF160"),
        (lambda d: [f.unlink() for f in (d / "good").iterdir()], "DF161"),
        (lambda d: (d / "masks/001_mask.png").unlink(), "DF142"),
        (lambda d: (d / "good/001.png").unlink(), "DF143"),
        (lambda d: shutil.copy(d / "good/001.png", d / "good/001.jpg"), "DF144"),
        (lambda d: (d / "good/001.png").write_text("no image"), "DF103"),
        (lambda d: write_image(d / "good/001.png", 20), "DF140"),
        (lambda d: Image.new("L", (70, 70)).save(d / "masks/001_mask.png"), "DF145"),
        (lambda d: Image.new("L", (70, 70), 255).save(d / "masks/001_mask.png"), "DF146"),
        (lambda d: Image.new("I;16", (70, 70), 1000).save(d / "good/001.png"), "DF103"),
        (lambda d: Image.new("I;16", (70, 70), 40000).save(d / "good/001.png"), "DF120 .*001.png: has 16 bits"),
        (lambda d: write_deep_rgb(d / "good/001.png"), "DF120 .*001.png: has 16 bits"),
        (lambda d: Image.new("L", (70, 70), 3).save(d / "masks/001_mask.png"), "DF103"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_refused(trained, inputs, tmp_path, monkeypatch, break_inputs, code):
    monkeypatch.setattr(g, "load_pipeline", None)
    break_inputs(tmp_path)
    with pytest.raises(InputError, match=code):
        generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST)


def test_a_lora_of_another_base_is_refused(trained, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "load_pipeline", None)
    toy_pipeline(text_width=64).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"DF410 .*\(4, 32\), but .*other has \(\d+, 64\).*was trained on"):
        argv = [*inputs, "--pretrained_model_name_or_path", tmp_path / "other", "--output_dir", tmp_path / "out"]
        generate("--lora", trained, *argv, *FAST)
    toy_pipeline(unet_channels=(16, 48, 48)).save_pretrained(tmp_path / "deeper")
    with pytest.raises(InputError, match="DF410"):
        argv = [*inputs, "--pretrained_model_name_or_path", tmp_path / "deeper", "--output_dir", tmp_path / "out"]
        generate("--lora", trained, *argv, *FAST)


def test_a_lora_without_a_record_needs_prompt_base_and_resolution(trained, base, inputs, tmp_path):
    with safe_open(trained / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    header.pop("defectfill")
    save_file(tensors, tmp_path / "bare.safetensors", metadata=header)
    argv = ["--lora", tmp_path / "bare.safetensors", *inputs, "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(InputError, match="DF411.*give --prompt"):
        generate(*argv)
    with pytest.raises(InputError, match="DF412"):
        generate(*argv, "--prompt", "A nut with sks")
    with pytest.raises(InputError, match="DF174"):
        generate(*argv, "--prompt", "sks " * 90, "--pretrained_model_name_or_path", base, "--resolution", RESOLUTION)
    with pytest.raises(InputError, match="DF184"):
        generate(*argv, "--prompt", "sks", "--pretrained_model_name_or_path", base, "--resolution", 0)
    generate(*argv, "--prompt", "A nut with sks", "--pretrained_model_name_or_path", base, "--resolution", RESOLUTION)


def test_options_that_contradict(capsys):
    common = ["--lora", "x", "--image", "y", "--output_dir", "z"]
    for wrong in ([], ["--mask", "m", "--mask_source", "random"], ["--mask", "m", "--num_candidates", "0"],
                  ["--mask", "m", "--guidance_scale", "nan"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            g.parse_args([*common, *wrong])
        assert ended.value.code == 2
    defaults = g.parse_args([*common, "--mask", "m"])
    [request] = defaults.requests
    assert (defaults.num_candidates, request.num_inference_steps, request.guidance_scale) == (8, 50, 7.5)
    assert (defaults.selection, defaults.lpips_net) == ("lpips", "alex")
    assert request.guidance_interval == [0, 1]


@pytest.mark.parametrize("interval", ["0.5 0.5", "-0.1 1", "0 1.5", "nan 1", "0 nan", "0 inf", "0.8 0.2"])
def test_intervals_that_cannot_work_are_refused(capsys, interval):
    argv = "--lora x --image y --mask m --output_dir z --guidance_interval".split()
    with pytest.raises(SystemExit):
        g.parse_args([*argv, *interval.split()])
    values = " ".join(str(float(x)) for x in interval.split())
    assert f"--guidance_interval {values}: must be 0 <= START < END <= 1" in capsys.readouterr().err


def test_an_interval_between_two_steps_is_refused(capsys):
    argv = "--lora x --image y --mask m --output_dir z --guidance_interval 0.96 1 --num_inference_steps".split()
    with pytest.raises(SystemExit):
        g.parse_args([*argv, "20"])
    assert "--guidance_interval 0.96 1.0: contains none of the 20 steps; widen it" in capsys.readouterr().err
    g.parse_args([*argv, "50"])
    g.parse_args([*argv, "20", "--guidance_scale", "1"])


def test_an_image_beside_a_folder_of_masks(trained, inputs, tmp_path):
    with pytest.raises(InputError, match="two files or two folders"):
        argv = ["--image", tmp_path / "good/000.png", "--mask", tmp_path / "masks", "--output_dir", tmp_path / "out"]
        generate("--lora", trained, *argv, *FAST)


def test_settings_name_the_lora_and_the_base(trained, inputs, tmp_path):
    generate("--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST)
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert settings["selection"] == "rmse" and settings["base"].endswith("base0")
    for name in ("plan.jsonl", "manifest.jsonl"):
        for line in read_lines(tmp_path / "out" / name):
            assert len(line["lora_sha256"]) == 64 and line["defect"] == "hole" and line["object"] == "nut"
            assert line["num_inference_steps"] == 2 and line["seed"] == 0 and line["mask_source"] == "given"
