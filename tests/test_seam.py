"""How a candidate is blended into its image, how strong the seam is, and what really changed."""

import json

import numpy as np
import pytest
import torch
from drawn import write_image
from PIL import Image, ImageDraw
from runs import generate, read_lines
from toy_model import RESOLUTION

import generate_defectfill as g
from defectfill import sampling, seam
from defectfill.lora import read_lora
from defectfill.runs import plan
from defectfill_dataset import CropRule, InputError, crop_boxes, crop_mask, load_defect_pairs, pool_mask
from defectfill_dataset.masks import random_mask


FAST = ["--num_inference_steps", 1, "--num_candidates", 2, "--selection", "rmse"]


def drawn(size: int, *lines: tuple, disc: tuple | None = None) -> np.ndarray:
    """A mask of lines, (points, width) each, and a disc's (left, top, right, bottom)."""
    canvas = Image.new("1", (size, size))
    for points, width in lines:
        ImageDraw.Draw(canvas).line(points, fill=1, width=width)
    if disc:
        ImageDraw.Draw(canvas).ellipse(disc, fill=1)
    return np.asarray(canvas)


# Seam strength


def test_the_step_across_an_outline():
    pixels, mask = np.full((9, 9), 100, dtype=np.uint8), np.zeros((9, 9), dtype=bool)
    mask[3:6, 3:6] = True
    image = lambda: Image.fromarray(pixels)
    assert seam.seam_step(image(), mask) == 0
    pixels[mask] = 150
    assert seam.seam_step(image(), mask) == 50
    pixels[4, 4] = 0  # deep inside
    pixels[0, 0] = 255  # far outside
    assert seam.seam_step(image(), mask) == 50
    pixels[3, 3] = 100  # two of twelve pairs
    assert seam.seam_step(image(), mask) == pytest.approx(50 * 10 / 12)
    one = np.zeros((9, 9), dtype=bool)
    one[2, 7] = True
    pixels[:] = 100
    pixels[1, 7], pixels[3, 7], pixels[2, 6], pixels[2, 8] = 90, 120, 70, 140
    assert seam.seam_step(image(), one) == (10 + 20 + 30 + 40) / 4
    assert seam.seam_step(image().convert("RGB"), one) == (10 + 20 + 30 + 40) / 4
    assert seam.seam_step(image(), np.ones((9, 9), dtype=bool)) is None
    border = np.zeros((9, 9), dtype=bool)
    border[0, 0] = True  # has two neighbours
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = 0, 10, 30
    assert seam.seam_step(image(), border) == 20


def test_the_record_holds_the_references_step(trained):
    train = load_defect_pairs(trained.parent / "nut")["train"]
    steps = [seam.seam_step(row["image"], np.asarray(row["mask"].convert("L")) > 127) for row in train]
    assert len(steps) == 2 and min(steps) > 1
    assert read_lora(trained).record["appearance"]["hole"]["seam_step"] == pytest.approx(np.mean(steps))


# Feather


