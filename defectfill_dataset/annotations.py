"""Annotation files: each reader is one function from an object's folder to the same table of `Row`s.

An image without annotation is good; one with several classes is of the type "combined". A box marks its whole area.
"""

import collections
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from pycocotools import mask as coco_mask

from .errors import InputError
from .images import UNREADABLE, upright_size
from .layouts import ONE_TYPE, Row, file_inside, folders_in, image_files, read_csv, rows_or_problems
from .masks import MaskFiles, MaskShapes


SPLITS = {"train": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])", re.IGNORECASE)
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # of content that is not of its format

Point = tuple[float, float]


def _split_of(*names: str) -> str | None:
    """The split that a folder or file name speaks of, the first that does."""
    found = next((match for name in names if (match := SPLIT_WORD.search(name))), None)
    return SPLITS[found[1].lower()] if found else None


def _defect_of(labels: Iterable[str]) -> str:
    """The defect type of an image with these labels."""
    names = set(labels)
    if "good" in names or "" in names:
        raise ValueError("a defect cannot be called 'good' or nothing; name it, or remove the shape")
    return names.pop() if len(names) == 1 else "combined"


def _polygon(points: Iterable[Iterable[float]], size: tuple[int, int]) -> tuple[Point, ...]:
    """Three corners or more, (x, y) in pixels.

    Raises:
        ValueError: fewer, or one that is not in the image of this (W, H).
    """
    corners = tuple((float(x), float(y)) for x, y in points)
    if len(corners) < 3:
        raise ValueError(f"a polygon has {len(corners)} corners; it needs three")
    for x, y in corners:
        if not (-1 <= x <= size[0] + 1 and -1 <= y <= size[1] + 1):
            raise ValueError(f"the point ({x:g}, {y:g}) is not in the image of {size[0]}x{size[1]}")
    return corners


def _box(x: float, y: float, width: float, height: float) -> list[Point]:
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def _twice(rows: list[Row], root: Path) -> list[str]:
    """A problem (DF144) for each image with more than one row."""
    counts = collections.Counter(row.image for row in rows)
    return [f"DF144 {f.relative_to(root)}: is listed more than once; keep one" for f, n in counts.items() if n > 1]


# Tables: metadata.csv and metadata.jsonl


def metadata_files(root: Path) -> list[Path]:
    """The tables of image and mask names, in the folder or in its splits' folders."""
    places = [root, *(root / split for split in (*SPLITS, "good"))]
    files = [place / name for place in places for name in ("metadata.csv", "metadata.jsonl")]
    return [f for f in files if f.is_file() and b"mask_file_name" in f.read_bytes()]


def _read_jsonl(file: Path) -> list[dict[str, str]]:
    lines = []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        try:
            if text.strip():
                lines.append({key: "" if value is None else str(value) for key, value in json.loads(text).items()})
        except MALFORMED as error:
            raise InputError(f"DF166 {file}, line {number}: is not a JSON object: {error}") from error
    return lines


def read_metadata(root: Path) -> list[Row]:
    """A table with file_name and mask_file_name, relative to itself; defect and object may be there.

    Source: the `imagefolder` of Hugging Face datasets.
    """
    rows, problems = [], []
    for file in metadata_files(root):
        lines = read_csv(file) if file.suffix == ".csv" else _read_jsonl(file)
        columns = dict.fromkeys(column for line in lines for column in line)
        if "file_name" not in columns:
            problems.append(
                f"DF166 {file.relative_to(root)}: has no column file_name; its columns are {', '.join(columns)}"
            )
            continue
        for number, line in enumerate(lines, 1):
            place = f"{file.relative_to(root)}, row {number}"
            image, mask = (file_inside(root, file.parent, line.get(k)) for k in ("file_name", "mask_file_name"))
            defect, kind = line.get("defect", ""), line.get("object") or None
            if image is None:
                problems.append(f"DF166 {place}: names the image '{line.get('file_name')}', which is not in {root}")
            elif mask is None and (line.get("mask_file_name") or defect not in ("", "good")):
                wanted = line.get("mask_file_name")
                problems.append(f"DF142 {place}: the mask of {line['file_name']} is missing; expected '{wanted}'")
            elif mask is None:
                rows.append(Row(image, None, "good", "good", kind))
            elif defect == "good":
                problems.append(f"DF167 {place}: a good image with a mask; name the defect, or remove the mask")
            else:
                split = _split_of(file.parent.name) if file.parent != root else None
                rows.append(Row(image, MaskFiles((mask,)), defect or ONE_TYPE, split, kind))
    if None in (objects := {row.object for row in rows}) and len(objects) > 1:
        problems.append(f"DF166 {root}: its table names the object of some images only; name it for all or none")
    return rows_or_problems(rows, problems + _twice(rows, root))


