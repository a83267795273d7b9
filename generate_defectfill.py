"""Paint defects into good images with a DefectFill LoRA and keep the best of several candidates.

    python generate_defectfill.py --lora lora-hazelnut-hole --image good.png --mask mask.png --output_dir generated

Reads top to bottom: candidates, selection, compositing, one image, the command.

Shapes: N candidates, S side of the square the model works on, G = S // vae_scale_factor cells a side of the latent
grid, H x W the input's own size. Masks are 1 inside the defect.

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985, section 3.4.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import time
import urllib.error
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import lpips
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import structural_similarity
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from defectfill.base import Base, check_resolution, read_base
from defectfill.checkpoint import check_identity
from defectfill.files import clear_leftovers, replacing, sole_writer, write_json
from defectfill.lora_file import LoraFile, check_fits, load_lora, read_lora
from defectfill_dataset import (
    SHAPES,
    InputError,
    MaskSource,
    Placed,
    PlacedShapes,
    Zoom,
    binarise,
    cover,
    cut,
    derive_seed,
    exit_on_input_error,
    find_foreground,
    held_out_source,
    image_tensor,
    load_image,
    load_masks,
    masks_digest,
    procedural_shapes,
    random_source,
    reference_shapes,
    tensor_image,
    to_grid,
    zoom_boxes,
)
from defectfill_dataset.errors import did_you_mean
from defectfill_dataset.images import UNREADABLE, has_16_bits
from defectfill_dataset.layouts import image_files, pair_by_name


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


@torch.no_grad()
def paint(
    pipe: StableDiffusionInpaintPipeline,
    image: torch.Tensor,
    grid: torch.Tensor,
    prompt: str,
    seeds: Sequence[int],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
) -> torch.Tensor:
    """(N, 3, S, S) candidates in [0, 1], one a seed: each depends on its own seed alone, whatever the batch.

    Outside the mask each step's latent is replaced by the clean image's, diffused to the noise level of the next
    step (section 3.4); after the last step it is the clean image's own.

    Args:
        image: (3, S, S) in [-1, 1], defect-free.
        grid: (1, G, G), 1 where the defect goes.
        seeds: of the initial noise.
        batch_size: candidates per UNet call, all by default.
    """
    device, dtype = pipe.device, pipe.vae.dtype
    image, grid = image.to(device, dtype), grid.to(device, dtype)
    pixel_mask = cover(grid, pipe.vae_scale_factor)
    both = torch.stack([image, image * (1 - pixel_mask)])
    # The mode, not a sample: a sample would take its noise from one candidate's seed and hand it to all.
    clean, masked = (pipe.vae.encode(both).latent_dist.mode() * pipe.vae.config.scaling_factor).chunk(2)
    candidates = []
    for start in range(0, len(seeds), batch_size or len(seeds)):
        batch = seeds[start : start + (batch_size or len(seeds))]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in batch])
        noise = noise.to(device, dtype)

        def keep_background(pipe, step, timestep, tensors, noise=noise):
            following = pipe.scheduler.timesteps[step + 1 : step + 2]
            background = pipe.scheduler.add_noise(clean, noise, following) if len(following) else clean
            return {"latents": torch.where(grid > 0.5, tensors["latents"], background)}

        candidates.append(
            pipe(
                prompt,
                image=image[None] / 2 + 0.5,
                mask_image=pixel_mask[None],
                masked_image_latents=masked,
                latents=noise,
                height=image.shape[-2],
                width=image.shape[-1],
                num_images_per_prompt=len(batch),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                callback_on_step_end=keep_background,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(candidates)


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


# ---------------------------------------------------------------------------------------------------------------------
# Compositing


def composite(image: Image.Image, candidate: torch.Tensor, mask: np.ndarray) -> Image.Image:
    """The candidate, (3, S, S) in [0, 1], inside the (H, W) mask; every pixel outside is the input's own."""
    painted = tensor_image(candidate * 2 - 1).resize(image.size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.where(mask[..., None], np.asarray(painted), np.asarray(image)))


