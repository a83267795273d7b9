"""Files that are either complete or absent: atomic writes, a lock for a folder, publishing a whole folder."""

import errno
import filecmp
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
from PIL import Image
from safetensors import SafetensorError

from defectfill_dataset import InputError, Problem
from defectfill_dataset.text import Schema, read_json


TEMPORARY = ".tmp-defectfill-"  # prefix of every unfinished file and folder
LONGEST_NAME = 255  # bytes of a name that file systems take
ON_WINDOWS = os.name == "nt"
PATIENCE = 10.0  # seconds that a rename waits there for another program, such as a virus scanner, to close the file
_umask_lock = threading.Lock()


def clear_leftovers(*folders: Path) -> None:
    """Removes the unfinished files that a killed process left in these folders; next time, those that are open."""
    for leftover in (file for folder in folders for file in folder.glob(f"{TEMPORARY}*")):
        with suppress(PermissionError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on exit, the temporary file is flushed and renamed to `path`.

    After a crash at any moment `path` holds its old content or its new content, never a part.

    Raises:
        OSError: the file cannot be written; also where safetensors has an error of its own for that.
    """
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        usual_mode(temporary)
        flush(temporary)
        rename(temporary, path)
        flush(path.parent)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error
    finally:
        with suppress(PermissionError):  # it must not hide why the file was not written
            temporary.unlink(missing_ok=True)


def usual_mode(file: Path) -> None:
    """Gives a file the mode that the umask asks for: mkstemp and safetensors write 0600 whatever it is."""
    with _umask_lock:  # threads write, and each would see the other's 0
        umask = os.umask(0)
        os.umask(umask)
    file.chmod(0o666 & ~umask)


def flush(path: Path) -> None:
    """Forces the content of a file or folder to the disk; Windows opens no folder, and logs renames by itself."""
    if ON_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)  # fsync needs the right to write there
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder; an existing file is replaced. On Windows it waits until no program has one open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not ON_WINDOWS or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def save_image(image: Image.Image, path: Path, exif: bytes = b"") -> None:
    """Writes a PNG file atomically and quickly; `exif` is its only metadata."""
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", exif=exif, compress_level=1)


def refuse_foreign(folder: Path, found: Sequence[str]) -> None:
    """Raises InputError (DF192) if files, or folders, of something else were found in an output folder."""
    if found:
        what = f"holds {', '.join(found)} of something else"
        raise InputError(Problem("DF192", f"--output_dir {folder}", what, "choose another folder"))


def is_record(file: Path, *keys: str) -> bool:
    """Whether a file is a JSON object with these keys, as a record of ours is."""
    try:
        return set(keys) <= read_json(file, Schema).keys()
    except InputError:
        return False


def visible_files(folder: Path) -> dict[str, Path]:
    """All files of a folder by their names relative to it; hidden entries directly in it are ignored."""
    parts = sorted(part for part in folder.iterdir() if not part.name.startswith("."))
    files = [f for part in parts for f in ([part] if part.is_file() else sorted(part.rglob("*"))) if f.is_file()]
    return {f.relative_to(folder).as_posix(): f for f in files}


def publish_dir(source: Path, folder: Path, last: str) -> None:
    """Moves all entries of `source` into `folder`, flushed, `last` at the end: a folder that holds it is complete.

    Entries that `folder` already holds stay, except `last`, which is replaced: ours stands beside all the others.

    Raises:
        InputError: `folder` holds a file that is not in `source`, or that differs (DF193); nothing was moved.
    """
    new = visible_files(source)
    for name, file in visible_files(folder).items():
        if name not in new:
            what = f"holds {name}, which is not of this dataset"
            raise InputError(Problem("DF193", folder, what, "choose another --output_dir or empty it"))
        ours = name == last and all((folder / other).exists() for other in new)
        if not ours and not filecmp.cmp(file, new[name], shallow=False):
            fix = "choose another --output_dir or empty it"
            raise InputError(Problem("DF193", folder, f"holds another {name}, of other data", fix))
    for part in source.iterdir():
        missing = [name for name in new if name.startswith(f"{part.name}/") and not (folder / name).exists()]
        if missing and (folder / part.name).exists():
            what = f"holds a {part.name}/ without {missing[0]}"
            raise InputError(Problem("DF193", folder, what, "choose another --output_dir or empty it"))
    for file in new.values():
        flush(file)
    for part in sorted(source.iterdir(), key=lambda part: part.name == last):
        if part.name == last or not (folder / part.name).exists():
            rename(part, folder / part.name)
    flush(folder)


def finite(value: object) -> object:
    """The value with None in place of every float, at any depth, that is not a number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as indented JSON, atomically; null in place of NaN and infinities."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """Appends to a file, which is whole after a crash of the process, if not of the system."""
    with path.open("a") as stream:
        stream.write(text)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process; the system releases the lock when the process ends, however it ends.

    Raises:
        InputError: the folder cannot be written (DF190), or another process has locked it (DF191).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        fix = "wait for it or choose another folder"
        raise InputError(Problem("DF191", folder, "another process is writing here", fix)) from error
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise InputError(Problem("DF190", folder, what, "choose another --output_dir")) from error
    try:
        yield
    finally:
        lock.release()
