"""What commands share: flags of a dataset's folder, help, and how a command ends on wrong input."""

import argparse
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

from .errors import InputError, Problem, RunError, disk_error, one_line
from .readers import LAYOUTS
from .readers.discovery import OLD_NAMES


LAUNCHERS = rb"accelerate|torchrun|torch\.distributed"
# Prints its input when the process behind a file descriptor has ended, or after 40 seconds: PyTorch's launcher gives
# the other processes 30 to end.
WATCHER = """
import select, sys
message = sys.stdin.read()
select.select([int(sys.argv[1])], [], [], 40)
sys.stderr.write(message)
"""


def add_reading_flags(add: Callable, data: str) -> None:
    """The flags that decide how a dataset's folder, given by the flag `data`, is read."""
    layouts = f"Folder layout of {data}, if it cannot be detected: {', '.join(LAYOUTS)}."
    add("--layout", choices=["auto", *LAYOUTS, *OLD_NAMES], default="auto", metavar="NAME", help=layouts)
    add(
        "--mask_classes",
        nargs="+",
        default=[],
        metavar="VALUE=NAME",
        help="What the values or colours of masks mean, if they hold several: a defect type's name, or ignore "
        "(85=scratch 255=ignore, 250,50,83=hole, #fa3253=hole).",
    )
    add("--skip_problems", action="store_true", help="Leave out images that cannot be used, and name each.")


def reading_arguments(args: argparse.Namespace) -> list[str]:
    """The flags of `add_reading_flags` again, to hand them to another command."""
    classes = ["--mask_classes", *args.mask_classes] if args.mask_classes else []
    return ["--layout", args.layout, *classes, *(["--skip_problems"] if args.skip_problems else [])]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and each default once, in the same way."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS, []) or "Default:" in text:
            return text
        return f"{text} Default: %(default)s."


class Parser(argparse.ArgumentParser):
    """Reports wrong flags as `tell` does, and takes none in a shortened form: `--lora` is not `--lora_alpha`."""

    def __init__(self, *args, **options):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        tell(f"{self.format_usage()}{self.prog}: error: {one_line(message)}")
        sys.exit(2)


def seed(text: str) -> int:
    """A flag's seed: 64 bits, as in the tables that hold it."""
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} must be from -2^63 to 2^63 - 1")
    return number


def quoted_flags(text: str) -> str:
    """A flag's text that holds flags of another command, in quotes, as a shell splits it."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be split: {error}") from error
    return text


def exit_on_input_error(main: Callable[[], None]) -> None:
    """Runs a command's `main`; its errors end it with a message on stderr, no traceback.

    The exit status is 2 for wrong input, 1 for a run that could not go on.
    """
    if logging.lastResort:  # what prints warnings where nothing else is set up
        logging.lastResort.setFormatter(LineFormatter())
    try:
        main()
    except InputError as error:
        tell("\n" + error.text())
        sys.exit(2)
    except RunError as error:
        tell(f"\n{error}", error.alone)
        sys.exit(1)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        tell(end.code)
        sys.exit(1)
    except Exception as error:
        full = disk_error(error)
        if full is None:
            raise
        tell(f"\n{Problem('DF324', '', str(full), 'make room, and run the same command again')}")
        sys.exit(1)


class LineFormatter(logging.Formatter):
    """Each message as `one_line`; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def start_logging(level: int) -> None:
    """Logs to stderr with the time, a line for each message."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=level)


def say(*lines: object, stream: TextIO | None = None) -> None:
    """Prints each argument as `one_line`: the only way in which names of files, defects and the like are printed."""
    print(*(one_line(str(line)) for line in lines), sep="\n", end="\n" if lines else "", file=stream)


def tell(message: str, alone: bool = False) -> None:
    """Prints on stderr; under a launcher once that has ended, so that its traceback is not the last thing shown.

    Args:
        alone: whether only this process sees the problem; else all do, and one says it.
    """
    if not alone and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    end, lines = end_of_launcher(), message.split("\n")
    if end is None:
        say(*lines, stream=sys.stderr)
        return
    watcher = subprocess.Popen(
        [sys.executable, "-ISc", WATCHER, str(end)],
        stdin=subprocess.PIPE, text=True, pass_fds=[end], start_new_session=True,
    )  # fmt: skip
    assert watcher.stdin
    with watcher.stdin:
        watcher.stdin.write("".join(f"{one_line(line)}\n" for line in lines))


def end_of_launcher() -> int | None:
    """A file descriptor to read from once the launcher has ended; None where there is none, or no Linux.

    A launcher that is the first process of a container is none either: the watcher would end with it.
    """
    parent = os.getppid()
    try:
        if parent != 1 and re.search(LAUNCHERS, Path(f"/proc/{parent}/cmdline").read_bytes()):
            return os.pidfd_open(parent)
    except (AttributeError, OSError):
        pass
    return None