CELL = 160  # pixels a side of a contact sheet's pictures
SHEET_CASES = 24  # on the contact sheet


def contact_row(
    image: Image.Image, mask: np.ndarray, pictures: list[Image.Image], scores: list, chosen: int
) -> Image.Image:
    """One row of the contact sheet: good | mask | each candidate with its score, the chosen one outlined."""
    cells = [image, Image.fromarray(mask), *pictures]
    labels = ["good", "mask", *(f"{s:.4f}" if s is not None else "" for s in scores)]
    row = Image.new("RGB", (len(cells) * (CELL + 4) + 4, CELL + 24), "white")
    draw = ImageDraw.Draw(row)
    for i, (cell, label) in enumerate(zip(cells, labels)):
        left = 4 + i * (CELL + 4)
        row.paste(cell.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, 4))
        if i - 2 == chosen:
            draw.rectangle((left - 2, 2, left + CELL + 1, CELL + 5), outline="red", width=3)
            label += "  kept"
        draw.text((left, CELL + 7), label, fill="red" if i - 2 == chosen else "black", font=ImageFont.load_default(12))
    return row


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------------------------------
# One image

KINDS = ("images", "masks", "contact")  # folders of the output


@dataclasses.dataclass(frozen=True)
class Case:
    """One good image and the files given for it: its mask (None: from a source), its foreground, its zone.

    Everything random is drawn from the image's name and content, so that no two images share a number, in one run or
    in several.
    """

    image: Path
    mask: Path | None = None
    foreground: Path | None = None
    zone: Path | None = None

    @property
    def name(self) -> str:
        return self.image.stem

    @property
    def areas(self) -> dict[str, Path]:
        """What is given beside the image, by its flag."""
        files = {"mask": self.mask, "foreground": self.foreground, "zone": self.zone}
        return {flag: file for flag, file in files.items() if file}

    @functools.cached_property
    def digests(self) -> dict[str, str | None]:
        """sha256 of its files: what a finished image was made from."""
        files = {"good_image": self.image, "given_mask": None} | {f"given_{k}": f for k, f in self.areas.items()}
        return {f"{k}_sha256": hashlib.sha256(f.read_bytes()).hexdigest() if f else None for k, f in files.items()}

    def derive_seed(self, seed: int, *parts: int | str) -> int:
        return derive_seed(seed, self.name, self.digests["good_image_sha256"] or "", *parts)

    def load(self) -> tuple[Image.Image, dict[str, np.ndarray]]:
        """The image as RGB and its (H, W) bool areas, by their flags."""
        image = load_image(Image.open(self.image))
        return image, {flag: binarise(Image.open(file)) for flag, file in self.areas.items()}

    def draw(self, seed: int, source: MaskSource | None) -> tuple[Image.Image, Placed | None]:
        """The image and its mask, given or from `source`; None where that finds no place."""
        image, areas = self.load()
        if source is None:
            return image, Placed(areas["mask"], [])
        return image, source(image, self.derive_seed(seed, "mask"), areas.get("foreground"), areas.get("zone"))


def find_cases(
    image: Path, mask: Path | None = None, foreground: Path | None = None, zone: Path | None = None
) -> list[Case]:
    """The cases of one image or a folder of them, with their masks and areas: a file each, or folders paired by name.

    One foreground or zone file may also serve a folder of images.

    Raises:
        InputError: nothing there (DF160, DF161), or files that do not pair (DF142-DF144).
    """
    given = {"mask": mask, "foreground": foreground, "zone": zone}
    for flag, path in {"image": image, **given}.items():
        if path is not None and not path.exists():
            raise InputError(f"DF160 --{flag} {path}: no such file or folder")
    if mask is not None and image.is_dir() != mask.is_dir():
        raise InputError(f"DF161 --image {image}, --mask {mask}: give two files or two folders")
    if mask is not None and image.samefile(mask):
        raise InputError(f"DF161 --image {image}, --mask {mask}: are the same; give masks of their own")
    images = image_files(image) if image.is_dir() else [image]
    if not images:
        raise InputError(f"DF161 --image {image}: no images in it")
    stems: dict[str, list[str]] = {}
    for file in images:
        stems.setdefault(file.stem, []).append(file.name)
    twice = [f"DF144 {', '.join(names)}: one name twice; rename one" for names in stems.values() if len(names) > 1]
    if twice:
        raise InputError(*twice)
    files = {flag: pair_files(images, flag, path) for flag, path in given.items() if path}
    return [Case(file, **{flag: pairs[file] for flag, pairs in files.items()}) for file in images]


