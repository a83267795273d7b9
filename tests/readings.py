"""What the project makes of a dataset folder: its rows, masks, notes and problems."""

import collections
from pathlib import Path

import numpy as np
import pytest

from defectfill_dataset import InputError, binarise, check_pairs, load_defect_pairs
from defectfill_dataset.readers import read_object


def told(root: Path, layout: str = "auto", **options) -> tuple[str, ...]:
    """The problems of reading the object, or of its pixels; without the hint at --skip_problems."""
    with pytest.raises(InputError) as caught:
        check_pairs(load_defect_pairs(root, layout=layout, split="all", **options)["train"])
    return tuple(line for line in str(caught.value).splitlines() if not line.startswith("DF109"))


def codes(problems: tuple[str, ...]) -> list[str]:
    return sorted(line[:5] for line in problems)


def table(root: Path) -> dict[str, tuple[str, str | None]]:
    """Image name -> (defect, split) as the layout's reader says; of several types, "crack+hole"."""
    found: dict[str, tuple[str, str | None]] = {}
    for row in sorted(read_object(root, root.name).rows, key=lambda row: row.defect):
        name = row.image.relative_to(root).as_posix()
        found[name] = (f"{found[name][0]}+{row.defect}" if name in found else row.defect, row.split)
    return found


def masks_of(root: Path, **options) -> dict[str, np.ndarray]:
    """Image name -> mask of all defect images; "NAME TYPE" where an image has several types."""
    rows = load_defect_pairs(root, split="all", **options)["train"]
    check_pairs(rows)
    names = collections.Counter(rows["source_file"])
    return {
        row["source_file"] + (f" {row['defect']}" if names[row["source_file"]] > 1 else ""): binarise(row["mask"])
        for row in rows
    }


Rows = list[tuple[str, str, str | None]]


def rows_of(root: Path) -> Rows:
    """(image name, defect, split) of every row, sorted."""
    rows = read_object(root, root.name).rows
    return sorted(
        ((row.image.relative_to(root).as_posix(), row.defect, row.split) for row in rows), key=lambda row: row[:2]
    )


def good(*names: str) -> Rows:
    return [(name, "good", "good") for name in names]


def notes(root: Path) -> list[str]:
    return [str(note) for note in read_object(root, root.name).notes]


def masks_by_type(root: Path) -> dict[tuple[str, str], np.ndarray]:
    rows = load_defect_pairs(root, split="all")["train"]
    check_pairs(rows)
    return {(row["source_file"], row["defect"]): binarise(row["mask"]) for row in rows}
