"""The report on one object: its problems, warnings, split, and statistics of its defect types."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .builder import single_types
from .checks import ImageReport, dataset_warnings, ignored_files, inspect_row, other_types, skippable, without
from .errors import InputError, Problem
from .mask_values import NO_CLASSES, MaskClasses
from .masks import Mask, MaskShapes
from .prompts import MOST_TOKENS, build_prompts, to_words, tokenize_prompts
from .readers import GOOD, Row, read_object, relative
from .splits import split_rows


@dataclasses.dataclass
class ObjectReport:
    """What `check_object` finds.

    Args:
        rows: all images, without those that were left out; `image_reports` are theirs, in the same order.
        problems: why training would refuse the object.
        notes: warnings.
        skipped: what was left out, and why.
        splits: split -> its rows; empty where there are problems with the split itself.
    """

    name: str
    root: Path
    rows: list[Row]
    image_reports: list[ImageReport]
    problems: list[Problem]
    notes: list[Problem]
    skipped: list[Problem]
    splits: dict[str, list[Row]]

    def images(self, split: str) -> list[str]:
        """The names of a split's images, each once."""
        return sorted({relative(row.image, self.root) for row in self.splits.get(split, [])})

    def figures(self) -> dict[str, dict]:
        """Figures of each defect type, and of the good images."""
        types = sorted({x.defect for x in self.image_reports}, key=lambda defect: (defect == GOOD, defect))
        found = {defect: figures([x for x in self.image_reports if x.defect == defect]) for defect in types}
        for row in self.rows:
            if isinstance(row.mask, MaskShapes):
                found[row.defect].setdefault("shapes", 0)
                found[row.defect]["shapes"] += len(row.mask.polygons) + len(row.mask.rles)
        return found

    def as_json(self) -> dict:
        return {
            "object": self.name,
            "problems": [str(problem) for problem in self.problems],
            "skipped": [str(problem) for problem in self.skipped],
            "suspicious": [str(note) for note in self.notes],
            "references": len(self.images("train")),
            "held_out": len(self.images("test")),
            "defects": self.figures(),
        }


def check_prompts(report: ObjectReport, tokenizer=None) -> None:
    """Adds to the report why training with its default flags would refuse the names of the object or its defect types.

    Args:
        tokenizer: the base's; without it, prompts that may be too long are a warning.
    """
    rows = [row for split in ("train", "test") for row in report.splits.get(split, ())]
    if not rows or any(problem.code == "DF162" for problem in report.problems):  # which is of names, too
        return
    try:
        single = single_types({row.defect for row in rows})
        defects = sorted({row.defect for row in report.splits["train"]} & set(single))
        if not defects:
            raise InputError(Problem("DF163", "", "no defect images to train on", "check --defect and --split"))
        prompts = build_prompts(defects, to_words(report.name))
        if tokenizer:
            tokenize_prompts(tokenizer, prompts.values())
    except InputError as error:
        report.problems += error.problems
        return
    texts = [] if tokenizer else [prompt.text for pair in prompts.values() for prompt in (pair.defect, pair.object)]
    for text in texts:
        if len(text.encode()) > MOST_TOKENS - 2:  # each byte is a token at worst, and two are at the ends
            fix = "give the base with --pretrained_model_name_or_path to count its tokens"
            report.notes.append(Problem("DF174", f"'{text}'", "may be too long for the text encoder", fix))


def _inspect_all(rows: Sequence[Row], root: Path, name: str, resolution: int, grid: int) -> list[ImageReport]:
    one = functools.partial(inspect_row, root=root, resolution=resolution, grid=grid, with_zoom=True)
    reuse = Image.core.set_blocks_max  # of Pillow's memory, which to get anew for each image costs a sixth of the time
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), initializer=reuse, initargs=(16,)) as pool:
        image_reports = pool.map(functools.partial(_with_others, one), rows, other_types(rows), chunksize=8)
        return list(tqdm(image_reports, desc=name, total=len(rows)))


def _with_others(one: Callable[..., ImageReport], row: Row, others: Mask | None) -> ImageReport:
    return one(row, others=others)


def figures(image_reports: Sequence[ImageReport]) -> dict:
    """Number, and least, median and greatest of their sizes, their masks' share of the image and its latent cells."""

    def spread(values: list, digits: int | None = None) -> list:
        return [round(float(q), digits) for q in np.quantile(values, (0, 0.5, 1))]

    opened, marked = [x for x in image_reports if x.size[0]], [x for x in image_reports if x.area]
    found: dict = {"images": len(image_reports)}
    if opened:
        found |= {name: spread([x.size[i] for x in opened]) for i, name in enumerate(("width", "height"))}
    if marked:
        found["area_percent"] = spread([100 * x.area for x in marked], 3)
        found["latent_cells"] = spread([x.cells for x in marked])
        found["latent_cells_with_zoom"] = spread([x.zoomed for x in marked])
        found["lost_by_nearest"] = sum(x.nearest == 0 for x in marked)
    return found


def check_object(
    root: Path,
    name: str,
    resolution: int,
    grid: int,
    layout: str = "auto",
    split: str = "auto",
    mask_classes: MaskClasses = NO_CLASSES,
    skip_problems: bool = False,
) -> ObjectReport:
    """Opens every image and mask of one object, in as many processes as there are cores.

    Args:
        resolution: to train at; `grid` is the side of its latent grid.
        skip_problems: leave out images that cannot be used, if the others can be without them.
    """
    reading = read_object(root, name, layout, mask_classes)
    image_reports = _inspect_all(reading.rows, root, name, resolution, grid)
    problems = [*reading.problems, *(problem for x in image_reports for problem in x.problems)]
    skipped: list[Problem] = []
    if skip_problems and problems and all(map(skippable, problems)):
        skipped, problems = problems, []
        names = {problem.image for problem in skipped if problem.image}
        kept = [i for i, x in enumerate(image_reports) if x.name not in names]
        reading, image_reports = without(reading, names, root), [image_reports[i] for i in kept]
    splits: dict[str, list[Row]] = {}
    try:
        splits = split_rows(reading.rows, root, split)
    except InputError as error:
        problems += error.problems
    report = ObjectReport(name, root, reading.rows, image_reports, problems, [], skipped, splits)
    if not problems and not splits["train"]:
        where = f"--split {split}" if any(row.mask for row in reading.rows) else root
        fix = "add at least one with its mask"
        problems.append(Problem("DF163", where, "leaves no defect image to train on", fix))
    report.notes = [
        *reading.notes,
        *dataset_warnings(image_reports, set(report.images("train")), resolution),
        *ignored_files(reading.rows, root),
    ]
    return report
