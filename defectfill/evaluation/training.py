"""Trains the detectors of all arms, one after the other or several at once, and keeps their scores and figures.

Shapes: N views, R side.
"""

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from defectfill_dataset import Problem, RunError, derive_seed, file_digest

from ..runs import signals
from ..runs.files import atomic_write, finite, write_json
from ..runs.manifest import SEAL, line_digest
from .arms import Pool
from .detectors import Recipe, classify, main_types, score_maps, train_classifier, train_segmenter
from .figures import class_figures, part_figures, pixel_figures
from .report import Run
from .views import View


class TestSet(NamedTuple):
    """What detectors are tested on.

    Args:
        images: (N, R, R, 3) uint8.
        labels: (N, R, R) uint8, as in a view.
        types: how many defect types there are.
    """

    images: np.ndarray
    labels: np.ndarray
    types: int

    @classmethod
    def of(cls, views: Sequence[View], types: int) -> "TestSet":
        return cls(np.stack([view.image for view in views]), np.stack([view.labels for view in views]), types)


def train_all(
    jobs: Sequence[tuple[Run, Callable[[], Pool]]],
    test_set: TestSet,
    recipe: Recipe,
    seed: int,
    folder: Path,
    workers: int,
) -> Iterator[None]:
    """Trains the detectors of these runs, so many at once in processes of their own; yields after each.

    Raises:
        RunError: one failed, or its process was killed (DF386).
    """
    if workers == 1 or len(jobs) < 2:
        for run, make in jobs:
            yield train_and_test(run, make(), test_set, recipe, seed, folder)
        return
    context, running = multiprocessing.get_context("spawn"), set[Future]()
    pool = ProcessPoolExecutor(workers, context, start_worker, (os.getpid(), cores_each(workers)))
    try:
        with pool:
            for run, make in jobs:
                if len(running) == workers:
                    running = yield from first_done(running)
                running.add(pool.submit(train_and_test, run, make(), test_set, recipe, seed, folder))
            while running:
                running = yield from first_done(running)
    except BrokenProcessPool as error:
        what, fix = "the process of a detector was killed", "run the same command again to go on, with fewer --workers"
        raise RunError(Problem("DF386", f"--workers {workers}", what, fix)) from error


def first_done(running: set[Future]) -> Generator[None, None, set[Future]]:
    """Waits until one ends, yields for each that has, and returns the others; raises what one raised."""
    done, others = wait(running, return_when=FIRST_COMPLETED)
    for one in done:
        yield one.result()
    return others


def cores_each(workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // workers) if hasattr(os, "sched_getaffinity") else 1


def start_worker(parent: int, threads: int) -> None:
    """In a new process: it ends with its parent, and uses so many threads."""
    os.environ[signals.LAUNCHED] = "1"
    signals.end_with_launcher()
    if os.getppid() != parent:  # it ended while this process was loading PyTorch
        os._exit(1)
    torch.set_num_threads(threads)


def train_and_test(run: Run, pool: Pool, test_set: TestSet, recipe: Recipe, seed: int, folder: Path) -> None:
    """Trains the arm's detectors and writes their scores and figures."""
    images, masks = test_set.images, test_set.labels > 0
    seed = derive_seed(seed, "detector", run.seed)  # the same for all arms
    maps = score_maps(train_segmenter(pool, recipe, seed), images, recipe).astype(np.float16)
    if not np.isfinite(maps).all():
        raise RunError(Problem("DF323", run.name, "some of its scores are not finite", "give a lower --learning_rate"))
    figures = pixel_figures(maps.astype(np.float32), masks) | part_figures(maps.astype(np.float32), masks)
    if test_set.types > 1:
        classes = classify(train_classifier(pool, test_set.types, recipe, seed), images, recipe)
        figures |= class_figures(classes, main_types(torch.from_numpy(test_set.labels)).numpy())
    run.file(folder).parent.mkdir(exist_ok=True)
    with atomic_write(folder / f"{run.name}.safetensors") as temporary:
        save_file({"maps": maps}, temporary)
    figures = finite(figures | {"maps_sha256": file_digest(folder / f"{run.name}.safetensors")})
    write_json(run.file(folder), figures | {SEAL: line_digest(figures)})
