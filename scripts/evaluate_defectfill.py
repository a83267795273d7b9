"""Measure whether generated images help a detector, against the controls that they have to beat.

    python scripts/evaluate_defectfill.py detect --data_dir nut --bank defectfill=generated --output_dir evaluation
    python scripts/evaluate_defectfill.py quality --data_dir nut --bank defectfill=generated --output_dir evaluation \\
        --feature_net squeezenet1_0.safetensors
    python scripts/evaluate_defectfill.py run --data_dir nut --output_dir evaluation \\
        --pretrained_model_name_or_path sd2-community/stable-diffusion-2-inpainting

`run` trains the LoRAs, generates the images, and then does the other two (`quality` with --feature_net). `detect`
trains a segmenter, and a classifier where there are several types, in each arm: on the real defects alone, the same
repeated, strongly augmented, copied and pasted, and with generated images of each bank. All arms have the same number
of steps, the same schedule and the same seeds, and nothing is chosen on the test parts. `quality` compares generated
images with real ones. All first look for test images and test masks among what is learnt, by content. Everything is
kept, so that the same command goes on after a kill; report.md, report.html and report.json are written last.
"""

import argparse
import dataclasses
import hashlib
import itertools
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import defectfill.quiet  # noqa: F401

import numpy as np
import torch
from datasets import DatasetDict
from PIL import Image
from tqdm.auto import tqdm

from defectfill.base_model import read_local_base
from defectfill.evaluation.arms import CONTROLS, Backgrounds, Pool, bank_pool, control_pools, file_name, paste_views
from defectfill.evaluation.detectors import (
    DIVISOR,
    Recipe,
    can_load_pretrained,
    check_networks,
)
from defectfill.evaluation.quality import NETWORKS, Features, defect_crop, kid, nearest, quality_figures
from defectfill.evaluation.report import Run, escaped, read_run, results_for_card, write_report
from defectfill.evaluation.training import TestSet, cores_each, train_all
from defectfill.evaluation.views import (
    Leak,
    RealViews,
    View,
    Viewing,
    bank_images,
    bank_views,
    check_bank,
    find_leaks,
    painted_rows,
    real_views,
)
from defectfill.markdown import markdown_table
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import signals
from defectfill.runs.cards import add_results, read_model_card
from defectfill.runs.disks import told_if_unwritable
from defectfill.runs.files import (
    TEMPORARY,
    atomic_write,
    clear_leftovers,
    exclusive_lock,
    is_record,
    refuse_foreign,
    save_image,
    write_json,
)
from defectfill.runs.flags import parse_generation_args, parse_training_args, refuse_flags
from defectfill.runs.manifest import ManifestLine, read_lines
from defectfill.runs.processes import slow_precision
from defectfill_dataset import (
    InputError,
    Problem,
    RunError,
    check_pairs,
    data_digest,
    defect_types,
    derive_seed,
    image_tensor,
    load_defect_pairs,
    load_image,
    select_defects,
    single_types,
    split_names,
)
from defectfill_dataset.commands import (
    Parser,
    add_reading_flags,
    exit_on_input_error,
    quoted_flags,
    reading_arguments,
    say,
    seed,
)
from defectfill_dataset.splits import SplitFile
from defectfill_dataset.text import read_json


logger = logging.getLogger(__name__)

