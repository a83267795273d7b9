"""Masks to generate with: where they come from, and a place for each on the object.

A mask source is a function of the image, a seed and the areas given for that image. Shapes: H x W the image's pixels,
h x w a shape's bounding box.
"""

import dataclasses
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy import ndimage

from ..builder import load_defect_pairs, select_defects
from ..checks import check_pairs
from ..errors import InputError, Problem
from ..images import load_image
from ..mask_values import binarise
from ..masks import components, random_mask
from ..seeds import derive_seed
from .foreground import cover_defect, find_foreground
from .locations import (
    MOST_REFERENCES,
    SHAPES_TRIED,
    LikeReferences,
    ObjectMap,
    ReferenceLocation,
    map_object,
    reference_location,
)
from .shapes import SHAPES, cut_out, ellipse_elongation, random_transform, sums_under, transform, union
from .surroundings import LikeSurroundings, Proposal


logger = logging.getLogger(__name__)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


TRIES = 20  # shapes drawn before an image counts as without a place
SPOTS, PLACES = 20_000, 500  # pixels drawn for a shape, and how many of the allowed ones are tried
MOST_PIXELS = 2**24  # that are searched whole, for memory's sake
GAP = 1 / 64  # between two masks, of the shorter side: a cell of the latent grid at 512 px
UNION_SHARE = 0.1  # of the masks from references that are two of them in one


class NamedMask(NamedTuple):
    """A mask of the dataset: its (H, W) bool pixels and its image's name."""

    name: str
    pixels: np.ndarray


class PlacedDefect(NamedTuple):
    """One defect of a mask: what it was made from, and its (h, w) shape with its upper left corner in the image."""

    name: str
    top: int
    left: int
    shape: np.ndarray


class PlacedMask(NamedTuple):
    """A mask, (H, W) bool, and the defects it consists of, as far as they are known."""

    mask: np.ndarray
    defects: list[PlacedDefect]


# (image, seed, foreground, roi) -> the mask, None where there is no place for it. The areas are (H, W) bool or None.
MaskSource = Callable[[Image.Image, int, np.ndarray | None, np.ndarray | None], PlacedMask | None]
# (rng, (height, width) of the image) -> a shape and its name
ShapeSource = Callable[[np.random.Generator, tuple[int, int]], tuple[str, np.ndarray]]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes from a dataset


def load_mask_rows(
    data_dir: str | Path,
    object_name: str | None,
    split: str,
    defect: str | None,
    held_out: bool,
    cache_dir: str | None = None,
    layout: str = "auto",
    mask_classes: Sequence[str] = (),
    skip_problems: bool = False,
) -> Dataset:
    """The rows of one defect type (all for None): of its references, or of the held-out images.

    Raises:
        InputError: no such masks (DF341), or what `load_defect_pairs`, `select_defects` and `check_pairs` find.
    """
    data = load_defect_pairs(data_dir, object_name, split, cache_dir, layout, mask_classes, skip_problems)
    rows = select_defects(data, [defect] if defect else None).get("test" if held_out else "train")
    if not rows:
        kind, of = "held-out" if held_out else "reference", f"of '{defect}' " if defect else ""
        what = f"no {kind} mask {of}with --split {split}"
        raise InputError(Problem("DF341", f"--reference_data {data_dir}", what, "change the split"))
    check_pairs(rows)
    return rows


def load_masks(rows: Dataset) -> list[NamedMask]:
    """The masks of `load_mask_rows`."""
    return [NamedMask(row["source_file"], binarise(row["mask"])) for row in rows]


def locate_references(
    rows: Dataset, find_object: Callable[[Image.Image], np.ndarray] | None
) -> list[ReferenceLocation]:
    """Where the defects of `load_mask_rows` lie on their objects; of `MOST_REFERENCES` of them, evenly spread.

    Args:
        find_object: the object, (H, W) bool, in an RGB image; None: it fills the image.
    """
    located = []
    for index in np.linspace(0, len(rows) - 1, min(len(rows), MOST_REFERENCES)).round().astype(int).tolist():
        row = rows[index]
        mask = binarise(row["mask"])
        whole = np.ones_like(mask)
        foreground = find_object(cover_defect(load_image(row["image"]), mask)) if find_object else whole
        located.append(reference_location(mask, foreground, np.random.default_rng(index)))
    return located


