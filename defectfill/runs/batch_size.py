"""The largest micro-batch that fits in the device's memory."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from defectfill_dataset import Problem, RunError


logger = logging.getLogger(__name__)


def fit_batch_size(
    accelerator: Accelerator,
    try_batch: Callable[[int], object],
    parameters: dict[str, torch.nn.Parameter],
    wanted: int,
    known: int | None,
) -> int:
    """The micro-batch to train with; sets `accelerator` to accumulate so many that the optimizer step is as wanted.

    It is `wanted`, or the next smaller divisor of it, at most half, until a trial fits; on all processes the smallest.

    Args:
        try_batch: forward and backward pass of a micro-batch of so many samples.
        parameters: those that are trained; the trial leaves no gradient on them.
        known: what an earlier start of the run found; nothing is tried then.

    Raises:
        RunError: a single sample does not fit (DF189).
    """
    size = known or find(try_batch, list(parameters.values()), wanted)
    size = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    if not size:
        what, fix = "a single image does not fit in memory", "use --gradient_checkpointing and --mixed_precision bf16"
        raise RunError(Problem("DF189", "--auto_find_batch_size", what, fix))
    accelerator.gradient_accumulation_steps *= wanted // size
    logger.info(f"Batches of {size}, {accelerator.gradient_accumulation_steps} to an optimizer step")
    return size


def find(try_batch: Callable[[int], object], parameters: list[torch.nn.Parameter], wanted: int) -> int:
    """What fits on this process; 0 if nothing does."""
    size = wanted

    def smaller() -> int:
        nonlocal size
        size = next((n for n in range(size // 2, 0, -1) if wanted % n == 0), 0)
        if not size:
            raise NothingFits
        return size

    def attempt(batch_size: int) -> int:
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]  # of AdamW, which has none yet
        try:
            try_batch(batch_size)
        finally:
            for parameter in parameters:
                parameter.grad = None
            del moments
        return batch_size

    try:
        return find_executable_batch_size(attempt, wanted, smaller)()
    except NothingFits:
        return 0


class NothingFits(Exception):
    """Not even a single sample does."""
