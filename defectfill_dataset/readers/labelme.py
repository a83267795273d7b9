"""LabelMe: a JSON file for each image, with polygons, rectangles, circles and masks. Without a shape it is good.

Source: github.com/wkentaro/labelme.
"""

import base64
import binascii
import io
import math
import re
from pathlib import Path

import numpy as np

from ..images import UNREADABLE, open_image
from ..text import holds_text
from .files import IMAGE_EXTENSIONS, PEEKED, Place, all_files, all_images, file_inside, spelt
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    add_marks,
    annotated_size,
    blame_annotation,
    box,
    clipped,
    ellipse,
    json_objects,
    number,
    placed_rle,
    polygon,
    said,
)  # fmt: skip
from .rows import Reading, relative, split_of


GOOD_FOLDERS = ("good", "normal", "ok")


def is_labelme(place: Place) -> bool:
    return any(holds_text(f, '"shapes"', '"imagePath"') for f in place.of_kind(".json")[:PEEKED])


def read_labelme(root: Path) -> Reading:
    """The JSON files of the folder and those below it, beside their images or apart from them.

    Images without a JSON file are good: those beside annotated ones or JSON files, and those in good/.
    """
    reading = Reading()
    everything = all_images(root)
    by_stem: dict[str, list[Path]] = {}
    for image in everything:
        by_stem.setdefault(spelt(image.stem).casefold(), []).append(image)
    files = all_files(root, ".json")
    annotated: set[Path] = set()
    for file, content in json_objects(files, reading, root):
        found = image_of(reading, root, file, content.get("imagePath"), by_stem, "shapes" in content)
        if found is None:
            continue
        annotated.add(image := found)
        if "shapes" not in content:
            reading.blame(
                "DF166", image, root, "cannot be read as LabelMe's", "mend or remove it", relative(file, root)
            )
            continue
        try:
            size = annotated_size(image, root, content.get("imageWidth"), content.get("imageHeight"))
            marks = [mark_of(shape, number_, size) for number_, shape in enumerate(content["shapes"], 1)]
            add_marks(reading, image, size, marks, split_of(relative(image.parent, root)))
        except ANNOTATION_ERRORS as error:
            blame_annotation(reading, image, root, error)
    places = {f.parent for f in [*annotated, *files]}
    good = [i for i in everything if i.parent in places or i.parent.name.casefold() in GOOD_FOLDERS]
    reading.add_good(image for image in good if image not in annotated)
    return reading


def image_of(
    reading: Reading, root: Path, file: Path, path: object, by_stem: dict[str, list[Path]], must: bool = True,
    key: str = "imagePath",
) -> Path | None:  # fmt: skip
    """The image that an annotation file means: by the path in it, and by its own name; a problem where they differ.

    Annotations keep the path of an image that was renamed later, and would mark another image.
    """
    place = relative(file, root)
    same = nearest(by_stem.get(spelt(file.stem).casefold(), []), file)
    beside = file_inside(root, file.parent, str(path)) if path else None
    named = [beside] if beside else []
    if path and not beside:
        name = spelt(re.split(r"[\\/]", str(path))[-1]).casefold()
        stem = name.removesuffix(Path(name).suffix) if Path(name).suffix in IMAGE_EXTENSIONS else name
        known = by_stem.get(stem, [])
        named = nearest([image for image in known if spelt(image.name).casefold() == name] or known, file)
    both = [image for image in same if image in named]
    if named and same and not both and not any(_same_bytes(one, other) for one in named for other in same):
        other = relative(same[0], root)
        for image in (*named, *same):
            reading.blame(
                "DF144", image, root, f"says it is of '{path}', but by its name it is of '{other}'",
                f"correct {key}, or rename the file", place,
            )  # fmt: skip
        return None
    found = both or named or same
    if len(found) != 1:
        if must:
            code, what = ("DF144", "several images") if found else ("DF143", "no image")
            reading.missing(place, f"has {what}", "there must be one of its name", code)
        return None
    return found[0]


def nearest(images: list[Path], file: Path) -> list[Path]:
    """Those beside the file; else those that share the most names of folders with it: images/train with xmls/train."""
    beside = [image for image in images if image.parent == file.parent]
    shared = {image: len({*image.parent.parts} & {*file.parent.parts}) for image in images}
    return beside or [image for image in images if shared[image] == max(shared.values())]


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def mark_of(shape: dict, place: int, size: tuple[int, int]) -> Mark:
    """One shape, in the image of this (W, H); raises ValueError that says which."""
    try:
        kind = shape.get("shape_type") or "polygon"
        label, points = str(shape["label"]), shape["points"]
        if kind == "mask":
            return Mark(label, rle=_mask_rle(shape["mask"], points, size))
        return Mark(label, _polygon(kind, points, size))
    except MALFORMED as error:
        raise ValueError(f"shape {place}: {said(error)}") from error


def _polygon(kind: str, points: list, size: tuple[int, int]) -> tuple:
    if kind == "rectangle" and len(points) == 2:
        (x, y), (right, bottom) = (map(number, point) for point in points)
        return polygon(box(x, y, right - x, bottom - y), size)
    if kind == "circle":
        (x, y), edge = ([number(v) for v in point] for point in points)
        radius = math.dist((x, y), edge)
        return ellipse(x, y, radius, radius, size)
    if kind == "rotation":  # X-AnyLabeling's: the four corners of a turned box
        return clipped([tuple(map(number, point)) for point in points], size)  # type: ignore[misc]
    if kind not in ("polygon", "rectangle"):
        raise ValueError(f"the type '{kind}' marks no area; draw a polygon, a rectangle, a circle or a mask")
    return polygon(points, size)


def _mask_rle(encoded: str, points: list, size: tuple[int, int]) -> str:
    """RLE of a base64 image that lies between two corners."""
    try:
        part = np.asarray(open_image(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("L")) > 0
    except binascii.Error as error:
        raise ValueError(f"its mask is not base64: {error}") from error
    except UNREADABLE as error:
        raise ValueError(f"its mask cannot be read: {error}") from error
    (left, top), (right, bottom) = ([round(number(v)) for v in point] for point in points)
    if abs(right - left - part.shape[1]) > 1 or abs(bottom - top - part.shape[0]) > 1:
        raise ValueError(f"its mask is {part.shape[1]}x{part.shape[0]}, its box {right - left}x{bottom - top}")
    return placed_rle(part, left, top, size)
