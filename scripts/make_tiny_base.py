"""Train a small inpainting base of the classes of Stable Diffusion 2 inpainting, from scratch, without a download.

    python scripts/make_tiny_base.py --output_dir my-base                       # of the demo's parts
    python scripts/make_tiny_base.py --output_dir my-base --data_dir my-good-images --base scripts/tiny_base
    python scripts/make_tiny_base.py --output_dir random-base --random_weights  # nothing learnt: to see code run

Pictures are drawn (make_demo_data.py) or read from a folder. On some of them a plain mark is drawn (a dark spot, a
faint red line with a pale rim, ...) and named in the caption, so that the model learns to inpaint what the prompt says
inside the mask. First the autoencoder is trained; then, on latents encoded once, the text encoder and the UNet; last
the decoder alone. `accelerate launch` trains it in several processes, each with batches of its own. A killed run goes
on where it was; everything random is a function of the seed and the step.

Shapes: S scenes, K masks of each, R picture side, G latent side. Masks are 1 where the model inpaints.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import defectfill.quiet  # noqa: F401

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionInpaintPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from tqdm.auto import tqdm

from defectfill.base_model import read_base
from defectfill.drawn.fitting import fit
from defectfill.drawn.parts import (
    PARTS,
    blob,
    distance_to,
    fractal,
    grid,
    jagged_line,
    render,
    smoothstep,
    wandering_line,
)
from defectfill.drawn.small_base import COLOURS, GREYS, SHAPES, Sizes, build_pipeline
from defectfill.latents import encode_images
from defectfill.noise_levels import error_weights, prediction_target
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs.files import atomic_write, exclusive_lock, write_json
from defectfill.sampling import composite, ddim, inpaint, load_pipeline
from defectfill_dataset import (
    InputError,
    Problem,
    boxes_mask,
    derive_seed,
    file_digest,
    image_tensor,
    load_image,
    open_image,
    pool_mask,
    random_boxes,
    random_mask,
    to_words,
    upsample_mask,
)
from defectfill_dataset.commands import Parser, exit_on_input_error
from defectfill_dataset.masks import bounds
from defectfill_dataset.readers import image_files
from defectfill_dataset.text import read_json


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: pictures, half of them with a mark, their captions and masks

MASKS = 3  # of each scene
HELD_OUT = 16  # pictures for the figures, never trained on


def mark_field(rng: np.random.Generator, size: int, shape: str) -> tuple[np.ndarray, float]:
    """A mark's (R, R) distance field, below 0 inside it, and its depth inside, both in half sides."""
    centre, radius = rng.uniform(-0.8, 0.8, 2), np.exp(rng.uniform(np.log(0.05), np.log(0.3)))
    angle, width = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(0.013), np.log(0.045)))
    if shape in ("line", "zigzag"):
        length = rng.uniform(0.2, 1.1)
        line = (
            wandering_line(rng, centre, angle, length, rng.uniform(0, 2))
            if shape == "line"
            else jagged_line(rng, centre, angle, length)
        )
        distance, along = distance_to(line, size)
        taper = 1 - rng.uniform(0, 0.8) * np.abs(2 * along - 1) ** 2
        return distance - width * taper, width
    if shape == "specks":
        y, x = grid(size)
        places = centre + rng.normal(0, 0.12, (rng.integers(3, 9), 2))
        radii = rng.uniform(0.015, 0.05, len(places))
        return np.min([np.hypot(y - p[0], x - p[1]) - r for p, r in zip(places, radii)], axis=0), 0.03
    rough = rng.uniform(0.2, 0.45) if shape == "patch" else rng.uniform(0.02, 0.2)
    field = blob(rng, size, centre, radius, rough, bumps=rng.uniform(0.4, 0.9))
    if shape == "ring":
        return np.abs(field) - width, width
    return field, radius


