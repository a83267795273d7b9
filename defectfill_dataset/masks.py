"""Defect masks: binary, brought to the latent grid without losing thin parts, and drawn at random."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .images import load_image


def binarise(mask: Image.Image) -> np.ndarray:
    """The (H, W) bool array of a mask file: True where it is brighter than half of its brightest pixel.

    So 0/255 and 0/1 codings both work, and the ringing of a JPEG mask stays out.

    Raises:
        ValueError: a coding that cannot be told apart from noise or from several classes, or what `load_image` says.
    """
    colours = len(np.unique(np.asarray(mask))) if mask.mode == "P" else 2
    if colours > 2:
        raise ValueError(f"the mask has {colours} palette colours; save it as black and white")
    grey = np.asarray(load_image(mask).convert("L"))
    peak = int(grey.max())
    if 1 < peak < 128:
        raise ValueError(f"the mask's brightest value is {peak}; code it as 0 and 255, or as 0 and 1")
    return grey > peak / 2


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
