"""The plan of a generation run: a line for each image, written before the first is made. Nothing here reads a file."""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from defectfill_dataset import CropRule, InputError, MaskSource, Problem
from defectfill_dataset.errors import did_you_mean

from ..likeness import References
from ..lora import LoraFile
from ..seam import RAMP_PIXELS, RAMP_SHARE
from .requests import GenerationRequest
from .source_images import SourceImage, repeat_seed


MOST_IMAGES = 1_000_000  # of a run: its plan is kept in memory


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a defect of one type with one LoRA; many images share it.

    Args:
        mask_source: None for given masks.
        settings: everything here that decides a pixel, as the plan's lines hold it.
        references: what candidates are compared with, with `--selection likeness`.
    """

    lora: LoraFile
    mask_source: MaskSource | None
    zoom: CropRule | None
    settings: dict
    references: References | None = None

    @property
    def sampling(self) -> dict:
        """The arguments of `inpaint` that it decides."""
        names = ("prompt", "num_inference_steps", "guidance_scale", "guidance_interval", "prompt_noise")
        return {name: self.settings[name] for name in names if name in self.settings}

    @property
    def reference_colours(self) -> dict | None:
        """The colour statistics of the training defects; None if the LoRA has none, or of one reference only."""
        known = self.reference_statistics
        return known if known.get("strangest") else None

    @property
    def reference_seam_step(self) -> float | None:
        """The `seam_step` of the training defects; None if the LoRA has none."""
        return self.reference_statistics.get("seam_step")

    @property
    def reference_statistics(self) -> dict:
        """What the LoRA's record says of how the training defects look."""
        return self.lora.record.get("appearance", {}).get(self.settings["defect"]) or {}


class RequestInputs(NamedTuple):
    """A request, its source images, and its recipes.

    Args:
        recipes: of each defect type; with `--like` one for each missed defect.
        nearest: the source images in another order, by the name of the image with the missed defect.
    """

    request: GenerationRequest
    source_images: list[SourceImage]
    recipes: list[list[Recipe]]
    nearest: dict[str, list[SourceImage]] = {}


@dataclasses.dataclass(frozen=True)
class PlannedImage:
    """One image to make."""

    name: str
    source_image: SourceImage
    recipe: Recipe
    seed: int

    @functools.cached_property
    def lora_scale(self) -> float:
        """The strength of its LoRA, drawn from its own seed if a range was given."""
        scale = self.recipe.settings.get("lora_scale", [1.0])
        rng = np.random.default_rng(self.source_image.derive_seed(self.seed, "lora_scale"))
        return float(rng.uniform(*scale)) if len(scale) > 1 else scale[0]

    @property
    def line(self) -> dict:
        """Its line of the plan: everything that decides its pixels, except what the whole run shares."""
        given = {
            "good_image": self.source_image.file.name,
            "given_mask": self.source_image.mask and self.source_image.mask.name,
        }
        settings = self.recipe.settings
        if "lora_scale" in settings:
            settings = settings | {"lora_scale": self.lora_scale}
        return {"name": self.name, **given, **self.source_image.digests, **settings, "seed": self.seed}


# ---------------------------------------------------------------------------------------------------------------------
# From a request to recipes


def choose_defects(request: GenerationRequest, loras: Sequence[LoraFile]) -> list[tuple[LoraFile, str | None, str]]:
    """(LoRA, defect type, prompt) of each LoRA and each of its defect types that `--defect` names.

    Raises:
        InputError: no LoRA knows a defect type, or the choice is not unique (DF411).
    """
    chosen = []
    for lora in loras:
        prompts = lora.prompts()
        alone = len(loras) == 1 or not prompts
        wanted = [d for d in request.defect or [None] if d is None or d in prompts or alone]
        if not wanted:
            what = f"knows none of --defect {' '.join(request.defect)}"
            raise InputError(Problem("DF411", lora.path, what, "leave it out"))
        chosen += [
            (lora, *choose_prompt(lora, defect, request.prompt, request.generation_prompt)) for defect in wanted
        ]
    missing = set(request.defect or ()) - {defect for _, defect, _ in chosen}
    if missing:
        raise InputError(Problem("DF411", f"--defect {', '.join(sorted(missing))}", "no --lora knows it"))
    return chosen