def pair_files(images: list[Path], flag: str, path: Path) -> dict[Path, Path]:
    """For each image the file at `path`, or the one of its name in that folder; only masks must all have an image."""
    if path.is_file():
        return dict.fromkeys(images, path)
    root = Path(os.path.commonpath([images[0].absolute(), path.absolute()]))
    pairs, problems = pair_by_name([f.absolute() for f in images], [f.absolute() for f in image_files(path)], root)
    problems = [problem for problem in problems if flag == "mask" or not problem.startswith("DF143")]
    if problems:
        raise InputError(*(f"{problem} (--{flag} {path})" for problem in problems))
    return {file: pairs[file.absolute()] for file in images}


def check_cases(cases: list[Case]) -> None:
    """Opens every file; raises InputError with all problems (DF103, DF120, DF140, DF145, DF146)."""
    problems = []
    for case in cases:
        try:
            deep = has_16_bits(Image.open(case.image))
            image, areas = case.load()
        except UNREADABLE as error:
            files = " or its ".join(["the image", *case.areas])
            problems.append(f"DF103 {case.image.name}: {files} cannot be read: {error}")
            continue
        if deep:
            problems.append(
                f"DF120 {case.image}: has 16 bits a channel, and the result would have 8 everywhere, not only inside "
                "the mask; convert it to 8 bits"
            )
        for flag, area in areas.items():
            file, size = case.areas[flag], area.shape[::-1]
            if image.size != size:
                sides = f"{image.width}x{image.height}, its {flag} {size[0]}x{size[1]}"
                problems.append(f"DF140 {case.image}: {sides}; they must match")
            elif not area.any():
                problems.append(f"DF145 {file}: the {flag} is empty; mark where the defect goes")
            elif area.all() and flag == "mask":
                problems.append(f"DF146 {file}: the mask covers the whole image; mark where the defect goes")
    if problems:
        raise InputError(*problems)


class Painted(NamedTuple):
    """One window with each candidate in it, their scores (NaN for a broken one), and which is kept."""

    pictures: list[Image.Image]
    scores: list[float]
    chosen: int