SYNTHETIC_ALONE = "alone"
GO_ON = "make room on the disk, and run the same command again"
# What a run writes, and the records, by their keys, that tell that one of ours has begun there.
WRITTEN = (
    *(f"report.{end}" for end in ("json", "md", "html")),
    *("misses-*.jsonl", "quality.json", "quality.md", "quality-*.png", "detect/*", "work/*"),
)
RECORDS = {
    "detect/options.json": ("recipe", "protocol", "data"),
    "work/options.json": ("train_args", "generate_args"),
    "quality.json": ("notes", "banks"),
}
K = "{k}"  # in the folder of a bank: the number of reference images


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the curves.

    Args:
        references: reference images of each type; None for all.
        number: generated images; None for all of the bank.
    """

    references: int | None
    number: int | None

    @property
    def k(self) -> str:
        """The number of references, in names."""
        return str(self.references or "all")

    @property
    def name(self) -> str:
        return f"k{self.k}-n{self.number or 'all'}"


@dataclasses.dataclass
class Evaluation:
    """The real images, and all that the arms are made of."""

    args: argparse.Namespace
    data: DatasetDict
    viewing: Viewing
    views: RealViews
    generated: dict[Path, list[View]] = dataclasses.field(default_factory=dict)  # of each folder that was read
    notes: list[str] = dataclasses.field(default_factory=list)  # what a reader of the report must know

    def showing(self, defects: Sequence[str]) -> set[str]:
        """The training images with one of these types."""
        rows = self.data["train"]
        return {name for name, defect in zip(rows["source_file"], rows["defect"]) if defect in defects}

    def in_view(self, defect: str) -> list[str]:
        """The training images with this type that detectors see."""
        return sorted(self.showing([defect]) & {view.source for view in self.views.train})

    def reference_names(self, number: int | None) -> set[str]:
        """So many training images of each type, or all; of a single type, fewer are always among more."""
        if number is None:
            return self.showing(self.viewing.defects)
        chosen: set[str] = set()
        for defect in self.viewing.defects:
            names = self.in_view(defect)
            order = np.random.default_rng(derive_seed(self.args.seed, "references", defect)).permutation(len(names))
            have = len(chosen.intersection(names))
            free = [names[i] for i in order if names[i] not in chosen]
            chosen.update(free[: max(number - have, 0)])
        return chosen

    def references(self, setting: Setting) -> list[View]:
        """The training views of the setting's reference images."""
        names = self.reference_names(setting.references)
        return [view for view in self.views.train if view.source in names]

    def pools(self, setting: Setting) -> Iterator[tuple[str, int, Callable[[], Pool]]]:
        """(arm, bank, what makes its pool) of every arm."""
        references, good = self.references(setting), self.views.train_good
        banks = {
            name: [self.bank(folder, setting) for folder in bank_folders(folders, setting)]
            for name, folders in self.args.bank.items()
        }
        (first, *_), seed = banks.values(), self.args.seed
        backgrounds = Backgrounds(self.data["good"], self.views.good_rows[0], self.viewing)
        folder = bank_folders(next(iter(self.args.bank.values())), setting)[0]
        images = {name: image for name, image, _ in bank_images(folder, self.viewing.defects)}
        pasted = paste_views([(view, images[view.source]) for view in first[0]], references, backgrounds, seed)
        if len(pasted) < len(first[0]):
            what = "the others' images show no training image, as far as pixels tell"
            self.notes.append(f"copy-paste has {len(pasted)} of {len(first[0])} views: {what}")
        for arm, make in control_pools(references, good, pasted, len(first[0])).items():
            if arm != "copy-paste" or pasted:
                yield arm, 0, make
        for name, folders in banks.items():
            for bank, generated in enumerate(folders):
                yield name, bank, lambda g=generated: bank_pool(references, good, g, self.args.real_share)
                if self.args.synthetic_alone:
                    yield f"{name}, {SYNTHETIC_ALONE}", bank, lambda g=generated: bank_pool([], good, g)

    def bank(self, folder: Path, setting: Setting) -> list[View]:
        """The views of so many of its images, the first of each type in turn."""
        if folder not in self.generated:
            self.generated[folder] = bank_views(folder, self.viewing, self.args.seed)
            if not self.generated[folder]:
                raise InputError(Problem("DF352", f"--bank {folder}", "shows no defect", "generate more images"))
        views = self.generated[folder]
        if setting.number is None:
            return views
        by_type: dict[int, dict[str, None]] = {}
        for view in views:
            by_type.setdefault(int(view.labels.max()), {})[view.source] = None
        in_turn = [name for names in itertools.zip_longest(*by_type.values()) for name in names if name]
        if setting.number > len(in_turn):
            what = f"--bank {folder} has {len(in_turn)}"
            raise InputError(Problem("DF352", f"--numbers {setting.number}", what, "give fewer, or generate more"))
        names = {*in_turn[: setting.number]}
        return [view for view in views if view.source in names]

    def digest(self, setting: Setting) -> str:
        """sha256 of all that the detectors learn from and are tested on."""
        digest = hashlib.sha256()
        views = self.views
        banks = [
            self.bank(folder, setting)
            for folders in self.args.bank.values()
            for folder in bank_folders(folders, setting)
        ]
        for part in (self.references(setting), views.train_good, views.test, views.test_good, *banks):
            for view in part:
                digest.update(view.image.tobytes() + view.labels.tobytes())
        return digest.hexdigest()