def draw_mark(rng: np.random.Generator, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Draws a mark on (R, R, 3) pixels; returns the picture, the mark's (R, R) mask, and the words for it.

    A mark has a shape and a colour ("same": the picture's own, flat as close by or with all that is elsewhere in it;
    "plain": none, only its shading shows); it may be faint, lie deep or raised, and have a rim of another colour. All
    of these are drawn independently, but that marks of the picture's own colours are seldom rimmed.
    A grey picture gets grey marks.
    """
    size = len(pixels)
    shape = rng.choice(SHAPES)
    field, depth = mark_field(rng, size, shape)
    soft = rng.uniform(0.008, 0.03)
    inside = smoothstep(soft, -soft, field)
    relief = rng.choice(["", "deep", "raised"], p=[0.4, 0.35, 0.25])
    grey = np.ptp(pixels.astype(float), axis=-1).mean() < 3
    colours = [*COLOURS][:GREYS] if grey else [*COLOURS]
    kind = rng.choice(["plain", "same", "own"], p=[0.05, 0.4, 0.55] if relief else [0, 0.5, 0.5])
    colour = rng.choice(colours) if kind == "own" else kind
    faint = kind == "own" and rng.random() < 0.3
    rim = rng.choice(colours) if rng.random() < (0.1 if kind == "same" else 0.4) else None

    def tone(name: str) -> np.ndarray:
        if name != "same":
            flat = np.array(COLOURS[name]) * rng.uniform(0.8, 1.2) + rng.normal(0, 6, 3)
        elif rng.random() < 0.5:  # the picture, moved
            half = size // 2
            top, left = rng.integers(2 * half + 1, size=2)
            around = np.pad(pixels, ((half, half), (half, half), (0, 0)), mode="reflect")
            return around[top : top + size, left : left + size].astype(float)
        else:
            near = np.argwhere(field < 0.3)
            y, x = near[rng.integers(len(near))]
            flat = pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean(axis=(0, 1))
        strength = rng.uniform(0, 0.06 if name == "same" else 0.15)
        mottled = 1 + strength * fractal(rng, size, rng.uniform(0.04, 0.2), 2)
        return flat * mottled[..., None] + rng.normal(0, 3, (size, size, 1))

    marked, mask = pixels.astype(float), field < soft
    if colour != "plain":
        ink = inside * (rng.uniform(0.35, 0.65) if faint else rng.uniform(0.95 if kind == "same" else 0.85, 1.0))
        marked += ink[..., None] * (tone(colour) - marked)
    if rim:
        width = rng.uniform(0.012, 0.035)
        edge = np.exp(-(((field - 0.5 * width) / width) ** 2)) * rng.uniform(0.6, 1.0)
        marked += edge[..., None] * (tone(rim) - marked)
        mask = field < soft + 2 * width
    if relief:
        slope = np.clip(-field, 0, depth) * (-1 if relief == "deep" else 1) * size / 2
        dy, dx = np.gradient(ndimage.gaussian_filter(slope, 0.7))
        azimuth, steep = rng.uniform(-2.6, -0.6), rng.uniform(0.3, 0.8) * (1.3 if colour == "plain" else 1)
        shade = 1 - steep * (dy * np.sin(azimuth) + dx * np.cos(azimuth))
        marked *= np.clip(shade, 0.35, 1.7)[..., None]
    words = ["faint"] * faint + [relief] * (relief != "") + [colour, shape] + ([f"with a {rim} rim"] if rim else [])
    marked = np.where(mask[..., None], np.clip(marked, 0, 255), pixels)
    return marked.astype(np.uint8), mask, " ".join(words)


def draw_masks(rng: np.random.Generator, mark: np.ndarray | None, size: int, cells: int) -> list[torch.Tensor]:
    """MASKS grid masks (1, G, G): around the mark, if there is one; boxes, strokes, blobs or everything."""

    def free() -> np.ndarray:
        kind = rng.choice(["boxes", "stroke", "blob", "all"], p=[0.4, 0.25, 0.25, 0.1])
        if kind == "all":
            return np.ones((size, size), dtype=bool)
        if kind == "boxes":
            return boxes_mask(random_boxes(rng, int(rng.integers(1, 12))), size)
        if kind == "blob":
            return random_mask(rng, size, size) | random_mask(rng, size, size)
        line = wandering_line(rng, rng.uniform(-0.8, 0.8, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.5), 2.0)
        return distance_to(line, size)[0] < rng.uniform(0.02, 0.1)

    if mark is None or not mark.any():
        return [pool_mask(free(), cells) for _ in range(MASKS)]
    left, top, right, bottom = bounds(mark)
    box = np.zeros_like(mark)
    box[top:bottom, left:right] = True
    return [pool_mask(mark, cells), pool_mask(box, cells), pool_mask(mark | free(), cells)]


@dataclasses.dataclass
class Scenes:
    """What the base learns from: groups of a good picture and the same picture with a mark, some times over.

    Args:
        pixels: (S, R, R, 3) uint8; the first of each group is good.
        masks: (S, K, 1, G, G) bool.
        captions: S lists of captions, one of which is drawn each time.
        group: scenes of a group.
    """

    pixels: np.ndarray
    masks: torch.Tensor
    captions: list[list[str]]
    group: int

    @property
    def held_out(self) -> int:
        """The first so many scenes are never trained on."""
        return HELD_OUT * self.group


Picture = Callable[[], tuple[Image.Image, str]]  # makes a good picture and names what it shows


def make_group(job: tuple[int, Picture, int, int, int, int]) -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """The scenes of one picture: as it is, and with `marks` marks, one in each."""
    index, picture, resolution, cells, marks, seed = job
    torch.set_num_threads(1)
    rng = np.random.default_rng(derive_seed(seed, "scene", index))
    image, name = picture()
    good = np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    captions = [f"A photo of a {name}", f"A {name}", f"A good {name}", f"A picture of a {name}"]
    scenes = [(good, (torch.stack(draw_masks(rng, None, resolution, cells)) > 0.5).numpy(), captions)]
    for _ in range(marks):
        marked, mark, words = draw_mark(rng, good)
        captions = [
            f"A {name} with a {words}",
            f"A photo of a {words}",
            f"A {name} with {words}",
            f"A photo of {words}",
        ]
        scenes.append((marked, (torch.stack(draw_masks(rng, mark, resolution, cells)) > 0.5).numpy(), captions))
    return scenes


def make_scenes(
    pictures: Sequence[Picture], resolution: int, cells: int, marks: int, seed: int, workers: int = 1
) -> Scenes:
    """The scenes of every picture, made by so many processes."""
    jobs = [(index, picture, resolution, cells, marks, seed) for index, picture in enumerate(pictures)]
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            groups = pool.imap(make_group, jobs, chunksize=8)
        else:
            groups = map(make_group, jobs)
        scenes = [scene for group in tqdm(groups, desc="Scenes", total=len(jobs), mininterval=5) for scene in group]
    pixels, masks, captions = zip(*scenes)
    return Scenes(np.stack(pixels), torch.from_numpy(np.stack(masks)), list(captions), 1 + marks)


@functools.lru_cache(maxsize=1)
def drawn_part(part: str, size: int, seed: tuple[int, int]) -> Image.Image:
    return render(part, None, size, seed)[0]


def drawn_picture(part: str, size: int, seed: tuple[int, int]) -> tuple[Image.Image, str]:
    return drawn_part(part, size, seed), part


def drawn_close_up(part: str, size: int, seed: tuple[int, int], crop_seed: int) -> tuple[Image.Image, str]:
    """A random quarter of a part drawn at twice the size."""
    left, top = map(int, np.random.default_rng(crop_seed).integers(size + 1, size=2))
    return drawn_part(part, 2 * size, seed).crop((left, top, left + size, top + size)), part


def drawn_pictures(number: int, size: int, seed: int) -> list[Picture]:
    """Good parts from seeds that make_demo_data.py does not use: in turn one of each kind, and four close-ups of one.

    `--zoom` shows a part at twice the size, so the base must know both.
    """
    parts = [*PARTS]
    pictures: list[Picture] = []
    for index in range(number):
        turn, place = divmod(index, 2 * len(parts))
        if place < len(parts):
            pictures.append(functools.partial(drawn_picture, parts[place], size, (1_000_003 + seed, index)))
        else:
            part_seed = (1_000_003 + seed, index - place + len(parts))
            crop_seed = derive_seed(seed, "close-up", index)
            pictures.append(functools.partial(drawn_close_up, parts[turn % len(parts)], size, part_seed, crop_seed))
    return pictures


def cropped_picture(file: Path, crop: int | None, seed: int) -> tuple[Image.Image, str]:
    """An image; or a random square of it, from half of `crop` to `crop` pixels if it is so large, mirrored or not."""
    image = load_image(open_image(file))
    if crop:
        rng = np.random.default_rng(seed)
        side = min(int(rng.integers(crop // 2, crop + 1)), *image.size)
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
    return image, to_words(file.parent.name)


def pictures_in(folder: Path) -> list[Path]:
    """The images in a folder and in its sub-folders."""
    folders = [folder, *sorted(f for f in folder.iterdir() if f.is_dir())] if folder.is_dir() else []
    return [file for f in folders for file in image_files(f)]


def read_pictures(folder: Path, number: int, crop: int | None, seed: int) -> list[Picture]:
    """The images in a folder, named by it, or in its sub-folders, each named by its own; or `number` crops of them.

    The first `HELD_OUT` are of files that the others are not of.
    """
    files = pictures_in(folder)
    if len(files) <= HELD_OUT:
        what = f"{len(files)} images in it and its folders"
        raise InputError(Problem("DF161", f"--data_dir {folder}", what, f"give at least {HELD_OUT + 1}"))
    others = itertools.cycle(files[HELD_OUT:])
    chosen = files[:HELD_OUT] + [next(others) for _ in range((number if crop else len(files)) - HELD_OUT)]
    return [
        functools.partial(cropped_picture, file, crop, derive_seed(seed, "crop", i)) for i, file in enumerate(chosen)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 on the picture, on its fine detail, on its coarse colours and, mostly, on what makes it differ from grey.

    Four numbers a cell do not hold all: texture may be redrawn, colours may not. The squared error besides is for what
    is rare and strong: a bright scratch among the faint ones of brushed metal.
    """

    def detail(x: torch.Tensor) -> torch.Tensor:
        return x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")

    def colour(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=1, keepdim=True)

    return (
        F.l1_loss(y, x)
        + F.l1_loss(detail(y), detail(x))
        + F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        + 6 * F.l1_loss(colour(y), colour(x))
        + 4 * F.mse_loss(y, x)
    )


class Reconstruction(torch.nn.Module):
    """Loss of an autoencoder: `picture_loss`.

    The posterior is barely held to a normal.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # half precision would cost fine detail
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return picture_loss(y, x) + 1e-5 * kl


class Decoding(torch.nn.Module):
    """Loss of the decoder alone: `picture_loss`, on latents that no longer move.

    The UNet stays right for them, so the decoder can be trained on at any time.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.encode = vae.encode  # not a module: its weights are not trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                z = self.encode(x).latent_dist.mean
            y = self.decoder(self.post_quant_conv(z + 0.02 * torch.randn_like(z)))
        return picture_loss(y, x)


def tinted(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, R, R) pictures with a glaze of a random colour on a disc of each, every other one in a random tint."""
    number, side = len(x), x.shape[-1]
    tint = (torch.rand(number, 1, 1, 1) < 0.5).float()
    gain, shift = torch.rand(2, number, 3, 1, 1) - 0.5
    x = x * (1 + tint * gain) + 0.6 * tint * shift
    top, left, radius = torch.rand(3, number, 1, 1, 1)
    line = torch.linspace(0, 1, side)
    distance = torch.hypot(line.view(1, 1, side, 1) - top, line.view(1, 1, 1, side) - left)
    ink = torch.sigmoid((0.2 * radius - distance) * side) * (0.3 + 0.7 * torch.rand(number, 1, 1, 1))
    return (x * (1 - ink) + (2 * torch.rand(number, 3, 1, 1) - 1) * ink).clamp(-1, 1)


def crops_of(scenes: Scenes, batch_size: int) -> torch.Tensor:
    """(B, 3, R/2, R/2) quarter crops in [-1, 1], all mirrored or none; three batches in four are tinted.

    Each is around a random cell of a scene's first mask, the mark if there is one, so that small marks are seen often.
    The colours of these parts are few; untinted, it would learn to guess them, and see brown on cloth as red.
    """
    size, cells = scenes.pixels.shape[1], scenes.masks.shape[-1]
    side = size // 2
    crops = []
    for row in torch.randint(scenes.held_out, len(scenes.pixels), (batch_size,)).tolist():
        mask = scenes.masks[row, 0, 0]
        inside = (mask if mask.any() else ~mask).nonzero()
        middle = inside[torch.randint(len(inside), ())] * (size // cells)
        top, left = (middle - torch.randint(side, (2,))).clamp(0, size - side).tolist()
        crops.append(torch.from_numpy(scenes.pixels[row, top : top + side, left : left + side]))
    x = torch.stack(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.flip(-1) if torch.rand(()) < 0.5 else x
    return tinted(x) if torch.rand(()) < 0.75 else x


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: Scenes, device: torch.device) -> dict[str, torch.Tensor]:
    """Latents of every scene, and of every scene with each mask cut out, in fp16: (S, 4, G, G) and (S, K, 4, G, G).

    They have unit spread; `scale` is the factor that gave it. Each process encodes its share and gets all.
    """
    vae.to(device).eval()
    clean, cut = [], []
    number = 2 if device.type == "cpu" else 64  # on a CPU small batches stay in the cache
    state = PartialState()
    share = torch.arange(len(scenes.pixels)).tensor_split(state.num_processes)[state.process_index]
    for rows in tqdm(share.split(number), desc="Latents", mininterval=5, disable=not state.is_main_process):
        x = torch.from_numpy(scenes.pixels[rows.numpy()]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = encode_images(vae, x, list(scenes.masks[rows].to(device).float().unbind(dim=1)))
        clean.append(latents.mean.cpu())
        cut.append(torch.stack(latents.masked, dim=1).cpu())
    clean, cut = torch.cat(gather_object(clean)), torch.cat(gather_object(cut))
    scale = 1 / clean.std()
    return {"clean": (clean * scale).half().contiguous(), "cut": (cut * scale).half().contiguous(), "scale": scale}


def load_latents(file: Path, make: Callable[[], dict]) -> dict[str, torch.Tensor]:
    """The latents kept in `file`; or made, by all processes together, and kept there."""
    if file.exists():
        return read_kept(file)
    latents = make()
    if PartialState().is_main_process:
        with atomic_write(file) as temporary:
            save_file(latents, temporary)
    return latents


def read_kept(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a working file, in memory; raises InputError (DF310) if it is damaged.

    `load_file` maps the file: each batch would read its crops from the disk.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(Problem("DF310", file, str(error), "delete the folder work, and start again")) from error


class Inpainting(torch.nn.Module):
    """Loss of text encoder and UNet: the prediction's error, mostly inside the mask.

    A noise prediction's error is weighted by min-SNR with gamma 5 (Hang et al., ICCV 2023); that of a v-prediction
    is not, because it weighs high noise levels enough by itself.
    """

    def __init__(self, pipe: StableDiffusionInpaintPipeline):
        super().__init__()
        self.unet, self.text_encoder = pipe.unet, pipe.text_encoder
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.snr_gamma = None if pipe.scheduler.config.prediction_type == "v_prediction" else 5

    def forward(self, x_0, mask, cut, input_ids, noise, t):
        x_t = self.noise_scheduler.add_noise(x_0, noise, t)
        pred = self.unet(torch.cat([x_t, mask, cut], dim=1), t, self.text_encoder(input_ids)[0]).sample
        error = (pred.float() - prediction_target(self.noise_scheduler, x_0, noise, t)).square() * (0.3 + 0.7 * mask)
        weights = error_weights(self.noise_scheduler, t, self.snr_gamma, high_noise_power=0)
        return (error if weights is None else weights * error).mean()


def train_unet(
    pipe: StableDiffusionInpaintPipeline, scenes: Scenes, latents: dict, stages: Sequence, work_dir: Path, seed: int
) -> None:
    """Trains text encoder and UNet on inpainting; 1 picture in 10 is uncaptioned, so that guidance works.

    Args:
        stages: (name, steps, batch size, latent side, learning rate) in turn; small crops first, which are cheap.
    """
    device = pipe.device
    number = len(scenes.captions[0])
    texts = [caption for captions in scenes.captions for caption in captions]
    ids = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.unflatten(0, (-1, number))
    empty = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    clean, cut, masks = (x.to(device) for x in (latents["clean"], latents["cut"], scenes.masks))

    for name, steps, batch_size, side, learning_rate in stages:

        def batch_of(batch_size=batch_size, side=side) -> tuple:
            rows = torch.randint(scenes.held_out, len(ids), (batch_size,))
            k, caption = torch.randint(MASKS, (batch_size,)), torch.randint(number, (batch_size,))
            top, left = (int(torch.randint(clean.shape[-1] - side + 1, ())) for _ in range(2))
            window = (..., slice(top, top + side), slice(left, left + side))
            captions = torch.where(torch.rand(batch_size, 1) < 0.1, empty, ids[rows, caption])
            t = torch.randint(1000, (batch_size,))
            rows, k = rows.to(device), k.to(device)
            x_0 = clean[rows][window].float()
            mask, masked = masks[rows, k][window].float(), cut[rows, k][window].float()
            return x_0, mask, masked, captions, torch.randn_like(x_0), t

        fit(name, Inpainting(pipe), batch_of, steps, learning_rate, work_dir, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@torch.no_grad()
def measure(pipe: StableDiffusionInpaintPipeline, scenes: Scenes) -> tuple[dict[str, float], Image.Image]:
    """PSNR of the autoencoder, and of good parts inpainted where they were, on held-out scenes; and a picture of both.

    The picture has a column each for six of the scenes: original, reconstruction, cut, inpainted.
    """
    pipe.scheduler = ddim(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    reconstruction, inpainted, columns = [], [], []
    for index in range(0, scenes.held_out, scenes.group):
        image = Image.fromarray(scenes.pixels[index])
        x = image_tensor(image, image.width).to(pipe.device)
        y = pipe.vae.decode(pipe.vae.encode(x[None]).latent_dist.mean).sample[0].clamp(-1, 1)
        reconstruction.append(psnr((x - y) / 2))
        rng = np.random.default_rng(index)
        pixel_mask = random_mask(rng, image.width, image.width) | random_mask(rng, image.width, image.width)
        grid = pool_mask(pixel_mask, image.width // pipe.vae_scale_factor)
        prompt = scenes.captions[index][0]
        seeds = [[derive_seed(0, index)]]
        [[z]] = inpaint(pipe, x[None], grid[None], prompt, seeds, num_inference_steps=30, guidance_scale=1.0) * 2 - 1
        inside = upsample_mask(grid, pipe.vae_scale_factor)[0] > 0.5
        inpainted.append(psnr((x - z)[:, inside] / 2))
        result = composite(image, (z.cpu() + 1) / 2, inside.cpu().numpy())
        cells = [x, y, x * ~inside.to(x.device), image_tensor(result, image.width).to(x)]
        columns.append(torch.cat(cells, dim=1))
    figures = {"reconstruction_psnr": np.mean(reconstruction), "inpainting_psnr": np.mean(inpainted)}
    picture = torch.cat(columns[:6], dim=2).permute(1, 2, 0).cpu().numpy()
    return {k: round(float(v), 2) for k, v in figures.items()}, Image.fromarray(
        (picture * 127.5 + 127.5).astype(np.uint8)
    )


def psnr(difference: torch.Tensor) -> float:
    """In dB, of a difference of pictures in [0, 1]."""
    return -10 * math.log10(difference.square().mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# The command


WITHOUT_EFFECT = ("output_dir", "workers", "scenes_only")  # options that change nothing in the result


def main(args: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    sizes = Sizes(resolution=args.resolution, prediction_type=args.prediction_type)
    set_seed(args.seed)
    pipe = build_pipeline(sizes)
    if args.base:
        base = read_base(str(args.base))
        pipe = load_pipeline(base, None, "no", torch.device("cpu"))
        if (kind := pipe.scheduler.config.prediction_type) != args.prediction_type:
            found = f"--prediction_type {args.prediction_type}, of a base that predicts {kind}"
            raise InputError(Problem("DF183", f"--base {args.base}", found, f"give --prediction_type {kind}"))
        for module in (pipe.vae, pipe.unet, pipe.text_encoder):
            module.requires_grad_(True)
    if args.random_weights:
        return pipe.save_pretrained(args.output_dir)
    accelerator = Accelerator()
    first, device = accelerator.is_main_process, accelerator.device
    work_dir = args.output_dir / "work"
    options = checkpoints.as_json({k: v for k, v in vars(args).items() if k not in WITHOUT_EFFECT})
    if args.data_dir and first:
        digests = (f"{file} {file_digest(file)}\n" for file in pictures_in(args.data_dir))
        options["data_sha256"] = hashlib.sha256("".join(digests).encode(errors="surrogateescape")).hexdigest()
    kept = options | ({"base_sha256": base.digest} if args.base else {})
    with exclusive_lock(work_dir) if first else contextlib.nullcontext():
        if first:
            checkpoints.keep_options(work_dir / "options.json", kept, may_lack=True)
        began = time.time()
        cells = args.resolution // pipe.vae_scale_factor
        pictures = (
            read_pictures(args.data_dir, args.pictures, args.crop_size, args.seed)
            if args.data_dir
            else drawn_pictures(args.pictures, args.resolution, args.seed)
        )
        with accelerator.main_process_first():
            scenes = load_scenes(
                work_dir / "scenes.safetensors",
                lambda: make_scenes(pictures, args.resolution, cells, args.marks, args.seed, args.workers),
            )
        if args.scenes_only:
            return accelerator.end_training()
        pipe.to(device)

        def crops(batch_size: int) -> Callable[[], tuple]:
            return lambda: (crops_of(scenes, batch_size),)

        fit("vae", Reconstruction(pipe.vae), crops(args.vae_batch_size), args.vae_steps, 1e-3, work_dir, args.seed)
        latents = load_latents(work_dir / "latents.safetensors", lambda: encode(pipe.vae, scenes, device))
        pipe.vae.register_to_config(scaling_factor=latents["scale"].item())
        stages = [
            ("unet-crops", args.crop_steps, args.crop_batch_size, cells // 2, 1e-3),
            ("unet-whole", args.whole_steps, args.whole_batch_size, cells, args.whole_learning_rate),
        ]
        train_unet(pipe, scenes, latents, stages, work_dir, args.seed)
        if args.decoder_steps:
            batches = crops(args.decoder_batch_size)
            fit("decoder", Decoding(pipe.vae), batches, args.decoder_steps, 1e-3, work_dir, args.seed)
        accelerator.end_training()  # of all processes together, before the first goes on alone
        if not first:
            return
        pipe.to(device, dtype=torch.float32)
        for module in (pipe.vae, pipe.unet, pipe.text_encoder):
            module.eval()
        figures, picture = measure(pipe, scenes)
        for module in (pipe.vae, pipe.unet, pipe.text_encoder):
            module.to(memory_format=torch.contiguous_format)
        save(pipe.to("cpu", dtype=torch.float16), args.output_dir)
        picture.save(args.output_dir / "samples.png")
        figures |= {"seconds_of_last_start": round(time.time() - began), "options": options}
        write_json(args.output_dir / "figures.json", figures)
        print(json.dumps(figures, indent=2))


def save(pipe: StableDiffusionInpaintPipeline, folder: Path) -> None:
    """Saves a pipeline without what the run has left in it: where its weights came from, and how texts were padded."""
    for module in (pipe.vae, pipe.unet):
        module._internal_dict = FrozenDict({k: v for k, v in module.config.items() if k != "_name_or_path"})
    pipe.text_encoder.config._name_or_path = ""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # a class that diffusers has
    pipe.tokenizer.backend_tokenizer.no_padding()
    pipe.save_pretrained(folder)


def load_scenes(file: Path, make: Callable[[], Scenes]) -> Scenes:
    """The scenes kept in `file`, made and kept there if they are not."""
    captions = file.with_suffix(".json")
    if not captions.exists():
        scenes = make()
        save_file({"pixels": torch.from_numpy(scenes.pixels), "masks": scenes.masks}, file)
        write_json(captions, {"captions": scenes.captions, "group": scenes.group})
    tensors = read_kept(file)
    return Scenes(tensors["pixels"].numpy(), tensors["masks"], **read_json(captions))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)

    def add(name: str, default=None, help: str = "", metavar: str = "N", **options) -> None:
        if default is not None:
            options |= {"default": default, "type": type(default)}
            help += " Default: %(default)s."
        parser.add_argument(name, help=help, metavar=metavar, **options)

    def switch(name: str, help: str) -> None:
        parser.add_argument(name, action="store_true", help=help)

    add("--output_dir", type=Path, required=True, metavar="DIR", help="The base; working files go to its folder work.")
    add("--data_dir", type=Path, metavar="DIR", help="Good images of one's own, in folders named by what they show.")
    add(
        "--crop_size",
        type=int,
        metavar="PX",
        help="Learn from random squares of --data_dir's images, up to this side.",
    )
    add("--base", type=Path, metavar="DIR", help="Go on from this base's weights, which takes far fewer steps.")
    switch("--random_weights", "Save the untrained pipeline and stop.")
    switch("--scenes_only", "Make the training images and stop; a later run uses them.")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction",
                        help="What the UNet predicts. Default: %(default)s.")  # fmt: skip
    add("--resolution", 128, "Side of the pictures.", metavar="PX")
    add("--pictures", 2100, "Images to render, or to crop from --data_dir.")
    add("--marks", 1, "Scenes with a mark made from each image.")
    add("--workers", os.cpu_count() or 1, "Processes that make the scenes.")
    add("--vae_steps", 3000, "Steps of the autoencoder; 0 keeps that of --base.")
    add("--vae_batch_size", 16, "Crops in a step of the autoencoder.")
    add("--crop_steps", 1500, "Steps of the UNet on quarter crops.")
    add("--crop_batch_size", 32, "Crops in such a step.")
    add("--whole_steps", 600, "Steps of the UNet on whole pictures.")
    add("--whole_batch_size", 16, "Pictures in such a step.")
    add("--whole_learning_rate", 5e-4, "Highest learning rate of these steps.", metavar="RATE")
    add("--decoder_steps", 1500, "Steps of the decoder alone, after the UNet's; 0 for none.")
    add("--decoder_batch_size", 8, "Crops in such a step.")
    add("--seed", 0, "Random seed.")
    args = parser.parse_args(input_args)
    if args.pictures <= HELD_OUT:
        parser.error(f"--pictures {args.pictures}: must be above {HELD_OUT}; so many are held out")
    if not (args.vae_steps or args.base):
        parser.error("--vae_steps 0: give --base, whose autoencoder is kept")
    return args


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
