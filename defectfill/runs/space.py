"""Room on the disk: what a run will write is known before it starts, of a generation roughly."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from defectfill_dataset import InputError, Problem, open_image

from .checkpoint import list_checkpoints
from .report import CELL


HEADER = 400  # bytes that a file takes for each tensor beside its numbers, at most
QMAP = 1024  # bytes of the table of an 8-bit moment's values
LINE = 400  # bytes of a step in the log of losses
RECORDS = 2**20  # bytes of records, card and logs


def check_space(
    output_dir: Path,
    matrices: Sequence[int],
    use_8bit_adam: bool,
    steps: range,
    checkpointing_steps: int,
    checkpoints_total_limit: int | None,
    validation_steps: int,
    image_size: int,
) -> None:
    """Checks that the disk has room for all that a run will write.

    Args:
        matrices: elements of each LoRA matrix, which is written in fp32.
        use_8bit_adam: matrices of 4096 elements and more have moments of a byte each, with scales and a table.
        steps: left to train, counted from 0.
        checkpoints_total_limit: for a moment there is one more: the oldest is deleted once the newest is complete. The
            best by validation defects, which may be older still, is not counted.
        validation_steps: 0 for none.
        image_size: pixels of a validation image, RGB.

    Raises:
        InputError: there is too little room (DF325).
    """
    lora = sum(4 * n + HEADER for n in matrices)
    eight_bit = [n for n in matrices if use_8bit_adam and n >= 4096]
    moments = 2 * lora + sum(HEADER + 2 * QMAP - 2 * (3 * n - n // 64) for n in eight_bit)
    checkpoints = steps.stop // checkpointing_steps - steps.start // checkpointing_steps
    checkpoints += steps.stop % checkpointing_steps > 0
    if checkpoints_total_limit is not None:
        more = checkpoints_total_limit + 1 - len(list_checkpoints(output_dir))
        checkpoints = min(checkpoints, max(1, more))
    images = steps.stop // validation_steps - steps.start // validation_steps if validation_steps else 0
    needed = {
        "LoRA": lora,
        f"checkpoints ({checkpoints})": checkpoints * (lora + moments),
        f"validation images ({images})": images * 3 * image_size,
        "records": RECORDS + LINE * len(steps),
    }
    check_room(output_dir, needed, "keep fewer checkpoints with --checkpoints_total_limit")


def check_generation_space(output_dir: Path, source_files: Sequence[Path], num_candidates: int) -> None:
    """Checks that the disk has room for the images that are left to generate, about as large as without compression.

    Args:
        source_files: the good image of each.

    Raises:
        InputError: there is too little room (DF325).
    """
    pixels, number = dict.fromkeys(source_files, 0), len(source_files)
    for file in pixels:
        with suppress(OSError):  # it is named when its turn comes
            width, height = open_image(file).size
            pixels[file] = width * height
    total = sum(pixels[file] for file in source_files)
    needed = {
        f"images ({number})": 3 * total,
        "masks": 2 * total // 8,  # two of each image, black and white
        "contact rows": number * (num_candidates + 2) * 3 * CELL**2,
        "records": RECORDS + 10 * LINE * number,
    }
    check_room(output_dir, needed, "generate fewer images")


def check_room(output_dir: Path, needed: dict[str, int], less: str) -> None:
    """Raises InputError (DF325) if the disk has less room than the bytes `needed`; `less` says how to need fewer."""
    free, total = shutil.disk_usage(output_dir).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{what} {size / 2**20:.1f}" for what, size in needed.items() if size)
        what = f"the run will write {total / 2**20:.1f} MiB ({parts}), and {free / 2**20:.1f} MiB are free"
        raise InputError(
            Problem("DF325", f"--output_dir {output_dir}", what, f"make room, {less}, or choose another disk")
        )
