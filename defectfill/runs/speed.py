"""How fast a run was, and how much device memory it took."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field

from defectfill_dataset.text import Schema


SPEED = "speed.json"


class SpeedFile(Schema):
    """What the report shows of `speed.json`."""

    device: str
    processes: int
    images: int
    seconds_per_image: float | None
    peak_memory_bytes: int | None = Field(None, ge=0, lt=2**63)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process took on CUDA, of tensors and as torch reserved it; {} on a CPU."""
    if device.type != "cuda":
        return {}
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(("peak_memory_gib", "peak_reserved_gib"), (round(peak / 2**30, 2) for peak in peaks)))


class StepClock:
    """Wall-clock seconds of each step, from the moment its losses are known to the same moment of the next."""

    WARM_UP = 5  # steps that do not count: kernels are chosen, memory is taken, a model is compiled

    def __init__(self):
        self.steps, self.last, self.seconds = 0, None, []

    def tick(self) -> None:
        """A step's losses are known."""
        now = time.perf_counter()
        self.steps += 1
        if self.last is not None and self.steps > self.WARM_UP:
            self.seconds.append(now - self.last)
        self.last = now

    def interrupt(self) -> None:
        """A checkpoint or a validation came after the step: the time until the next one does not count."""
        self.last = None

    def summary(self, device: torch.device) -> dict:
        """The median, None of a run too short; and `peak_memory`."""
        median = round(statistics.median(self.seconds), 4) if self.seconds else None
        return {"seconds_per_step": median, **peak_memory(device)}


@dataclasses.dataclass
class Speed:
    """The clock of one process that generates; it runs from the start, except while weights are loaded.

    Args:
        images: made.
        first_images, first_seconds: of the first batch, which also compiles, chooses kernels and takes memory.
        peak_memory_bytes: that torch held on the device; None on a CPU.
    """

    device: torch.device
    images: int = 0
    seconds: float = 0.0
    loading_seconds: float = 0.0
    first_images: int = 0
    first_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    began: float = dataclasses.field(default_factory=lambda: time.monotonic())

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Stops the clock for a while."""
        began = time.monotonic()
        yield
        self.loading_seconds += time.monotonic() - began

    def add_batch(self, images: int) -> None:
        """Counts the images of a batch that has been generated."""
        if not self.images:
            self.first_images, self.first_seconds = images, self._now()
        self.images += images

    def finish(self) -> None:
        """Reads the clock when the last file is written."""
        self.seconds = self._now()
        if self.device.type == "cuda":
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device)

    def _now(self) -> float:
        return time.monotonic() - self.began - self.loading_seconds


def summarise(speeds: Sequence[Speed]) -> dict:
    """The content of `speed.json`: of all processes together, in seconds of the slowest and bytes of the greatest.

    `warm_seconds_per_image` leaves the first batch of each process out; None if no process had another.
    """
    device = speeds[0].device
    images, warm = sum(s.images for s in speeds), sum(s.images - s.first_images for s in speeds)
    peaks = [s.peak_memory_bytes for s in speeds if s.peak_memory_bytes is not None]

    def per_image(seconds: float, number: int) -> float | None:
        return round(seconds / number, 4) if number else None

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": len(speeds),
        "images": images,
        "seconds_per_image": per_image(max(s.seconds for s in speeds), images),
        "warm_seconds_per_image": per_image(max(s.seconds - s.first_seconds for s in speeds), warm),
        "first_batch_seconds": round(max(s.first_seconds for s in speeds), 4),
        "loading_seconds": round(max(s.loading_seconds for s in speeds), 4),
        "peak_memory_bytes": max(peaks, default=None),
    }
