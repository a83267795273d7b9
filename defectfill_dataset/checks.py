"""Checks of the pixels of image and mask pairs, all problems at once, before any model is loaded."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from .errors import InputError
from .images import UNREADABLE, load_image
from .layouts import Row
from .masks import binarise, to_grid


def check_pairs(dataset: Dataset) -> None:
    """Proves that every image of a defect split opens, has a mask of its size, and that the mask marks part of it.

    Raises:
        InputError: one line a problem. DF103 unreadable, DF140 sizes differ, DF142 no mask, DF145 empty mask,
            DF146 full mask, DF163 no images at all.
    """
    if not len(dataset):
        raise InputError("DF163 no defect images to train on; check --defect and --split")
    problems = []
    for index in range(len(dataset)):
        name = dataset["source_file"][index]
        try:
            row = dataset[index]
            problems += _problems(name, row["image"], row["mask"])
        except UNREADABLE as error:
            problems.append(f"DF103 {name}: the image or its mask cannot be read: {error}")
    if problems:
        raise InputError(*problems)


def check_good(dataset: Dataset) -> None:
    """Proves that good images open; raises InputError (DF103) with all problems."""
    problems = []
    for index in range(len(dataset)):
        try:
            load_image(dataset[index]["image"])
        except UNREADABLE as error:
            problems.append(f"DF103 {dataset['source_file'][index]}: the image cannot be read: {error}")
    if problems:
        raise InputError(*problems)


def _problems(name: str, image, mask) -> list[str]:
    if image is None:
        return [f"DF103 {name}: its row holds no image"]
    if mask is None:
        return [f"DF142 {name}: its mask is missing"]
    return _mask_problems(name, load_image(image).size, binarise(mask))


def _mask_problems(name: str, size: tuple[int, int], inside: np.ndarray) -> list[str]:
    """What is wrong with an (H, W) mask of an image of this (W, H)."""
    height, width = inside.shape
    if size != (width, height):
        return [f"DF140 {name}: the image is {size[0]}x{size[1]}, its mask {width}x{height}; they must match"]
    if not inside.any():
        return [f"DF145 {name}: its mask is empty; mark the defect or remove the pair"]
    if inside.all():
        return [f"DF146 {name}: its mask covers the whole image; mark the defect only"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# A whole dataset, looked at


@dataclasses.dataclass(frozen=True)
class Look:
    """What one image of a dataset is like.

    Args:
        name: relative to the object's folder.
        problems: why it cannot be used.
        pixels: digest of the image's pixels.
        size: (W, H).
        area: share of the image that the mask marks; 0 for a good image, or where there are problems.
        cells: cells of the latent grid that it marks, pooled as training does.
        nearest: cells that nearest-neighbour sampling would leave.
    """

    name: str
    defect: str
    problems: tuple[str, ...]
    pixels: str = ""
    size: tuple[int, int] = (0, 0)
    area: float = 0.0
    cells: int = 0
    nearest: int = 0


def look(row: Row, root: Path, grid: int) -> Look:
    """Opens one image and its mask; `grid` is the side of the latent grid they will be brought to."""
    name = row.image.relative_to(root).as_posix()
    try:
        image = load_image(Image.open(row.image))
        inside = row.mask.render() if row.mask else None
    except UNREADABLE as error:
        return Look(name, row.defect, (f"DF103 {name}: the image or its mask cannot be read: {error}",))
    pixels = hashlib.sha256(image.tobytes()).hexdigest()
    if inside is None:
        return Look(name, row.defect, (), pixels, image.size)
    problems = tuple(_mask_problems(name, image.size, inside))
    if problems:
        return Look(name, row.defect, problems, pixels, image.size)
    rows, columns = ((np.arange(grid) * side) // grid for side in inside.shape)
    return Look(
        name,
        row.defect,
        (),
        pixels,
        image.size,
        float(inside.mean()),
        int(to_grid(inside, grid).sum()),
        int(inside[np.ix_(rows, columns)].sum()),
    )


def suspicions(looks: Sequence[Look], references: set[str]) -> list[str]:
    """What a person should look at, a line each; nothing here stops a training.

    DF150 more than half of every mask is white (inverted?), DF151 a defect of fewer than four latent cells, DF153 one
    picture twice, DF154 a picture both among the references and held out, or both defective and good.

    Args:
        references: names of the images that train.
    """
    notes = []
    marked = [x for x in looks if x.area]
    if marked and all(x.area > 0.5 for x in marked):
        notes.append(f"DF150 all {len(marked)} masks are more than half white; are they inverted?")
    notes += [
        f"DF151 {x.name}: its defect is {x.cells} cells of the latent grid; train at a higher resolution"
        for x in marked
        if x.cells < 4
    ]
    same: dict[str, list[Look]] = {}
    for x in looks:
        if x.pixels:
            same.setdefault(x.pixels, []).append(x)
    for group in (group for group in same.values() if len(group) > 1):
        names = ", ".join(x.name for x in group[:4]) + (f" and {len(group) - 4} more" if len(group) > 4 else "")
        kinds = {"good" if x.defect == "good" else "reference" if x.name in references else "held out" for x in group}
        if len(kinds) > 1:
            notes.append(f"DF154 {names}: the same picture, {' and '.join(sorted(kinds))}; keep one")
        else:
            notes.append(f"DF153 {names}: the same picture; keep one")
    return notes