MASKS = {
    "disc": drawn(120, disc=(20, 20, 80, 80)),
    "crack": drawn(120, ([(3, 100), (40, 30), (110, 60)], 3)),
    "both": drawn(120, ([(50, 50), (115, 5)], 2), disc=(20, 40, 80, 100)),
    "blobs": random_mask(np.random.default_rng(0), 120, 120) | random_mask(np.random.default_rng(1), 120, 120),
    "noise": np.random.default_rng(0).random((120, 120)) > 0.7,
    "border": drawn(120, disc=(-30, -30, 30, 30)),
    "all": np.ones((120, 120), dtype=bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_feathering_stays_inside_the_mask_and_reaches_full_strength_in_every_component(name):
    mask = MASKS[name]
    alpha = seam.feather_alpha(mask)
    assert alpha.dtype == np.uint8 and np.array_equal(alpha > 0, mask)
    labels, number = seam.ndimage.label(mask, np.ones((3, 3)))
    assert all(alpha[labels == i].max() == 255 for i in range(1, number + 1))


def test_the_ramp_is_a_fifth_of_a_disc():
    mask = MASKS["disc"]
    row = seam.feather_alpha(mask)[50, 20:51].astype(int)
    assert row[0] < 50 and (np.diff(row) >= 0).all() and row[-1] == 255
    assert 5 <= np.argmax(row == 255) <= 7 and np.diff(row[:6]).max() < 50


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("slope", [0, 0.3, 1])
def test_the_middle_line_of_a_thin_crack_is_painted_fully(width, slope):
    mask = drawn(130, ([(10, 20), (90, round(20 + 80 * slope))], width))
    alpha = seam.feather_alpha(mask)
    deepest = alpha[:, 12:88].max(axis=0)  # without a gap from end to end; the width of a slanted line varies
    assert (deepest >= 240).all() and (deepest == 255).mean() >= (0.5 if slope else 1)
    assert width < 5 or slope or (alpha[mask] < 130).any()  # and a wider one is feathered


def test_a_thin_branch_of_a_wide_defect_does_not_fade():
    """As it would with one ramp for the whole component."""
    mask = MASKS["both"]
    alpha = seam.feather_alpha(mask)
    branch = drawn(120, ([(90, 22), (115, 5)], 2))
    assert (alpha[branch & mask] == 255).mean() > 0.9
    assert alpha[70, 20:23].max() < 130  # the wide part has its ramp


def test_nothing_fades_at_the_border_of_the_image():
    alpha = seam.feather_alpha(MASKS["border"])
    assert (alpha[0, :20] == 255).all() and alpha[0, 30] < 60


# Grid


@pytest.mark.parametrize("shape", [(32, 32), (50, 33), (5, 90), (257, 128)])
def test_the_grid_covers_the_mask_with_whole_cells(shape):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(shape) > 0.97
        latent_mask = pool_mask(mask, 16)
        covered = seam.grid_mask(latent_mask, shape)
        assert covered.shape == shape and covered[mask].all()
    mask = np.zeros((32, 32), dtype=bool)
    mask[5, 9] = True
    expected = np.zeros((32, 32), dtype=bool)
    expected[4:6, 8:10] = True
    assert np.array_equal(seam.grid_mask(pool_mask(mask, 16), (32, 32)), expected)


# What changed


def test_what_the_autoencoder_alone_does_is_no_change():
    rng = np.random.default_rng(0)
    source = rng.integers(30, 220, (60, 60, 3), dtype=np.uint8)
    blurred = (source + rng.normal(0, 5, source.shape)).round().astype(np.uint8)
    inside = np.zeros((60, 60), dtype=bool)
    inside[10:50, 10:50] = True
    error = seam.vae_error(Image.fromarray(source), Image.fromarray(blurred), inside)
    assert 8 < error < 18
    limits = inside * np.uint8(error)
    pasted = np.where(inside[..., None], blurred, source)
    pasted[20:30, 20:30] = 255 - source[20:30, 20:30] // 8
    changed = seam.changed_mask(Image.fromarray(source), Image.fromarray(pasted), limits)
    assert changed[20:30, 20:30].mean() > 0.95 and not changed[~inside].any()
    changed[20:30, 20:30] = False
    assert changed.sum() / inside.sum() < 0.05
    grey = Image.fromarray(source[..., 0])
    assert not seam.changed_mask(grey, grey, limits * 0).any()


# Whole runs


def pictures(out, name: str, *kinds: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / kind / f"{name}.png")) for kind in kinds]


@pytest.mark.parametrize("how", seam.COMPOSITES)
def test_outside_the_written_mask_every_pixel_is_the_inputs(trained, inputs, tmp_path, how):
    out, lora = tmp_path / "out", read_lora(trained)
    generate("--lora", trained, *inputs, *FAST, "--composite", how, "--output_dir", out)
    for line in read_lines(out / "manifest.jsonl"):
        image, mask, changed = pictures(out, line["name"], "images", "masks", "mask_changed")
        good = np.asarray(Image.open(tmp_path / "good" / line["good_image"]))
        given = np.asarray(Image.open(tmp_path / "masks" / line["given_mask"]))
        assert np.array_equal(image[mask == 0], good[mask == 0])
        assert not changed[mask == 0].any() and changed.any() and set(np.unique(changed)) <= {0, 255}
        assert (mask[given > 0] == 255).all() and np.array_equal(mask, given) == (how != "grid")
        apart = np.abs(image.astype(int) - good).max(axis=2)
        [crop] = line["windows"]
        assert np.array_equal(changed > 0, apart > np.where(mask > 0, crop["vae_error"], 0))
        assert line["composite"] == how and line["mask_changed"] == f"mask_changed/{line['name']}.png"
        assert line["seam_step"] == seam.seam_step(Image.fromarray(image), mask > 0)
        assert line["good_seam_step"] == seam.seam_step(Image.fromarray(good), mask > 0)
        assert line["reference_seam_step"] == lora.record["appearance"]["hole"]["seam_step"]
    assert "Grey step across the mask's outline" in (out / "summary.html").read_text()


def test_a_run_with_another_ramp_does_not_go_on(trained, inputs, tmp_path, monkeypatch):
    argv = ["--lora", trained, *inputs, *FAST, "--output_dir", tmp_path / "out"]
    generate(*argv)
    monkeypatch.setattr(plan, "RAMP_SHARE", 1 / 3)
    with pytest.raises(InputError, match=r"feather: the run was started with \[0.2, 3\]"):
        generate(*argv)


@pytest.fixture
def white(monkeypatch):
    """Whatever is asked for, white is painted; it covers up the VAE's part in what is pasted."""
    monkeypatch.setattr(
        g, "inpaint", lambda pipe, images, masks, seeds, **_: torch.ones(*np.shape(seeds), *images.shape[1:])
    )


