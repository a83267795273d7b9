"""Checkpoints: complete or absent, verified before use, safetensors and JSON only."""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from defectfill_dataset import InputError, Problem, RunError
from defectfill_dataset.text import Schema, read_json

from ..lora import LORA_FILE, portable_name, read_lora
from .disks import refuge_in
from .files import TEMPORARY, atomic_write, flush, is_record, rename, write_json


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


class FileEntry(Schema):
    """A file of a checkpoint."""

    bytes: int
    sha256: str


class ManifestFile(Schema):
    """The files of a checkpoint, by name."""

    step: int
    files: dict[str, FileEntry]


class SchedulerState(Schema):
    """What is used of a learning rate scheduler's state."""

    last_epoch: int
    base_lrs: list[float]
    step_count: int = Field(alias="_step_count")
    last_lr: list[float] = Field(alias="_last_lr")
    lr_lambdas: list[dict | None]


Scalar = Annotated[str, Field(pattern=r"^[^|]+\|[^|]+$")]  # parameter|key, as `_optimizer_state` writes it


class ValidationFigures(Schema):
    """What is used of the figures of a step."""

    mean_x0_error: float | None


Step = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class StateFile(Schema):
    """What a checkpoint holds beside tensors."""

    step: int = Field(ge=0, lt=2**31)
    identity: dict[str, Any]
    optimizer: dict[Scalar, float | bool | str | None]
    lr_scheduler: SchedulerState
    scaler: dict[str, float] | None = None
    train_batch_size: int | None = Field(None, ge=1, le=10_000)
    validation: dict[Step, ValidationFigures] = {}


def save_checkpoint(
    output_dir: Path,
    state: dict,
    write_weights: Callable[[Path], None],
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
    total_limit: int | None,
    fallback: Path | None = None,
    best_step: int | None = None,
) -> Path | None:
    """Writes `checkpoint-<step>`, then deletes the oldest beyond `total_limit`; returns it, None if it failed.

    Everything goes to a temporary folder with a manifest of sizes and sha256, is flushed, and only then renamed: a
    kill at any instant leaves each checkpoint complete or absent. A full disk costs this checkpoint, not the run.

    Args:
        state: JSON content of the caller, with `step` and `identity`.
        write_weights: writes what is trained into the folder it is given.
        parameters: what the optimizer trains, by name.
        total_limit: how many checkpoints to keep, None for all.
        fallback: if `output_dir` cannot be written, the checkpoint goes to a new folder in this one.
        best_step: its checkpoint is never deleted.

    Raises:
        RunError: a weight or a number of the optimizer is not finite (DF323); nothing is written.
    """
    tensors, scalars = _optimizer_state(optimizer, parameters)
    stop_if_broken(output_dir, state["step"], parameters | tensors)
    state = state | {"optimizer": scalars, "lr_scheduler": lr_scheduler.state_dict()}
    state["scaler"] = scaler.state_dict() if scaler else None
    written = _write_checkpoint(output_dir, state, write_weights, tensors)
    if not written and fallback:
        refuge = refuge_in(fallback, output_dir)
        with suppress(OSError):
            refuge.mkdir(parents=True)
        return _write_checkpoint(refuge, state, write_weights, tensors)
    if written and total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            if old.name == f"checkpoint-{best_step}":
                continue
            try:
                _discard(old)
            except OSError as error:
                logger.warning(f"{old.name} could not be deleted ({error})")
    return written


def stop_if_broken(output_dir: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises RunError (DF323) if a number in one of these tensors is not finite."""
    broken = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        state, advice = last_checkpoint(output_dir)
        what = f"weights or moments of AdamW are not finite in {len(broken)} tensors, {broken[0]} first; {state}"
        fix = "lower --learning_rate or --max_grad_norm in a new run"
        raise RunError(Problem("DF323", f"step {step}", what, f"{fix}, or {advice}"))


def _write_checkpoint(
    output_dir: Path, state: dict, write_weights: Callable[[Path], None], tensors: dict[str, torch.Tensor]
) -> Path | None:
    """The checkpoint, written to `output_dir`; None, with a warning, if that cannot be."""
    step = state["step"]
    temporary = output_dir / f"{TEMPORARY}checkpoint-{step}"
    final = output_dir / f"checkpoint-{step}"
    try:
        temporary.mkdir()
        write_weights(temporary)
        with atomic_write(temporary / OPTIMIZER_FILE) as file:
            save_file(tensors, file)
        write_json(temporary / STATE_FILE, state)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"schema": 1, "step": step, "files": files})
        for name in files:
            flush(temporary / name)
        flush(temporary)
        if final.exists():
            _discard(final)
        rename(temporary, final)
        flush(output_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        logger.warning(f"{final} could not be written ({error}); earlier checkpoints are kept")
        return None
    return final


def _optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict) -> tuple[dict, dict]:
    """The optimizer's state by parameter name: its tensors, and everything else as JSON can hold it."""
    tensors, scalars = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}|{key}"] = value.detach().cpu().clone().contiguous()  # 8-bit Adam shares some
            else:
                scalars[f"{name}|{key}"] = value
    return tensors, scalars


