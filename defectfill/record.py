"""What a run says of itself: versions, code revision, and the losses of every step."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from .files import replacing


PACKAGES = ("accelerate", "datasets", "diffusers", "numpy", "peft", "pillow", "safetensors", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def git_revision() -> str | None:
    """The commit of this code, with '-dirty' if it was changed; None outside a git checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


class LossLog:
    """A JSON line for every step, each step once however often the run was killed.

    Args:
        start: the step the run begins at; lines of later steps, left by a killed run, are dropped.
    """

    def __init__(self, path: Path, start: int):
        self.lines = []
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]
            self.lines = [line for line in map(json.loads, whole.splitlines()) if line["step"] <= start]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = path.open("a")

    def write(self, line: dict) -> None:
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def summary(self) -> dict:
        """Every column's mean over the first and over the last tenth of the steps."""
        tenth = max(1, len(self.lines) // 10)

        def mean(lines: list[dict]) -> dict:
            return {k: sum(line[k] for line in lines) / len(lines) for k in lines[0] if k != "step"} if lines else {}

        return {"first_tenth": mean(self.lines[:tenth]), "last_tenth": mean(self.lines[-tenth:])}
