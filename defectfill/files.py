"""Files that are either whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from defectfill_dataset import InputError


TEMPORARY = ".tmp-defectfill-"  # how the name of everything unfinished begins


def clear_leftovers(*folders: Path) -> None:
    """Removes what a killed process left half-written or half-deleted in these folders."""
    for leftover in (file for folder in folders for file in folder.glob(f"{TEMPORARY}*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on leaving, what was written there is flushed and becomes `path`.

    After a crash at any moment `path` is its old self or its new self, never a part.
    """
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp and safetensors write 0600 whatever the umask
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as readable JSON, replacing `path` as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system frees it when the process ends, however it ends.

    Raises:
        InputError: the folder cannot be written (DF190), or another process holds it (DF191).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(
            f"DF191 {folder}: another process is writing here; wait for it or choose another folder"
        ) from error
    except OSError as error:
        raise InputError(
            f"DF190 {folder}: cannot be written: {error.strerror}; choose another --output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
