"""Defect masks: read from files or shapes, brought to the latent grid without losing thin parts, drawn at random."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage import draw
from skimage.measure import points_in_poly

from .images import UNREADABLE, open_image
from .mask_values import NO_CLASSES, MaskClasses, binarise, nonzero


BAND = 16  # rows of a polygon that are filled at once


def polygon_mask(corners: Sequence[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """The (H, W) bool array of the pixels whose centres are inside; and of its outline where it is under a pixel wide.

    Args:
        corners: (x, y) in pixels; the first pixel's corners are 0 and 1.
        size: (W, H).
    """
    mask = np.zeros(size[::-1], dtype=bool)
    points = np.array(corners)
    centred = points - 0.5
    left, top = np.floor(centred.min(axis=0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(centred.max(axis=0)).astype(int) + 1, size)
    for first in range(top, bottom, BAND):
        rows, columns = np.arange(first, min(first + BAND, bottom)), np.arange(left, right)
        # Of corners that lie on one side of the rows, as do those before and after them, no edge meets the rows.
        side = (centred[:, 1] > rows[-1]).astype(int) - (centred[:, 1] < rows[0])
        meets = (side == 0) | (side != np.roll(side, 1)) | (side != np.roll(side, -1))
        pixels = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        if meets.any() and len(pixels):
            inside = points_in_poly(pixels, centred[meets])
            mask[first : first + len(rows), left:right] = inside.reshape(len(rows), -1)
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
        classes: what the files' values mean, where they are class-coded; then `defect` names the one that counts.
    """

    paths: tuple[Path, ...]
    nonzero: bool = False
    classes: MaskClasses = NO_CLASSES
    defect: str = ""

    @property
    def plain(self) -> Path | None:
        """The file that is the mask as it stands, if there is one."""
        return self.paths[0] if len(self.paths) == 1 and not self.nonzero and not self.classes else None

    def render(self) -> np.ndarray:
        """The (H, W) bool array.

        Raises:
            ValueError: a file that cannot be read, files of different sizes, or what `binarise` says.
        """
        masks = {}
        for path in self.paths:
            try:
                masks[path] = self._read(open_image(path))
            except UNREADABLE as error:
                raise ValueError(f"{path.name}: {error}") from error
        if len({mask.shape for mask in masks.values()}) > 1:
            sizes = ", ".join(f"{path.name} {mask.shape[1]}x{mask.shape[0]}" for path, mask in masks.items())
            raise ValueError(f"its mask files differ in size: {sizes}")
        return np.logical_or.reduce(list(masks.values()))

    def _read(self, mask: Image.Image) -> np.ndarray:
        if not self.classes:
            return nonzero(mask) if self.nonzero else binarise(mask)
        found = self.classes.areas(mask).get(self.defect)
        return np.zeros(mask.size[::-1], dtype=bool) if found is None else found


@dataclasses.dataclass(frozen=True)
class MaskShapes:
    """A mask kept as numbers: everything that any of its shapes covers.

    Args:
        size: (W, H) of the image.
        polygons: corners of each, as `polygon_mask` takes them.
        rles: RLE counts in COCO's compressed form.
    """

    size: tuple[int, int]
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    rles: tuple[str, ...] = ()
    plain: ClassVar[None] = None
    paths: ClassVar[tuple[Path, ...]] = ()

    def render(self) -> np.ndarray:
        """The (H, W) bool array.

        Raises:
            ValueError: an RLE that does not fill the image.
        """
        mask = np.zeros(self.size[::-1], dtype=bool)
        for polygon in self.polygons:
            mask |= polygon_mask(polygon, self.size)
        for counts in self.rles:
            rle = {"size": list(self.size[::-1]), "counts": counts.encode()}
            decoded = coco_mask.decode(rle)
            # Too few counts leave the decoder's memory as it was.
            if coco_mask.encode(decoded)["counts"] != rle["counts"]:
                raise ValueError(f"its RLE does not fill {self.size[0]}x{self.size[1]} pixels")
            mask |= decoded > 0
        return mask


@dataclasses.dataclass(frozen=True)
class MaskUnion:
    """Several masks of one image as one: everything that any of them marks."""

    masks: tuple[MaskFiles | MaskShapes, ...]
    plain: ClassVar[None] = None

    @staticmethod
    def of(masks: Sequence["Mask"]) -> "Mask":
        """The union in its simplest form: one mask as it is, shapes together in one `MaskShapes`."""
        if len(masks) == 1:
            return masks[0]
        shapes = [mask for mask in masks if isinstance(mask, MaskShapes)]
        if len(shapes) == len(masks) and len({mask.size for mask in shapes}) == 1:
            polygons = tuple(polygon for mask in shapes for polygon in mask.polygons)
            return MaskShapes(shapes[0].size, polygons, tuple(rle for mask in shapes for rle in mask.rles))
        flat = [each for mask in masks for each in (mask.masks if isinstance(mask, MaskUnion) else (mask,))]
        return MaskUnion(tuple(flat))

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for mask in self.masks if isinstance(mask, MaskFiles) for path in mask.paths)

    def render(self) -> np.ndarray:
        """The (H, W) bool array; raises ValueError as its masks do, or where they differ in size."""
        areas = [mask.render() for mask in self.masks]
        if len({area.shape for area in areas}) > 1:
            raise ValueError("its masks differ in size: " + ", ".join(f"{a.shape[1]}x{a.shape[0]}" for a in areas))
        return np.logical_or.reduce(areas)


Mask = MaskFiles | MaskShapes | MaskUnion


def components(mask: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(left, top, its (h, w) bool array) of each connected component of an (H, W) mask, 8-connected."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        yield columns.start, rows.start, labels[rows, columns] == number


def component_boxes(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each connected component of an (H, W) mask."""
    return [
        (left, top, left + component.shape[1], top + component.shape[0]) for left, top, component in components(mask)
    ]


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what an (H, W) mask marks, which is at least one pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def pool_mask(mask: np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """Max-pools an (H, W) mask to (1, size, size) or (1, *size): a cell is 1 if any pixel is, so no crack is lost."""
    pixels = torch.from_numpy(np.asarray(mask, dtype=np.float32))
    return F.adaptive_max_pool2d(pixels[None], size)


def upsample_mask(grid: torch.Tensor, factor: int) -> torch.Tensor:
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
