"""What the frozen VAE makes of training images: encoding, and a cache of augmented variants.

Shapes: B samples, C latent channels, h x w the latent grid, H x W pixels, J sets of random boxes of a variant.
Masks are 1 inside the defect; images are in [-1, 1].
"""

import logging
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL

from defectfill_dataset import TrainingSamples, upsample_mask


logger = logging.getLogger(__name__)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; on CUDA nothing waits for the work that is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class ImageLatents(NamedTuple):
    """The VAE's posterior of each clean image, and its mode for the image with each mask cut out; not yet scaled."""

    mean: torch.Tensor  # (B, C, h, w)
    std: torch.Tensor  # (B, C, h, w)
    masked: tuple[torch.Tensor, ...]  # (B, C, h, w) for each mask

    def sample(self, posterior: torch.Tensor, scaling_factor: float) -> list[torch.Tensor]:
        """[x_0, b of each mask], (B, C, h, w) each: x_0 is a sample, as in diffusers; each b a mode, as in generation.

        Args:
            posterior: (B, C, h, w) of standard normal noise.
        """
        return [x * scaling_factor for x in (self.mean + self.std * posterior, *self.masked)]


def encode_images(vae: AutoencoderKL, pixel_values: torch.Tensor, masks: list[torch.Tensor]) -> ImageLatents:
    """Encodes the clean images and the clean images with each mask cut out, in one call of the VAE.

    Args:
        pixel_values: (B, 3, H, W) in [-1, 1]; what is cut out becomes 0, grey.
        masks: (B, 1, h, w) each; the pixels cut out are those their cells cover.
    """
    factor = pixel_values.shape[-1] // masks[0].shape[-1]
    images = torch.cat([pixel_values, *(pixel_values * (1 - upsample_mask(mask, factor)) for mask in masks)])
    latents = vae.encode(images.to(vae.dtype)).latent_dist
    mean, *masked = latents.mean.float().chunk(1 + len(masks))
    return ImageLatents(mean, latents.std[: len(pixel_values)].float(), tuple(masked))


class Entry(NamedTuple):
    """A cached variant, in the VAE's own precision, which loses no bit."""

    latents: torch.Tensor  # (3 + J, C, h, w): mean and std of the image, mode without the defect, J without boxes
    masks: torch.Tensor  # (1 + J, 1, h, w): the defect, J sets of boxes


class LatentCache:
    """The latents of the variants that `samples` draws, encoded when one is first drawn, then kept on `device`.

    An entry depends on its variant alone, not on the batch that asked for it: a resumed run encodes again what it
    draws, and stays bit-equal. Once every variant is there, the VAE goes to the CPU.

    Args:
        samples: with `variants` of at least 1.
        vae: frozen, on `device`, and slicing.
    """

    def __init__(self, samples: TrainingSamples, vae: AutoencoderKL, device: torch.device):
        self.samples, self.vae, self.device = samples, vae, device
        self.entries: dict[tuple[int, int], Entry] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(tensor.nbytes for entry in self.entries.values() for tensor in entry)

    def load(self, batch: dict) -> dict:
        """`batch`, collated items of `samples`, with `mask` and `random_mask` (B, 1, h, w) and `latents`."""
        names = zip(*(batch[k].tolist() for k in ("index", "variant", "boxes")))
        rows = [(self._entry(index, variant), boxes) for index, variant, boxes in names]
        picked = [[entry.latents[i] for i in (0, 1, 2, 3 + boxes)] for entry, boxes in rows]
        mean, std, b_def, b_obj = (torch.stack(column).float() for column in zip(*picked))
        mask = torch.stack([entry.masks[0] for entry, _ in rows]).float()
        random_mask = torch.stack([entry.masks[1 + boxes] for entry, boxes in rows]).float()
        latents = ImageLatents(mean, std, (b_def, b_obj))
        return batch | {"mask": mask, "random_mask": random_mask, "latents": latents}

    def _entry(self, index: int, variant: int) -> Entry:
        if (index, variant) not in self.entries:
            self.entries[index, variant] = self._encode(index, variant)
            if len(self.entries) == len(self.samples) * self.samples.variants:
                self.vae.to("cpu")
                logger.info(f"Latents of all {len(self.entries)} variants are cached: {self.nbytes / 2**20:.0f} MiB")
        return self.entries[index, variant]

    @torch.no_grad()
    def _encode(self, index: int, variant: int) -> Entry:
        pixel_values, mask, random_masks = (to_device(x, self.device) for x in self.samples.variant(index, variant))
        masks = torch.cat([mask[None], random_masks])
        encoded = encode_images(self.vae, pixel_values[None], list(masks.split(1)))
        latents = torch.cat([encoded.mean, encoded.std, *encoded.masked])
        return Entry(latents.to(self.vae.dtype), masks.to(self.vae.dtype))