def _discard(folder: Path) -> None:
    trash = folder.with_name(f"{TEMPORARY}trash-{folder.name}")
    rename(folder, trash)  # at once out of sight: no half-deleted checkpoint is ever listed
    shutil.rmtree(trash, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-<step>, by step."""
    found = [f for f in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name) and f.is_dir()]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))


def archive_newer_checkpoints(output_dir: Path, step: int) -> None:
    """Renames the checkpoints after `step`, where a run resumes: it will redo their steps, or they are damaged."""
    for checkpoint in list_checkpoints(output_dir):
        if int(checkpoint.name.split("-")[1]) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.old")
            if aside.exists():
                _discard(aside)
            rename(checkpoint, aside)
            logger.warning(f"{checkpoint.name} is newer than the resumed step; renamed to {aside.name}")


def verify_checkpoint(checkpoint: Path) -> str | None:
    """Returns why a checkpoint cannot be used, or None if every file matches its manifest."""
    try:
        manifest = read_json(checkpoint / MANIFEST, ManifestFile)
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                return f"its manifest names '{name}'"
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                return f"{name} is not what was written"
        if f"checkpoint-{manifest['step']}" != checkpoint.name:
            return f"its manifest is of step {manifest['step']}"
        missing = {OPTIMIZER_FILE, STATE_FILE} - manifest["files"].keys()
        return f"no {', '.join(sorted(missing))}" if missing else None
    except InputError as error:
        return f"its manifest {error.problems[0].what}"
    except OSError as error:
        return f"a file cannot be read: {error}"


def find_checkpoint(output_dir: Path, which: str) -> Path | None:
    """The checkpoint to resume from: the newest sound one for "latest" (None if there is none), else the one named.

    Args:
        which: "latest", the name of a checkpoint in `output_dir`, or a path.

    Raises:
        InputError: the named checkpoint is absent (DF185) or damaged (DF310); it is never replaced by another.
    """
    if which == "latest":
        for checkpoint in reversed(list_checkpoints(output_dir)):
            wrong = verify_checkpoint(checkpoint)
            if wrong is None:
                return checkpoint
            logger.warning(f"skipping {checkpoint.name}: {wrong}")
        return None
    checkpoint = next((p for p in (output_dir / which, Path(which)) if p.is_dir()), None)
    if checkpoint is None:
        names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
        what = f"no such checkpoint in {output_dir}"
        raise InputError(Problem("DF185", f"--resume_from_checkpoint {which}", what, f"there are: {names}"))
    wrong = verify_checkpoint(checkpoint)
    if wrong:
        raise InputError(Problem("DF310", f"--resume_from_checkpoint {which}", wrong, "choose another or 'latest'"))
    return checkpoint


def last_checkpoint(output_dir: Path) -> tuple[str, str]:
    """What to say of the newest sound checkpoint when a run ends in an error, and how to go on from it."""
    checkpoint = find_checkpoint(output_dir, "latest")
    if checkpoint is None:
        return "no checkpoint was written", "start again in another --output_dir"
    return f"{checkpoint.name} is good", "run the same command with --resume_from_checkpoint latest"


def how_to_resume(checkpoint: Path | None, output_dir: Path) -> str:
    """What to say of the checkpoint that was, or could not be, written as a run stops."""
    if checkpoint is None:
        return f"its checkpoint could not be written; {', '.join(last_checkpoint(output_dir))}"
    which = "latest" if checkpoint.parent == output_dir else checkpoint
    return f"resume with --resume_from_checkpoint {which}"


def check_complete(
    output_dir: Path, results: Path, failure: OSError | None, failed: Sequence[str], total_limit: int | None
) -> None:
    """Raises RunError unless a run left all that was asked for in `output_dir`.

    Args:
        results: where they are, and `failure` why (DF324).
        failed: checkpoints and files that could not be written (DF326); a checkpoint that would have been deleted by
            now is not missing.
    """
    there = {checkpoint.name for checkpoint in list_checkpoints(output_dir)}
    wanted = there.union(name for name in failed if name.startswith("checkpoint-"))
    kept = sorted(wanted, key=lambda name: int(name.split("-")[1]))[-total_limit if total_limit else 0 :]
    missing = ", ".join(name for name in failed if name in kept or name not in wanted)
    if failure:
        what = f"the results cannot be written ({failure}); they are complete, and in {results}"
        raise RunError(Problem("DF324", output_dir, what, "make room on the disk, and move them"))
    if missing:
        what = f"could not be written: {missing}; the results are complete"
        raise RunError(Problem("DF326", output_dir, what, "see the warnings above"))


@contextmanager
def last_save(output_dir: Path) -> Iterator[None]:
    """Around the writing of the results.

    Raises:
        RunError: they cannot be written (DF324).
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        state, advice = last_checkpoint(output_dir)
        what = f"the results cannot be written ({error}); {state}"
        raise RunError(Problem("DF324", output_dir, what, f"make room on the disk, then {advice}")) from error


RESULTS = (LORA_FILE, "README.md")
RECORDS = ("split.json", "run_record.json", "losses.jsonl", "validation")


def is_run(output_dir: Path) -> bool:
    """Whether a run of ours has started in the folder: its record says so, which is written first."""
    return is_record(output_dir / "run_record.json", "options", "data_sha256", "versions")


def in_the_way(output_dir: Path) -> list[str]:
    """What a new run would write over: an earlier run's checkpoints or results, or files of something else."""
    names = RESULTS if is_run(output_dir) else RESULTS + RECORDS
    found = [checkpoint.name for checkpoint in list_checkpoints(output_dir)]
    return found + [name for name in names if (output_dir / name).exists()]


def occupied(output_dir: Path, found: list[str], resuming: bool) -> Problem:
    """The problem of a folder that holds what `in_the_way` found."""
    names = ", ".join(found[:4])
    what, fix = f"holds an earlier run or other files ({names})", "choose another folder"
    if resuming:
        what = f"holds an earlier run without a usable checkpoint, or other files ({names})"
    elif found[0].startswith("checkpoint-"):
        fix = "resume the run with --resume_from_checkpoint latest, or choose another folder"
    return Problem("DF186", f"--output_dir {output_dir}", what, fix)


def check_unoccupied(output_dir: Path, which: str | None) -> None:
    """Raises InputError (DF186) if `find_resume` will refuse the folder's files; before anything is written there."""
    found = in_the_way(output_dir)
    if found and not (which and found[0].startswith("checkpoint-")):
        raise InputError(occupied(output_dir, found, bool(which)))


# Options that the first versions of training did not have, with the values that make it train as they did.
BEFORE = {
    "auto_find_batch_size": False, "cache_latents": 0, "channels_last": False, "conv_rank": None,
    "high_noise_power": 0.0, "lora_targets": "attention", "noise_offset": 0.0, "prompt_noise": 0.0, "snr_gamma": None,
    "timestep_bias_begin": 0, "timestep_bias_end": 1000, "timestep_bias_multiplier": 1.0,
    "timestep_bias_portion": 0.25, "timestep_bias_strategy": "none", "torch_compile": False,
}  # fmt: skip


def find_resume(output_dir: Path, which: str | None, identity: dict, max_train_steps: int) -> Path | None:
    """The checkpoint to resume, if it was made with the same options; None to start from scratch.

    Raises:
        InputError: `output_dir` holds an earlier run that is not, or cannot be, resumed (DF186), options differ
            (DF320), or the checkpoint lies behind the last step (DF321).
    """
    checkpoint = find_checkpoint(output_dir, which) if which else None
    if checkpoint is None or not (checkpoint.parent.samefile(output_dir) or is_run(output_dir)):
        if found := in_the_way(output_dir):
            raise InputError(occupied(output_dir, found, bool(which)))
    if checkpoint is None:
        if which:
            logger.info("No checkpoint to resume from: starting a new run")
        return None
    state = read_json(checkpoint / STATE_FILE, StateFile, "DF310")
    check_identity(BEFORE | state["identity"], identity)
    if state["step"] > max_train_steps:
        what = f"the checkpoint is already at step {state['step']}"
        raise InputError(Problem("DF321", f"--max_train_steps {max_train_steps}", what))
    logger.info(f"Resuming from {checkpoint.name}")
    return checkpoint


class Saved(NamedTuple):
    """What a checkpoint holds, read."""

    state: dict
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]  # the optimizer's tensors, by the names of `_optimizer_state`


