"""What a run is to make: a line for each picture, written down before the first is painted."""

import argparse
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from defectfill_dataset import Case, InputError, MaskSource, Zoom, file_digest, repeat_seed
from defectfill_dataset.errors import did_you_mean
from defectfill_dataset.inputs import MASK_FLAGS, read_cases, read_source

from . import ledger
from .lora_file import LoraFile, read_lora


PLAN = "plan.jsonl"


class Task(NamedTuple):
    """How a picture is made, but for its image; the items of a plan share it."""

    lora: LoraFile
    source: MaskSource | None  # None: the masks given
    zoom: Zoom | None
    settings: dict  # what of this decides a pixel, as it is written down

    @property
    def known_appearance(self) -> dict | None:
        """What the LoRA's record says of the references' defects, if there were several."""
        known = self.lora.record.get("appearance", {}).get(self.settings["defect"])
        return known if known and known["strangest"] else None


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to make."""

    name: str
    case: Case
    task: Task
    seed: int

    @property
    def line(self) -> dict:
        """Its line of the plan: everything that decides its pixels, but for what the whole run shares."""
        given = {"good_image": self.case.image.name, "given_mask": self.case.mask and self.case.mask.name}
        return {"name": self.name, **given, **self.case.digests, **self.task.settings, "seed": self.seed}


def make_plan(overlays: Sequence[argparse.Namespace]) -> list[Item]:
    """The items of all overlays: for each LoRA and defect type `--num_images` pictures on the good images in turn.

    Raises:
        InputError: a picture twice (DF415), or what the files, LoRAs and flags show to be wrong.
    """
    known: dict[str, Any] = {}
    found: list[tuple[Case, Task, int]] = []
    for args in overlays:
        key = json.dumps(["cases", *(str(x) for x in (args.image, args.mask, args.foreground, args.zone))])
        if key not in known:
            known[key] = read_cases(args)
        cases = known[key]
        for task in make_tasks(args, known):
            for i in range(args.num_images or len(cases)):
                repeat, place = divmod(i, len(cases))
                found.append((cases[place], task, repeat_seed(args.seed, repeat)))
    several = len({(task.settings["lora_sha256"], task.settings["defect"]) for _, task, _ in found}) > 1
    items: list[Item] = []
    names: set[str] = set()
    numbers: Counter[str] = Counter()
    asked: set[str] = set()
    for case, task, seed in found:
        label = re.sub(r"[^\w-]+", "_", task.settings["defect"] or "defect")
        stem = f"{case.name}-{label}" if several else case.name
        name = stem
        while name in names:
            numbers[stem] += 1
            name = f"{stem}-{numbers[stem]:04d}"
        names.add(name)
        items.append(Item(name, case, task, seed))
        key = json.dumps(items[-1].line | {"name": ""}, sort_keys=True)
        if key in asked:
            raise InputError(
                f"DF415 {case.image.name}, {label}: is asked for twice with --seed {seed}; change one seed"
            )
        asked.add(key)
    return items


def make_tasks(args: argparse.Namespace, known: dict[str, Any]) -> list[Task]:
    """A task for each of `--lora` and each of its defect types that `--defect` names.

    Args:
        known: LoRAs and mask sources read so far; new ones are added.
    """
    tasks = []
    for path in args.lora:
        if path not in known:
            lora = read_lora(path)
            known[path] = lora, file_digest(lora.path)
        lora, digest = known[path]
        prompts = lora.record.get("prompts", {})
        alone = len(args.lora) == 1 or not prompts
        wanted = [d for d in args.defect or [None] if d is None or d in prompts or alone]
        if not wanted:
            raise InputError(f"DF411 {lora.path}: knows none of --defect {' '.join(args.defect)}; leave it out")
        for name in wanted:
            prompt, defect = choose_prompt(lora, name, args.prompt)
            key = json.dumps([defect, *(str(getattr(args, flag)) for flag in MASK_FLAGS)])
            if key not in known:
                known[key] = read_source(args, defect, args.cache_dir)
            source, mask_settings = known[key]
            zoom = read_zoom(args.zoom, args.zoom_context, args.zoom_min_area, lora)
            settings = {
                "object": lora.record.get("object"),
                "defect": defect,
                "prompt": prompt,
                "lora_sha256": digest,
                "mask_source": args.mask_source,
                **mask_settings,
                "zoom": zoom and zoom._asdict(),
                "num_inference_steps": args.num_inference_steps,
                "guidance_scale": args.guidance_scale,
                "guidance_interval": args.guidance_interval,
            }
            tasks.append(Task(lora, source, zoom, settings))
    missing = set(args.defect or ()) - {task.settings["defect"] for task in tasks}
    if missing:
        raise InputError(f"DF411 --defect {', '.join(sorted(missing))}: no --lora knows it")
    return tasks


def groups_of(plan: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in groups to be painted together, of one way to paint each; the same whoever paints them."""
    alike: dict[str, list[Item]] = {}
    for item in plan:
        alike.setdefault(json.dumps(item.task.settings), []).append(item)
    return [items[i : i + size] for items in alike.values() for i in range(0, len(items), size)]


def choose_prompt(lora: LoraFile, defect: str | None, prompt: str | None) -> tuple[str, str | None]:
    """The prompt to paint with and its defect type: given, or the object prompt of the LoRA's record."""
    prompts = lora.record.get("prompts", {})
    if defect is None and len(prompts) == 1:
        defect = next(iter(prompts))
    if prompt and (defect is None or defect in prompts or not prompts):
        return prompt, defect
    if defect in prompts:
        return prompts[defect], defect
    if not prompts:
        raise InputError(f"DF411 {lora.path}: carries no prompts; give --prompt")
    if defect is None:
        raise InputError(
            f"DF411 {lora.path}: knows several defects; choose one with --defect: {', '.join(sorted(prompts))}"
        )
    raise InputError(f"DF411 --defect {defect}: the LoRA does not know it.{did_you_mean(defect, prompts)}")


def read_zoom(mode: str, context: float | None, min_area: float | None, lora: LoraFile) -> Zoom | None:
    """The zoom of the flags; `auto` and values not given are as the LoRA was trained."""
    given = {k: v for k, v in {"context": context, "min_area": min_area}.items() if v is not None}
    trained = lora.record.get("zoom")
    if mode == "off" or (mode == "auto" and not trained):
        if given:
            raise InputError("DF413 --zoom_context, --zoom_min_area: there is no zoom here; add --zoom on")
        return None
    return Zoom(**(trained or {}) | given)


def check_plan(lines: list[dict], folder: Path) -> None:
    """Raises InputError (DF320) if an earlier start of the run planned an item otherwise, or one that is gone now."""
    before = {line["name"]: line for line in ledger.read_lines(folder / PLAN)}
    problems: set[str] = set()
    seeds: list[str] = []  # each repeat has one of its own: they are told once
    for line in lines:
        old = before.pop(line["name"], line)
        for key in [k for k in line.keys() | old.keys() if line.get(k) != old.get(k)]:
            if key.startswith(("good_image", "given_")):
                problems.add(f"DF320 {line['name']}: was painted from another image or mask")
            else:
                told = f"DF320 {key}: the run began with {old.get(key)!r}, now it is {line.get(key)!r}"
                seeds.append(told) if key == "seed" else problems.add(told)
    if before:
        names = ", ".join(sorted(before)[:4])
        problems.add(f"DF320 {names}: {len(before)} pictures that the run began with are not asked for now")
    problems.update(seeds[:1])
    if problems:
        raise InputError(*sorted(problems), "Go on with what it began with, or choose another --output_dir.")
