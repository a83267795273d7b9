"""Figures of a detector or classifier on test parts, and whether one of two is better.

Each image is one part. A part is good if its mask is empty; a defect is an 8-connected component of a mask.

Shapes: P parts, H, W pixels, S seeds (each one trained detector). Scores are higher where a defect is more likely;
masks are True inside the defect. Boxes are (left, top, right, bottom).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.metrics import accuracy_score, confusion_matrix_at_thresholds, f1_score, roc_auc_score

from defectfill_dataset import Box
from defectfill_dataset.masks import components


EIGHT_CONNECTED = np.ones((3, 3))


class Region(NamedTuple):
    part: int
    box: Box
    area: int  # pixels


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def pixel_figures(scores: np.ndarray, masks: np.ndarray, pro_limit: float = 0.3) -> dict[str, float]:
    """Average precision, AUROC and greatest F1 over all pixels, and PRO; all exact, over all thresholds.

    PRO: the share of a defect that is found, averaged over the defects, as a function of the false positive rate over
    all pixels outside defects; its area up to `pro_limit`, divided by `pro_limit`.

    Source: Bergmann et al., MVTec AD, IJCV 2021 (PRO).

    Args:
        scores: (P, H, W), finite.
        masks: (P, H, W) bool.
        pro_limit: in (0, 1].

    Raises:
        ValueError: no defect, or no pixel outside the defects; arrays that do not fit each other.
    """
    _check(scores, masks)
    if not 0 < pro_limit <= 1:
        raise ValueError(f"pro_limit is {pro_limit}: it must be above 0 and at most 1")
    if not masks.any():
        raise ValueError("pixel figures are undefined: no image has a defect")
    if masks.all():
        raise ValueError("pixel figures are undefined: no pixel lies outside the defects")
    weights = np.full(masks.shape, 1 / (~masks).sum())
    for part, mask in enumerate(masks):
        labels, _ = ndimage.label(mask, EIGHT_CONNECTED)
        weights[part][mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
    defect, score = masks.ravel(), scores.ravel()
    _, false, missed, true, _ = confusion_matrix_at_thresholds(defect, score)
    _, false_rate, _, overlap, _ = confusion_matrix_at_thresholds(defect, score, sample_weight=weights.ravel())
    return {
        "pixel_ap": float(_average_precision(true, false)),
        "pixel_auroc": _area(false / false[-1], true / true[-1]),
        "pixel_f1_max": float((2 * true / (2 * true + false + missed)).max()),
        "pro": _area(false_rate / false_rate[-1], overlap / overlap[-1], pro_limit),
    }


def _check(scores: np.ndarray, masks: np.ndarray) -> None:
    if scores.ndim != 3 or scores.shape != masks.shape:
        raise ValueError(f"scores {scores.shape} and masks {masks.shape} must both be (parts, height, width)")
    if masks.dtype != bool:
        raise ValueError(f"masks are {masks.dtype}: they must be bool")
    if not np.isfinite(scores).all():
        raise ValueError("some scores are not finite")


def _average_precision(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """From the (..., thresholds) numbers of true and false positives, from the highest threshold to the lowest.

    NaN where there is no defect.
    """
    precision = true / np.maximum(true + false, 1)
    total = np.where(true[..., -1] > 0, true[..., -1], np.nan)
    return (np.diff(true, prepend=0) * precision).sum(axis=-1) / total


def _area(x: np.ndarray, y: np.ndarray, limit: float = 1.0) -> float:
    """The mean of y for x from 0 to `limit`, where (x, y) are the corners of a curve that starts at (0, 0)."""
    x, y = np.append(0, x), np.append(0, y)
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


# ---------------------------------------------------------------------------------------------------------------------
# Parts and defects


def part_figures(scores: np.ndarray, masks: np.ndarray, false_alarms: float = 0.01) -> dict[str, float | int | None]:
    """Image AUROC, and what is missed at a share of false alarms.

    The score of a part is the greatest of its map. The threshold is the lowest at which at most `false_alarms` of the
    good parts score above it; with fewer than 1 / `false_alarms` good parts, that is the highest score of a good one.
    A defect is found if one of its pixels scores above the threshold.

    Returns:
        image_auroc, threshold, missed (share of the defects), smallest_found (pixels of the smallest defect that is
        found; None if none is).

    Raises:
        ValueError: no good part or no defect; arrays that do not fit each other.
    """
    part_scores, good, defects, peaks = _table(scores, masks)
    threshold = _alarm_threshold(part_scores[good], false_alarms)
    found = [defect.area for defect, peak in zip(defects, peaks) if peak > threshold]
    return {
        "image_auroc": float(roc_auc_score(~good, part_scores)),
        "threshold": threshold,
        "missed": 1 - len(found) / len(defects),
        "smallest_found": min(found, default=None),
    }


def missed_defects(scores: np.ndarray, masks: np.ndarray, threshold: float) -> list[Region]:
    """The defects without a pixel above the threshold."""
    _check(scores, masks)
    defects = _regions(masks)
    return [defect for defect, peak in zip(defects, _peaks(scores, masks)) if peak <= threshold]


def false_finds(scores: np.ndarray, masks: np.ndarray, threshold: float) -> list[Region]:
    """The 8-connected regions above the threshold that share no pixel with a defect."""
    _check(scores, masks)
    found = scores > threshold
    return [region for region, touched in zip(_regions(found), _peaks(masks, found)) if not touched]


def _regions(masks: np.ndarray) -> list[Region]:
    """The components of all masks, in order."""
    return [
        Region(part, (left, top, left + region.shape[1], top + region.shape[0]), int(region.sum()))
        for part, mask in enumerate(masks)
        for left, top, region in components(mask)
    ]


def _peaks(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(regions,) the greatest value in each component of the masks, in the order of `_regions`."""
    return np.array(
        [
            values[part, top : top + region.shape[0], left : left + region.shape[1]][region].max()
            for part, mask in enumerate(masks)
            for left, top, region in components(mask)
        ]
    )