def best_of(
    pipe: StableDiffusionInpaintPipeline,
    scorer: Scorer | None,
    image: Image.Image,
    mask: np.ndarray,
    prompt: str,
    resolution: int,
    seeds: list[int],
    **sampling,
) -> Painted:
    """Paints a candidate a seed into a good image, (H, W), where the (H, W) mask says, and chooses.

    Raises:
        FloatingPointError: no candidate has a finite score.
    """
    grid = to_grid(mask, resolution // pipe.vae_scale_factor)
    normal = image_tensor(image, resolution)
    candidates = paint(pipe, normal, grid, prompt, seeds, **sampling)
    normal, inside = (normal / 2 + 0.5).to(candidates.device), to_grid(mask, resolution).to(candidates.device)
    pasted = torch.where(inside > 0.5, candidates, normal)  # what the composite will hold, at the model's size
    scores = scorer(pasted, normal, inside) if scorer else [0.0] * len(seeds)
    whole = candidates.isfinite().flatten(1).all(dim=1).tolist()  # half precision may overflow
    scores = [score if ok else math.nan for score, ok in zip(scores, whole)]
    return Painted([composite(image, candidate, mask) for candidate in candidates], scores, select(scores))


def generate(
    pipe: StableDiffusionInpaintPipeline,
    case: Case,
    source: MaskSource | None,
    scorer: Scorer | None,
    zoom: Zoom | None,
    output_dir: Path,
    resolution: int,
    num_candidates: int,
    seed: int,
    **sampling,
) -> dict | None:
    """Paints one case, writes its image, mask and contact row, and returns its line of the manifest.

    One window after the other, each on what the earlier ones left to paint, so that the tiles of a crack join.
    None, and nothing written, where its mask finds no place.
    """
    began = time.monotonic()
    image, placed = case.draw(seed, source)
    if placed is None:
        return None
    grey = Image.open(case.image).mode in ("1", "L")  # gives a grey output; equal channels convert exactly
    left, rows, windows = placed.mask.copy(), [], []
    for box in zoom_boxes(placed.mask, resolution, zoom):
        good, mask = image.crop(box), cut(left, box)
        first = len(windows) * num_candidates
        seeds = [case.derive_seed(seed, first + i) for i in range(num_candidates)]
        painted = best_of(pipe, scorer, good, mask, resolution=resolution, seeds=seeds, **sampling)
        shown = [s if scorer and math.isfinite(s) else None for s in painted.scores]
        pictures = [picture.convert("L") for picture in painted.pictures] if grey else painted.pictures
        rows.append(contact_row(good, mask, pictures, shown, painted.chosen))
        windows.append({"box": box, "candidate_seeds": seeds, "scores": shown, "chosen": painted.chosen})
        image.paste(painted.pictures[painted.chosen], box[:2])
        mask[:] = False
    files = {kind: f"{kind}/{case.name}.png" for kind in KINDS}
    save_picture(image.convert("L") if grey else image, output_dir / files["images"])
    save_picture(Image.fromarray(placed.mask).convert("L"), output_dir / files["masks"])
    save_picture(stacked(rows), output_dir / files["contact"])
    return {
        "name": case.name,
        "image": files["images"],
        "mask": files["masks"],
        "good_image": case.image.name,
        "given_mask": case.mask.name if case.mask else None,
        **case.digests,
        "mask_parts": [{"from": part.name, "top": part.top, "left": part.left} for part in placed.parts],
        "prompt": sampling["prompt"],
        "windows": windows,
        "seconds": round(time.monotonic() - began, 3),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command


def finished_lines(cases: list[Case], output_dir: Path) -> list[dict]:
    """The manifest's lines of images whose files are all there; a last line torn by a kill does not count.

    Raises:
        InputError: a damaged manifest (DF310), or an image made from another good image or mask (DF320).
    """
    manifest = output_dir / "manifest.jsonl"
    if not manifest.exists():
        return []
    lines, problems = [], []
    known = {case.name: case for case in cases}
    for number, text in enumerate(manifest.read_text().rpartition("\n")[0].splitlines(), 1):
        try:
            line = json.loads(text)
            name = line["name"]
            changed = name in known and known[name].digests != {k: line[k] for k in known[name].digests}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"DF310 {manifest}, line {number}: cannot be read ({error!r}); remove it") from error
        if changed:
            problems.append(f"DF320 {name}: was painted from another image or mask; choose another --output_dir")
        if all((output_dir / kind / f"{name}.png").exists() for kind in KINDS):
            lines.append(line)
    if problems:
        raise InputError(*problems)
    return lines


def check_places(cases: list[Case], output_dir: Path) -> None:
    """Raises InputError (DF192) if results would be written among the inputs, over them."""
    written = {(output_dir / kind).resolve() for kind in KINDS}
    for file in [f for case in cases for f in (case.image, *case.areas.values())]:
        if file.resolve().parent in written:
            raise InputError(f"DF192 --output_dir {output_dir}: would overwrite {file}; choose another folder")


def choose_prompt(lora: LoraFile, defect: str | None, prompt: str | None) -> tuple[str, str | None]:
    """The prompt to paint with and its defect type: given, or the object prompt of the LoRA's record."""
    prompts = lora.record.get("prompts", {})
    if prompt and (defect is None or defect in prompts or not prompts):
        return prompt, defect
    if defect is None and len(prompts) == 1:
        defect = next(iter(prompts))
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


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that decide which images are taken and which masks they get."""
    add = parser.add_argument_group("images and masks").add_argument
    add("--image", required=True, type=Path, metavar="PATH", help="Good image, or a folder of them.")
    add("--defect", help="Defect type to paint, where the LoRA knows several.")
    add(
        "--mask_source",
        choices=["given", "random", "references", "procedural", "held_out"],
        default="given",
        help="given: --mask. random: a seeded irregular blob for each image. references: masks of the dataset's "
        "reference images, transformed and placed on the part. procedural: drawn shapes placed on the part. held_out: "
        "the dataset's held-out masks as they are (the paper's protocol, which leaks them). Default: %(default)s.",
    )
    add("--mask", type=Path, metavar="PATH", help="Mask of given, white inside, or a folder of the same names.")
    add("--reference_data", metavar="DIR", help="Dataset folder of references and held_out.")
    add("--object", help="Object in it, where there are several.")
    add("--split", default="auto", metavar="RULE|FILE", help="As in training. Default: %(default)s.")
    rotation_help = "Of references, to either side. Default: %(default)s."
    add("--max_rotation", type=float, default=180.0, metavar="DEG", help=rotation_help)
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="Of procedural. Default: all.")
    add("--seed", type=int, default=0, help="Of masks and candidates. Default: %(default)s.")
    add = parser.add_argument_group("places, of references and procedural").add_argument
    add(
        "--foreground",
        default="auto",
        metavar="auto|none|PATH",
        help="Where the part is. auto: what stands out from the rim's colour; a surface that fills the picture is all "
        "part. none: everywhere. PATH: a mask, or a folder of masks of the images' names. Default: %(default)s.",
    )
    add("--zone", type=Path, metavar="PATH", help="Mask of where defects may go, or a folder of them.")
    coverage_help = "Least share of a defect's pixels on the part and in the zone. Default: %(default)s."
    add("--coverage", type=float, default=0.99, metavar="X", help=coverage_help)
    add("--masks_per_image", type=int, default=1, metavar="N", help="Defects in an image. Default: %(default)s.")


def check_input_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message where flags of images and masks contradict each other."""
    source = args.mask_source
    if (source == "given") != (args.mask is not None):
        parser.error("give --mask, or another --mask_source without it")
    if (source in ("references", "held_out")) != (args.reference_data is not None):
        parser.error("give --reference_data with --mask_source references or held_out, and only there")
    users = {"max_rotation": ["references"], "shapes": ["procedural"]}
    users |= dict.fromkeys(("object", "split"), ["references", "held_out"])
    users |= dict.fromkeys(("foreground", "zone", "coverage", "masks_per_image"), ["references", "procedural"])
    for flag, sources in users.items():
        if source not in sources and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag}: only with --mask_source {' or '.join(sources)}")
    if not 0 < args.coverage <= 1:
        parser.error(f"--coverage {args.coverage}: must be above 0 and at most 1")
    if not 0 <= args.max_rotation <= 180:
        parser.error(f"--max_rotation {args.max_rotation}: must be from 0 to 180")
    if args.masks_per_image < 1:
        parser.error(f"--masks_per_image {args.masks_per_image}: must be at least 1")