def bank_folders(folders: Sequence[str], setting: Setting) -> list[Path]:
    """A bank's folders; where its name holds {k}, those of the setting's number of references."""
    return [Path(folder.replace(K, setting.k)) for folder in folders]


def all_folders(args: argparse.Namespace) -> list[Path]:
    """Of all banks, in all settings."""
    found = [bank_folders(folders, s) for folders in args.bank.values() for s in settings_of(args)]
    return list(dict.fromkeys(folder for folders in found for folder in folders))


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Every number of references with all generated images, and every number of images with the most references."""
    ks = args.references or [None]
    most = max(args.references, default=None)
    found = [Setting(k, None) for k in ks] + [Setting(most, n) for n in args.numbers]
    return list(dict.fromkeys(found))


def prepare(args: argparse.Namespace) -> Evaluation:
    """Reads the data.

    Raises:
        InputError: data that cannot be used, fewer references than asked for, or a single test part (DF352).
    """
    data = load_defect_pairs(
        args.data_dir, args.object, args.split, None, args.layout, args.mask_classes, args.skip_problems
    )
    defects = tuple(sorted(set(args.defect or single_types(defect_types(data)))))
    select_defects(data, defects)
    check_pairs(*data.values(), resolution=args.resolution, of_folder=True)
    viewing = Viewing(args.resolution, args.window, args.group, defects)
    given = [] if args.command == "run" else all_folders(args)  # `run` paints into the training side alone
    for folder in given:
        check_bank(folder)
    painted = painted_rows(data["good"], given, defects) if given and "good" in data else set()
    views = real_views(data, viewing, args.views_per_good, args.seed, painted)
    evaluation, most = Evaluation(args, data, viewing, views), max(args.references, default=1)
    for defect in defects:
        if most > (have := len(evaluation.in_view(defect))):
            what = f"only {have} training images show {defect}, and no type that is not looked for"
            raise InputError(Problem("DF352", f"--references {most}", what, "give fewer"))
    if len({view.group for view in views.tested}) < 2:
        raise InputError(Problem("DF352", "--data_dir", "has a single test part", "hold out more images"))
    return evaluation


def check_leaks(evaluation: Evaluation) -> list[str]:
    """What of the test side is learnt; the protocol `paper` allows the masks.

    Raises:
        InputError: anything else (DF353).
    """
    args = evaluation.args
    banks = {str(folder): folder for folder in all_folders(args)}
    leaks = find_leaks(evaluation.data, evaluation.viewing, evaluation.views.good_rows[1], banks)
    if args.lora and (file := args.lora / "split.json").exists():
        learnt = sorted({*read_json(file, SplitFile)["train"]} & {*evaluation.data["test"]["source_file"]})
        leaks += [Leak(f"--lora {args.lora} was trained on test images", len(learnt), learnt[0])] if learnt else []
    allowed = [leak for leak in leaks if args.protocol == "paper" and leak.what.startswith("masks")]
    refused = [leak for leak in leaks if leak not in allowed]
    if refused:
        fix = "leave them out: figures on what was learnt are worth nothing"
        raise InputError(
            *(Problem("DF353", leak.what, f"{leak.number}, such as {leak.example}", fix) for leak in refused)
        )
    return [f"{leak.what}: {leak.number}" for leak in allowed]


# ---------------------------------------------------------------------------------------------------------------------
# detect


def detect(evaluation: Evaluation, notes: Sequence[str]) -> None:
    """Trains the detectors of every arm that are missing, and writes the report, with these notes in it."""
    args, views = evaluation.args, evaluation.views
    recipe = Recipe(args.steps, args.batch_size, args.learning_rate, args.encoder, args.classifier, args.pretrained,
                    args.mixed_precision, device())  # fmt: skip
    if recipe.pretrained and not can_load_pretrained(recipe):
        recipe = recipe._replace(pretrained=False)
    for line in slow_precision(recipe.mixed_precision, recipe.device):
        logger.warning(line)
    folder = args.output_dir / "detect"
    options = {"recipe": [str(x) for x in recipe], "protocol": args.protocol}
    options |= {"seed": args.seed, "real_share": args.real_share}
    options |= {"data": {setting.name: evaluation.digest(setting) for setting in settings_of(args)}}
    check_options(folder, options | {"arms": {name: len(folders) for name, folders in args.bank.items()}})
    jobs = [
        (setting, arm, bank, make, number)
        for setting in settings_of(args)
        for arm, bank, make in evaluation.pools(setting)
        for number in range(args.seeds)
    ]
    jobs.sort(key=lambda job: job[4])  # all arms with one seed, before the next
    runs = [(Run(setting.name, arm, bank, number), make) for setting, arm, bank, make, number in jobs]
    missing = [(run, make) for run, make in runs if not is_kept(run, folder, views)]
    test_set = TestSet.of(views.tested, len(evaluation.viewing.defects))
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="Detectors", mininterval=5) as progress:
        for _ in train_all(missing, test_set, recipe, args.seed, folder, args.workers):
            progress.update()
    notes = [*notes, *dict.fromkeys(evaluation.notes)]
    if views.left_out:
        notes.append(f"{views.left_out} test images were left out: defects of other types lie too near")
    if not recipe.pretrained:
        notes.append("the detectors start from random weights")
    title = f"{args.object or args.data_dir.name}: {', '.join(evaluation.viewing.defects)}"
    done, defects = [run for run, _ in runs], evaluation.viewing.defects
    say(*write_report(args.output_dir, title, done, views.tested, notes, defects))
    if args.lora:
        found = results_for_card(read_json(args.output_dir / "report.json"), done[0].setting, next(iter(args.bank)))
        add_results(args.lora, title, found)


def is_kept(run: Run, folder: Path, views: RealViews) -> bool:
    """Whether a run's results are there, as they were written; damaged ones are named."""
    if not run.file(folder).exists():
        return False
    try:
        read_run(run, folder, views.tested)
    except InputError as error:
        logger.warning("%s", error)
        return False
    return True


