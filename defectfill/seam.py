"""The seam between a generated defect and its image: how the two are blended, and how strong the seam is.

Shapes: H x W an image's or a crop's own size, G cells a side of the latent grid.
Masks are 1 inside the defect. An alpha is 8-bit: 255 is the candidate alone, 0 the image alone.
"""

import functools

import numpy as np
import torch
from PIL import Image, ImageChops
from scipy import ndimage


# How a candidate gets into its image: what `--composite` may name.
COMPOSITES = ("feather", "exact", "grid")

RAMP_SHARE, RAMP_PIXELS = 1 / 5, 3  # of the mask's local radius; at least so many pixels, where the radius has them
SCALES = 12


def local_radius(inside: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(H, W) radius of about the largest disc inside a mask that covers each pixel: half the mask's width there.

    Args:
        depth: (H, W) distance of each pixel inside to the nearest one outside.

    Source: the local thickness of Hildebrand and Rüegsegger, Journal of Microscopy 185 (1997), at `SCALES` radii.
    """
    radius = np.ones(inside.shape, dtype=np.float32)
    for r in np.unique(np.geomspace(1, depth.max(), SCALES).astype(int))[1:]:
        radius[ndimage.distance_transform_edt(depth < r) <= r] = r  # the opening by a disc of this radius
    return radius


def feather_alpha(mask: np.ndarray) -> np.ndarray:
    """(H, W) alpha that rises from the outline of an (H, W) mask inwards, and is 0 outside.

    It is 255 from a fifth of the mask's local radius on, or from 3 pixels where that is more, and at the latest on the
    middle line, however thin the mask is. Nothing is blended where the mask meets the border of the image.
    """
    alpha = np.zeros(mask.shape, dtype=np.uint8)
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        box = slice(max(rows.start - 1, 0), rows.stop + 1), slice(max(columns.start - 1, 0), columns.stop + 1)
        inside = labels[box] == number
        if inside.all():
            alpha[box] = 255
            continue
        depth = ndimage.distance_transform_edt(inside)
        radius = local_radius(inside, depth)
        ramp = np.minimum(radius, np.maximum(radius * RAMP_SHARE, RAMP_PIXELS))
        alpha[box][inside] = np.ceil(np.minimum(depth / ramp, 1) * 255)[inside]
    return alpha


def grid_mask(latent_mask: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of a crop of this shape that the cells of its (1, G, G) latent mask cover.

    A latent mask is max-pooled from a mask of the crop's pixels, and all of these are among them.
    """
    cells = Image.fromarray(latent_mask[0].numpy() > 0.5)
    return np.asarray(cells.resize(shape[::-1], Image.Resampling.NEAREST))


def differences(a: Image.Image, b: Image.Image) -> np.ndarray:
    """(H, W) absolute differences of two images of one mode, in 0..255: the greatest of the channels'."""
    return np.asarray(functools.reduce(ImageChops.lighter, ImageChops.difference(a, b).split()))


def vae_error(image: Image.Image, reconstruction: Image.Image, inside: np.ndarray) -> int:
    """What the VAE alone changes inside an (H, W) mask, in 0..255: 95 % of the pixels change by no more."""
    return int(np.quantile(differences(image, reconstruction)[inside], 0.95, method="higher"))


def changed_mask(source: Image.Image, image: Image.Image, vae_error: np.ndarray) -> np.ndarray:
    """(H, W) bool: where an image differs from its source by more than the VAE alone changes a pixel there.

    Args:
        vae_error: (H, W) in 0..255.
    """
    return differences(source, image) > vae_error


def seam_step(image: Image.Image, mask: np.ndarray) -> float | None:
    """The strength of a seam: the mean grey step, in levels of 255, across the outline of an (H, W) mask.

    The mean absolute difference of all pairs of neighbours, side by side or one above the other, of which one is
    inside; None if there is no such pair.
    """
    grey = np.asarray(image.convert("L"), dtype=np.int16)
    steps = [np.abs(np.diff(grey, axis=axis))[np.diff(mask, axis=axis)] for axis in (0, 1)]
    across = np.concatenate(steps)
    return float(across.mean()) if across.size else None
