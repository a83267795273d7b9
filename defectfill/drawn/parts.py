"""Four kinds of part, drawn: good and defective, with exact masks.

Every image is a lit height field: a part has a height and a colour at each pixel, a defect changes both inside its
mask, and one light shades the result.

Shapes: H x W pixels at twice the size asked for, halved at the end. Heights are in pixels, colours in [0, 1].
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Noise, lines and light


def noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """(size, size) smooth noise of unit spread; features are about `scale` of the side across."""
    cells = max(2, round(1 / scale)) + 3
    coarse = rng.standard_normal((cells, cells))
    smooth = ndimage.zoom(coarse, size / (cells - 3), order=3)[:size, :size]
    return smooth / (smooth.std() + 1e-9)


def fractal(rng: np.random.Generator, size: int, scale: float, octaves: int = 4) -> np.ndarray:
    """Noise summed over octaves, each half as large and half as strong."""
    total = sum(noise(rng, size, scale / 2**k) / 2**k for k in range(octaves))
    return total / total.std()


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of every pixel in [-1, 1]."""
    line = np.linspace(-1, 1, size)
    return np.meshgrid(line, line, indexing="ij")


def rotate(y: np.ndarray, x: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def wandering_line(
    rng: np.random.Generator, start: np.ndarray, angle: float, length: float, wander: float
) -> np.ndarray:
    """(n, 2) points (y, x) of a line that turns by `wander` radians on the way, in units of the half side."""
    steps = 60
    turns = np.cumsum(rng.standard_normal(steps)) * wander / np.sqrt(steps)
    angles = angle + turns - turns.mean()
    return start + np.cumsum(np.stack([np.sin(angles), np.cos(angles)], axis=1), axis=0) * length / steps


def jagged_line(rng: np.random.Generator, start: np.ndarray, angle: float, length: float) -> np.ndarray:
    """(n, 2) points (y, x) of a line that breaks its course every few pixels, in units of the half side."""
    bends = rng.integers(6, 10)
    angles = angle + rng.choice([-1, 1], bends) * rng.uniform(0.2, 0.7, bends) + rng.normal(0, 0.15)
    corners = np.cumsum(np.stack([np.sin(angles), np.cos(angles)], axis=1) * rng.uniform(0.5, 1.5, (bends, 1)), axis=0)
    corners = np.concatenate([np.zeros((1, 2)), corners]) * length / bends
    t = np.linspace(0, bends, 200)
    return start + np.stack([np.interp(t, np.arange(bends + 1), corners[:, i]) for i in range(2)], axis=1)


def pixels(points: np.ndarray, size: int) -> np.ndarray:
    """(..., 2) rows and columns of points (y, x) in [-1, 1]; those of points beyond the image lie outside it."""
    return np.rint((points + 1) / 2 * (size - 1)).astype(int)


def distance_to(points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every pixel to a line of points, in half sides, and how far along the line (0 to 1) that is."""
    place = pixels(points, size)
    inside = ((place >= 0) & (place < size)).all(axis=1)
    along = np.zeros((size, size))
    empty = np.ones((size, size), dtype=bool)
    for (y, x), t in zip(place[inside], np.linspace(0, 1, len(points))[inside]):
        empty[y, x], along[y, x] = False, t
    distance, (ny, nx) = ndimage.distance_transform_edt(empty, return_indices=True)
    return distance * 2 / size, along[ny, nx]


def blob(
    rng: np.random.Generator, size: int, centre: np.ndarray, radius: float, rough: float, bumps: float = 0.8
) -> np.ndarray:
    """Signed distance-like field: below 0 inside an irregular blob of about `radius`, in half sides.

    Args:
        rough: height of the outline's bumps, in radii.
        bumps: width of the largest of them, in radii.
    """
    y, x = grid(size)
    stretch = rng.uniform(0.75, 1.3)
    v, u = rotate(y - centre[0], x - centre[1], rng.uniform(0, np.pi))
    return np.hypot(v * stretch, u / stretch) - radius * (1 + rough * fractal(rng, size, bumps * radius, 3))


@dataclasses.dataclass
class Surface:
    """A part before it is lit.

    Args:
        height: (H, W), in pixels.
        colour: (H, W, 3), in [0, 1].
        shine: strength of the highlight, a number or (H, W).
        part: (H, W) bool, where the part is (a defect lies inside).
        tracks: (H, W) in [0, 1], the copper of a board; None for other parts.
        pads: (H, W) in [0, 1], its gold.
        pitch: from one track to the next, in half sides.
    """

    height: np.ndarray
    colour: np.ndarray
    shine: np.ndarray | float
    part: np.ndarray
    tracks: np.ndarray | None = None
    pads: np.ndarray | None = None
    pitch: float = 0.0


def light(rng: np.random.Generator, surface: Surface, brightness: float) -> np.ndarray:
    """(H, W, 3) image in [0, 1]: Lambert and Blinn-Phong shading by one lamp, uneven light, sensor noise."""
    size = surface.height.shape[0]
    dy, dx = np.gradient(ndimage.gaussian_filter(surface.height, 0.7))
    normal = np.stack([-dy, -dx, np.ones_like(dx)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    azimuth, elevation = rng.uniform(-2.6, -0.6), rng.uniform(0.7, 1.1)
    lamp = np.array([np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)])
    half = lamp + [0, 0, 1]
    diffuse = np.clip(normal @ lamp, 0, 1) / lamp[2]
    gloss = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24
    y, x = grid(size)
    falloff = 1 + 0.12 * (np.sin(azimuth) * y + np.cos(azimuth) * x) + 0.03 * noise(rng, size, 0.7)
    picture = surface.colour * (0.35 + 0.65 * diffuse)[..., None] * falloff[..., None] * brightness
    picture = picture + (surface.shine * gloss * falloff)[..., None]
    return np.clip(picture + rng.normal(0, 0.008, picture.shape), 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Parts: each a function of (rng, size)


def plate(rng: np.random.Generator, size: int) -> Surface:
    """Brushed metal that fills the image."""
    wide = size * 3 // 2
    streaks = ndimage.gaussian_filter(rng.standard_normal((wide, wide)), (0.6, size / 14))
    streaks += 0.5 * ndimage.gaussian_filter(rng.standard_normal((wide, wide)), (1.5, size / 5))
    turned = ndimage.rotate(streaks / streaks.std(), rng.uniform(-12, 12), reshape=False, mode="reflect", order=1)
    edge = (wide - size) // 2
    streaks = turned[edge : edge + size, edge : edge + size]
    tone = np.array([0.56, 0.57, 0.59]) * rng.uniform(0.9, 1.1) + rng.normal(0, 0.008, 3)
    colour = tone * (1 + 0.055 * streaks + 0.03 * noise(rng, size, 0.5))[..., None]
    return Surface(0.14 * streaks + 2 * noise(rng, size, 0.8), colour, 0.16, np.ones((size, size), dtype=bool))


def nut(rng: np.random.Generator, size: int) -> Surface:
    """A striped brown nut with a pale cap, lying on dark ground."""
    y, x = grid(size)
    centre, angle = rng.normal(0, 0.05, 2), rng.uniform(0, 2 * np.pi)
    v, u = rotate(y - centre[0], x - centre[1], angle)
    long, short = rng.uniform(0.68, 0.76), rng.uniform(0.56, 0.66)
    pointed = 1 + 0.16 * smoothstep(0.2, 1.0, v / long)  # narrower at the tip
    radius = np.hypot(v / long, u * pointed / short) + 0.012 * noise(rng, size, 0.4)
    part = radius < 1
    dome = np.sqrt(np.clip(1 - radius**2, 0, None))
    around = np.arctan2(u * pointed / short, np.clip(dome, 0.15, None))  # the meridian's angle
    ripple = 0.02 * fractal(rng, size, 0.25)
    stripes = np.sin(around * 22 + 3 * noise(rng, size, 0.6)) * 0.5 + 0.6 * np.sin(
        around * 47 + 5 * noise(rng, size, 0.5)
    )
    brown = np.array([0.50, 0.26, 0.15]) * rng.uniform(0.88, 1.12) + rng.normal(0, 0.012, 3)
    colour = brown * (1 + 0.13 * stripes + 0.10 * fractal(rng, size, 0.3))[..., None]
    cap = smoothstep(0.02, -0.05, v / long + rng.uniform(0.42, 0.52) + 0.03 * fractal(rng, size, 0.12))
    speckle = fractal(rng, size, 0.05, 2)
    pale = np.array([0.56, 0.44, 0.32]) * (1 + 0.16 * speckle)[..., None]
    colour = colour + cap[..., None] * (pale - colour)
    height = dome * size * 0.22 + part * (0.5 * stripes + 1.2 * cap * speckle) + ripple
    ground = np.array([0.115, 0.12, 0.135]) * (1 + 0.10 * fractal(rng, size, 0.03, 2))[..., None]
    shadow = smoothstep(1.0, 1.45, np.hypot((v - 0.03) / long, (u - 0.03) / short))
    rim = smoothstep(1.0, 0.985, radius)[..., None]
    colour = colour * rim + ground * (0.45 + 0.55 * shadow)[..., None] * (1 - rim)
    return Surface(height, colour, 0.10 * part * (1 - 0.8 * cap), part & (radius < 0.9))


def cloth(rng: np.random.Generator, size: int) -> Surface:
    """Plain weave, a thread over and a thread under."""
    y, x = grid(size)
    v, u = rotate(y, x, rng.normal(0, 0.07))
    v, u = v + 0.012 * noise(rng, size, 0.5), u + 0.012 * noise(rng, size, 0.5)
    pitch = rng.uniform(7.5, 8.5)
    warp, weft = np.cos(2 * np.pi * pitch * u), np.cos(2 * np.pi * pitch * v)
    over = np.cos(np.pi * pitch * u) * np.cos(np.pi * pitch * v)  # which of the two lies on top, in turn
    top = smoothstep(
        -0.25, 0.25, np.sin(np.pi * (np.floor(pitch * u) + np.floor(pitch * v)) + np.pi / 2) * np.abs(over) * 4
    )
    height = 1.6 * (top * (1 + warp) + (1 - top) * (1 + weft)) + 0.25 * fractal(rng, size, 0.02, 2)
    families = np.array([[0.36, 0.43, 0.54], [0.58, 0.53, 0.44], [0.42, 0.46, 0.42]])
    tone = families[rng.integers(len(families))] * rng.uniform(0.92, 1.08)
    depth = 0.72 + 0.28 * smoothstep(0.0, 3.0, height)
    fibre = 1 + 0.06 * fractal(rng, size, 0.02, 2) + 0.05 * noise(rng, size, 0.4)
    colour = tone * (depth * fibre * (1 + 0.06 * (2 * top - 1)))[..., None]
    return Surface(height, colour, 0.02, np.ones((size, size), dtype=bool))


LACQUER, COPPER, GOLD = (np.array(c) for c in ((0.03, 0.20, 0.11), (0.24, 0.56, 0.29), (0.83, 0.68, 0.36)))


def board(rng: np.random.Generator, size: int) -> Surface:
    """A printed circuit under green lacquer: tracks side by side that swerve together, some with a golden pad."""
    y, x = grid(size)
    v, u = rotate(y, x, rng.integers(4) * np.pi / 2 + rng.normal(0, 0.02))
    pitch, phase = rng.uniform(0.34, 0.42), rng.uniform(0, 1)
    swerves = [*zip(rng.uniform([-0.9, 0.1], [-0.4, 0.6]), rng.uniform(0.2, 0.45, 2), rng.choice([-1, 0, 1], 2))]

    def swerve(u: np.ndarray | float) -> np.ndarray | float:
        return sum(turn * np.clip(u - start, 0, length) for start, length, turn in swerves)

    slope = sum(turn * ((u > start) & (u < start + length)) for start, length, turn in swerves)
    lane = (v - swerve(u)) / pitch + phase
    number = np.floor(lane).astype(int)
    distance = np.abs(lane - number - 0.5) * pitch / np.sqrt(1 + slope**2)  # from the middle of the nearest track
    width, soft = pitch * rng.uniform(0.17, 0.21), 0.008
    tracks, pads, bores = smoothstep(width + soft, width - soft, distance), np.zeros_like(u), np.zeros_like(u)
    for lane_number in range(number.min(), number.max() + 1):
        if rng.random() < 0.4:  # this track ends in a pad
            end, side = rng.uniform(-0.6, 0.6), rng.choice([-1, 1])
            tracks = tracks * ~((number == lane_number) & (side * (u - end) > 0))
            middle = np.hypot(u - end, v - swerve(end) - (lane_number + 0.5 - phase) * pitch)
            pads = np.maximum(pads, smoothstep(0.36 * pitch + soft, 0.36 * pitch - soft, middle))
            bores = np.maximum(bores, smoothstep(0.17 * pitch + soft, 0.17 * pitch - soft, middle))
    grain = 1 + 0.05 * fractal(rng, size, 0.02, 2) + 0.05 * noise(rng, size, 0.5)
    shade = rng.uniform(0.88, 1.12)
    colour = (LACQUER + tracks[..., None] * (COPPER - LACQUER)) * (shade * grain)[..., None]
    colour += pads[..., None] * (GOLD * grain[..., None] - colour)
    colour += bores[..., None] * (0.04 - colour)
    height = 2.2 * np.maximum(tracks, pads) - 5 * bores + 0.12 * fractal(rng, size, 0.02, 2)
    tracks = tracks * (1 - pads)
    return Surface(height, colour, 0.10 + 0.25 * pads, np.ones((size, size), dtype=bool), tracks, pads, pitch)


# ---------------------------------------------------------------------------------------------------------------------
# Defects: each changes a surface in place and returns its (H, W) bool mask


def somewhere(rng: np.random.Generator, surface: Surface, margin: float) -> np.ndarray:
    """(y, x) in [-1, 1], on the part and at least `margin` half sides from its edge."""
    size = surface.part.shape[0]
    framed = np.pad(surface.part, 1)
    depth = ndimage.distance_transform_edt(framed)[1:-1, 1:-1] * 2 / size
    places = np.argwhere(depth > min(margin, 0.95 * depth.max()))
    return places[rng.integers(len(places))] / (size - 1) * 2 - 1


def paint(surface: Surface, where: np.ndarray, colour: np.ndarray) -> None:
    surface.colour[:] = surface.colour * (1 - where[..., None]) + colour * where[..., None]


def scratch(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A bright groove with raised lips."""
    size = surface.part.shape[0]
    start = somewhere(rng, surface, 0.3)
    line = wandering_line(rng, start, rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0), rng.uniform(0.1, 0.5))
    distance, along = distance_to(line, size)
    width = rng.uniform(0.016, 0.028) * (0.35 + 0.65 * np.sin(np.pi * np.clip(along, 0.03, 0.97)))
    groove = smoothstep(1.0, 0.2, distance / width)
    lips = np.exp(-(((distance - 1.3 * width) / (0.5 * width)) ** 2))
    surface.height += -3.0 * groove + 1.1 * lips
    paint(surface, 0.85 * groove, np.array([0.86, 0.87, 0.90]))
    paint(surface, 0.35 * lips, np.array([0.30, 0.30, 0.32]))
    return distance < 2.3 * width


def dent(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A smooth hollow that only its shading shows."""
    size = surface.part.shape[0]
    radius = rng.uniform(0.13, 0.22)
    field = (
        blob(rng, size, somewhere(rng, surface, radius + 0.1), radius, 0.06) / radius
    )  # -1 at the centre, 0 at the rim
    hollow = np.clip(-field, 0, 1)
    surface.height -= rng.uniform(0.12, 0.17) * size * radius * (1 - (1 - hollow) ** 2) ** 1.5
    surface.height += 0.012 * size * radius * np.exp(-((field / 0.12) ** 2))
    return field < 0.24


def stain(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A dried liquid: a thin brown film, darkest at its edge."""
    size = surface.part.shape[0]
    radius = rng.uniform(0.15, 0.26)
    field = blob(rng, size, somewhere(rng, surface, radius + 0.05), radius, 0.22)
    field += 0.05 * noise(rng, size, 0.09) * radius
    film = smoothstep(0.012, -0.012, field)
    edge = np.exp(-(((field + 0.02) / 0.022) ** 2))
    tone = np.array([0.30, 0.19, 0.10]) * rng.uniform(0.85, 1.15)
    mottled = np.clip(0.58 + 0.14 * fractal(rng, size, 0.15), 0.25, 0.85)
    paint(surface, np.clip(film * mottled + 0.25 * edge * (film > 0.05), 0, 0.92), tone)
    return field < 0.012


def hole(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """An insect's hole: black inside, a torn pale rim, and dust around it."""
    size = surface.part.shape[0]
    radius = rng.uniform(0.07, 0.12)
    field = blob(rng, size, somewhere(rng, surface, 0.25), radius, 0.14)
    pit, rim = smoothstep(0.008, -0.03, field), np.exp(-(((field - 0.018) / 0.022) ** 2))
    torn = np.clip(0.75 + 0.35 * fractal(rng, size, 0.05), 0, 1)
    surface.height += -14 * pit + 2.5 * rim * torn
    paint(surface, rim * torn * 0.9, np.array([0.80, 0.62, 0.40]))
    paint(surface, pit, np.array([0.05, 0.035, 0.03]))
    return field < 0.05


def crack(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A dark jagged split with a pale edge and a side branch."""
    size = surface.part.shape[0]
    start, angle = somewhere(rng, surface, 0.25), rng.uniform(0, 2 * np.pi)
    main = jagged_line(rng, start, angle, rng.uniform(0.6, 0.9))
    branch = jagged_line(rng, main[rng.integers(50, 150)], angle + rng.choice([-0.8, 0.8]), rng.uniform(0.15, 0.3))
    mask = np.zeros((size, size), dtype=bool)
    for line, widest in ((main, rng.uniform(0.022, 0.034)), (branch, 0.016)):
        distance, along = distance_to(line, size)
        width = widest * (1.05 - np.clip(along, 0, 1))
        split = smoothstep(1.0, 0.5, distance / width) * surface.part
        edge = np.exp(-(((distance - 1.3 * width) / (0.45 * width)) ** 2)) * surface.part
        surface.height -= 6 * split
        paint(surface, 0.5 * edge, np.array([0.72, 0.52, 0.34]))
        paint(surface, split, np.array([0.06, 0.04, 0.03]))
        mask |= (distance < 2.5 * width) & surface.part
    return mask


def tear(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A hole in the weave: dark ground behind, loose pale threads across its edge."""
    size = surface.part.shape[0]
    radius = rng.uniform(0.11, 0.18)
    centre = somewhere(rng, surface, radius + 0.12)
    field = blob(rng, size, centre, radius, 0.18)
    gap, edge = smoothstep(0.01, -0.02, field), np.exp(-((field / 0.025) ** 2))
    tone = surface.colour.mean(axis=(0, 1))
    surface.height += 2.0 * edge - 8 * gap
    paint(surface, 0.5 * edge, np.clip(1.5 * tone, 0, 1))
    paint(surface, gap, np.array([0.07, 0.07, 0.08]))
    mask = field < 0.05
    for _ in range(rng.integers(5, 10)):
        angle = rng.uniform(0, 2 * np.pi)
        start = centre + radius * 0.95 * np.array([np.sin(angle), np.cos(angle)])
        inward = angle + np.pi + rng.normal(0, 0.5)
        distance, _ = distance_to(wandering_line(rng, start, inward, rng.uniform(0.4, 1.1) * radius, 1.2), size)
        thread = smoothstep(0.014, 0.006, distance)
        surface.height += 4 * thread
        paint(surface, 0.9 * thread, np.clip(1.35 * tone, 0, 1))
        mask |= distance < 0.014
    return mask


def track_places(surface: Surface, edge: bool) -> np.ndarray:
    """(n, 2) places (y, x) in [-1, 1] in the middle of a track or at its edge, away from the border and from pads."""
    size = len(surface.tracks)
    inside = surface.tracks > 0.5
    depth = ndimage.distance_transform_edt(inside)
    widest = np.median(ndimage.maximum_filter(depth, size // 20)[inside])
    wanted = inside & ((depth < 1.5) if edge else (depth > 0.8 * widest))
    y, x = grid(size)
    plain = ndimage.gaussian_filter(inside * 1.0, size / 25) > 0.15  # not at a track's end
    far = ndimage.distance_transform_edt(surface.pads < 0.4) > 0.25 * surface.pitch * size
    return np.argwhere(wanted & plain & far & (np.maximum(abs(y), abs(x)) < 0.7)) / (size - 1) * 2 - 1


def etch(rng: np.random.Generator, surface: Surface, field: np.ndarray, copper: bool) -> np.ndarray:
    """Lays copper where `field` is below 0, or takes it away; returns the mask of what changed, with a margin.

    Candidates are blended in over the margin. Without it, the track's old edge would show through.
    """
    size = len(surface.tracks)
    where = smoothstep(0.008, -0.008, field)
    ink = where * ((1 - surface.tracks) if copper else surface.tracks)
    like = surface.tracks > 0.9 if copper else surface.tracks < 0.1
    tone = np.median(surface.colour[like], axis=0)
    distance, margin = ndimage.distance_transform_edt(ink < 0.3), size / 100
    grain = 1 + 0.05 * fractal(rng, size, 0.03, 2)
    paint(surface, where * (distance <= margin), tone * grain[..., None])  # over the track's old edge, too
    surface.height += (2.2 if copper else -2.2) * ink
    return distance <= 1.5 * margin


BUMPS = 0.5  # on the outlines of open circuits, mouse bites and spurs; docs/ablation.md compares them with real ones


def etch_blob(
    rng: np.random.Generator, surface: Surface, radii: tuple[float, float], *outline: float, edge: bool, copper: bool
) -> np.ndarray:
    """Etches a blob at one of `track_places`.

    Args:
        radii: least and greatest radius, in pitches.
        outline: `rough` and `bumps` of the blob.
    """
    radius = surface.pitch * rng.uniform(*radii)
    field = blob(rng, len(surface.tracks), rng.choice(track_places(surface, edge)), radius, *outline)
    return etch(rng, surface, field, copper)


def open_track(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A gap in a track, with ragged ends."""
    return etch_blob(rng, surface, (0.28, 0.42), 0.2, BUMPS, edge=False, copper=False)


def short(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """Copper between a track and the next."""
    size = len(surface.tracks)
    places = track_places(surface, edge=False)
    dy, dx = np.gradient(ndimage.gaussian_filter(surface.tracks, size / 60))
    for _ in range(50):
        start = rng.choice(places)
        beside = tuple(np.clip(pixels(start, size) + 3, 0, size - 1))  # in the very middle there is no slope
        across = np.arctan2(dy[beside], dx[beside]) + rng.choice([0, np.pi])
        line = wandering_line(rng, start, across, surface.pitch, 0.4)
        rows, columns = np.clip(pixels(line, size), 0, size - 1).T
        if surface.tracks[rows[-1], columns[-1]] > 0.5 and surface.pads[rows, columns].max() < 0.4:
            break  # there is a next track, and no pad between
    distance, along = distance_to(line, size)
    width = surface.pitch * rng.uniform(0.1, 0.16) * (1 + 0.3 * np.abs(2 * along - 1) ** 2)
    return etch(rng, surface, distance - width, copper=True)


def mouse_bite(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A nibbled notch in a track's edge."""
    return etch_blob(rng, surface, (0.17, 0.24), 0.2, BUMPS, edge=True, copper=False)


def spur(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A bump of copper on a track's edge."""
    return etch_blob(rng, surface, (0.17, 0.26), 0.15, BUMPS, edge=True, copper=True)


def pin_hole(rng: np.random.Generator, surface: Surface) -> np.ndarray:
    """A small round hole in a track."""
    return etch_blob(rng, surface, (0.1, 0.14), 0.08, edge=False, copper=False)


Part = Callable[[np.random.Generator, int], Surface]
Defect = Callable[[np.random.Generator, Surface], np.ndarray]

PARTS: dict[str, tuple[Part, dict[str, Defect]]] = {
    "plate": (plate, {"scratch": scratch, "dent": dent, "stain": stain}),
    "nut": (nut, {"hole": hole, "crack": crack}),
    "cloth": (cloth, {"tear": tear, "stain": stain}),
    "board": (
        board,
        {"open": open_track, "short": short, "mouse_bite": mouse_bite, "spur": spur, "pin_hole": pin_hole},
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files


def unlit(part: str, kind: str, size: int, seed: tuple[int, ...]) -> tuple[np.random.Generator, Surface]:
    """A part without a defect and light yet, and the generator that draws the rest; `kind` is a defect or "good"."""
    rng = np.random.default_rng([*seed, *part.encode(), *kind.encode()])
    return rng, PARTS[part][0](rng, 2 * size)


def render(part: str, defect: str | None, size: int, seed: tuple[int, ...]) -> tuple[Image.Image, Image.Image | None]:
    """An image of a part, `size` pixels a side, and its mask (255 inside the defect), None for a good one."""
    rng, surface = unlit(part, defect or "good", size, seed)
    mask = PARTS[part][1][defect](rng, surface) if defect else None
    picture = light(rng, surface, rng.uniform(0.9, 1.15))
    half = picture.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    image = Image.fromarray((half * 255).round().astype(np.uint8))
    return image, None if mask is None else mask_image(mask)


def good_mask(part: str, defect: str, size: int, seed: tuple[int, ...]) -> Image.Image:
    """A mask (255 inside) where such a defect could be on the good part that `render` draws from this seed."""
    return mask_image(PARTS[part][1][defect](*unlit(part, "good", size, seed)))


def mask_image(mask: np.ndarray) -> Image.Image:
    """A (2 S, 2 S) bool mask as an image of S pixels a side, 255 where half of a pixel is inside."""
    size = len(mask) // 2
    return Image.fromarray(mask.reshape(size, 2, size, 2).mean(axis=(1, 3)) >= 0.5).convert("L")


def write_parts(
    folder: Path,
    parts: Iterable[str],
    size: int,
    defects: int,
    good: int,
    seed: int,
    processes: int = 1,
    types: Collection[str] = (),
    good_masks: Collection[str] = (),
) -> None:
    """Writes parts in MVTec AD's layout: `defects` pairs of each type and `good` images, `size` pixels a side.

    Args:
        types: of defect; all if empty.
        good_masks: types of defect for which each good image gets a mask, in `good_masks/<type>/`.
    """
    jobs = []
    for part in parts:
        of_part = folder / part
        jobs += [(part, None, i, of_part / "train/good" / f"{i:03d}.png", None) for i in range(good)]
        for defect in (d for d in PARTS[part][1] if d in good_masks):
            masks = of_part / "good_masks" / defect
            jobs += [(part, defect, i, None, masks / f"{i:03d}_mask.png") for i in range(good)]
        for defect in (d for d in PARTS[part][1] if not types or d in types):
            masks = of_part / "ground_truth" / defect
            jobs += [
                (part, defect, i, of_part / "test" / defect / f"{i:03d}.png", masks / f"{i:03d}_mask.png")
                for i in range(defects)
            ]
    write = functools.partial(write_part, size, seed)
    with ProcessPoolExecutor(processes) as pool:
        for _ in tqdm((pool.map if processes > 1 else map)(write, jobs), total=len(jobs), desc="Images"):
            pass


def write_part(size: int, seed: int, job: tuple[str, str | None, int, Path | None, Path | None]) -> None:
    """One image of `write_parts`, its mask, or both."""
    part, defect, index, *paths = job
    seeds = (seed, index)
    pictures = render(part, defect, size, seeds) if paths[0] else (None, good_mask(part, defect, size, seeds))
    for picture, path in zip(pictures, paths):
        if picture is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def enlarge(folder: str, size: int) -> None:
    """Enlarges the images and masks of a folder to `size` px a side; to draw them in that size takes seconds each."""
    for file in Path(folder).rglob("*.png"):
        with Image.open(file) as image:
            method = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BICUBIC
            image.resize((size, size), method).save(file)
