"""What a training run tells while it runs: log lines, and numbers and images for trackers."""

import logging
from pathlib import Path

import datasets
import diffusers
import numpy as np
import transformers
from accelerate import Accelerator
from PIL import Image

from defectfill_dataset import commands


logger = logging.getLogger(__name__)


def start_logging(accelerator: Accelerator) -> None:
    """Log lines of the main process of each machine, errors of all; of libraries, errors only."""
    commands.start_logging(logging.INFO if accelerator.is_local_main_process else logging.ERROR)
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()


def start_trackers(accelerator: Accelerator, folder: Path, config: dict) -> None:
    """Starts the trackers, which write into `folder`, and gives them the options of the method."""
    if accelerator.log_with:
        folder.mkdir(exist_ok=True)
    accelerator.init_trackers("defectfill", config=config, init_kwargs={"wandb": {"dir": str(folder)}})


def log_measures(measures: dict) -> None:
    """Logs the measures of the training images before and after training, and the errors of x_0."""
    changes = (f"{k} {measures['before'][k]:.4f} -> {measures['after'][k]:.4f}" for k in ("loss", "attention_iou"))
    logger.info(f"On the training images: {', '.join(changes)}")
    for when, images in (("after", "training images"), ("held_out", "held-out images")):
        if found := measures[when]:
            by_pass = {name: errors for name, errors in found["x0_error"].items() if name != "variance"}
            shown = (f"{name} {' '.join(f'{x:.2f}' for x in errors.values())}" for name, errors in by_pass.items())
            times = " ".join(next(iter(by_pass.values())))
            logger.info(f"Error of x_0 inside the mask, {images}, t = {times}: {', '.join(shown)} prompt")
    if validation := measures["validation"]:
        logger.info(f"Best step by the error of x_0 on the validation defects: {validation['best_step']}")


def log_terms(accelerator: Accelerator, terms: dict, step: int) -> None:
    """Sends a step's numbers to every tracker; one that cannot write them is left out from then on."""
    for tracker in [*accelerator.trackers]:
        try:
            tracker.log(terms, step=step)
        except OSError as error:
            logger.warning(f"{tracker.name} cannot be written ({error}); nothing more is logged there")
            accelerator.trackers.remove(tracker)


def end_training(accelerator: Accelerator) -> None:
    """Ends trackers and the group of processes."""
    for tracker in [*accelerator.trackers]:
        try:
            tracker.finish()
        except OSError as error:
            logger.warning(f"{tracker.name} cannot be written ({error})")
        accelerator.trackers.remove(tracker)
    accelerator.end_training()


def log_image(trackers: list, image: Image.Image, step: int) -> None:
    """Sends the image to every tracker that takes images."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(image)[None]}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [image]}, step)
