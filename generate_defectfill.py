"""Paint defects into good images with a DefectFill LoRA and keep the best of several candidates.

    python generate_defectfill.py --lora lora-hazelnut-hole --image good.png --mask mask.png --output_dir generated

Reads top to bottom: candidates, selection, compositing, pictures, the command.

Shapes: N candidates, S side of the square the model works on, G = S // vae_scale_factor cells a side of the latent
grid, H x W the input's own size. Masks are 1 inside the defect.

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985, section 3.4.
"""

import argparse
import datetime
import json
import math
import pickle
import time
import urllib.error
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import defectfill.quiet  # noqa: F401

import lpips
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from skimage.metrics import structural_similarity
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from defectfill import ledger
from defectfill.base import Base, check_resolution, read_base
from defectfill.checkpoint import check_identity
from defectfill.files import clear_leftovers, replacing, save_picture, sole_writer, write_json
from defectfill.lora_file import check_fits, load_lora
from defectfill.options import overlays
from defectfill.page import contact_row, stacked, thumbnail, write_page
from defectfill.plan import PLAN, Item, check_plan, groups_of, make_plan
from defectfill_dataset import (
    Box,
    Case,
    InputError,
    Parser,
    cover,
    cut,
    exit_on_input_error,
    image_tensor,
    open_image,
    piece_boxes,
    tensor_image,
    to_grid,
    upright_exif,
    zoom_boxes,
)
from defectfill_dataset.inputs import add_input_flags, check_input_flags


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