def load(checkpoint: Path, weights: dict[str, torch.Tensor] | None = None) -> Saved:
    """Reads a checkpoint's files; `weights` where it is not a LoRA that is trained.

    Raises:
        InputError: one of them cannot be read (DF310).
    """
    state = read_json(checkpoint / STATE_FILE, StateFile, "DF310")
    try:
        moments = {name: tensor.clone() for name, tensor in load_file(checkpoint / OPTIMIZER_FILE).items()}
    except SafetensorError as error:
        raise InputError(Problem("DF310", checkpoint / OPTIMIZER_FILE, str(error), "choose another")) from error
    # Cloned, or the file would stay mapped, and in use.
    return Saved(state, read_lora(checkpoint).tensors if weights is None else weights, moments)


@torch.no_grad()
def restore(
    saved: Saved,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler | None,
) -> dict:
    """Puts weights, moments, learning rates and loss scale back; returns the caller's state.

    Raises:
        InputError: the checkpoint is of other parameters (DF310).
    """
    state = saved.state
    states = {tuple(name.split("|")): value for name, value in {**saved.moments, **state["optimizer"]}.items()}
    states = {(portable_name(name) or name, key): value for (name, key), value in states.items()}  # peft's, if older
    wrong = [name for name, _ in states if name not in parameters]
    wrong += [
        name for name, p in parameters.items() if name not in saved.weights or saved.weights[name].shape != p.shape
    ]
    scheduler = {key: state["lr_scheduler"][key] for key in lr_scheduler.state_dict() if key in state["lr_scheduler"]}
    groups = {len(scheduler[key]) for key in ("base_lrs", "_last_lr", "lr_lambdas")}
    if wrong or groups != {len(optimizer.param_groups)}:
        what = f"is of other parameters than those that are trained: {', '.join(wrong[:1]) or 'of their groups'}"
        raise InputError(Problem("DF310", "--resume_from_checkpoint", what, "choose another checkpoint"))
    for name, parameter in parameters.items():
        parameter.copy_(saved.weights[name])
    optimizer.state.clear()
    fused = bool(optimizer.param_groups[0].get("fused"))
    for (name, key), value in states.items():
        on_device = torch.is_tensor(value) and (key != "step" or fused)  # plain AdamW counts its steps on the CPU
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device) if on_device else value
    lr_scheduler.load_state_dict(scheduler)
    for group, lr in zip(optimizer.param_groups, lr_scheduler.get_last_lr()):
        group["lr"] = lr
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state


