"""Figures of detectors against independent computations; the bootstrap."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from defectfill.evaluation import figures


def example(seed=0, parts=6, side=12, levels=None):
    """Noisy scores of parts with two defects each that touch at a corner or lie apart; the first two are good."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((parts, side, side), bool)
    for mask in masks[2:]:
        top, left = rng.integers(0, side - 6, 2)
        mask[top : top + 2, left : left + 3] = mask[top + 4, left : left + 2] = True
        mask[top + 2, left + 3] = True  # joined by a corner
    scores = rng.normal(size=masks.shape) + masks
    return (np.round(scores * levels) if levels else scores), masks


def pro_by_hand(scores, masks, limit):
    """Each threshold by itself: a loop over pixels finds the regions, another adds up the area."""
    regions, seen = [], set()
    for start in zip(*np.nonzero(masks)):
        if start in seen:
            continue
        region, open_ = set(), [start]
        while open_:
            n, y, x = pixel = open_.pop()
            if pixel in region or not (0 <= y < masks.shape[1] and 0 <= x < masks.shape[2]) or not masks[pixel]:
                continue
            region.add(pixel)
            open_ += [(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        seen |= region
        regions.append(region)
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(x) for x in scores.ravel()}, reverse=True):
        found = scores >= threshold
        overlap = sum(sum(found[pixel] for pixel in region) / len(region) for region in regions) / len(regions)
        curve.append(((found & ~masks).sum() / (~masks).sum(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 < limit < x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


# Pixels


@pytest.mark.parametrize("levels", [None, 2])  # 2: many equal scores
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_pro_is_that_of_a_loop_over_all_thresholds(levels, limit):
    scores, masks = example(levels=levels)
    expected = pro_by_hand(scores, masks, limit)
    assert figures.pixel_figures(scores, masks, limit)["pro"] == pytest.approx(expected, abs=1e-9)


def test_pro_of_a_large_and_a_small_defect_weighs_them_alike():
    masks, scores = np.zeros((2, 1, 8, 8), bool)
    masks[0, :4, :4] = masks[0, 7, 7] = True
    scores = masks.astype(float)
    assert figures.pixel_figures(scores, masks)["pro"] == pytest.approx(1)
    scores[0, 7, 7] = -1  # the small one comes after all good pixels: half is found until then
    assert figures.pixel_figures(scores, masks)["pro"] == pytest.approx(0.5)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixel_figures_are_scikit_learns(levels, dtype):
    scores, masks = example(levels=levels)
    scores = scores.astype(dtype)
    found = figures.pixel_figures(scores, masks)
    flat = masks.ravel(), scores.ravel()
    precision, recall, _ = precision_recall_curve(*flat)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert found.keys() == {"pixel_ap", "pixel_auroc", "pixel_f1_max", "pro"}
    assert all(type(value) is float for value in found.values())
    assert found["pixel_ap"] == pytest.approx(average_precision_score(*flat), abs=1e-12)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(*flat), abs=1e-12)
    assert found["pixel_f1_max"] == pytest.approx(f1.max(), abs=1e-12)


def test_a_perfect_detector_and_its_opposite():
    _, masks = example()
    assert list(figures.pixel_figures(masks.astype(float), masks).values()) == pytest.approx([1, 1, 1, 1])
    worst = figures.pixel_figures(-masks.astype(float), masks)
    assert worst["pixel_auroc"] == worst["pro"] == 0 and worst["pixel_ap"] == pytest.approx(masks.mean())


# Parts and defects


def row_of_parts(good, peaks):
    """Parts of one row of 5 pixels; `peaks`: for each bad part the scores of a defect of 1 and of one of 2 pixels."""
    parts = len(good) + len(peaks)
    scores, masks = np.full((parts, 1, 5), -9.0), np.zeros((parts, 1, 5), bool)
    scores[: len(good), 0, 2] = good
    scores[len(good) :, 0, [0, 3]] = peaks
    masks[len(good) :, 0, [0, 3, 4]] = True
    return scores, masks


def test_part_figures_by_hand():
    scores, masks = row_of_parts(good=[1, 2, 3, 4], peaks=[(5, 6), (3, 3.5), (0, 0)])
    assert figures.part_figures(scores, masks, 0.01) == {
        "image_auroc": pytest.approx((4 + 3 + 0) / 12),  # of 12 pairs of a bad and a good part
        "threshold": 4,
        "missed": pytest.approx(4 / 6),
        "smallest_found": 1,
    }
    quarter = figures.part_figures(scores, masks, 0.25)  # one false alarm: 3.5 is found, 3 is not above 3
    assert quarter["threshold"] == 3 and quarter["missed"] == pytest.approx(3 / 6)
    none = figures.part_figures(scores - 9 * masks, masks)
    assert none["missed"] == 1 and none["smallest_found"] is None


@pytest.mark.parametrize("share", [0, 0.01, 0.07, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("equal", [False, True])
def test_the_threshold_is_the_lowest_with_so_few_false_alarms(share, equal):
    good = np.random.default_rng(0).normal(size=100).round(1 if equal else 9)
    threshold = figures.part_figures(*row_of_parts(good, [(0, 0)]), share)["threshold"]
    allowed = round(share * 100, 6)
    lower = np.nextafter(threshold, -np.inf)
    assert (good > threshold).sum() <= allowed < (good > lower).sum()


def test_missed_defects_and_false_finds_are_listed():
    masks, scores = np.zeros((2, 2, 6, 6), bool)
    masks[0, 0, :3] = masks[1, 4:, 4] = True
    scores = masks * 1.0
    scores[1, 4:, 4] = 0.5
    scores[0, 1, 3] = scores[1, 2, 2] = scores[1, 3, 3] = 0.9  # joined to a defect; two pixels by a corner
    assert figures.missed_defects(scores, masks, 0.5) == [(1, (4, 4, 5, 6), 2)]
    assert figures.missed_defects(scores, masks, 0.4) == []
    assert figures.false_finds(scores, masks, 0.5) == [(1, (2, 2, 4, 4), 2)]
    assert figures.false_finds(scores, masks, 0.9) == []


# What is undefined or does not fit


@pytest.mark.parametrize(
    "function, scores, masks, words",
    [
        ("pixel_figures", np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), "no image has a defect"),
        ("pixel_figures", np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), "no pixel lies outside"),
        ("pixel_figures", np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), "float64: they must be bool"),
        ("pixel_figures", np.zeros((1, 2, 3)), np.zeros((1, 2, 2), bool), "must both be"),
        ("pixel_figures", np.full((1, 2, 2), np.nan), np.eye(2, dtype=bool)[None], "not finite"),
        ("part_figures", np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), "no part has a defect"),
        ("part_figures", np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), "no part is good"),
        ("class_figures", np.zeros(0), np.zeros(0), "one part or more"),
        ("class_figures", np.zeros(2), np.zeros(3), "must both be"),
        ("pixel_ap_of_parts", np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), "no image has a defect"),
        ("missed_of_parts", np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), "no part is good"),
    ],
)
def test_what_is_undefined_is_refused(function, scores, masks, words):
    with pytest.raises(ValueError, match=words):
        getattr(figures, function)(scores, masks)


