"""Full disks, and folders that vanish: what a run does where it cannot write."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from defectfill_dataset import Problem, RunError
from defectfill_dataset.errors import DISK_ERRORS


logger = logging.getLogger(__name__)

ROOM_PATIENCE = 60.0  # seconds that the last write of a run waits for room on the disk
NOTHING_WRITTEN = "nothing new is in it; make room on the disk, and run the same command again"


def is_of_disk(error: OSError, folder: Path) -> bool:
    """Whether a disk is full, failed or read-only, or a file in `folder` cannot be written; not that of an input."""
    name = error.filename if isinstance(error.filename, (str, os.PathLike)) else os.devnull
    return error.errno in DISK_ERRORS or Path(name).absolute().is_relative_to(folder.absolute())


@contextmanager
def told_if_unwritable(folder: Path, left: str) -> Iterator[None]:
    """Around work that writes into `folder`; `left` says what is left if it ends, and how to go on.

    Raises:
        RunError: the disk is full or failed, or the folder is gone (DF324).
    """
    try:
        yield
    except OSError as error:
        if not is_of_disk(error, folder):
            raise
        raise RunError(Problem("DF324", folder, f"cannot be written ({error})", left)) from error


@contextmanager
def left_out_if_unwritable(what: str, folder: Path) -> Iterator[None]:
    """Around a write into `folder` that the work can do without: a warning in its place if it fails."""
    try:
        yield
    except OSError as error:
        if not is_of_disk(error, folder):
            raise
        logger.warning(f"{what} cannot be written ({error}) and is left out")


def write_or_fall_back(write: Callable[[Path], None], folder: Path, fallback: Path) -> tuple[Path, OSError | None]:
    """(where the files of `write` are, why not in `folder`): if need be in a new folder in `fallback`.

    They are written there at once, so that they are safe, while `write` is tried again in `folder` for
    `ROOM_PATIENCE` seconds.

    Raises:
        OSError: they cannot be written into either; the error is that of `folder`.
    """
    deadline, pause = time.monotonic() + ROOM_PATIENCE, 1.0
    try:
        write(folder)
        return folder, None
    except OSError as error:
        failure = error
    refuge = refuge_in(fallback, folder)
    try:
        refuge.mkdir(parents=True)
        write(refuge)
        safe = True
    except OSError as error:
        shutil.rmtree(refuge, ignore_errors=True)
        logger.warning(f"{refuge} cannot be written either ({error})")
        safe = False
    logger.warning(f"{folder} cannot be written ({failure}); trying again for {ROOM_PATIENCE:.0f} seconds")
    while time.monotonic() < deadline:
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(2 * pause, 10.0)
        with suppress(OSError):
            write(folder)
            shutil.rmtree(refuge, ignore_errors=True)
            return folder, None
    if not safe:
        raise failure
    return refuge, failure


def refuge_in(fallback: Path, folder: Path) -> Path:
    """A new name in `fallback` for what should have been in `folder`."""
    return fallback / f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def default_fallback() -> Path:
    """`defectfill/results` in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "defectfill", "results")
