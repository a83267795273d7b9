"""Preview the masks that generate_defectfill.py would use, without a model.

    python scripts/preview_masks.py --image good_images --mask_source references --reference_data mvtec/hazelnut \\
        --defect hole --number 200 --output masks.png

Takes the image and mask flags of generate_defectfill.py. Writes a grid of good images, with the object outlined in
blue, the allowed region in yellow and the mask in red; above it the references, with their masks in green. Prints how
much of the masks lies on the object, and compares their areas, angles and distances to the object's border with those
of the references.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from defectfill.runs.files import save_image
from defectfill.runs.flags import add_input_flags, check_input_flags
from defectfill.runs.inputs import read_source_images, read_sources
from defectfill.runs.plan import MOST_IMAGES
from defectfill.runs.report import stack
from defectfill.runs.source_images import repeat_seed
from defectfill_dataset import Problem, binarise, find_foreground, load_image, load_mask_rows, principal_axis
from defectfill_dataset.commands import Parser, exit_on_input_error, say
from defectfill_dataset.masks import bounds
from defectfill_dataset.synthesis.foreground import cover_defect
from defectfill_dataset.synthesis.locations import CLEARANCE, locate, map_object
from defectfill_dataset.synthesis.shapes import LONG, cut_out


CELL = 192  # pixels a side of the grid's cells
COLUMNS = 8
REFERENCES = 16  # that are shown at most
BLUE, YELLOW, RED, GREEN = (60, 120, 255), (255, 220, 0), (255, 0, 0), (0, 200, 60)


def outlined(image: Image.Image, outlines: list[tuple[np.ndarray, tuple]]) -> Image.Image:
    """The image, CELL pixels at most a side, with the outlines of (H, W) bool areas, however thin."""
    step = max(image.size) / CELL
    size = tuple(max(1, round(side / step)) for side in image.size)
    pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
    for area, colour in outlines:
        small = np.asarray(Image.fromarray(area).convert("L").resize(size, Image.Resampling.BOX)) > 0
        pixels[small & ~ndimage.binary_erosion(small, border_value=0)] = colour
    return Image.fromarray(pixels)


def grid_of(pictures: list[Image.Image]) -> Image.Image:
    rows = math.ceil(len(pictures) / COLUMNS)
    sheet = Image.new("RGB", (min(len(pictures), COLUMNS) * (CELL + 4) + 4, rows * (CELL + 4) + 4), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (4 + i % COLUMNS * (CELL + 4), 4 + i // COLUMNS * (CELL + 4)))
    return sheet


def clearance(mask: np.ndarray, part: np.ndarray) -> float:
    """The distance of a mask from the border of the object, both (H, W) bool, in % of the object's size."""
    left, top, _, _ = bounds(mask)
    _, [location] = locate(cut_out(mask), np.array([[top, left]]), map_object(part | mask))
    return 100 * float(location[CLEARANCE])


def figures_of(masks: list[tuple[np.ndarray, int]]) -> str:
    """Quartiles of the areas, in % of the image, and of the long ones' angles; `masks` are (pixels, image's area)."""
    areas = [100 * mask.sum() / area for mask, area in masks]
    angles = [angle for angle, length in (principal_axis(mask) for mask, _ in masks) if length >= LONG]
    text = f"{len(masks)} masks, area {quartiles(areas, '.3f')} % of the image"
    return f"{text}; {len(angles)} long ones, angle {quartiles(angles, '.0f')} degrees" if angles else text


def quartiles(values: list[float], form: str) -> str:
    return " | ".join(f"{value:{form}}" for value in np.quantile(values, [0.25, 0.5, 0.75]))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_input_flags(parser)
    parser.add_argument(
        "--number", type=int, metavar="N", help="Number of masks to sample. Default: one for each image."
    )
    parser.add_argument("--shown", type=int, default=48, metavar="N", help="Number of masks to show in the grid.")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="PNG file to write the grid to.")
    args = parser.parse_args(input_args)
    check_input_flags(parser, args)
    if len(args.defect or ()) > 1:
        parser.error(f"--defect {' '.join(args.defect)}: one at a time")
    for flag in ("number", "shown"):
        if getattr(args, flag) is not None and not 1 <= getattr(args, flag) <= MOST_IMAGES:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1 and at most {MOST_IMAGES:,}")
    return args


def main(args: argparse.Namespace) -> None:
    [defect] = args.defect or [None]
    source_images = read_source_images(args)
    sources = read_sources(args, defect)
    pictures, shares, clearances, drawn, without = [], [], [], [], []
    number = args.number or len(source_images)
    for index in tqdm(range(number), desc="Masks"):
        repeat, place = divmod(index, len(source_images))
        source_image, seed = source_images[place], repeat_seed(args.seed, repeat)
        image, placed = source_image.load_with_mask(seed, sources[index % len(sources)][0])
        if placed is None:
            without.append(Problem("DF340", f"{source_image.file.name}, image {repeat + 1}", "no room for its mask"))
            continue
        areas = source_image.load()[1]
        part = areas["foreground"] if "foreground" in areas else find_part(image, args.foreground)
        shares.append((part & placed.mask).sum() / placed.mask.sum())
        shapes = [defect.shape for defect in placed.defects] or [placed.mask]
        drawn += [(shape, placed.mask.size) for shape in shapes]
        clearances.append(clearance(placed.mask, part))
        if len(pictures) < args.shown:
            roi = [(areas["roi"], YELLOW)] if "roi" in areas else []
            pictures.append(outlined(image, [(part, BLUE), *roi, (placed.mask, RED)]))
    above, lines = describe_references(args, defect) if args.reference_data else ([], [])
    if drawn:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_image(stack([grid_of(rows) for rows in (above, pictures) if rows]), args.output)
        say(f"drawn: {figures_of(drawn)}")
        say(f"on the object: {100 * np.mean(shares):.2f} % of a mask's pixels, {100 * min(shares):.2f} % at least")
        say(f"distance to the border: {quartiles(clearances, '.1f')} % of the object's size")
    say(*lines)
    if without:
        raise SystemExit(f"Without a mask, {len(without)} of {number}:\n" + "\n".join(map(str, without)))


def find_part(image: Image.Image, foreground: str) -> np.ndarray:
    """The object, (H, W) bool, where none is given for the image."""
    return np.ones((image.height, image.width), dtype=bool) if foreground == "none" else find_foreground(image)


def describe_references(args: argparse.Namespace, defect: str | None) -> tuple[list[Image.Image], list[str]]:
    """Pictures of the first references, and figures of all."""
    rows = load_mask_rows(
        args.reference_data, args.object, args.split, defect, False, None, args.layout, args.mask_classes,
        args.skip_problems,
    )  # fmt: skip
    pictures, masks, clearances = [], [], []
    for row in rows:
        image, mask = load_image(row["image"]), binarise(row["mask"])
        part = find_part(cover_defect(image, mask), args.foreground)
        masks.append((mask, mask.size))
        clearances.append(clearance(mask, part))
        if len(pictures) < REFERENCES:
            pictures.append(outlined(image, [(part, BLUE), (mask, GREEN)]))
    figures = f"references: {figures_of(masks)}"
    return pictures, [figures, f"their distance to the border: {quartiles(clearances, '.1f')} % of the object's size"]


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
