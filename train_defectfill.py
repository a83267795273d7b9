"""Train a DefectFill LoRA for a Stable Diffusion inpainting model, from a few defect images with masks.

    accelerate launch train_defectfill.py --train_data_dir mvtec/hazelnut --defect hole --output_dir lora-hazelnut-hole

Reads top to bottom: the method's equations, attention maps, one training step, measures and validation images, the
loop, the command. Its flags are in `defectfill/runs/flags.py`.

Shapes: B samples, L prompt tokens, Q queries of an attention layer, h x w the latent grid.
Masks are 1 inside the defect; images are in [-1, 1].

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985; equation numbers are the paper's.
"""

import argparse
import datetime
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import defectfill.runs.start  # noqa: F401

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from defectfill.base_model import BaseModel, check_resolution, load_models, load_tokenizer, read_base
from defectfill.colour_stats import statistics_by_defect
from defectfill.latents import LatentCache, encode_images, to_device
from defectfill.lora import LORA_FILE, add_lora, lora_parameters, lora_sizes, reload_and_compare, save_lora
from defectfill.memory import TRAINING_NEEDS_LESS, left_out_if_out_of_memory, told_if_out_of_memory
from defectfill.noise_levels import (
    PLAIN_NOISE,
    NoiseOptions,
    draw_timestep,
    error_weights,
    noisy_prompts,
    offset_noise,
    predicted_x_0,
    prediction_target,
)
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import disks, logs
from defectfill.runs.batch_size import fit_batch_size
from defectfill.runs.cards import write_model_card
from defectfill.runs.files import atomic_write, clear_leftovers, save_image, write_json
from defectfill.runs.flags import check_training_args, parse_training_args
from defectfill.runs.hub import check_hub, push
from defectfill.runs.loading import load_batches
from defectfill.runs.processes import check_launch, check_same, from_main_process, launch_notes, locked_start
from defectfill.runs.record import LossLog, lora_record, run_record, stop_if_all_skipped, stop_if_not_finite
from defectfill.runs.signals import StopSignal
from defectfill.runs.space import check_space
from defectfill.runs.speed import StepClock
from defectfill.runs.validation import best_step, measured_at, validation_record
from defectfill.sampling import assemble_pipeline, composite, ddim, inpaint
from defectfill_dataset import (
    CropRule,
    InputError,
    Problem,
    PromptPair,
    TokenizedPrompts,
    TrainingSamples,
    binarise,
    build_prompts,
    check_pairs,
    choose_crop_rule,
    data_digest,
    defect_types,
    derive_seed,
    heat_overlay,
    held_out_rows,
    image_tensor,
    load_defect_pairs,
    load_prepared,
    other_types,
    sampling_schedule,
    select_defects,
    single_types,
    split_names,
    tensor_image,
    to_words,
    tokenize_prompts,
    upsample_mask,
    validation_split,
)
from defectfill_dataset.commands import exit_on_input_error


logger = get_logger(__name__, log_level="INFO")


# ---------------------------------------------------------------------------------------------------------------------
# The method's equations


class LossOptions(NamedTuple):
    """Weights of equation 9 and the contested readings; the defaults are the paper's or the literal ones."""

    lambda_def: float = 0.5
    lambda_obj: float = 0.2
    lambda_attn: float = 0.05
    background_alpha: float = 0.3
    loss_reduction: str = "mean"  # or "mask"
    attention_pass: str = "object"  # or "defect"
    attention_map_scale: str = "raw"  # or "minmax"
    snr_gamma: float | None = None  # weights of the noise levels, not the paper's
    high_noise_power: float = 0.0


def unet_input(noisy_latents: torch.Tensor, mask: torch.Tensor, masked_latents: torch.Tensor) -> torch.Tensor:
    """(B, 9, h, w): noisy latents (4), mask (1), masked-image latents (4), the order of every inpainting UNet."""
    return torch.cat([noisy_latents, mask, masked_latents], dim=1)


def weighted_mse(target: torch.Tensor, pred: torch.Tensor, weight: torch.Tensor, reduction: str) -> torch.Tensor:
    """|| weight * (target - pred) ||^2, the form of equations 5 and 6.

    Args:
        target, pred: (B, C, h, w).
        weight: (B, 1, h, w), inside the square.
        reduction: "mean" over all elements, or "mask": each sample divided by its weight, so that small and large
            defects count alike.
    """
    squared = (weight * (target - pred)).square()
    if reduction == "mean":
        return squared.mean()
    return (squared.sum(dim=(1, 2, 3)) / (weight.square().sum(dim=(1, 2, 3)) * target.shape[1])).mean()