@torch.no_grad()
def paint(
    pipe: StableDiffusionInpaintPipeline,
    images: torch.Tensor,
    grids: torch.Tensor,
    prompt: str,
    seeds: Sequence[Sequence[int]],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    guidance_interval: Sequence[float] = (0.0, 1.0),
) -> torch.Tensor:
    """(P, N, 3, S, S) candidates in [0, 1], one a seed: each depends on its own seed alone, whatever the batch.

    Outside the mask each step's latent is replaced by the clean image's, diffused to the noise level of the next
    step (section 3.4); after the last step it is the clean image's own.

    Args:
        images: (P, 3, S, S) in [-1, 1], defect-free.
        grids: (P, 1, G, G), 1 where the defect goes.
        seeds: of the initial noise, N for each image.
        batch_size: candidates per UNet call, of one image or of several; all by default.
        guidance_interval: step i is guided where start <= i / num_inference_steps < end (Kynkäänniemi et al., Limited
            Interval Guidance, NeurIPS 2024); the others run the UNet once a candidate.
    """
    device, dtype = pipe.device, pipe.vae.dtype
    images, grids = images.to(device, dtype), grids.to(device, dtype)
    pixel_masks = cover(grids, pipe.vae_scale_factor)
    both = torch.cat([images, images * (1 - pixel_masks)])
    # The mode, not a sample: a sample would take its noise from one candidate's seed and hand it to all.
    clean, masked = (pipe.vae.encode(both).latent_dist.mode() * pipe.vae.config.scaling_factor).chunk(2)
    guided = guidance_scale > 1
    embeds, negative = pipe.encode_prompt(prompt, device, 1, guided)
    texts = torch.cat([negative, embeds]) if guided else embeds
    start, end = guidance_interval
    scales = [guidance_scale if start <= i / num_inference_steps < end else 1 for i in range(num_inference_steps + 1)]
    rows = [(place, seed) for place, of_image in enumerate(seeds) for seed in of_image]
    candidates = []
    for first in range(0, len(rows), batch_size or len(rows)):
        batch = rows[first : first + (batch_size or len(rows))]
        place = torch.tensor([place for place, _ in batch], device=device)
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for _, s in batch]
        )
        noise = noise.to(device, dtype)

        def keep_background(pipe, step, timestep, tensors, noise=noise, place=place):
            following = pipe.scheduler.timesteps[step + 1 : step + 2]
            background = pipe.scheduler.add_noise(clean[place], noise, following) if len(following) else clean[place]
            pipe._guidance_scale = scales[step + 1]
            copies = 1 + pipe.do_classifier_free_guidance  # which the pipeline asks anew at every step
            return {
                "latents": torch.where(grids[place] > 0.5, tensors["latents"], background),
                "prompt_embeds": texts[-copies:].repeat_interleave(len(place), 0),
                "mask": grids[place].repeat(copies, 1, 1, 1),
                "masked_image_latents": masked[place].repeat(copies, 1, 1, 1),
            }

        candidates.append(
            pipe(
                prompt_embeds=embeds.expand(len(batch), -1, -1),
                negative_prompt_embeds=negative.expand(len(batch), -1, -1) if guided else None,
                image=images[place] / 2 + 0.5,
                mask_image=pixel_masks[place],
                masked_image_latents=masked[place],
                latents=noise,
                height=images.shape[-2],
                width=images.shape[-1],
                num_inference_steps=num_inference_steps,
                guidance_scale=scales[0],
                callback_on_step_end=keep_background,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(candidates).unflatten(0, (len(seeds), -1))


@torch.no_grad()
def reconstruct(pipe: StableDiffusionInpaintPipeline, images: torch.Tensor) -> torch.Tensor:
    """(P, 3, S, S) in [0, 1]: what the autoencoder alone makes of images (P, 3, S, S) in [-1, 1]."""
    latents = pipe.vae.encode(images.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
    return (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Low-Fidelity Selection

# (N, 3, S, S) candidates in [0, 1], (3, S, S) the normal image in [0, 1], (1, S, S) mask  ->  N distances
Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[float]]

LPIPS_FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def lpips_scorer(net: str, device: torch.device) -> Scorer:
    """LPIPS of `image * mask` over the whole frame: 0 outside the mask on both sides, so only the inside counts.

    Source: section 3.4; Zhang et al., LPIPS, CVPR 2018.

    Raises:
        InputError: the backbone's weights cannot be had (DF430).
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module="torchvision"
            )  # its own use of `pretrained=`
            model = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False).to(device)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_FILES[net]
        raise InputError(
            f"DF430 --selection lpips: the {net} backbone cannot be had ({error}). Put torchvision's "
            f"{LPIPS_FILES[net]} at {place}, or choose another measure: --selection ssim, rmse or none"
        ) from error

    @torch.no_grad()
    def score(candidates: torch.Tensor, normal: torch.Tensor, mask: torch.Tensor) -> list[float]:
        candidates, normal = ((x.to(device) * 2 - 1) * mask.to(device) for x in (candidates, normal[None]))
        return model(candidates, normal.expand_as(candidates)).flatten().tolist()

    return score


def ssim_score(candidates: torch.Tensor, normal: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """1 - SSIM, averaged inside the mask."""
    inside = mask[0].cpu().numpy() > 0.5
    pictures = [picture.cpu().numpy() for picture in candidates]

    def ssim(picture: np.ndarray) -> float:
        _, each = structural_similarity(picture, normal.cpu().numpy(), channel_axis=0, data_range=1.0, full=True)
        return float(each.mean(axis=0)[inside].mean())

    return [1 - ssim(picture) for picture in pictures]


def rmse_score(candidates: torch.Tensor, normal: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Root mean squared difference inside the mask, in [0, 1]."""
    squared = (candidates - normal).square().mean(dim=1, keepdim=True) * mask
    return (squared.sum(dim=(1, 2, 3)) / mask.sum()).sqrt().tolist()


def make_scorer(selection: str, net: str, device: torch.device) -> Scorer | None:
    """The measure that `--selection` names; None for `none`, which keeps the first candidate."""
    if selection == "lpips":
        return lpips_scorer(net, device)
    return {"ssim": ssim_score, "rmse": rmse_score, "none": None}[selection]


def select(scores: Sequence[float]) -> int:
    """Low-Fidelity Selection: the candidate least like the normal image inside the mask; never one without a number.

    Raises:
        FloatingPointError: no score is a number.
    """
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    if not finite:
        raise FloatingPointError("no candidate has a finite score")
    return max(finite, key=lambda i: scores[i])


COLOUR_NOISE = 16 / 255  # that any picture may have: standard deviation of each channel


def defect_colours(pictures: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(..., n, 3) colours of the pixels inside a defect's mask, less the mean colour of its surroundings.

    These are a sixteenth of the picture's side wide; all of the picture where the mask leaves none.

    Args:
        pictures: (..., 3, S, S) in [0, 1].
        mask: (1, S, S).
    """
    reach = max(1, pictures.shape[-1] // 16)
    wider = F.max_pool2d(mask, (2 * reach + 1, 1), stride=1, padding=(reach, 0))  # one axis at a time is far quicker
    around = (F.max_pool2d(wider, (1, 2 * reach + 1), stride=1, padding=(0, reach)) > mask)[0]
    surroundings = pictures[..., around] if around.any() else pictures.flatten(-2)
    return (pictures[..., mask[0] > 0.5] - surroundings.mean(dim=-1, keepdim=True)).mT.cpu().double()


def farthest(colours: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> float:
    """The Mahalanobis distance that 95 % of (n, 3) colours keep from a distribution of colours.

    Source: Reed and Yu's anomaly detector, IEEE Transactions on ASSP 38 (1990).
    """
    apart = colours - mean
    squared = (apart @ torch.linalg.inv(covariance + COLOUR_NOISE**2 * torch.eye(3).to(covariance)) * apart).sum(dim=1)
    return squared.sqrt().quantile(0.95).item()


def learn_appearance(references: Sequence[torch.Tensor]) -> dict:
    """What a LoRA's record says of the references of a defect type, given the `defect_colours` of each.

    Mean and covariance of all their colours, and how far the strangest of them is from the others (`farthest`); None
    for one alone.
    """

    def distribution(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = moments[0, 1:] / moments[0, 0]
        return mean, moments[1:, 1:] / moments[0, 0] - mean.outer(mean)

    with_ones = [F.pad(colours, (1, 0), value=1) for colours in references]
    moments = torch.stack([rows.T @ rows for rows in with_ones])  # number, sums and sums of products of each
    total = moments.sum(dim=0)
    others = total - moments if len(references) > 1 else ()
    strange = [farthest(colours, *distribution(rest)) for colours, rest in zip(references, others)]
    mean, covariance = distribution(total)
    return {"mean": mean.tolist(), "covariance": covariance.tolist(), "strangest": max(strange, default=None)}


def deviations(candidates: torch.Tensor, mask: torch.Tensor, known: dict) -> list[float]:
    """How strange (N, 3, S, S) candidates look beside the references' defects; 1 is as the strangest of these."""
    mean, covariance = (torch.tensor(known[name], dtype=torch.float64) for name in ("mean", "covariance"))
    return [farthest(colours, mean, covariance) / known["strangest"] for colours in defect_colours(candidates, mask)]


# ---------------------------------------------------------------------------------------------------------------------
# Compositing


def composite(image: Image.Image, candidate: torch.Tensor, mask: np.ndarray) -> Image.Image:
    """The candidate, (3, S, S) in [0, 1], inside the (H, W) mask; every pixel outside is the input's own."""
    painted = tensor_image(candidate * 2 - 1).resize(image.size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.where(mask[..., None], np.asarray(painted), np.asarray(image)))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

KINDS = ("images", "masks", "contact")  # folders of the output
REFUSALS = ("broken", "no defect", "artefact")
SHEET_CASES, SHEET_WINDOWS = 24, 12  # on the contact sheet; of each picture


class Gates(NamedTuple):
    """What keeps a candidate from being chosen, and how often a window is painted before it is given up.

    Args:
        min_change: times that the autoencoder alone changes the inside of the mask; what changes it less is no defect.
        max_deviation: of `deviations`; what deviates more is an artefact. None for no such gate.
    """

    min_change: float
    max_deviation: float | None
    max_attempts: int

    def verdict(self, score: float, change: float, deviation: float | None) -> str | None:
        """Which of `REFUSALS` a candidate meets, if any."""
        if not math.isfinite(score):
            return "broken"
        if change < self.min_change:
            return "no defect"
        return "artefact" if self.max_deviation is not None and deviation > self.max_deviation else None


def finite(values: Sequence[float | None]) -> list[float | None]:
    """None in place of what is not a number, as JSON needs it."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


class Progress:
    """An item on its way: the image as painted so far, the mask that is left, what came of each window."""

    def __init__(self, item: Item, resolution: int):
        self.item = item
        self.image, placed = item.case.draw(item.seed, item.task.source)
        self.grey = open_image(item.case.image).mode in ("1", "L")  # and so will be the output
        self.problem = None if placed else f"DF340 {item.case.image.name}: no place for its mask"
        self.boxes: list[Box] = []
        self.rows: list[Image.Image] = []
        self.windows: list[dict] = []
        self.attempt, self.refused = 1, dict.fromkeys(REFUSALS, 0)  # at the window
        if placed:
            self.mask, self.parts, self.left = placed.mask, placed.parts, placed.mask.copy()
            self.boxes = zoom_boxes(placed.mask, resolution, item.task.zoom)

    def window(self) -> tuple[Image.Image, np.ndarray]:
        """The next window of the image, and what of the mask it has to paint."""
        box = self.boxes[len(self.windows)]
        return self.image.crop(box), cut(self.left, box)

    def seeds(self, number: int) -> list[int]:
        """Of the window's candidates, others for each attempt."""
        first = len(self.windows) * number
        again = ["attempt", self.attempt] if self.attempt > 1 else []
        return [self.item.case.derive_seed(self.item.seed, *again, first + i) for i in range(number)]

    def choose(
        self,
        normal: torch.Tensor,
        plain: torch.Tensor,
        candidates: torch.Tensor,
        seeds: list[int],
        scorer: Scorer | None,
        gates: Gates,
    ) -> None:
        """Pastes the best of (N, 3, S, S) candidates that pass the gates into the window, if any does.

        Args:
            normal: (3, S, S) in [-1, 1], the window as it was painted on.
            plain: (3, S, S) in [0, 1], the window as the autoencoder alone returns it.
        """
        good, mask = self.window()
        normal = (normal / 2 + 0.5).to(candidates.device)
        inside = to_grid(mask, candidates.shape[-1]).to(candidates.device)
        pasted = torch.where(inside > 0.5, candidates, normal)  # what the composite will hold, at the model's size
        scores = scorer(pasted, normal, inside) if scorer else [0.0] * len(seeds)
        pixels = candidates.flatten(1)
        whole = (pixels.isfinite().all(dim=1) & pixels.any(dim=1)).tolist()  # half precision may overflow, or go black
        scores = [score if ok else math.nan for score, ok in zip(scores, whole)]
        *changes, floor = rmse_score(torch.cat([pasted, plain[None]]), normal, inside)
        changes = [change / max(floor, 1e-6) for change in changes]
        known = self.item.task.known_appearance
        strange = deviations(pasted, inside, known) if known else [None] * len(seeds)
        verdicts = [gates.verdict(*figures) for figures in zip(scores, changes, strange)]
        self.refused = {refusal: n + verdicts.count(refusal) for refusal, n in self.refused.items()}
        passed = [math.nan if verdict else score for score, verdict in zip(scores, verdicts)]
        try:
            chosen = select(passed)
        except FloatingPointError:
            self.attempt += 1
            if self.attempt > gates.max_attempts:
                counts = ", ".join(f"{number} {verdict}" for verdict, number in self.refused.items())
                gated = any(self.refused[why] for why in ("no defect", "artefact"))
                advice = "loosen the gate, or train longer" if gated else "use --mixed_precision no"
                told = f"no candidate passed in {gates.max_attempts} attempts: {counts}; {advice}"
                self.problem = f"DF342 {self.item.case.image.name}: {told}"
            return
        shown = finite(scores) if scorer else [None] * len(seeds)
        if len(self.rows) < SHEET_WINDOWS:
            pictures = (composite(good, candidate, mask) for candidate in candidates)
            cells = [thumbnail(picture.convert("L") if self.grey else picture) for picture in pictures]
            self.rows.append(contact_row(thumbnail(good), thumbnail(Image.fromarray(mask)), cells, shown, chosen))
        box = self.boxes[len(self.windows)]
        made = {"box": box, "candidate_seeds": seeds, "scores": shown, "changes": finite(changes)}
        judged = {"deviations": finite(strange), "chosen": chosen, "attempts": self.attempt, "refused": self.refused}
        self.windows.append(made | judged)
        self.attempt, self.refused = 1, dict.fromkeys(REFUSALS, 0)
        self.image.paste(composite(good, candidates[chosen], mask), box[:2])
        mask[:] = False

    def write(self, output_dir: Path, keep_metadata: bool) -> dict:
        """Writes image, mask and contact row; returns the line of the manifest."""
        exif = upright_exif(self.item.case.image) if keep_metadata else b""
        files = {kind: f"{kind}/{self.item.name}.png" for kind in KINDS}
        save_picture(self.image.convert("L") if self.grey else self.image, output_dir / files["images"], exif)
        save_picture(Image.fromarray(self.mask).convert("L"), output_dir / files["masks"])
        save_picture(stacked(self.rows), output_dir / files["contact"])
        return self.item.line | {
            "image": files["images"],
            "mask": files["masks"],
            "mask_parts": [{"from": part.name, "top": part.top, "left": part.left} for part in self.parts],
            "boxes": piece_boxes(self.mask),
            "windows": self.windows,
        }


def generate(
    pipe: StableDiffusionInpaintPipeline,
    works: Sequence[Progress],
    scorer: Scorer | None,
    resolution: int,
    num_candidates: int,
    batch_size: int | None,
    gates: Gates,
) -> None:
    """Paints items of one task, their candidates in common batches.

    One window of each after the other, each on what the earlier ones left to paint, so that the tiles of a crack join;
    a window of which no candidate passed the gates again with other seeds.
    """
    settings = works[0].item.task.settings
    names = ("prompt", "num_inference_steps", "guidance_scale", "guidance_interval")
    sampling = {name: settings[name] for name in names}
    while todo := [work for work in works if not work.problem and len(work.windows) < len(work.boxes)]:
        windows = [work.window() for work in todo]
        images = torch.stack([image_tensor(image, resolution) for image, _ in windows])
        grids = torch.stack([to_grid(mask, resolution // pipe.vae_scale_factor) for _, mask in windows])
        seeds = [work.seeds(num_candidates) for work in todo]
        candidates = paint(pipe, images, grids, seeds=seeds, batch_size=batch_size, **sampling)
        plain = reconstruct(pipe, images)
        for work, *of_work in zip(todo, images, plain, candidates, seeds):
            work.choose(*of_work, scorer, gates)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def check_places(cases: list[Case], output_dir: Path) -> None:
    """Raises InputError (DF192) if results would be written among the inputs, or over files of something else."""
    written = {output_dir.resolve(), *((output_dir / kind).resolve() for kind in KINDS)}
    for file in [f for case in cases for f in (case.image, *case.areas.values())]:
        if file.resolve().parent in written:
            raise InputError(f"DF192 --output_dir {output_dir}: would overwrite {file}; choose another folder")
    foreign = [kind for kind in KINDS if (output_dir / kind).is_dir() and any((output_dir / kind).iterdir())]
    if foreign and not (output_dir / PLAN).exists():
        raise InputError(
            f"DF192 --output_dir {output_dir}: holds {', '.join(foreign)} of something else; choose another folder"
        )


def check_prompt(prompt: str, base: Base, cache_dir: str | None) -> None:
    """Raises InputError (DF174) if the text encoder would not read the whole prompt."""
    tokenizer = CLIPTokenizer.from_pretrained(
        base.name, subfolder="tokenizer", revision=base.revision, cache_dir=cache_dir
    )
    number = len(tokenizer(prompt).input_ids)
    if number > tokenizer.model_max_length:
        raise InputError(
            f"DF174 '{prompt}': {number} tokens, but the text encoder reads {tokenizer.model_max_length}; shorten it"
        )


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that may differ from picture to picture, besides those of images and masks."""
    add = parser.add_argument_group("model").add_argument
    add("--lora", nargs="+", metavar="PATH|ID", help="LoRA folders, files or Hub ids; a set of pictures for each.")
    add("--prompt", help="Prompt in place of the LoRA's own.")
    add = parser.add_argument_group("sampling").add_argument
    number_help = "Pictures of each defect type, on the good images in turn. Default: one an image."
    add("--num_images", type=int, metavar="N", help=number_help)
    add("--num_inference_steps", type=int, default=50, metavar="N", help="Default: %(default)s (the paper's).")
    add("--guidance_scale", type=float, default=7.5, metavar="X", help="Default: %(default)s.")
    every, interval_help = [0.0, 1.0], "Guided steps, in fractions of all; the others cost half. Default: 0 1, all."
    add("--guidance_interval", nargs=2, type=float, default=every, metavar=("START", "END"), help=interval_help)
    add = parser.add_argument_group("zoom").add_argument
    add(
        "--zoom",
        choices=["auto", "on", "off"],
        default="auto",
        help="Paint in square windows around the mask, so that small and thin defects get pixels; auto: as the LoRA "
        "was trained. Default: %(default)s.",
    )
    add("--zoom_context", type=float, metavar="X", help="A window's side over its defect's. Default: as trained.")
    min_area_help = "A mask that covers less of its window is tiled along its length. Default: as trained."
    add("--zoom_min_area", type=float, metavar="X", help=min_area_help)


def add_case_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that a line of `--cases` may hold."""
    add_picture_flags(parser)
    add_input_flags(parser)


def check_picture_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where a value cannot work."""
    check_input_flags(parser, args)
    if not args.lora:
        parser.error("give --lora: what train_defectfill.py made")
    for flag in ("num_images", "num_candidates", "num_inference_steps", "batch_size", "max_attempts"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.zoom_context is not None and not 1 <= args.zoom_context < math.inf:
        parser.error(f"--zoom_context {args.zoom_context}: must be a finite number of at least 1")
    if args.zoom_min_area is not None and not 0 <= args.zoom_min_area < 1:
        parser.error(f"--zoom_min_area {args.zoom_min_area}: must be at least 0 and below 1")
    if not 0 <= args.min_change < math.inf:
        parser.error(f"--min_change {args.min_change}: must be a finite number of at least 0")
    if args.max_deviation is not None and not 0 < args.max_deviation < math.inf:
        parser.error(f"--max_deviation {args.max_deviation}: must be a finite number above 0")
    if not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale {args.guidance_scale}: must be a finite number")
    start, end = args.guidance_interval
    if not 0 <= start < end <= 1:
        parser.error(f"--guidance_interval {start} {end}: must be 0 <= START < END <= 1")
    steps = args.num_inference_steps
    if args.guidance_scale > 1 and not any(start <= i / steps < end for i in range(steps)):
        parser.error(f"--guidance_interval {start} {end}: holds none of the {steps} steps; make it longer")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_flags(parser)
    cases_help = "A JSON object a line, each like a run of its own: flags of the groups above by their names."
    parser.add_argument("--cases", type=Path, metavar="FILE", help=cases_help)
    add = parser.add_argument_group("base model").add_argument
    base_help = "Base inpainting model. Default: the LoRA's own base."
    add("--pretrained_model_name_or_path", metavar="PATH|ID", help=base_help)
    add("--revision", help="Revision of the base on the Hub. Default: the one the LoRA was trained on.")
    add("--variant", help="Variant of the base's weight files, such as fp16.")
    add("--cache_dir", help="Where downloaded models are kept.")
    precision_help = "Precision of the whole model. Default: fp16 on a GPU, no on a CPU."
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help=precision_help)
    add("--resolution", type=int, metavar="PX", help="Side of the model's square. Default: the LoRA's own.")
    scheduler_help = "ddim is the paper's; the others need about 20 steps. Default: %(default)s."
    add("--scheduler", choices=list(SCHEDULERS), default="ddim", help=scheduler_help)
    add = parser.add_argument_group("candidates and selection").add_argument
    add("--num_candidates", type=int, default=8, metavar="N", help="Candidates a window. Default: %(default)s.")
    batch_help = "Candidates in one UNet call; with room for those of several images, theirs. Default: one's."
    add("--batch_size", type=int, metavar="N", help=batch_help)
    add(
        "--selection",
        choices=["lpips", "ssim", "rmse", "none"],
        default="lpips",
        help="Measure of the distance to the normal image inside the mask; the most distant candidate is kept; with "
        "none the first. Default: %(default)s (the paper's).",
    )
    add("--lpips_net", choices=list(LPIPS_FILES), default="alex", help="LPIPS backbone. Default: %(default)s.")
    change_help = (
        "A candidate that changes the inside of its mask less than X times as much as the autoencoder alone does "
        "shows no defect and is not kept. Default: %(default)s, all may be."
    )
    add("--min_change", type=float, default=0.0, metavar="X", help=change_help)
    deviation_help = (
        "A candidate whose colours are X times as strange among the references' defects as the strangest of these is "
        "an artefact and is not kept. Default: all may be."
    )
    add("--max_deviation", type=float, metavar="X", help=deviation_help)
    attempts_help = "With other seeds each, where no candidate may be kept. Default: %(default)s."
    add("--max_attempts", type=int, default=3, metavar="N", help=attempts_help)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR")
    add("--keep_metadata", action="store_true", help="Pictures carry the EXIF data of the good image: place, camera.")
    args = parser.parse_args(input_args)
    if args.cases is None:
        check_picture_flags(parser, args)
    return args


class Run(NamedTuple):
    """What to paint and with what, checked, before any weight is loaded."""

    plan: list[Item]
    base: Base
    scorer: Scorer | None
    settings: dict  # what decides a pixel besides the plan; it must be the same when the run goes on


# What a LoRA says of its base, and the flag that overrules it.
BASE_FLAGS = {"base": "pretrained_model_name_or_path", "revision": "revision", "resolution": "resolution"}


def prepare(args: argparse.Namespace, device: torch.device) -> Run:
    """Checks and reads everything that can be wrong."""
    plan = make_plan(overlays(args, add_case_flags, check_picture_flags) if args.cases else [args])
    check_places([item.case for item in plan], args.output_dir)
    tasks = list({id(item.task): item.task for item in plan}.values())
    record = tasks[0].lora.record
    name = args.pretrained_model_name_or_path or record.get("base")
    resolution = record.get("resolution") if args.resolution is None else args.resolution
    if not name or resolution is None:
        raise InputError(
            f"DF412 {tasks[0].lora.path}: carries no record; give --pretrained_model_name_or_path and --resolution"
        )
    for task in tasks:
        for key, flag in BASE_FLAGS.items():
            theirs, ours = task.lora.record.get(key), record.get(key)
            if theirs != ours and getattr(args, flag) is None:
                raise InputError(
                    f"DF414 {task.lora.path}: was trained with {key} {theirs}, {tasks[0].lora.path} with {ours}; give "
                    f"--{flag}, or paint with each in a run of its own"
                )
        if args.max_deviation is not None and not task.known_appearance:
            raise InputError(
                f"DF417 {task.lora.path}: does not say how several references of '{task.settings['defect']}' look; "
                "train it anew, on two or more, or leave out --max_deviation"
            )
    revision = args.revision or (record.get("revision") if name == record.get("base") else None)
    base = read_base(name, revision, args.cache_dir)
    check_resolution(base, resolution)
    for lora in {task.lora.path: task.lora for task in tasks}.values():
        check_fits(lora, base)
    for prompt in {task.settings["prompt"] for task in tasks}:
        check_prompt(prompt, base, args.cache_dir)
    settings = {
        "base": base.name,
        "revision": base.revision,
        "variant": args.variant,
        "resolution": resolution,
        "scheduler": args.scheduler,
        "num_candidates": args.num_candidates,
        "batch_size": args.batch_size,
        "selection": args.selection if args.selection != "lpips" else f"lpips-{args.lpips_net}",
        "min_change": args.min_change,
        "max_deviation": args.max_deviation,
        "max_attempts": args.max_attempts,
        "keep_metadata": args.keep_metadata,
        "mixed_precision": args.mixed_precision or ("fp16" if device.type == "cuda" else "no"),
    }
    return Run(plan, base, make_scorer(args.selection, args.lpips_net, device), settings)


def begin(run: Run, folder: Path) -> list[str]:
    """Writes settings and plan, and puts in order what an earlier start left; returns the names of what is made."""
    clear_leftovers(folder, *(folder / kind for kind in KINDS))
    if (folder / "settings.json").exists():
        check_identity(json.loads((folder / "settings.json").read_text()), run.settings)
    lines = [item.line for item in run.plan]
    check_plan(lines, folder)
    write_json(folder / "settings.json", run.settings)
    ledger.write_lines(folder / PLAN, lines)
    for kind in KINDS:
        (folder / kind).mkdir(exist_ok=True)
    return [line["name"] for line in gather(folder)]


def gather(folder: Path) -> list[dict]:
    """The manifest's lines, those of pictures whose files are all there, in the order of the plan."""
    order = [line["name"] for line in ledger.read_lines(folder / PLAN)]
    return ledger.gather(
        folder, order, lambda line: all((folder / kind / f"{line['name']}.png").exists() for kind in KINDS)
    )


def paint_all(args: argparse.Namespace, run: Run, done: set[str], state: PartialState) -> dict[str, str]:
    """Paints this process's share of the plan; returns why for those items that cannot be.

    A group with an item to make is painted whole, so that no pixel depends on what was done before; where none of
    those to make has a place, not at all, and no weight is loaded for it.
    """
    groups = groups_of(run.plan, max(1, (args.batch_size or 1) // args.num_candidates))
    mine = [g for g in groups if {item.name for item in g} - done][state.process_index :: state.num_processes]
    problems: dict[str, str] = {}
    if not mine:
        return problems
    precision, scheduler, resolution = (run.settings[k] for k in ("mixed_precision", "scheduler", "resolution"))
    pipe, loaded, gates = None, None, Gates(args.min_change, args.max_deviation, args.max_attempts)
    bar = tqdm(total=sum(map(len, mine)), desc="Images", disable=not state.is_local_main_process)
    with ledger.appending(args.output_dir, state.process_index) as add:
        for group in mine:
            works = [Progress(item, resolution) for item in group]
            if any(not work.problem and work.item.name not in done for work in works):
                pipe = pipe or load_pipeline(
                    run.base, args.variant, args.cache_dir, precision, state.device, scheduler
                )
                lora = group[0].task.lora
                if loaded != lora.path:
                    pipe.unload_lora_weights()
                    load_lora(pipe, lora)
                    loaded = lora.path
                began = time.monotonic()
                generate(pipe, works, run.scorer, resolution, args.num_candidates, args.batch_size, gates)
                seconds = round((time.monotonic() - began) / len(group), 3)
            for work in works:
                if work.problem:
                    problems[work.item.name] = work.problem
                elif work.item.name not in done:
                    add(work.write(args.output_dir, args.keep_metadata) | {"seconds": seconds})
            bar.update(len(group))
    return problems


def main(args: argparse.Namespace) -> None:
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(on_cpu, timeout=datetime.timedelta(days=7))  # processes wait for the slowest
    run = prepare(args, state.device)
    with ExitStack() as held:
        done, problem = None, None
        if state.is_main_process:
            try:
                held.enter_context(sole_writer(args.output_dir))
                done = begin(run, args.output_dir)
            except InputError as error:
                problem = error
        [done] = broadcast_object_list([done])
        if done is None:
            raise problem or SystemExit(2)  # the main process tells why
        problems = gather_object([paint_all(args, run, set(done), state)])
        if state.is_main_process:
            finish(args.output_dir, {name: why for of_process in problems for name, why in of_process.items()})


def finish(folder: Path, problems: dict[str, str]) -> None:
    """Writes manifest and contact sheet; ends with exit status 1 if something could not be painted."""
    lines = gather(folder)
    if lines:
        ledger.write_table(folder / "manifest.parquet", lines)
        with replacing(folder / "summary.html") as temporary:
            write_page(temporary, ledger.read_lines(folder / PLAN), lines, problems.values())
        rows = [Image.open(folder / "contact" / f"{line['name']}.png") for line in lines[:SHEET_CASES]]
        save_picture(stacked(rows), folder / "contact_sheet.png")
    print(f"{len(lines)} images in {folder}: images/, masks/, {ledger.MANIFEST}, contact_sheet.png, summary.html")
    if problems:
        raise SystemExit("Not painted:\n" + "\n".join(problems.values()))


def load_pipeline(
    base: Base,
    variant: str | None,
    cache_dir: str | None,
    precision: str,
    device: torch.device,
    scheduler: str = "ddim",
) -> StableDiffusionInpaintPipeline:
    """The base pipeline with one of `SCHEDULERS`; no safety checker, which blackens what it takes for wounds."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    try:
        pipe = StableDiffusionInpaintPipeline.from_pretrained(
            base.name,
            revision=base.revision,
            variant=variant,
            cache_dir=cache_dir,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        ).to(device)
    except (OSError, ValueError) as error:
        raise InputError(f"DF182 {base.name}: its safetensors weights cannot be loaded: {error}") from error
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(scheduler) -> DDIMScheduler:
    """DDIM with the noise schedule of `scheduler`; latents have no fixed range, so nothing is clipped."""
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)


# Each makes a scheduler with the noise schedule of another.
SCHEDULERS = {
    "ddim": ddim,
    "dpmsolver++": lambda scheduler: DPMSolverMultistepScheduler.from_config(scheduler.config),
    "unipc": lambda scheduler: UniPCMultistepScheduler.from_config(scheduler.config),
}


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