def masks_digest(masks: Sequence[NamedMask]) -> str:
    """sha256 over names and pixels: says which masks a run drew from."""
    digest = hashlib.sha256()
    for name, pixels in masks:
        digest.update(f"{name} {pixels.shape}\n".encode() + np.packbits(pixels).tobytes())
    return digest.hexdigest()


def reference_shapes(masks: Sequence[NamedMask], max_rotation: float) -> ShapeSource:
    """Cut-out reference masks, each time transformed anew; some are two in one.

    Areas keep their share of the image, but for the transform's own scale.
    """

    def sample_one(rng: np.random.Generator, size: tuple[int, int]) -> tuple[str, np.ndarray]:
        name, pixels = masks[int(rng.integers(len(masks)))]
        change = random_transform(rng, max_rotation)
        change = dataclasses.replace(change, scale=change.scale * math.sqrt(math.prod(size) / pixels.size))
        return name, transform(cut_out(pixels), change, rng)

    def sample_shape(rng: np.random.Generator, size: tuple[int, int]) -> tuple[str, np.ndarray]:
        name, shape = sample_one(rng, size)
        if rng.random() >= UNION_SHARE:
            return name, shape
        other, second = sample_one(rng, size)
        return f"{name} + {other}", union(shape, second, rng)

    return sample_shape


def shapes_like(masks: Sequence[NamedMask], size: tuple[int, int], area: int, max_rotation: float) -> ShapeSource:
    """Shapes as large and as long as a defect of which only its box and area are known.

    Of the masks' connected defects the one most like it in both, scaled to the area, stretched along its longest
    direction to the elongation, and each time turned, flipped and lightly warped anew.

    Args:
        size: (width, height) of the box, in pixels.
        area: in pixels.
    """
    area = max(area, *size)  # a connected defect has no fewer
    elongation = ellipse_elongation(size, area)

    def elongation_of(shape: np.ndarray) -> float:
        return ellipse_elongation((shape.shape[1], shape.shape[0]), int(shape.sum()))

    def unlike(named: tuple[str, np.ndarray]) -> float:
        return math.log(named[1].sum() / area) ** 2 + math.log(elongation_of(named[1]) / elongation) ** 2

    name, nearest = min(((name, shape) for name, mask in masks for *_, shape in components(mask)), key=unlike)

    def sample_shape(rng: np.random.Generator, image_size: tuple[int, int]) -> tuple[str, np.ndarray]:
        fitting = min(area, math.prod(image_size))  # what is larger or longer has no place, but would need memory
        longest = max(1.0, math.pi / 4 * (image_size[0] ** 2 + image_size[1] ** 2) / fitting)
        change = dataclasses.replace(
            random_transform(rng, max_rotation),
            scale=math.sqrt(fitting / nearest.sum()),
            stretch=math.sqrt(min(elongation, longest) / elongation_of(nearest)),
        )
        return name, transform(nearest, change, rng)

    return sample_shape


def procedural_shapes(kinds: Sequence[str]) -> ShapeSource:
    """Drawn shapes of these kinds of `SHAPES`, each as often."""

    def sample_shape(rng: np.random.Generator, size: tuple[int, int]) -> tuple[str, np.ndarray]:
        kind = kinds[int(rng.integers(len(kinds)))]
        return kind, SHAPES[kind](rng, min(size))

    return sample_shape


# ---------------------------------------------------------------------------------------------------------------------
# Places


