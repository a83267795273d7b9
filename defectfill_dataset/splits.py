"""Which defect images train and which are held out: decided by a rule or a file, and always written down."""

import math
from pathlib import Path

from datasets import Dataset, DatasetDict

from .errors import InputError, Problem
from .readers import Row, relative
from .text import Schema, read_json


SPLIT_RULES = ("auto", "first_third", "all")
MEASURED = 16  # held-out defects


class SplitFile(Schema):
    """The images of each part, by their names relative to the object's folder."""

    train: list[str]
    test: list[str]
    skipped: list[str] = []


def split_rows(rows: list[Row], root: str | Path, rule: str) -> dict[str, list[Row]]:
    """The rows of the splits train (reference defects), test (held-out defects) and good.

    Args:
        rows: all images of one object.
        root: the object's folder; a split file names images relative to it.
        rule: `auto` (the layout's own split, else `first_third`), `first_third` (of each defect type the first
            ceil(n/3) by name train, the paper's protocol), `all` (every defect trains), or the path of a split file,
            the JSON of `split_names`, whose `skipped` images are left out.
    """
    defects = [row for row in rows if row.defect != "good"]
    if rule not in SPLIT_RULES:
        train, test = _rows_of_file(defects, root, Path(rule))
        defects = [row for row in defects if row in train | test]
    elif rule == "all":
        train = set(defects)
    elif rule == "auto" and all(row.split for row in defects):
        train = {row for row in defects if row.split == "train"}
    else:
        images = _first_third(defects)
        train = {row for row in defects if row.image in images}
    return {
        "train": [row for row in defects if row in train],
        "test": [row for row in defects if row not in train],
        "good": [row for row in rows if row.defect == "good"],
    }


def _first_third(defects: list[Row]) -> set[Path]:
    """The images that train: of each type the first ceil(n/3) by name.

    An image with several types is on one side with all of them. The rarest types choose first; of the others, images
    that train already count.
    """
    by_type: dict[str, list[Path]] = {}
    for row in sorted(defects, key=lambda row: row.image.name):
        by_type.setdefault(row.defect, []).append(row.image)
    train, held_out = set[Path](), set[Path]()
    for _, images in sorted(by_type.items(), key=lambda item: (len(item[1]), item[0])):
        missing = math.ceil(len(images) / 3) - len(train.intersection(images))
        free = [image for image in images if image not in train | held_out]
        train.update(free[: max(missing, 0)])
        held_out.update(free[max(missing, 0) :])
    return train


def _rows_of_file(defects: list[Row], root: str | Path, file: Path) -> tuple[set[Row], set[Row]]:
    """The rows of train and of test."""
    try:
        split = read_json(file, SplitFile)
    except InputError as error:
        rules, (problem,) = ", ".join(SPLIT_RULES), error.problems
        what = f'neither a rule ({rules}) nor a split file {{"train": [...], "test": [...]}}: {problem.what}'
        raise InputError(Problem("DF165", f"--split {file}", what)) from error
    train, test, skipped = (set(split.get(part, ())) for part in ("train", "test", "skipped"))
    names = {relative(row.image, root) for row in defects}
    wrong = [f"names '{n}', which is not in {root}" for n in sorted((train | test) - names)]
    wrong += [f"'{n}' is in both train and test" for n in sorted(train & test)]
    wrong += [f"does not say where '{n}' belongs" for n in sorted(names - train - test - skipped)]
    if wrong:
        raise InputError(*(Problem("DF165", file, what) for what in wrong))
    train_rows, test_rows = ({row for row in defects if relative(row.image, root) in part} for part in (train, test))
    return train_rows, test_rows


def validation_split(data: DatasetDict, number: int) -> DatasetDict:
    """The dataset with the last `number` images by name of each type as `validation_defects`, not in `train`.

    An image with several types goes with all of them and counts for each; every type keeps an image to train on.

    Raises:
        InputError: no type has an image to spare (DF187).
    """
    if not number:
        return data
    by_type: dict[str, set[str]] = {}
    for name, defect in zip(data["train"]["source_file"], data["train"]["defect"]):
        by_type.setdefault(defect, set()).add(name)
    held = set[str]()
    for images in by_type.values():
        for name in sorted(images, reverse=True):
            if len(images & held) < number and all(others - held - {name} for others in by_type.values()):
                held.add(name)
    if not held:
        what = "no defect type has two reference images"
        raise InputError(Problem("DF187", f"--validation_defects {number}", what, "leave it out"))
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, name in enumerate(data["train"]["source_file"]):
        places[name in held].append(place)
    rows = data["train"]
    return DatasetDict(data | {"train": rows.select(places[False]), "validation_defects": rows.select(places[True])})


def split_names(dataset: DatasetDict) -> dict[str, list[str]]:
    """The image names of train and test, relative to the object's folder: as JSON, a split file to give back.

    Images that were left out are `skipped`.
    """
    names = {
        split: sorted(set(dataset[split]["source_file"])) if split in dataset else [] for split in ("train", "test")
    }
    skipped = getattr(dataset, "skipped", [])
    return names | ({"skipped": skipped} if skipped else {})


def held_out_rows(data: DatasetDict) -> Dataset:
    """The held-out defects to measure after training, of trained types: at most `MEASURED`, evenly over all."""
    rows = data.get("test", data["train"].select([]))
    known = [i for i, defect in enumerate(rows["defect"]) if defect in set(data["train"]["defect"])]
    return rows.select(known[:: math.ceil(len(known) / MEASURED) or 1])
