"""The record of a training run: options, versions, code revision, the losses of every step."""

import json
import logging
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from PIL import Image

from defectfill_dataset import PromptPair

from ..base_model import BaseModel
from .files import atomic_write
from .processes import launch_environment


logger = logging.getLogger(__name__)

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


def lora_record(
    base: BaseModel, object_words: str, prompts: dict[str, PromptPair], published: bool, **training: object
) -> dict:
    """The record in the LoRA file, all but its steps; a local base is published without its path."""
    return {
        "schema": 1,
        "base": Path(base.name).name if published and Path(base.name).exists() else base.name,
        "revision": base.revision,
        "object": object_words,
        "prompts": {defect: pair.object.text for defect, pair in prompts.items()},
        "defect_prompts": {defect: pair.defect.text for defect, pair in prompts.items()},
        **training,
        "versions": versions(),
    }


def run_record(options: dict, identity: dict, data: DatasetDict) -> dict:
    """Options, versions and data of the run, for the output folder."""
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        **{k: identity[k] for k in ("mixed_precision", "gradient_accumulation_steps", "processes", "device")},
        "environment": launch_environment(),
        **{k: identity[k] for k in ("data_sha256", "prompts")},
        "base_revision": identity["revision"],
        "versions": versions(),
        "git_revision": git_revision(),
        "images": {split: len(rows) for split, rows in data.items()},
        "split": "split.json",
    }


class LossLog:
    """A JSON line for every step, each step once however often the run was killed; on disk after each `flush`.

    Args:
        start: the step the run begins at; lines of later steps, left by a killed run, are dropped.
    """

    def __init__(self, path: Path, start: int):
        self.lines = []
        if path.exists():
            whole = path.read_text().rpartition("\n")[0]
            self.lines = [line for line in map(json.loads, whole.splitlines()) if line["step"] <= start]
        self.path = path
        self.flush()

    def write(self, line: dict) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        """Writes the file anew; if that fails the lines wait for the next time."""
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        except OSError as error:
            logger.warning(f"{self.path.name} could not be written ({error})")

    def summary(self) -> dict:
        """Every column's mean over the first and over the last tenth of the steps."""
        tenth = max(1, len(self.lines) // 10)

        def mean(lines: list[dict]) -> dict:
            return {k: sum(line[k] for line in lines) / len(lines) for k in lines[0] if k != "step"} if lines else {}

        return {"first_tenth": mean(self.lines[:tenth]), "last_tenth": mean(self.lines[-tenth:])}


def log_image(trackers: list, image: Image.Image, step: int) -> None:
    """Sends the image to every tracker that takes images."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(image)[None]}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [image]}, step)
