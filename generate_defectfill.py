"""Generate defect images: inpaint defects into good images with a DefectFill LoRA, and keep the best candidate.

    python generate_defectfill.py --lora lora-hazelnut-hole --image good.png --mask mask.png --output_dir generated

The road of an image: the flags or a line of `--cases` become a request; requests and the files they name become the
plan; each planned image is inpainted crop by crop (candidates, measures, quality filter, selection, composite) and
written. Reads top to bottom: one image, one pass over the plan, the command.

Shapes: P images, N candidates of each, S side of the square the model works on, G of its latent grid, H x W an image's
own size.
Masks are 1 inside the defect.
"""

import dataclasses
import datetime
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import defectfill.runs.start  # noqa: F401

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from accelerate.utils.memory import clear_device_cache
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from tqdm.auto import tqdm

from defectfill.base_model import BaseModel, check_prompt, check_resolution, load_tokenizer, read_base
from defectfill.likeness import Likeness, read_squeezenet, squeezenet_features, vae_features
from defectfill.lora import ADAPTER, LoraFile, check_content, check_fits, fuse_lora, load_lora
from defectfill.memory import GENERATION_NEEDS_LESS, is_out_of_memory, told_if_out_of_memory
from defectfill.runs.checkpoint import check_identity
from defectfill.runs.disks import is_of_disk, told_if_unwritable
from defectfill.runs.files import LONGEST_NAME, atomic_write, clear_leftovers, finite, save_image, write_json
from defectfill.runs.flags import parse_generation_args
from defectfill.runs.inputs import read_inputs
from defectfill.runs.loading import ahead
from defectfill.runs.manifest import (
    KINDS,
    MANIFEST,
    PLAN,
    REPORT,
    SETTINGS,
    SHEET,
    TABLE,
    PlanLine,
    check_output_dir,
    check_own,
    merge_parts,
    open_part,
    progress,
    read_lines,
    sealed,
    warn_of_unverified,
    write_lines,
    write_table,
)
from defectfill.runs.misses import good_images_near
from defectfill.runs.plan import PlannedImage, Recipe, RequestInputs, batch_plan, check_plan, make_plan
from defectfill.runs.processes import check_launch, from_main_process, locked_start, slow_precision
from defectfill.runs.report import contact_row, stack, thumbnail, write_report
from defectfill.runs.requests import GenerationCommand
from defectfill.runs.signals import end_with_launcher, exit_on_signal
from defectfill.runs.space import check_generation_space
from defectfill.runs.speed import SPEED, Speed, SpeedFile, summarise
from defectfill.sampling import compile_unet, composite, fit, inpaint, load_pipeline, reconstruct
from defectfill.seam import changed_mask, feather_alpha, grid_mask, seam_step, vae_error
from defectfill.selection import (
    REJECTIONS,
    Measures,
    QualityFilter,
    Scorer,
    choose_candidate,
    make_scorer,
    measure,
)
from defectfill_dataset import (
    Box,
    InputError,
    PlacedMask,
    Problem,
    component_boxes,
    crop_boxes,
    crop_mask,
    file_digest,
    image_tensor,
    is_grey,
    make_crops,
    open_image,
    pool_mask,
    tensor_image,
    two_tones,
    upright_exif,
)
from defectfill_dataset.commands import exit_on_input_error, say
from defectfill_dataset.errors import one_line
from defectfill_dataset.text import Schema, read_json


logger = logging.getLogger(__name__)

SHEET_IMAGES, SHEET_CROPS = 24, 12  # on the contact sheet; of each image
WRITERS = 4  # threads


# ---------------------------------------------------------------------------------------------------------------------
# One image


class Crop(NamedTuple):
    """A square of an image that is inpainted at once, and what the model sees of it."""

    box: Box
    mask: np.ndarray  # (h, w) bool, a view of the canvas's `mask_left`
    alpha: np.ndarray  # (h, w) in 0..255, how a candidate is blended in
    source: torch.Tensor  # (3, S, S) in [-1, 1]
    pixel_mask: torch.Tensor  # (1, S, S)
    latent_mask: torch.Tensor  # (1, G, G)