def defect_loss(
    noise: torch.Tensor, noise_pred: torch.Tensor, mask: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Equation 5: L_def = E || M * (eps - eps_theta(x_t_def, t, c_def)) ||^2."""
    return weighted_mse(noise, noise_pred, mask, reduction)


def adjusted_mask(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Equation 7: M' = M + alpha (1 - M), from the defect mask and not from M_rand."""
    return mask + alpha * (1 - mask)


def object_loss(
    noise: torch.Tensor, noise_pred: torch.Tensor, mask: torch.Tensor, alpha: float, reduction: str = "mean"
) -> torch.Tensor:
    """Equation 6: L_obj = E || M' * (eps - eps_theta(x_t_obj, t, c_obj)) ||^2, so the background weighs alpha^2."""
    return weighted_mse(noise, noise_pred, adjusted_mask(mask, alpha), reduction)


def attention_loss(attention_map: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation 8: L_attn = E || A_[V*] - M ||^2 for a map (B, h, w) and a mask (B, 1, h, w)."""
    return F.mse_loss(attention_map, mask.squeeze(1))


def total_loss(l_def: torch.Tensor, l_obj: torch.Tensor, l_attn: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Equation 9: L = lambda_def L_def + lambda_obj L_obj + lambda_attn L_attn."""
    return options.lambda_def * l_def + options.lambda_obj * l_obj + options.lambda_attn * l_attn


# ---------------------------------------------------------------------------------------------------------------------
# Attention maps of the defect phrase


class AttentionStore:
    """Where the recording processors put their maps, and what they record: one object, no state elsewhere.

    `record` before the forward pass, `pop` after it; `pop` once more after the backward pass, because gradient
    checkpointing runs the layers again. What is recorded must not change between the two, or checkpointing fails.
    """

    def __init__(self):
        self.rows = slice(0)
        self.phrase_weights: torch.Tensor | None = None
        self.maps: dict[str, torch.Tensor] = {}

    def record(self, rows: slice, phrase_weights: torch.Tensor) -> None:
        """From now on record `rows` of the UNet's batch; `phrase_weights` (len(rows), L) weigh each row's tokens."""
        self.rows, self.phrase_weights, self.maps = rows, phrase_weights, {}

    def stop(self) -> None:
        """Record nothing from now on."""
        self.rows, self.phrase_weights, self.maps = slice(0), None, {}

    def pop(self) -> dict[str, torch.Tensor]:
        """The maps by layer name, (rows, Q) each and still in the graph; the store forgets them."""
        maps, self.maps = self.maps, {}
        return maps


class RecordingAttnProcessor:
    """Cross-attention of one decoder layer: output by the fused kernel, and beside it the phrase's probabilities.

    It calls the layer's own linear modules, so LoRA works as in diffusers' AttnProcessor2_0, whose result it equals.
    """

    def __init__(self, name: str, store: AttentionStore):
        self.name = name
        self.store = store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, Q or L, channels)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        weights, rows = self.store.phrase_weights, self.store.rows
        if weights is not None:
            with torch.autocast(query.device.type, enabled=False):  # fp32: half precision would lose the gradient
                scores = query[rows].float() @ key[rows].float().transpose(-1, -2) * attn.scale
                probabilities = scores.softmax(dim=-1)  # (rows, heads, Q, L)
                self.store.maps[self.name] = torch.einsum("bhql,bl->bq", probabilities, weights) / attn.heads
        hidden_states = F.scaled_dot_product_attention(query, key, value)
        hidden_states = attn.to_out[0](hidden_states.transpose(1, 2).flatten(2))
        return attn.to_out[1](hidden_states)


def record_attention(unet: UNet2DConditionModel) -> AttentionStore:
    """Puts a recording processor on every decoder cross-attention (`up_blocks`, `attn2`), for the whole run.

    Last of all: xformers and every other switch of processors would replace it.
    """
    store = AttentionStore()
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.startswith("up_blocks") and "attn2" in name:
            processors[name] = RecordingAttnProcessor(name, store)
    unet.set_attn_processor(processors)
    return store


def attention_map(maps: dict[str, torch.Tensor], size: tuple[int, int], scale: str = "raw") -> torch.Tensor:
    """A_[V*], (B, h, w): each layer's map resized to the latent grid, then the mean over layers.

    Args:
        maps: (B, Q) of each layer, averaged over heads and phrase tokens; Q cells of a square.
        size: (h, w).
        scale: "raw" probabilities, or "minmax": each sample stretched to [0, 1].
    """
    squares = [m.unflatten(1, (1, math.isqrt(m.shape[1]), -1)) for m in maps.values()]  # (B, 1, q, q)
    mean = torch.stack([F.interpolate(m, size, mode="bilinear") for m in squares]).mean(dim=0).squeeze(1)
    if scale == "minmax":
        low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
        mean = (mean - low) / (high - low).clamp_min(1e-8)
    return mean


def attention_overlap(attention: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """How well one map (h, w) marks one mask (h, w): IoU of its |M| highest cells, and its share inside the mask."""
    inside = mask.flatten() > 0.5
    highest = torch.zeros_like(inside)
    highest[attention.flatten().topk(int(inside.sum())).indices] = True
    iou = (highest & inside).sum() / (highest | inside).sum()
    return iou.item(), (attention.flatten()[inside].sum() / attention.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# One training step


class Models(NamedTuple):
    """Everything a forward pass runs through."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module
    vae: AutoencoderKL
    noise_scheduler: DDPMScheduler
    store: AttentionStore
    tokens: TokenizedPrompts


class NoiseSample(NamedTuple):
    """The random numbers of a step: eps and t, shared by both passes, and the sample of the VAE's posterior."""

    noise: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)
    posterior: torch.Tensor  # (B, C, h, w)
    prompt_noise: float = 0.0  # sigma of the prompts' noise, which has its own seeds


def sample_noise(models: Models, batch: dict, options: NoiseOptions = PLAIN_NOISE) -> NoiseSample:
    """Samples each item's numbers from its own seed, on the CPU, so that they are the same on every machine."""
    shape = (2, models.vae.config.latent_channels, *batch["mask"].shape[-2:])
    samples = []
    for seed in batch["seed"].tolist():
        generator = torch.Generator().manual_seed(seed)
        noise, posterior = torch.randn(shape, generator=generator)
        t = draw_timestep(options, models.noise_scheduler.config.num_train_timesteps, generator)
        samples.append((offset_noise(options, noise, generator), t, posterior))
    return NoiseSample(*(to_device(torch.stack(x), batch["mask"].device) for x in zip(*samples)), options.prompt_noise)


def on_device(batch: dict, device: torch.device) -> dict:
    """The batch's images and masks on `device`; numbers stay on the CPU, where they are used."""
    return {k: to_device(v, device) if v.is_floating_point() else v for k, v in batch.items()}


def encode_prompts(text_encoder: torch.nn.Module, tokens: TokenizedPrompts, rows: torch.Tensor) -> torch.Tensor:
    """(len(rows), L, D) text embeddings with gradient, each distinct prompt encoded once; `rows` on the CPU."""
    distinct, place = rows.unique(return_inverse=True)
    device = next(text_encoder.parameters()).device
    return text_encoder(to_device(tokens.input_ids[distinct], device))[0][to_device(place, device)]


def training_losses(models: Models, batch: dict, sample: NoiseSample, options: LossOptions) -> dict[str, torch.Tensor]:
    """The three losses and their total for one batch: both passes in one UNet call, on the same eps, t and x_t.

    Args:
        batch: collated items of `TrainingSamples`, their latents cached or not; images and masks on the device.

    Returns:
        loss, l_def, l_obj, l_attn, and attention_map (B, h, w).
    """
    unet, text_encoder, vae, scheduler, store, tokens = models
    mask, random_mask = batch["mask"], batch["random_mask"]  # (B, 1, h, w)
    latents = batch.get("latents") or encode_images(vae, batch["pixel_values"], [mask, random_mask])
    x_0, b_def, b_obj = latents.sample(sample.posterior, vae.config.scaling_factor)
    x_t = scheduler.add_noise(x_0, sample.noise, sample.timesteps)
    target = prediction_target(scheduler, x_0, sample.noise, sample.timesteps)

    n = len(mask)
    prompts = torch.cat([batch["defect_prompt"], batch["object_prompt"]])  # (2B,), on the CPU
    recorded = slice(n, 2 * n) if options.attention_pass == "object" else slice(0, n)
    store.record(recorded, to_device(tokens.phrase_weights[prompts[recorded]], mask.device))
    seeds = [derive_seed(seed, name) for name in PASSES for seed in batch["seed"].tolist()]
    noise_pred = unet(
        torch.cat([unet_input(x_t, mask, b_def), unet_input(x_t, random_mask, b_obj)]),  # (2B, 9, h, w)
        sample.timesteps.repeat(2),
        encoder_hidden_states=noisy_prompts(encode_prompts(text_encoder, tokens, prompts), seeds, sample.prompt_noise),
    ).sample.float()
    attention = attention_map(store.pop(), mask.shape[-2:], options.attention_map_scale)

    weights = error_weights(scheduler, sample.timesteps, options.snr_gamma, options.high_noise_power)
    if weights is not None:  # inside the square, as its root
        target, noise_pred = weights.sqrt() * target, weights.sqrt().repeat(2, 1, 1, 1) * noise_pred
    pred_def, pred_obj = noise_pred.chunk(2)
    l_def = defect_loss(target, pred_def, mask, options.loss_reduction)
    l_obj = object_loss(target, pred_obj, mask, options.background_alpha, options.loss_reduction)
    l_attn = attention_loss(attention, mask)
    loss = total_loss(l_def, l_obj, l_attn, options)
    return {"loss": loss, "l_def": l_def, "l_obj": l_obj, "l_attn": l_attn, "attention_map": attention}


LOSSES = ("loss", "l_def", "l_obj", "l_attn")
PASSES = ("defect", "object")
X0_TIMESTEPS = (999, 900, 800, 600, 400)


# ---------------------------------------------------------------------------------------------------------------------
# Measures and validation images


def collate(items: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
    return on_device(torch.utils.data.default_collate(items), device)


@torch.no_grad()
def measure(models: Models, items: Iterable[dict], options: LossOptions, device: torch.device) -> dict:
    """Losses, attention overlap and errors of x_0 over whole items at fixed timesteps, with fixed noise.

    To compare runs: every noise level weighs the same here, whatever it weighs in training.

    Returns:
        the mean of each loss, of the map's IoU with the mask and of its share inside the mask; `mask_area`, the share
        that a map without a preference would have; and `x0_error`: that of `x0_errors` by timestep, under `defect` and
        `object` for the two prompts, and the variance of x_0 inside the masks.
    """
    rows, errors, cells, options = [], [], [], options._replace(snr_gamma=None, high_noise_power=0.0)
    for item in items:
        batch = collate([item], device)
        batch["latents"] = encode_images(models.vae, batch["pixel_values"], [batch["mask"], batch["random_mask"]])
        sample = sample_noise(models, batch)
        for fifth in range(1, 5):
            t = torch.full_like(sample.timesteps, fifth * models.noise_scheduler.config.num_train_timesteps // 5)
            losses = training_losses(models, batch, sample._replace(timesteps=t), options)
            iou, share = attention_overlap(losses["attention_map"][0], batch["mask"][0, 0])
            rows.append([*(losses[k].item() for k in LOSSES), iou, share, batch["mask"].mean().item()])
        errors_here, cells_here = x0_errors(models, batch, sample)
        errors.append(errors_here), cells.append(cells_here)
    models.store.stop()
    names = (*LOSSES, "attention_iou", "attention_inside", "mask_area")
    means = {name: round(float(x), 6) for name, x in zip(names, np.mean(rows, axis=0))}
    of_prompts = torch.stack(errors).mean(dim=0).tolist()  # (2, timesteps)
    x0_error = {k: {str(t): round(x, 4) for t, x in zip(X0_TIMESTEPS, row)} for k, row in zip(PASSES, of_prompts)}
    variance = torch.cat(cells, dim=1).var(dim=1, correction=0).mean().item()
    return means | {"x0_error": x0_error | {"variance": round(variance, 4)}}


def x0_errors(models: Models, batch: dict, sample: NoiseSample) -> tuple[torch.Tensor, torch.Tensor]:
    """How well x_0 is predicted inside the mask: it decides if a defect appears, and the losses hide it.

    Args:
        batch: one item, with its latents.

    Returns:
        (2, timesteps) the mean of (x_0 - x_0_pred)^2 over the mask's cells at `X0_TIMESTEPS`, with the defect's own
        mask and the prompt of each pass; and (C, cells) x_0 there.
    """
    scheduler, mask = models.noise_scheduler, batch["mask"]
    models.store.stop()
    x_0, b_def, *_ = batch["latents"].sample(sample.posterior, models.vae.config.scaling_factor)
    inside = mask[0, 0] > 0.5
    prompts = torch.cat([batch["defect_prompt"], batch["object_prompt"]])
    embeddings = encode_prompts(models.text_encoder, models.tokens, prompts)
    errors = []
    for t in X0_TIMESTEPS:
        timesteps = torch.full_like(sample.timesteps, t)
        x_t = scheduler.add_noise(x_0, sample.noise, timesteps)
        model_input = unet_input(x_t, mask, b_def).repeat(2, 1, 1, 1)  # a row for each prompt
        prediction = models.unet(model_input, timesteps.repeat(2), encoder_hidden_states=embeddings).sample.float()
        error = (predicted_x_0(scheduler, x_t, prediction, timesteps) - x_0).square()
        errors.append(error[:, :, inside].mean(dim=(1, 2)))
    return torch.stack(errors, dim=1), x_0[0][:, inside]


@torch.no_grad()
def validation_image(
    models: Models, pipe: StableDiffusionInpaintPipeline, items: list[dict], options: LossOptions, inference_steps: int
) -> Image.Image:
    """One row for each case: good image | mask | result | the phrase's attention over the result.

    Args:
        items: like those of `TrainingSamples`, with `prompt` and a good image as `pixel_values`.
    """
    rows = []
    for item in items:
        image, mask = item["pixel_values"], item["mask"]
        models.store.stop()
        result = inpaint(pipe, image[None], mask[None], item["prompt"], [[item["seed"]]], inference_steps)[0, 0]
        size = image.shape[-1]
        pixels = upsample_mask(mask, size // mask.shape[-1])[0].numpy() > 0.5
        good = tensor_image(image)
        inpainted = composite(good, result, pixels)
        inpainted_item = {k: v for k, v in item.items() if k != "prompt"} | {
            "pixel_values": image_tensor(inpainted, size),
            "random_mask": mask,
        }
        batch = collate([inpainted_item], pipe.device)
        sample = sample_noise(models, batch)
        t = torch.full_like(sample.timesteps, models.noise_scheduler.config.num_train_timesteps // 2)
        attention = training_losses(models, batch, sample._replace(timesteps=t), options)["attention_map"][0]
        cells = [good, Image.fromarray(pixels).convert("RGB"), inpainted, heat_overlay(inpainted, attention)]
        rows.append(np.concatenate([np.asarray(cell) for cell in cells], axis=1))
    models.store.stop()
    return Image.fromarray(np.concatenate(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class PreparedTraining(NamedTuple):
    """What to train on, read and checked, before any weight is loaded."""

    base: BaseModel
    data: datasets.DatasetDict
    prompts: dict[str, PromptPair]  # by defect type
    tokenizer: CLIPTokenizer
    tokens: TokenizedPrompts
    samples: TrainingSamples
    held_out: TrainingSamples  # measured, never trained on
    validation: TrainingSamples  # references that choose a checkpoint, never trained on
    zoom: CropRule | None
    record: dict  # of the LoRA file, all but its steps
    split: dict[str, list[str]]  # image names of train and test, of all defect types
    identity: dict  # what must be the same when the run is resumed
    checkpoint: Path | None = None  # chosen once the folder is locked


class Training(NamedTuple):
    """What is trained, and what trains it."""

    models: Models  # as accelerate wrapped them
    bare_models: Models  # the same weights, not wrapped: to measure, validate and save
    parameters: dict[str, torch.nn.Parameter]  # the LoRA's, by portable name
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    failed: list[str]  # checkpoints and files that could not be written


def make_models(
    args: argparse.Namespace, prepared: PreparedTraining, dtype: torch.dtype, device: torch.device
) -> Models:
    """The base's models on `device` with fresh LoRA and recording processors."""
    unet, text_encoder, vae, noise_scheduler = load_models(prepared.base, args.cache_dir, dtype)
    set_seed(args.seed)
    add_lora(unet, text_encoder, args.rank, args.lora_alpha, args.lora_dropout, args.lora_targets, args.conv_rank)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        text_encoder.activation_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    store = record_attention(unet)  # last: xformers replaces every processor
    vae.enable_slicing()  # one image at a time: encoding needs little memory, and a latent depends on no other image
    if args.channels_last:
        unet.to(memory_format=torch.channels_last), vae.to(memory_format=torch.channels_last)
    if args.torch_compile:
        unet.compile_repeated_blocks()
    for model in (unet, text_encoder, vae):
        model.to(device)
    return Models(unet, text_encoder, vae, noise_scheduler, store, prepared.tokens)


def make_optimizer(unet, text_encoder, args: argparse.Namespace, fused: bool) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit one, over the LoRA parameters, a learning rate for each model.

    Args:
        fused: AdamW in one kernel.
    """
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    else:
        optimizer_class = functools.partial(torch.optim.AdamW, fused=fused)
    rates = {unet: args.learning_rate, text_encoder: args.text_encoder_lr}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr} for model, lr in rates.items()]
    return optimizer_class(
        groups, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, eps=args.adam_epsilon
    )


def start_training(args: argparse.Namespace, prepared: PreparedTraining, accelerator: Accelerator) -> Training:
    """Models with fresh LoRA, their optimizer and schedule of learning rates."""
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    bare_models = make_models(args, prepared, weight_dtype, accelerator.device)
    unet, text_encoder = bare_models.unet, bare_models.text_encoder
    parameters = lora_parameters(unet, text_encoder)
    # With fp16, a fused optimizer would not tell accelerate that a step was skipped.
    fused = accelerator.device.type == "cuda" and accelerator.scaler is None
    optimizer = make_optimizer(unet, text_encoder, args, fused)
    unet, text_encoder, optimizer = accelerator.prepare(unet, text_encoder, optimizer)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer.optimizer,
        num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps,
    )  # fmt: skip
    models = bare_models._replace(unet=unet, text_encoder=text_encoder)
    return Training(models, bare_models, parameters, optimizer, lr_scheduler, failed=[])


@contextmanager
def evaluating(models: Models, accelerator: Accelerator) -> Iterator[None]:
    """The trained models in eval mode (no LoRA dropout) with autocast, the VAE on the device; all as before after."""
    models.unet.eval(), models.text_encoder.eval()
    vae_device = models.vae.device
    models.vae.to(accelerator.device)
    try:
        with accelerator.autocast():
            yield
    finally:
        models.unet.train(), models.text_encoder.train()
        models.vae.to(vae_device)


def train(args: argparse.Namespace, prepared: PreparedTraining, accelerator: Accelerator, stop: StopSignal) -> None:
    """Trains, and leaves the LoRA, its card and the run record in `args.output_dir`."""
    began, device = time.time(), accelerator.device
    options, noise_options = (kind(*(getattr(args, f) for f in kind._fields)) for kind in (LossOptions, NoiseOptions))
    training = start_training(args, prepared, accelerator)
    models, bare_models, parameters, optimizer, lr_scheduler, _ = training
    samples = prepared.samples
    if prepared.zoom:
        logger.info(f"Training on {len(samples)} crops around the defects of {len(prepared.data['train'])} images")

    def measure_whole(of: TrainingSamples) -> dict | None:
        if of.crops and accelerator.is_main_process:
            with evaluating(bare_models, accelerator):
                return measure(bare_models, of.references(), options, device)

    if prepared.checkpoint:
        saved = from_main_process(lambda: checkpoints.load(prepared.checkpoint), accelerator.is_main_process)
        state = checkpoints.restore(saved, parameters, optimizer, lr_scheduler, accelerator.scaler)
        del saved
    else:
        state = {"step": 0, "before": measure_whole(samples)}
    step, before, known_size = state["step"], state["before"], state.get("train_batch_size")
    validated = state.get("validation", {})
    models.unet.train(), models.text_encoder.train()

    def try_batch(size: int) -> None:
        batch = collate([next(samples.references())] * size, device)
        training_losses(bare_models, batch, sample_noise(bare_models, batch), options)["loss"].backward()

    if args.auto_find_batch_size:
        args.train_batch_size = fit_batch_size(accelerator, try_batch, parameters, args.train_batch_size, known_size)
    accumulation = accelerator.gradient_accumulation_steps
    schedule = sampling_schedule(
        step * accumulation, args.max_train_steps * accumulation, args.train_batch_size,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    log = LossLog(args.output_dir / "losses.jsonl", step) if accelerator.is_main_process else None
    validate = make_validation(args, prepared, bare_models, options, accelerator)
    cache = LatentCache(samples, bare_models.vae, device) if args.cache_latents else None

    # The loop: one micro-batch an iteration; `step` counts optimizer steps.
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    sums, skipped, clock = torch.zeros(len(LOSSES), device=device), 0, StepClock()
    for keys, batch in load_batches(samples, schedule, args.dataloader_num_workers, stop):
        batch = cache.load(batch) if cache else on_device(batch, device)
        torch.manual_seed(derive_seed(args.seed, "dropout", *keys[0][:2]))
        sample = sample_noise(models, batch, noise_options)
        with accelerator.accumulate(models.unet, models.text_encoder):
            losses = training_losses(models, batch, sample, options)
            accelerator.backward(losses["loss"])
            models.store.pop()  # what gradient checkpointing recorded again
            sums += torch.stack([losses[k].detach() for k in LOSSES]) / accumulation
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(parameters.values(), args.max_grad_norm)
                numbers = torch.cat([accelerator.reduce(sums, "mean"), norm[None]])
                *means, norm = numbers.tolist()  # the one wait for the GPU in a step
                terms = dict(zip(LOSSES, means))
                clock.tick()
                images = [samples.crops[i].source_file for i in batch["index"].tolist()]
                stop_if_not_finite(step + 1, terms, norm, images, bool(accelerator.scaler), log, args.output_dir)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        sums.zero_()
        progress.update()
        progress.set_postfix({k: f"{v:.4f}" for k, v in terms.items()})
        terms |= {"grad_norm": norm, **dict(zip(("lr", "text_encoder_lr"), lr_scheduler.get_last_lr()))}
        if accelerator.optimizer_step_was_skipped:  # fp16: the gradient overflowed, and the loss scale was halved
            skipped += 1
            stop_if_all_skipped(step, skipped)
        else:
            skipped = 0
            lr_scheduler.step()
        logs.log_terms(accelerator, terms, step)
        if log:
            log.write({"step": step, **terms})

        stopping = stop.requested(accelerator)
        planned = step % args.checkpointing_steps == 0 or step == args.max_train_steps
        validated |= measured_at(step, measure_whole(prepared.validation) if planned else None)
        if stopping or planned:
            state, fallback = {"step": step, "before": before}, args.fallback_dir if stopping else None
            written = save(args, prepared, training, accelerator, state | {"validation": validated}, log, fallback)
            clock.interrupt()
        if stopping and step < args.max_train_steps:
            kept = checkpoints.how_to_resume(written, args.output_dir)
            logger.info(f"Stopped at step {step}; {kept}")
            logs.end_training(accelerator)
            raise stop.end(kept)
        if args.validation_steps and step % args.validation_steps == 0:
            validate(step)
            clock.interrupt()
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log.flush()
        measures = {"before": before, "after": measure_whole(samples), "held_out": measure_whole(prepared.held_out)}
        measures["validation"] = validation_record(prepared.validation.crops, validated)
        measures |= log.summary() | {"speed": clock.summary(device), "gradient_accumulation_steps": accumulation}
        training.failed.extend([] if log.complete else [log.path.name])
        with checkpoints.last_save(args.output_dir):
            finish(args, prepared, training, accelerator, measures, time.time() - began)
    accelerator.wait_for_everyone()  # none leaves the group, or takes its launcher along, before all is pushed
    logs.end_training(accelerator)


def save(
    args, prepared: PreparedTraining, training: Training, accelerator: Accelerator, state: dict, log: LossLog | None,
    fallback: Path | None,
) -> Path | None:  # fmt: skip
    """Writes losses and a checkpoint of `state` on the main process; returns it, None if it could not be written."""

    def write() -> Path | None:
        log.flush()
        return checkpoints.save_checkpoint(
            args.output_dir, state | {"identity": prepared.identity, "train_batch_size": args.train_batch_size},
            lambda to: write_lora(to / LORA_FILE, training.bare_models, prepared.record | {"steps": state["step"]}),
            training.parameters, training.optimizer, training.lr_scheduler, accelerator.scaler,
            args.checkpoints_total_limit, fallback, best_step(state["validation"]),
        )  # fmt: skip

    written = from_main_process(write, accelerator.is_main_process)
    training.failed.extend([] if written else [f"checkpoint-{state['step']}"])
    return written


def write_lora(path: Path, models: Models, record: dict) -> None:
    """Writes the LoRA file atomically."""
    with atomic_write(path) as temporary:
        save_lora(temporary, models.unet, models.text_encoder, record)


def make_validation(
    args, prepared: PreparedTraining, models: Models, options: LossOptions, accelerator: Accelerator
) -> Callable:
    """The function that makes the validation image of a step, for the disk and the trackers."""
    folder = args.output_dir / "validation"
    pipe, items = make_pipeline(prepared, models), []
    if args.validation_steps and accelerator.is_main_process:
        items = prepared.samples.validation_items(prepared.data.get("good"), args.num_validation_images)

    def validate(step: int) -> None:
        what = f"The validation image of step {step}"
        if accelerator.is_main_process:
            with left_out_if_out_of_memory(what), disks.left_out_if_unwritable(what, args.output_dir):
                folder.mkdir(exist_ok=True)
                with evaluating(models, accelerator):
                    image = validation_image(models, pipe, items, options, args.validation_inference_steps)
                save_image(image, folder / f"step-{step:06d}.png")
                logs.log_image(accelerator.trackers, image, step)
        accelerator.wait_for_everyone()

    return validate


def make_pipeline(prepared: PreparedTraining, models: Models) -> StableDiffusionInpaintPipeline:
    """The models as a pipeline with DDIM; nothing is copied or cast."""
    scheduler = ddim(models.noise_scheduler)
    return assemble_pipeline(models.unet, models.text_encoder, models.vae, scheduler, prepared.tokenizer)


def finish(
    args, prepared: PreparedTraining, training: Training, accelerator: Accelerator, measures: dict, seconds: float
) -> None:
    """Saves the LoRA, card and run record, checks that diffusers loads the LoRA as it was trained, pushes."""
    models, record = training.bare_models, prepared.record | {"steps": args.max_train_steps}
    batch_size = args.train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    results = run_record(vars(args), prepared.identity, prepared.data) | measures | {"seconds": round(seconds, 1)}

    def write(folder: Path) -> None:
        write_lora(folder / LORA_FILE, models, record)
        write_model_card(folder, record, measures, len(prepared.data["train"]), batch_size, args.hub_model_id)
        write_json(folder / "run_record.json", results)

    folder, failure = disks.write_or_fall_back(write, args.output_dir, args.fallback_dir)
    reload_and_compare(make_pipeline(prepared, models), folder / LORA_FILE)
    logs.log_measures(measures)
    logger.info(f"LoRA saved in {folder}, reloaded and compared")
    if args.push_to_hub:
        push(folder, args.hub_model_id, args.push_timeout)
        logger.info(f"Pushed to {args.hub_model_id}")
    checkpoints.check_complete(args.output_dir, folder, failure, training.failed, args.checkpoints_total_limit)


# ---------------------------------------------------------------------------------------------------------------------
# The command

# Options that must not change when a run resumes; they are also all that is logged to a tracker.
IDENTITY = (
    "resolution", "max_resize_scale", "center_crop", "cache_latents", *LossOptions._fields, *NoiseOptions._fields,
    "num_random_boxes", "rank", "lora_alpha", "lora_targets", "conv_rank", "lora_dropout", "seed", "train_batch_size",
    "auto_find_batch_size", "gradient_accumulation_steps", "learning_rate", "text_encoder_lr", "lr_scheduler",
    "lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm", "allow_tf32", "channels_last", "torch_compile",
)  # fmt: skip


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return parse_training_args("\n\n".join(__doc__.split("\n\n")[:2]), input_args)  # what it is, and an example


def read_data(args: argparse.Namespace, accelerator: Accelerator) -> datasets.DatasetDict:
    """The dataset of the flags, all its defect types."""
    with accelerator.main_process_first():
        if args.train_data_dir:
            return load_defect_pairs(
                args.train_data_dir, args.object, args.split, args.cache_dir, args.layout, args.mask_classes,
                args.skip_problems,
            )  # fmt: skip
        return load_prepared(args.dataset_name, args.dataset_config_name, args.object, args.cache_dir)


def check_images(args: argparse.Namespace, data: datasets.DatasetDict, base: BaseModel) -> None:
    """Opens every image and mask that training and validation will use; logs warnings.

    Raises:
        InputError: all problems of the images and masks.
    """
    shown = args.num_validation_images if args.validation_steps and "good" in data else 0
    used = [data["train"], held_out_rows(data), *([data["good"].take(min(shown, len(data["good"])))] if shown else [])]
    grid = args.resolution // base.vae_scale_factor
    for note in check_pairs(*used, resolution=args.resolution, grid=grid, of_folder=bool(args.train_data_dir)):
        logger.warning("%s", note)


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> PreparedTraining:
    """Reads and checks everything that can be wrong, before a weight is loaded."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        what = "needs a GPU, and none is available"
        raise InputError(Problem("DF189", "--mixed_precision fp16", what, "use bf16 or no"))
    every_type = read_data(args, accelerator)
    data = select_defects(every_type, args.defect or single_types(defect_types(every_type)))
    base = read_base(args.pretrained_model_name_or_path, args.revision, args.cache_dir, args.variant)
    check_resolution(base, args.resolution)
    check_images(args, data, base)
    data = validation_split(data, args.validation_defects)
    zoom = choose_crop_rule(args.zoom, args.zoom_context, args.zoom_min_area, map(binarise, data["train"]["mask"]))
    object_words = args.object_words or to_words(data["train"]["object"][0])
    defects = sorted(data["train"].unique("defect"))
    prompts = build_prompts(defects, object_words, args.phrase, args.defect_prompt, args.object_prompt)
    tokenizer = load_tokenizer(base, args.cache_dir)
    tokens = tokenize_prompts(tokenizer, prompts.values())
    others = other_types(every_type["train"], data["train"]) if zoom else None
    identity = {name: getattr(args, name) for name in IDENTITY} | {
        "base": base.name,
        "base_sha256": base.digest,
        "revision": base.revision,
        "variant": args.variant,
        "data_sha256": data_digest(data["train"]),
        "prompts": {defect: [pair.defect.text, pair.object.text] for defect, pair in prompts.items()},
        "zoom": zoom and zoom._asdict(),
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    for name, rows in {"other_types": others, "validation_defects": data.get("validation_defects")}.items():
        if rows:
            identity[f"{name}_sha256"] = data_digest(rows)
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps  # the schedule's length
    check_same(identity)
    check = functools.partial(checkpoints.check_unoccupied, args.output_dir, args.resume_from_checkpoint)
    from_main_process(check, accelerator.is_main_process)
    measured = [
        TrainingSamples(
            rows, prompts, tokens, args.resolution, base.vae_scale_factor, args.seed,
            args.max_resize_scale, args.center_crop, args.num_random_boxes, zoom, others, args.cache_latents,
        ) for rows in (data["train"], held_out_rows(data), data.get("validation_defects", data["train"].select([])))
    ]  # fmt: skip
    record = lora_record(
        base, object_words, prompts, args.push_to_hub, appearance=statistics_by_defect(measured[0]),
        resolution=args.resolution, zoom=identity["zoom"], rank=args.rank, alpha=args.lora_alpha,
        lora_targets=args.lora_targets, conv_rank=args.conv_rank, seed=args.seed,
    )  # fmt: skip
    split = split_names(every_type)
    return PreparedTraining(base, data, prompts, tokenizer, tokens, *measured, zoom, record, split, identity)


def start_run(args: argparse.Namespace, prepared: PreparedTraining, accelerator: Accelerator) -> Path | None:
    """Writes run record and split, tidies up after an earlier start, starts the trackers; what to resume, if any."""
    checkpoint = checkpoints.find_resume(
        args.output_dir, args.resume_from_checkpoint, prepared.identity, args.max_train_steps
    )
    if args.push_to_hub:
        name = args.output_dir.resolve().name
        args.hub_model_id = check_hub(args.hub_model_id, args.hub_public, name, args.push_timeout)
    clear_leftovers(args.output_dir)
    done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    checkpoints.archive_newer_checkpoints(args.output_dir, done)
    matrices = lora_sizes(prepared.base, args.rank, args.lora_targets, args.conv_rank)
    check_space(
        args.output_dir, matrices, args.use_8bit_adam, range(done, args.max_train_steps), args.checkpointing_steps,
        args.checkpoints_total_limit, args.validation_steps, 4 * args.resolution**2 * args.num_validation_images,
    )  # fmt: skip
    write_json(args.output_dir / "run_record.json", run_record(vars(args), prepared.identity, prepared.data))
    write_json(args.output_dir / "split.json", prepared.split)
    options = {k: v for k, v in prepared.identity.items() if k in IDENTITY}
    logs.start_trackers(accelerator, args.output_dir / args.logging_dir, options)
    return checkpoint


def main(args: argparse.Namespace) -> None:
    check_training_args(args)
    check_launch(training=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        # The other processes wait while the first measures, validates, saves and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2, seconds=args.push_timeout))],
    )
    logs.start_logging(accelerator)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    for line in launch_notes(args.gradient_accumulation_steps, args.mixed_precision, accelerator):
        logger.warning(line)
    prepared = prepare(args, accelerator)
    stop, start = StopSignal(), functools.partial(start_run, args, prepared, accelerator)
    told = disks.told_if_unwritable(args.output_dir, "make room on the disk, and start again")
    with locked_start(args.output_dir, told(start), accelerator.is_main_process) as checkpoint:
        train(args, prepared._replace(checkpoint=checkpoint), accelerator, stop)


def command() -> None:
    exit_on_input_error(told_if_out_of_memory(TRAINING_NEEDS_LESS)(lambda: main(parse_args())))


if __name__ == "__main__":
    command()
