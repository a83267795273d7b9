"""How good generated images of drawn parts are, as a segmenter sees it.

Shapes: B images, R side. Images are in [-1, 1], masks 1 inside the defect.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel


@torch.no_grad()
def segment(unet: UNet2DModel, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, R, R) bool: where the segmenter sees a defect."""
    return torch.cat([unet(batch, 0).sample > 0 for batch in images.split(16)])


def iou(found: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B,) intersection over union of (B, 1, R, R) masks; 1 where both are empty."""
    found, masks = found > 0.5, masks > 0.5
    union = (found | masks).flatten(1).sum(1)
    return torch.where(union > 0, (found & masks).flatten(1).sum(1) / union.clamp(min=1), 1.0)


@torch.no_grad()
def defect_features(segmenter: UNet2DModel, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B, C): the segmenter's encoder features, each of unit length over its channels, averaged inside the mask.

    The form of LPIPS (Zhang et al., CVPR 2018) with another network; what is compared is the kind of defect, not its
    place.
    """
    levels: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: levels.append(out[0])) for block in segmenter.down_blocks]
    segmenter(images, 0)
    for hook in hooks:
        hook.remove()
    pooled = []
    for level in levels:
        weights = F.adaptive_avg_pool2d(masks, level.shape[-2:])
        pooled.append((F.normalize(level, dim=1) * weights).sum((2, 3)) / weights.sum((2, 3)))
    return torch.cat(pooled, dim=1)


def figures_of(segmenter: UNet2DModel, images: torch.Tensor, masks: torch.Tensor, real: torch.Tensor) -> dict:
    """Metrics of (B, 3, R, R) images with (B, 1, R, R) target masks; `real` (n, C) are features of real defects."""
    each = iou(segment(segmenter, images), masks)
    distance = torch.cdist(defect_features(segmenter, images, masks), real).min(dim=1).values
    return {
        "segmenter_iou": each.mean().item(),
        "found": (each > 0.3).float().mean().item(),
        "distance": distance.mean().item(),
    }
