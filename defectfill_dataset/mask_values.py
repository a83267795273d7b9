"""What the values of a mask file mean: two of them a mask, more of them classes, soft edges, or noise.

No mark is ever dropped in silence: a file whose values cannot be told apart is refused, with the values it holds.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from .errors import InputError, Problem
from .images import FULL_16_BITS, load_image


IGNORE = "ignore"
NOISE = 0.12  # of the greatest value: how far compression moves values from 0 and from the greatest
FEW = 8  # values at most that are looked at one by one, however close to 0 they are
SOLID = 9  # pixels inside areas of one value that soft edges do not have
SHOWN = 8  # values in a message

Value = int | tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """What each value or colour of class-coded masks means: the name of a defect type, or `ignore`.

    Value 0 (black) is the ground unless named. `values` pairs (grey or palette value, or RGB colour) with names.
    """

    values: tuple[tuple[Value, str], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "MaskClasses":
        """From `--mask_classes`: "85=scratch", "250,50,83=hole", "#fa3253=hole", "255=ignore".

        Raises:
            InputError: another form, a value out of range or given twice, or a name that is empty or "good" (DF169).
        """
        values: dict[Value, str] = {}
        for text in texts:
            key, found, name = text.partition("=")
            value = _value(key.strip())
            if value is None or not found or name.strip() in ("", "good"):
                what = (
                    "write VALUE=NAME, with a grey value (85=scratch) or a colour (250,50,83=hole or #fa3253=hole) "
                    "and a defect type's name, or ignore"
                )
                raise InputError(Problem("DF169", f"--mask_classes '{text}'", what))
            if value in values:
                what = f"{key.strip()} is given twice"
                raise InputError(Problem("DF169", f"--mask_classes '{text}'", what, "keep one"))
            values[value] = name.strip()
        return cls(tuple(values.items()))

    def __bool__(self) -> bool:
        return bool(self.values)

    def __str__(self) -> str:
        return " ".join(f"{_said(value)}={name}" for value, name in self.values)

    def areas(self, mask: Image.Image, source: str = "--mask_classes") -> dict[str, np.ndarray]:
        """Defect type -> the (H, W) bool array of what a mask file marks as it; only types that are there.

        Args:
            source: where the names come from, for the message.

        Raises:
            ValueError: a lossy file, or values that are not named.
        """
        if is_lossy(mask):
            raise ValueError(f"{mask.format} blurs the values of classes; save the mask as PNG")
        indexed = np.asarray(ImageOps.exif_transpose(mask)) if mask.mode == "P" else None
        pixels = values_of(mask)
        left = np.ones(pixels.shape[:2], dtype=bool)
        areas: dict[str, np.ndarray] = {}
        for value, name in self.values:
            there = _equal(pixels, value) if indexed is None or isinstance(value, tuple) else indexed == value
            left &= ~there
            if name != IGNORE and there.any():
                areas[name] = areas.get(name, False) | there
        left &= ~_equal(pixels, 0)
        if left.any():
            raise ValueError(f"holds values that {source} does not name: {listed(pixels[left])}; name them too")
        return areas


NO_CLASSES = MaskClasses()


def _value(text: str) -> Value | None:
    if re.fullmatch(r"\d{1,5}", text):
        return int(text) if int(text) <= FULL_16_BITS else None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return tuple(bytes.fromhex(text[1:]))  # type: ignore[return-value]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 3 and all(re.fullmatch(r"\d{1,3}", part) and int(part) < 256 for part in parts):
        return tuple(map(int, parts))  # type: ignore[return-value]
    return None


def _said(value: Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _equal(pixels: np.ndarray, value: Value) -> np.ndarray:
    """Where an (H, W) or (H, W, 3) array has this value or colour; a grey value is a colour of three equal ones."""
    if pixels.ndim == 3:
        return (pixels == np.array(value, dtype=pixels.dtype)).all(axis=-1)
    if isinstance(value, tuple):
        return pixels == value[0] if len(set(value)) == 1 else np.zeros(pixels.shape, dtype=bool)
    return pixels == value


def is_lossy(mask: Image.Image) -> bool:
    """Whether the file's format moves values: JPEG, and WebP, whose files do not say."""
    return mask.format in ("JPEG", "MPO", "WEBP")


def values_of(mask: Image.Image) -> np.ndarray:
    """(H, W) values of a mask file turned the way its EXIF tag says, or (H, W, 3) where it has colours.

    Raises:
        ValueError: what `load_image` says.
    """
    if mask.mode.startswith("I;16") or (mask.mode in ("1", "L") and not mask.has_transparency_data):
        pixels = np.asarray(ImageOps.exif_transpose(mask))
        return pixels.astype(np.uint8) if pixels.dtype == bool else pixels
    pixels = np.asarray(load_image(mask))
    grey = pixels[..., 0]
    return grey if (pixels == grey[..., None]).all() else pixels


