"""The batches of a run, whatever happens to the processes that load them."""

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch.utils.data import DataLoader, Dataset, default_collate

from defectfill_dataset import Problem

from .signals import StopSignal


DEAD_WORKER = re.compile(r"DataLoader worker \(pid")  # not "Caught ValueError in DataLoader worker process 0"


def load_batches(
    samples: Dataset, schedule: Sequence[list[tuple]], workers: int, stop: StopSignal
) -> Iterator[tuple[list[tuple], dict]]:
    """(keys, batch) of each micro-batch of the schedule, loaded by so many worker processes, or with 0 by a thread.

    If a worker is killed, `stop` is told, so that the run ends with a checkpoint, and the batches until then are
    loaded here: each depends on its keys alone, so they are the same.
    """

    def load(keys: list[tuple]) -> dict:
        return default_collate([samples[key] for key in keys])

    if not workers:
        yield from zip(schedule, ahead(load, schedule))
        return
    loader = iter(DataLoader(samples, batch_sampler=schedule, num_workers=workers))
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler raises wherever the main thread is, be it in the middle of the optimizer's step. Without it
        # a worker's death is noticed when its batch is waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    done = 0
    for keys in schedule:
        try:
            batch = next(loader)
        except RuntimeError as error:
            if not DEAD_WORKER.search(str(error)):
                raise
            what = f"a process that loads images was killed, often for lack of memory ({error})"
            stop.end_with(Problem("DF327", f"--dataloader_num_workers {workers}", what))
            break
        yield keys, batch
        done += 1
    del loader
    for keys in schedule[done:]:
        yield keys, load(keys)


def ahead(work: Callable, items: Sequence) -> Iterator:
    """The results of `work` on each of the items; a thread does the next while one is used."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = None
        for item in items:
            result, upcoming = upcoming, thread.submit(work, item)
            if result:
                yield result.result()
        if upcoming:
            yield upcoming.result()
