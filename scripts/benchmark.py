"""Measure how much each technique speeds up training and generation: the same work, done by several variants in turn.

    python scripts/benchmark.py train --base scripts/tiny_base --output_dir speed
    python scripts/benchmark.py train --sd2_size --resolution 512 --train_batch_size 1 --output_dir speed
    python scripts/benchmark.py generate --sd2_size --resolution 512 --num_candidates 8 --output_dir speed
    python scripts/benchmark.py data --resolution 512 --output_dir speed
    python scripts/benchmark.py growth --base scripts/tiny_base --output_dir speed

`train`: one optimizer step. The first variant costs what the public implementations' step costs (four passes of VAE
and UNet in turn, two of them only to be logged), the second follows the paper to the letter, the others are
train_defectfill.py's own step, with one technique more or less. All have the same losses.

`generate`: an image is a pair of good image and mask, its candidates sampled, decoded and scored by RMSE (LPIPS needs
downloaded weights). The baseline calls the stock pipeline for each candidate; it also differs from the others in two
ways that are unrelated to speed: it samples the masked image's latents instead of taking their mode, and does not
replace the background at every step. The second to the fourth make the same candidates, up to rounding; the last two
make others, with fewer UNet evaluations.

`data`: what the CPU does beside the model. Both commands run on images of each size, without zoom, and what needs no
model is timed: in training a sample, with more or fewer processes; in generation image and mask, scores, files.

`growth`: how the seconds grow with resolution, batch, candidates, references and generated images.

Each writes a table (.md), every measurement (.csv), a plot (.png) and environment.json. On a CPU, time is the
process's own CPU time, so that other programs count less.

Shapes: B samples, P pairs, N candidates of each, S side of the images, G of the latent grid.
"""

import argparse
import contextlib
import csv
import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import defectfill.quiet  # noqa: F401

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import generate_defectfill as generation
import train_defectfill as training
from defectfill.base_model import read_base
from defectfill.drawn.pairs import drawn_pairs, latent_masks
from defectfill.drawn.parts import enlarge, write_parts
from defectfill.drawn.small_base import Sizes, build_pipeline
from defectfill.latents import ImageLatents, encode_images
from defectfill.lora import LORA_TARGETS, add_lora, lora_parameters
from defectfill.markdown import markdown_table
from defectfill.random_base import random_sd2_pipeline
from defectfill.runs.files import atomic_write, is_record, refuse_foreign, write_json
from defectfill.runs.record import versions
from defectfill.runs.speed import peak_memory
from defectfill.sampling import SCHEDULERS, compile_unet, inpaint, load_pipeline
from defectfill.selection import rmse_score
from defectfill_dataset import (
    InputError,
    Problem,
    TokenizedPrompts,
    TrainingSamples,
    boxes_mask,
    build_prompts,
    derive_seed,
    pool_mask,
    random_boxes,
    sampling_schedule,
    tokenize_prompts,
    upsample_mask,
)
from defectfill_dataset.commands import Parser, exit_on_input_error, say


# ---------------------------------------------------------------------------------------------------------------------
# Clocks and results


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