def differing_keys(one: dict, other: dict) -> list[str]:
    """The keys in which the identities of two runs differ, sorted.

    A base in a folder is compared by content, wherever it lies; by its path where the digest was not yet recorded.
    """
    by_content = one.get("base_sha256") and other.get("base_sha256")
    ignored = "base" if by_content else "base_sha256"
    return [key for key in sorted((one.keys() | other.keys()) - {ignored}) if one.get(key) != other.get(key)]


def as_json(options: dict) -> dict:
    """The options, paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def keep_options(file: Path, options: dict, may_change: Sequence[str] = (), may_lack: bool = False) -> None:
    """Writes the options of a run that goes on where it was killed.

    Args:
        may_change: options that decide no result.
        may_lack: whether an earlier version may have written fewer.

    Raises:
        InputError: the file holds others (DF320), or no options (DF310).
    """
    if file.exists():
        before = (options if may_lack else {}) | read_json(file, Schema, "DF310")
        check_identity(*({k: v for k, v in x.items() if k not in may_change} for x in (before, options)))
    write_json(file, options)


def check_identity(saved: dict, now: dict) -> None:
    """Raises InputError (DF320), with each difference, unless a run resumes with the options it began with."""
    changed = differing_keys(saved, now)
    if changed:
        whats = {k: f"the run was started with {saved.get(k)!r}, now it is {now.get(k)!r}" for k in changed}
        if "base_sha256" in whats:
            whats["base_sha256"] = f"{now['base']} has other content than the run was started with"
        raise InputError(
            *(Problem("DF320", k, what) for k, what in whats.items()),
            advice="Resume with the same options, or choose another --output_dir.",
        )
