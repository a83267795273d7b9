"""Checkpoints: whole or absent, proved before they are used, safetensors and JSON only."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from defectfill_dataset import InputError

from .files import flush, write_json


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> tuple[dict, dict]:
    """The optimizer's state by parameter name: its tensors, and everything else as JSON can hold it."""
    tensors, scalars = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}|{key}"] = (
                    value.detach().cpu().clone().contiguous()
                )  # clone: 8-bit Adam shares its maps
            else:
                scalars[f"{name}|{key}"] = value
    return tensors, scalars


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict, scalars: dict
) -> None:
    """Puts back what `optimizer_tensors` took, on each parameter's device (AdamW keeps its step count on the CPU)."""
    optimizer.state.clear()
    for full_name, value in {**tensors, **scalars}.items():
        name, key = full_name.split("|")
        parameter = parameters[name]
        if torch.is_tensor(value) and key != "step":
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict], state: dict, write_lora, total_limit: int | None
) -> None:
    """Writes `checkpoint-<step>`, then deletes the oldest beyond `total_limit`.

    Everything goes to a temporary folder with a manifest of sizes and sha256, is flushed, and only then renamed: a
    kill at any instant leaves each checkpoint whole or absent. A full disk costs this checkpoint, not the run.

    Args:
        tensors: file name to tensors.
        state: JSON content beside them.
        write_lora: called with the path of the LoRA file to write.
        total_limit: how many checkpoints to keep, None for all.
    """
    temporary = output_dir / f".tmp-checkpoint-{step}-{os.getpid()}"
    final = output_dir / f"checkpoint-{step}"
    try:
        temporary.mkdir()
        write_lora(temporary)
        for name, content in tensors.items():
            save_file(content, temporary / name)
        write_json(temporary / STATE_FILE, state)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"schema": 1, "step": step, "files": files})
        for name in files:
            flush(temporary / name)
        flush(temporary)
        if final.exists():
            _discard(final)
        os.rename(temporary, final)
        flush(output_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        logger.warning(
            f"checkpoint-{step} could not be written ({error}); training goes on, earlier checkpoints stand"
        )
        return
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            _discard(old)


def _discard(folder: Path) -> None:
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    os.rename(folder, trash)  # at once out of sight: no half-deleted checkpoint is ever listed
    shutil.rmtree(trash)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step>, by step."""
    found = [f for f in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name) and f.is_dir()]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))


def clear_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left half-written or half-deleted."""
    for leftover in [*output_dir.glob(".tmp-*"), *output_dir.glob(".trash-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as its manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest names '{name}'"
            if _sha256(checkpoint / name) != entry["sha256"]:
                return f"{name} is not what was written"
        missing = {OPTIMIZER_FILE, STATE_FILE} - manifest["files"].keys()
        return f"no {', '.join(sorted(missing))}" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest or a file cannot be read: {error!r}"


def find_checkpoint(output_dir: Path, which: str) -> Path | None:
    """The checkpoint to resume from: the newest whole one for "latest" (None if there is none), else the one named.

    Args:
        which: "latest", the name of a checkpoint in `output_dir`, or a path.

    Raises:
        InputError: the named checkpoint is absent (DF185) or damaged (DF310); it is never replaced by another.
    """
    if which == "latest":
        for checkpoint in reversed(list_checkpoints(output_dir)):
            wrong = what_is_wrong(checkpoint)
            if wrong is None:
                return checkpoint
            logger.warning(f"skipping {checkpoint.name}: {wrong}")
        return None
    checkpoint = next((p for p in (output_dir / which, Path(which)) if p.is_dir()), None)
    if checkpoint is None:
        names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        raise InputError(
            f"DF185 --resume_from_checkpoint {which}: no such checkpoint in {output_dir}; there are: {names}"
        )
    wrong = what_is_wrong(checkpoint)
    if wrong:
        raise InputError(f"DF310 --resume_from_checkpoint {which}: {wrong}; choose another or 'latest'")
    return checkpoint


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The optimizer's tensors and the JSON state of a checkpoint."""
    return load_file(checkpoint / OPTIMIZER_FILE), json.loads((checkpoint / STATE_FILE).read_text())


def check_identity(saved: dict, now: dict) -> None:
    """Raises InputError (DF320), with each difference, unless a run resumes with the options it began with."""
    changed = [k for k in sorted(saved.keys() | now.keys()) if saved.get(k) != now.get(k)]
    if changed:
        raise InputError(
            *(
                f"DF320 {k}: the checkpoint was made with {saved.get(k)!r}, this run has {now.get(k)!r}"
                for k in changed
            ),
            "Resume with the options of the checkpoint, or start anew in another --output_dir.",
        )