# JSON: COCO and LabelMe


COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')
LABELME_KEYS = (b'"shapes"', b'"imagePath"')


def _load(file: Path) -> dict | None:
    """The file's JSON object, {} for other JSON, None for what is not JSON."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else {}


def _places(root: Path) -> list[Path]:
    splits = [folder / split for folder in (root, root / "images") for split in SPLITS]
    return [root, root / "annotations", root / "images", *splits]


def _json_files(root: Path) -> list[Path]:
    return [f for place in _places(root) for f in sorted(place.glob("*.json")) if not f.name.startswith(".")]


def has_json(root: Path, keys: Sequence[bytes]) -> bool:
    """Whether a JSON file speaks of all these keys; it is not parsed, images may be embedded in it."""
    contents = (file.read_bytes() for file in _json_files(root))
    return any(all(key in content for key in keys) for content in contents)


def read_coco(root: Path) -> list[Row]:
    """COCO: JSON files of images, annotations and categories; polygons, run lengths, or boxes where there is neither.

    Source: Lin et al., ECCV 2014; cocodataset.org/#format-data.
    """
    rows, problems = [], []
    for file in _json_files(root):
        content = _load(file)
        if content is None:
            problems.append(f"DF166 {file.relative_to(root)}: cannot be read as JSON; mend or remove it")
        elif {"images", "annotations"} <= content.keys():
            try:
                more, wrong = _coco_rows(root, file, content)
            except MALFORMED as error:
                more, wrong = [], [f"DF166 {file.relative_to(root)}: is not of COCO's form: {error!r}"]
            rows += more
            problems += wrong
    return rows_or_problems(rows, problems + _twice(rows, root))


def _coco_rows(root: Path, file: Path, content: dict) -> tuple[list[Row], list[str]]:
    names = {category["id"]: str(category["name"]) for category in content.get("categories", [])}
    annotations: dict[int, list[dict]] = {entry["id"]: [] for entry in content["images"]}
    if len(annotations) < len(content["images"]):
        raise ValueError("two images have the same id")
    rows, problems = [], []
    for annotation in content["annotations"]:
        if annotation["image_id"] in annotations:
            annotations[annotation["image_id"]].append(annotation)
        else:
            problems.append(
                f"DF143 {file.relative_to(root)}: annotation {annotation.get('id')} is of no image; remove it"
            )
    for entry in content["images"]:
        name = entry["file_name"]
        found = _coco_images(root, file, name)
        if len(found) != 1:
            code, what = ("DF144", "several files") if found else ("DF166", "no file")
            problems.append(f"{code} {file.relative_to(root)}: '{name}' is {what} in {root}; there must be one")
            continue
        image, marks = found[0], annotations[entry["id"]]
        if not marks:
            rows.append(Row(image, None, "good", "good"))
            continue
        try:
            size = _annotated_size(image, root, entry.get("width"), entry.get("height"))
            unknown = {mark["category_id"] for mark in marks} - names.keys()
            if unknown:
                raise ValueError(f"no category has the id {unknown.pop()}")
            defect = _defect_of(names[mark["category_id"]] for mark in marks)
            split = _split_of(image.parent.relative_to(root).as_posix(), file.stem)
            rows.append(Row(image, _coco_mask(marks, size), defect, split))
        except (InputError, *MALFORMED, *UNREADABLE) as error:
            problems += _told(image, root, error)
    return rows, problems


def _coco_images(root: Path, file: Path, name: str) -> list[Path]:
    """Where the image may be: beside the JSON file, else in `root`, images/ or a folder in one of them."""
    beside = file_inside(root, file.parent, name)
    if beside:
        return [beside]
    folders = [root, root / "images", *folders_in(root), *folders_in(root / "images")]
    found = sorted({f for folder in folders if (f := file_inside(root, folder, name))})
    words = re.split(r"[_\-.]", file.stem)
    return [f for f in found if f.parent.name in words] or found  # instances_train2017.json means train2017/


def _coco_mask(annotations: list[dict], size: tuple[int, int]) -> MaskShapes:
    polygons, rles = [], []
    for annotation in annotations:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict):
            rles.append(_rle(segmentation, size))
        elif segmentation:
            polygons += [_polygon(zip(flat[::2], flat[1::2], strict=True), size) for flat in segmentation]
        elif annotation.get("bbox"):
            polygons.append(_polygon(_box(*map(float, annotation["bbox"])), size))
        else:
            raise ValueError(f"annotation {annotation.get('id')} has neither a segmentation nor a box")
    return MaskShapes(size, tuple(polygons), tuple(rles))


def _rle(segmentation: dict, size: tuple[int, int]) -> str:
    """Run lengths in COCO's compressed form, proved to be of this (W, H) and safe to decode."""
    height, width = segmentation["size"]
    if (width, height) != size:
        raise ValueError(f"its run lengths are of {width}x{height}, the image is {size[0]}x{size[1]}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        if not re.fullmatch(r"[0-o]*[0-O]", counts):  # pycocotools reads on past the end of any other
            raise ValueError("its run lengths are damaged")
        return counts
    if min(counts, default=0) < 0 or sum(counts) != width * height:
        raise ValueError(f"its run lengths do not fill {width}x{height} pixels")
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return coco_mask.encode(coco_mask.decode(rle))["counts"].decode()


def _annotated_size(image: Path, root: Path, width: int | None, height: int | None) -> tuple[int, int]:
    """(W, H) of the image; raises InputError (DF140) if it was annotated at another."""
    size = upright_size(image)
    if width and height and (width, height) != size:
        turned = " (an EXIF tag turns it)" if (height, width) == size else ""
        raise InputError(
            f"DF140 {image.relative_to(root)}: the image is {size[0]}x{size[1]}{turned}, its annotation "
            f"{width}x{height}; they must match"
        )
    return size


def _told(image: Path, root: Path, error: Exception) -> list[str]:
    """The problem lines of what went wrong with the annotation of one image."""
    if isinstance(error, InputError):
        return list(error.problems)
    name = image.relative_to(root)
    if isinstance(error, MALFORMED):
        return [f"DF167 {name}: its annotation cannot be used: {error}"]
    return [f"DF103 {name}: the image cannot be read: {error}"]


def read_labelme(root: Path) -> list[Row]:
    """LabelMe: a JSON file beside each image, with polygons, rectangles and circles.

    Source: github.com/wkentaro/labelme.
    """
    rows, problems = [], []
    images = {f: None for place in [*_places(root), root / "good"] for f in image_files(place)}
    by_stem: dict[Path, list[Path]] = {}
    for image in images:
        by_stem.setdefault(image.with_suffix(""), []).append(image)
    for file in _json_files(root):
        content = _load(file)
        same = by_stem.get(file.with_suffix(""), [])
        if content is None or "shapes" not in content:
            if same or content is None:
                problems.append(f"DF166 {file.relative_to(root)}: cannot be read as LabelMe's; mend or remove it")
            continue
        named = file_inside(root, file.parent, str(content.get("imagePath") or ""))
        if named is None and len(same) != 1:
            code, what = ("DF144", "several images") if same else ("DF143", "no image")
            problems.append(f"{code} {file.relative_to(root)}: has {what}; there must be one of its name")
            continue
        image = named or same[0]
        images.setdefault(image)
        try:
            size = _annotated_size(image, root, content.get("imageWidth"), content.get("imageHeight"))
            shapes = content["shapes"]
            polygons = tuple(_labelme_polygon(shape, size) for shape in shapes)
            defect = _defect_of(str(shape["label"]) for shape in shapes) if shapes else "good"
            split = _split_of(image.parent.relative_to(root).as_posix()) if shapes else "good"
            rows.append(Row(image, MaskShapes(size, polygons) if shapes else None, defect, split))
        except (InputError, *MALFORMED, *UNREADABLE) as error:
            problems += _told(image, root, error)
    annotated = {row.image for row in rows}
    problems += _twice(rows, root)
    return rows_or_problems(rows + [Row(f, None, "good", "good") for f in images if f not in annotated], problems)


def _labelme_polygon(shape: dict, size: tuple[int, int]) -> tuple[Point, ...]:
    points, kind = shape["points"], shape.get("shape_type") or "polygon"
    if kind == "rectangle" and len(points) == 2:
        (x, y), (right, bottom) = points
        return _polygon(_box(x, y, right - x, bottom - y), size)
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        if not 0 < radius < math.inf:
            raise ValueError(f"a circle has the radius {radius}")
        turns = (2 * math.pi * i / 64 for i in range(64))
        _polygon([(x, y)] * 3, size)  # the centre must be in the image; what is outside is cut off
        return tuple((x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns)
    if kind not in ("polygon", "rectangle"):
        raise ValueError(f"a shape of the type '{kind}' marks no area; draw a polygon, a rectangle or a circle")
    return _polygon(points, size)


# YOLO


def label_folders(root: Path) -> list[Path]:
    """The folders of label files: labels/, or train/labels/ and so on."""
    folders = [root / "labels", *(root / split / "labels" for split in SPLITS)]
    return [folder for folder in folders if any(f.name != "classes.txt" for f in folder.rglob("*.txt"))]


def read_yolo(root: Path) -> list[Row]:
    """YOLO: labels/x.txt of images/x.png, boxes and polygons, the same in train/ and so on or in sub-folders.

    Source: docs.ultralytics.com/datasets/segment.
    """
    classes = _yolo_classes(root)
    rows, problems = [], []
    for labels in label_folders(root):
        folder = labels.parent / "images"
        images: dict[Path, list[Path]] = {}
        for place in [folder, *(f for f in sorted(folder.rglob("*")) if f.is_dir())]:
            for image in image_files(place):
                images.setdefault(image.relative_to(folder).with_suffix(""), []).append(image)
        texts = {f.relative_to(labels).with_suffix(""): f for f in labels.rglob("*.txt") if f.name != "classes.txt"}
        problems += [
            f"DF143 {texts[name].relative_to(root)}: labels without an image; remove it or add '{name}' to images"
            for name in sorted(texts.keys() - images.keys())
        ]
        for name, files in images.items():
            if len(files) > 1:
                names = ", ".join(str(f.relative_to(root)) for f in files)
                problems.append(f"DF144 {names}: more than one image named '{name}'; keep one")
                continue
            try:
                rows.append(_yolo_row(root, files[0], texts.get(name), classes))
            except (*MALFORMED, *UNREADABLE) as error:
                problems += _told(files[0], root, error)
    return rows_or_problems(rows, problems)


def _yolo_classes(root: Path) -> dict[int, str]:
    """The class names by number; raises InputError (DF166) where no file says them."""
    for file in sorted(root.glob("*.y*ml")):
        try:
            content = yaml.safe_load(file.read_bytes())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"DF166 {file}: cannot be read as YAML: {error}") from error
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, list):
            names = dict(enumerate(names))
        if isinstance(names, dict):
            return {int(number): str(name) for number, name in names.items()}
    for file in (root / "classes.txt", root / "labels/classes.txt"):
        if file.is_file():
            return dict(enumerate(file.read_text(encoding="utf-8", errors="replace").split("\n")))
    raise InputError(f"DF166 {root}: no class names; add data.yaml with 'names', or classes.txt")


def _yolo_row(root: Path, image: Path, text: Path | None, classes: dict[int, str]) -> Row:
    lines = text.read_text().splitlines() if text else []
    marks = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    if not marks:
        return Row(image, None, "good", "good")
    width, height = size = upright_size(image)
    labels, polygons = [], []
    for number, (index, *values) in marks:
        numbers = [float(value) for value in values]
        if int(index) not in classes:
            raise ValueError(f"line {number}: there is no class {index}; there are {', '.join(classes.values())}")
        if not all(0 <= v <= 1 for v in numbers) or len(numbers) % 2 or len(numbers) < 4:
            raise ValueError(f"line {number}: must be a class and a box or a polygon, from 0 to 1")
        labels.append(classes[int(index)].strip())
        points = list(zip(numbers[::2], numbers[1::2]))
        if len(points) == 2:
            (x, y), (w, h) = points
            points = _box(x - w / 2, y - h / 2, w, h)
        polygons.append(_polygon([(x * width, y * height) for x, y in points], size))
    split = _split_of(image.parent.relative_to(root).as_posix())
    return Row(image, MaskShapes(size, tuple(polygons)), _defect_of(labels), split)