def find_place(
    shape: np.ndarray, allowed: np.ndarray, taken: np.ndarray, coverage: float, rng: np.random.Generator
) -> tuple[int, int] | None:
    """(top, left), drawn from all places of a shape that are good; None if there is none.

    A place is good if the shape lies whole inside the image, at least `coverage` of its pixels on allowed ones, and
    none on a taken one. Some are tried at random; if none of them is good, all are, except in areas of more than
    `MOST_PIXELS`.

    Args:
        allowed: (H, W) bool.
        taken: (H, W) bool.
        coverage: in (0, 1].
    """
    needed = pixels_needed(shape, coverage)
    height, width = shape.shape
    # Propose places by putting a random pixel of the shape on a random allowed one: places with more overlap come up
    # more often, and are accepted with probability needed / covered, which keeps the draw uniform.
    pixels = np.argwhere(shape)
    spots = rng.integers(0, allowed.shape, (SPOTS, 2))
    spots = spots[allowed[spots[:, 0], spots[:, 1]]][:PLACES]
    for top, left in (spots - pixels[rng.integers(len(pixels), size=len(spots))]).tolist():
        if top < 0 or left < 0 or top + height > allowed.shape[0] or left + width > allowed.shape[1]:
            continue
        under = (slice(top, top + height), slice(left, left + width))
        covered = int((allowed[under] & shape).sum())
        if covered >= needed > covered * rng.random() and not (taken[under] & shape).any():
            return top, left
    return _search(shape, allowed, taken, needed, rng)


def pixels_needed(shape: np.ndarray, coverage: float) -> int:
    """How many of a shape's pixels must lie on allowed ones."""
    return math.ceil(coverage * int(shape.sum()) - 1e-9)


def _search(
    shape: np.ndarray, allowed: np.ndarray, taken: np.ndarray, needed: int, rng: np.random.Generator
) -> tuple[int, int] | None:
    """`find_place` over every place near an allowed pixel."""
    window = []
    for axis, side in enumerate(shape.shape):
        there = np.flatnonzero(allowed.any(axis=1 - axis))
        if not len(there):
            return None
        window.append(slice(max(0, there[0] - side), there[-1] + 1 + side))
    allowed, taken = allowed[tuple(window)], taken[tuple(window)]
    if allowed.size > MOST_PIXELS or (np.array(shape.shape) > allowed.shape).any() or allowed.sum() < needed:
        return None
    value = np.where(taken, -int(shape.sum()), allowed.astype(float))  # one taken pixel outweighs all allowed ones
    covered = np.rint(sums_under(shape, value))
    good = np.flatnonzero(covered >= needed)
    if not len(good):
        return None
    top, left = divmod(int(good[rng.integers(len(good))]), covered.shape[1])
    return int(window[0].start) + top, int(window[1].start) + left


def mark_taken(defect: PlacedDefect, gap: float, taken: np.ndarray) -> None:
    """Marks in `taken`, (H, W) bool, the pixels of a defect and those nearer to it than `gap` pixels."""
    margin = math.ceil(gap)
    near = ndimage.distance_transform_edt(~np.pad(defect.shape, margin)) <= gap
    top, left = defect.top - margin, defect.left - margin
    inside = near[max(0, -top) :, max(0, -left) :]
    area = taken[max(0, top) : top + near.shape[0], max(0, left) : left + near.shape[1]]
    area |= inside[: area.shape[0], : area.shape[1]]


