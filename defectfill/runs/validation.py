"""The figures of the references that are held out to choose a checkpoint by."""

import logging
from collections.abc import Iterable

import numpy as np

from defectfill_dataset.samples import Crop


logger = logging.getLogger(__name__)


def measured_at(step: int, figures: dict | None) -> dict[str, dict]:
    """The figures of a step by its number, with `mean_x0_error`: over all timesteps, with the defect's prompt.

    Args:
        figures: of `measure`; None if nothing was measured here, and then there is nothing to add.
    """
    if figures is None:
        return {}
    mean = round(float(np.mean(list(figures["x0_error"]["defect"].values()))), 4)
    logger.info(f"Step {step}, validation defects: loss {figures['loss']:.4f}, mean error of x_0 {mean:.4f}")
    return {str(step): figures | {"mean_x0_error": mean}}


def best_step(measured: dict[str, dict]) -> int | None:
    """The step with the lowest mean error of x_0, of equal ones the first; None if no error is a number."""
    errors = {int(step): figures["mean_x0_error"] for step, figures in measured.items()}
    known = {step: error for step, error in errors.items() if error is not None and np.isfinite(error)}
    return min(known, key=lambda step: (known[step], step), default=None)


def validation_record(crops: Iterable[Crop], measured: dict[str, dict]) -> dict | None:
    """Which images were held out, what was measured on them by step, and the best step; None without such images."""
    images = sorted({crop.source_file for crop in crops})
    return {"images": images, "steps": measured, "best_step": best_step(measured)} if images else None