def _table(scores: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Region], np.ndarray]:
    """(P,) scores of the parts, (P,) whether each is good, the defects and their greatest scores."""
    _check(scores, masks)
    good = ~masks.any(axis=(1, 2))
    if not good.any():
        raise ValueError("part figures are undefined: no part is good (has an empty mask)")
    if good.all():
        raise ValueError("part figures are undefined: no part has a defect")
    return scores.max(axis=(1, 2)), good, _regions(masks), _peaks(scores, masks)


def _alarm_threshold(good_scores: np.ndarray, false_alarms: float) -> float:
    if not 0 <= false_alarms < 1:
        raise ValueError(f"false_alarms is {false_alarms}: it must be at least 0 and below 1")
    return float(np.sort(good_scores)[-1 - int(_allowed_alarms(len(good_scores), false_alarms))])


def _allowed_alarms(good_parts: float | np.ndarray, false_alarms: float) -> float | np.ndarray:
    """How many of so many good parts may score above the threshold."""
    return np.floor(false_alarms * good_parts + 1e-9)  # 0.29 * 100 is a little less than 29


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def class_figures(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean F1 of all classes that are predicted or true.

    Args:
        predicted, true: (P,) names or numbers of classes.

    Raises:
        ValueError: no parts, or different numbers of them.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or predicted.ndim != 1 or not len(true):
        raise ValueError(f"predicted {predicted.shape} and true {true.shape} must both be (parts,), one part or more")
    macro_f1 = f1_score(true, predicted, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(true, predicted)), "macro_f1": float(macro_f1)}


# ---------------------------------------------------------------------------------------------------------------------
# Is one better?

# (R, P) how often each part counts in each of R resamples  ->  (R,) a figure of them; NaN where it is undefined
FigureOfParts = Callable[[np.ndarray], np.ndarray]

DRAWS = 100  # of a resample on which the figure is defined


