"""Check a dataset before training: every problem at once, statistics, and contact sheets with the masks outlined.

    python scripts/check_data.py mvtec/hazelnut
    python scripts/check_data.py mvtec --output_dir report

Prints the problems and warnings of every object, and a table of its defect types. Writes report.json and a contact
sheet of each object: defects outlined, small ones enlarged as well, and some good images. The exit status is 0 if
everything can be used, 2 if not.
"""

import argparse
import sys
import unicodedata
from pathlib import Path

from defectfill.runs.disks import told_if_unwritable
from defectfill.runs.files import is_record, refuse_foreign, save_image, write_json
from defectfill_dataset import InputError, MaskClasses, Problem, find_objects
from defectfill_dataset.checks import skippable
from defectfill_dataset.commands import Parser, add_reading_flags, exit_on_input_error, say
from defectfill_dataset.errors import did_you_mean, folded, one_line
from defectfill_dataset.report import ObjectReport, check_object, check_prompts
from defectfill_dataset.sheets import contact_sheet


AGAIN = "make room on the disk and run the same command again, or leave out --output_dir"
REPORT = "report.json"
COLUMNS = {  # of the table: figures of a defect type, and what they are called
    "shapes": "shapes", "width": "width", "height": "height", "area_percent": "mask %", "latent_cells": "cells",
    "latent_cells_with_zoom": "cells zoomed",
}  # fmt: skip
LEGEND = """
Numbers are minimum / median / maximum, or one number if they are equal. Shapes: drawn in annotation files. Width,
height: in pixels. Mask %: of the image. Cells: cells of the latent grid that the mask marks; a cell is the finest
detail that the model can generate. Zoomed: in the smallest crop that training may use."""


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="Folder of one object, or a folder above several.")
    add_reading_flags(add, "DIR")
    add("--object", metavar="NAME", help="Check only this object.")
    add(
        "--split",
        default="auto",
        metavar="RULE|FILE",
        help="Defects that training uses: auto, first_third, all, or a split.json.",
    )
    add(
        "--pretrained_model_name_or_path",
        metavar="BASE",
        help="Base model to train, to check the length of the prompts that the names give by its tokenizer.",
    )
    add("--resolution", type=int, default=512, metavar="PX", help="Resolution to train at.")
    add(
        "--vae_scale_factor", type=int, default=8, metavar="N", help="Pixels per cell of the base model's latent grid."
    )
    add("--output_dir", type=Path, metavar="DIR", help="Folder for report.json and a contact sheet of each object.")
    args = parser.parse_args(input_args)
    if not 1 <= args.vae_scale_factor <= args.resolution <= 8192:
        shown = f"--vae_scale_factor {args.vae_scale_factor}, --resolution {args.resolution}"
        parser.error(f"{shown}: must be at least 1 and at most 8192, the first no more than the other")
    return args


def main(args: argparse.Namespace) -> None:
    objects = find_objects(args.data_dir, args.layout)
    if args.object and args.object not in objects:
        what = f"not in {args.data_dir}.{did_you_mean(args.object, objects)}"
        raise InputError(Problem("DF162", f"--object {args.object}", what))
    check_own(args.output_dir, [args.object] if args.object else list(objects))
    reports, tokenizer = [], read_tokenizer(args.pretrained_model_name_or_path)
    for name, root in objects.items():
        if args.object not in (None, name):
            continue
        grid = args.resolution // args.vae_scale_factor
        report = check_object(root, name, args.resolution, grid, args.layout, args.split,
                              MaskClasses.parse(args.mask_classes), args.skip_problems)  # fmt: skip
        check_prompts(report, tokenizer)
        reports.append(report)
        print_report(report)
    if args.output_dir:
        content = {"resolution": args.resolution, "objects": [report.as_json() for report in reports]}
        with told_if_unwritable(args.output_dir, AGAIN):
            args.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(args.output_dir / REPORT, content)  # first: it tells that the sheets are ours
            for report in reports:
                save_image(contact_sheet(report), args.output_dir / f"{report.name}.png")
    say(*LEGEND.splitlines())
    say(
        f"Contact sheets and report.json: {args.output_dir}"
        if args.output_dir
        else "Add --output_dir DIR for a contact sheet of each object."
    )
    if any(report.problems for report in reports):
        sys.exit(2)


def read_tokenizer(base: str | None):
    """The tokenizer of a base model, None if none is given."""
    if base is None:
        return None
    from defectfill.base_model import load_tokenizer, read_base  # slow, and of no use for images

    return load_tokenizer(read_base(base, None, None, None), None)


def check_own(folder: Path | None, objects: list[str]) -> None:
    """Raises InputError (DF192) if the folder holds what would be written over, and no report of ours."""
    names = [REPORT, *(f"{name}.png" for name in objects)]
    found = [name for name in names if folder and (folder / name).exists()]
    if found and not is_record(folder / REPORT, "resolution", "objects"):
        refuse_foreign(folder, found[:4])


def print_report(report: ObjectReport) -> None:
    """Split, problems and notes, then a table of the defect types."""
    numbers = (len(report.images(split)) for split in ("train", "test", "good"))
    say("", f"{report.name}: " + ", ".join(map("{} {}".format, numbers, ("references", "held out", "good"))))
    warnings = (
        "Warnings; these alone would not stop training:"
        if report.problems
        else "Warnings; training accepts the data as it is:"
    )
    for what, found in (
        ("Problems that training would refuse:" if report.problems else "No problems.", report.problems),
        ("Left out:" if report.skipped else "", report.skipped),
        (warnings if report.notes else "", report.notes),
    ):
        say(*[what] * bool(what), *folded(found))
    if report.problems and all(map(skippable, report.problems)):
        print("With --skip_problems, these images are left out and the others are used.")
    rows = [("defect type", "images", *COLUMNS.values())]
    for defect, figures in report.figures().items():
        values = [[v] if isinstance(v := figures.get(key, []), int) else v for key in COLUMNS]
        spreads = [" / ".join(f"{x:g}" for x in v[: 1 if len(set(v)) == 1 else 3]) for v in values]
        rows.append((one_line(defect), str(figures["images"]), *spreads))
    widths = [max(map(width, column)) for column in zip(*rows)]
    for row in rows:
        say("  " + "   ".join(cell + " " * (n - width(cell)) for cell, n in zip(row, widths)).rstrip())


def width(text: str) -> int:
    """Of the text in a terminal, in letters: Chinese ones are twice as wide."""
    return sum(1 + (unicodedata.east_asian_width(c) in "FW") for c in text)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
