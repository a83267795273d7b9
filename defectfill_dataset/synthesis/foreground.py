"""Segmentation of the object in an image of a good part."""

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu


WORKING_SIDE = 256  # the longer side of what is looked at, in pixels
RIM = 0.02  # breadth of the image's rim, in fractions of its shorter side
CONTRAST = 3  # how many times farther from the rim's colour than the rim itself a part must be
HALO = 2  # pixels around a mask that may show its defect
LEAST_AREA = 0.03  # of the image; what is smaller is a mark on a surface


def find_foreground(image: Image.Image) -> np.ndarray:
    """(H, W) bool, True on the object on a plain background; all True where a surface fills the image.

    Otsu's threshold separates pixels whose colour is far from the rim's median colour. There is an object if their
    largest component covers at least `LEAST_AREA` of the image and is, in the median, at least `CONTRAST` times as far
    from that colour as nine tenths of the rim; on a surface that fills the image the ratio is about 1. The object is
    then the largest component of all pixels that far from the rim's colour, shaded sides included, holes filled.

    Args:
        image: RGB.
    """
    small = image.copy()
    small.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    pixels = ndimage.gaussian_filter(np.asarray(small, dtype=np.float64), (1, 1, 0))
    rim = np.ones(pixels.shape[:2], dtype=bool)
    edge = max(1, round(RIM * min(rim.shape)))
    rim[edge:-edge, edge:-edge] = False
    distance = np.linalg.norm(pixels - np.median(pixels[rim], axis=0), axis=-1)
    otsu, ground = threshold_otsu(distance), CONTRAST * np.quantile(distance[rim], 0.9)
    part = _largest_piece(distance > otsu)
    if part.mean() < LEAST_AREA or np.median(distance[part]) < ground:
        return np.ones((image.height, image.width), dtype=bool)
    part = _largest_piece(distance > min(otsu, max(ground, otsu / 4)))  # a flat ground is at no distance at all
    whole = Image.fromarray(part).convert("L").resize(image.size, Image.Resampling.BILINEAR)
    return np.asarray(whole) >= 128


def cover_defect(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image with each pixel of an (H, W) mask, and `HALO` around it, in the colour of the nearest other pixel.

    A dark defect on a surface that fills the image would otherwise be taken for the object.
    """
    around = ndimage.binary_dilation(mask, iterations=HALO)
    if around.all():
        return image
    row, column = ndimage.distance_transform_edt(around, return_distances=False, return_indices=True)
    return Image.fromarray(np.asarray(image)[row, column])


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    pieces, number = ndimage.label(mask)
    if not number:
        return mask
    return ndimage.binary_fill_holes(pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]))
