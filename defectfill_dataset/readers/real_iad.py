"""Real-IAD: by its JSON file where that is found, else by its folders."""

from pathlib import Path

from ..errors import Problem
from ..masks import MaskFiles
from ..text import read_json, unreadable
from .files import MASK_SUFFIX, Place, all_images, child, file_inside, folders_in, image_files, pair_masks, walk
from .rows import Reading, Row, relative


def is_real_iad(place: Place) -> bool:
    """Whether OK/ and NG/ are there, and NG/ holds folders alone."""
    inside = place.folders.get("ng")
    return "ok" in place.folders and inside is not None and bool(folders_in(inside)) and not image_files(inside)


def read_real_iad(root: Path) -> Reading:
    """Real-IAD: OK/S0001/*.jpg, and NG/<code>/S0001/*.jpg with the mask *.png of the same stem.

    <object>.json (in the folder, beside it, or in realiad_jsons/ beside or above) says which images are which, and
    which views of a defective part do not show the defect, so that they are good. Its split is for training on good
    images only; it is not taken.

    Source: Wang et al., CVPR 2024; datasets/explicit_dataset.py of github.com/Tencent/AnomalyDetection_Real-IAD.
    """
    table = _table_of(root)
    return _by_table(root, table) if table else _by_folders(root)


def _table_of(root: Path) -> Path | None:
    name = f"{root.name}.json"
    folders = [f"{above}realiad_jsons/{below}" for above in ("", "../") for below in ("", "realiad_jsons/")]
    places = [root / name, root.parent / name, *(root.parent / folder / name for folder in folders)]
    return next((place.resolve() for place in places if place.is_file()), None)


def _by_table(root: Path, table: Path) -> Reading:
    content = read_json(table)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("train", "test")):
        raise unreadable(table, "is not Real-IAD's: it has no lists 'train' and 'test'", "give that, or move it away")
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
    prefix, normal = str(meta.get("prefix") or ""), meta.get("normal_class", "OK")
    reading, named, unmarked = Reading(), set[Path](), list[Path]()
    for number, entry in enumerate([*content["train"], *content["test"]], 1):
        keys = ("image_path", "mask_path", "anomaly_class")
        names = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
        place = f"{table}, entry {number}"
        if not all(isinstance(name, str) for name in (names[0], names[1] or "", names[2])):
            reading.missing(place, f"has no image_path and anomaly_class: {str(entry)[:80]}", "mend it")
            continue
        image, mask = (
            file_inside(root, root, name) or file_inside(root, root.parent, f"{prefix}{name}") if name else None
            for name in names[:2]
        )
        named |= {file for file in (image, mask) if file}
        if image is None:
            reading.missing(place, f"names the image '{names[0]}', which is not in {root}")
        elif names[2] == normal and names[1]:
            reading.blame("DF167", image, root, "a good image with a mask", "name the defect, or remove it", place)
        elif names[2] == normal:
            reading.add_good([image])
        elif not names[1]:
            unmarked.append(image)
        elif mask is None:
            reading.blame("DF142", image, root, "its mask is missing", f"expected '{names[1]}'")
        else:
            reading.rows.append(Row(image, MaskFiles((mask,)), str(names[2]), None))
    _tell_unmarked(reading, root, unmarked, "they are left out, as the JSON names no masks of theirs")
    _tell_unnamed(reading, root, table, named)
    return reading


def _tell_unnamed(reading: Reading, root: Path, table: Path, named: set[Path]) -> None:
    """Adds masks that the JSON does not name to the problems, and images to the notes."""
    left = [file for file in all_images(root) if file not in named]
    for file in left:
        if file.suffix.lower() == ".png":
            what = f"a mask that {table.name} does not name"
            reading.problems.append(Problem("DF143", relative(file, root), what, "name or remove it"))
    images = [file for file in left if file.suffix.lower() != ".png"]
    if images:
        what = f"images that it does not name: {len(images)}, such as {relative(images[0], root)}"
        reading.notes.append(Problem("DF166", table, what, "they are left out"))


def _tell_unmarked(reading: Reading, root: Path, images: list[Path], fix: str) -> None:
    if images:
        what = f"images of defective parts without a mask: {len(images)}, such as {relative(images[0], root)}"
        reading.notes.append(Problem("DF142", root, what, fix))


def _by_folders(root: Path) -> Reading:
    reading, unmarked = Reading(), list[Path]()
    reading.add_good(all_images(child(root, "OK")))
    for code in folders_in(child(root, "NG")):
        rows, problems = list[Row](), list[Problem]()
        for folder in walk(code):
            files = image_files(folder)
            images = [f for f in files if f.suffix.lower() != ".png"]
            images = images or [f for f in files if not MASK_SUFFIX.search(f.stem)]
            pairs, wrong = pair_masks(images, [f for f in files if f not in set(images)], root)
            rows += [Row(image, MaskFiles(found), code.name, None) for image, found in pairs.items()]
            problems += wrong
        if rows:  # then it has masks, and the other views do not show the defect
            unmarked += [root / str(problem.image) for problem in problems if problem.code == "DF142"]
            problems = [problem for problem in problems if problem.code != "DF142"]
        reading += Reading(rows, problems)
    fix = f"they are left out; {root.name}.json in realiad_jsons/ beside the folder says which of them are good"
    _tell_unmarked(reading, root, unmarked, fix)
    return reading
