"""Contact sheets: a dataset's images with their masks outlined, for a person to review.

A picture is a thumbnail or an enlarged detail of an image, at most `CELL` pixels a side; H x W are the image's pixels,
h x w the picture's.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .checks import ImageReport
from .crops import Box, crop_mask, fit_box
from .images import load_image, open_image
from .letters import Letters
from .masks import components
from .readers import GOOD, Row
from .report import ObjectReport


CELL, GAP, COLUMNS = 226, 12, 8  # pixels a side of the square that a picture fits in, and between two; across a page
MOST_DEFECTS, MOST_GOOD = 48, COLUMNS  # images on a sheet
SMALL, THIN = 20, 3  # thumbnail pixels: what is shorter, or thinner on average, is shown enlarged too
CONTEXT, LEAST = 3, 32  # side of an enlarged detail: times the defect's longer side; pixels of the image
COARSE = 1024  # pixels a side at which the components of a mask are found
TITLE = 19  # pixels high, of text
NEAR, FAR = (255, 232, 0), (0, 0, 0)  # of the outline: one of them stands out from any picture
LEGEND = (
    "The yellow and black line outlines the mask. Below each image: its defect type, the share that is marked, its "
    "file. References are used for training; held-out images are not."
)
MARKS = {  # fill and letters: apart in lightness too, for whoever does not see the colours
    "reference": ((0, 90, 160), (255, 255, 255)),
    "held out": ((240, 165, 0), (0, 0, 0)),
    "good": ((255, 255, 255), (0, 0, 0)),
    "not used": ((110, 110, 110), (255, 255, 255)),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image on the sheet.

    Args:
        pictures: its thumbnail, and an enlarged detail where the thumbnail shows too little.
        mark: one of `MARKS`, "" where the split is not known.
    """

    pictures: tuple[Image.Image, ...]
    mark: str
    caption: str

    @property
    def width(self) -> int:
        return len(self.pictures) * (CELL + GAP) - GAP


def contact_sheet(report: ObjectReport) -> Image.Image:
    """The images of an object, a section for each defect type and one for the good; those with problems are not shown.

    Returns:
        An RGB picture, at most `COLUMNS` pictures wide.
    """
    types = [*(t for t in report.figures() if t != GOOD), GOOD]
    found = {t: [(row, x) for row, x in zip(report.rows, report.image_reports) if row.defect == t] for t in types}
    marks = {row.image: mark for split, mark in (("train", "reference"), ("test", "held out"), ("good", "good"))
             for row in report.splits.get(split, [])}  # fmt: skip
    unknown = "not used" if report.splits else ""
    usable = {t: [pair for pair in pairs if not pair[1].problems] for t, pairs in found.items()}
    for pairs in usable.values():
        pairs.sort(key=lambda pair: marks.get(pair[0].image) != "reference")
    shares = fair_shares([len(usable[t]) for t in types[:-1]], MOST_DEFECTS) + [min(MOST_GOOD, len(usable[GOOD]))]
    sections = []
    for t, share in zip(types, shares):
        if found[t]:
            chosen = [usable[t][i] for i in np.linspace(0, len(usable[t]) - 1, share).round().astype(int)]
            entries = [entry(row, x, marks.get(row.image, unknown)) for row, x in chosen]
            sections.append((section_title(t, found[t], marks, share), entries))
    return laid_out(report.name, sections)


def fair_shares(numbers: Sequence[int], most: int) -> list[int]:
    """How many of each kind to take: in turn one of each, until there are `most`; but at least one of each."""
    shares = [min(n, 1) for n in numbers]
    while more := [i for i, n in enumerate(numbers) if n > shares[i]]:
        if sum(shares) + len(more) > most:
            break
        for i in more:
            shares[i] += 1
    return shares


def section_title(defect: str, found: Sequence[tuple[Row, ImageReport]], marks: dict[Path, str], shown: int) -> str:
    kinds = [marks.get(row.image, "") for row, _ in found]
    numbers = {
        "images": len(found),
        "references": kinds.count("reference"),
        "held out": kinds.count("held out"),
        "with problems": sum(bool(x.problems) for _, x in found),
        "shown": shown if shown < len(found) else 0,
    }
    told = [f"{n} {what[:-1] if n == 1 and what in ('images', 'references') else what}"
            for what, n in numbers.items() if n]  # fmt: skip
    return f"{defect}: {', '.join(told)}"


