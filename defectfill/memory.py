"""Out of memory on the device: smaller batches, or one thing less, and the work goes on; else a clear end."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from defectfill_dataset import Problem, RunError


logger = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, on any device, or Python found too little memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def in_batches(function: Callable[[Sequence[Item]], Result], items: Sequence[Item], size: int) -> list[Result]:
    """The results of `function` for batches of `items`, in order; half the batch where one does not fit in memory.

    Args:
        size: of a batch, at most.

    Raises:
        Exception: whatever `function` raises, out of memory only if a single item does not fit.
    """
    results, done = [], 0
    while done < len(items):
        batch = items[done : done + size]
        try:
            results.append(function(batch))
            done += len(batch)
            continue
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        # Only here, past the error, are the tensors free that its traceback held.
        clear_device_cache(garbage_collection=True)
        size = len(batch) // 2
        warn_of_size(len(batch), size)
    return results


@functools.cache  # once, not for every image
def warn_of_size(size: int, smaller: int) -> None:
    """Logs what happens, once for each size."""
    logger.warning(f"out of memory with {size} candidates at once: going on with {smaller} (--batch_size)")


@contextmanager
def left_out_if_out_of_memory(what: str) -> Iterator[None]:
    """Around something the work can do without: a warning in its place if it does not fit in memory."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    logger.warning(f"{what} does not fit in memory and is left out")


TRAINING_NEEDS_LESS = (
    "resume the newest checkpoint, if there is one, with --gradient_checkpointing, or start anew with a lower "
    "--train_batch_size (and more --gradient_accumulation_steps) or --resolution"
)
GENERATION_NEEDS_LESS = (
    "free memory and run the same command again, which goes on, or start in a new folder with a lower --batch_size or "
    "--resolution"
)


@contextmanager
def told_if_out_of_memory(fix: str) -> Iterator[None]:
    """Around a whole command; `fix` says what needs less memory, and how to go on.

    Raises:
        RunError: out of memory (DF331).
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        what = f"out of memory ({str(error)[:200] or type(error).__name__})"
        raise RunError(Problem("DF331", "", what, fix), alone=True) from error