def _counts(pixels: np.ndarray) -> dict[Value, int]:
    """How many pixels each value has, of (H, W), (n,), (H, W, 3) or (n, 3) pixels."""
    if pixels.shape[-1:] == (3,) and pixels.ndim > 1:
        packed = pixels.reshape(-1, 3).astype(np.int64) @ (65536, 256, 1)
        found, numbers = np.unique(packed, return_counts=True)
        return {(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255): int(n) for c, n in zip(found, numbers)}
    counts = np.bincount(pixels.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def listed(pixels: np.ndarray) -> str:
    """The values or colours of these pixels, the most frequent first: "255 (40 pixels), 85 (12 pixels)"."""
    counts = sorted(_counts(pixels).items(), key=lambda item: -item[1])
    shown = ", ".join(f"{_said(value)} ({number} pixels)" for value, number in counts[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def binarise(mask: Image.Image) -> np.ndarray:
    """The (H, W) bool array of a mask file of two values: True where it is above half of its greatest value.

    So 0/255 and 0/1 codings both work, in 8 and in 16 bits, soft edges are cut at half, and a JPEG's noise stays out.

    Raises:
        ValueError: several values or colours that may be classes, a ground that is not black, a greatest value that
            no coding has, or what `load_image` says.
    """
    if mask.mode == "P" and np.unique(np.asarray(mask)).size > 2:
        raise ValueError(_ambiguous(np.asarray(mask), "it has several palette colours"))
    pixels = values_of(mask)
    if pixels.ndim == 3:
        pixels = _one_colour(pixels, is_lossy(mask))
    full = FULL_16_BITS if pixels.dtype == np.uint16 else 1 if mask.mode == "1" else 255
    peak, least = int(pixels.max()), int(pixels.min())
    if 1 < peak <= full // 2:
        raise ValueError(_ambiguous(pixels, f"its greatest value is {peak}; code it as 0 and {full}, or as 0 and 1"))
    if least > NOISE * peak and least < peak:
        raise ValueError(_ambiguous(pixels, "its background is not black"))
    inside = pixels > peak // 2
    if np.count_nonzero(pixels == peak) + np.count_nonzero(pixels == least) < pixels.size:
        _check_between(pixels, peak, inside, is_lossy(mask))
    return inside


def nonzero(mask: Image.Image) -> np.ndarray:
    """The (H, W) bool array of a mask file whose values name kinds of defects: True where it is not 0.

    A lossy file cannot hold such values: `binarise` reads it.
    """
    if is_lossy(mask):
        return binarise(mask)
    if mask.mode == "P":
        return np.asarray(ImageOps.exif_transpose(mask)) > 0
    pixels = values_of(mask)
    return (pixels.max(axis=-1) if pixels.ndim == 3 else pixels) > 0


def _ambiguous(pixels: np.ndarray, what: str) -> str:
    return (
        f"{what}. It holds {listed(pixels)}. Save it as black and white, or say what each value means: "
        "--mask_classes VALUE=NAME ..."
    )


def _one_colour(pixels: np.ndarray, lossy: bool) -> np.ndarray:
    """The (H, W) brightest channel of a (H, W, 3) mask that marks in one colour on black.

    Raises:
        ValueError: several colours, or a ground that is not black.
    """
    brightest = pixels.max(axis=-1)
    if lossy:
        return brightest
    packed = pixels.astype(np.int32) @ (65536, 256, 1)
    counts = _counts(pixels)
    if len(counts) == 2 and (0, 0, 0) in counts:
        return (packed > 0).astype(np.uint8)
    solid = _counts(pixels[_flat(packed)]) if len(counts) > 2 else counts
    bright = NOISE * int(brightest.max())
    colours = [c for c, n in solid.items() if n >= SOLID and isinstance(c, tuple) and max(c) > bright]
    if (0, 0, 0) not in counts:
        raise ValueError(_ambiguous(pixels, "its background is not black"))
    if len(colours) > 1:
        raise ValueError(_ambiguous(pixels, "it has several colours"))
    return brightest


def _flat(pixels: np.ndarray) -> np.ndarray:
    """Where the eight neighbours of a pixel have its value."""
    return ndimage.minimum_filter(pixels, 3) == ndimage.maximum_filter(pixels, 3)


def _check_between(pixels: np.ndarray, peak: int, inside: np.ndarray, lossy: bool) -> None:
    """Raises ValueError where values between 0 and the greatest are more than soft edges and noise."""
    counts = np.bincount(pixels.ravel())
    few = not lossy and np.count_nonzero(counts) <= FEW
    low = 0 if few else NOISE * peak
    solid = np.bincount(pixels[_flat(pixels)], minlength=peak + 1)
    values = np.arange(peak + 1)
    areas = (solid >= SOLID) & (values > low) & (values < (1 - NOISE) * peak)
    if not lossy and areas.any() or lossy and solid[areas].sum() > SOLID * SOLID:
        raise ValueError(_ambiguous(pixels, "it has several values"))
    labels, number = ndimage.label(pixels > max(low, NOISE * peak / 2), np.ones((3, 3)))
    if number and not ndimage.maximum(inside, labels, np.arange(1, number + 1)).all():
        raise ValueError(_ambiguous(pixels, "it has faint marks that half of its greatest value would lose"))
