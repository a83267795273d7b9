"""Label Studio: JSON of tasks with polygons, rectangles, ellipses and brushes. A task labelled with no shape is good.

Source: labelstud.io/guide/export.html#Label-Studio-JSON-format-of-annotated-tasks.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import InputError
from ..text import holds_text, read_json
from .brush import decode_brush
from .files import IMAGE_EXTENSIONS, PEEKED, Place, all_files
from .lookup import NamedImages, check_tags, note
from .marks import (
    ANNOTATION_ERRORS,
    MALFORMED,
    Mark,
    add_marks,
    annotated_size,
    blame_annotation,
    ellipse,
    number,
    numbers,
    placed_rle,
    polygon,
    said,
    turned_box,
)  # fmt: skip
from .rows import Reading, relative, split_of


SIGNS = (('"data"', '"annotations"', '"result"'), ('"data"', '"completions"', '"result"'),
         ('"data"', '"task"', '"result"'), ('"annotation_id"', '"annotator"'))  # fmt: skip
SHAPES = ("polygon", "rectangle", "ellipse", "brush")
REMARKS = ("choices", "taxonomy", "textarea", "rating", "number", "datetime", "relation")
UPLOAD = re.compile(r"(.*[\\/])?[0-9a-f]{8}-(?=[^\\/]+$)", re.DOTALL)  # what uploading puts before a name


def is_label_studio(place: Place) -> bool:
    return any(holds_text(f, *words) for f in place.of_kind(".json")[:PEEKED] for words in SIGNS)


def read_label_studio(root: Path) -> Reading:
    """All Label Studio files of the folder: the images of their tasks, wherever they lie."""
    reading = Reading()
    images = NamedImages(reading, root)
    annotations: dict[Path, list[dict]] = {}
    places: dict[Path, str] = {}
    for file in all_files(root, ".json"):
        try:
            content = read_json(file)
        except InputError as error:
            reading.problems += [dataclasses.replace(p, where=relative(file, root)) for p in error.problems]
            continue
        try:
            predicted = 0
            for task in tasks_of(content):
                predicted += bool(task.get("predictions"))
                place = f"{relative(file, root)}, task {task.get('id', '')}".rstrip()
                if image := _image_of(images, task, place):
                    places.setdefault(image, place)
                    annotations.setdefault(image, []).extend(task.get("annotations") or task.get("completions") or [])
        except MALFORMED as error:
            reading.missing(relative(file, root), f"is not of Label Studio's form: {said(error)}")
            continue
        if predicted:
            note(reading, relative(file, root), f"the predictions of {predicted} tasks", "only annotations count")
    for image, found in annotations.items():
        _add(reading, root, image, found, places[image])
    images.add_rest()
    return reading


def tasks_of(content: Any) -> Iterator[dict]:
    """The tasks of an export, or of one annotation as cloud storage gets it; nothing of other JSON.

    Raises:
        ValueError: JSON-MIN, which does not say what was skipped.
    """
    for entry in content if isinstance(content, list) else [content]:
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("data"), dict):
            yield entry
        elif isinstance(entry.get("task"), dict) and "result" in entry:
            yield {**entry["task"], "annotations": [entry]}
        elif {"annotation_id", "annotator"} <= entry.keys():
            raise ValueError("it is a JSON-MIN export; export it as JSON")


def _image_of(images: NamedImages, task: dict, place: str) -> Path | None:
    """The image of a task, by its name or by that without what uploading put before it."""
    texts = [value for value in task["data"].values() if isinstance(value, str)]
    names = [name for name in map(path_in, texts) if Path(name.lower()).suffix in IMAGE_EXTENSIONS]
    if len(names) != 1:
        images.reading.missing(place, f"its data name {len(names)} images", "a task must be of one image")
        return None
    found = images.candidates(names[0]) or images.candidates(UPLOAD.sub(r"\1", names[0]))
    return images.choose(found, names[0], place)


def path_in(text: str) -> str:
    """The file's path in what a task says of it: a path, an address, or Label Studio's own for local files."""
    if "?d=" in text:
        return unquote(text.split("?d=", 1)[1])
    return unquote(urlsplit(text).path) if "://" in text else text


def _add(reading: Reading, root: Path, image: Path, found: list[dict], place: str) -> None:
    """Adds the image by the annotations of it that were not skipped, which must agree."""
    try:
        kept = [annotation for annotation in found if not annotation.get("was_cancelled")]
        if not kept:
            what = "was skipped" if found else "was not labelled: it has no annotation"
            reading.blame("DF142", image, root, f"its task {what}", "label it, or remove the image", place)
            return
        size = annotated_size(image, root)
        drawn = [marks_of(annotation, image, root, size) for annotation in kept]
        if any(set(marks) != set(drawn[0]) for marks in drawn):
            ids = ", ".join(str(annotation.get("id")) for annotation in kept)
            reading.blame("DF144", image, root, f"its annotations {ids} differ", "keep one of them", place)
            return
        add_marks(reading, image, size, drawn[0], split_of(relative(image.parent, root)))
    except ANNOTATION_ERRORS as error:
        blame_annotation(reading, image, root, error, place)


def marks_of(annotation: dict, image: Path, root: Path, size: tuple[int, int]) -> list[Mark]:
    """The shapes of one annotation, in the image of this (W, H); raises ValueError that says which is wrong."""
    regions: dict[object, tuple[list[str], list[dict]]] = {}  # shapes and labels may come apart, with one id
    tags: list[str] = []
    for place, result in enumerate(annotation["result"], 1):
        kind = result["type"].lower()
        if kind in REMARKS:
            tags += [str(tag) for tag in result.get("value", {}).get("choices", ())] or [kind]
            continue
        annotated_size(image, root, result.get("original_width"), result.get("original_height"))
        labels, shapes = regions.setdefault(result.get("id", place), ([], []))
        labels += [label for label in result["value"].get(kind, ()) if kind.endswith("labels")]
        shapes += [result] if kind != "labels" else []
    marks = [mark for id_, (labels, shapes) in regions.items() for mark in _region(id_, labels, shapes, size)]
    check_tags(marks, tags)
    return marks


def _region(id_: object, labels: list[str], shapes: list[dict], size: tuple[int, int]) -> Iterator[Mark]:
    try:
        if not labels or not shapes:
            raise ValueError("has no label" if shapes else "is a label without a shape")
        for shape in shapes:
            mark = _mark(shape, size)
            yield from (dataclasses.replace(mark, label=str(label)) for label in labels)
    except MALFORMED as error:
        raise ValueError(f"result {id_}: {said(error)}") from error


def _mark(result: dict, size: tuple[int, int]) -> Mark:
    """The shape of one result: numbers are per cent of the image's sides."""
    kind, value = result["type"].lower().removesuffix("labels"), result["value"]
    if number(result.get("image_rotation") or 0) % 360:
        raise ValueError(f"the image was turned by {result['image_rotation']} degrees; turn it back, or turn the file")
    if kind not in SHAPES:
        raise ValueError(f"the type '{result['type']}' marks no area; draw a polygon, rectangle, ellipse or brush")
    if kind == "brush":
        if value.get("format", "rle") != "rle" or "rle" not in value:
            raise ValueError("its brush has no RLE (rle); export as JSON, not with separate masks")
        return Mark("", rle=placed_rle(decode_brush(value["rle"], size), 0, 0, size))
    across, down = (side / 100 for side in size)
    if kind == "polygon":
        points = [numbers(point, 2) for point in value["points"]]
        return Mark("", polygon([(x * across, y * down) for x, y in points], size))
    x, y, turn = number(value["x"]) * across, number(value["y"]) * down, number(value.get("rotation") or 0)
    if kind == "ellipse":
        return Mark("", ellipse(x, y, number(value["radiusX"]) * across, number(value["radiusY"]) * down, size, turn))
    width, height = number(value["width"]) * across, number(value["height"]) * down
    return Mark("", turned_box(x, y, width, height, turn, size, centre=(x, y)))  # the editor turns about this corner
