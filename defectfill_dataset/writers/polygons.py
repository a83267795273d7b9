"""Masks as shapes: the closed lines along the borders of their pixels."""

import numpy as np
from scipy.spatial import cKDTree

from ..masks import polygon_mask


STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up, with the inside on the right hand
STARTS = ((0, 0), (1, 0), (1, 1), (0, 1))  # the corner of its pixel from which each of them leaves


def outlines(component: np.ndarray) -> list[np.ndarray]:
    """The (n, 2) corners (x, y) of each outline of an (h, w) component: the outer one, then its holes."""
    inside = np.pad(component, 1)
    edges: dict[tuple[int, int, int], None] = {}  # (x, y, direction), in the order of the rows
    for direction, ((dx, dy), (right, down)) in enumerate(zip(STEPS, STARTS)):
        rows, columns = np.nonzero(inside & ~np.roll(inside, (dx, -dy), axis=(0, 1)))
        corners = np.stack([columns - 1 + right, rows - 1 + down, np.full_like(rows, direction)], axis=1)
        edges |= dict.fromkeys(map(tuple, corners.tolist()))
    lines = []
    while edges:
        first = edge = next(iter(edges))
        line = []
        while True:
            x, y, direction = edge
            x, y = x + STEPS[direction][0], y + STEPS[direction][1]
            turns = ((direction - 1) % 4, direction, (direction + 1) % 4)  # left first: on to the pixel at the corner
            edge = next((x, y, turn) for turn in turns if (x, y, turn) in edges)
            if edge[2] != direction:
                line.append((x, y))
            del edges[edge]
            if edge == first:
                break
        lines.append(np.array(line))
    return lines


def exact_polygon(component: np.ndarray) -> np.ndarray | None:
    """The (n, 2) corners (x, y) of an (h, w) component if `polygon_mask` restores it: no hole, not too thin."""
    outer = outlines(component)[0]
    height, width = component.shape
    seen = polygon_mask([(x + 1, y + 1) for x, y in outer], (width + 2, height + 2))
    return outer if np.array_equal(seen, np.pad(component, 1)) else None


def joined_polygon(component: np.ndarray) -> np.ndarray:
    """The (n, 2) corners (x, y) of one closed line around an (h, w) component, in and out of its holes."""
    whole, *holes = outlines(component)
    for hole in holes:
        distances, nearest = cKDTree(whole).query(hole)
        there = int(distances.argmin())
        here = nearest[there]
        whole = np.concatenate([whole[: here + 1], hole[there:], hole[: there + 1], whole[here:]])
    return whole
