"""Export generated images for training: as MVTec AD, anomalib, COCO, YOLO, imagefolder or Parquet.

    python scripts/export_generated.py generated --output_dir export --format yolo --good good_images

Everything is checked first; the exit status is 2 if anything cannot be used.
"""

import argparse
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import defectfill.quiet  # noqa: F401

from tqdm.auto import tqdm

from defectfill.runs.cards import treatment_in_words, write_dataset_card
from defectfill.runs.disks import NOTHING_WRITTEN, told_if_unwritable
from defectfill.runs.files import LONGEST_NAME, TEMPORARY, clear_leftovers, exclusive_lock, publish_dir
from defectfill_dataset import InputError, Problem
from defectfill_dataset.checks import inspect_row, outside_links
from defectfill_dataset.commands import Parser, exit_on_input_error, say
from defectfill_dataset.writers.datasets import WRITERS
from defectfill_dataset.writers.exports import (
    EXPORTERS,
    NORMAL_ONLY,
    ExportImage,
    read_generated,
    read_good_images,
    read_items,
    split_items,
)


LONGEST_END = "_mask.png"  # of the names of an export's files


def check_options(args: argparse.Namespace) -> list[Problem]:
    """What is wrong with the options (DF199)."""
    problems = []
    if args.format in NORMAL_ONLY and not args.good:
        fix = "give a folder of them with --good"
        problems.append(Problem("DF199", f"--format {args.format}", "trains on good images", fix))
    if args.good and not args.good.is_dir():
        problems.append(Problem("DF199", f"--good {args.good}", "no such folder", "give a folder of good images"))
    if not 0 <= args.test_share < 1:
        problems.append(Problem("DF199", f"--test_share {args.test_share:g}", "must be at least 0 and less than 1"))
    return problems


def checked_items(args: argparse.Namespace) -> list[ExportImage]:
    """All images to export; raises InputError with every problem of every folder."""
    problems, items = check_options(args), list[ExportImage]()
    for folder in args.generated:
        found, wrong = read_generated(folder, several=len(args.generated) > 1)
        items += found
        problems += wrong + ([] if args.follow_links else outside_links([item.row for item in found], folder))
    if args.good and args.good.is_dir():
        objects = sorted({str(item.row.object) for item in items})
        if len(objects) > 1:
            what = f"holds one object, the generated images show {', '.join(objects)}"
            problems.append(Problem("DF199", f"--good {args.good}", what, "export one object at a time"))
        inpainted = {item.source for item in items}
        good = read_good_images(args.good, "".join(objects[:1]), inpainted)
        if not good:
            fix = "give a folder of good images"
            problems.append(Problem("DF199", f"--good {args.good}", "no images in it", fix))
        items += good
        problems += [] if args.follow_links else outside_links([item.row for item in good], args.good)
    problems += [problem for item in items for problem in inspect_row(item.row, item.root).problems]
    if problems := problems + same_names(items) + long_names(items):
        raise InputError(*problems)
    return items


def same_names(items: list[ExportImage]) -> list[Problem]:
    """A problem (DF198) for each two folders with images that would get one name."""
    first: dict[str, ExportImage] = {}
    pairs: dict[tuple[Path, Path], str] = {}
    for item in items:
        other = first.setdefault(item.name, item)
        if other is not item:
            pairs.setdefault((other.row.image.parent, item.row.image.parent), item.name)
    return [
        Problem("DF198", f"{a}, {b}", f"both hold an image to be called '{name}'", "rename one")
        for (a, b), name in pairs.items()
    ]


def long_names(items: list[ExportImage]) -> list[Problem]:
    """A problem (DF202) for each image whose files' names would be longer than file systems take."""
    return [
        Problem("DF202", item.row.image, f"its mask would be called {item.name}{LONGEST_END}", "shorten its name")
        for item in items
        if len(os.fsencode(item.name + LONGEST_END)) > LONGEST_NAME
    ]


def checked_splits(items: list[ExportImage], args: argparse.Namespace) -> dict[str, list[ExportImage]]:
    """The items of each split that the format has; raises InputError (DF199) if one that it needs is empty."""
    splits = split_items(items, args.test_share, args.format in NORMAL_ONLY)
    if args.format in NORMAL_ONLY and not splits["train"]:
        what = "leaves no good image to train on: those that defects were generated on are for testing only"
        raise InputError(Problem("DF199", f"--good {args.good}", what, "add others, or lower --test_share"))
    needed = [] if args.format in NORMAL_ONLY else ["train", "test"] if args.format.startswith("yolo") else ["train"]
    for split in needed:
        if not any(item.row.mask for item in splits[split]):
            what = f"leaves no defect to {split}"
            fix = (
                "all images generated from one good image stay together: change it, or generate from more good images"
            )
            raise InputError(Problem("DF199", f"--test_share {args.test_share:g}", what, fix))
    if args.format in WRITERS and args.good:
        splits["good"] = [item for item in items if not item.row.mask]
        splits |= {name: [item for item in splits[name] if item.row.mask] for name in ("train", "test")}
    return {split: found for split, found in splits.items() if found}


def shown(split: str, items: list[ExportImage], treated: dict[tuple[str, str], str]) -> Iterator[dict]:
    """`read_items` with a bar."""
    yield from tqdm(read_items(items, treated), desc=split, total=len(items))


def write(splits: dict[str, list[ExportImage]], args: argparse.Namespace) -> None:
    """Writes the export to the output folder, whole or not at all."""
    clear_leftovers(args.output_dir)
    counts = Counter(
        (str(item.row.object), item.row.defect, split) for split, items in splits.items() for item in items
    )
    defects = sorted({item.row.defect for item in itertools.chain(*splits.values()) if item.row.mask})
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=args.output_dir) as temporary:
        folder, treated = Path(temporary), dict[tuple[str, str], str]()
        examples = {split: shown(split, items, treated) for split, items in splits.items()}
        last = EXPORTERS[args.format](folder, examples, defects)
        images = Counter(treated.values())
        if args.format in WRITERS:
            write_dataset_card(folder, counts, args.format, "by_good_image", None, None, images, None)
        publish_dir(folder, args.output_dir, last)
    say(treatment_in_words(images))
    for (_, defect, split), number in sorted(counts.items(), key=lambda entry: entry[0][::-1]):
        say(f"{split} {defect}: {number}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("generated", type=Path, nargs="+", metavar="GENERATED", help="Folders that generate_defectfill.py wrote.")
    add(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to write to: empty, or holding this same export.",
    )
    add("--format", choices=list(EXPORTERS), required=True, help="Format to write.")
    add("--follow_links", action="store_true", help="Publish what links to files outside their folders lead to.")
    add("--good", type=Path, metavar="DIR", help="Folder of good images to add; mvtec and anomalib need it.")
    add(
        "--test_share",
        type=float,
        default=0.2,
        metavar="X",
        help="Share of the good images that goes to test or val, with all images generated from them.",
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    splits = checked_splits(checked_items(args), args)
    with exclusive_lock(args.output_dir), told_if_unwritable(args.output_dir, NOTHING_WRITTEN):
        write(splits, args)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