@pytest.mark.parametrize("share", [-0.1, 1])
def test_a_share_of_false_alarms_is_below_one(share):
    with pytest.raises(ValueError, match="false_alarms"):
        figures.part_figures(*row_of_parts([1], [(2, 2)]), share)


@pytest.mark.parametrize("limit", [0, 1.1])
def test_the_limit_of_pro_is_a_rate(limit):
    with pytest.raises(ValueError, match="pro_limit"):
        figures.pixel_figures(*example(), limit)


# Classes


def test_class_figures_by_hand():
    true, predicted = np.array(["a", "a", "a", "b", "c"]), np.array(["a", "a", "b", "b", "a"])
    found = figures.class_figures(predicted, true)  # F1: a 2*2/(2*2+1+1), b 2/(2+1), c 0
    assert found == {"accuracy": pytest.approx(3 / 5), "macro_f1": pytest.approx((4 / 6 + 2 / 3 + 0) / 3)}


# The bootstrap


def bootstrap_of_means(a: np.ndarray, b: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple:
    """For figures that are means over parts: (S, P) of each arm."""
    arms = ([lambda times, row=row: times @ row / times.sum(axis=1) for row in arm] for arm in (a, b))
    return figures.paired_bootstrap(*arms, a.shape[1], resamples, seed)


def test_an_interval_needs_two_parts():
    with pytest.raises(ValueError, match="2 parts or more"):
        bootstrap_of_means(np.zeros((1, 1)), np.zeros((1, 1)))


def test_equal_arms_have_no_gain_and_a_shift_is_one():
    a = np.random.default_rng(0).normal(size=(5, 30))
    assert bootstrap_of_means(a, a) == (0, 0, 0)
    assert figures.verdict(0, 0) == figures.verdict(-1, 1) == "no gain"
    shifted = bootstrap_of_means(a, a + 0.5)
    assert shifted == (pytest.approx(0.5),) * 3 and figures.verdict(*shifted[1:]) == "gain"
    assert figures.verdict(*bootstrap_of_means(a + 0.5, a)[1:]) == "loss"


def test_the_interval_of_two_parts_is_that_of_their_four_draws():
    """Both parts alike: means 0, 1, 1 and 2 of b - a, a quarter each; 95 % reaches from the least to the greatest."""
    assert bootstrap_of_means(np.zeros((1, 2)), np.array([[0.0, 2]])) == (1, 0, 2)


def test_the_interval_of_many_parts_is_that_of_the_normal_distribution():
    b = np.random.default_rng(0).normal(0.3, 1, size=(1, 400))
    mean, low, high = bootstrap_of_means(np.zeros_like(b), b, resamples=4000)
    error = 1.96 * b.std() / 20
    assert mean == b.mean() and (low, high) == pytest.approx((mean - error, mean + error), abs=0.01)


def test_seeds_that_differ_widen_the_interval_and_parts_are_drawn_once_for_all():
    seeds = np.repeat([[0.0], [1.0], [2.0], [3.0]], 50, axis=1)  # no part differs from another
    _, low, high = bootstrap_of_means(np.zeros_like(seeds), seeds)
    assert low < 0.6 and high > 2.4
    parts = np.repeat(np.random.default_rng(0).normal(size=(1, 50)), 4, axis=0)  # no seed differs from another
    one, four = (bootstrap_of_means(0 * b, b) for b in (parts[:1], parts))
    assert four[2] - four[1] == pytest.approx(one[2] - one[1], rel=0.1)


def test_the_bootstrap_is_repeatable():
    b = np.random.default_rng(0).normal(size=(2, 9))
    first = bootstrap_of_means(0 * b, b, 50, seed=3)
    assert first == bootstrap_of_means(0 * b, b, 50, seed=3) != bootstrap_of_means(0 * b, b, 50, seed=4)


def times_of(parts, number):
    """How often each of `number` parts is among these, as one resample."""
    return np.bincount(parts, minlength=number)[None].astype(float)


def test_a_resample_without_a_figure_is_drawn_again():
    def share_of_zeros(times):
        return np.where(times[:, 1] > 0, times[:, 0] / times.sum(axis=1), np.nan)

    def zero(times):
        return np.zeros(len(times))

    def of_all(times):
        return np.where((times > 0).all(axis=1), 0, np.nan)

    mean, low, high = figures.paired_bootstrap([zero], [share_of_zeros], 2, resamples=200)
    assert (mean, low, high) == (0.5, 0, 0.5)  # never the draw of part 0 twice
    with pytest.raises(ValueError, match="on all parts"):
        figures.paired_bootstrap([zero], [lambda times: np.full(len(times), np.nan)], 2)
    with pytest.raises(ValueError, match="in a row"):
        figures.paired_bootstrap([zero], [of_all], 30)
    with pytest.raises(ValueError, match="the same"):
        figures.paired_bootstrap([zero], [zero] * 2, 2)


@pytest.mark.parametrize("levels", [None, 2])
def test_pixel_ap_of_parts_is_that_of_the_chosen_ones(levels):
    scores, masks = example(parts=20, side=24, levels=levels)
    figure = figures.pixel_ap_of_parts(scores, masks)
    for parts in (np.arange(20), np.random.default_rng(0).integers(20, size=20), np.array([3, 3, 0])):
        expected = figures.pixel_figures(scores[parts], masks[parts])["pixel_ap"]
        assert figure(times_of(parts, 20)) == pytest.approx(expected, abs=2e-3)
    assert np.isnan(figure(times_of([0, 1], 20)))


def test_pixel_ap_of_parts_has_about_as_many_steps_as_asked():
    scores, masks = example(parts=40, side=64)
    exact = figures.pixel_figures(scores, masks)["pixel_ap"]
    errors = [abs(figures.pixel_ap_of_parts(scores, masks, bins)(np.ones((1, 40)))[0] - exact) for bins in (10, 100)]
    assert 0 < errors[1] < errors[0] < 0.1 and errors[1] < 0.01


def test_missed_of_parts_is_that_of_the_chosen_ones():
    scores, masks = row_of_parts(good=[1, 2, 3, 4], peaks=[(5, 6), (3, 3.5), (0, 2)])
    figure = figures.missed_of_parts(scores, masks, 0.25)
    for parts in (np.arange(7), np.array([0, 0, 1, 4, 5, 6]), np.array([3, 4, 5, 5, 6])):
        expected = figures.part_figures(scores[parts], masks[parts], 0.25)["missed"]
        assert figure(times_of(parts, 7)) == pytest.approx(expected)
    assert np.isnan(figure(times_of([0, 1], 7))) and np.isnan(figure(times_of([5, 6], 7)))
    several = np.concatenate([times_of(np.arange(7), 7), times_of([3, 4, 5, 5, 6], 7)])
    assert figure(several).tolist() == [figure(several[:1])[0], figure(several[1:])[0]]