def entry(row: Row, x: ImageReport, split: str) -> Entry:
    mask = row.mask.render() if row.mask else None  # before the image, so that memory need not hold more
    image = load_image(open_image(row.image))
    size = f"{image.width} x {image.height} px"
    whole = picture(image, (0, 0, *image.size), mask)
    if mask is None:
        return Entry((whole,), split, f"{x.defect}, {size}\n{x.name}")
    share = np.format_float_positional(100 * x.area, 3, fractional=False, trim="-")
    caption = f"{x.defect}, {share} % of {size}\n{x.name}"
    detail = detail_box(mask)
    if not detail:
        return Entry((whole,), split, caption)
    left, top, right, bottom = fit_box(detail, image.size, whole.size)
    far = max(1, 9 - (right - left) // 2)  # the frame must not hide what it is drawn around
    for i, colour in ((0, "black"), (1, "white")):
        ends = min(right + far, whole.width - 1) - i, min(bottom + far, whole.height - 1) - i
        ImageDraw.Draw(whole).rectangle((max(left - far, 0) + i, max(top - far, 0) + i, *ends), outline=colour)
    side = detail[2] - detail[0]
    told = f"right: the {side} x {side} px in the frame, at {100 * CELL / side:.0f} %"
    return Entry((whole, picture(image, detail, mask)), split, f"{caption}\n{told}")


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(w, h) of the same aspect as (W, H), the longer of them `side`."""
    width, height = (max(1, round(n * side / max(size))) for n in size)
    return width, height


def picture(image: Image.Image, box: Box, mask: np.ndarray | None) -> Image.Image:
    """What lies in a box of the image, at its aspect, `CELL` pixels the longer side, with an outline of the mask."""
    size = fitted((box[2] - box[0], box[3] - box[1]), CELL)
    way = Image.Resampling.BICUBIC if size[0] > box[2] - box[0] else Image.Resampling.BOX
    pixels = np.array(image.resize(size, way, box))
    if mask is not None:
        inside = pooled(crop_mask(mask, box), size)
        for colour, reach in ((FAR, 3), (NEAR, 2)):
            pixels[ndimage.binary_dilation(inside, np.ones((3, 3)), reach) & ~inside] = colour
    pixels[[0, -1]] = pixels[:, [0, -1]] = 150  # where a white picture ends
    return Image.fromarray(pixels)


def pooled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An (H, W) mask as (h, w), for a size of (w, h): marked if any pixel there is, so that nothing gets lost."""
    starts = [np.arange(new) * old // new for new, old in zip(size[::-1], mask.shape)]
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, starts[0], axis=0), starts[1], axis=1)


def detail_box(mask: np.ndarray) -> Box | None:
    """The square around the largest connected component of an (H, W) mask, if its thumbnail shows too little.

    A component that is too short is shown in its surroundings; of a long, thin one a part of its middle.
    """
    height, width = mask.shape
    coarse = fitted((width, height), min(COARSE, max(width, height)))
    left, top, component = max(components(pooled(mask, coarse)), key=lambda found: np.count_nonzero(found[2]))
    box = fit_box((left, top, left + component.shape[1], top + component.shape[0]), coarse, (width, height))
    longer, scale = max(box[2] - box[0], box[3] - box[1]), CELL / max(width, height)
    if longer * scale >= SMALL and np.count_nonzero(crop_mask(mask, box)) / longer * scale >= THIN:
        return None
    side = min(max(CONTEXT * longer if longer * scale < SMALL else CELL // 2, LEAST), width, height)
    if 2 * side > max(width, height):
        return None
    cells = np.argwhere(component) + 0.5
    # On the component, at its middle.
    y, x = cells[np.abs(cells - np.array(component.shape) / 2).sum(axis=1).argmin()] + (top, left)
    left = int(np.clip(x * width / coarse[0] - side / 2, 0, width - side))
    top = int(np.clip(y * height / coarse[1] - side / 2, 0, height - side))
    return left, top, left + side, top + side


def laid_out(name: str, sections: Sequence[tuple[str, list[Entry]]]) -> Image.Image:
    """A page with the object's name and its sections, as wide as its widest line of entries."""
    entries = [entry for _, group in sections for entry in group]
    letters = Letters([name, *(title for title, _ in sections), *(entry.caption for entry in entries), LEGEND, *MARKS])
    # As few lines as can be, and then as few columns.
    lines = {title: min((in_lines(group, n) for n in range(2, COLUMNS + 1)), key=len) for title, group in sections}
    width = max([CELL, *(sum(e.width + GAP for e in line) - GAP for group in lines.values() for line in group)])
    parts = [letters.block(name, width, TITLE), letters.block(LEGEND if entries else "No image can be shown.", width)]
    for title, group in lines.items():
        parts += [letters.block(title, width, TITLE), *(line_of(line, letters) for line in group)]
    page = Image.new("RGB", (width + 2 * GAP, sum(part.height + GAP for part in parts) + GAP), "white")
    top = GAP
    for part in parts:
        page.paste(part, (GAP, top))
        top += part.height + GAP
    return page


def in_lines(entries: Iterable[Entry], most: int) -> list[list[Entry]]:
    """The entries in order, in lines of so many pictures at most."""
    lines: list[list[Entry]] = []
    for entry in entries:
        if not lines or sum(len(e.pictures) for e in [*lines[-1], entry]) > most:
            lines.append([])
        lines[-1].append(entry)
    return lines


def line_of(entries: Iterable[Entry], letters: Letters) -> Image.Image:
    """Entries side by side: their pictures, and the mark and caption below."""
    placed, left = list[tuple[Image.Image, tuple[int, int]]](), 0
    for entry in entries:
        top = max(picture.height for picture in entry.pictures) + 3
        for i, picture in enumerate(entry.pictures):
            placed.append((picture, (left + i * (entry.pictures[0].width + 3), 0)))
        if entry.mark:
            placed.append((badge := letters.badge(entry.mark, *MARKS[entry.mark]), (left, top)))
            top += badge.height
        placed.append((letters.block(entry.caption, entry.width), (left, top)))
        left += entry.width + GAP
    line = Image.new("RGB", (left - GAP, max(top + image.height for image, (_, top) in placed)), "white")
    for image, corner in placed:
        line.paste(image, corner)
    return line
