"""Measure what each technique of generate_defectfill.py gains: the same images generated in several ways, in rounds.

    python scripts/benchmark_generation.py --base scripts/tiny_base --output speed.md
    python scripts/benchmark_generation.py --sd2_size --resolution 512 --num_candidates 8 --output speed.md

A picture is a pair of good image and mask, its candidates sampled, decoded and scored by RMSE (LPIPS needs downloaded
weights). The first way is a call of the stock pipeline for each candidate; besides speed it differs from the others in
two things: it takes a sample of the masked image's latents, not their mode, and does not replace the background at
every step. The second to the fourth make the same candidates, up to rounding; the last two make others, with fewer
UNet rows. On a CPU the clock is the process's own time, so that other programs count less.

Shapes: P pairs, N candidates of each, S side of the pictures, G of the latent grid.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import defectfill.quiet  # noqa: F401

import torch
from diffusers import StableDiffusionInpaintPipeline

from defectfill.base_model import read_base
from defectfill.random_base import random_sd2_pipeline
from defectfill.runs.files import atomic_write
from defectfill.sampling import SCHEDULERS, inpaint, load_pipeline
from defectfill.selection import rmse_score
from defectfill_dataset import derive_seed, pool_mask, upsample_mask
from defectfill_dataset.commands import exit_on_input_error
from defectfill_scripts.train_segmenter import drawn_pairs


PROMPT = "A nut with sks"


class Pairs(NamedTuple):
    images: torch.Tensor  # (P, 3, S, S) in [-1, 1]
    grids: torch.Tensor  # (P, 1, G, G), 1 where the defect goes
    seeds: list[list[int]]  # (P, N)


class Variant(NamedTuple):
    steps: int
    batch_size: int | None = None  # None: each candidate by a call of the stock pipeline
    together: int = 1  # pairs in a batch
    scheduler: str = "ddim"
    interval: tuple[float, float] = (0, 1)  # guided steps


def make_variants(steps: int, fast_steps: int, candidates: int, batch_size: int) -> dict[str, Variant]:
    """The ways by their names, each with what the one before it has."""
    together = batch_size // candidates
    return {
        "stock pipeline, a call for each candidate": Variant(steps),
        "image, mask and prompt encoded once a pair": Variant(steps, 1),
        "candidates of a pair in one batch": Variant(steps, candidates),
        f"candidates of {together} pairs in one batch": Variant(steps, batch_size, together),
        f"UniPC, {fast_steps} steps": Variant(fast_steps, batch_size, together, "unipc"),
        "guidance in the first half of the steps": Variant(fast_steps, batch_size, together, "unipc", (0, 0.5)),
    }


def stock(pipe: StableDiffusionInpaintPipeline, pairs: Pairs, steps: int) -> torch.Tensor:
    """(P, N, 3, S, S) candidates in [0, 1], everything encoded for each of them anew."""
    candidates = []
    for image, grid, seeds in zip(pairs.images / 2 + 0.5, pairs.grids, pairs.seeds):
        given = {
            "image": image[None],
            "mask_image": upsample_mask(grid, pipe.vae_scale_factor)[None],
            "output_type": "pt",
        }
        size = {"height": image.shape[-2], "width": image.shape[-1], "num_inference_steps": steps}
        for seed in seeds:
            noise = torch.Generator().manual_seed(seed)
            candidates.append(pipe(PROMPT, guidance_scale=7.5, generator=noise, **given, **size).images.float())
    return torch.cat(candidates).unflatten(0, (len(pairs.seeds), -1))


def inpaint_pairs(pipe: StableDiffusionInpaintPipeline, pairs: Pairs, variant: Variant) -> torch.Tensor:
    """(P, N, 3, S, S) candidates in [0, 1], sampled in this way with guidance 7.5."""
    if variant.batch_size is None:
        return stock(pipe, pairs, variant.steps)
    candidates = []
    for i in range(0, len(pairs.seeds), variant.together):
        images, grids, seeds = (of_all[i : i + variant.together] for of_all in pairs)
        candidates.append(
            inpaint(pipe, images, grids, PROMPT, seeds, variant.steps, 7.5, variant.batch_size, variant.interval)
        )
    return torch.cat(candidates)


def score(candidates: torch.Tensor, pairs: Pairs, at_once: int) -> list[list[float]]:
    """(P, N) scores, of so many candidates of a pair at once."""
    masks = upsample_mask(pairs.grids, candidates.shape[-1] // pairs.grids.shape[-1])
    normals = pairs.images / 2 + 0.5
    return [
        [x for some in of_pair.split(at_once) for x in rmse_score(some, normal, mask)]
        for of_pair, normal, mask in zip(candidates, normals, masks)
    ]


def encode_images(pipe: StableDiffusionInpaintPipeline, pairs: Pairs) -> None:
    """Does of the first way's work only the encoding of images and masks."""
    for image, grid, seeds in zip(pairs.images, pairs.grids, pairs.seeds):
        for _ in seeds:
            masked = image * (1 - upsample_mask(grid, pipe.vae_scale_factor))
            pipe.vae.encode(masked[None].to(pipe.device, pipe.vae.dtype)).latent_dist.sample()


