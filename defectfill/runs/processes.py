"""The processes of a run: how they may be launched, and what they must agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from defectfill_dataset import InputError, Problem

from .checkpoint import differing_keys
from .files import exclusive_lock


T = TypeVar("T")

# Launches that split what each process must have whole.
SPLITTING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
ACCUMULATION, PRECISION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"


def check_launch(training: bool) -> None:
    """Refuses what accelerate was told in the environment if it cannot work; before accelerate itself begins.

    Args:
        training: in several processes on the CPU only if asked to, as accelerate does; generation shares it anyway.

    Raises:
        InputError: a launch that splits the model (DF188), fewer GPUs than processes (DF189), a number of
            micro-batches that is none (DF187).
    """
    for variable, name in SPLITTING.items():
        if parse_flag_from_env(variable):
            what = f"{name} splits weights and optimizer over the processes, but each must hold its whole LoRA"
            fix = "launch with --multi_gpu: the frozen model fits one GPU, and only the LoRA has an optimizer"
            raise InputError(Problem("DF188", f"accelerate launch ({variable})", what, fix))
    steps = os.environ.get(ACCUMULATION, "1")
    if training and not (steps.isdecimal() and int(steps)):
        raise InputError(Problem("DF187", f"{ACCUMULATION}={steps}", "must be a number of at least 1"))
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > max(1, gpus) and (training or gpus) and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        what = f"{processes} processes were launched, but there are {gpus} GPUs"
        fix = "launch one for each GPU, one alone without a GPU, or set ACCELERATE_USE_CPU=true to use the CPU"
        raise InputError(Problem("DF189", "accelerate launch --multi_gpu", what, fix))


def launch_environment() -> dict[str, str]:
    """What the environment tells accelerate, for the record."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("ACCELERATE_")}


def launch_notes(accumulation_steps: int, mixed_precision: str | None, accelerator: Accelerator) -> list[str]:
    """A line for each of these flags that the environment contradicts, with the value that counts; `slow_precision`'s.

    The launcher always names a precision, and "no" where nobody asked for one: that contradicts nothing.
    """
    lines, steps, precision = [], os.environ.get(ACCUMULATION), os.environ.get(PRECISION, "no")
    if steps and int(steps) != accumulation_steps:
        lines.append(f"{ACCUMULATION}={steps} is used, not --gradient_accumulation_steps {accumulation_steps}")
    if mixed_precision and precision not in ("no", mixed_precision):
        lines.append(f"--mixed_precision {mixed_precision} is used, not {PRECISION}={precision}")
    return lines + slow_precision(accelerator.mixed_precision, accelerator.device)


def slow_precision(precision: str, device: torch.device) -> list[str]:
    """A line if it is a half precision that this CPU emulates: there a convolution takes some 60 times as long."""
    if precision == "no" or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return []
    support = {"bf16": "_is_mkldnn_bf16_supported", "fp16": "_is_mkldnn_fp16_supported"}[precision]
    if getattr(torch.ops.mkldnn, support)():
        return []
    return [
        f"--mixed_precision {precision} is many times slower than no on this CPU, which has no instructions for it"
    ]


def from_main_process(read: Callable[[], T], is_main_process: bool) -> T:
    """What `read` returns on the main process, on every process; what it raises there is raised on all."""
    found: list = [None, None]
    if is_main_process:
        try:
            found[0] = read()
        except Exception as error:  # whatever it is, the others must not wait for a result
            found[1] = error
    result, error = broadcast_object_list(found)
    if error is not None:
        raise error
    return result


@contextmanager
def locked_start(folder: Path, start: Callable[[], T], is_main_process: bool) -> Iterator[T]:
    """Yields, on every process, what `start` returns on the main one, which holds the folder's lock until the end.

    What a run decides by the files in its folder, `start` must decide: another run may have changed them before.
    """
    with ExitStack() as held:

        def locked() -> T:
            held.enter_context(exclusive_lock(folder))
            return start()

        yield from_main_process(locked, is_main_process)


def check_same(identity: dict) -> None:
    """Raises InputError (DF322) on every process unless all of them have the same data, base and options."""
    first, *others = gather_object([identity])
    problems = [
        Problem("DF322", key, f"process 0 has {first.get(key)!r}, process {number} {other.get(key)!r}")
        for number, other in enumerate(others, 1)
        for key in differing_keys(first, other)
    ]
    if problems:
        raise InputError(*problems, advice="Give every process the same files, package versions and options.")