def read_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the flags, every file opened and checked."""
    foreground = Path(args.foreground) if args.foreground not in ("auto", "none") else None
    cases = find_cases(args.image, args.mask, foreground, args.zone)
    check_cases(cases)
    return cases


def read_source(
    args: argparse.Namespace, defect: str | None, cache_dir: str | None = None
) -> tuple[MaskSource | None, dict]:
    """The mask source of the flags, None for given masks, and the settings that decide its masks."""
    if args.mask_source in ("given", "random"):
        return (random_source if args.mask_source == "random" else None), {}
    if args.mask_source == "procedural":
        shapes, settings = procedural_shapes(args.shapes), {"shapes": args.shapes}
    else:
        held_out = args.mask_source == "held_out"
        masks = load_masks(args.reference_data, args.object, args.split, defect, held_out, cache_dir)
        settings = {"reference_masks_sha256": masks_digest(masks)}
        if held_out:
            return held_out_source(masks), settings
        shapes, settings["max_rotation"] = reference_shapes(masks, args.max_rotation), args.max_rotation
    foreground = args.foreground if args.foreground in ("auto", "none") else "given"
    settings |= {
        "foreground": foreground,
        "zone": args.zone is not None,
        "coverage": args.coverage,
        "masks_per_image": args.masks_per_image,
    }
    finder = find_foreground if foreground == "auto" else None
    return PlacedShapes(shapes, finder, args.coverage, args.masks_per_image), settings


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model")
    group.add_argument("--lora", required=True, metavar="PATH|ID", help="LoRA folder, file or Hub id.")
    group.add_argument(
        "--pretrained_model_name_or_path",
        metavar="PATH|ID",
        help="Base inpainting model. Default: the LoRA's own base.",
    )
    group.add_argument("--revision", help="Revision of the base on the Hub. Default: the one the LoRA was trained on.")
    group.add_argument("--variant", help="Variant of the base's weight files, such as fp16.")
    group.add_argument("--cache_dir", help="Where downloaded models are kept.")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="Precision of the whole model. Default: fp16 on a GPU, no on a CPU.",
    )
    group.add_argument("--prompt", help="Prompt in place of the LoRA's own.")
    add_input_flags(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--num_candidates", type=int, default=8, metavar="N", help="Candidates an image. Default: %(default)s."
    )
    group.add_argument("--batch_size", type=int, metavar="N", help="Candidates in one UNet call. Default: all.")
    group.add_argument(
        "--num_inference_steps", type=int, default=50, metavar="N", help="DDIM steps. Default: %(default)s."
    )
    group.add_argument("--guidance_scale", type=float, default=7.5, metavar="X", help="Default: %(default)s.")
    group.add_argument(
        "--resolution", type=int, metavar="PX", help="Side of the model's square. Default: the LoRA's own."
    )
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
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--selection",
        choices=["lpips", "ssim", "rmse", "none"],
        default="lpips",
        help="Measure of the distance to the normal image inside the mask; the most distant candidate is kept; with "
        "none the first. Default: %(default)s (the paper's).",
    )
    group.add_argument(
        "--lpips_net", choices=list(LPIPS_FILES), default="alex", help="LPIPS backbone. Default: %(default)s."
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, type=Path, metavar="DIR")
    args = parser.parse_args(input_args)
    for flag in ("num_candidates", "num_inference_steps", "batch_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.zoom_context is not None and not 1 <= args.zoom_context < math.inf:
        parser.error(f"--zoom_context {args.zoom_context}: must be a finite number of at least 1")
    if args.zoom_min_area is not None and not 0 <= args.zoom_min_area < 1:
        parser.error(f"--zoom_min_area {args.zoom_min_area}: must be at least 0 and below 1")
    if not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale {args.guidance_scale}: must be a finite number")
    check_input_flags(parser, args)
    return args


class Run(NamedTuple):
    """What to paint and with what, checked, before any weight is loaded."""

    cases: list[Case]
    source: MaskSource | None
    lora: LoraFile
    base: Base
    scorer: Scorer | None
    zoom: Zoom | None
    device: torch.device
    settings: dict  # what decides a pixel besides the cases; it must be the same when the run goes on


def prepare(args: argparse.Namespace) -> Run:
    """Checks and reads everything that can be wrong."""
    cases = read_cases(args)
    check_places(cases, args.output_dir)
    lora = read_lora(args.lora)
    prompt, defect = choose_prompt(lora, args.defect, args.prompt)
    source, mask_settings = read_source(args, defect, args.cache_dir)
    zoom = read_zoom(args.zoom, args.zoom_context, args.zoom_min_area, lora)
    name = args.pretrained_model_name_or_path or lora.record.get("base")
    resolution = lora.record.get("resolution") if args.resolution is None else args.resolution
    if not name or resolution is None:
        raise InputError(
            f"DF412 {lora.path}: carries no record; give --pretrained_model_name_or_path and --resolution"
        )
    revision = args.revision or (lora.record.get("revision") if name == lora.record.get("base") else None)
    base = read_base(name, revision, args.cache_dir)
    check_resolution(base, resolution)
    check_fits(lora, base)
    check_prompt(prompt, base, args.cache_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "base": base.name,
        "revision": base.revision,
        "variant": args.variant,
        "lora_sha256": hashlib.sha256(lora.path.read_bytes()).hexdigest(),
        "defect": defect,
        "prompt": prompt,
        "resolution": resolution,
        "zoom": zoom and zoom._asdict(),
        "num_candidates": args.num_candidates,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
        "mask_source": args.mask_source,
        **mask_settings,
        "selection": args.selection if args.selection != "lpips" else f"lpips-{args.lpips_net}",
        "mixed_precision": args.mixed_precision or ("fp16" if device.type == "cuda" else "no"),
    }
    scorer = make_scorer(args.selection, args.lpips_net, device)
    return Run(cases, source, lora, base, scorer, zoom, device, settings)


def paint_all(args: argparse.Namespace, run: Run, done: set[str]) -> dict[str, str]:
    """Paints every case that is not done, a line of the manifest each; returns why for those that cannot be."""
    pipe = load_pipeline(run.base, args.variant, args.cache_dir, run.settings["mixed_precision"], run.device)
    load_lora(pipe, run.lora)
    names = ("prompt", "resolution", "num_candidates", "seed", "num_inference_steps", "guidance_scale")
    settings = {name: run.settings[name] for name in names} | {"batch_size": args.batch_size}
    todo = [case for case in run.cases if case.name not in done]
    skipped = {}
    with (args.output_dir / "manifest.jsonl").open("a") as lines:
        for case in tqdm(todo, desc="Images", initial=len(done), total=len(run.cases)):
            try:
                line = generate(pipe, case, run.source, run.scorer, run.zoom, args.output_dir, **settings)
            except FloatingPointError as error:
                skipped[case.name] = f"{case.image.name}: {error}"
                continue
            if line is None:
                skipped[case.name] = f"DF340 {case.image.name}: no place for its mask"
                continue
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    return skipped


def main(args: argparse.Namespace) -> None:
    run = prepare(args)
    with sole_writer(args.output_dir):
        clear_leftovers(args.output_dir, *(args.output_dir / kind for kind in KINDS))
        settings_file = args.output_dir / "settings.json"
        if settings_file.exists():
            check_identity(json.loads(settings_file.read_text()), run.settings)
        write_json(settings_file, run.settings)
        for folder in KINDS:
            (args.output_dir / folder).mkdir(exist_ok=True)
        lines = finished_lines(run.cases, args.output_dir)
        with replacing(args.output_dir / "manifest.jsonl") as manifest:
            manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = {line["name"] for line in lines}
        skipped = paint_all(args, run, done) if {case.name for case in run.cases} - done else {}
        painted = [case.name for case in run.cases if case.name not in skipped]
        if painted:
            rows = [Image.open(args.output_dir / "contact" / f"{name}.png") for name in painted[:SHEET_CASES]]
            save_picture(stacked(rows), args.output_dir / "contact_sheet.png")
    print(f"{len(painted)} images in {args.output_dir}: images/, masks/, manifest.jsonl, contact_sheet.png")
    if skipped:
        raise SystemExit("Not painted:\n" + "\n".join(skipped.values()))


def load_pipeline(
    base: Base, variant: str | None, cache_dir: str | None, precision: str, device: torch.device
) -> StableDiffusionInpaintPipeline:
    """The base pipeline with DDIM, without the safety checker (it blackens what it takes for wounds)."""
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
    pipe.scheduler = ddim(pipe.scheduler)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(scheduler) -> DDIMScheduler:
    """DDIM with the noise schedule of `scheduler`; latents have no fixed range, so nothing is clipped."""
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)


if __name__ == "__main__":
    exit_on_input_error(lambda: main(parse_args()))