def choose_prompt(
    lora: LoraFile, defect: str | None, prompt: str | None, generation_prompt: str | None
) -> tuple[str | None, str]:
    """(defect type, prompt): the prompt given, or that of the LoRA's record, of the pass named or else its own."""
    prompts = lora.prompts()
    if defect is None and len(prompts) == 1:
        defect = next(iter(prompts))
    if prompt and (defect is None or defect in prompts or not prompts):
        return defect, prompt
    if defect in prompts:
        of_pass = lora.prompts(generation_prompt)
        if defect not in of_pass:
            what = f"has no {generation_prompt} prompts"
            raise InputError(Problem("DF411", lora.path, what, "give --prompt"))
        return defect, of_pass[defect]
    if not prompts:
        raise InputError(Problem("DF411", lora.path, "has no prompts", "give --prompt"))
    if defect is None:
        fix = f"choose one with --defect: {', '.join(sorted(prompts))}"
        raise InputError(Problem("DF411", lora.path, "knows several defects", fix))
    what = f"the LoRA does not know it.{did_you_mean(defect, prompts)}"
    raise InputError(Problem("DF411", f"--defect {defect}", what))


def choose_crops(request: GenerationRequest, lora: LoraFile) -> CropRule | None:
    """How crops are laid around a defect, None for whole images: by the flags, and else as the LoRA was trained.

    Raises:
        InputError: flags of crops where there are none (DF413).
    """
    flags = {"context": request.zoom_context, "min_area": request.zoom_min_area}
    given = {name: value for name, value in flags.items() if value is not None}
    trained = lora.record.get("zoom")
    if request.zoom == "off" or (request.zoom == "auto" and not trained):
        if given:
            what = "no crops are used here"
            raise InputError(Problem("DF413", "--zoom_context, --zoom_min_area", what, "add --zoom on"))
        return None
    return CropRule(**{name: value for name, value in (trained or {}).items() if name in CropRule._fields} | given)


def make_recipe(
    request: GenerationRequest,
    lora: LoraFile,
    defect: str | None,
    prompt: str,
    mask_source: MaskSource | None,
    mask_settings: dict,
    references: References | None = None,
) -> Recipe:
    """The recipe of one defect type; `mask_settings` are those that decide the masks of `mask_source`."""
    zoom = choose_crops(request, lora)
    settings = {
        "object": lora.record.get("object"),
        "defect": defect,
        "prompt": prompt,
        "generation_prompt": None if request.prompt else request.generation_prompt or lora.best_pass,
        "lora_sha256": lora.sha256,
        **({} if request.lora_alpha is None else {"lora_alpha": request.lora_alpha}),
        **({} if request.lora_scale is None else {"lora_scale": request.lora_scale}),
        **({"prompt_noise": request.prompt_noise} if request.prompt_noise else {}),
        "mask_source": request.mask_source,
        **mask_settings,
        "zoom": zoom and zoom._asdict(),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_interval": request.guidance_interval,
        "composite": request.composite,
        **({"feather": [RAMP_SHARE, RAMP_PIXELS]} if request.composite == "feather" else {}),
        **({} if references is None else {"references_sha256": references.sha256}),
    }
    return Recipe(lora, mask_source, zoom, settings, references)


# ---------------------------------------------------------------------------------------------------------------------
# From recipes to images


