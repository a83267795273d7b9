"""Zoom: windows around small and thin defects, in training and in generation."""

import numpy as np
import pytest
from skimage.draw import line

from defectfill_dataset.zoom import MAX_ENLARGEMENT, Zoom, choose_zoom, cut, zoom_boxes


ZOOM = Zoom(context=3, min_area=0.01)


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
    assert zoom_boxes(square(), 128, None) == [(0, 0, 600, 400)]


def test_a_compact_defect_gets_one_window_of_the_asked_context_around_it():
    assert zoom_boxes(square(), 128, ZOOM) == [(260, 160, 380, 280)]
    assert sides(zoom_boxes(square(), 128, Zoom(context=5))) == [(200, 200)]


def test_a_window_at_the_rim_is_moved_inside():
    assert zoom_boxes(square(top=0, left=560), 128, ZOOM) == [(480, 0, 600, 120)]


def test_a_window_is_neither_enlarged_beyond_reason_nor_larger_than_the_image():
    assert sides(zoom_boxes(square(side=2), 512, ZOOM)) == [(512 // MAX_ENLARGEMENT,) * 2]
    assert sides(zoom_boxes(square(side=300, top=50, left=100), 128, ZOOM)) == [(400, 400)]
    assert sides(zoom_boxes(square((20, 30), 5, 5, 4), 512, ZOOM)) == [(20, 20)]


@pytest.mark.parametrize("ends", [(50, 50, 1950, 1900), (1000, 10, 1000, 1990), (10, 700, 1990, 640)])
def test_a_thin_crack_is_tiled_along_its_length_until_each_tile_shows_enough_of_it(ends):
    mask = crack(2000, 4, ends)
    boxes = zoom_boxes(mask, 512, ZOOM)
    assert len(boxes) > 3
    left = mask.copy()
    for box in boxes:
        assert cut(mask, box).mean() >= ZOOM.min_area or box[2] - box[0] == 512 // MAX_ENLARGEMENT
        cut(left, box)[:] = False
    assert not left.any()
    assert mask.mean() < ZOOM.min_area / 2  # what the model would see of it without zoom


def test_each_tile_paints_something_that_no_earlier_one_did():
    left = crack(2000, 3, (30, 30, 1900, 1950))
    for box in zoom_boxes(left, 512, ZOOM):
        assert cut(left, box).any()
        cut(left, box)[:] = False


def test_defects_far_apart_get_windows_of_their_own():
    mask = square((1000, 1000), 50, 60, 20) | square((1000, 1000), 900, 800, 20)
    assert sorted(sides(zoom_boxes(mask, 128, ZOOM))) == [(60, 60), (60, 60)]


def test_a_crack_longer_than_a_narrow_image_is_wide_is_tiled_whatever_its_share():
    mask = np.zeros((100, 1000), dtype=bool)
    mask[20:80, 10:990] = True
    boxes = zoom_boxes(mask, 64, ZOOM)
    assert set(sides(boxes)) == {(100, 100)}
    for box in boxes:
        cut(mask, box)[:] = False
    assert not mask.any()


def test_single_pixels_end_the_halving():
    mask = np.zeros((4000, 4000), dtype=bool)
    mask[::1999, ::1999] = True
    assert len(zoom_boxes(mask, 16, ZOOM)) == 9


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_mask_all_of_it_is_covered_by_square_windows_inside(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.01, 0.3])
    mask[rng.integers(height), rng.integers(width)] = True
    zoom = Zoom(rng.uniform(1, 6), rng.choice([1e-4, 0.01, 0.2]))
    for box in zoom_boxes(mask, int(rng.choice([8, 64, 512])), zoom):
        left, top, right, bottom = box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height and right - left == bottom - top
        cut(mask, box)[:] = False
    assert not mask.any()


def test_auto_zooms_where_the_median_mask_is_small():
    small, large = square(side=10), square(side=100)
    assert choose_zoom("auto", 3, 0.01, [small, small, large]) == ZOOM
    assert choose_zoom("auto", 3, 0.01, [small, large, large]) is None
    assert choose_zoom("on", 4, 0.02, [large]) == Zoom(4, 0.02)
    assert choose_zoom("off", 3, 0.01, [small]) is None