def paired_bootstrap(
    a: Sequence[FigureOfParts], b: Sequence[FigureOfParts], parts: int, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over seeds of b - a and its 95 % percentile interval, for any figure of a set of parts.

    Each resample draws parts with replacement, the same for all seeds and both arms, and seeds with replacement. One
    on which the figure is undefined (no defect in it, say) is drawn again.

    Args:
        a, b: S figures each, one of each seed.
        parts: P, their number.

    Raises:
        ValueError: numbers of seeds that differ, fewer than 2 parts, a figure that is undefined on all parts or on
            nearly every resample.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"the arms have {len(a)} and {len(b)} seeds: they must have the same, one or more")
    if parts < 2:
        raise ValueError(f"an interval needs 2 parts or more; there are {parts}")

    def differences(times: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """(R,) means over the (R, S) seeds."""
        found = np.stack([of_b(times) - of_a(times) for of_a, of_b in zip(a, b)], axis=1)
        return np.take_along_axis(found, seeds, axis=1).mean(axis=1)

    difference = float(differences(np.ones((1, parts)), np.arange(len(a))[None])[0])
    if not np.isfinite(difference):
        raise ValueError("the figure is undefined on all parts together")
    rng, drawn = np.random.default_rng(seed), np.full(resamples, np.nan)
    for _ in range(DRAWS):
        if (again := np.isnan(drawn)).any():
            chosen = rng.integers(parts, size=(again.sum(), parts))
            times = np.stack([np.bincount(row, minlength=parts) for row in chosen]).astype(float)
            drawn[again] = differences(times, rng.integers(len(a), size=(again.sum(), len(a))))
    if np.isnan(drawn).any():
        raise ValueError(f"the figure is undefined on {DRAWS} resamples of the parts in a row")
    low, high = np.quantile(drawn, (0.025, 0.975))
    return difference, float(low), float(high)


def verdict(low: float, high: float) -> str:
    """What an interval of b - a says of b, for a figure that is better when higher (negate the others)."""
    return "gain" if low > 0 else "loss" if high < 0 else "no gain"


def pixel_ap_of_parts(scores: np.ndarray, masks: np.ndarray, bins: int = 1000) -> FigureOfParts:
    """Pixel AP of any of these parts, for `paired_bootstrap`: fast, and exact to about 1 / `bins`.

    Scores are rounded down to `bins` quantiles of the scores inside defects, where alone AP changes.

    Raises:
        ValueError: no defect; arrays that do not fit each other.
    """
    _check(scores, masks)
    if not masks.any():
        raise ValueError("pixel AP is undefined: no image has a defect")
    steps = np.unique(np.quantile(scores[masks], np.arange(bins) / bins, method="lower"))[::-1]
    places = len(steps) - np.searchsorted(steps[::-1], scores, side="right")  # len(steps): below all defects

    def counts(chosen: np.ndarray) -> np.ndarray:
        """(P, bins) pixels of each part in each bin, from the highest scores to the lowest."""
        return np.stack([np.bincount(p[c], minlength=len(steps) + 1)[:-1] for p, c in zip(places, chosen)]).astype(
            float
        )

    true, false = counts(masks), counts(~masks)

    return lambda times: _average_precision((times @ true).cumsum(axis=1), (times @ false).cumsum(axis=1))


def missed_of_parts(scores: np.ndarray, masks: np.ndarray, false_alarms: float = 0.01) -> FigureOfParts:
    """Share of missed defects as in `part_figures`, of any of these parts, for `paired_bootstrap`.

    The threshold is taken from the good parts among them.

    Raises:
        ValueError: no good part or no defect; arrays that do not fit each other.
    """
    part_scores, good, defects, peaks = _table(scores, masks)
    owners = np.array([defect.part for defect in defects])
    good_parts = np.flatnonzero(good)[np.argsort(-part_scores[good])]  # the highest score first

    def figure(times: np.ndarray) -> np.ndarray:
        alarms, of_defects = times[:, good_parts].cumsum(axis=1), times[:, owners]
        allowed = _allowed_alarms(alarms[:, -1:], false_alarms)
        thresholds = part_scores[good_parts[(alarms > allowed).argmax(axis=1)]]
        defined = (alarms[:, -1] > 0) & of_defects.any(axis=1)
        missed = (of_defects * (peaks <= thresholds[:, None])).sum(axis=1)
        return np.where(defined, missed, np.nan) / np.maximum(of_defects.sum(axis=1), 1)

    return figure
