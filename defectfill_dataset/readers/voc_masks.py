"""SegmentationClass of Pascal VOC: masks whose colours or palette values are defect types."""

import collections
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from PIL import ImageOps

from ..errors import InputError
from ..images import UNREADABLE, open_image
from ..mask_values import IGNORE, MaskClasses, Value, values_of
from ..masks import MaskFiles
from ..text import read_text, unreadable
from .files import all_files, spelt
from .labelme import nearest
from .lookup import note
from .rows import GOOD, Reading, Row, label_key, relative


BORDER = (224, 224, 192)  # the colour of value 255 in VOC's palette: around objects, of no type
NO_TYPES = {"background": IGNORE, "ignore": IGNORE, "ignored": IGNORE, "void": IGNORE}  # in labelmap.txt
LINE = re.compile(r"(.+):\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*:[^:]*:[^:]*")


def in_folder(file: Path, root: Path, *names: str) -> bool:
    """Whether the file is in or below a folder of one of these (small) names."""
    return any(parent.name.casefold() in names for parent in file.relative_to(root).parents)


def add_masks(
    reading: Reading, root: Path, masks: Collection[Path], by_stem: Mapping[str, list[Path]],
    labels: Mapping[Path, set[str]], splits: Mapping[Path, str | None],
) -> set[Path]:  # fmt: skip
    """Adds a row for each type in each mask of SegmentationClass; an all-black mask means good.

    Args:
        by_stem: the images.
        labels: what the XML files name, of the images that have one; none of it may be missing in the mask.

    Returns:
        the images with a mask.
    """
    pairs: dict[Path, Path] = {}
    for mask in masks:
        found = nearest(by_stem.get(spelt(mask.stem).casefold(), []), mask)
        if not found:
            reading.missing(
                relative(mask, root), "a mask without an image", f"remove it or add '{mask.stem}'", "DF143"
            )
        for image in found:
            if len(found) > 1 or image in pairs:
                where = ", ".join(relative(f, root) for f in [*found, mask])
                reading.blame("DF144", image, root, "more than one image or mask of a name", "keep one of each", where)
            pairs.setdefault(image, mask)
    blamed = {problem.image for problem in reading.problems}
    usable = {image: mask for image, mask in pairs.items() if relative(image, root) not in blamed}
    if not usable:
        return set(pairs)
    try:
        classes = _label_map(root) or _by_xml(root, usable, labels)
    except InputError as error:
        reading.problems += error.problems
        return set(pairs)
    for image, mask in usable.items():
        _add(reading, root, image, mask, classes, labels.get(image, set()), splits[image])
    boxes = [image for image, found in labels.items() if found and image not in pairs]
    if boxes:
        what = f"pixels of {len(boxes)} images, '{relative(boxes[0], root)}' the first: no mask in SegmentationClass"
        note(reading, root, what, "the boxes of their XML files are the masks; remove the images if that is too rough")
    return set(pairs)


def _add(
    reading: Reading, root: Path, image: Path, mask: Path, classes: MaskClasses, labels: set[str], split: str | None
) -> None:
    place = relative(mask, root)
    try:
        found = classes.areas(open_image(mask), "labelmap.txt")
        marked = any(_present(mask))
    except UNREADABLE as error:
        reading.blame("DF103", image, root, f"its mask cannot be read: {error}", where=place)
        return
    keys = {label_key(name) for name in found}
    lost = sorted(label for label in labels if label_key(label) not in keys)
    if lost:
        what = f"does not mark '{lost[0]}', which its XML file names"
        reading.blame("DF167", image, root, what, "draw it, or remove it there", place)
    elif found:
        reading.rows += [
            Row(image, MaskFiles((mask,), classes=classes, defect=name), name, split) for name in sorted(found)
        ]
    elif marked:
        reading.blame("DF167", image, root, "marks nothing but what is to be ignored", "draw the defect", place)
    else:
        reading.rows.append(Row(image, None, GOOD, GOOD))


def _present(mask: Path) -> set[Value]:
    """The values of a mask file, but for 0: of its palette, grey ones, or colours."""
    picture = open_image(mask)
    pixels = np.asarray(ImageOps.exif_transpose(picture)) if picture.mode == "P" else values_of(picture)
    if pixels.ndim == 2:
        return {int(value) for value in np.unique(pixels) if value}
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    return {(int(red), int(green), int(blue)) for red, green, blue in colours if red or green or blue}


def _label_map(root: Path) -> MaskClasses | None:
    """The types of labelmap.txt, as CVAT and Datumaro write it: name:r,g,b:parts:actions; None without such a file.

    Raises:
        InputError: a line of another form, one colour for two names, or files that differ (DF166).
    """
    files = [file for file in all_files(root, ".txt") if file.name.casefold() == "labelmap.txt"]
    if not files:
        return None
    file, *others = files
    for other in others:
        if read_text(other) != read_text(file):
            raise unreadable(other, f"names other colours than {file}", "keep one of them")
    values: dict[Value, str] = {BORDER: IGNORE}
    seen: dict[Value, str] = {}
    for place, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = LINE.fullmatch(line.strip())
        if parts is None:
            raise unreadable(file, f"line {place} is '{line.strip()}'", "write name:red,green,blue::")
        name, colour = parts[1].strip(), (int(parts[2]), int(parts[3]), int(parts[4]))
        if colour in seen:
            raise unreadable(file, f"line {place}: '{name}' has the colour of '{seen[colour]}'", "give it another")
        seen[colour] = name
        values[colour] = NO_TYPES.get(name.casefold(), name)
    if values.get((0, 0, 0)) == IGNORE:
        del values[0, 0, 0]  # the ground as it is everywhere
    return MaskClasses(tuple(values.items()))


def _by_xml(root: Path, masks: Mapping[Path, Path], labels: Mapping[Path, set[str]]) -> MaskClasses:
    """The types of values, where the names in the XML files leave one for each.

    Raises:
        InputError: they do not (DF166), with the values found.
    """
    possible: dict[Value, set[str]] = {}
    counts: collections.Counter[Value] = collections.Counter()
    ignored: set[Value] = {BORDER}
    everything = {label for found in labels.values() for label in found}
    for image, mask in masks.items():
        try:
            values = _present(mask)
            if open_image(mask).mode == "P":
                ignored.add(255)
        except UNREADABLE:
            continue  # reported with the image
        for value in values - ignored:
            counts[value] += 1
            possible[value] = possible.get(value, everything) & labels.get(image, everything)
    names = {value: next(iter(found)) for value, found in possible.items() if len(found) == 1}
    if len(set(names.values())) < len(possible):
        listed = ", ".join(f"{value} (in {number} masks)" for value, number in counts.most_common(8))
        raise unreadable(
            root, f"SegmentationClass has no labelmap.txt, and XML files do not tell what its values mean: {listed}",
            "add labelmap.txt, with a line name:red,green,blue:: for each type",
        )  # fmt: skip
    return MaskClasses((*((value, IGNORE) for value in ignored), *names.items()))