def load(base: str | None, device: torch.device, precision: str) -> StableDiffusionInpaintPipeline:
    """The pipeline to measure, all of its weights in this precision."""
    if base:
        return load_pipeline(read_base(base), None, precision, device)
    pipe = random_sd2_pipeline(device, {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[precision])
    pipe.vae.enable_slicing()
    return pipe


def speed_ups(lines: list[dict]) -> dict[str, tuple[float, list[float]]]:
    """By variant: the median of its seconds, and how much faster than the first variant it was in each round."""
    seconds: dict[str, list[float]] = {}
    for line in lines:
        seconds.setdefault(line["variant"], []).append(line["seconds"])
    first = next(iter(seconds.values()))
    return {name: (statistics.median(own), [a / b for a, b in zip(first, own)]) for name, own in seconds.items()}


ENVIRONMENT = "environment.json"


def in_words(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def write_results(
    args: argparse.Namespace,
    lines: list[dict],
    head: list[str],
    rows: list[list[str]],
    note: str,
    draw: Callable[[Figure, list[dict]], None],
) -> None:
    """Writes and prints the table; every measurement, a plot of them, and the environment beside it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    flags = {k: str(v) for k, v in vars(args).items()}
    write_json(  # first: it tells that the others are ours
        args.output_dir / ENVIRONMENT,
        versions() | {"device": device, "threads": torch.get_num_threads()} | flags,
    )
    text = markdown_table([head, *rows]) + f"\n{note}\n"
    with atomic_write(args.output_dir / f"{args.what}.md") as temporary:
        temporary.write_text(text)
    with atomic_write(args.output_dir / f"{args.what}.csv") as temporary, temporary.open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(lines[0]))
        table.writeheader(), table.writerows(lines)
    with atomic_write(args.output_dir / f"{args.what}.png") as temporary:
        figure = Figure(figsize=(8, 5), layout="constrained")
        draw(figure, lines)
        figure.savefig(temporary, dpi=120)
    say(*text.splitlines())


def draw_speed_ups(figure: Figure, lines: list[dict]) -> None:
    axes = figure.subplots()
    for name, (_, ratios) in reversed(speed_ups(lines).items()):
        middle = statistics.median(ratios)
        spread = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(name, middle, xerr=spread, color="tab:blue", ecolor="black")
    axes.set_xlabel(f"speed-up over: {lines[0]['variant']}")


def draw_growth(figure: Figure, lines: list[dict]) -> None:
    """Seconds over the number, a plot for each kind."""
    kinds = list(dict.fromkeys(line["variant"] for line in lines))
    for kind, axes in zip(kinds, figure.subplots(2, -(-len(kinds) // 2), squeeze=False).flat):
        numbers, seconds = zip(*((line["number"], line["seconds"]) for line in lines if line["variant"] == kind))
        axes.plot(numbers, seconds, "o", markersize=4)
        axes.set_xticks(sorted({*numbers}))
        axes.set_ylim(bottom=0)
        axes.set_title(kind, fontsize=9), axes.set_ylabel("s", fontsize=9)


# ---------------------------------------------------------------------------------------------------------------------
# A training step


class Step(NamedTuple):
    """How a step does its work; the defaults are those of train_defectfill.py with `--cache_latents`."""

    cached: bool = True  # the latents are known
    encodes_together: bool = True  # all images in one call of the VAE
    passes_together: bool = True  # defect and object pass in one call of the UNet
    prompts_once: bool = True  # each distinct prompt is encoded once, not for every sample
    records: bool = True  # the attention map, for L_attn
    logged_passes: int = 0  # further passes of VAE and UNet, which nothing learns from
    checkpointing: bool = False
    channels_last: bool = False
    compiled: bool = False


STEPS = {
    "cost of the public code": Step(False, False, False, False, logged_passes=2),
    "the paper to the letter": Step(False, False, False, False),
    "ours, latents not cached": Step(cached=False),
    "ours": Step(),
    "two calls of the UNet": Step(passes_together=False),
    "a prompt for each sample": Step(prompts_once=False),
    "no attention map": Step(records=False),
    "gradient checkpointing": Step(checkpointing=True),
    "channels last": Step(channels_last=True),
}
COMPILED = {"compiled blocks": Step(compiled=True)}


class Apart(torch.nn.Module):
    """The UNet, called for each pass in turn, and once more for passes that nothing learns from."""

    def __init__(self, unet: torch.nn.Module, store: training.AttentionStore, logged_passes: int):
        super().__init__()
        self.unet, self.store, self.logged_passes = unet, store, logged_passes
        self.logged: list[torch.Tensor] = []  # with their graphs

    def forward(self, x, timesteps, encoder_hidden_states) -> SimpleNamespace:
        passes = list(zip(*(given.chunk(2) for given in (x, timesteps, encoder_hidden_states))))
        n, recorded, weights = len(passes[0][0]), self.store.rows, self.store.phrase_weights
        found, maps = [], {}
        for number, given in enumerate(passes):
            self.store.stop()
            if recorded.start == number * n:
                self.store.record(slice(0, n), weights)
            found.append(self.unet(*given).sample)
            maps |= self.store.pop()
        self.store.stop()
        self.logged = [self.unet(*given).sample for given in passes[: self.logged_passes]]
        self.store.maps = maps
        return SimpleNamespace(sample=torch.cat(found))


class NoMaps(training.AttentionStore):
    """In the step's store's place: the layers record nothing, and the map is 0."""

    def pop(self) -> dict[str, torch.Tensor]:
        rows, weights = self.rows, self.phrase_weights
        return {"": torch.zeros(rows.stop - rows.start, 1, device=weights.device)} if weights is not None else {}


def encode_apart(vae: AutoencoderKL, batch: dict, logged_passes: int) -> ImageLatents:
    """The latents of a batch, a call of the VAE for each image and mask, and more whose results are not used."""
    pixels = batch["pixel_values"]
    factor = pixels.shape[-1] // batch["mask"].shape[-1]

    def encode(images: torch.Tensor) -> DiagonalGaussianDistribution:
        return vae.encode(images.to(vae.dtype)).latent_dist

    whole = encode(pixels)
    for _ in range(logged_passes // 2):  # the public code encodes one more image for its two passes
        encode(pixels)
    masked = [encode(pixels * (1 - upsample_mask(batch[name], factor))) for name in ("mask", "random_mask")]
    return ImageLatents(whole.mean.float(), whole.std.float(), tuple(latents.mean.float() for latents in masked))


@dataclasses.dataclass
class TrainingBench:
    """Models with LoRA, an optimizer, and a batch, with its latents, that every step takes."""

    models: training.Models
    batch: dict
    latents: ImageLatents
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype

    def arrange(self, step: Step) -> None:
        """What is set up before the clock runs."""
        unet = self.models.unet
        (unet.enable_gradient_checkpointing if step.checkpointing else unet.disable_gradient_checkpointing)()
        unet.to(memory_format=torch.channels_last if step.channels_last else torch.contiguous_format)
        torch.compiler.set_stance("default" if step.compiled else "force_eager")

    def run(self, step: Step) -> torch.Tensor:
        """A step of the optimizer; returns its loss."""
        models, batch, store = self.models, dict(self.batch), self.models.store
        if step.cached:
            batch["latents"] = self.latents
        elif not step.encodes_together:
            with torch.no_grad():
                batch["latents"] = encode_apart(models.vae, batch, step.logged_passes)
        if not step.prompts_once:
            models, batch = prompt_for_each_sample(models, batch)
        if not step.records:
            store.stop()
            models = models._replace(store=NoMaps())
        if not step.passes_together:
            models = models._replace(unet=Apart(models.unet, store, step.logged_passes))
        sample = training.sample_noise(models, batch)
        with torch.autocast(batch["mask"].device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = training.training_losses(models, batch, sample, training.LossOptions())["loss"]
        loss.backward()
        store.pop()  # what gradient checkpointing recorded again
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def prompt_for_each_sample(models: training.Models, batch: dict) -> tuple[training.Models, dict]:
    """The same, with a row of tokens for each sample and pass, as if all prompts were distinct."""
    rows = torch.cat([batch["defect_prompt"], batch["object_prompt"]])
    tokens = TokenizedPrompts(models.tokens.input_ids[rows], models.tokens.phrase_weights[rows], {})
    defect, object_ = torch.arange(len(rows)).chunk(2)
    return models._replace(tokens=tokens), batch | {"defect_prompt": defect, "object_prompt": object_}


def make_training_bench(args: argparse.Namespace, device: torch.device) -> TrainingBench:
    """The base, or random weights, with the LoRA of the flags, on pairs of nut and hole."""
    dtype = {"bf16": torch.bfloat16, "no": torch.float32}[args.mixed_precision]
    pipe = load(args.base, device, args.mixed_precision)
    prompts = build_prompts(["hole"], "nut", "sks")
    tokens = tokenize_prompts(pipe.tokenizer, prompts.values())
    add_lora(pipe.unet, pipe.text_encoder, args.rank, args.rank, 0.0, args.lora_targets)
    pipe.vae.requires_grad_(False)
    store = training.record_attention(pipe.unet)
    parameters = lora_parameters(pipe.unet, pipe.text_encoder).values()
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=device.type == "cuda")
    size, n = args.resolution, args.train_batch_size
    images, masks = drawn_pairs([("nut", "hole")], n, size, seed=1)
    grid = size // pipe.vae_scale_factor
    mask = latent_masks(masks, grid)
    boxes = np.random.default_rng(0)
    random_mask = torch.stack([pool_mask(boxes_mask(random_boxes(boxes), grid), grid) for _ in range(n)])
    batch = {"pixel_values": images, "mask": mask, "random_mask": random_mask}
    numbers = {"defect_prompt": torch.zeros(n), "object_prompt": torch.ones(n), "seed": torch.arange(n)}
    batch = {k: v.to(device) for k, v in batch.items()} | {k: v.long() for k, v in numbers.items()}
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    models = training.Models(pipe.unet, pipe.text_encoder, pipe.vae, scheduler, store, tokens)
    with torch.no_grad():
        latents = encode_images(pipe.vae, batch["pixel_values"], [batch["mask"], batch["random_mask"]])
    return TrainingBench(models, batch, latents, optimizer, dtype)


@torch.no_grad()
def arithmetic_limit(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of matrices: what no step on this device exceeds."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.randn(side, side, device=device).to(dtype)
    seconds = min(seconds_of(device, torch.matmul, x, x) for _ in range(5))
    return 2 * side**3 / seconds / 1e12


def bench_training(args: argparse.Namespace, device: torch.device) -> None:
    """Measures the steps and writes the results."""
    bench = make_training_bench(args, device)
    steps = STEPS | (COMPILED if args.torch_compile else {})
    if args.torch_compile:
        compile_unet(bench.models, "blocks")
    teraflops, first_seconds = {}, {}
    for name, step in steps.items():  # kernels are chosen and memory is taken before the clock runs
        bench.arrange(step)
        with FlopCounterMode(display=False) if not step.compiled else contextlib.nullcontext() as counter:
            first_seconds[name] = seconds_of(device, bench.run, step)
        teraflops[name] = counter.get_total_flops() / 1e12 if counter else teraflops["ours"]
    limit = arithmetic_limit(device, bench.dtype)
    lines = []
    for number, name in ((number, name) for number in range(args.rounds) for name in steps):
        bench.arrange(steps[name])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = seconds_of(device, bench.run, steps[name])
        lines.append({"variant": name, "round": number, "seconds": seconds} | peak_memory(device))
    rows, n = [], args.train_batch_size
    for name, (seconds, ratios) in speed_ups(lines).items():
        done = teraflops[name]
        peak = max(line.get("peak_memory_gib", 0) for line in lines if line["variant"] == name) or ""
        share = f"{done / seconds / limit:.0%}"
        rows.append([name, f"{done / n:.3g}", f"{n / seconds:.3g}", in_words(ratios), share, f"{peak}"])
    head = ["", "TFLOP per sample", "samples per second", "speed-up", "of the arithmetic limit", "peak GiB"]
    note = (
        f"Batch {n}, {args.resolution} px, {args.mixed_precision}, {args.rounds} rounds: median, and range of the "
        f"speed-up. Arithmetic limit: {limit:.3g} TFLOP/s."
    )
    if args.torch_compile:
        note += f" The first compiled step took {first_seconds['compiled blocks']:.0f} s."
    write_results(args, lines, head, rows, note, draw_speed_ups)


# ---------------------------------------------------------------------------------------------------------------------
# Generated images


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
    """The variants by name; each adds one technique to the one before it."""
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
    """(P, N, 3, S, S) candidates in [0, 1], sampled by this variant with guidance 7.5."""
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


def encode_images_again(pipe: StableDiffusionInpaintPipeline, pairs: Pairs) -> None:
    """Does only the baseline's encoding of images and masks."""
    for image, grid, seeds in zip(pairs.images, pairs.grids, pairs.seeds):
        for _ in seeds:
            masked = image * (1 - upsample_mask(grid, pipe.vae_scale_factor))
            pipe.vae.encode(masked[None].to(pipe.device, pipe.vae.dtype)).latent_dist.sample()


@torch.no_grad()
def bench_generation(args: argparse.Namespace, device: torch.device) -> None:
    """Measures the variants and writes the results."""
    pipe = load(args.base, device, args.mixed_precision)
    images, _ = drawn_pairs([("nut", None)], args.images, args.resolution, seed=1)
    _, masks = drawn_pairs([("nut", "hole")], args.images, args.resolution, seed=2)
    grids = latent_masks(masks, args.resolution // pipe.vae_scale_factor)
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

    counts, lines = {}, []
    for variant in variants.values():
        run(variant._replace(steps=2))  # kernels are chosen and memory is taken before the clock runs
    encodings: dict[str, list[float]] = {"prompts": [], "images": []}
    for number in range(args.rounds):
        for name, variant in variants.items():
            lines.append({"variant": name, "round": number, "seconds": seconds_of(device, run, variant)})
            counts[name] = sum(rows) / (args.images * args.num_candidates)
        encodings["prompts"].append(seconds_of(device, encode_prompts))
        encodings["images"].append(seconds_of(device, encode_images_again, pipe, pairs))
    speeds = speed_ups(lines)
    first = next(iter(speeds.values()))[0]
    cells = [
        [name, f"{counts[name]:.0f}", f"{args.images / seconds:.3g}", in_words(ratios)]
        for name, (seconds, ratios) in speeds.items()
    ]
    shares = {k: statistics.median(seconds) / first for k, seconds in encodings.items()}
    note = (
        f"{args.images} images of {args.num_candidates} candidates, {args.resolution} px, {args.rounds} rounds: "
        f"median, and range of the speed-up. Of the baseline's time, {shares['prompts']:.2%} is prompt encoding, "
        f"{shares['images']:.2%} image and mask encoding."
    )
    write_results(
        args,
        lines,
        ["", "UNet evaluations per candidate", "images per second", "speed-up"],
        cells,
        note,
        draw_speed_ups,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading and writing

STAGES = {"start_batch": "image and mask", "measure": "scores", "write_image": "files"}  # of generate_defectfill.py

# The smallest model that both commands take: it stands in their way least.
SMALLEST = Sizes(
    vae_channels=(8, 8, 8, 8), unet_channels=(32, 32, 32), attention=(False, False, True), text_width=32, text_layers=1
)


def drawn_object(folder: Path, size: int, good: int, defects: int = 3) -> Path:
    """A folder of the object nut with holes, its images `size` px a side."""
    write_parts(folder, ["nut"], size=128, defects=defects, good=good, seed=0)
    enlarge(str(folder), size)
    return folder / "nut"


def training_options(base: Path, data: Path, resolution: int, output: Path) -> argparse.Namespace:
    """Of a training of one step, on whole images."""
    flags = f"""--pretrained_model_name_or_path {base} --train_data_dir {data} --defect hole --split all --zoom off
        --resolution {resolution} --max_train_steps 1 --train_batch_size 1 --validation_steps 0 --report_to none
        --seed 0 --output_dir {output}"""
    return training.parse_args(flags.split())


def drawn_run(folder: Path, size: int, resolution: int, good: int) -> tuple[Path, argparse.Namespace]:
    """A drawn object, and the options of a training on it that leaves its LoRA in `folder / "lora"`."""
    build_pipeline(SMALLEST).save_pretrained(folder / "base")
    data = drawn_object(folder / "data", size, good)
    return data, training_options(folder / "base", data, resolution, folder / "lora")


def generate(lora: Path, good: Path, images: int, candidates: int, output: Path) -> None:
    """Generates so many images, each sampled in one step."""
    flags = f"""--lora {lora} --image {good} --mask_source random --zoom off --num_images {images}
        --num_candidates {candidates} --num_inference_steps 1 --selection rmse --seed 0 --output_dir {output}"""
    generation.main(generation.parse_args(flags.split()))


def bench_data(args: argparse.Namespace, device: torch.device) -> None:
    """Measures loading and writing, and writes the results."""
    lines, cells = [], []
    for size in args.image_sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data, options = drawn_run(folder, size, args.resolution, args.images)
            seconds = loading_seconds(training.prepare(options, Accelerator()).samples, args.samples, args.workers)
            training.main(options)
            with clocked_stages() as clocks:
                generate(folder / "lora", data / "train/good", args.images, args.num_candidates, folder / "generated")
        rates = [f"{1 / value:.3g}" for value in seconds.values()]
        cells.append([f"{size}", *rates, *(f"{1000 * sum(clock) / args.images:.0f}" for clock in clocks.values())])
        seconds |= {stage: sum(clock) / args.images for stage, clock in clocks.items()}
        lines += [{"variant": stage, "number": size, "seconds": value} for stage, value in seconds.items()]
    head = ["image side, px", *(f"samples per second, {n} workers" for n in args.workers)]
    head += [f"{stage}, ms of CPU" for stage in STAGES.values()]
    note = (
        f"The model takes {args.resolution} px. Generation: {args.images} images of {args.num_candidates} candidates, "
        f"scored by RMSE on {device.type}. 0 workers: the main process."
    )
    write_results(args, lines, head, cells, note, draw_growth)


def loading_seconds(samples: TrainingSamples, batches: int, workers: list[int]) -> dict[str, float]:
    """Seconds of a training sample by number of workers, in batches of four."""
    found = {}
    for number in workers:
        loader = iter(DataLoader(samples, batch_sampler=sampling_schedule(0, batches + 1, 4), num_workers=number))
        next(loader)  # the workers are there
        began = time.perf_counter()
        rest = sum(len(batch["index"]) for batch in loader)
        found[f"sample, {number} workers"] = (time.perf_counter() - began) / rest
    return found


@contextlib.contextmanager
def clocked_stages() -> Iterator[dict[str, list[float]]]:
    """The CPU seconds of each call of a stage, in whatever thread."""
    clocks: dict[str, list[float]] = {stage: [] for stage in STAGES.values()}

    def clocked(function: Callable, seconds: list[float]) -> Callable:
        def run(*args, **kwargs):
            began = time.thread_time()
            result = function(*args, **kwargs)
            seconds.append(time.thread_time() - began)
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name, stage in STAGES.items():
            function = clocked(getattr(generation, name), clocks[stage])
            stack.enter_context(mock.patch.object(generation, name, function))
        yield clocks


# ---------------------------------------------------------------------------------------------------------------------
# Growth


def bench_growth(args: argparse.Namespace, device: torch.device) -> None:
    """Measures with one quantity larger, the others at their smallest, and writes the results."""
    pipe = load(args.base, device, args.mixed_precision)

    def step(resolution: int, train_batch_size: int) -> Callable:
        sizes = {"resolution": resolution, "train_batch_size": train_batch_size}
        bench = make_training_bench(argparse.Namespace(**vars(args) | sizes), device)
        return lambda: bench.run(Step(cached=False))

    def image(resolution: int, candidates: int) -> Callable:
        images, masks = drawn_pairs([("nut", "hole")], 1, resolution, seed=1)
        grids = latent_masks(masks, resolution // pipe.vae_scale_factor)
        pairs = Pairs(images.to(pipe.device), grids.to(pipe.device), [[*range(candidates)]])
        return lambda: inpaint_pairs(pipe, pairs, Variant(args.num_inference_steps, candidates))

    def start(references: int) -> Callable:
        data = drawn_object(folder / f"references-{references}", args.resolution, 0, references)
        options = training_options(folder / "base", data, args.resolution, folder / "none")
        return lambda: training.prepare(options, Accelerator())

    def run_of(images: int) -> Callable:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                generate(folder / "lora", data / "train/good", images, 1, Path(output))

        return run

    work: dict[tuple[str, int], Callable] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, options = drawn_run(folder, args.resolution, args.resolution, max(args.numbers))
        training.main(options)
        for resolution in (args.resolution * n for n in (1, 2, 3)):
            work["training step, by resolution", resolution] = step(resolution, 1)
            work["image, by resolution", resolution] = image(resolution, 1)
        for number in args.numbers:
            work["training step, by batch", number] = step(args.resolution, number)
            work["image, by candidates", number] = image(args.resolution, number)
            work["start of training, by references", number] = start(number)
            work["generation, by images", number] = run_of(number)
        for run in work.values():
            run()  # kernels are chosen and memory is taken before the clock runs
        lines = [
            {"variant": kind, "number": number, "seconds": seconds_of(device, run)}
            for _ in range(args.rounds)
            for (kind, number), run in work.items()
        ]
    seconds: dict[str, dict[int, list[float]]] = {kind: {} for kind, _ in work}
    for line in lines:
        seconds[line["variant"]].setdefault(line["number"], []).append(line["seconds"])
    cells = []
    for kind, by_number in seconds.items():
        medians = {number: statistics.median(found) for number, found in by_number.items()}
        power = np.polyfit(np.log([*medians]), np.log([*medians.values()]), 1)[0]
        cells.append([kind, ", ".join(f"{number}: {found:.3g}" for number, found in medians.items()), f"{power:.2f}"])
    note = f"Medians of {args.rounds} rounds. Power: seconds grow with the number to this power."
    write_results(args, lines, ["", "seconds", "power"], cells, note, draw_growth)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="train|generate|data|growth")
    candidates = ("num_candidates", 4, "Candidates per image.")
    images = ("images", 4, "Images to generate.")
    numbers = {
        "train": (
            ("rounds", 3, "How often each is measured."),
            ("train_batch_size", 4, "Samples of a step."),
            ("rank", 8, "Of the LoRA."),
        ),
        "generate": (
            ("rounds", 3, "How often each is measured."),
            images,
            candidates,
            ("batch_size", 16, "Maximum candidates per UNet call when several images share it."),
            ("num_inference_steps", 50, "DDIM steps."),
            ("fast_steps", 20, "UniPC steps."),
        ),
        "data": (images, candidates, ("samples", 100, "Batches of 4 to load.")),
        "growth": (
            ("rounds", 3, "How often each is measured."),
            ("rank", 8, "Of the LoRA."),
            ("num_inference_steps", 10, "DDIM steps."),
        ),
    }
    texts = {
        "train": "A training step.",
        "generate": "Generated images.",
        "data": "Loading and writing.",
        "growth": "Growth.",
    }
    for what, words in texts.items():
        add = commands.add_parser(what, help=words, description=words).add_argument
        if what != "data":
            model = add.__self__.add_mutually_exclusive_group(required=True)
            model.add_argument("--base", metavar="DIR", help="Inpainting model.")
            model.add_argument("--sd2_size", action="store_true", help="Random weights of Stable Diffusion 2's size.")
            add("--mixed_precision", choices=("bf16", "no"), default="bf16", help="Default: %(default)s.")
        add("--output_dir", type=Path, required=True, metavar="DIR")
        for flag, default, text in (("resolution", 128, "Side of the model's square, in px."), *numbers[what]):
            add(f"--{flag}", type=int, default=default, metavar="N", help=f"{text} Default: %(default)s.")
        if what in ("train", "growth"):
            add("--lora_targets", choices=list(LORA_TARGETS), default="attention", help="Default: %(default)s.")
        if what == "train":
            add("--torch_compile", action="store_true", help="Also with the UNet's blocks compiled, after minutes.")
        if what == "growth":
            add("--numbers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="Default: 1 2 4 8.")
        if what == "data":
            sizes = [1024, 2048, 4096]
            add("--image_sizes", type=int, nargs="+", default=sizes, metavar="PX", help="Default: 1024 2048 4096.")
            add("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="Default: 0 1 2.")
    args = parser.parse_args(input_args)
    if args.what == "generate" and args.batch_size < args.num_candidates:
        parser.error(f"--batch_size {args.batch_size}: must be at least --num_candidates {args.num_candidates}")
    return args


def check_output(folder: Path, what: str) -> None:
    """Makes the folder; raises InputError if it cannot be made (DF190), or holds files that are not ours (DF192)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(Problem("DF190", f"--output_dir {folder}", f"cannot be made: {error.strerror}")) from error
    if not is_record(folder / ENVIRONMENT, "what", "device", "threads"):
        names = (ENVIRONMENT, *(f"{what}.{end}" for end in ("md", "csv", "png")))
        refuse_foreign(folder, [name for name in names if (folder / name).exists()])


def main(args: argparse.Namespace) -> None:
    check_output(args.output_dir, args.what)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = {"train": bench_training, "generate": bench_generation, "data": bench_data, "growth": bench_growth}
    work[args.what](args, device)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
