"""CVAT for images 1.1: an XML file of images with polygons, boxes, ellipses and masks. Without a shape it is good.

Source: docs.cvat.ai/docs/dataset_management/formats/format-cvat.
"""

from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ..text import holds_text
from .files import PEEKED, Place, all_files
from .lookup import NamedImages, check_tags, xml_roots
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    add_marks,
    annotated_size,
    blame_annotation,
    check_runs,
    ellipse,
    number,
    placed_rle,
    polygon,
    said,
    turned_box,
)  # fmt: skip
from .rows import Reading, relative, split_of


REMARKS = ("tag", "attribute")


def is_cvat(place: Place) -> bool:
    files = [f for f in place.of_kind(".xml")[:PEEKED] if holds_text(f, "<annotations")]
    return any(holds_text(f, "<image") or holds_text(f, "<track") for f in files)


def read_cvat(root: Path) -> Reading:
    """All CVAT files of the folder: every image that they name, wherever it lies; `subset` says its split."""
    reading = Reading()
    images = NamedImages(reading, root)
    for file, content in xml_roots(all_files(root, ".xml"), "annotations", reading, root):
        if content.find("track") is not None:
            reading.missing(
                relative(file, root), "holds tracks of a video", "export the task as 'CVAT for images 1.1'"
            )
            continue
        for entry in content.iter("image"):
            place = f"{relative(file, root)}, image {entry.get('id', '')}".rstrip()
            name, subset = entry.get("name", ""), entry.get("subset", "")
            image = images.find(name, place, subset)
            if image is None:
                continue
            try:
                size = annotated_size(image, root, entry.get("width"), entry.get("height"))
                shapes = [shape for shape in entry if shape.tag not in REMARKS]
                marks = [mark_of(shape, place_, size) for place_, shape in enumerate(shapes, 1)]
                check_tags(marks, [tag.get("label", "") for tag in entry.iter("tag")])
                add_marks(reading, image, size, marks, split_of(subset, relative(image.parent, root)))
            except ANNOTATION_ERRORS as error:
                blame_annotation(reading, image, root, error, place)
    images.add_rest()
    return reading


def mark_of(shape: Element, place: int, size: tuple[int, int]) -> Mark:
    """One shape, in the image of this (W, H); raises ValueError that says which."""
    try:
        label, turn = shape.attrib["label"], number(shape.get("rotation", 0))
        if shape.tag == "mask":
            return Mark(label, rle=_mask_rle(shape, size))
        if shape.tag == "polygon":
            return Mark(label, polygon([point.split(",") for point in shape.attrib["points"].split(";")], size))
        if shape.tag == "box":
            left, top, right, bottom = (number(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            return Mark(label, turned_box(left, top, right - left, bottom - top, turn, size))
        if shape.tag == "ellipse":
            cx, cy, rx, ry = (number(shape.attrib[key]) for key in ("cx", "cy", "rx", "ry"))
            return Mark(label, ellipse(cx, cy, rx, ry, size, turn))
        raise ValueError("marks no area; draw a polygon, a box, an ellipse or a mask")
    except MALFORMED as error:
        raise ValueError(f"shape {place} ({shape.tag} '{shape.get('label', '')}'): {said(error)}") from error


def _mask_rle(shape: Element, size: tuple[int, int]) -> str:
    """The run lengths of a part of the image, row by row, the first of them not marked."""
    left, top, width, height = (number(shape.attrib[key]) for key in ("left", "top", "width", "height"))
    counts = [number(count) for count in shape.attrib["rle"].split(",")]
    if any(value != int(value) for value in (left, top, width, height, *counts)):
        raise ValueError("its RLE counts or its position are not whole numbers")
    if min(width, height) < 0 or width > size[0] or height > size[1]:
        raise ValueError(f"its RLE does not fill {width:g}x{height:g} pixels of the image")
    check_runs(counts, (int(width), int(height)))
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, dtype=int))
    return placed_rle(flat.reshape(int(height), int(width)), int(left), int(top), size)
