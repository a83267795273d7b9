"""Where defects lie on the object: measured on references, tested against chance, and drawn alike for new masks.

A location is one row of numbers, in the order of `CLEARANCE` to `TO_PART`. Shapes: M places of one shape, each (top,
left) of its upper left corner in image pixels; n references; h x w a map of the object.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage, special
from scipy.spatial import distance

from ..masks import bounds
from .shapes import LONG, cut_out, principal_axis


CLEARANCE = 0  # from the defect to the object's border, in units of the object's size, the root of its area
CONTACT = 1  # share of the defect's pixels nearer to the border than a quarter of the defect's own size
X, Y = 2, 3  # of its centre in the object's bounding box, in [0, 1]
TO_BORDER, TO_PART = 4, 5  # twice the angle, in radians, of its axis to the nearest border and to the object's axis;
# NaN for a defect that is not long. Twice, because an axis has no head: angles of 0 and 180 degrees are the same

WORKING_SIDE = 512  # the longer side of the map that distances are read from, in pixels
PIXELS = 96  # of a shape that stand for all
SHAPES_TRIED = 24  # of a mask, each at
PLACES = 1500  # candidates
CHECKED = 500  # candidates that are checked exactly, for each of `REFERENCES_TRIED`
REFERENCES_TRIED = 20
SLACK = 0.05  # by which the coverage of a candidate may be misjudged
AT_BORDER = 0.005  # widest kernel of a defect that touches the border, in units of the object's size
PRIOR = np.array([0.1, 0.29, 0.29, 0.29])  # spread of CLEARANCE to Y where nothing is known
PRIOR_TURN = np.pi / np.sqrt(3)  # of TO_BORDER and TO_PART
LEAST_LOG_WEIGHT = -8.0  # of a candidate's density, against that of the reference itself: four widths away

MOST_REFERENCES = 100  # that are measured
LEAST_REFERENCES = 4  # from which on chance is tested
SIGNIFICANT = 0.01
NULL_PLACES = 500  # uniform places of each reference
LEAST_NULL_PLACES = 20  # a reference with fewer fits nowhere else, and its place says nothing
DRAWS = 4999  # of the Monte Carlo test


@dataclasses.dataclass(frozen=True)
class ObjectMap:
    """An object, as locations need it.

    Args:
        distance: (h, w), to the border in units of the object's size: 0 on its outermost pixels, negative outside.
        border: (2, h, w), the row and column of the nearest pixel outside.
        size: root of the object's area, in pixels of the map.
        box: (left, top, right, bottom) of the object, in pixels of the map.
        axis: its direction in degrees; 0, along a row, if it is not long or fills the image.
        scale: (2,) pixels of the map in a pixel of the image, down and across.
    """

    distance: np.ndarray
    border: np.ndarray
    size: float
    box: tuple[int, int, int, int]
    axis: float
    scale: np.ndarray


def map_object(foreground: np.ndarray) -> ObjectMap:
    """The map of an object, (H, W) bool; the image's edge counts as border."""
    image = Image.fromarray(foreground).convert("L")
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.BOX)
    part = np.asarray(image) > 0
    border_distance, border = ndimage.distance_transform_edt(np.pad(part, 1), return_indices=True)
    size = float(np.sqrt(part.sum()))
    angle, length = principal_axis(part)
    return ObjectMap(
        distance=(border_distance[1:-1, 1:-1] - 1) / size,
        border=border[:, 1:-1, 1:-1] - 1,
        size=size,
        box=bounds(part),
        axis=angle if length >= LONG and not part.all() else 0.0,
        scale=np.array(part.shape) / foreground.shape,
    )


