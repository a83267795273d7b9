"""Shapes of defects: cut out of reference masks and transformed, or drawn.

A shape is an (h, w) bool array, True inside the defect, cut to its bounding box and never empty. Angles are in
degrees, counter-clockwise, 0 along a row.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..masks import blob_outline, bounds


LONG = 1.5  # how many times longer than across a mask must be for its angle to mean something


def cut_out(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, as a shape; `mask` marks at least one pixel."""
    left, top, right, bottom = bounds(mask)
    return mask[top:bottom, left:right]


def sums_under(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(H - h + 1, W - w + 1): the sum of (H, W) values, times (h, w) weights that lie at each (top, left)."""
    from scipy import signal  # a second to load, and rarely used

    return signal.fftconvolve(values.astype(float), weights[::-1, ::-1].astype(float), mode="valid")


def principal_axis(mask: np.ndarray) -> tuple[float, float]:
    """The direction in which a mask is longest, in [0, 180) degrees, and how many times longer it is than across."""
    y, x = np.nonzero(mask)
    spread = np.cov(np.stack([x, -y]), bias=True) + np.eye(2) / 12  # 1/12: a pixel's own extent
    values, vectors = np.linalg.eigh(spread)
    angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180
    return float(angle), float(np.sqrt(values[1] / values[0]))


def ellipse_elongation(size: tuple[int, int], area: float) -> float:
    """How many times longer than across an ellipse of this area is that fits a box of this size, at any angle."""
    squares, product = (size[0] ** 2 + size[1] ** 2) / 4, area / np.pi  # a^2 + b^2 and a b, of its half axes
    longer, shorter = np.sqrt(squares + 2 * product), np.sqrt(max(squares - 2 * product, 0))  # a + b and a - b
    return float((longer + shorter) / (longer - shorter))


# ---------------------------------------------------------------------------------------------------------------------
# Transformed


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of a shape.

    Args:
        angle: of the rotation, after the flip.
        scale: of both sides.
        flip: mirror left and right.
        elastic: strength of the warp, in fractions of the longer side.
        stretch: along the shape's longest direction, and 1 / stretch across: the area stays.
    """

    angle: float = 0
    scale: float = 1
    flip: bool = False
    elastic: float = 0
    stretch: float = 1


SCALES = (0.8, 1.25)
MAX_ELASTIC = 0.03


def random_transform(rng: np.random.Generator, max_rotation: float) -> Transform:
    """Any rotation up to `max_rotation` degrees to either side, a scale in `SCALES`, a flip, a light warp."""
    return Transform(
        angle=rng.uniform(-max_rotation, max_rotation),
        scale=float(np.exp(rng.uniform(*np.log(SCALES)))),
        flip=bool(rng.random() < 0.5),
        elastic=rng.uniform(0, MAX_ELASTIC),
    )


def transform(shape: np.ndarray, change: Transform, rng: np.random.Generator) -> np.ndarray:
    """The shape flipped, stretched, rotated, scaled and warped.

    Its area is the old one times `scale`**2, more only where a hair would tear: what is resampled is the distance to
    the outline, cut where the area is right. Resampled bits would lose thin parts.
    """
    height, width = shape.shape
    source = np.pad(shape[:, ::-1] if change.flip else shape, 1)
    distance = ndimage.distance_transform_edt(~source) - ndimage.distance_transform_edt(source)
    distance -= np.sign(distance) / 2  # from the pixels' edges
    cosine, sine = np.cos(np.radians(change.angle)), np.sin(np.radians(change.angle))
    forward = np.array([[cosine, -sine], [sine, cosine]])  # of (y, x)
    if change.stretch != 1:
        forward = forward @ _stretch_matrix(source, change.stretch)
    margin = 2 + 8 * change.elastic * max(height, width) * change.scale * max(change.stretch, 1 / change.stretch)
    sides = (np.abs(forward) * (height, width)).sum(axis=1)
    rows, columns = np.ceil(sides * change.scale + margin - 1e-6).astype(int)
    y, x = np.meshgrid(np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2, indexing="ij")
    place = np.stack([y * cosine + x * sine, x * cosine - y * sine]) / change.scale
    if change.stretch != 1:
        place = np.tensordot(_stretch_matrix(source, 1 / change.stretch), place, 1)
    bends = rng.standard_normal((2, 4, 4)).astype(np.float32) * change.elastic * max(height, width)
    smooth = [Image.fromarray(bend).resize((columns, rows), Image.Resampling.BICUBIC) for bend in bends]
    place += np.stack([np.asarray(bend) for bend in smooth])
    place += (np.array(source.shape)[:, None, None] - 1) / 2
    field = ndimage.map_coordinates(distance, place, order=1, mode="nearest")
    area = max(1, round(shape.sum() * change.scale**2))
    level = np.partition(field.ravel(), area - 1)[area - 1]
    result = field <= level
    for ridge in (-0.5, -0.25, 0):  # a hair that fell apart gets a pixel's breadth; `distance` along it is the ridge
        if _count_components(result) <= _count_components(shape):
            break
        result = field <= max(level, ridge + 0.5 / change.scale)
    return cut_out(result)


def _stretch_matrix(shape: np.ndarray, factor: float) -> np.ndarray:
    """(2, 2), of (y, x): `factor` along the shape's longest direction, 1 / `factor` across."""
    angle = np.radians(principal_axis(shape)[0])
    direction = np.array([-np.sin(angle), np.cos(angle)])
    along = np.outer(direction, direction)
    return factor * along + (np.eye(2) - along) / factor


def _count_components(mask: np.ndarray) -> int:
    return ndimage.label(mask, np.ones((3, 3)))[1]


def union(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Both shapes as one, a random pixel of the second on a random pixel of the first."""
    (y1, x1), (y2, x2) = (pixels[rng.integers(len(pixels))] for pixels in map(np.argwhere, (first, second)))
    top, left = min(0, y1 - y2), min(0, x1 - x2)
    bottom, right = np.maximum(first.shape, np.array(second.shape) + (y1 - y2, x1 - x2))
    both = np.zeros((bottom - top, right - left), dtype=bool)
    for shape, (y, x) in ((first, (0, 0)), (second, (y1 - y2, x1 - x2))):
        both[y - top : y - top + shape.shape[0], x - left : x - left + shape.shape[1]] |= shape
    return both


# ---------------------------------------------------------------------------------------------------------------------
# Drawn: each a function of (rng, side), side the image's shorter one in pixels


def thick_lines(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The shape of lines, each (n, 2) points (y, x) and its (n,) widths at them, in pixels, nowhere torn."""
    traces = []
    for points, widths in lines:
        steps = int(np.ceil(2 * np.abs(np.diff(points, axis=0)).max())) + 1  # to the next point, by half pixels
        t = np.linspace(0, len(points) - 1, (len(points) - 1) * steps + 1)
        traces.append(np.stack([np.interp(t, np.arange(len(points)), v) for v in (*points.T, widths)]))
    y, x, width = np.concatenate(traces, axis=1)
    margin = int(np.ceil(width.max())) + 1
    rows, columns = (np.rint(values - values.min()).astype(int) + margin for values in (y, x))
    canvas = np.zeros((rows.max() + margin + 1, columns.max() + margin + 1))
    np.maximum.at(canvas, (rows, columns), np.maximum(width, 1))
    distance, (row, column) = ndimage.distance_transform_edt(canvas == 0, return_indices=True)
    return cut_out(distance <= (canvas[row, column] - 1) / 2)


def _line(rng: np.random.Generator, length: float, wander: float, points: int = 40) -> np.ndarray:
    """(n, 2) points (y, x) of a line of `length` that turns by about `wander` radians on the way."""
    turns = np.cumsum(rng.standard_normal(points - 1)) * wander / np.sqrt(points)
    angles = rng.uniform(0, 2 * np.pi) + turns
    steps = np.stack([np.sin(angles), np.cos(angles)], axis=1) * length / (points - 1)
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])


