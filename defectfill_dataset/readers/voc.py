"""Pascal VOC: an XML file for each image, with boxes, turned boxes or polygons; LabelMe 3.0's XML is read too.

Where SegmentationClass/ has a mask of an image, its pixels count in place of boxes. Without an object it is good.

Source: host.robots.ox.ac.uk/pascal/VOC; github.com/HumanSignal/labelImg; github.com/cgvict/roLabelImg; CVAT's exports
"Pascal VOC 1.1", "Segmentation mask 1.1" and "LabelMe 3.0".
"""

import math
import re
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ..images import open_image
from ..text import holds_text, read_text
from .files import IMAGE_EXTENSIONS, PEEKED, Place, all_files, all_images, child, entries, file_inside, spelt
from .labelme import GOOD_FOLDERS, image_of
from .lookup import xml_roots
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    Point,
    add_marks,
    annotated_size,
    blame_annotation,
    box,
    clipped,
    number,
    placed_rle,
    polygon,
    said,
    turned,
)  # fmt: skip
from .rows import SPLITS, Reading, relative, split_of
from .voc_masks import add_masks, in_folder


def is_voc(place: Place) -> bool:
    files = place.of_kind(".xml")[:PEEKED]
    starts = ("<annotation>", "<annotation ")
    return any(holds_text(f, start) for f in files for start in starts) or any(
        in_folder(f, place.folder, "segmentationclass") for f in place.of_kind(".png")
    )


def read_voc(root: Path) -> Reading:
    """The XML files of the folder and the masks of SegmentationClass, beside their images or apart from them.

    Images with neither are good: those beside annotated ones or XML files, and those in good/.
    """
    reading = Reading()
    files = dict(xml_roots(all_files(root, ".xml"), "annotation", reading, root))
    parts = {f for file, content in files.items() for o in content.iter("object") if (f := _part_file(o, file, root))}
    everything = [i for i in all_images(root) if i not in parts]
    images = [i for i in everything if not in_folder(i, root, "segmentationclass", "segmentationobject")]
    by_stem: dict[str, list[Path]] = {}
    for image in images:
        by_stem.setdefault(spelt(image.stem).casefold(), []).append(image)
    drawn: dict[Path, tuple[tuple[int, int], list[Mark]]] = {}
    annotated: set[Path] = set()
    for file, content in files.items():
        found = image_of(reading, root, file, content.findtext("filename"), by_stem, key="filename")
        if found is None:
            continue
        image = found
        if image in annotated:
            what = "is of an image that has another file"
            reading.blame("DF144", image, root, what, "keep one", relative(file, root))
        annotated.add(image)
        try:
            width, height = (_number(content, f"size/{a}", f"imagesize/{b}") for a, b in SIZES)
            size = annotated_size(image, root, width, height)
            objects = enumerate(content.iter("object"), 1)
            drawn[image] = size, [mark_of(o, n, size, file, root) for n, o in objects if o.findtext("deleted") != "1"]
        except ANNOTATION_ERRORS as error:
            blame_annotation(reading, image, root, error, relative(file, root))
    splits = {image: split_of(relative(image.parent, root)) for image in images} | _listed(reading, root, by_stem)
    labels = {image: {mark.label for mark in marks} for image, (_, marks) in drawn.items()}
    masks = [i for i in everything if in_folder(i, root, "segmentationclass")]
    masked = add_masks(reading, root, masks, by_stem, labels, splits)
    for image, (size, marks) in drawn.items():
        if image not in masked:
            try:
                add_marks(reading, image, size, marks, splits[image])
            except ValueError as error:
                blame_annotation(reading, image, root, error)
    annotated |= masked
    places = {f.parent for f in [*annotated, *files]}
    rest = [image for image in images if image not in annotated]
    reading.add_good(i for i in rest if i.parent in places or i.parent.name.casefold() in GOOD_FOLDERS)
    return reading


SIZES = (("width", "ncols"), ("height", "nrows"))  # VOC's names, LabelMe 3.0's


def _number(content: Element, *paths: str) -> float | None:
    """The number at the first of these places that has one; None without, or where it is 0, which means unknown."""
    text = next((text for path in paths if (text := content.findtext(path))), None)
    return number(text) or None if text else None


