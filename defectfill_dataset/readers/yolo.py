"""YOLO: a text file for each image, with a line for each box or polygon, from 0 to 1. Without a line it is good.

Source: docs.ultralytics.com/datasets/segment; github.com/HumanSignal/labelImg; Darknet's obj.names.
"""

import collections
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError, Problem
from ..images import upright_size
from ..text import read_text, read_yaml, unreadable
from .files import PEEKED, Place, all_files, all_images, child, entries, spelt
from .labelme import GOOD_FOLDERS
from .marks import ANNOTATION_ERRORS, Mark, add_marks, blame_annotation, box, number, polygon
from .rows import Reading, relative, split_of


CLASS_FILES = ("classes.txt", "obj.names", "predefined_classes.txt")
NO_LABELS = {*CLASS_FILES, "train.txt", "val.txt", "valid.txt", "test.txt", "labels.txt"}  # the latter list images
LABEL_LINE = re.compile(r"\s*\d+(\.0*)?[\s,]+[-+\d.]")
TOLERANCE = 0.005  # of the side: how far rounding may leave a number outside [0, 1]


def is_yolo(place: Place) -> bool:
    texts = [file for file in place.of_kind(".txt") if may_be_labels(file)]
    return any(in_labels(file) or looks_like_labels(file) for file in texts[:PEEKED])


def may_be_labels(file: Path) -> bool:
    return file.name.casefold() not in NO_LABELS and "ImageSets" not in file.parts  # VOC's: lists with "0 1" too


def in_labels(file: Path) -> bool:
    return any(parent.name.casefold() == "labels" for parent in file.parents)


def looks_like_labels(file: Path) -> bool:
    """Whether the first line that is not empty begins as a label does."""
    if not file.is_file():  # a pipe would be waited for
        return False
    with file.open("rb") as stream:
        start = stream.read(4096).decode("latin-1").replace("\0", "")
    return any(LABEL_LINE.match(line) for line in start.splitlines() if line.strip())


def read_yolo(root: Path) -> Reading:
    """Label files in labels/ beside images/, in any folder of them, or beside the images themselves."""
    reading = Reading()
    everything = all_images(root)
    images: dict[Path, list[Path]] = collections.defaultdict(list)  # by the path without its suffix
    by_stem: dict[str, list[Path]] = collections.defaultdict(list)
    for image in everything:
        images[_key(image)].append(image)
        by_stem[spelt(image.stem).casefold()].append(image)
    labels: dict[Path, list[Path]] = collections.defaultdict(list)
    for file in filter(may_be_labels, all_files(root, ".txt")):
        if not (in_labels(file) or looks_like_labels(file) or images.get(_key(file))):
            continue
        mirrored = _mirrored(file)
        found = images.get(_key(mirrored)) if mirrored else None
        found = found or images.get(_key(file)) or by_stem.get(spelt(file.stem).casefold(), [])
        for image in found:
            labels[image].append(file)
        if not found:
            reading.missing(
                relative(file, root), "labels without an image", f"remove it or add an image '{file.stem}'", "DF143"
            )
        elif len(found) > 1:
            _twice(reading, root, found, f"more than one image named '{file.stem}'")
    places = {image.parent for image in labels} | {p for i in everything for p in i.parents if p.name == "images"}
    classes = read_classes(root, {file.parent for files in labels.values() for file in files})
    blamed = {problem.image for problem in reading.problems}
    for image in everything:
        files = labels.get(image, [])
        if relative(image, root) in blamed:
            continue
        if len({file.read_bytes() for file in files}) > 1:
            _twice(reading, root, [image], "has several label files", files)
        elif files or places & {*image.parents} or image.parent.name.casefold() in GOOD_FOLDERS:
            _add(reading, root, image, files[0] if files else None, classes)
    return reading


def _key(file: Path) -> Path:
    return Path(spelt(str(file.with_suffix("")))) if file.suffix else file


def _mirrored(file: Path) -> Path | None:
    """The label file's place among images: the last folder called labels is images there."""
    parts = list(file.parts)
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i].casefold() == "labels"), None)
    if at is None:
        return None
    folder = child(Path(*parts[:at]), "images")
    for part in parts[at + 1 : -1]:
        folder = child(folder, part)
    return folder / parts[-1]


def _twice(reading: Reading, root: Path, images: list[Path], what: str, files: Iterable[Path] = ()) -> None:
    listed = ", ".join(relative(f, root) for f in [*images, *files])
    for image in images:
        reading.blame("DF144", image, root, what, "keep one", listed)


