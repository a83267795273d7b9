"""VisA's defect types: `image_anno.csv` names them, and the values of the masks tell several in one image apart."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
from PIL import ImageOps

from ..errors import Problem
from ..images import UNREADABLE, open_image
from ..mask_values import MaskClasses, is_lossy, values_of
from ..masks import MaskFiles
from ..text import read_csv
from . import folders
from .files import child, spelt
from .rows import GOOD, Reading, Row, label_key, relative


COMBINED = "combined"
NORMAL = {"normal", GOOD}


def read_visa(root: Path) -> Reading:
    """VisA as `folders.read_visa` has it, with the defect types that the object's image_anno.csv names.

    An image with several types has a row for each, where the images with one type show which value of a mask means
    it; else its type is `combined`.

    Source: Zou et al., ECCV 2022, github.com/amazon-science/spot-diff.
    """
    reading = folders.read_visa(root)
    table = child(root, "image_anno.csv")
    lines = read_csv(table) if table.is_file() else []
    if not lines:
        return reading
    if not {"image", "label"} <= lines[0].keys():
        reading.missing(table, f"has no columns image and label; its columns are {', '.join(lines[0])}", "mend it")
        return reading
    labels = _labels(reading, root, table, lines)
    rows = [row for row in reading.rows if not _contradicts(reading, root, row, labels.get(row.image))]
    one = [row for row in rows if row.mask and len(labels.get(row.image, ())) == 1]
    several = [row for row in rows if row.mask and len(labels.get(row.image, ())) > 1]
    meaning = _meaning(one, labels) if several else {}
    apart = {row.image: _split(row, labels[row.image], meaning) for row in several}
    named = {row.image: [dataclasses.replace(row, defect=labels[row.image][0])] for row in one}
    reading.rows = [new for row in rows for new in (named | apart).get(row.image, [row])]
    combined = [image for image, found in apart.items() if found[0].defect == COMBINED]
    if combined:
        what = f"images of several types that the values of their masks do not tell apart: {len(combined)}, such as "
        fix = f"they are read as '{COMBINED}'"
        reading.notes.append(Problem("DF156", table, what + relative(combined[0], root), fix))
    unnamed = [row.image for row in rows if row.mask and row.image not in labels]
    if unnamed:
        what = f"defect images whose type it does not name: {len(unnamed)}, such as {relative(unnamed[0], root)}"
        reading.notes.append(Problem("DF166", table, what, "their type is read as 'anomaly'"))
    return reading


def _labels(reading: Reading, root: Path, table: Path, lines: list[dict[str, str]]) -> dict[Path, list[str]]:
    """Image -> its labels; the table names it from the folder above the object's, or from this."""
    images = {spelt(relative(row.image, root)).casefold(): row.image for row in reading.rows}
    told = {spelt(relative(root / p.image, root)).casefold() for p in reading.problems if p.image}
    labels: dict[Path, list[str]] = {}
    strange = []
    for line in lines:
        name = spelt(line["image"].replace("\\", "/")).casefold()
        key = next((k for k in (name.partition("/")[2], name) if k in images or k in told), None)
        found = {label_key(label): label.strip() for label in line["label"].split(",") if label.strip()}
        if key is None:
            strange.append(line["image"])
        elif key in images and found:
            if images[key] in labels and labels[images[key]] != list(found.values()):
                reading.blame("DF144", images[key], root, f"is named twice by {table.name}", "keep one line")
            labels[images[key]] = list(found.values())
    if strange:
        what = f"images that it names and that are not there: {len(strange)}, such as '{strange[0]}'"
        reading.notes.append(Problem("DF166", table, what, "their types are not used"))
    return labels


def _contradicts(reading: Reading, root: Path, row: Row, labels: list[str] | None) -> bool:
    """Whether the table calls a defect image good, or the other way round, which is a problem."""
    if labels is None or (row.mask is None) == bool(NORMAL & {label_key(label) for label in labels}):
        return False
    place = "a good image" if row.mask is None else "an image with a mask"
    what = f"{place}, which image_anno.csv calls '{', '.join(labels)}'"
    reading.blame("DF167", row.image, root, what, "mend one of them")
    return True


def _values(row: Row) -> frozenset[int]:
    """The values above 0 of an image's masks; none where these do not name types."""
    found: set[int] = set()
    for path in row.mask.paths if isinstance(row.mask, MaskFiles) else ():
        try:
            mask = open_image(path)
            pixels = np.asarray(ImageOps.exif_transpose(mask)) if mask.mode == "P" else values_of(mask)
        except UNREADABLE:  # reported when the mask is read
            return frozenset()
        if is_lossy(mask) or pixels.ndim == 3:
            return frozenset()
        found |= {int(value) for value in np.unique(pixels)}
    return frozenset(found - {0})


def _meaning(one: list[Row], labels: dict[Path, list[str]]) -> dict[int, str]:
    """Value -> the label that all images with one label and this value have."""
    told: dict[int, set[str]] = collections.defaultdict(set)
    for row in one:
        for value in _values(row):
            told[value].add(label_key(labels[row.image][0]))
    return {value: next(iter(found)) for value, found in told.items() if len(found) == 1}


def _split(row: Row, labels: list[str], meaning: dict[int, str]) -> list[Row]:
    """A row for each label, or the one row as `combined` where the values do not say which is where."""
    names, values = {label_key(label): label for label in labels}, _values(row)
    if not isinstance(row.mask, MaskFiles) or {meaning.get(value) for value in values} != names.keys():
        return [dataclasses.replace(row, defect=COMBINED)]
    classes = MaskClasses(tuple((value, names[meaning[value]]) for value in sorted(values)))
    masks = [dataclasses.replace(row.mask, nonzero=False, classes=classes, defect=label) for label in labels]
    return [dataclasses.replace(row, mask=mask, defect=mask.defect) for mask in masks]
