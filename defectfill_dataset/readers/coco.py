"""COCO: JSON files of images, annotations and categories. An image without annotation is good.

Source: Lin et al., ECCV 2014; cocodataset.org/#format-data.
"""

import collections
import re
from collections.abc import Sequence
from pathlib import Path

from ..text import holds_text
from .files import PEEKED, Place, all_files, all_images, file_inside, folders_in, spelt
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    add_marks,
    annotated_size,
    blame_annotation,
    box,
    clipped,
    coco_rle,
    json_objects,
    number,
    polygon,
    said,
    turned,
)  # fmt: skip
from .rows import Reading, relative, split_of


def is_coco(place: Place) -> bool:
    return any(holds_text(f, '"images"', '"annotations"', '"categories"') for f in place.of_kind(".json")[:PEEKED])


def read_coco(root: Path) -> Reading:
    """All COCO files of the folder: polygons, run lengths, or boxes (turned ones too) where there is neither."""
    reading = Reading()
    pictures: dict[str, list[Path]] = collections.defaultdict(list)
    for image in all_images(root):
        pictures[spelt(image.name).casefold()].append(image)
    for file, content in json_objects(all_files(root, ".json"), reading, root):
        if {"images", "annotations"} <= content.keys():
            of_file = Reading()
            try:
                _read_file(of_file, root, file, content, pictures)
            except MALFORMED as error:
                of_file = Reading()
                of_file.missing(relative(file, root), f"is not of COCO's form: {said(error)}")
            reading += of_file
    return reading


def _read_file(reading: Reading, root: Path, file: Path, content: dict, pictures: dict[str, list[Path]]) -> None:
    names = {category["id"]: str(category["name"]) for category in content.get("categories") or []}
    annotations: dict[int, list[dict]] = {entry["id"]: [] for entry in content["images"]}
    if len(annotations) < len(content["images"]):
        raise ValueError("two images have the same id")
    place = relative(file, root)
    for annotation in content["annotations"]:
        if annotation["image_id"] in annotations:
            annotations[annotation["image_id"]].append(annotation)
        else:
            reading.missing(place, f"annotation {annotation.get('id')} is of no image", "remove it", "DF143")
    for entry in content["images"]:
        name = str(entry["file_name"])
        found = _images_of(root, file, name, pictures)
        if len(found) != 1:
            code, what = ("DF144", "several files") if found else ("DF166", "no file")
            reading.missing(place, f"'{name}' is {what} in {root}", "there must be one", code)
            continue
        image, marks = found[0], annotations[entry["id"]]
        try:
            size = annotated_size(image, root, entry.get("width"), entry.get("height"))
            split = split_of(relative(image.parent, root), file.stem)
            add_marks(reading, image, size, [m for a in marks for m in marks_of(a, names, size)], split)
        except ANNOTATION_ERRORS as error:
            blame_annotation(reading, image, root, error)


def _images_of(root: Path, file: Path, name: str, pictures: dict[str, list[Path]]) -> list[Path]:
    """Where the image may be: beside the JSON file, else where its path ends so, else by its name alone."""
    if beside := file_inside(root, file.parent, name):
        return [beside]
    folders = [root, root / "images", *folders_in(root), *folders_in(root / "images")]
    found = sorted({f for folder in folders if (f := file_inside(root, folder, name))})
    if not found:
        found = pictures.get(spelt(re.split(r"[\\/]", name)[-1]).casefold(), [])
    words = re.split(r"[_\-.]", file.stem)
    return [f for f in found if f.parent.name in words] or found  # instances_train2017.json means train2017/


def marks_of(annotation: dict, names: dict, size: tuple[int, int]) -> list[Mark]:
    """The shapes of one annotation, in the image of this (W, H); raises ValueError that names the annotation."""
    try:
        if annotation["category_id"] not in names:
            raise ValueError(f"no category has the id {annotation['category_id']}")
        label = names[annotation["category_id"]]
        segmentation, bbox = annotation.get("segmentation"), annotation.get("bbox")
        if isinstance(segmentation, dict):
            return [Mark(label, rle=coco_rle(segmentation, size))]
        if segmentation:
            return [Mark(label, corners) for corners in _polygons(segmentation, size)]
        if bbox:
            return [Mark(label, _turned_box(bbox, annotation, size))]
        raise ValueError("has neither a segmentation nor a box")
    except MALFORMED as error:
        raise ValueError(f"annotation {annotation.get('id')}: {said(error)}") from error


def _polygons(segmentation: Sequence, size: tuple[int, int]) -> list:
    """Polygons as lists of [x, y, x, y ...]; one alone may stand without the outer list, or as [[x, y], ...]."""
    if not isinstance(segmentation[0], (list, tuple)):
        segmentation = [segmentation]
    elif all(len(point) == 2 for point in segmentation) and len(segmentation) > 2:
        return [polygon(segmentation, size)]
    for flat in segmentation:
        if len(flat) % 2:
            raise ValueError(f"a polygon has {len(flat)} numbers; they must be pairs of x and y")
    return [polygon(zip(flat[::2], flat[1::2]), size) for flat in segmentation]


def _turned_box(bbox: Sequence, annotation: dict, size: tuple[int, int]) -> tuple:
    """The corners of [x, y, width, height]; CVAT writes its turn, in degrees, among the attributes."""
    if len(bbox) != 4:
        raise ValueError(
            f"its box has {len(bbox)} numbers; it needs [x, y, width, height], turned ones a segmentation"
        )
    x, y, width, height = map(number, bbox)
    if width <= 0 or height <= 0:
        raise ValueError(f"its box is {width:g} wide and {height:g} high")
    attributes = annotation.get("attributes") or {}
    angle = number(attributes.get("rotation") or 0) if isinstance(attributes, dict) else 0
    corners = box(x, y, width, height)
    return clipped(turned(corners, angle), size) if angle else polygon(corners, size)