def test_the_choice_decides_the_pixels_and_a_case_may_make_its_own(trained, tmp_path, white):
    write_image(tmp_path / "good.png", 64)
    mask = drawn(64, disc=(15, 18, 45, 42))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    lines = [{}, *({"composite": how} for how in seam.COMPOSITES)]
    (tmp_path / "cases.jsonl").write_text(
        "".join(json.dumps(line | {"seed": seed}) + "\n" for seed, line in enumerate(lines))
    )
    argv = ["--lora", trained, "--image", tmp_path / "good.png", "--mask", tmp_path / "mask.png", *FAST]
    generate(*argv, "--cases", tmp_path / "cases.jsonl", "--output_dir", tmp_path / "out")
    made = read_lines(tmp_path / "out/manifest.jsonl")
    assert [line["composite"] for line in made] == ["feather", "feather", "exact", "grid"]
    source = Image.open(tmp_path / "good.png")
    cells = seam.grid_mask(pool_mask(mask, RESOLUTION // 4), mask.shape)
    alphas = [seam.feather_alpha(mask), seam.feather_alpha(mask), mask * np.uint8(255), cells * np.uint8(255)]
    for line, alpha in zip(made, alphas):
        expected = Image.composite(Image.new("RGB", source.size, "white"), source, Image.fromarray(alpha))
        image, label = pictures(tmp_path / "out", line["name"], "images", "masks")
        assert np.array_equal(image, np.asarray(expected)) and np.array_equal(label > 0, alpha > 0)
    steps = [line["seam_step"] for line in made]
    assert steps[0] == steps[1] < steps[2] / 2


@pytest.mark.parametrize("how", seam.COMPOSITES)
def test_the_tiles_of_a_crack_join_without_a_gap(trained, tmp_path, white, how):
    write_image(tmp_path / "good.png", 300)
    mask = drawn(300, ([(10, 10), (250, 280)], 7))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    argv = ["--lora", trained, "--image", tmp_path / "good.png", "--mask", tmp_path / "mask.png", *FAST]
    generate(*argv, "--zoom", "on", "--zoom_min_area", 0.2, "--composite", how, "--output_dir", tmp_path / "out")
    [line] = read_lines(tmp_path / "out/manifest.jsonl")
    boxes = [tuple(crop["box"]) for crop in line["windows"]]
    assert boxes == crop_boxes(mask, RESOLUTION, CropRule(3, 0.2)) and len(boxes) > 2
    image, label = pictures(tmp_path / "out", "good", "images", "masks")
    source = Image.open(tmp_path / "good.png")
    painted = (image == 255).all(axis=2)
    if how == "grid":
        left, expected = mask.copy(), np.zeros_like(mask)
        for box in boxes:
            view = crop_mask(left, box)
            crop_mask(expected, box)[:] |= seam.grid_mask(pool_mask(view, RESOLUTION // 4), view.shape)
            view[:] = False
        assert np.array_equal(label > 0, expected) and (mask <= expected).all() and painted[expected].all()
    else:
        alpha = seam.feather_alpha(mask) if how == "feather" else mask * np.uint8(255)
        expected = Image.composite(Image.new("RGB", source.size, "white"), source, Image.fromarray(alpha))
        assert np.array_equal(image, np.asarray(expected)) and np.array_equal(label > 0, mask)


def test_a_run_goes_on_with_the_choice_it_began_with(trained, inputs, tmp_path):
    argv = ["--lora", trained, *inputs, *FAST, "--output_dir", tmp_path / "out"]
    generate(*argv)
    with pytest.raises(g.InputError, match="DF320 composite: .*'feather', now it is 'exact'"):
        generate(*argv, "--composite", "exact")


def test_a_lora_without_the_references_step_gives_none(trained, inputs, tmp_path, monkeypatch):
    from defectfill.runs import plan

    monkeypatch.setattr(plan.Recipe, "reference_statistics", {})
    generate("--lora", trained, *inputs, *FAST, "--output_dir", tmp_path / "out")
    for line in read_lines(tmp_path / "out/manifest.jsonl"):
        assert line["reference_seam_step"] is None and line["seam_step"] > 0
    assert "references: not known" in (tmp_path / "out/summary.html").read_text()


def test_the_model_pipes_own_result_is_cut_to_the_mask_only_by_the_composite():
    """An all-white candidate under an 8-bit alpha, and under a bool mask, of a size of its own."""
    image, mask = Image.new("RGB", (37, 51)), np.random.default_rng(0).random((51, 37)) > 0.5
    result = np.asarray(sampling.composite(image, torch.ones(3, 16, 16), mask))
    assert np.array_equal(result[..., 0], mask * 255)
    half = np.asarray(sampling.composite(image, torch.ones(3, 16, 16), np.full((51, 37), 51, dtype=np.uint8)))
    assert (half == 51).all()