def make_plan(inputs: Sequence[RequestInputs]) -> list[PlannedImage]:
    """The images of all requests: for each defect type `--num_images` on the source images in turn.

    With `--like` the missed defects take turns, each with its own recipe, on the source images nearest to its image.

    Raises:
        InputError: the same image is asked for twice (DF415), or more images than one run makes (DF187).
    """
    number = sum((r.num_images or len(source_images)) * len(recipes) for r, source_images, recipes, _ in inputs)
    if number > MOST_IMAGES:
        what = f"one run makes at most {MOST_IMAGES:,}"
        raise InputError(Problem("DF187", f"{number:,} images", what, "divide it, each with a seed of its own"))
    wanted: list[tuple[SourceImage, Recipe, int]] = []
    for request, source_images, recipes, nearest in inputs:
        for turns in recipes:
            taken: Counter[SourceImage] = Counter()
            for i in range(request.num_images or len(source_images)):
                turn, which = divmod(i, len(turns))
                recipe = turns[which]
                order = nearest.get(recipe.settings.get("like", {}).get("image"))
                image = order[turn % len(order)] if order else source_images[i % len(source_images)]
                wanted.append((image, recipe, repeat_seed(request.seed, taken[image])))
                taken[image] += 1
    names = unique_names([(source_image, recipe) for source_image, recipe, _ in wanted])
    plan = [PlannedImage(name, *image) for name, image in zip(names, wanted)]
    asked: set[str] = set()
    for image in plan:
        key = json.dumps(image.line | {"name": ""}, sort_keys=True)
        if key in asked:
            what = f"is requested twice with --seed {image.seed}"
            fix = "change one seed"
            raise InputError(
                Problem("DF415", f"{image.source_image.file.name}, {defect_label(image.recipe)}", what, fix)
            )
        asked.add(key)
    return plan


def unique_names(images: Sequence[tuple[SourceImage, Recipe]]) -> list[str]:
    """A file name for each image, without its suffix: the source image's, the defect type if there are several, and a
    number where that is taken."""
    several = len({(recipe.settings["lora_sha256"], recipe.settings["defect"]) for _, recipe in images}) > 1
    names: dict[str, None] = {}
    numbers: Counter[str] = Counter()
    for source_image, recipe in images:
        name = stem = f"{source_image.name}-{defect_label(recipe)}" if several else source_image.name
        while name in names:
            numbers[stem] += 1
            name = f"{stem}-{numbers[stem]:04d}"
        names[name] = None
    return list(names)


def defect_label(recipe: Recipe) -> str:
    """The defect type as a part of a file name."""
    return re.sub(r"[^\w-]+", "_", recipe.settings["defect"] or "defect")


def batch_plan(plan: Sequence[PlannedImage], size: int) -> list[list[PlannedImage]]:
    """The images in groups of up to `size` that are made together; the same in every process.

    Each group has one recipe, and one strength of the LoRA.
    """
    alike: dict[str, list[PlannedImage]] = {}
    for image in plan:
        alike.setdefault(json.dumps([image.recipe.settings, image.lora_scale]), []).append(image)
    return [images[i : i + size] for images in alike.values() for i in range(0, len(images), size)]


REASON = "placement_reason"  # why `placement` is what it is, which decides no pixel
EARLIER = {"placement": "anywhere"}  # what a plan made before the setting existed means


def check_plan(lines: list[dict], before: list[dict]) -> None:
    """Raises InputError (DF320) if the lines of an earlier start's plan are not among those of now."""
    old_lines = {line["name"]: line for line in before}
    problems: set[Problem] = set()
    varying: dict[str, Problem] = {}  # what differs from line to line anyway: the first is reported
    for line in lines:
        old = old_lines.pop(line["name"], line)
        was, now = ({k: v for k, v in (EARLIER | x).items() if k != REASON} for x in (old, line))
        for key in [k for k in now.keys() | was.keys() if now.get(k) != was.get(k)]:
            if key.startswith(("good_image", "given_")):
                problems.add(Problem("DF320", line["name"], "was generated from another image or mask"))
            else:
                what = f"the run was started with {was.get(key)!r}, now it is {now.get(key)!r}"
                changed = Problem("DF320", key, what, f"add --placement {was[key]}" if key == "placement" else "")
                varying.setdefault(key, changed) if key in ("seed", "like") else problems.add(changed)
    if old_lines:
        names = ", ".join(sorted(old_lines)[:4])
        what = f"{len(old_lines)} images of the earlier run are no longer requested"
        problems.add(Problem("DF320", names, what))
    problems.update(varying.values())
    if problems:
        advice = "Resume with the same inputs and flags, or choose another --output_dir."
        raise InputError(*sorted(problems, key=str), advice=advice)
