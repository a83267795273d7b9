"""The record of a training run: options, versions, code revision, the losses of every step."""

import json
import logging
import math
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from datasets import DatasetDict
from pydantic import ConfigDict

from defectfill_dataset import InputError, Problem, PromptPair, RunError
from defectfill_dataset.text import MEND, MOST_RUN_BYTES, Schema, parse_json, read_bytes

from ..base_model import BaseModel
from .checkpoint import as_json, last_checkpoint
from .files import append_text, atomic_write, finite, flush
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
        "base_sha256": base.digest,
        "revision": base.revision,
        "variant": base.variant,
        "object": object_words,
        "prompts": {defect: pair.object.text for defect, pair in prompts.items()},
        "defect_prompts": {defect: pair.defect.text for defect, pair in prompts.items()},
        **training,
        "versions": versions(),
    }


def run_record(options: dict, identity: dict, data: DatasetDict) -> dict:
    """Options, versions and data of the run, for the output folder."""
    return {
        "options": as_json(options),
        **{k: identity[k] for k in ("mixed_precision", "gradient_accumulation_steps", "processes", "device")},
        "environment": launch_environment(),
        **{k: identity[k] for k in ("data_sha256", "prompts")},
        "base_revision": identity["revision"],
        "base_sha256": identity["base_sha256"],
        "versions": versions(),
        "git_revision": git_revision(),
        "images": {split: len(rows) for split, rows in data.items()},
        "split": "split.json",
    }


class LossLine(Schema):
    """A step's losses and learning rates; null where one was not finite, NaN in old versions."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]
    step: int


class LossLog:
    """A JSON line for every step, each step once however often the run was killed, in the file at once.

    A number that is not finite is null. A line that finds no room on the disk waits for the next one.

    Args:
        start: the step the run begins at; lines of later steps, left by a killed run, are dropped.

    Raises:
        InputError: the path is of something else than a file of losses (DF310).
    """

    def __init__(self, path: Path, start: int):
        self.path, self.lines, self.warned = path, [], False
        try:
            content = read_bytes(path, MOST_RUN_BYTES) if path.exists() else b""
        except OSError as error:
            raise InputError(Problem("DF310", path, f"cannot be read: {error}", MEND)) from error
        for number, text in enumerate(content.splitlines(), 1):
            try:
                line = parse_json(text, LossLine)
            except ValueError as error:  # cut off by a kill; what follows is of steps after it
                logger.warning(f"{path.name}: the lines from {number} on are left out ({error})")
                break
            if line["step"] <= start:
                self.lines.append(finite(line))
        self.complete = False  # whether the file holds all lines and no half of one
        self.flush()

    def write(self, line: dict) -> None:
        """Adds a line."""
        self.lines.append(finite(line))
        self._save(lambda: append_text(self.path, self._text(self.lines[-1:])))

    def flush(self) -> None:
        """Forces the lines to the disk."""
        self._save(lambda: flush(self.path))

    def _save(self, step: Callable[[], None]) -> None:
        """Takes one step if the file was complete, else writes it anew; if that fails the lines wait."""
        try:
            if self.complete:
                self.complete = False
                step()
            else:
                with atomic_write(self.path) as temporary:
                    temporary.write_text(self._text(self.lines))
            self.complete = True
        except OSError as error:
            if not self.warned:
                logger.warning(f"{self.path.name} could not be written ({error}); its lines wait for room")
            self.warned = True

    @staticmethod
    def _text(lines: list[dict]) -> str:
        return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)

    def summary(self) -> dict:
        """Every column's mean over the first and over the last tenth of the steps; None where no step has a number."""
        tenth = max(1, len(self.lines) // 10)

        def mean(lines: list[dict]) -> dict:
            columns = {k: [line[k] for line in lines if line.get(k) is not None] for k in lines[0]} if lines else {}
            return {k: sum(x) / len(x) if x else None for k, x in columns.items() if k != "step"}

        return {"first_tenth": mean(self.lines[:tenth]), "last_tenth": mean(self.lines[-tenth:])}


def stop_if_not_finite(
    step: int, terms: dict, norm: float, images: list[str], scaled: bool, log: LossLog | None, output_dir: Path
) -> None:
    """Stops, before the weights change, at a loss or an unscaled gradient that is not finite; logs the step first.

    Args:
        terms: the losses by name.
        norm: of the gradient.
        images: of this process, in the step's last batch.
        scaled: whether fp16 scales the loss; it skips a step whose gradient overflows.
        log: on the main process.

    Raises:
        RunError: a number is not finite (DF323).
    """
    if all(map(math.isfinite, terms.values())) and (scaled or math.isfinite(norm)):
        return
    if log:
        log.write({"step": step, **terms, "grad_norm": norm})
        log.flush()
    shown = ", ".join(f"{k} {v:g}" for k, v in terms.items())
    state, advice = last_checkpoint(output_dir)
    what = f"{shown}, gradient norm {norm:g}, last images {', '.join(images)}; {state}"
    fix = f"lower --learning_rate or use bf16 in place of fp16 in a new run, or {advice}"
    if state.startswith("no"):
        fix = f"lower --learning_rate, or use bf16 in place of fp16, and {advice}"
    raise RunError(Problem("DF323", f"step {step}", what, fix))


MAX_SKIPPED_STEPS = 30  # in a row; a loss scale of 65536 is down to nothing by then


def stop_if_all_skipped(step: int, skipped: int) -> None:
    """Raises RunError (DF323) once fp16 has skipped `MAX_SKIPPED_STEPS` steps in a row."""
    if skipped == MAX_SKIPPED_STEPS:
        what = f"{skipped} steps in a row skipped by fp16"
        raise RunError(Problem("DF323", f"step {step}", what, "use --mixed_precision bf16 or no"))
