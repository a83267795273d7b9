"""The output folder of a generation run: settings, plan, images, and the manifest, a line for each image made.

Each process appends lines to a part of its own; the parts become the manifest.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from defectfill_dataset import InputError, Problem, file_digest
from defectfill_dataset.errors import folded, one_line
from defectfill_dataset.text import (
    MEND,
    MOST_RUN_BYTES,
    Schema,
    is_of,
    numbered_lines,
    parse_json,
    read_text,
)

from .files import atomic_write, is_record, refuse_foreign
from .source_images import SourceImage
from .speed import SPEED


logger = logging.getLogger(__name__)

SETTINGS, PLAN, MANIFEST, PARTS = "settings.json", "plan.jsonl", "manifest.jsonl", "manifest-part-*.jsonl"
FILES, SEAL = "files", "line_sha256"  # keys of a line
AGAIN = "it will be generated again"
KINDS = ("images", "masks", "mask_changed", "contact")  # folders of PNG files
TABLE, REPORT, SHEET = "manifest.parquet", "summary.html", "contact_sheet.png"


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


class FileDigest(Schema):
    """A file of an image, as it was written."""

    bytes: int
    sha256: str


class SealedLine(Schema):
    """What is used of a line to verify its image."""

    files: dict[str, FileDigest] = {}


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
    check_own(folder)


def check_own(folder: Path) -> None:
    """Raises InputError (DF192) if the folder holds what a run would write over, and no run of ours has begun there.

    The settings tell one of ours; they are written first.
    """
    if is_record(folder / SETTINGS, "base", "resolution", "num_candidates"):
        return
    found = [kind for kind in KINDS if (folder / kind).is_dir() and any((folder / kind).iterdir())]
    found += [name for name in (SETTINGS, PLAN, MANIFEST, TABLE, REPORT, SHEET, SPEED) if (folder / name).exists()]
    found += [file.name for file in sorted(folder.glob(PARTS))]
    refuse_foreign(folder, found)


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


def merge_parts(folder: Path, verify: bool = False) -> list[dict]:
    """Merges the parts into the manifest; returns its lines, in the order of the plan.

    Only images whose line and files are as they were written have a line; the others are named.

    Args:
        verify: read every file, not only those that changed after their line was written.
    """
    parts = sorted(folder.glob(PARTS))
    found: dict[str, tuple[dict, int]] = {}
    for file in (file for file in (folder / MANIFEST, *parts) if file.exists()):
        written = 0 if verify else file.stat().st_mtime_ns
        found |= {line["name"]: (line, written) for line in read_lines(file, ManifestLine)}
    lines, problems = [], []
    for name in (line["name"] for line in read_lines(folder / PLAN, PlanLine) if line["name"] in found):
        problem = damage(folder, name, *found[name])
        problems.append(problem) if problem else lines.append(found[name][0])
    for text in folded(problems):
        logger.warning(text)
    write_lines(folder / MANIFEST, lines)
    for part in parts:
        part.unlink()
    return lines


def progress(folder: Path) -> str:
    """How many images are finished, by the lines of all processes, and how to go on."""
    finished, planned = (
        sum(file.read_bytes().count(b"\n") for file in files if file.exists())
        for files in ((folder / MANIFEST, *folder.glob(PARTS)), (folder / PLAN,))
    )
    if not planned:
        return "nothing was generated yet. Run the same command again."
    what = f"{min(finished, planned)} of {planned} images are finished in {one_line(str(folder))}"
    return f"{what}. Run the same command again to generate the others."


def sealed(line: dict, folder: Path) -> dict:
    """The line with size and sha256 of each file of its image, and with a digest of its own."""
    files = {kind: folder / kind / f"{line['name']}.png" for kind in KINDS}
    line = line | {
        FILES: {kind: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for kind, file in files.items()}
    }
    return line | {SEAL: line_digest(line)}


def line_digest(line: dict) -> str:
    """The sha256 of all that is in a line but its own digest and the time it took."""
    content = {key: value for key, value in line.items() if key not in (SEAL, "seconds")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, name: str, line: dict, written: int) -> Problem | None:
    """What of an image is not as it was written, its line or a file (DF330); None if nothing is.

    Args:
        line: of the image; one of an earlier version has no digests: its files must exist, and hold something.
        written: when the line was, in ns; only files that changed since then are read.
    """
    if {FILES, SEAL} & line.keys() and (line.get(SEAL) != line_digest(line) or not is_of(line, SealedLine)):
        return Problem("DF330", f"{MANIFEST}, {name}", "its line is not what was written", AGAIN)
    for kind in KINDS:
        where, entry = f"{kind}/{name}.png", line.get(FILES, {}).get(kind)
        try:
            status = (folder / where).stat()
        except OSError:
            return Problem("DF330", where, "is missing", AGAIN)
        if status.st_size != (entry["bytes"] if entry else status.st_size or 1):
            return Problem("DF330", where, f"has {status.st_size} bytes, which are not all that was written", AGAIN)
        changed = max(status.st_mtime_ns, status.st_ctime_ns) >= written  # a rename changes the second alone
        if entry and changed and file_digest(folder / where) != entry["sha256"]:
            return Problem("DF330", where, "is not what was written", AGAIN)
    return None


def warn_of_unverified(lines: Iterable[dict]) -> None:
    """Says how many images have no digests, so that no damage but a missing or empty file can be found."""
    if number := sum(FILES not in line for line in lines):
        logger.warning(f"{number} images of an earlier version have no digests: only that their files exist is known")


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
