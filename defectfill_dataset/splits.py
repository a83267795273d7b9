"""Which defect images train and which are held out: decided by a rule or a file, and always written down."""

import json
import math
from pathlib import Path

from datasets import DatasetDict

from .errors import InputError
from .layouts import Row


SPLIT_RULES = ("auto", "first_third", "all")


def split_rows(rows: list[Row], root: str | Path, rule: str) -> dict[str, list[Row]]:
    """The rows of the splits train (reference defects), test (held-out defects) and good.

    Args:
        rows: all images of one object.
        root: the object's folder; a split file names images relative to it.
        rule: `auto` (the layout's own split, else `first_third`), `first_third` (of each defect type the first
            ceil(n/3) by name train, the paper's protocol), `all` (every defect trains), or the path of a split file,
            the JSON of `split_names`.
    """
    defects = [row for row in rows if row.defect != "good"]
    if rule not in SPLIT_RULES:
        train = _rows_of_file(defects, root, Path(rule))
    elif rule == "all":
        train = set(defects)
    elif rule == "auto" and all(row.split for row in defects):
        train = {row for row in defects if row.split == "train"}
    else:
        train = set()
        for defect in {row.defect for row in defects}:
            of_type = sorted((row for row in defects if row.defect == defect), key=lambda row: row.image.name)
            train.update(of_type[: math.ceil(len(of_type) / 3)])
    return {
        "train": [row for row in defects if row in train],
        "test": [row for row in defects if row not in train],
        "good": [row for row in rows if row.defect == "good"],
    }


def _rows_of_file(defects: list[Row], root: str | Path, file: Path) -> set[Row]:
    try:
        split = json.loads(file.read_text())
        train, test = set(split["train"]), set(split["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        rules = ", ".join(SPLIT_RULES)
        raise InputError(
            f"DF165 --split {file}: neither a rule ({rules}) nor a readable split file "
            f'{{"train": [...], "test": [...]}}: {error!r}'
        ) from error
    names = {row.image.relative_to(root).as_posix(): row for row in defects}
    problems = [f"DF165 {file}: names '{n}', which is not in {root}" for n in sorted((train | test) - names.keys())]
    problems += [f"DF165 {file}: '{n}' is in both train and test" for n in sorted(train & test)]
    problems += [f"DF165 {file}: does not say where '{n}' belongs" for n in sorted(names.keys() - train - test)]
    if problems:
        raise InputError(*problems)
    return {names[name] for name in train}


def split_names(dataset: DatasetDict) -> dict[str, list[str]]:
    """The image names of train and test, relative to the object's folder: as JSON, a split file to give back."""
    return {split: sorted(dataset[split]["source_file"]) if split in dataset else [] for split in ("train", "test")}
