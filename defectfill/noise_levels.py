"""Noise levels: how often each is drawn, how much its error counts, and the x_0 that a prediction means; prompt noise.

Options and spellings are those of diffusers' training scripts. The defaults change nothing.

Shapes: B samples, h x w the latent grid, L prompt tokens, D width of the text embedding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from defectfill_dataset import derive_seed


class NoiseOptions(NamedTuple):
    """How noise and timesteps are drawn, and the noise of the text embeddings."""

    noise_offset: float = 0.0
    timestep_bias_strategy: str = "none"  # or "earlier", "later", "range"
    timestep_bias_multiplier: float = 1.0
    timestep_bias_begin: int = 0
    timestep_bias_end: int = 1000
    timestep_bias_portion: float = 0.25
    prompt_noise: float = 0.0


PLAIN_NOISE = NoiseOptions()


def timestep_weights(options: NoiseOptions, num_train_timesteps: int) -> torch.Tensor:
    """(num_train_timesteps,) how often each timestep is drawn: 1, or the multiplier in the favoured part."""
    weights = torch.ones(num_train_timesteps)
    part = int(options.timestep_bias_portion * num_train_timesteps)
    favoured = {
        "none": slice(0),
        "earlier": slice(part),
        "later": slice(num_train_timesteps - part, None),
        "range": slice(options.timestep_bias_begin, options.timestep_bias_end),
    }[options.timestep_bias_strategy]
    weights[favoured] *= options.timestep_bias_multiplier
    return weights


def draw_timestep(options: NoiseOptions, num_train_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """One timestep, ()."""
    if options.timestep_bias_strategy == "none":
        return torch.randint(0, num_train_timesteps, (), generator=generator)
    return torch.multinomial(timestep_weights(options, num_train_timesteps), 1, generator=generator)[0]


def offset_noise(options: NoiseOptions, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise (C, h, w) shifted by a random value in each channel: it teaches what is darker or lighter as a whole."""
    if not options.noise_offset:
        return noise
    return noise + options.noise_offset * torch.randn(len(noise), 1, 1, generator=generator)


def noisy_prompts(embeddings: torch.Tensor, seeds: Sequence[int], sigma: float) -> torch.Tensor:
    """Text embeddings (B, L, D) with Gaussian noise, so that one prompt stands for a range of defects.

    Args:
        embeddings: a row for each seed, or one for all.
        seeds: B, each of its own row's noise, whatever the batch.
        sigma: standard deviation of the noise, over that of the row's embedding.
    """
    if not sigma:
        return embeddings
    generators = [torch.Generator().manual_seed(derive_seed(seed, "prompt_noise")) for seed in seeds]
    noise = torch.stack([torch.randn(embeddings.shape[1:], generator=generator) for generator in generators])
    scale = sigma * embeddings.detach().std(dim=(1, 2), keepdim=True)
    return embeddings + scale * noise.to(embeddings.device, embeddings.dtype, non_blocking=True)


SMALLEST_ALPHA_BAR = 1e-3  # for bases whose last timestep is pure noise, where alpha_bar is 0


def error_weights(
    scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float | None, high_noise_power: float
) -> torch.Tensor | None:
    """(B, 1, 1, 1) how much the squared error at each timestep counts; None if all count the same.

    Args:
        timesteps: (B,).
        snr_gamma: min-SNR weighting (arXiv 2303.09556): min(SNR, gamma) / SNR for a prediction of the noise,
            min(SNR, gamma) / (SNR + 1) for one of the velocity.
        high_noise_power: (1 / alpha_bar)^power, divided by its mean over all timesteps. In the error of the
            noise, that of x_0 counts alpha_bar / (1 - alpha_bar): hardly at all at high noise.
    """
    if snr_gamma is None and not high_noise_power:
        return None
    weights = torch.ones_like(timesteps, dtype=torch.float32)
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        weights *= snr.clamp(max=snr_gamma) / (snr + 1) if velocity else (snr_gamma / snr).clamp(max=1)
    if high_noise_power:
        powers = scheduler.alphas_cumprod.clamp_min(SMALLEST_ALPHA_BAR) ** -high_noise_power
        weights *= (powers / powers.mean()).to(timesteps.device)[timesteps]
    return weights[:, None, None, None]


def prediction_target(
    scheduler: DDPMScheduler, x_0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet is to predict, (B, C, h, w): the noise, or the velocity."""
    velocity = scheduler.config.prediction_type == "v_prediction"
    return scheduler.get_velocity(x_0, noise, timesteps) if velocity else noise


def predicted_x_0(
    scheduler: DDPMScheduler, x_t: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_0 (B, C, h, w) from the predicted noise, or from the predicted velocity."""
    alpha_bar = scheduler.alphas_cumprod.to(x_t.device)[timesteps][:, None, None, None]
    if scheduler.config.prediction_type == "v_prediction":
        return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * prediction
    return (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