class Inpainted(NamedTuple):
    """A finished crop that is not yet in the image."""

    crop: Crop
    candidates: torch.Tensor  # (N, 3, S, S) in [0, 1], on the CPU
    reconstruction: torch.Tensor  # (3, S, S) in [0, 1], on the CPU: the crop through the VAE alone
    line: dict


@dataclasses.dataclass
class Canvas:
    """A planned image while it is made: the crops finished so far, and what is left.

    Args:
        source: RGB, the source image.
        image: RGB, with the finished crops pasted in, but for `inpainted`.
        mode: of the written image, "L" if the source file is grey, else "RGB".
        grey: whether the source has no colour, and so the image that is written.
        tones: the source's two grey tones, if it has no others, and so those of the image that is written.
        placed: its mask; None if there is no place for one.
        mask_left: (H, W) bool, the pixels of the mask that no pasted crop has inpainted.
        alpha: (H, W) in 0..255, how candidates are blended in, from the whole mask; not used with `grid`.
        painted: (H, W) bool, the mask, and what pasted crops painted beside it: the label that is written.
        vae_error: (H, W) in 0..255, the `vae_error` of the pasted crop at each pixel.
        boxes: of all crops, in their order.
        crop: the next to inpaint, once it is cut out.
        inpainted: the crop finished last, until it is pasted.
        lines: the manifest's entry of each finished crop.
        contact_rows: of the pasted crops.
        attempt: at the next crop, from 1.
        rejected: how many candidates of the next crop were rejected, by reason.
        problem: why the image cannot be made.
    """

    planned: PlannedImage
    source: Image.Image
    image: Image.Image
    mode: str
    grey: bool
    tones: tuple[int, int] | None = None
    placed: PlacedMask | None = None
    mask_left: np.ndarray | None = None
    alpha: np.ndarray | None = None
    painted: np.ndarray | None = None
    vae_error: np.ndarray | None = None
    boxes: list[Box] = dataclasses.field(default_factory=list)
    crop: Crop | None = None
    inpainted: Inpainted | None = None
    lines: list[dict] = dataclasses.field(default_factory=list)
    contact_rows: list[Image.Image] = dataclasses.field(default_factory=list)
    attempt: int = 1
    rejected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))
    problem: Problem | None = None


def start_canvas(planned: PlannedImage, resolution: int, scale_factor: int) -> Canvas:
    """The source image with its mask and its first crop, nothing inpainted yet."""
    image, placed = planned.source_image.load_with_mask(planned.seed, planned.recipe.mask_source)
    mode, grey = "L" if open_image(planned.source_image.file).mode in ("1", "L") else "RGB", is_grey(image)
    if placed is None:
        what = "no room for its mask"
        return Canvas(
            planned, image, image, mode, grey, problem=Problem("DF340", planned.source_image.file.name, what)
        )
    mask = placed.mask
    alpha = feather_alpha(mask) if planned.recipe.settings["composite"] == "feather" else mask * np.uint8(255)
    vae_error = np.zeros(mask.shape, dtype=np.uint8)
    boxes = crop_boxes(mask, resolution, planned.recipe.zoom)
    tones = two_tones(image)
    canvas = Canvas(
        planned, image, image.copy(), mode, grey, tones, placed, mask.copy(), alpha, mask.copy(), vae_error, boxes
    )
    next_crop(canvas, resolution, scale_factor)
    return canvas


def is_unfinished(canvas: Canvas) -> bool:
    """Whether crops are left to inpaint."""
    return not canvas.problem and len(canvas.lines) < len(canvas.boxes)


