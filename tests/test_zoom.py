"""Crops around small and thin defects, in training and in generation."""

import numpy as np
import pytest
import torch
from drawn import write_image
from folders import make_mvtec
from PIL import Image
from runs import generate, read_lines
from skimage.draw import line
from toy_model import RESOLUTION, make_samples

import generate_defectfill
from defectfill.lora import read_lora
from defectfill.runs import report as page
from defectfill_dataset import InputError, load_defect_pairs
from defectfill_dataset.crops import MAX_ENLARGEMENT, CropRule, choose_crop_rule, crop_boxes, crop_mask
from defectfill_dataset.images import image_tensor
from defectfill_dataset.masks import pool_mask


ZOOM = CropRule(context=3, min_area=0.01)


def square(size=(400, 600), top=200, left=300, side=40) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def crack(size: int, width: int, ends: tuple) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    rows, columns = line(*ends)
    for shift in range(width):
        mask[rows, (columns + shift).clip(0, size - 1)] = True
    return mask


def sides(boxes):
    return [(right - left, bottom - top) for left, top, right, bottom in boxes]


def test_without_zoom_the_window_is_the_image():
    assert crop_boxes(square(), 128, None) == [(0, 0, 600, 400)]


def test_a_compact_defect_gets_one_window_of_the_asked_context_around_it():
    assert crop_boxes(square(), 128, ZOOM) == [(260, 160, 380, 280)]
    assert sides(crop_boxes(square(), 128, CropRule(context=5))) == [(200, 200)]


def test_a_window_at_the_rim_is_moved_inside():
    assert crop_boxes(square(top=0, left=560), 128, ZOOM) == [(480, 0, 600, 120)]


