"""What a run has made, a line each: each process appends to a part of its own, and the parts become the manifest."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from defectfill_dataset import InputError

from .files import replacing


MANIFEST, PARTS = "manifest.jsonl", "manifest-part-*.jsonl"


def read_lines(file: Path) -> list[dict]:
    """A file's lines, none if it is not there; a last one torn by a kill does not count.

    Raises:
        InputError: another line is no object with a name (DF310).
    """
    lines = []
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            line["name"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"DF310 {file}, line {number}: cannot be read ({error!r}); remove it") from error
        lines.append(line)
    return lines


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    with replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def appending(folder: Path, process: int) -> Iterator[Callable[[dict], None]]:
    """Gives the function that adds a line to the process's part; what it has added is on the disk."""
    with (folder / PARTS.replace("*", f"{process:05d}")).open("a") as part:

        def add(line: dict) -> None:
            part.write(json.dumps(line) + "\n")
            part.flush()
            os.fsync(part.fileno())

        yield add


def gather(folder: Path, order: Iterable[str], whole: Callable[[dict], bool]) -> list[dict]:
    """Makes the manifest of all lines whose results are `whole`, by name in this order, and removes the parts."""
    parts = sorted(folder.glob(PARTS))
    found = {line["name"]: line for file in (folder / MANIFEST, *parts) for line in read_lines(file)}
    lines = [found[name] for name in order if name in found and whole(found[name])]
    write_lines(folder / MANIFEST, lines)
    for part in parts:
        part.unlink()
    return lines


def write_table(file: Path, lines: list[dict]) -> None:
    """The lines as Parquet, a column for each name in any of them."""
    columns = dict.fromkeys(name for line in lines for name in line)
    with replacing(file) as temporary:
        pq.write_table(pa.Table.from_pylist([{k: line.get(k) for k in columns} for line in lines]), temporary)