def check_options(folder: Path, options: dict) -> None:
    """Keeps what decides the results; raises InputError (DF320) if the folder has results of something else.

    An earlier version may have written fewer options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.keep_options(folder / "options.json", options, may_lack=True)


# ---------------------------------------------------------------------------------------------------------------------
# quality


def quality(evaluation: Evaluation, features: Features, notes: Sequence[str]) -> None:
    """Compares each bank with the real images, whole views and crops around the defects."""
    args = evaluation.args
    record: dict = {"notes": notes, "banks": {}}
    held_out, sheets = Defects.of(evaluation.views.test, features), {}
    for setting in settings_of(args):
        references = Defects.of(evaluation.references(setting), features)
        for name, folders in args.bank.items():
            for bank, folder in enumerate(bank_folders(folders, setting)):
                generated = Defects.of(evaluation.bank(folder, setting), features)
                key = f"{setting.name}, {name}, bank {bank}"
                record["banks"][key], best = compare_images(features, references, held_out, generated, folder, args)
                sheets[f"quality-{setting.name}-{file_name(name)}-{bank}.png"] = sorted_sheet(generated.views, best)
    write_json(args.output_dir / "quality.json", record)  # first: it tells that the others are ours
    for file, sheet in sheets.items():
        save_image(sheet, args.output_dir / file)
    say(*write_quality(args.output_dir / "quality.md", record).splitlines())


@dataclasses.dataclass
class Defects:
    """Views with defects, whole and cropped, as tensors in [-1, 1], and what a network sees inside the masks."""

    views: list[View]
    whole: torch.Tensor  # (N, 3, R, R)
    local: torch.Tensor  # (N, 3, R, R)
    described: torch.Tensor  # (N, F)

    @classmethod
    def of(cls, views: list[View], features: Features) -> "Defects":
        side = len(views[0].image)
        pictures = [Image.fromarray(view.image) for view in views]
        crops = [defect_crop(picture, view.mask, side) for picture, view in zip(pictures, views)]
        local, masks = (torch.stack(x) for x in zip(*crops))
        whole = torch.stack([image_tensor(picture, side) for picture in pictures])
        return cls(views, whole, local, features.of_defects(local, masks))


def compare_images(
    features: Features, references: Defects, held_out: Defects, generated: Defects, folder: Path, args
) -> tuple[dict, torch.Tensor]:
    """A bank's figures, and the (N,) distance of each generated defect to the nearest held-out one.

    Raises:
        InputError: there are too few images for a figure (DF352).
    """
    sizes = dict(subset_size=args.kid_subset_size, subsets=args.kid_subsets, seed=args.seed)
    try:
        figures: dict = {
            kind: quality_figures(features, *(getattr(x, kind) for x in (references, held_out, generated)), **sizes)
            for kind in ("whole", "local")
        }
    except ValueError as error:
        raise InputError(Problem("DF352", f"--bank {folder}", str(error), "generate more images")) from error
    figures["references"] = None
    if len(references.views) > 1:
        figures["references"] = kid(features.pooled(held_out.local), features.pooled(references.local), **sizes)[0]
    to_references = nearest(generated.described, references.described)
    to_held_out = nearest(generated.described, held_out.described)
    real = nearest(held_out.described, references.described)
    figures["to the nearest reference"] = to_references.mean().item()
    figures["to the nearest held-out defect"] = to_held_out.mean().item()
    figures["held-out defects to the nearest reference"] = real.mean().item()
    closest = to_references < real.min()
    figures["nearer to a reference than any held-out defect is"] = closest.float().mean().item()
    manifest = read_lines(folder / "manifest.jsonl", ManifestLine)
    steps = [line["seam_step"] for line in manifest if line.get("seam_step") is not None]
    figures["seam step, grey levels"] = float(np.mean(steps)) if steps else None
    return figures, to_held_out


def sorted_sheet(views: Sequence[View], distances: torch.Tensor) -> Image.Image:
    """Three rows: the nearest to a held-out defect, the middle ones, the furthest."""
    order, columns = distances.argsort().tolist(), min(8, len(views))
    middle = (len(order) - columns) // 2
    rows = [order[:columns], order[middle : middle + columns], order[-columns:]]
    return Image.fromarray(np.concatenate([np.concatenate([views[i].image for i in row], axis=1) for row in rows]))


def write_quality(file: Path, record: dict) -> str:
    """Markdown, a row for each bank."""
    rows = [["bank", "KID", "local KID", "KID of the references", "IC-LPIPS", "local IC-LPIPS", "to a reference",
             "to a held-out defect", "held-out to a reference", "memorized", "seam"]]  # fmt: skip
    for key, bank in record["banks"].items():
        names = [bank["whole"]["kid"], bank["local"]["kid"], bank["references"], bank["whole"]["ic_lpips"],
                 bank["local"]["ic_lpips"], *list(bank.values())[3:]]  # fmt: skip
        rows.append([key, *("none" if x is None else f"{x:.3f}" for x in names)])
    one = next(iter(record["banks"].values()))["whole"]
    text = f"Features of {one['network']}; KID on {one['kid_subsets']} subsets of {one['kid_subset_size']}.\n\n"
    text += markdown_table(escaped(rows))
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# run


def make_banks(evaluation: Evaluation) -> None:
    """Trains and generates what is missing, and names it as `--bank` and `--lora` would."""
    args, work = evaluation.args, evaluation.args.output_dir / "work"
    names = ("train_args", "generate_args", "filter_args", "pretrained_model_name_or_path", "num_images", "seed")
    data = {f"{split}_sha256": data_digest(rows) for split, rows in evaluation.data.items()}
    options = {name: getattr(args, name) for name in names} | {"defects": list(evaluation.viewing.defects)}
    if base := read_local_base(args.pretrained_model_name_or_path):
        data |= {"base": base.name, "base_sha256": base.digest}
    group = args.group and args.group.pattern  # decides which good images are painted into
    check_options(work, options | data | {"group": group})
    write_good(evaluation, work / "good")
    banks, loras, images = range(args.banks), list[Step](), list[Step]()
    for setting, bank in itertools.product(settings_of(args), banks):
        if setting.number is None:
            lora, *its_images = steps_of_bank(evaluation, work / f"k{setting.k}", setting.references, bank)
            loras.append(lora)
            images += its_images
    check_steps(loras, images)
    start_all("LoRAs", loras, args.workers)
    start_all("Banks", images, args.workers)
    args.bank = {"defectfill": [f"{work}/k{K}/defectfill-{bank}" for bank in banks]}
    args.bank |= {arm: [f"{work}/k{K}/{file_name(arm)}-0"] for arm in ablations(args)}
    args.lora = work / f"k{settings_of(args)[0].k}" / "lora-0"


def ablations(args: argparse.Namespace) -> dict[str, str]:
    """Banks made without a part of the method, and the arguments that leave it out."""
    found = {"selection off": f"{args.generate_args} {args.filter_args} --selection none --num_candidates 1"}
    return found | ({"filters off": args.generate_args} if args.filter_args else {})


def write_good(evaluation: Evaluation, folder: Path) -> None:
    """The good images of the training side, as files to generate into."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in evaluation.views.good_rows[0]:
        if not (file := folder / f"{i:05d}.png").exists():
            with atomic_write(file) as temporary:
                load_image(evaluation.data["good"][i]["image"]).save(temporary, format="PNG")