def test_a_window_is_neither_enlarged_beyond_reason_nor_larger_than_the_image():
    assert sides(crop_boxes(square(side=2), 512, ZOOM)) == [(512 // MAX_ENLARGEMENT,) * 2]
    assert sides(crop_boxes(square(side=300, top=50, left=100), 128, ZOOM)) == [(400, 400)]
    assert sides(crop_boxes(square((20, 30), 5, 5, 4), 512, ZOOM)) == [(20, 20)]


@pytest.mark.parametrize("ends", [(50, 50, 1950, 1900), (1000, 10, 1000, 1990), (10, 700, 1990, 640)])
def test_a_thin_crack_is_tiled_along_its_length_until_each_tile_shows_enough_of_it(ends):
    mask = crack(2000, 4, ends)
    boxes = crop_boxes(mask, 512, ZOOM)
    assert len(boxes) > 3
    left = mask.copy()
    for box in boxes:
        assert crop_mask(mask, box).mean() >= ZOOM.min_area or box[2] - box[0] == 512 // MAX_ENLARGEMENT
        crop_mask(left, box)[:] = False
    assert not left.any()
    assert mask.mean() < ZOOM.min_area / 2  # what the model would see of it without zoom


def test_each_tile_paints_something_that_no_earlier_one_did():
    left = crack(2000, 3, (30, 30, 1900, 1950))
    for box in crop_boxes(left, 512, ZOOM):
        assert crop_mask(left, box).any()
        crop_mask(left, box)[:] = False


def test_defects_far_apart_get_windows_of_their_own():
    mask = square((1000, 1000), 50, 60, 20) | square((1000, 1000), 900, 800, 20)
    assert sorted(sides(crop_boxes(mask, 128, ZOOM))) == [(60, 60), (60, 60)]


def test_a_crack_longer_than_a_narrow_image_is_wide_is_tiled_whatever_its_share():
    mask = np.zeros((100, 1000), dtype=bool)
    mask[20:80, 10:990] = True
    boxes = crop_boxes(mask, 64, ZOOM)
    assert set(sides(boxes)) == {(100, 100)}
    for box in boxes:
        crop_mask(mask, box)[:] = False
    assert not mask.any()


def test_single_pixels_end_the_halving():
    mask = np.zeros((4000, 4000), dtype=bool)
    mask[::1999, ::1999] = True
    assert len(crop_boxes(mask, 16, ZOOM)) == 9


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_mask_all_of_it_is_covered_by_square_windows_inside(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.01, 0.3])
    mask[rng.integers(height), rng.integers(width)] = True
    zoom = CropRule(rng.uniform(1, 6), rng.choice([1e-4, 0.01, 0.2]))
    for box in crop_boxes(mask, int(rng.choice([8, 64, 512])), zoom):
        left, top, right, bottom = box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height and right - left == bottom - top
        crop_mask(mask, box)[:] = False
    assert not mask.any()


def test_auto_zooms_where_the_median_mask_is_small():
    small, large = square(side=10), square(side=100)
    assert choose_crop_rule("auto", 3, 0.01, [small, small, large]) == ZOOM
    assert choose_crop_rule("auto", 3, 0.01, [small, large, large]) is None
    assert choose_crop_rule("on", 4, 0.02, [large]) == CropRule(4, 0.02)
    assert choose_crop_rule("off", 3, 0.01, [small]) is None


# Training


@pytest.fixture
def large(tmp_path):
    """Pairs of 400 px with defects of 6 to 12 px: 0.02-0.09 % of the image."""
    return make_mvtec(tmp_path / "large", size=400)


def test_windows_train_and_are_measured_in_place_of_whole_images(large):
    data = load_defect_pairs(large)
    samples = make_samples(data["train"], zoom=ZOOM)[0]
    assert len(samples) == 2
    for crop, row, item in zip(samples.crops, data["train"], samples.references()):
        mask = np.asarray(row["mask"]) > 0
        assert [crop.box] == crop_boxes(mask, RESOLUTION, ZOOM) and crop.mask.sum() == mask.sum()
        assert torch.equal(item["pixel_values"], image_tensor(row["image"].crop(crop.box), RESOLUTION))
        assert torch.equal(item["mask"], pool_mask(crop_mask(mask, crop.box), RESOLUTION // 4))
        assert pool_mask(mask, RESOLUTION // 4).mean() < item["mask"].mean() / 4
        sides = crop_boxes(mask, RESOLUTION, ZOOM)[0]
        assert samples[0, 0, 1]["mask"].any() and sides[2] - sides[0] < 40


def test_validation_shows_the_good_image_through_the_reference_window(large):
    data = load_defect_pairs(large)
    write_image(large / "train/good/000.png", 800)  # another size: the same place of it
    data = load_defect_pairs(large)
    samples = make_samples(data["train"], zoom=ZOOM)[0]
    for item, good, crop in zip(samples.validation_items(data["good"], 2), data["good"], samples.crops):
        box = [x * good["image"].width // 400 for x in crop.box]
        assert torch.equal(item["pixel_values"], image_tensor(good["image"].crop(box), RESOLUTION))


@pytest.mark.slow
def test_small_defects_are_zoomed_by_themselves_and_the_lora_says_so(train, large, data, tmp_path):
    lora = read_lora(train(data=large, output=tmp_path / "zoomed"))
    assert lora.record["zoom"] == {"context": 3.0, "min_area": 0.01}
    assert "padding_mask_crop" in (tmp_path / "zoomed/README.md").read_text()
    assert read_lora(train(data=data)).record["zoom"] is None  # defects of 1.5-6 % of 48 px
    assert "padding_mask_crop" not in (tmp_path / "out/README.md").read_text()
    assert read_lora(train("--zoom", "off", data=large, output=tmp_path / "whole")).record["zoom"] is None
    with pytest.raises(InputError, match="DF320 zoom: the run was started with"):
        train("--zoom", "off", "--resume_from_checkpoint", "latest", data=large, output=tmp_path / "zoomed")


@pytest.mark.parametrize("flag, value", [("zoom_context", "0.5"), ("zoom_context", "inf"), ("zoom_min_area", "1")])
def test_zoom_out_of_range_is_refused(train, trained, tmp_path, flag, value, capsys):
    with pytest.raises(InputError, match=f"DF187 --{flag} {float(value)}"):
        train(f"--{flag}", value)
    with pytest.raises(SystemExit):
        generate("--lora", trained, "--image", "x", "--mask", "y", "--output_dir", tmp_path, f"--{flag}", value)
    assert f"--{flag} {float(value)}" in capsys.readouterr().err


# Generation

FAST = ["--num_inference_steps", 1, "--num_candidates", 2, "--selection", "rmse", "--resolution", RESOLUTION]


@pytest.fixture
def tiled(tmp_path):
    """A good image of 300 px with a mask one pixel wide across it."""
    write_image(tmp_path / "good.png", 300)
    mask = crack(300, 1, (10, 10, 280, 250))
    Image.fromarray(mask).convert("L").save(tmp_path / "mask.png")
    return ["--image", tmp_path / "good.png", "--mask", tmp_path / "mask.png", "--output_dir", tmp_path / "out"], mask


def test_a_crack_is_painted_tile_by_tile_and_the_rest_of_the_image_is_untouched(trained, tiled, tmp_path, monkeypatch):
    flags, mask = tiled
    next_crop, seen = generate_defectfill.next_crop, []

    def watched(canvas, *sizes):
        is_new = canvas.crop is None
        crop = next_crop(canvas, *sizes)
        if is_new:
            seen.append((np.asarray(canvas.image.crop(crop.box)), crop.mask.copy()))
        return crop

    monkeypatch.setattr(generate_defectfill, "next_crop", watched)
    generate("--lora", trained, *flags, *FAST, "--zoom", "on")
    [line] = read_lines(tmp_path / "out/manifest.jsonl")
    boxes = [tuple(crop["box"]) for crop in line["windows"]]
    assert boxes == crop_boxes(mask, RESOLUTION, CropRule()) and len(boxes) > 2
    good, result = (np.asarray(Image.open(tmp_path / name)) for name in ("good.png", "out/images/good.png"))
    assert np.array_equal(result[~mask], good[~mask]) and (result[mask] != good[mask]).any(axis=-1).mean() > 0.9
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/masks/good.png")) > 0, mask)
    assert sum(inside.sum() for _, inside in seen) == mask.sum()  # every pixel once
    for (image, inside), box in zip(seen, boxes):  # a tile sees what the tiles before it painted
        elsewhere = ~inside
        left, top, right, bottom = box
        before = crop_mask(mask, box) & elsewhere
        assert np.array_equal(image[before], result[top:bottom, left:right][before])
    assert any((crop_mask(mask, box) & ~inside).any() for (_, inside), box in zip(seen, boxes))
    seeds = [seed for crop in line["windows"] for seed in crop["candidate_seeds"]]
    assert len(set(seeds)) == 2 * len(boxes)
    row = page.CELL + 24
    assert Image.open(tmp_path / "out/contact_sheet.png").height == len(boxes) * row


@pytest.mark.slow
def test_generation_zooms_as_the_lora_was_trained_unless_told(train, large, tiled, tmp_path):
    lora = train("--zoom_context", "2", data=large)
    flags, mask = tiled[0][:-2], tiled[1]

    def boxes(*more):
        out = tmp_path / f"boxes{len(more)}{more[-1:]}"
        generate("--lora", lora, *flags, "--output_dir", out, *FAST, *more)
        saved = read_lines(out / "plan.jsonl")[0]["zoom"]
        return [tuple(w["box"]) for w in read_lines(out / "manifest.jsonl")[0]["windows"]], saved

    assert boxes() == (crop_boxes(mask, RESOLUTION, CropRule(context=2)), {"context": 2.0, "min_area": 0.01})
    given = boxes("--zoom_context", "5", "--zoom_min_area", "0.005")
    assert given == (crop_boxes(mask, RESOLUTION, CropRule(5, 0.005)), {"context": 5.0, "min_area": 0.005})
    assert boxes("--zoom", "off") == ([(0, 0, 300, 300)], None)


def test_window_sizes_without_zoom_are_refused(trained, tiled):
    with pytest.raises(InputError, match="DF413 --zoom_context"):
        generate("--lora", trained, *tiled[0], *FAST, "--zoom_context", "2")
