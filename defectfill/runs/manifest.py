"""The output folder of a generation run: its plan, its images, and the manifest, a line for each image made.

Each process appends lines to a part of its own; the parts become the manifest.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from defectfill_dataset import InputError, Problem
from defectfill_dataset.text import MEND, MOST_RUN_BYTES, Schema, numbered_lines, parse_json, read_text

from .files import atomic_write
from .source_images import SourceImage


PLAN, MANIFEST, PARTS = "plan.jsonl", "manifest.jsonl", "manifest-part-*.jsonl"
KINDS = ("images", "masks", "mask_changed", "contact")  # folders of PNG files


class PlanLine(Schema):
    """What is used of a line of the plan."""

    name: str
    object: str | None = None
    defect: str | None = None


Measure = Annotated[float, Field(ge=-1e12, le=1e12)] | None


class CropLine(Schema):
    """What is used of a crop in a line of the manifest; a measure is of each candidate."""

    chosen: int
    attempts: int = 1
    refused: dict[str, int] = {}
    scores: list[Measure] | None = None
    changes: list[Measure] | None = None
    deviations: list[Measure] | None = None
    reference_distances: list[Measure] | None = None

    @model_validator(mode="after")
    def check_chosen(self) -> "CropLine":
        for measure in (self.scores, self.changes, self.deviations, self.reference_distances):
            if measure and not 0 <= self.chosen < len(measure):
                raise ValueError(f"candidate {self.chosen} of {len(measure)} is none")
        return self


class ManifestLine(PlanLine):
    """What is used of a line of the manifest; runs of earlier versions measured no seam."""

    windows: list[CropLine]
    seam_step: Measure = None
    good_seam_step: Measure = None
    reference_seam_step: Measure = None


def check_output_dir(folder: Path, source_images: Iterable[SourceImage]) -> None:
    """Raises InputError (DF192) if the run would write among its inputs, or into folders of something else."""
    written = {folder.resolve(), *((folder / kind).resolve() for kind in KINDS)}
    for file in [f for source_image in source_images for f in (source_image.file, *source_image.areas.values())]:
        if file.resolve().parent in written:
            what = f"would overwrite {file}"
            raise InputError(Problem("DF192", f"--output_dir {folder}", what, "choose another folder"))
    foreign = [kind for kind in KINDS if (folder / kind).is_dir() and any((folder / kind).iterdir())]
    if foreign and not (folder / PLAN).exists():
        what = f"holds {', '.join(foreign)} of something else"
        raise InputError(Problem("DF192", f"--output_dir {folder}", what, "choose another folder"))


def read_lines(file: Path, schema: type[PlanLine]) -> list[dict]:
    """The lines of a JSON-lines file, none if it is absent; a last line that a kill cut off does not count.

    Raises:
        InputError: the file cannot be read, or a line is not of the schema (DF310).
    """
    if not file.exists():
        return []
    lines = []
    complete = read_text(file, "DF310", MEND, MOST_RUN_BYTES).rpartition("\n")[0]
    for number, text in numbered_lines(complete):
        try:
            lines.append(parse_json(text, schema))
        except ValueError as error:
            raise InputError(Problem("DF310", f"{file}, line {number}", str(error), "remove it")) from error
    return lines


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """Writes a JSON-lines file atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def open_part(folder: Path, process: int) -> Iterator[Callable[[dict], None]]:
    """Yields the function that adds a line to the process's part, flushed to the disk; threads may call it."""
    lock = threading.Lock()
    with (folder / PARTS.replace("*", f"{process:05d}")).open("a") as part:

        def add(line: dict) -> None:
            with lock:
                part.write(json.dumps(line) + "\n")
                part.flush()
                os.fsync(part.fileno())

        yield add


def merge_parts(folder: Path) -> list[dict]:
    """Merges the parts into the manifest; returns its lines, in the order of the plan.

    Only images whose files all exist have a line.
    """
    parts = sorted(folder.glob(PARTS))
    found = {line["name"]: line for file in (folder / MANIFEST, *parts) for line in read_lines(file, ManifestLine)}
    planned = [line["name"] for line in read_lines(folder / PLAN, PlanLine)]
    lines = [found[name] for name in planned if name in found and is_complete(folder, name)]
    write_lines(folder / MANIFEST, lines)
    for part in parts:
        part.unlink()
    return lines


def is_complete(folder: Path, name: str) -> bool:
    """Whether all files of an image exist."""
    return all((folder / kind / f"{name}.png").exists() for kind in KINDS)


def write_table(file: Path, lines: list[dict]) -> None:
    """Writes the lines as Parquet, a column for each key of any line.

    Raises:
        InputError: the lines have values of different types for one key (DF310).
    """
    columns = dict.fromkeys(name for line in lines for name in line)
    try:
        table = pa.Table.from_pylist([{k: line.get(k) for k in columns} for line in lines])
    except (pa.ArrowException, OverflowError) as error:
        what = f"its lines do not make a table: {error}"
        raise InputError(Problem("DF310", file.with_name(MANIFEST), what, MEND)) from error
    with atomic_write(file) as temporary:
        pq.write_table(table, temporary)