def seconds_of(device: torch.device, work: Callable, *given) -> float:
    """Of `work(*given)`: on CUDA until the device is done, on a CPU the process's own time."""

    def now() -> float:
        if device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    work(*given)
    return now() - began


def load(base: str | None, device: torch.device) -> StableDiffusionInpaintPipeline:
    """The pipeline to measure, in half precision on CUDA."""
    precision, dtype = ("fp16", torch.float16) if device.type == "cuda" else ("no", torch.float32)
    if base:
        return load_pipeline(read_base(base), None, None, precision, device)
    pipe = random_sd2_pipeline(device, dtype)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def measure(args: argparse.Namespace, pipe: StableDiffusionInpaintPipeline) -> str:
    """Markdown: a row a way, then what encoding is worth."""
    images, _ = drawn_pairs([("nut", None)], args.images, args.resolution, seed=1)
    _, masks = drawn_pairs([("nut", "hole")], args.images, args.resolution, seed=2)
    grids = torch.stack([pool_mask(mask[0].numpy() > 0.5, args.resolution // pipe.vae_scale_factor) for mask in masks])
    seeds = [[derive_seed(0, i, k) for k in range(args.num_candidates)] for i in range(args.images)]
    pairs, schedule = Pairs(images.to(pipe.device), grids.to(pipe.device), seeds), pipe.scheduler
    variants = make_variants(args.num_inference_steps, args.fast_steps, args.num_candidates, args.batch_size)
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    def run(variant: Variant) -> None:
        pipe.scheduler = SCHEDULERS[variant.scheduler](schedule)
        rows.clear()
        score(inpaint_pairs(pipe, pairs, variant), pairs, min(variant.batch_size or 1, args.num_candidates))

    def encode_prompts() -> None:
        for _ in range(args.images * args.num_candidates):
            pipe.encode_prompt(PROMPT, pipe.device, 1, True)

    times: dict[str, list[float]] = {name: [] for name in (*variants, "prompts", "images")}
    counts = {}
    for variant in variants.values():
        run(variant._replace(steps=2))  # kernels are chosen and memory is taken before the clock runs
    for _ in range(args.rounds):
        for name, variant in variants.items():
            times[name].append(seconds_of(pipe.device, run, variant))
            counts[name] = sum(rows) / (args.images * args.num_candidates)
        times["prompts"].append(seconds_of(pipe.device, encode_prompts))
        times["images"].append(seconds_of(pipe.device, encode_images, pipe, pairs))

    first = times[next(iter(variants))]
    text = ["| | UNet rows a candidate | pictures a second | times as fast as the first |", "|---|---|---|---|"]
    for name in variants:
        ratios = [a / b for a, b in zip(first, times[name])]
        speed = args.images / statistics.median(times[name])
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        text.append(f"| {name} | {counts[name]:.0f} | {speed:.3g} | {ratio} |")
    shares = {k: statistics.median(a / b for a, b in zip(times[k], first)) for k in ("prompts", "images")}
    note = (
        f"{args.images} pictures of {args.num_candidates} candidates, {args.resolution} px, {args.rounds} rounds: "
        f"median, and range of the ratio. Of the first way's time {shares['prompts']:.2%} is the encoding of prompts, "
        f"{shares['images']:.2%} that of images and masks."
    )
    return "\n".join([*text, "", note, ""])


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--base", metavar="DIR", help="Inpainting model.")
    model.add_argument("--sd2_size", action="store_true", help="Random weights in the sizes of Stable Diffusion 2.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.md")
    for flag, default, words in (
        ("resolution", 128, "Side of the model's square, in px."),
        ("images", 4, "Images to generate."),
        ("num_candidates", 4, "Of each picture."),
        ("batch_size", 16, "Candidates in one UNet call where those of several images are sampled together."),
        ("rounds", 3, "How often each way is measured."),
        ("num_inference_steps", 50, "DDIM steps."),
        ("fast_steps", 20, "UniPC steps."),
    ):
        add(f"--{flag}", type=int, default=default, metavar="N", help=f"{words} Default: %(default)s.")
    args = parser.parse_args(input_args)
    if args.batch_size < args.num_candidates:
        parser.error(f"--batch_size {args.batch_size}: must be at least --num_candidates {args.num_candidates}")
    return args


def main(args: argparse.Namespace) -> None:
    text = measure(args, load(args.base, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    with atomic_write(args.output) as temporary:
        temporary.write_text(text)
    print(text)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