def _listed(reading: Reading, root: Path, by_stem: dict[str, list[Path]]) -> dict[Path, str | None]:
    """The split of each image that ImageSets' train.txt, val.txt or test.txt name; Segmentation/ before Main/."""
    splits: dict[Path, str | None] = {}
    for folder in ("ImageSets", "ImageSets/Main", "ImageSets/Segmentation"):
        found: dict[Path, str] = {}
        for file in entries(child(root, folder)):
            if file.suffix.lower() != ".txt" or file.stem.lower() not in SPLITS:
                continue
            for line in read_text(file).splitlines():
                name = spelt(re.split(r"[\\/]", line.strip())[-1]).casefold()
                name = name.removesuffix(Path(name).suffix) if Path(name).suffix in IMAGE_EXTENSIONS else name
                for image in by_stem.get(name, []):
                    if found.setdefault(image, SPLITS[file.stem.lower()]) != SPLITS[file.stem.lower()]:
                        reading.blame("DF144", image, root, "is in two splits", "keep one", relative(file, root))
        splits |= found
    return splits


def _part_file(entry: Element, file: Path, root: Path) -> Path | None:
    """The file of a LabelMe 3.0 object that is kept as an image: beside the XML file or in Masks/."""
    name, masks = entry.findtext("segm/mask"), child(root, "Masks")
    places = (file.parent, masks, masks / file.parent.name)
    return next((found for place in places if (found := file_inside(root, place, name))), None)


def mark_of(entry: Element, place: int, size: tuple[int, int], file: Path, root: Path) -> Mark:
    """One object's shape, in the image of this (W, H); raises ValueError that says which."""
    try:
        label = (entry.findtext("name") or "").strip()
        if entry.find("segm") is not None:
            return Mark(label, rle=_part_rle(entry, size, file, root))
        corners, degrees = _shape(entry)
        return Mark(label, clipped(turned(corners, degrees), size) if degrees % 360 else polygon(corners, size))
    except MALFORMED as error:
        raise ValueError(f"object {place}: {said(error)}") from error


def _shape(entry: Element) -> tuple[list[Point], float]:
    """An object's corners, and the degrees to turn them by, clockwise. A box around a polygon does not count."""
    if (outline := entry.find("polygon")) is not None and len(outline):
        is_box = entry.findtext("type") == "bounding_box"  # of LabelMe 3.0
        return _corners(outline), _rotation(entry) if is_box else 0
    if (slanted := entry.find("robndbox")) is not None:
        cx, cy, width, height, angle = (number(slanted.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        if min(width, height) <= 0:
            raise ValueError(f"its box is {width:g} wide and {height:g} high")
        return box(cx - width / 2, cy - height / 2, width, height), math.degrees(angle)
    if (upright := entry.find("bndbox")) is None:
        raise ValueError("has no bndbox, robndbox or polygon")
    # The numbers are the box's edges, counted from 0, as labelImg, CVAT and Roboflow write them. Those of VOC's own
    # photographs count pixels from 1, so that here their boxes lack one column and one row of pixels.
    left, top, right, bottom = (number(upright.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    if right < left or bottom < top or (left, top) == (right, bottom):
        raise ValueError(f"its box goes from ({left:g}, {top:g}) to ({right:g}, {bottom:g})")
    return box(left, top, right - left, bottom - top), _rotation(entry)


def _corners(outline: Element) -> list[Point]:
    """The corners of a polygon: LabelMe 3.0's <pt>, or <x1>, <y1>, <x2> ..."""
    points = [(point.findtext("x"), point.findtext("y")) for point in outline.findall("pt")]
    count = sum(bool(re.fullmatch(r"[xy]\d+", part.tag)) for part in outline)
    points += [(outline.findtext(f"x{n}"), outline.findtext(f"y{n}")) for n in range(1, -(-count // 2) + 1)]
    return [(number(x), number(y)) for x, y in points]


def _rotation(entry: Element) -> float:
    """The degrees that CVAT keeps among the attributes of a box."""
    for attribute in entry.iterfind("attributes/attribute"):
        if attribute.findtext("name") == "rotation":
            return number(attribute.findtext("value"))
    found = re.search(r"\brotation=([^,\s]+)", entry.findtext("attributes") or "")
    return number(found[1]) if found else 0


def _part_rle(entry: Element, size: tuple[int, int], file: Path, root: Path) -> str:
    """RLE of what a LabelMe 3.0 object's image marks: neither transparent nor black."""
    name, found = entry.findtext("segm/mask"), _part_file(entry, file, root)
    if found is None:
        raise ValueError(f"its mask '{name}' is not there")
    pixels = np.asarray(open_image(found).convert("RGBA"))
    if pixels.shape[1::-1] != size:
        raise ValueError(f"its mask '{name}' is {pixels.shape[1]}x{pixels.shape[0]}, the image {size[0]}x{size[1]}")
    return placed_rle((pixels[..., 3] > 0) & pixels[..., :3].any(axis=-1), 0, 0, size)