def locate(
    shape: np.ndarray, places: np.ndarray, part: ObjectMap, coverage: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Those of (M, 2) places where a shape has about `coverage` of its pixels on the object, and its locations there.

    Distances are judged from some of its pixels.
    """
    outline = _some(np.argwhere(shape & ~ndimage.binary_erosion(shape)))
    depths = _depths(_some(np.argwhere(shape)), places, part)
    covered = (depths >= 0).mean(axis=1) >= coverage
    depths, places = depths[covered], places[covered]
    clearance = _depths(outline, places, part).min(axis=1).clip(0)
    own_size = np.sqrt(shape.sum() * part.scale.prod()) / part.size
    centre = places + np.argwhere(shape).mean(axis=0)
    left, top, right, bottom = part.box
    y, x = ((centre + 0.5) * part.scale).T
    row, column = y.astype(int), x.astype(int)
    to_border = part.border[:, row, column] - (row, column)  # (2, M), down and right
    tangent = np.arctan2(-to_border[0], to_border[1]) + np.pi / 2
    angle, length = principal_axis(shape)
    axis = np.radians(angle) if length >= LONG else np.nan
    columns = (
        clearance, (depths < own_size / 4).mean(axis=1), (x - left) / (right - left), (y - top) / (bottom - top),
        2 * (axis - tangent), np.full(len(places), 2 * (axis - np.radians(part.axis))),
    )  # fmt: skip
    return places, np.stack(columns, axis=1)


def _depths(pixels: np.ndarray, places: np.ndarray, part: ObjectMap) -> np.ndarray:
    """(M, P) `ObjectMap.distance` under (P, 2) pixels of a shape at (M, 2) places."""
    y, x = (places[:, None, axis] + pixels[:, axis] for axis in (0, 1))
    if (part.scale != 1).any():
        y, x = ((values + 0.5) * scale for values, scale in zip((y, x), part.scale))
    return part.distance[y.astype(int), x.astype(int)]


def _some(pixels: np.ndarray) -> np.ndarray:
    """`PIXELS` of (P, 2) pixels in reading order, evenly spread, the first and the last in it."""
    return pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), PIXELS)).round().astype(int)]


def uniform_places(shape: np.ndarray, allowed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(M, 2) places of a shape whole inside the image, uniform around an (H, W) bool area; none where it is larger."""
    if not allowed.any() or (np.array(shape.shape) > allowed.shape).any():
        return np.empty((0, 2), dtype=int)
    left, top, right, bottom = bounds(allowed)
    height, width = shape.shape
    low = np.maximum(0, (top - height, left - width))
    high = np.minimum(np.array(allowed.shape) - shape.shape, (bottom, right))
    return rng.integers(low, high + 1, (PLACES, 2))


# ---------------------------------------------------------------------------------------------------------------------
# References


class ReferenceLocation(NamedTuple):
    """The (6,) location of a reference, and the (m, 6) locations of its mask at random places on its object."""

    values: np.ndarray
    null: np.ndarray


def reference_location(mask: np.ndarray, foreground: np.ndarray, rng: np.random.Generator) -> ReferenceLocation:
    """Measures a reference. What is broken off belongs to the object too, so the mask is added to the foreground."""
    part = map_object(foreground | mask)
    left, top, _, _ = bounds(mask)
    shape = cut_out(mask)
    _, [values] = locate(shape, np.array([[top, left]]), part)
    _, null = locate(shape, uniform_places(shape, foreground | mask, rng), part, coverage=1)
    return ReferenceLocation(values, null[:NULL_PLACES])


def uniformity_tests(references: Sequence[ReferenceLocation], rng: np.random.Generator) -> dict[str, float]:
    """p-values against the same masks at uniform places and directions, corrected for their number (Bonferroni).

    Distance and position: the energy statistic, its distribution from random places of each mask on its own object.
    Direction, to the border and to the object: Rayleigh's test on the long masks.
    """
    movable = [reference for reference in references if len(reference.null) >= LEAST_NULL_PLACES]
    values = np.array([reference.values for reference in references]).reshape(-1, TO_PART + 1)
    p_values = {"distance to the border": 1.0, "position": 1.0}
    if len(movable) >= LEAST_REFERENCES:
        ranked = [rank_clearance(reference) for reference in movable]
        p_values["distance to the border"] = energy_test(ranked, rng)
        p_values["position"] = energy_test([(r.values[[X, Y]], r.null[:, [X, Y]]) for r in movable], rng)
    for name, column in (("direction to the border", TO_BORDER), ("direction on the object", TO_PART)):
        p_values[name] = rayleigh_test(values[:, column])
    return {name: min(1.0, len(p_values) * p) for name, p in p_values.items()}


def rank_clearance(reference: ReferenceLocation) -> tuple[np.ndarray, np.ndarray]:
    """(1,) and (m, 1): the clearances as ranks in [0, 1], which makes objects of any form and size comparable."""
    clearances = np.append(reference.null[:, CLEARANCE], reference.values[CLEARANCE])
    in_order = np.sort(clearances)
    below, up_to = (np.searchsorted(in_order, clearances, side=side) for side in ("left", "right"))
    ranks = (below + up_to) / 2 / len(clearances)
    return ranks[-1:], ranks[:-1, None]


def energy_test(references: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> float:
    """p of n values, each (d,), if each was drawn from its own (m, d) null sample.

    The statistic is the energy distance to all null samples, 2 E|x - y| - E|x - x'|: large for values that lie at one
    side, close together, or both.
    """
    share = -(-NULL_PLACES // len(references))
    pool = np.concatenate([null[:share] for _, null in references])

    def statistic(values: np.ndarray) -> float:
        to_pool = distance.cdist(values, pool).mean()
        return 2 * to_pool - 2 * distance.pdist(values).sum() / len(values) ** 2

    observed = statistic(np.array([values for values, _ in references]))
    picks = [null[rng.integers(len(null), size=DRAWS)] for _, null in references]
    by_chance = np.array([statistic(values) for values in np.stack(picks, axis=1)])
    return float((1 + (by_chance >= observed - 1e-12).sum()) / (1 + DRAWS))


def rayleigh_test(angles: np.ndarray) -> float:
    """p of angles in radians, NaN left out, if they are uniform; 1 for fewer than `LEAST_REFERENCES`."""
    angles = angles[~np.isnan(angles)]
    n = len(angles)
    if n < LEAST_REFERENCES:
        return 1.0
    resultant = abs(np.exp(1j * angles).sum())
    return float(min(1.0, np.exp(np.sqrt(1 + 4 * n + 4 * (n**2 - resultant**2)) - (1 + 2 * n))))


def choose_placement(references: Sequence[ReferenceLocation], rng: np.random.Generator) -> tuple[str, str]:
    """What `--placement auto` means for these references, like_references or anywhere, and why."""
    n = len(references)
    if n < LEAST_REFERENCES:
        return "anywhere", f"fewer than {LEAST_REFERENCES} references ({n})"
    name, p = min(uniformity_tests(references, rng).items(), key=lambda item: item[1])
    if p < SIGNIFICANT:
        return "like_references", f"{name} of {n} references is not random (p = {p:.2g})"
    return "anywhere", f"{n} references do not differ clearly from random places ({name}: p = {p:.2g})"


# ---------------------------------------------------------------------------------------------------------------------
# New masks


def spread(values: np.ndarray, prior: float | np.ndarray) -> np.ndarray:
    """The deviation of n values, each (d,) or a number: the smaller of the standard and the robust one.

    `prior`, the deviation where nothing is known, counts as one more value.
    """
    from_median = abs(values - np.median(values, axis=0))
    robust = 1.48 * np.median(from_median, axis=0)
    return np.sqrt(np.minimum(values.var(axis=0), robust**2) + np.square(prior) / len(values))


class LikeReferences:
    """The density of locations that (n, 6) references show: a kernel around each.

    Its width is the references' spread times n^(-1/6). The distance's is at most half the reference's own distance, so
    that a defect at the border stays there. Directions count against the border or against the object, wherever they
    agree more.
    """

    def __init__(self, values: np.ndarray):
        shrink = len(values) ** (-1 / 6)
        self.values = values
        self.widths = shrink * spread(values[:, : Y + 1], PRIOR)
        turns = np.exp(1j * values[~np.isnan(values[:, TO_PART]), TO_BORDER:])
        self.direction = TO_BORDER + int(np.argmax(abs(turns.sum(axis=0))))
        turns = turns[:, self.direction - TO_BORDER]
        around_mean = np.angle(turns * np.conj(turns.sum()))
        self.concentration = float((shrink * spread(around_mean, PRIOR_TURN)) ** -2) if len(turns) else 0.0

    def log_weights(self, index: int, locations: np.ndarray) -> np.ndarray:
        """(M,) log of the kernel around a reference at (M, 6) locations, 0 at its centre."""
        own, widths = self.values[index], self.widths.copy()
        widths[CLEARANCE] = min(widths[CLEARANCE], max(AT_BORDER, own[CLEARANCE] / 2))
        offsets = (locations[:, : Y + 1] - own[: Y + 1]) / widths
        turn = locations[:, self.direction] - own[self.direction]
        by_direction = self.concentration * (np.cos(turn) - 1)
        unknown = np.log(special.i0e(self.concentration))  # the mean over all directions
        return np.where(np.isnan(turn), unknown, by_direction) - (offsets**2).sum(axis=1) / 2

    def propose(
        self,
        shapes: Sequence[np.ndarray],
        allowed: np.ndarray,
        part: ObjectMap,
        coverage: float,
        rng: np.random.Generator,
    ) -> Iterator[tuple[int, int, int]]:
        """(index of the shape, top, left) in the order of a draw from the density; ends where it is negligible.

        The first one that is good is drawn from all good ones. Whether one is, on `allowed`, is left to the caller.
        """
        which, places, locations = [], [], []
        for index, shape in enumerate(shapes):
            fitting, located = locate(shape, uniform_places(shape, allowed, rng), part, coverage - SLACK)
            which.append(np.full(len(fitting), index))
            places.append(fitting)
            locations.append(located)
        all_which, all_places, all_locations = map(np.concatenate, (which, places, locations))
        for reference in rng.permutation(len(self.values))[:REFERENCES_TRIED]:
            weights = self.log_weights(reference, all_locations)
            order = np.argsort(-(weights + rng.gumbel(size=len(weights))))  # a draw without replacement
            for i in order[weights[order] > LEAST_LOG_WEIGHT][:CHECKED]:
                top, left = all_places[i].tolist()
                yield int(all_which[i]), top, left
