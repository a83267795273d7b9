"""Square crops around a defect, so that small and thin ones get enough pixels at the model's size.

A box is (left, top, right, bottom) in pixels, as Pillow's `crop` takes it; H x W are the image's pixels.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .masks import bounds


Box = tuple[int, int, int, int]

MAX_ENLARGEMENT = 4  # a crop is at least 1/4 of the model's size a side: enlarged more it would only be blur
PLACES = 33  # of a box that are tried along each side


class CropRule(NamedTuple):
    """How crops are laid around a defect.

    Args:
        context: side of a crop over the longer side of the defect in it, at least 1.
        min_area: least share of a crop that its defect covers; a defect that covers less is split, in (0, 1).
    """

    context: float = 3.0
    min_area: float = 0.01


def crop_boxes(
    mask: np.ndarray, resolution: int, zoom: CropRule | None, others: np.ndarray | None = None
) -> list[Box]:
    """Square boxes inside the image which hold every pixel of a (H, W) mask; the whole image without zoom.

    A defect that covers too little of its crop, because it is long and thin or consists of several, is halved along
    its longer side until each piece covers enough; so cracks are tiled along their length. Pieces that lie in an
    earlier box get none of their own.

    Args:
        mask: not empty.
        resolution: side of the square that the model sees.
        others: (H, W) bool, defects of other types: boxes are moved, or made smaller, to leave them out if they can.
    """
    height, width = mask.shape
    if zoom is None:
        return [(0, 0, width, height)]
    greatest = min(height, width)
    least = min(math.ceil(resolution / MAX_ENLARGEMENT), greatest)
    boxes: list[Box] = []
    left, top, *_ = marked = bounds(mask)
    pieces = [np.argwhere(crop_mask(mask, marked)) + (top, left)]
    while pieces:
        points = pieces.pop()
        if _covered(points, boxes):
            continue
        low, high = points.min(axis=0), points.max(axis=0) + 1
        longer = int((high - low).max())
        side = int(np.clip(round(zoom.context * longer), least, greatest))
        top, left = ((low + high - side) // 2).clip(0, [height - side, width - side]).tolist()
        share = mask[top : top + side, left : left + side].mean()
        if longer > side or (share < zoom.min_area and side > least and longer > 1):
            axis = int((high - low).argmax())
            second = points[:, axis] >= (low + high)[axis] / 2
            pieces += [points[second], points[~second]]
        else:
            box = (left, top, left + side, top + side)
            boxes.append(box if others is None else _apart(box, low, high, others, least))
    return boxes


def _apart(box: Box, low: np.ndarray, high: np.ndarray, others: np.ndarray, least: int) -> Box:
    """The box, or else the largest and nearest around the piece from `low` to `high` (y, x) without other defects."""
    if not crop_mask(others, box).any():
        return box
    height, width = others.shape
    sums = np.pad(others.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    middle = np.array([box[1] + box[3], box[0] + box[2]]) / 2
    side = box[2] - box[0]
    while side >= max(least, int((high - low).max())):
        first, last = np.maximum(high - side, 0), np.minimum(low, (height - side, width - side))
        tops, lefts = (np.unique(np.linspace(a, b, PLACES).astype(int)) for a, b in zip(first, last))
        y, x = np.meshgrid(tops, lefts, indexing="ij")
        inside = sums[y + side, x + side] - sums[y, x + side] - sums[y + side, x] + sums[y, x]
        if (inside == 0).any():
            far = np.hypot(y + side / 2 - middle[0], x + side / 2 - middle[1])
            top, left = (int(v.flat[np.where(inside == 0, far, np.inf).argmin()]) for v in (y, x))
            return left, top, left + side, top + side
        side = min(side - 1, round(0.85 * side))
    return box


def _covered(points: np.ndarray, boxes: list[Box]) -> bool:
    """Whether each of the (n, 2) points (y, x) lies in one of the boxes."""
    for left, top, right, bottom in reversed(boxes):  # the latest are the nearest
        points = points[((points < (top, left)) | (points >= (bottom, right))).any(axis=1)]
        if not len(points):
            return True
    return not len(points)


def crop_mask(mask: np.ndarray, box: Box) -> np.ndarray:
    """The part of a (H, W) mask inside a box, as a view."""
    left, top, right, bottom = box
    return mask[top:bottom, left:right]


def fit_box(box: Box, size: tuple[int, int], other: tuple[int, int]) -> Box:
    """The box at the same place of an image of another (W, H)."""
    across, down = other[0] / size[0], other[1] / size[1]
    left, top, right, bottom = (round(x * f) for x, f in zip(box, (across, down) * 2))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def choose_crop_rule(mode: str, context: float, min_area: float, masks: Iterable[np.ndarray]) -> CropRule | None:
    """The zoom that `--zoom` asks for; `auto` zooms if the median mask covers less of its image than `min_area`."""
    if mode == "off" or (mode == "auto" and np.median([mask.mean() for mask in masks]) >= min_area):
        return None
    return CropRule(context, min_area)
