"""The shapes of annotation files, proved to lie in their image: corners in pixels, and run lengths.

Each function raises ValueError with the value that is wrong; readers add the file and the annotation.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from ..errors import InputError, Problem
from ..images import UNREADABLE, upright_size
from ..masks import MaskShapes
from ..text import read_json
from .rows import GOOD, Reading, Row, relative, tidy


MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)  # content not of its format

MOST_CORNERS, MOST_SHAPES = 10_000, 10_000  # of a polygon, of an image: each takes time in every pixel

Point = tuple[float, float]
Polygon = tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Mark:
    """One shape of an image's annotation, with its label."""

    label: str
    polygon: Polygon = ()
    rle: str = ""


def said(error: Exception) -> str:
    """What went wrong with content that is not of its format, in words."""
    if isinstance(error, KeyError):
        return f"has no {error}"
    if isinstance(error, (TypeError, AttributeError, IndexError)):
        return "is not of its format: a value is of another kind than belongs there"
    return str(error)


def number(value: object) -> float:
    """A finite number; JSON's NaN and huge ones are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    try:
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{value!r} is not a number") from error
    if not math.isfinite(found):
        raise ValueError(f"{value!r} is not a finite number")
    return found


def numbers(values: Sequence[object], count: int) -> list[float]:
    """So many finite numbers."""
    if len(values) != count:
        raise ValueError(f"has {len(values)} numbers where {count} belong")
    return [number(value) for value in values]


def polygon(points: Iterable[Iterable[object]], size: tuple[int, int]) -> Polygon:
    """Three corners or more, (x, y) in pixels, in the image of this (W, H).

    A corner up to a pixel or 0.5 % of the side outside, as rounding leaves it, is moved to the border.
    """
    points = [*itertools.islice(points, MOST_CORNERS + 1)]
    if len(points) > MOST_CORNERS:
        raise ValueError(f"a polygon has more than {MOST_CORNERS:,} corners; simplify it, or use a mask")
    corners = [tuple(number(value) for value in point) for point in points]
    if any(len(corner) != 2 for corner in corners):
        raise ValueError("a corner is not (x, y)")
    if len(corners) < 3:
        raise ValueError(f"a polygon has {len(corners)} corners; it needs three")
    for x, y in corners:
        if any(not -max(1, 0.005 * side) <= v <= side + max(1, 0.005 * side) for v, side in zip((x, y), size)):
            raise ValueError(f"the point ({x:g}, {y:g}) is not in the image of {size[0]}x{size[1]}")
    return tuple((min(max(x, 0.0), size[0]), min(max(y, 0.0), size[1])) for x, y in corners)


def box(x: float, y: float, width: float, height: float) -> list[Point]:
    """The corners of a box by its top left one and its sides, in the order of the clock."""
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def turned(points: Sequence[Point], degrees: float, centre: Point | None = None) -> list[Point]:
    """The points turned clockwise, as seen in the image (y points down), about their middle or another centre."""
    if centre is None:
        centre = (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))
    (cx, cy), angle = centre, math.radians(degrees)
    sine, cosine = math.sin(angle), math.cos(angle)
    return [(cx + (x - cx) * cosine - (y - cy) * sine, cy + (x - cx) * sine + (y - cy) * cosine) for x, y in points]


def clipped(points: Sequence[Point], size: tuple[int, int]) -> Polygon:
    """The corners of a turned shape: its middle must be in the image of this (W, H), its ends may stand out.

    By no more than the image's diagonal: what reaches further is a wrong number.
    """
    middle = (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))
    polygon([middle] * 3, size)
    for x, y in points:
        if any(not -math.hypot(*size) <= v <= side + math.hypot(*size) for v, side in zip((x, y), size)):
            raise ValueError(f"the point ({x:g}, {y:g}) is far from the image of {size[0]}x{size[1]}")
    return tuple(points)


def turned_box(
    x: float, y: float, width: float, height: float, degrees: float, size: tuple[int, int], centre: Point | None = None
) -> Polygon:
    """A box by its top left corner and its sides, turned clockwise about its middle or another point."""
    if width <= 0 or height <= 0:
        raise ValueError(f"its box is {width:g} wide and {height:g} high")
    corners = box(x, y, width, height)
    return clipped(turned(corners, degrees, centre), size) if degrees % 360 else polygon(corners, size)


def ellipse(cx: float, cy: float, rx: float, ry: float, size: tuple[int, int], degrees: float = 0) -> Polygon:
    """64 corners around an ellipse whose centre is in the image; what is outside is cut off."""
    if not (0 < rx < math.inf and 0 < ry < math.inf):
        raise ValueError(f"a circle or ellipse has the radii {rx:g} and {ry:g}")
    turns = (2 * math.pi * i / 64 for i in range(64))
    return clipped(turned([(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns], degrees, (cx, cy)), size)


def rle_of(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of an (H, W) bool array."""
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def placed_rle(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> str:
    """Run lengths of an (h, w) bool array at a place of the image of this (W, H), in which it must lie."""
    height, width = part.shape
    if left < 0 or top < 0 or left + width > size[0] or top + height > size[1]:
        raise ValueError(f"a mask of {width}x{height} at ({left}, {top}) is not in the image of {size[0]}x{size[1]}")
    whole = np.zeros(size[::-1], dtype=bool)
    whole[top : top + height, left : left + width] = part
    return rle_of(whole)


def coco_rle(segmentation: dict, size: tuple[int, int]) -> str:
    """Run lengths in COCO's compressed form, proved to be of this (W, H) and safe to decode."""
    height, width = numbers(segmentation["size"], 2)
    if (width, height) != size:
        raise ValueError(f"its RLE is {width:g}x{height:g}, the image is {size[0]}x{size[1]}")
    counts = segmentation["counts"]
    counts = uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("its RLE counts are not whole numbers")
    check_runs(counts, size)
    merged = counts[:1]  # runs of no pixels, which other programs write, join the two beside them
    for i, count in enumerate(counts[1:], 1):
        if (len(merged) - 1) % 2 == i % 2:
            merged[-1] += count
        elif count:
            merged.append(count)
    return coco_mask.frPyObjects({"size": [size[1], size[0]], "counts": merged}, *size[::-1])["counts"].decode()


def uncompressed(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers: 5 bits a character, from the third on less the one before the last."""
    counts: list[int] = []
    value = place = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or place > 35:
            raise ValueError("its RLE is damaged")
        value |= (bits & 31) << place
        place += 5
        if not bits & 32:  # the number's last
            value -= (1 << place) * bool(bits & 16)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = place = 0
    if place:
        raise ValueError("its RLE ends too early")
    return counts


def check_runs(counts: Sequence[float], size: tuple[int, int]) -> None:
    """Raises ValueError unless the runs are the pixels of this (W, H): decoders would read or leave wild memory."""
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"its RLE does not fill {size[0]}x{size[1]} pixels")


def annotated_size(image: Path, root: Path, width: object = None, height: object = None) -> tuple[int, int]:
    """(W, H) of the image; raises InputError (DF140) if it was annotated at another."""
    size = upright_size(image)
    if width and height and (number(width), number(height)) != size:
        hint = " (an EXIF tag turns it)" if (number(height), number(width)) == size else ""
        name = relative(image, root)
        raise InputError(
            Problem("DF140", name, f"the image is {size[0]}x{size[1]}{hint}, its annotation "
                    f"{number(width):g}x{number(height):g}", "they must match", name)
        )  # fmt: skip
    return size


def add_marks(
    reading: Reading, image: Path, size: tuple[int, int], marks: Sequence[Mark], split: str | None = None
) -> None:
    """Adds an annotated image: a row for each label; good without a mark.

    Raises:
        ValueError: a label that is empty or "good".
    """
    if not marks:
        reading.rows.append(Row(image, None, GOOD, GOOD))
        return
    if len(marks) > MOST_SHAPES:
        raise ValueError(f"it has {len(marks):,} shapes; at most {MOST_SHAPES:,} are read")
    by_label: dict[str, list[Mark]] = {}
    for mark in marks:
        if tidy(mark.label).casefold() in ("", GOOD):
            raise ValueError("a defect cannot be called 'good' or nothing; name it, or remove the shape")
        by_label.setdefault(mark.label, []).append(mark)
    for label, found in by_label.items():
        polygons = tuple(mark.polygon for mark in found if mark.polygon)
        rles = tuple(mark.rle for mark in found if mark.rle)
        reading.rows.append(Row(image, MaskShapes(size, polygons, rles), label, split))


def blame_annotation(reading: Reading, image: Path, root: Path, error: Exception, where: str | None = None) -> None:
    """The problem that an exception of reading one image's annotation is; `where` names the annotation."""
    name = relative(image, root)
    if isinstance(error, InputError):
        reading.problems += [dataclasses.replace(p, image=name) for p in error.problems]
    elif isinstance(error, MALFORMED):
        reading.blame("DF167", image, root, f"its annotation cannot be used: {said(error)}", where=where or name)
    else:
        reading.blame("DF103", image, root, f"the image cannot be read: {error}")


def json_objects(files: Iterable[Path], reading: Reading, root: Path) -> Iterable[tuple[Path, dict]]:
    """Each file with the JSON object in it; what is no JSON is a problem, other JSON is passed over."""
    for file in files:
        try:
            content = read_json(file)
        except InputError as error:
            reading.problems += [dataclasses.replace(p, where=relative(file, root)) for p in error.problems]
            continue
        if isinstance(content, dict):
            yield file, content


ANNOTATION_ERRORS = (InputError, *MALFORMED, *UNREADABLE)
