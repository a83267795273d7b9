"""A small random base model, what training makes of it, and training samples of its size."""

import dataclasses

import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler

import train_defectfill as t
from defectfill.drawn.small_base import WORDS, Sizes, build_pipeline
from defectfill.lora import lora_parameters
from defectfill.random_base import make_tokenizer
from defectfill_dataset import TrainingSamples, build_prompts, tokenize_prompts


RESOLUTION = 32
GRID = RESOLUTION // 4  # cells of the latent grid
TOY = Sizes(
    resolution=RESOLUTION, vae_channels=(8, 16, 16), unet_channels=(16, 32, 32), attention=(True, True, False),
    head=16, text_width=32, context=77,
)  # fmt: skip


def toy_pipeline(**changes):
    """A small random pipeline: 32 px, 8 x 8 latents, decoder attention at 8 and 4."""
    set_seed(0)
    return build_pipeline(dataclasses.replace(TOY, **changes))


def make_samples(dataset, **options) -> TrainingSamples:
    prompts = build_prompts(sorted(dataset.unique("defect")), "nut", "{defect}")
    tokens = tokenize_prompts(make_tokenizer(WORDS), prompts.values())
    arguments = dict(resolution=RESOLUTION, vae_scale_factor=4, seed=0) | options
    return TrainingSamples(dataset, prompts, tokens, **arguments), prompts, tokens


def make_models(lora: bool = True, targets: str = "attention", **changes) -> t.Models:
    pipe = toy_pipeline(**changes)
    tokens = tokenize_prompts(pipe.tokenizer, build_prompts(["hole"], "nut", "{defect} scratch").values())
    if lora:
        t.add_lora(pipe.unet, pipe.text_encoder, rank=4, alpha=8, dropout=0.0, targets=targets)
        for parameter in lora_parameters(pipe.unet, pipe.text_encoder).values():
            torch.nn.init.normal_(parameter, std=0.1)  # B starts at 0, which would hide half of the gradients
    store = t.record_attention(pipe.unet)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return t.Models(pipe.unet, pipe.text_encoder, pipe.vae.requires_grad_(False), scheduler, store, tokens)


def make_batch(n: int = 2, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    mask, random_mask = torch.zeros(2, n, 1, GRID, GRID)
    for i in range(n):
        mask[i, :, i : i + 3, 2 : 4 + i] = 1
        random_mask[i, :, 4:7, i : i + 4] = 1
    return {
        "pixel_values": torch.rand(n, 3, RESOLUTION, RESOLUTION, generator=generator) * 2 - 1,
        "mask": mask,
        "random_mask": random_mask,
        "defect_prompt": torch.zeros(n, dtype=torch.long),
        "object_prompt": torch.ones(n, dtype=torch.long),
        "seed": torch.arange(n) + 1000 * seed,
    }


class Prediction:
    """What a UNet returns."""

    def __init__(self, sample: torch.Tensor):
        self.sample = sample
