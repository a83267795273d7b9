"""Sampling: inpainting with the background kept (section 3.4), schedulers, the pipeline, the composite.

Shapes: P images, N candidates of each, B candidates in one UNet call, S side of the square the model works on,
G = S // vae_scale_factor cells a side of the latent grid, H x W an image's own size.
Masks are 1 inside the defect.

Source: Song et al., DefectFill, CVPR 2025, arXiv 2503.13985, section 3.4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from defectfill_dataset import tensor_image, upsample_mask

from .base_model import BaseModel, load_models, load_tokenizer
from .latents import encode_images
from .memory import in_batches
from .noise_levels import noisy_prompts


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting


class Conditions(NamedTuple):
    """What the UNet is given of each image; in a batch, a row for each candidate."""

    images: torch.Tensor  # (P, 3, S, S) in [-1, 1]
    pixel_masks: torch.Tensor  # (P, 1, S, S)
    latent_masks: torch.Tensor  # (P, 1, G, G)
    clean_latents: torch.Tensor  # (P, 4, G, G), of the images
    masked_latents: torch.Tensor  # (P, 4, G, G), of the images with the mask cut out


@torch.no_grad()
def inpaint(
    pipe: StableDiffusionInpaintPipeline,
    images: torch.Tensor,
    latent_masks: torch.Tensor,
    prompt: str,
    seeds: Sequence[Sequence[int]],
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    prompt_noise: float = 0.0,
) -> torch.Tensor:
    """(P, N, 3, S, S) candidates in [0, 1], one for each seed: a candidate depends on its own seed, not on its batch.

    Args:
        images: (P, 3, S, S) in [-1, 1], defect-free.
        latent_masks: (P, 1, G, G), 1 where the defect goes.
        seeds: of the initial noise, N for each image.
        batch_size: candidates per UNet call, of one image or of several; all by default, fewer if memory is short.
        guidance_interval: step i is guided where start <= i / num_inference_steps < end (Kynkäänniemi et al., Limited
            Interval Guidance, NeurIPS 2024); in the other steps the UNet runs once a candidate.
        prompt_noise: sigma of `noisy_prompts`, for each candidate's prompt by its own seed.
    """
    conditions = make_conditions(pipe, images, latent_masks)
    positive, negative = pipe.encode_prompt(prompt, pipe.device, 1, guidance_scale > 1)
    start, end = guidance_interval
    scales = [guidance_scale if start <= i / num_inference_steps < end else 1 for i in range(num_inference_steps + 1)]
    rows = [(place, seed) for place, seeds_of_image in enumerate(seeds) for seed in seeds_of_image]

    def inpaint_rows(batch: Sequence[tuple[int, int]]) -> torch.Tensor:
        places = torch.tensor([place for place, _ in batch], device=pipe.device)
        of_batch = Conditions(*(tensor[places] for tensor in conditions))
        seeds = [seed for _, seed in batch]
        prompts = noisy_prompts(positive, seeds, prompt_noise), negative
        return inpaint_batch(pipe, of_batch, prompts, seeds, scales)

    candidates = in_batches(inpaint_rows, rows, batch_size or len(rows))
    return torch.cat(candidates).unflatten(0, (len(seeds), -1))


def make_conditions(
    pipe: StableDiffusionInpaintPipeline, images: torch.Tensor, latent_masks: torch.Tensor
) -> Conditions:
    """The conditions of (P, 3, S, S) images in [-1, 1] and (P, 1, G, G) masks, on the pipeline's device."""
    images, latent_masks = (x.to(pipe.device, pipe.vae.dtype) for x in (images, latent_masks))
    encoded = encode_images(pipe.vae, images, [latent_masks])
    # The mode, not a sample: a sample would take its noise from one candidate's seed and give it to all.
    latents = (x.to(images.dtype) * pipe.vae.config.scaling_factor for x in (encoded.mean, *encoded.masked))
    return Conditions(images, upsample_mask(latent_masks, pipe.vae_scale_factor), latent_masks, *latents)


