"""Look a dataset over before training: every problem at once, figures, and a picture with the masks outlined.

    python scripts/check_data.py mvtec/hazelnut
    python scripts/check_data.py mvtec --output_dir report

Prints, for every object, its problems and what is suspicious, then a table of its defect types. The exit status is 0
if everything can be used, 2 if not. In the output folder: report.json and a contact sheet of each object.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from defectfill.files import write_json
from defectfill_dataset import (
    InputError,
    MaskClasses,
    exit_on_input_error,
    find_objects,
    load_image,
)
from defectfill_dataset.checks import skippable
from defectfill_dataset.errors import did_you_mean, folded, one_line
from defectfill_dataset.inputs import add_reading_flags
from defectfill_dataset.report import ObjectReport, check_object


CELL, COLUMNS, MOST = 192, 8, 48  # of a contact sheet: pixels a picture, pictures a row, pictures


def contact_sheet(report: ObjectReport) -> Image.Image:
    """Up to `MOST` defective pictures with the outline of their masks, spread over the dataset."""
    usable = [(row, x) for row, x in zip(report.rows, report.looks) if row.mask and not x.problems]
    chosen = [usable[i] for i in np.linspace(0, len(usable) - 1, min(MOST, len(usable))).astype(int)]
    lines = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + 4) + 4, max(1, lines) * (CELL + 20) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, x) in enumerate(chosen):
        left, top = 4 + i % COLUMNS * (CELL + 4), 4 + i // COLUMNS * (CELL + 20)
        sheet.paste(outlined(load_image(Image.open(row.image)), row.mask.render()), (left, top))
        draw.text((left, top + CELL + 3), f"{row.defect} {row.image.stem}  {100 * x.area:.2f} %"[:32], fill="black",
                  font=ImageFont.load_default(11))  # fmt: skip
    return sheet


def outlined(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture, `CELL` pixels a side, with a red line around the (H, W) mask."""
    small = np.array(image.resize((CELL, CELL), Image.Resampling.BOX))
    cells = Image.fromarray(mask).convert("L").resize((CELL, CELL), Image.Resampling.BOX)
    inside = np.asarray(cells) > 0
    small[ndimage.binary_dilation(inside, iterations=2) & ~inside] = (255, 0, 0)
    return Image.fromarray(small)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="An object's folder, or one above several.")
    add_reading_flags(add, "DIR")
    add("--object", metavar="NAME", help="Only this object.")
    add("--split", default="auto", metavar="RULE|FILE", help="As in training. Default: %(default)s.")
    add("--resolution", type=int, default=512, metavar="PX", help="Of the training to come. Default: %(default)s.")
    add("--vae_scale_factor", type=int, default=8, metavar="N", help="Pixels a latent cell. Default: %(default)s.")
    add("--output_dir", type=Path, metavar="DIR", help="Where report.json and the contact sheets go.")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    objects = find_objects(args.data_dir, args.layout)
    if args.object and args.object not in objects:
        raise InputError(f"DF162 --object {args.object}: not in {args.data_dir}.{did_you_mean(args.object, objects)}")
    reports = []
    for name, root in objects.items():
        if args.object not in (None, name):
            continue
        grid = args.resolution // args.vae_scale_factor
        report = check_object(root, name, args.resolution, grid, args.layout, args.split,
                              MaskClasses.parse(args.mask_classes), args.skip_problems)  # fmt: skip
        reports.append(report)
        if args.output_dir:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            contact_sheet(report).save(args.output_dir / f"{name}.png")
        print_report(report)
    if args.output_dir:
        content = {"resolution": args.resolution, "objects": [report.as_json() for report in reports]}
        write_json(args.output_dir / "report.json", content)
    if any(report.problems for report in reports):
        sys.exit(2)


def print_report(report: ObjectReport) -> None:
    """Split, problems and notes, then a line for each defect type."""
    print(f"\n{report.name}: {len(report.images('train'))} references, {len(report.images('test'))} held out")
    problems, skipped = list(map(str, report.problems)), [f"left out: {problem}" for problem in report.skipped]
    print("\n".join([*folded(problems), *folded(skipped), *folded(report.notes)]) or "nothing wrong found")
    if problems and all(map(skippable, report.problems)):
        print("With --skip_problems these images are left out, and the others train.")
    for defect, found in report.figures().items():
        print(f"  {one_line(defect)}: " + ", ".join(f"{k} {v}" for k, v in found.items()))


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
