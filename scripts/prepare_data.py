"""Publish a dataset: any supported layout, as Parquet or imagefolder, with a dataset card.

    python scripts/prepare_data.py mvtec/hazelnut --output_dir hazelnut --license cc-by-nc-sa-4.0 --push_to_hub

Several objects become one dataset. Everything is checked, as check_data.py does; the exit status is 2 if anything
cannot be used, and 1 if only the push failed.
"""

import argparse
import dataclasses
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import defectfill.quiet  # noqa: F401

from tqdm.auto import tqdm

from defectfill.runs.cards import treatment_in_words, write_dataset_card
from defectfill.runs.disks import NOTHING_WRITTEN, told_if_unwritable
from defectfill.runs.files import TEMPORARY, clear_leftovers, exclusive_lock, publish_dir
from defectfill.runs.flags import add_hub_flags
from defectfill.runs.hub import PUBLISHED_DATA, check_hub, push
from defectfill_dataset import InputError, MaskClasses, Problem, find_objects
from defectfill_dataset.checks import outside_links
from defectfill_dataset.commands import Parser, add_reading_flags, exit_on_input_error, say
from defectfill_dataset.readers import Row
from defectfill_dataset.report import check_object
from defectfill_dataset.writers.datasets import WRITERS, read_examples


Splits = dict[str, list[tuple[str, Path, Row]]]  # split -> (object, its folder, row)


def check_license(args: argparse.Namespace) -> None:
    """Raises InputError (DF194): a push without a licence, or one that is no identifier of the Hub."""
    hint = "give the identifier of the source's licence, such as cc-by-nc-sa-4.0, mit or other"
    if args.push_to_hub and not args.license:
        raise InputError(Problem("DF194", "--push_to_hub", "needs --license", hint))
    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise InputError(Problem("DF194", f"--license {args.license}", "is not an identifier of the Hub", hint))


def checked_splits(args: argparse.Namespace) -> Splits:
    """The rows of all wanted objects by split; raises InputError with every problem of every object."""
    objects = find_objects(args.data_dir, args.layout)
    if args.object and args.object not in objects:
        fix = f"there are {', '.join(objects)}"
        raise InputError(Problem("DF162", f"--object {args.object}", f"not in {args.data_dir}", fix))
    problems: list[Problem] = []
    splits: Splits = {"train": [], "test": [], "good": []}
    for name in [args.object] if args.object else objects:
        root = objects[name]
        report = check_object(root, name, 512, 64, args.layout, args.split, MaskClasses.parse(args.mask_classes),
                              args.skip_problems)  # fmt: skip
        problems += [dataclasses.replace(p, where=f"{name}: {p.where}") for p in report.problems]
        for problem in report.skipped:
            say(f"left out: {problem}")
        for split, of_object in report.splits.items():
            splits[split] += [(name, root, row) for row in of_object]
    if not args.follow_links:
        problems += outside_links((row for rows in splits.values() for _, _, row in rows), args.data_dir)
    if problems:
        raise InputError(*problems)
    return {split: rows for split, rows in splits.items() if rows}


def write(splits: Splits, args: argparse.Namespace, repo_id: str | None) -> None:
    """Writes the dataset and its card to the output folder, whole or not at all."""
    clear_leftovers(args.output_dir)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=args.output_dir) as folder:
        treated: dict[tuple[str, str], str] = {}
        for split, rows in splits.items():
            WRITERS[args.format](Path(folder), split, tqdm(read_examples(rows, treated), desc=split, total=len(rows)))
        counts = Counter((name, row.defect, split) for split, rows in splits.items() for name, _, row in rows)
        images = Counter(treated.values())
        write_dataset_card(Path(folder), counts, args.format, args.split, args.license, args.source, images, repo_id)
        publish_dir(Path(folder), args.output_dir, last="README.md")
    say(treatment_in_words(images))
    say(f"{args.output_dir}: " + ", ".join(f"{split} {len(rows)}" for split, rows in splits.items()))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="Folder of one object, or a folder above several.")
    add(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder to write to: empty, or holding this same dataset.",
    )
    add("--format", choices=list(WRITERS), default="parquet", help="Format to write.")
    add_reading_flags(add, "DIR")
    add("--object", metavar="NAME", help="Write only this object.")
    add(
        "--split",
        default="auto",
        metavar="RULE|FILE",
        help="Defects that training uses: auto, first_third, all, or a split.json.",
    )
    add(
        "--license",
        metavar="ID",
        help="Licence of the images, by its identifier on the Hub (cc-by-nc-sa-4.0); required for a push.",
    )
    add("--source", metavar="TEXT|URL", help="Source of the images, for the card.")
    add("--follow_links", action="store_true", help="Publish what links to files outside the dataset lead to.")
    add_hub_flags(add, "the dataset", "--hub_dataset_id")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    check_license(args)
    splits, repo_id = checked_splits(args), None
    if args.push_to_hub:
        name = args.output_dir.resolve().name
        repo_id = check_hub(args.hub_dataset_id, args.hub_public, name, args.push_timeout, "dataset")
    with exclusive_lock(args.output_dir), told_if_unwritable(args.output_dir, NOTHING_WRITTEN):
        write(splits, args, repo_id)
        if repo_id:
            try:
                push(args.output_dir, repo_id, args.push_timeout, PUBLISHED_DATA[args.format], "dataset")
            except RuntimeError as error:
                sys.exit(str(error))
            say(f"Pushed to {repo_id}")


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