def next_crop(canvas: Canvas, resolution: int, scale_factor: int) -> Crop:
    """The first unfinished crop, as the crops before it left the image; cut out once, whatever the attempts at it."""
    if canvas.crop is None:
        paste_inpainted(canvas)
        box = canvas.boxes[len(canvas.lines)]
        mask, source = crop_mask(canvas.mask_left, box), image_tensor(canvas.image.crop(box), resolution)
        pixel_mask, latent_mask = pool_mask(mask, resolution), pool_mask(mask, resolution // scale_factor)
        if canvas.planned.recipe.settings["composite"] == "grid":
            alpha = grid_mask(latent_mask, mask.shape) * np.uint8(255)
        else:
            alpha = crop_mask(canvas.alpha, box) * mask
        canvas.crop = Crop(box, mask, alpha, source, pixel_mask, latent_mask)
    return canvas.crop


def candidate_seeds(canvas: Canvas, number: int) -> list[int]:
    """The seeds of the next crop's candidates; others in each attempt."""
    first = len(canvas.lines) * number
    again = ["attempt", canvas.attempt] if canvas.attempt > 1 else []
    source_image, seed = canvas.planned.source_image, canvas.planned.seed
    return [source_image.derive_seed(seed, *again, first + i) for i in range(number)]


def retry_crop(canvas: Canvas, max_attempts: int) -> None:
    """Starts the next attempt at a crop whose candidates were all rejected; gives the image up after the last one."""
    if canvas.attempt < max_attempts:
        canvas.attempt += 1
        return
    counts = ", ".join(f"{number} {reason}" for reason, number in canvas.rejected.items())
    filtered = canvas.rejected["no defect"] or canvas.rejected["artefact"]
    advice = "relax --min_change or --max_deviation, or train longer" if filtered else "use --mixed_precision no"
    rejected = f"all candidates rejected in {max_attempts} attempts: {counts}"
    canvas.problem = Problem("DF342", canvas.planned.source_image.file.name, rejected, advice)


def finish_crop(
    canvas: Canvas,
    candidates: torch.Tensor,
    reconstruction: torch.Tensor,
    seeds: list[int],
    measures: Measures,
    chosen: int,
) -> None:
    """Keeps (N, 3, S, S) candidates and the (3, S, S) reconstruction of the crop until it is pasted; adds its line."""
    line = {
        "box": canvas.crop.box,
        "candidate_seeds": seeds,
        "scores": finite(measures.scores) if measures.scored else [None] * len(seeds),
        "changes": finite(measures.changes),
        "deviations": finite(measures.colour_distances),
        "chosen": chosen,
        "attempts": canvas.attempt,
        "refused": canvas.rejected,
    }
    if measures.reference_distances is not None:
        line["reference_distances"] = finite(measures.reference_distances)
    canvas.lines.append(line)
    canvas.crop, canvas.inpainted = None, Inpainted(canvas.crop, candidates.cpu(), reconstruction.cpu(), line)
    canvas.attempt, canvas.rejected = 1, dict.fromkeys(REJECTIONS, 0)


def paste_inpainted(canvas: Canvas) -> None:
    """Pastes the chosen candidate of the crop finished last, if there is one, into the image; adds its contact row."""
    if canvas.inpainted is None:
        return
    crop, candidates, reconstruction, line = canvas.inpainted
    if len(canvas.contact_rows) < SHEET_CROPS:
        alpha = pool_mask(crop.alpha, crop.source.shape[-1]) / 255
        results = torch.where(alpha > 0, torch.lerp(crop.source, candidates * 2 - 1, alpha), crop.source)
        cells = [thumbnail(as_source(canvas, tensor_image(result))) for result in results]
        good, mask = (thumbnail(tensor_image(x)) for x in (crop.source, crop.pixel_mask.expand(3, -1, -1) * 2 - 1))
        numbers = line.get("reference_distances", line["scores"])
        canvas.contact_rows.append(contact_row(good, mask, cells, numbers, line["chosen"]))
    before, painted = canvas.image.crop(crop.box), crop.alpha > 0
    canvas.image.paste(composite(before, candidates[line["chosen"]], crop.alpha), crop.box[:2])
    line["vae_error"] = vae_error(before, fit(reconstruction, before.size), painted)
    crop_mask(canvas.vae_error, crop.box)[painted] = line["vae_error"]
    crop_mask(canvas.painted, crop.box)[painted] = True
    crop.mask[:] = False
    canvas.inpainted = None


def as_source(canvas: Canvas, image: Image.Image) -> Image.Image:
    """The image as it is written, see `as_written`."""
    if canvas.grey:
        image = image.convert("L")
    if canvas.tones:
        dark, light = canvas.tones
        image = image.point([light if 2 * grey > dark + light else dark for grey in range(256)])
    return image.convert(canvas.mode)


LUMA = (0.299, 0.587, 0.114)  # how PIL makes grey of R, G and B


def as_written(images: torch.Tensor, canvas: Canvas) -> torch.Tensor:
    """(N, 3, S, S) images in [0, 1] as they are written: grey, or each pixel the nearer of the two tones.

    Any colour, or any other tone, would tell a detector where the defect is.
    """
    if not canvas.grey:
        return images
    grey = torch.einsum("nchw,c->nhw", images, images.new_tensor(LUMA)).unsqueeze(1).expand_as(images)
    if canvas.tones is None:
        return grey
    dark, light = (tone / 255 for tone in canvas.tones)
    toned = torch.where(2 * grey > dark + light, light, dark)
    return torch.where(grey.isfinite(), toned, grey)  # what is broken stays so


def write_image(canvas: Canvas, folder: Path, keep_metadata: bool) -> dict:
    """Writes image, masks and contact rows of a finished canvas; returns the line of the manifest."""
    paste_inpainted(canvas)
    planned, mask, defects = canvas.planned, canvas.painted, canvas.placed.defects
    source, image = (as_source(canvas, x) for x in (canvas.source, canvas.image))
    files = {kind: f"{kind}/{planned.name}.png" for kind in KINDS}
    exif = upright_exif(planned.source_image.file) if keep_metadata else b""
    save_image(image, folder / files["images"], exif)
    save_image(Image.fromarray(mask).convert("L"), folder / files["masks"])
    save_image(
        Image.fromarray(changed_mask(source, image, canvas.vae_error)).convert("L"), folder / files["mask_changed"]
    )
    save_image(stack(canvas.contact_rows), folder / files["contact"])
    line = planned.line | {
        "image": files["images"],
        "mask": files["masks"],
        "mask_changed": files["mask_changed"],
        "seam_step": seam_step(image, mask),
        "good_seam_step": seam_step(source, mask),
        "reference_seam_step": planned.recipe.reference_seam_step,
        "mask_parts": [{"from": defect.name, "top": defect.top, "left": defect.left} for defect in defects],
        "boxes": component_boxes(mask),
        "windows": canvas.lines,
    }
    return sealed(line, folder)


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the plan


class PreparedGeneration(NamedTuple):
    """What to make and with what, read and checked, before any weight is loaded."""

    command: GenerationCommand
    plan: list[PlannedImage]
    base: BaseModel
    scorer: Scorer | None
    squeezenet: torch.nn.Sequential | None  # of --likeness_net
    settings: dict  # what decides a pixel besides the plan; it must be the same when the run goes on


class Share(NamedTuple):
    """What became of a process's share."""

    problems: dict[str, Problem]  # of images that could not be made, by name
    speed: Speed
    failure: OSError | None  # the disk's, that ended it


def generate_share(run: PreparedGeneration, done: set[str], state: PartialState) -> Share:
    """Makes this process's share of the images that are not done.

    A batch with an image to make is made whole, so that no pixel depends on what was done before. A batch without a
    place for one of those is not made, and no weight is loaded for it. While the device samples one batch, threads
    prepare the next and write the one before.
    """
    command = run.command
    batches = batch_plan(run.plan, max(1, (command.batch_size or 1) // command.num_candidates))
    todo = [batch for batch in batches if {planned.name for planned in batch} - done]
    mine = todo[state.process_index :: state.num_processes]
    share = Share({}, Speed(state.device), None)
    try:
        if mine:
            make_batches(run, mine, done, state, share)
    except OSError as error:
        if not is_of_disk(error, command.output_dir):
            raise
        return share._replace(failure=error)
    return share


def make_batches(
    run: PreparedGeneration, mine: list[list[PlannedImage]], done: set[str], state: PartialState, share: Share
) -> None:
    """Makes the images of these batches that are not done, and notes problems and speed in `share`."""
    command, (problems, speed, _) = run.command, share
    model = LazyModel(run, state.device)
    writing: list[Future] = []  # of the batch before
    bar = tqdm(total=sum(map(len, mine)), desc="Images", disable=not state.is_local_main_process)
    with open_part(command.output_dir, state.process_index) as add_line, ThreadPoolExecutor(WRITERS) as writers:

        def write(canvas: Canvas, seconds: float) -> None:
            try:
                line = write_image(canvas, command.output_dir, command.keep_metadata)
            except (OSError, RuntimeError, MemoryError) as error:
                if isinstance(error, OSError) and is_of_disk(error, command.output_dir):
                    raise
                problems[canvas.planned.name] = problem_of_image(canvas.planned, error)
            else:
                add_line(line | {"seconds": seconds})

        for canvases in ahead(lambda batch: start_batch(batch, run), mine):
            seconds = 0.0
            if any(not canvas.problem and canvas.planned.name not in done for canvas in canvases):
                with speed.loading():
                    pipe = model.load(canvases[0].planned.recipe.lora, canvases[0].planned.lora_scale)
                began = time.monotonic()
                generate_or_skip(pipe, canvases, run, model.likeness(canvases[0].planned.recipe))
                seconds = round((time.monotonic() - began) / len(canvases), 3)
            for written in writing:
                written.result()
            problems.update({canvas.planned.name: canvas.problem for canvas in canvases if canvas.problem})
            made = [canvas for canvas in canvases if not canvas.problem and canvas.planned.name not in done]
            writing = [writers.submit(write, canvas, seconds) for canvas in made]
            speed.add_batch(len(made))
            bar.update(len(canvases))
        for written in writing:
            written.result()
    speed.finish()


@dataclasses.dataclass
class LazyModel:
    """The base's pipeline with one LoRA at a time, loaded when it is first needed."""

    run: PreparedGeneration
    device: torch.device
    pipe: StableDiffusionInpaintPipeline | None = None
    lora: LoraFile | None = None
    scale: float = 1.0
    unfuse: Callable[[], None] | None = None
    likenesses: dict[tuple, Likeness] = dataclasses.field(default_factory=dict)  # by references and crop rule

    def load(self, lora: LoraFile, scale: float) -> StableDiffusionInpaintPipeline:
        """The pipeline with this LoRA at this strength, as the command's flags want it."""
        command = self.run.command
        if self.pipe is None:
            self.pipe = load_pipeline(
                self.run.base, command.cache_dir, self.run.settings["mixed_precision"], self.device,
                command.scheduler, command.channels_last,
            )  # fmt: skip
            if command.torch_compile:
                compile_unet(self.pipe, command.torch_compile)
        if lora is not self.lora or (self.unfuse and scale != self.scale):
            if self.unfuse:
                self.unfuse()
            self.pipe.unload_lora_weights()
            load_lora(self.pipe, lora)
            self.lora, self.scale, self.unfuse = lora, 1.0, None
        if scale != self.scale:
            self.pipe.set_adapters(ADAPTER, scale)
            self.scale = scale
        if command.fuse_lora and self.unfuse is None:
            self.unfuse = fuse_lora(self.pipe)
        return self.pipe

    def likeness(self, recipe: Recipe) -> Likeness | None:
        """What measures the recipe's candidates with `--selection likeness`; after `load`."""
        if recipe.references is None:
            return None
        key = (recipe.references.sha256, recipe.zoom)
        if key not in self.likenesses:
            layers, resolution = self.run.squeezenet, self.run.settings["resolution"]
            net = squeezenet_features(layers, self.device) if layers else vae_features(self.pipe.vae)
            rows, others, _ = recipe.references
            crops = make_crops(rows, resolution, recipe.zoom, others)
            self.likenesses[key] = Likeness(net, crops, resolution, self.device)
        return self.likenesses[key]


def start_batch(batch: Sequence[PlannedImage], run: PreparedGeneration) -> list[Canvas]:
    """A canvas for each image of a batch, with a problem where it cannot be started."""
    canvases = []
    for planned in batch:
        problem = None
        if len(os.fsencode(f"{planned.name}.png")) > LONGEST_NAME:
            what = f"its name and the defect type's are together longer than {LONGEST_NAME} bytes"
            problem = Problem("DF329", planned.source_image.file.name, what, "rename it")
        else:
            try:
                canvas = start_canvas(planned, run.settings["resolution"], run.base.vae_scale_factor)
            except (OSError, RuntimeError, MemoryError) as error:
                problem = problem_of_image(planned, error)
        if problem:
            nothing = Image.new("RGB", (1, 1))
            canvas = Canvas(planned, nothing, nothing, "RGB", False, problem=problem)
        canvases.append(canvas)
    return canvases


def problem_of_image(planned: PlannedImage, error: Exception) -> Problem:
    """Why an image cannot be made: it does not fit in memory, or a file of it cannot be read; raises other errors."""
    name = planned.source_image.file.name
    if is_out_of_memory(error):
        fix = "use a smaller image, a lower --resolution, or a machine with more memory"
        return Problem("DF328", name, f"does not fit in memory ({one_line(str(error))[:200]})", fix)
    if isinstance(error, OSError):
        return Problem("DF103", name, f"cannot be read: {error}")
    raise error


def generate_or_skip(
    pipe: StableDiffusionInpaintPipeline,
    canvases: Sequence[Canvas],
    run: PreparedGeneration,
    likeness: Likeness | None,
) -> None:
    """`generate_batch`; if that does not fit in memory, each image alone, and one that does not has a problem."""
    try:
        return generate_batch(pipe, canvases, run, likeness)
    except (RuntimeError, MemoryError) as error:
        problem = problem_of_image(canvases[0].planned, error)
    clear_device_cache(garbage_collection=True)  # past the error, whose traceback held tensors
    if len(canvases) == 1:
        canvases[0].problem = problem
        return
    for canvas in filter(is_unfinished, canvases):
        generate_or_skip(pipe, [canvas], run, likeness)


def generate_batch(
    pipe: StableDiffusionInpaintPipeline,
    canvases: Sequence[Canvas],
    run: PreparedGeneration,
    likeness: Likeness | None,
) -> None:
    """Finishes canvases of one recipe, their candidates in common batches.

    One crop of each at a time, each on what the crops before it left to inpaint, so that the tiles of a crack join; a
    crop whose candidates are all rejected is inpainted again from new seeds.
    """
    command, recipe, size = run.command, canvases[0].planned.recipe, run.settings["resolution"]
    quality_filter = QualityFilter(command.min_change, command.max_deviation)
    while unfinished := [canvas for canvas in canvases if is_unfinished(canvas)]:
        crops = [next_crop(canvas, size, run.base.vae_scale_factor) for canvas in unfinished]
        seeds = [candidate_seeds(canvas, command.num_candidates) for canvas in unfinished]
        images, masks, latent_masks = (
            torch.stack([getattr(crop, name) for crop in crops]) for name in ("source", "pixel_mask", "latent_mask")
        )
        candidates = inpaint(
            pipe, images, latent_masks, seeds=seeds, batch_size=command.batch_size, **recipe.sampling
        )  # (P, N, 3, S, S)
        reconstructions = reconstruct(pipe, images)
        sources, masks = (x.to(candidates.device) for x in (images / 2 + 0.5, masks))
        for i, canvas in enumerate(unfinished):
            shown, source = (as_written(x, canvas) for x in (candidates[i], sources[i : i + 1]))
            measures = measure(
                shown, source[0], reconstructions[i], masks[i], run.scorer, recipe.reference_colours, likeness
            )
            rejections = quality_filter.rejections(measures)
            for reason in filter(None, rejections):
                canvas.rejected[reason] += 1
            chosen = choose_candidate(measures, rejections)
            if chosen is None:
                retry_crop(canvas, command.max_attempts)
            else:
                finish_crop(canvas, candidates[i], reconstructions[i], seeds[i], measures, chosen)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(input_args: list[str] | None = None) -> GenerationCommand:
    return parse_generation_args("\n\n".join(__doc__.split("\n\n")[:2]), input_args)  # what it is, and an example


def prepare(command: GenerationCommand, device: torch.device) -> PreparedGeneration:
    """Reads and checks everything that can be wrong."""
    by_likeness = "likeness" in command.selection
    inputs = read_inputs(command.requests, command.cache_dir, by_likeness)
    plan = make_plan(inputs)
    check_output_dir(command.output_dir, [planned.source_image for planned in plan])
    recipes = list({id(planned.recipe): planned.recipe for planned in plan}.values())
    name, revision, resolution = choose_base(command, recipes)
    base = read_base(name, revision, command.cache_dir, command.variant)
    check_resolution(base, resolution)
    for lora in {recipe.lora.path: recipe.lora for recipe in recipes}.values():
        check_fits(lora, base)
        check_content(lora, base, command.pretrained_model_name_or_path is not None)
    tokenizer = load_tokenizer(base, command.cache_dir)
    for prompt in {recipe.settings["prompt"] for recipe in recipes}:
        check_prompt(prompt, tokenizer)
    settings = {
        "base": base.name,
        "base_sha256": base.digest,
        "revision": base.revision,
        "variant": command.variant,
        "resolution": resolution,
        "scheduler": command.scheduler,
        "fuse_lora": command.fuse_lora,
        "channels_last": command.channels_last,
        "torch_compile": command.torch_compile,
        "num_candidates": command.num_candidates,
        "batch_size": command.batch_size,
        "selection": command.selection.replace("lpips", f"lpips-{command.lpips_net}"),
        "min_change": command.min_change,
        "max_deviation": command.max_deviation,
        "max_attempts": command.max_attempts,
        "keep_metadata": command.keep_metadata,
        "mixed_precision": command.mixed_precision or ("fp16" if device.type == "cuda" else "no"),
    }
    for line in slow_precision(settings["mixed_precision"], device):
        logger.warning(line)
    if any(request.like for request in command.requests):
        plan = make_plan([near_misses(one, base, resolution, command.cache_dir, device) for one in inputs])
    squeezenet = read_squeezenet(command.likeness_net) if command.likeness_net else None
    if by_likeness:
        settings["likeness_net"] = file_digest(command.likeness_net) if command.likeness_net else "vae"
    scorer = make_scorer(command.selection, command.lpips_net, device)
    return PreparedGeneration(command, plan, base, scorer, squeezenet, settings)


def near_misses(
    inputs: RequestInputs, base: BaseModel, resolution: int, cache_dir: str | None, device: torch.device
) -> RequestInputs:
    """With `--like`, the request with its source images nearest to each missed image, the same in all processes."""
    request, images, *_ = inputs
    if request.like is None:
        return inputs
    order = functools.partial(good_images_near, images, request, base, resolution, cache_dir, device)
    orders = from_main_process(order, PartialState().is_main_process)
    return inputs._replace(nearest={name: [images[i] for i in places] for name, places in orders.items()})


# What a LoRA's record holds of its base, and the flag that overrides it.
BASE_FLAGS = {"base": "pretrained_model_name_or_path", "revision": "revision", "resolution": "resolution"}


def choose_base(command: GenerationCommand, recipes: Sequence[Recipe]) -> tuple[str, str | None, int]:
    """(name, revision, resolution) of the base: of the flags, or else the one that all LoRAs were trained on.

    Raises:
        InputError: there is none (DF412), the LoRAs differ (DF414), or a LoRA has no colour statistics that
            `--max_deviation` needs (DF417).
    """
    first = recipes[0].lora
    name = command.pretrained_model_name_or_path or first.record.get("base")
    resolution = first.record.get("resolution") if command.resolution is None else command.resolution
    if not name or resolution is None:
        fix = "give --pretrained_model_name_or_path and --resolution"
        raise InputError(Problem("DF412", first.path, "has no record of its base", fix))
    for recipe in recipes:
        for key, flag in BASE_FLAGS.items():
            theirs, ours = recipe.lora.record.get(key), first.record.get(key)
            digests = [lora.record.get("base_sha256") for lora in (first, recipe.lora)]
            moved = key == "base" and digests[0] is not None and digests[0] == digests[1]
            if theirs != ours and not moved and getattr(command, flag) is None:
                what = f"was trained with {key} {theirs}, {first.path} with {ours}"
                fix = f"give --{flag}, or generate with each in a run of its own"
                raise InputError(Problem("DF414", recipe.lora.path, what, fix))
        if command.max_deviation is not None and not recipe.reference_colours:
            what = (
                f"has no colour statistics for '{recipe.settings['defect']}' (trained on fewer than two references, "
                "or by an older version)"
            )
            fix = "retrain with two or more, or drop --max_deviation"
            raise InputError(Problem("DF417", recipe.lora.path, what, fix))
    revision = command.revision or (first.record.get("revision") if name == first.record.get("base") else None)
    return name, revision, resolution


def start_run(run: PreparedGeneration) -> set[str]:
    """Writes settings and plan, and tidies up after an earlier start; returns the names of the finished images."""
    folder, lines = run.command.output_dir, [planned.line for planned in run.plan]
    check_own(folder)
    clear_leftovers(folder, *(folder / kind for kind in KINDS))
    if (folder / SETTINGS).exists():
        check_identity(read_json(folder / SETTINGS, Schema, "DF310"), run.settings)
    check_plan(lines, read_lines(folder / PLAN, PlanLine))
    write_json(folder / SETTINGS, run.settings)
    write_lines(folder / PLAN, lines)
    for kind in KINDS:
        (folder / kind).mkdir(exist_ok=True)
    finished = merge_parts(folder, run.command.verify)
    warn_of_unverified(finished)
    done = {line["name"] for line in finished}
    left = [planned.source_image.file for planned in run.plan if planned.name not in done]
    check_generation_space(folder, left, run.command.num_candidates)
    return done


def finish_run(folder: Path, problems: dict[str, Problem], speeds: Sequence[Speed]) -> None:
    """Writes manifest, report and contact sheet; ends with exit status 1 if an image could not be made."""
    lines = merge_parts(folder)
    if any(speed.images for speed in speeds) or not (folder / SPEED).exists():
        write_json(folder / SPEED, summarise(speeds))
    if lines:
        write_table(folder / TABLE, lines)
        with atomic_write(folder / REPORT) as temporary:
            speed = read_json(folder / SPEED, SpeedFile, "DF310")
            write_report(temporary, read_lines(folder / PLAN, PlanLine), lines, problems.values(), speed)
        rows = [
            Image.open(folder / "contact" / f"{line['name']}.png", formats=("PNG",)) for line in lines[:SHEET_IMAGES]
        ]
        save_image(stack(rows), folder / SHEET)
    say(f"{len(lines)} images in {folder}: images/, masks/, mask_changed/, {MANIFEST}, {SHEET}, {REPORT}")
    if problems:
        raise SystemExit("Not generated:\n" + "\n".join(map(str, problems.values())))


def main(command: GenerationCommand) -> None:
    check_launch(training=False)
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(on_cpu, timeout=datetime.timedelta(days=7))  # processes wait for the slowest
    run = prepare(command, state.device)
    start = told_if_unwritable(command.output_dir, "make room on the disk, and start again")(lambda: start_run(run))
    locked = locked_start(command.output_dir, start, state.is_main_process)
    with exit_on_signal(lambda: f"Stopped: {progress(command.output_dir)}"), locked as done:
        end_with_launcher()
        shares = gather_object([generate_share(run, done, state)])
        state.destroy_process_group()  # by all together: one that leaves while another still works may abort
        if state.is_main_process:
            left = f"make room on the disk: {progress(command.output_dir)}"
            with told_if_unwritable(command.output_dir, left):
                for failure in filter(None, (share.failure for share in shares)):
                    raise failure
                problems = {name: why for share in shares for name, why in share.problems.items()}
                finish_run(command.output_dir, problems, [share.speed for share in shares])


def command() -> None:
    exit_on_input_error(told_if_out_of_memory(GENERATION_NEEDS_LESS)(lambda: main(parse_args())))


if __name__ == "__main__":
    command()
