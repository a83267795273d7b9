"""Datumaro: JSON files of items with annotations. An item without one is good.

Source: github.com/open-edge-platform/datumaro, docs/source/docs/data-formats/formats/datumaro.md.
"""

from pathlib import Path

from ..errors import InputError
from ..text import holds_text
from .files import PEEKED, Place, all_files
from .lookup import NamedImages, check_tags
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    add_marks,
    annotated_size,
    blame_annotation,
    coco_rle,
    ellipse,
    json_objects,
    number,
    numbers,
    polygon,
    said,
    turned_box,
)  # fmt: skip
from .rows import Reading, relative, split_of


REMARKS = ("label", "caption")  # of an image as a whole
SHAPES = {"polygon": "points", "bbox": "bbox", "rotated_bbox": "points", "ellipse": "points", "mask": "rle"}


def is_datumaro(place: Place) -> bool:
    return any(holds_text(f, '"items"', '"categories"', '"labels"') for f in place.of_kind(".json")[:PEEKED])


def read_datumaro(root: Path) -> Reading:
    """All Datumaro files of the folder, each a subset of its file's name: every image that they name."""
    reading = Reading()
    images = NamedImages(reading, root)
    for file, content in json_objects(all_files(root, ".json"), reading, root):
        if {"items", "categories"} <= content.keys():
            try:
                _read_file(images, file, content)
            except MALFORMED as error:
                if isinstance(error, InputError):
                    raise
                reading.missing(relative(file, root), f"is not of Datumaro's form: {said(error)}")
    images.add_rest()
    return reading


def _read_file(images: NamedImages, file: Path, content: dict) -> None:
    reading, root = images.reading, images.root
    names = [str(label["name"]) for label in content["categories"]["label"]["labels"]]
    for item in content["items"]:
        media = item.get("image") or item.get("media") or {}
        name = str(media.get("path") or item["id"])
        place = f"{relative(file, root)}, item '{item['id']}'"
        if item.keys() & {"video", "video_frame", "point_cloud"}:
            reading.missing(place, "is no image", "export images")
            continue
        image = images.find(name, place, file.stem)
        if image is None:
            continue
        try:
            height, width = numbers(media["size"], 2) if media.get("size") else (None, None)
            size = annotated_size(image, root, width, height)
            shapes = [a for a in item["annotations"] if a.get("type") not in REMARKS]
            marks = [mark_of(shape, names, size) for shape in shapes]
            check_tags(marks, [_label(a, names) for a in item["annotations"] if a.get("type") == "label"])
            add_marks(reading, image, size, marks, split_of(file.stem, relative(image.parent, root)))
        except ANNOTATION_ERRORS as error:
            blame_annotation(reading, image, root, error, place)


def _label(annotation: dict, names: list[str]) -> str:
    number_ = annotation["label_id"]
    if not isinstance(number_, int) or not 0 <= number_ < len(names):
        raise ValueError(f"there is no label {number_}; there are {len(names)}, from 0")
    return names[number_]


def mark_of(shape: dict, names: list[str], size: tuple[int, int]) -> Mark:
    """One annotation's shape, in the image of this (W, H); raises ValueError that says which."""
    try:
        label, kind = _label(shape, names), shape["type"]
        if kind not in SHAPES:
            raise ValueError(f"the type '{kind}' marks no area")
        values = shape[SHAPES[kind]]
        if kind == "mask":
            return Mark(label, rle=coco_rle(values, size))
        turn = number((shape.get("attributes") or {}).get("rotation") or 0)  # as CVAT writes it
        if kind == "polygon":
            if len(values) % 2:
                raise ValueError(f"a polygon has {len(values)} numbers; they must be pairs of x and y")
            return Mark(label, polygon(zip(values[::2], values[1::2]), size))
        if kind == "bbox":
            x, y, width, height = numbers(values, 4)
            return Mark(label, turned_box(x, y, width, height, turn, size))
        if kind == "rotated_bbox":
            x, y, width, height, turn = numbers(values, 5)
            return Mark(label, turned_box(x - width / 2, y - height / 2, width, height, turn, size))
        left, top, right, bottom = numbers(values, 4)
        middle = (left + right) / 2, (top + bottom) / 2
        return Mark(label, ellipse(*middle, (right - left) / 2, (bottom - top) / 2, size, turn))
    except MALFORMED as error:
        raise ValueError(f"annotation {shape.get('id', '')}: {said(error)}") from error
