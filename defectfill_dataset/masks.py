"""Defect masks: read from files or shapes, brought to the latent grid without losing thin parts, drawn at random."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage import draw

from .images import FULL_16_BITS, UNREADABLE, load_image, open_image


def binarise(mask: Image.Image) -> np.ndarray:
    """The (H, W) bool array of a mask file: True where any channel is above half of its greatest value.

    So 0/255 and 0/1 codings both work, in 8 and in 16 bits, and the ringing of a JPEG mask stays out.

    Raises:
        ValueError: a coding that cannot be told apart from noise or from several classes, or what `load_image` says.
    """
    colours = len(np.unique(np.asarray(mask))) if mask.mode == "P" else 2
    if colours > 2:
        raise ValueError(f"the mask has {colours} palette colours; save it as black and white")
    if mask.mode.startswith("I;16"):
        values, full = np.asarray(ImageOps.exif_transpose(mask)), FULL_16_BITS
    else:
        plain = mask.mode in ("1", "L") and not mask.has_transparency_data  # large ones need no colours in between
        values = np.asarray(ImageOps.exif_transpose(mask).convert("L") if plain else load_image(mask))
        values, full = values if plain else values.max(axis=-1), 255
    peak = int(values.max())
    if 1 < peak <= full // 2:
        raise ValueError(f"the mask's brightest value is {peak}; code it as 0 and {full}, or as 0 and 1")
    return values > peak // 2


def nonzero(mask: Image.Image) -> np.ndarray:
    """The (H, W) bool array of a mask file whose values name kinds of defects: True where it is not 0.

    Raises:
        ValueError: what `load_image` says.
    """
    if mask.mode in ("1", "L", "P") or mask.mode.startswith("I"):
        return np.asarray(ImageOps.exif_transpose(mask)) > 0
    return np.asarray(load_image(mask)).max(axis=-1) > 0


def polygon_mask(corners: Sequence[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """The (H, W) bool array of the pixels whose centres are inside; and of its outline where it is under a pixel wide.

    Args:
        corners: (x, y) in pixels; the first pixel's corners are 0 and 1.
        size: (W, H).
    """
    mask = np.zeros(size[::-1], dtype=bool)
    points = np.array(corners)
    mask[draw.polygon(points[:, 1] - 0.5, points[:, 0] - 0.5, mask.shape)] = True
    after = np.roll(points, -1, axis=0)
    area = abs((points[:, 0] * after[:, 1] - points[:, 1] * after[:, 0]).sum()) / 2
    if 2 * area < np.hypot(*(after - points).T).sum():  # a crack must not be lost between the centres
        ends = np.floor(np.concatenate([points, after], axis=1)).astype(int).clip(0, np.tile(size, 2) - 1)
        for x, y, next_x, next_y in ends:
            mask[draw.line(y, x, next_y, next_x)] = True
    return mask


@dataclasses.dataclass(frozen=True)
class MaskFiles:
    """A mask kept in image files: everything that any of them marks.

    Args:
        paths: absolute, at least one.
        nonzero: every value above 0 is defect; if not, `binarise` decides.
    """

    paths: tuple[Path, ...]
    nonzero: bool = False

    @property
    def plain(self) -> Path | None:
        """The file that is the mask as it stands, if there is one."""
        return self.paths[0] if len(self.paths) == 1 and not self.nonzero else None

    def render(self) -> np.ndarray:
        """The (H, W) bool array.

        Raises:
            ValueError: a file that cannot be read, files of different sizes, or what `binarise` says.
        """
        read = nonzero if self.nonzero else binarise
        parts = {}
        for path in self.paths:
            try:
                parts[path] = read(open_image(path))
            except UNREADABLE as error:
                raise ValueError(f"{path.name}: {error}") from error
        if len({part.shape for part in parts.values()}) > 1:
            sizes = ", ".join(f"{path.name} {part.shape[1]}x{part.shape[0]}" for path, part in parts.items())
            raise ValueError(f"its mask files differ in size: {sizes}")
        return np.logical_or.reduce(list(parts.values()))


@dataclasses.dataclass(frozen=True)
class MaskShapes:
    """A mask kept as numbers: everything that any of its shapes covers.

    Args:
        size: (W, H) of the image.
        polygons: corners of each, as `polygon_mask` takes them.
        rles: run lengths in COCO's compressed form.
    """

    size: tuple[int, int]
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    rles: tuple[str, ...] = ()
    plain: ClassVar[None] = None

    def render(self) -> np.ndarray:
        """The (H, W) bool array.

        Raises:
            ValueError: run lengths that do not fill the image.
        """
        mask = np.zeros(self.size[::-1], dtype=bool)
        for polygon in self.polygons:
            mask |= polygon_mask(polygon, self.size)
        for counts in self.rles:
            rle = {"size": list(self.size[::-1]), "counts": counts.encode()}
            part = coco_mask.decode(rle)
            # Too few run lengths leave the decoder's memory as it was.
            if coco_mask.encode(part)["counts"] != rle["counts"]:
                raise ValueError(f"its run lengths do not fill {self.size[0]}x{self.size[1]} pixels")
            mask |= part > 0
        return mask


def pieces(mask: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(left, top, its (h, w) bool array) of each piece of an (H, W) mask; pixels that touch at a corner are one."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        yield columns.start, rows.start, labels[rows, columns] == number


def piece_boxes(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each connected piece of an (H, W) mask."""
    return [(left, top, left + piece.shape[1], top + piece.shape[0]) for left, top, piece in pieces(mask)]


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what an (H, W) mask marks, which is at least one pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def to_grid(mask: np.ndarray, size: int) -> torch.Tensor:
    """Max-pools an (H, W) mask to (1, size, size): a cell is 1 if any of its pixels is, so no crack is lost."""
    pixels = torch.from_numpy(np.asarray(mask, dtype=np.float32))
    return F.adaptive_max_pool2d(pixels[None], size)


def cover(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """The pixels that the cells of (..., h, w) cover: (..., h*factor, w*factor).

    Nearest upsampling, which the nearest downsampling of diffusers' inpainting pipelines undoes exactly: with this
    mask the stock pipeline sees the very grid the model was trained on.
    """
    return grid.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def random_boxes(rng: np.random.Generator, number: int = 30) -> np.ndarray:
    """(number, 4) boxes (top, left, bottom, right) in fractions of the image, for the object pass's M_rand.

    Each side is uniform in 3-25 % of the image side; boxes lie inside the image and may overlap.
    Source: DefectFill, section 3.2 (30 boxes); the side range from RealFill's recipe.
    """
    sides = rng.uniform(0.03, 0.25, (number, 2))
    corners = rng.uniform(0.0, 1.0 - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def boxes_mask(boxes: np.ndarray, size: int) -> np.ndarray:
    """(size, size) bool mask of the union of `boxes`."""
    mask = np.zeros((size, size), dtype=bool)
    for top, left, bottom, right in np.rint(boxes * size).astype(int):
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return mask


def blob_outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """(48, 2) corners (x, y) of an irregular blob around (0, 0)."""
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = sum(rng.uniform(0, 0.3) / k * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3, 5))
    reach = radius * np.clip(1 + waves, 0.3, 1.6)
    return np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=1)


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of one irregular blob, 6-20 % of the shorter side across, inside the image."""
    outline = blob_outline(rng, rng.uniform(0.03, 0.10) * min(height, width))
    margin = np.hypot(*outline.T).max() + 1
    centre = [rng.uniform(margin, max(side - margin, margin)) for side in (width, height)]
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline + centre], fill=1)
    return np.asarray(canvas)
