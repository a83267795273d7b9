"""Images and masks drawn for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


COLOURS = {"hole": (20, 20, 20), "scratch": (240, 240, 200), "stain": (60, 160, 60)}


def write_image(
    path: Path, size: int = 48, colour: tuple = (150, 90, 60), mask: np.ndarray | None = None, seed: int = 0
):
    """A noisy flat picture; the defect, where the mask is, in its own colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(-15, 16, (size, size, 3)) + np.array(
        (150, 90, 60)
    )
    if mask is not None:
        pixels[mask] = colour
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_mask(path: Path, size: int = 48, seed: int = 0) -> np.ndarray:
    """A square of 6-12 pixels somewhere inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    side = rng.integers(6, 13)
    top, left = rng.integers(4, size - side - 4, 2)
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    Image.fromarray(mask).convert("L").save(path)
    return mask


def write_values(path: Path, *boxes: tuple[int, int, int, int, int], size: int = 48) -> np.ndarray:
    """A mask with (value, top, left, bottom, right) boxes; returns where it is not 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size, size), dtype=np.uint8)
    for value, top, left, bottom, right in boxes:
        pixels[top:bottom, left:right] = value
    Image.fromarray(pixels).save(path)
    return pixels > 0


def square(top: int, left: int, bottom: int, right: int, size: int = 48) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask
