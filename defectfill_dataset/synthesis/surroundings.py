"""Places for reference masks where a good image looks as the reference does around its defect.

On a circuit board a break is a break only across a track. Neither a region nor the object's border says where tracks
are; the pixels around the references' defects do.

Shapes: H x W the image's pixels, h x w a patch: a reference defect with what surrounds it.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from PIL import Image
from scipy import ndimage

from ..images import load_image
from ..mask_values import binarise
from ..masks import bounds
from .shapes import Transform, cut_out, random_transform, sums_under, transform


SEARCHED_SIDE = 1024  # longest side of the image that is searched, in pixels
RIM = 0.6  # width of what is compared around a defect, in units of the root of its bounding box's area
LEAST_RIM = 4  # pixels
BLURRED = 2  # pixels next to a mask that its defect may have changed, and that are not compared
MOST_PATCHES = 4  # that are tried for a mask, each in all turns
ALIKE = 0.5  # or less: as a place should be; 1 is a flat image's
EVEN = 0.02  # places that differ by less are as good as each other
PLACES = 8  # of a patch in one turn, the best
WORSE = 0.1  # by which a place of a patch may be more unlike than its best, whatever the turn
LEAST_CONTRAST = 1e-4  # variance of pixels in [0, 1]: below it a patch is flat


class Patch(NamedTuple):
    """A reference defect and what surrounds it.

    Args:
        name: of its image.
        mask: (h, w) bool, the defect.
        pixels: (h, w), in [0, 1].
        rim: (h, w) bool, the pixels that are compared.
        image_area: of its image, in pixels.
    """

    name: str
    mask: np.ndarray
    pixels: np.ndarray
    rim: np.ndarray
    image_area: int


def read_patches(rows: Dataset) -> list[Patch]:
    """Every defect of `load_mask_rows`, pieces near each other as one; those that fill their image are left out."""
    patches = []
    for row in rows:
        mask, pixels = binarise(row["mask"]), grey(load_image(row["image"]))
        near = ndimage.binary_dilation(mask, iterations=BLURRED)
        labels, _ = ndimage.label(ndimage.binary_dilation(mask, iterations=LEAST_RIM))
        for number, box in enumerate(ndimage.find_objects(labels), 1):
            width = max(LEAST_RIM, math.ceil(RIM * math.sqrt(math.prod(s.stop - s.start for s in box)))) + BLURRED
            window = tuple(slice(max(0, s.start - width), s.stop + width) for s in box)
            own = mask[window] & (labels[window] == number)
            rim = (ndimage.distance_transform_edt(~own) <= width) & ~near[window]
            if rim.any():
                patches.append(Patch(row["source_file"], own, pixels[window].copy(), rim, mask.size))
    return patches


def grey(image: Image.Image) -> np.ndarray:
    """(H, W) in [0, 1]."""
    return np.asarray(image.convert("L"), dtype=float) / 255


def changed(patch: Patch, change: Transform) -> Patch:
    """The patch flipped, turned by quarters and scaled. What a mask touches is in it, so that no thin one vanishes."""
    size = [max(1, round(change.scale * side)) for side in patch.mask.shape[::-1]]

    def as_asked(values: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
        resized = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, resampling), dtype=float)
        return np.rot90(resized[:, ::-1] if change.flip else resized, round(change.angle / 90))

    mask = as_asked(patch.mask, Image.Resampling.BOX) > 0
    rim = as_asked(patch.rim, Image.Resampling.BOX) > 0.5
    return patch._replace(mask=mask, pixels=as_asked(patch.pixels, Image.Resampling.BICUBIC), rim=rim & ~mask)


def differences(patch: Patch, pixels: np.ndarray) -> np.ndarray:
    """(H - h + 1, W - w + 1) how unlike the patch's rim (H, W) pixels are at each (top, left).

    The mean squared difference, each less its own mean, in units of the rim's variance.
    """
    number = patch.rim.sum()
    own = np.where(patch.rim, patch.pixels - patch.pixels[patch.rim].mean(), 0)
    variance = (own**2).sum() / number
    theirs = sums_under(patch.rim, pixels**2) / number - (sums_under(patch.rim, pixels) / number) ** 2
    return (theirs + variance - 2 * sums_under(own, pixels) / number) / (variance + LEAST_CONTRAST)


Proposal = tuple[str, int, int, np.ndarray]  # name, top, left and (h, w) shape of a defect that may be placed so
Place = tuple[np.ndarray, Transform]  # (y, x) of the middle of a mask's box, and how the patch is changed


class LikeSurroundings:
    """Where a good image looks as the references do around their defects.

    Args:
        patches: the references' defects.
        max_rotation: degrees; patches are turned by quarters, as far as this allows.
    """

    def __init__(self, patches: Sequence[Patch], max_rotation: float):
        self.patches = patches
        quarters = [k for k in range(4) if 90 * min(k, 4 - k) <= max_rotation]
        self.turns = [*itertools.product(quarters, (False, True))]

    def propose(
        self, image: Image.Image, allowed: np.ndarray, coverage: float, rng: np.random.Generator
    ) -> Iterator[Proposal]:
        """Masks and good places for them in the image.

        References come in random order, those first that have a place that is alike enough; small ones are like more
        places, and would be drawn more often if references were compared. Each is scaled a little before its places
        are looked for, and then warped.

        Args:
            allowed: (H, W) bool; at least `coverage` of a mask lies on it.
        """
        shrink = min(1.0, SEARCHED_SIDE / max(image.size))
        small = image.resize([max(1, round(shrink * side)) for side in image.size]) if shrink < 1 else image
        pixels = grey(small)
        allowed_small = np.asarray(Image.fromarray(allowed).resize(small.size, Image.Resampling.NEAREST))
        others = []
        for index in rng.permutation(len(self.patches))[:MOST_PATCHES].tolist():
            patch = self.patches[index]
            change = random_transform(rng, 0)
            scale = change.scale * math.sqrt(allowed.size / patch.image_area)
            found = list[tuple[float, Place]]()
            for quarters, flip in self.turns:
                change = dataclasses.replace(change, angle=90 * quarters, flip=flip, scale=scale)
                sought = changed(patch, dataclasses.replace(change, scale=scale * shrink))
                if not sought.rim.any() or (np.array(sought.mask.shape) > pixels.shape).any():
                    continue
                unlike = differences(sought, pixels)
                unlike += EVEN * rng.random(unlike.shape)
                unlike[covered(sought.mask, allowed_small) < coverage] = np.inf
                middle = middle_of(sought.mask)
                found += [(unlike[p], ((p + middle) / shrink, change)) for p in best_places(unlike, sought)]
            if not found:
                continue
            best = min(unlike for unlike, _ in found)
            places = [place for unlike, place in found if unlike <= best + WORSE]
            if best <= ALIKE:
                yield from put(patch, places, allowed.shape, rng)
            else:
                others.append((best, patch, places))
        for _, patch, places in sorted(others, key=lambda one: one[0]):
            yield from put(patch, places, allowed.shape, rng)


def put(patch: Patch, places: Sequence[Place], size: tuple[int, ...], rng: np.random.Generator) -> Iterator[Proposal]:
    """A patch's mask at these places of an (H, W) image, in random order."""
    for index in rng.permutation(len(places)).tolist():
        middle, change = places[index]
        shape = transform(cut_out(patch.mask), change, rng)
        most = np.array(size) - shape.shape
        if (most >= 0).all():
            top, left = np.rint(middle - np.array(shape.shape) / 2).astype(int).clip(0, most).tolist()
            yield patch.name, top, left, shape


def middle_of(mask: np.ndarray) -> np.ndarray:
    """(y, x) of the middle of a mask's bounding box."""
    left, top, right, bottom = bounds(mask)
    return np.array([top + bottom, left + right]) / 2


def covered(mask: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(H - h + 1, W - w + 1) share of a mask's pixels on allowed ones, with it at each (top, left)."""
    if allowed.all():
        return np.ones(np.array(allowed.shape) - mask.shape + 1)
    return sums_under(mask, allowed) / mask.sum() + 1e-6


def best_places(unlike: np.ndarray, sought: Patch) -> list[tuple[int, int]]:
    """Up to `PLACES` of the lowest (top, left), the best first, no two nearer than half the patch."""
    rest, places = unlike.copy(), list[tuple[int, int]]()
    while len(places) < PLACES:
        place = divmod(int(rest.argmin()), rest.shape[1])
        if not np.isfinite(rest[place]) or rest[place] > unlike.min() + WORSE:
            break
        places.append(place)
        near = zip(place, sought.mask.shape)
        rest[tuple(slice(max(0, at - side // 2), at + side // 2 + 1) for at, side in near)] = np.inf
    return places