class Step(NamedTuple):
    """A command of a run: the module, our arguments and those given in quotes, and the file that it writes last."""

    module: str
    ours: Sequence[object]
    given: str
    result: Path

    @property
    def arguments(self) -> list[str]:
        return [*map(str, self.ours), *shlex.split(self.given)]


def check_steps(loras: Sequence[Step], images: Sequence[Step]) -> None:
    """Ends with what is wrong with the flags given in quotes, before anything is trained."""
    named = [("--train_args", loras), ("--generate_args or --filter_args", images)]
    problems = [p for name, steps in named for step in steps for p in refuse_flags(name, step.given, step.ours)]
    if problems:
        raise InputError(*dict.fromkeys(problems))
    for lora in loras:
        parse_training_args("", lora.arguments)
    for image in images:
        parse_generation_args("", image.arguments)


def steps_of_bank(evaluation: Evaluation, folder: Path, k: int | None, bank: int) -> Iterator[Step]:
    """A LoRA of `k` references, then its images; of the first bank also those of the `ablations`."""
    args, data, defects = evaluation.args, evaluation.data, evaluation.viewing.defects
    folder.mkdir(parents=True, exist_ok=True)
    train, names = evaluation.reference_names(k), split_names(data)
    unused = sorted({*names["train"], *names.get("skipped", [])} - train)
    write_json(folder / "split.json", {"train": sorted(train), "test": names["test"], "skipped": unused})
    source = ["--split", folder / "split.json", "--defect", *defects, *reading_arguments(args)]
    source += ["--object", args.object] if args.object else []
    lora = folder / f"lora-{bank}"
    yield Step("train_defectfill", [
        "--train_data_dir", args.data_dir, *source, "--pretrained_model_name_or_path",
        args.pretrained_model_name_or_path, "--output_dir", lora, "--seed", bank, "--resume_from_checkpoint", "latest",
    ], args.train_args, lora / "pytorch_lora_weights.safetensors")  # fmt: skip
    whole = f"{args.generate_args} {args.filter_args}"
    for arm, arguments in {"defectfill": whole, **({} if bank else ablations(args))}.items():
        out = folder / f"{file_name(arm)}-{bank}"
        yield Step("generate_defectfill", [
            "--lora", lora, "--image", args.output_dir / "work/good", "--mask_source", "references",
            "--reference_data", args.data_dir, *source, "--num_images", args.num_images, "--seed", bank,
            "--output_dir", out,
        ], arguments, out / "summary.html")  # fmt: skip