@dataclasses.dataclass(frozen=True)
class PlacedShapes:
    """A mask source: shapes on the object, inside the ROI, none over another.

    Args:
        sample_shape: where shapes come from.
        foreground: finds the object, (H, W) bool, in an RGB image for which none is given; None: it fills the image.
        coverage: least share of each shape's pixels on the object and in the ROI, in (0, 1].
        number: of shapes in an image.
        like_references: where shapes go; None: anywhere. What it finds no place for goes anywhere too.
        surroundings: what gives shapes and their places instead.
    """

    sample_shape: ShapeSource
    foreground: Callable[[Image.Image], np.ndarray] | None = find_foreground
    coverage: float = 0.99
    number: int = 1
    like_references: LikeReferences | None = None
    surroundings: LikeSurroundings | None = None

    def __call__(
        self, image: Image.Image, seed: int, foreground: np.ndarray | None, roi: np.ndarray | None
    ) -> PlacedMask | None:
        """The mask of `number` shapes; None if for one of them `TRIES` shapes found no place."""
        if foreground is None and self.foreground:
            foreground = self.foreground(image)
        whole = np.ones((image.height, image.width), dtype=bool)
        allowed = whole
        for area in (foreground, roi):
            allowed = allowed & area if area is not None else allowed
        like = self.like_references
        part = map_object(whole if foreground is None else foreground) if like else None
        mask, taken, defects = np.zeros_like(allowed), np.zeros_like(allowed), []
        for index in range(self.number):
            own_seed = derive_seed(seed, index)
            defect = None
            if like and part:
                defect = self._first_fitting(self._alike(like, own_seed, allowed, part), "references", allowed, taken)
            if self.surroundings:
                rng = np.random.default_rng(derive_seed(own_seed, "surroundings"))
                proposed = self.surroundings.propose(image, allowed, self.coverage, rng)
                defect = self._first_fitting(proposed, "surroundings", allowed, taken)
            defect = defect or self._place(own_seed, allowed, taken)
            if defect is None:
                return None
            defects.append(defect)
            mark_taken(defect, 1 + GAP * min(allowed.shape), taken)
            height, width = defect.shape.shape
            mask[defect.top : defect.top + height, defect.left : defect.left + width] |= defect.shape
        return PlacedMask(mask, defects)

    def _alike(self, like: LikeReferences, seed: int, allowed: np.ndarray, part: ObjectMap) -> Iterator[Proposal]:
        """`SHAPES_TRIED` shapes at places like the references'."""
        drawn = [self._sample(seed, attempt, allowed) for attempt in range(SHAPES_TRIED)]
        shapes = [shape for _, _, shape in drawn]
        rng = np.random.default_rng(derive_seed(seed, "location"))
        for index, top, left in like.propose(shapes, allowed, part, self.coverage, rng):
            yield drawn[index][1], top, left, shapes[index]

    def _first_fitting(
        self, proposed: Iterable[Proposal], like: str, allowed: np.ndarray, taken: np.ndarray
    ) -> PlacedDefect | None:
        """The first that is allowed and free; None, and a warning, if none is."""
        for defect in map(PlacedDefect._make, proposed):
            if self._fits(defect, allowed, taken):
                return defect
        _warn_once(f"--placement like_{like}: no such place in some images; there, masks go anywhere")
        return None

    def _fits(self, defect: PlacedDefect, allowed: np.ndarray, taken: np.ndarray) -> bool:
        shape = defect.shape
        under = (slice(defect.top, defect.top + shape.shape[0]), slice(defect.left, defect.left + shape.shape[1]))
        enough = (allowed[under] & shape).sum() >= pixels_needed(shape, self.coverage)
        return bool(enough and not (taken[under] & shape).any())

    def _place(self, seed: int, allowed: np.ndarray, taken: np.ndarray) -> PlacedDefect | None:
        for attempt in range(TRIES):
            rng, name, shape = self._sample(seed, attempt, allowed)
            place = find_place(shape, allowed, taken, self.coverage, rng)
            if place:
                return PlacedDefect(name, *place, shape)
        return None

    def _sample(self, seed: int, attempt: int, allowed: np.ndarray) -> tuple[np.random.Generator, str, np.ndarray]:
        """A shape and its name, and the generator that drew it."""
        rng = np.random.default_rng(derive_seed(seed, attempt))
        return rng, *self.sample_shape(rng, (allowed.shape[0], allowed.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Sources without placing


def random_source(
    image: Image.Image, seed: int, foreground: np.ndarray | None = None, roi: np.ndarray | None = None
) -> PlacedMask:
    """`random_mask` anywhere in the image."""
    return PlacedMask(random_mask(np.random.default_rng(seed), image.height, image.width), [])


def held_out_source(masks: Sequence[NamedMask]) -> MaskSource:
    """The held-out masks as they are, the paper's protocol: to each image one of its own size; None if there is none.

    Says in the log what that means for figures.
    """
    logger.warning(
        f"--mask_source held_out: {len(masks)} held-out masks unchanged, as in the paper. A model trained on these "
        "images has seen the shapes and positions of the defects it is tested on; do not compare its scores with "
        "those of reference masks."
    )

    def source(
        image: Image.Image, seed: int, foreground: np.ndarray | None = None, roi: np.ndarray | None = None
    ) -> PlacedMask | None:
        fitting = [mask for mask in masks if mask.pixels.shape == (image.height, image.width)]
        if not fitting:
            return None
        name, pixels = fitting[int(np.random.default_rng(seed).integers(len(fitting)))]
        return PlacedMask(pixels, [PlacedDefect(name, 0, 0, pixels)])

    return source