def _taper(number: int, thinnest: float) -> np.ndarray:
    """(n,) widths: 1 in the middle, `thinnest` at both ends."""
    return thinnest + (1 - thinnest) * np.sin(np.linspace(0, np.pi, number))


def stroke(rng: np.random.Generator, side: int) -> np.ndarray:
    """A bent, broad line: 10-40 % of the side long, 1.5-5 % wide."""
    points = _line(rng, rng.uniform(0.1, 0.4) * side, rng.uniform(0.5, 2))
    return thick_lines([(points, rng.uniform(0.015, 0.05) * side * _taper(len(points), 0.5))])


def scratch(rng: np.random.Generator, side: int) -> np.ndarray:
    """A nearly straight, fine line: 15-60 % of the side long, 0.4-1.2 % wide."""
    points = _line(rng, rng.uniform(0.15, 0.6) * side, rng.uniform(0, 0.3))
    return thick_lines([(points, rng.uniform(0.004, 0.012) * side * _taper(len(points), 0.3))])


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """An irregular spot, 6-20 % of the side across: `random_mask`'s."""
    return _polygon(blob_outline(rng, rng.uniform(0.03, 0.10) * side))


def crack(rng: np.random.Generator, side: int) -> np.ndarray:
    """A jagged line that thins out, with up to two branches: 15-50 % of the side long, 0.5-1.5 % wide."""
    length, width = rng.uniform(0.15, 0.5) * side, rng.uniform(0.005, 0.015) * side
    direction = rng.uniform(0, 2 * np.pi)

    def jagged(start: np.ndarray, direction: float, length: float) -> np.ndarray:
        bends = int(rng.integers(6, 11))
        angles = direction + rng.choice([-1, 1], bends) * rng.uniform(0.2, 0.7, bends)
        steps = np.stack([np.sin(angles), np.cos(angles)], axis=1) * rng.uniform(0.5, 1.5, (bends, 1))
        return start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]) * length / bends

    main = jagged(np.zeros(2), direction, length)
    lines = [(main, width)]
    for _ in range(rng.integers(0, 3)):
        fork = main[rng.integers(1, len(main) - 1)]
        turn = rng.choice([-1, 1]) * rng.uniform(0.6, 1.1)
        lines.append((jagged(fork, direction + turn, rng.uniform(0.2, 0.4) * length), width / 2))
    return thick_lines([(line, widest * np.linspace(1, 0.2, len(line))) for line, widest in lines])


def box(rng: np.random.Generator, side: int) -> np.ndarray:
    """A rectangle at any angle, each side 3-25 % of the image's: as in M_rand."""
    height, width = rng.uniform(0.03, 0.25, 2) * side / 2
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return _polygon(np.array([(-width, -height), (width, -height), (width, height), (-width, height)]) @ turn)


def _polygon(outline: np.ndarray) -> np.ndarray:
    """The shape inside (n, 2) corners (x, y)."""
    outline = outline - outline.min(axis=0) + 1
    width, height = np.ceil(outline.max(axis=0)).astype(int) + 2
    canvas = Image.new("1", (int(width), int(height)))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    return cut_out(np.asarray(canvas))


SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "stroke": stroke,
    "scratch": scratch,
    "blob": blob,
    "crack": crack,
    "box": box,
}