def read_classes(root: Path, folders: Iterable[Path]) -> dict[int, str]:
    """The class names by number, of a YAML file, obj.names or classes.txt; raises InputError (DF166) without one."""
    for file in entries(root):
        if file.suffix.lower() in (".yaml", ".yml"):
            content = read_yaml(file)
            if isinstance(content, dict) and "names" in content:
                if "kpt_shape" in content:
                    raise unreadable(
                        file, "is of poses (kpt_shape), whose lines mark no area", "give boxes or polygons"
                    )
                return yaml_names(file, content["names"], content.get("nc"))
    found: dict[Path, list[str]] = {}
    for folder in dict.fromkeys([root, child(root, "labels"), *sorted(folders)]):
        files = (child(folder, name) for name in CLASS_FILES)
        found |= {file: read_text(file).rstrip().splitlines() for file in files if file.is_file()}
    if not found:
        raise InputError(
            Problem("DF166", root, "no class names", "add data.yaml with 'names', or classes.txt, a name a line")
        )
    (first, names), *others = found.items()
    for other, more in others:
        if [n.strip() for n in more] != [n.strip() for n in names]:
            raise unreadable(other, f"names other classes than {first}", "keep one of them")
    return dict(enumerate(name.strip() for name in names))


def yaml_names(file: Path, names: object, count: object = None) -> dict[int, str]:
    """`names` of a YAML file: a list, numbers to names, names to numbers, or the one name.

    Raises:
        InputError: anything else (DF166), with what is there.
    """
    if isinstance(names, str) and names and count in (None, "1"):
        return {0: names}
    if isinstance(names, list):
        names = {str(place): name for place, name in enumerate(names)}
    if isinstance(names, dict) and all(isinstance(x, str) for pair in names.items() for x in pair):
        if all(key.isdecimal() for key in names):
            return {int(key): name.strip() for key, name in names.items()}
        if all(value.isdecimal() for value in names.values()) and len(set(names.values())) == len(names):
            return {int(value): name.strip() for name, value in names.items()}
    raise unreadable(file, f"its 'names' are {names!r:.80}", "write names: [first, second] or 0: first")


def _add(reading: Reading, root: Path, image: Path, file: Path | None, classes: dict[int, str]) -> None:
    try:
        size = upright_size(image)
        marks = []
        for place, line in enumerate(read_text(file).splitlines() if file else [], 1):
            if line.strip():
                marks.append(mark_of(line, place, classes, size))
        add_marks(reading, image, size, marks, split_of(relative(image.parent, root)))
    except ANNOTATION_ERRORS as error:
        blame_annotation(reading, image, root, error, relative(file or image, root))


def mark_of(line: str, place: int, classes: dict[int, str], size: tuple[int, int]) -> Mark:
    """One line's shape, in an image of this (W, H); raises ValueError that says the line."""
    try:
        index, *values = (number(word) for word in words_of(line))
        if index not in classes:
            known = ", ".join(f"{k} {name}" for k, name in sorted(classes.items()))
            raise ValueError(f"there is no class {index:g}; there are {known}")
        if not classes[int(index)]:
            raise ValueError(f"class {index:g} has no name")
        if len(values) < 4 or len(values) % 2:
            raise ValueError(f"has {len(values)} numbers after the class; a box has 4, a polygon 6, 8, 10 ...")
        for value in values:
            if not -TOLERANCE <= value <= 1 + TOLERANCE:
                raise ValueError(f"{value:g} is not between 0 and 1; coordinates are fractions of the image's sides")
        width, height = size
        points = list(zip(values[::2], values[1::2]))
        if len(points) == 2:
            (x, y), (w, h) = points
            points = [(min(max(x, 0), 1), min(max(y, 0), 1)) for x, y in box(x - w / 2, y - h / 2, w, h)]
        return Mark(classes[int(index)], polygon([(x * width, y * height) for x, y in points], size))
    except ValueError as error:
        raise ValueError(f"line {place}: {error}") from error


def words_of(line: str) -> list[str]:
    """The numbers of a line: apart by spaces, by commas or semicolons, or with decimal commas."""
    words = line.split()
    if len(words) > 1 and all(re.fullmatch(r"[-+]?\d+(,\d+)?", word) for word in words):
        return [word.replace(",", ".") for word in words]
    return [word for word in re.split(r"[\s,;]+", line.strip()) if word]
