"""The output folder of a generation run: settings, plan, images, and the manifest, a line for each image made.

Each process appends lines to a part of its own; the parts become the manifest.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from defectfill_dataset import InputError, Problem

from .files import atomic_write
from .source_images import SourceImage
from .speed import SPEED


SETTINGS, PLAN, MANIFEST, PARTS = "settings.json", "plan.jsonl", "manifest.jsonl", "manifest-part-*.jsonl"
KINDS = ("images", "masks", "mask_changed", "contact")  # folders of PNG files
TABLE, REPORT, SHEET = "manifest.parquet", "summary.html", "contact_sheet.png"


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
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        if isinstance(settings, dict) and {"base", "resolution", "num_candidates"} <= settings.keys():
            return
    except (OSError, ValueError):
        pass
    found = [kind for kind in KINDS if (folder / kind).is_dir() and any((folder / kind).iterdir())]
    found += [name for name in (SETTINGS, PLAN, MANIFEST, TABLE, REPORT, SHEET, SPEED) if (folder / name).exists()]
    found += [file.name for file in sorted(folder.glob(PARTS))]
    if found:
        what = f"holds {', '.join(found)} of something else"
        raise InputError(Problem("DF192", f"--output_dir {folder}", what, "choose another folder"))


def read_lines(file: Path) -> list[dict]:
    """The lines of a JSON-lines file, none if it is absent; a last line that a kill cut off does not count.

    Raises:
        InputError: a line is not an object with a name (DF310).
    """
    lines = []
    complete = file.read_text().rpartition("\n")[0] if file.exists() else ""
    for number, text in enumerate(complete.splitlines(), 1):
        try:
            line = json.loads(text)
            line["name"]
        except (ValueError, TypeError, KeyError) as error:
            what = f"cannot be read ({error!r})"
            raise InputError(Problem("DF310", f"{file}, line {number}", what, "remove it")) from error
        lines.append(line)
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
    found = {line["name"]: line for file in (folder / MANIFEST, *parts) for line in read_lines(file)}
    planned = [line["name"] for line in read_lines(folder / PLAN)]
    lines = [found[name] for name in planned if name in found and is_complete(folder, name)]
    write_lines(folder / MANIFEST, lines)
    for part in parts:
        part.unlink()
    return lines


def is_complete(folder: Path, name: str) -> bool:
    """Whether all files of an image exist."""
    return all((folder / kind / f"{name}.png").exists() for kind in KINDS)


def write_table(file: Path, lines: list[dict]) -> None:
    """Writes the lines as Parquet, a column for each key of any line."""
    columns = dict.fromkeys(name for line in lines for name in line)
    with atomic_write(file) as temporary:
        pq.write_table(pa.Table.from_pylist([{k: line.get(k) for k in columns} for line in lines]), temporary)
