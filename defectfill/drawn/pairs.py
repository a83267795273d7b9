"""Drawn pairs of image and mask as tensors.

Shapes: B images, R side. Images are in [-1, 1], masks 1 inside the defect.
"""

import numpy as np
import torch
from tqdm.auto import tqdm

from defectfill_dataset import pool_mask

from .parts import PARTS, render


KINDS = [(part, defect) for part, (_, defects) in PARTS.items() for defect in defects]


def drawn_pairs(kinds: list, number: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`number` pairs of each (part, defect), defect None for good parts: (n, 3, R, R) in [-1, 1], (n, 1, R, R)."""
    images, masks = [], []
    for part, defect in tqdm([kind for kind in kinds for _ in range(number)], desc="Pictures"):
        image, mask = render(part, defect, size, (seed, len(images)))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
        masks.append(torch.from_numpy(np.array(mask))[None] / 255 if mask else torch.zeros(1, size, size))
    return torch.stack(images), torch.stack(masks)


def latent_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 1, size, size): which cells of the latent grid (B, 1, R, R) masks touch."""
    return torch.stack([pool_mask(mask[0].numpy() > 0.5, size) for mask in masks])