def inpaint_batch(
    pipe: StableDiffusionInpaintPipeline,
    conditions: Conditions,
    prompts: tuple[torch.Tensor, torch.Tensor | None],
    seeds: Sequence[int],
    guidance_scales: Sequence[float],
) -> torch.Tensor:
    """(B, 3, S, S) candidates in [0, 1].

    Outside the mask each step's latent is replaced by the clean image's, diffused to the noise level of the next
    step (section 3.4); after the last step it is the clean image's own.

    Args:
        conditions: B rows.
        prompts: (1 or B, L, D) positive and (1, L, D) negative embeddings; no negative one where no step is guided.
        guidance_scales: of each step, and one more that is not used; 1 is unguided.
    """
    images, pixel_masks, latent_masks, clean, masked = conditions
    positive, negative = (None if x is None else x.expand(len(seeds), -1, -1).contiguous() for x in prompts)
    texts = {1: positive, 2: positive if negative is None else torch.cat([negative, positive])}
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
    noise = noise.to(clean.device, clean.dtype)
    given = {  # to the UNet beside the latents, unguided and guided
        copies: {
            "prompt_embeds": texts[copies],
            "mask": latent_masks.repeat(copies, 1, 1, 1),
            "masked_image_latents": masked.repeat(copies, 1, 1, 1),
        }
        for copies in (1, 2)
    }

    def keep_background(pipe, step, timestep, tensors):
        following = pipe.scheduler.timesteps[step + 1 : step + 2]
        background = pipe.scheduler.add_noise(clean, noise, following) if len(following) else clean
        pipe._guidance_scale = guidance_scales[step + 1]
        latents = torch.where(latent_masks > 0.5, tensors["latents"], background)
        return {"latents": latents, **given[1 + pipe.do_classifier_free_guidance]}  # asked anew at every step

    return pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        image=images / 2 + 0.5,
        mask_image=pixel_masks,
        masked_image_latents=masked,
        latents=noise,
        height=images.shape[-2],
        width=images.shape[-1],
        num_inference_steps=len(guidance_scales) - 1,
        guidance_scale=guidance_scales[0],
        callback_on_step_end=keep_background,
        output_type="pt",
    ).images.float()


@torch.no_grad()
def reconstruct(pipe: StableDiffusionInpaintPipeline, images: torch.Tensor) -> torch.Tensor:
    """(P, 3, S, S) in [0, 1]: the VAE's reconstruction of images (P, 3, S, S) in [-1, 1]."""
    latents = pipe.vae.encode(images.to(pipe.device, pipe.vae.dtype)).latent_dist.mode()
    return (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def fit(candidate: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A (3, S, S) candidate in [0, 1] at the `size` (W, H) of its crop."""
    return tensor_image(candidate * 2 - 1).resize(size, Image.Resampling.BICUBIC)


def composite(image: Image.Image, candidate: torch.Tensor, alpha: np.ndarray) -> Image.Image:
    """The candidate, (3, S, S) in [0, 1], blended into the image; where alpha is 0 every pixel is the image's own.

    Args:
        alpha: (H, W) in 0..255, or a bool mask of the candidate's pixels.
    """
    return Image.composite(fit(candidate, image.size), image, Image.fromarray(alpha).convert("L"))


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline and schedulers


class DDIM(DDIMScheduler):
    """DDIM whose steps, taken in their order, never wait for the device.

    Given a timestep that is on the device, `DDIMScheduler` fetches its number three times a step.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self._timesteps_left = self.timesteps.tolist()

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True):
        return super().step(model_output, self._timesteps_left.pop(0), sample, return_dict=return_dict)


def ddim(scheduler) -> DDIM:
    """DDIM with the noise schedule of `scheduler`; latents have no fixed range, so nothing is clipped."""
    return DDIM.from_config(scheduler.config, clip_sample=False)


# Each makes a scheduler with the noise schedule of another.
SCHEDULERS = {
    "ddim": ddim,
    "dpmsolver++": lambda scheduler: DPMSolverMultistepScheduler.from_config(scheduler.config),
    "unipc": lambda scheduler: UniPCMultistepScheduler.from_config(scheduler.config),
}


def assemble_pipeline(unet, text_encoder, vae, scheduler, tokenizer) -> StableDiffusionInpaintPipeline:
    """The models, not copied, as a pipeline without a safety checker, which blackens what it takes for wounds."""
    pipe = StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(
    base: BaseModel,
    cache_dir: str | None,
    precision: str,
    device: torch.device,
    scheduler: str = "ddim",
    channels_last: bool = False,
) -> StableDiffusionInpaintPipeline:
    """The base's pipeline with one of `SCHEDULERS`.

    Args:
        precision: "no", "fp16" or "bf16", of the whole model.
        channels_last: the memory layout of UNet and VAE.

    Raises:
        InputError: the weights cannot be loaded (DF182), or do not match the configuration (DF179).
    """
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipe = assemble_pipeline(*load_models(base, cache_dir, dtype), load_tokenizer(base, cache_dir)).to(device)
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.vae.enable_slicing()
    return pipe


# What `compile_unet` may compile.
COMPILED = ("blocks", "unet")


def compile_unet(pipe: StableDiffusionInpaintPipeline, part: str, backend: str = "inductor") -> None:
    """Compiles the UNet in place, when it is first called: its transformer `blocks`, or the whole `unet`."""
    if part == "blocks":
        pipe.unet.compile_repeated_blocks(backend=backend)
    else:
        pipe.unet.compile(backend=backend)