def start_all(what: str, steps: Sequence[Step], workers: int) -> None:
    """Runs those whose result is missing, so many at once; then the output of each goes to a file of its own.

    Raises:
        RunError: one failed (DF386); the others have ended by then.
    """
    missing = [step for step in steps if not step.result.exists()]
    if workers == 1 or len(missing) < 2:
        for step in missing:
            start(step)
        return
    threads = cores_each(workers)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(missing), desc=what) as progress:
        running = [pool.submit(start, step, threads) for step in missing]
        for _ in as_completed(running):
            progress.update()
    for one in running:
        one.result()


def start(step: Step, threads: int | None = None) -> None:
    """Runs it with so many threads, its output in a file, or as this process runs.

    It ends with this process, training with a checkpoint; images that no candidate was good enough for may be missing.

    Raises:
        RunError: it failed (DF386).
    """
    words = [sys.executable, "-m", step.module, *step.arguments]
    environment, log = os.environ | {signals.LAUNCHED: "1"}, Path(f"{step.result.parent}.log")
    say(shlex.join(words))
    if threads is None:
        code = subprocess.run(words, env=environment).returncode
    else:
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if not step.result.exists():
        what = f"{shlex.join(words)} ended with exit code {code}"
        said = "" if threads is None else f"; {log} has what it said"
        raise RunError(Problem("DF386", "", what, f"run the same command again to go on{said}"))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def expression(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from error


def up_to(most: int) -> Callable[[str], int]:
    """A flag's whole number from 1 to `most`, far above what any evaluation can need."""

    def number(text: str) -> int:
        if not 1 <= (found := int(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} must be from 1 to {most:,}")
        return found

    return number


def sides(text: str) -> int:
    if (number := up_to(4096)(text)) % DIVISOR:
        raise argparse.ArgumentTypeError(f"{number} must be a multiple of {DIVISOR}")
    return number


def rate(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{number} must be a finite number above 0")
    return number


def share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{number} must be from 0 to 1")
    return number


def bank_argument(text: str) -> tuple[str, list[str]]:
    name, equal, folders = text.partition("=")
    if not (name and equal and folders):
        raise argparse.ArgumentTypeError(f"'{text}' must be NAME=FOLDER or NAME=FOLDER,FOLDER")
    if not re.fullmatch(r"\w[\w.+-]{0,59}", name):  # files are called so
        raise argparse.ArgumentTypeError(f"the name '{name}' must be of letters, digits, and . + - _ within it")
    if name in {*map(file_name, CONTROLS)} or name.endswith(f"-{SYNTHETIC_ALONE}"):
        raise argparse.ArgumentTypeError(f"the name '{name}' is that of another arm")
    return name, folders.split(",")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("detect", "train detectors in every arm, and compare them"),
        ("quality", "compare generated images with real ones"),
        ("run", "train LoRAs, generate banks, then quality and detect"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        add_data_flags(command.add_argument)
        if name == "run":
            add_run_flags(command.add_argument)
        else:
            command.add_argument("--bank", type=bank_argument, action="append", required=True, metavar="NAME=FOLDER",
                                 help="Generated images of an arm, several banks with commas between; a folder of "
                                 "generate_defectfill.py or any dataset. {k} stands for the number of references. "
                                 "May be given several times; copy-paste takes the places of the first.")  # fmt: skip
        if name != "quality":
            add_detector_flags(command.add_argument)
        if name == "detect":
            command.add_argument("--lora", type=Path, metavar="DIR",
                                 help="LoRA folder whose card gets the figures of the first arm.")  # fmt: skip
        if name != "detect":
            add_quality_flags(command.add_argument, required=name == "quality")
    parser.set_defaults(lora=None)
    args = parser.parse_args(input_args)
    banks = [] if args.command == "run" else args.bank
    args.bank = dict(banks)
    if len(args.bank) < len(banks):
        parser.error("--bank: two have one name; give the folders of a name with commas between")
    return args


def add_data_flags(add: Callable) -> None:
    add("--data_dir", type=Path, required=True, metavar="DIR", help="Real images, in any layout that training reads.")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="Report, detectors and, with run, images.")
    add("--object", metavar="NAME", help="Object in --data_dir, if it holds several.")
    add("--defect", nargs="+", metavar="NAME", help="Defect types. Default: all.")
    add(
        "--split",
        default="auto",
        metavar="RULE|FILE",
        help="Which defects are learnt from; the others test: auto, first_third, or a split.json.",
    )
    add_reading_flags(add, "--data_dir")
    add("--group", type=expression, metavar="REGEX",
        help="Regular expression that finds the part or board in an image's name (its first group, or the whole "
        "match). All images of a part stay on one side of the split. Default: each image is a part.")  # fmt: skip
    add(
        "--window",
        type=up_to(100_000),
        metavar="PX",
        help="Look at squares of this side, so that small defects are visible. Default: at whole images.",
    )
    add("--resolution", type=sides, default=128, metavar="PX", help="Side of what the detectors see.")
    add("--views_per_good", type=up_to(10_000), default=1, metavar="N", help="Squares taken of each good image.")
    add(
        "--protocol",
        choices=["clean", "paper"],
        default="clean",
        help="Whether generated images may have the masks of test images. clean: no. paper: yes, and the report says "
        "so.",
    )
    add(
        "--references",
        type=up_to(1_000_000),
        nargs="+",
        default=[],
        metavar="N",
        help="Reference images of each type; several make a curve. Default: all.",
    )
    add(
        "--numbers",
        type=up_to(1_000_000),
        nargs="+",
        default=[],
        metavar="N",
        help="Generated images to train on; several make a curve. Default: all, which are always measured too.",
    )
    add("--seed", type=seed, default=0, metavar="N", help="Random seed. Default: %(default)s.")


def add_detector_flags(add: Callable) -> None:
    add("--seeds", type=up_to(1000), default=5, metavar="N", help="Detectors of each arm and bank.")
    add("--steps", type=up_to(10_000_000), default=300, metavar="N", help="Training steps of each.")
    add("--batch_size", type=up_to(10_000), default=8, metavar="N", help="Views in a step of a detector.")
    add("--learning_rate", type=rate, default=1e-3, metavar="X", help="Highest learning rate of a detector.")
    add(
        "--encoder",
        default="tu-mobilenetv3_small_050",
        metavar="NAME",
        help="Encoder of the segmenter, of segmentation_models_pytorch.",
    )
    add("--classifier", default="mobilenetv3_small_050", metavar="NAME", help="Classifier of types, of timm.")
    add("--pretrained", action="store_true", help="Start both from ImageNet's weights, if they can be had.")
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="no",
        help="Precision of the detectors. bf16 takes two thirds of the time on a CPU that has it.",
    )
    add(
        "--workers",
        type=up_to(1000),
        default=1,
        metavar="N",
        help="Detectors, LoRAs and banks that are made at once, each in a process with its share of the cores. One "
        "detector gains little from a second core.",
    )
    add(
        "--real_share",
        type=share,
        metavar="X",
        help="Share of real defects among the defects drawn, with generated ones. Default: as there are.",
    )
    add("--synthetic_alone", action="store_true", help="Arms with generated defects and no real ones, too.")


def add_quality_flags(add: Callable, required: bool) -> None:
    add(
        "--feature_net", type=Path, metavar="FILE", required=required,
        help="Weights of --network with torchvision's names, as safetensors. run leaves quality out without it.",
    )  # fmt: skip
    add("--network", choices=[*NETWORKS], default="squeezenet", help="Network of the features.")
    add("--kid_subset_size", type=up_to(100_000), default=50, metavar="N", help="Images in a subset of KID.")
    add("--kid_subsets", type=up_to(100_000), default=100, metavar="N", help="Subsets whose KID is averaged.")


def add_run_flags(add: Callable) -> None:
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID", help="Base inpainting model.")
    add("--num_images", type=up_to(1_000_000), default=100, metavar="N", help="Images of each defect type in a bank.")
    add("--banks", type=up_to(1000), default=2, metavar="N", help="Banks, each of a LoRA and images of other seeds.")
    add(
        "--train_args",
        type=quoted_flags,
        default="",
        metavar="FLAGS",
        help="Further flags of train_defectfill.py, in quotes. Default: none.",
    )
    add(
        "--generate_args",
        type=quoted_flags,
        default="",
        metavar="FLAGS",
        help="Further flags of generate_defectfill.py, in quotes. Default: none.",
    )
    add(
        "--filter_args",
        type=quoted_flags,
        default="--min_change 2 --max_deviation 2",
        metavar="FLAGS",
        help="The quality filters, which one bank does without.",
    )


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_own(folder: Path) -> None:
    """Raises InputError (DF192) if the folder holds what would be written over, and no evaluation has begun there."""
    if any(is_record(folder / name, *keys) for name, keys in RECORDS.items()):
        return
    found = [f for pattern in WRITTEN for f in sorted(folder.glob(pattern)) if not f.name.startswith(TEMPORARY)]
    refuse_foreign(folder, [f.relative_to(folder).as_posix() for f in found[:4]])


def main(args: argparse.Namespace) -> None:
    stopped = signals.exit_on_signal(lambda: "Stopped. Run the same command again to go on.")
    with exclusive_lock(args.output_dir), stopped, told_if_unwritable(args.output_dir, GO_ON):
        check_own(args.output_dir)
        clear_leftovers(args.output_dir, *(args.output_dir / name for name in ("detect", "work", "work/good")))
        clear_leftovers(*args.output_dir.glob("detect/*/"))
        if args.lora:
            read_model_card(args.lora)
        features = None
        if args.command != "quality":
            check_networks(args.encoder, args.classifier)
        if args.command != "detect" and args.feature_net:
            features = Features(args.network, args.feature_net, device(), "--feature_net")
        evaluation = prepare(args)
        if args.command == "run":
            check_leaks(evaluation)
            make_banks(evaluation)
        notes = check_leaks(evaluation)
        if features:
            quality(evaluation, features, notes)
        if args.command != "quality":
            detect(evaluation, notes)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
