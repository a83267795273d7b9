"""Quality of generated images: KID, IC-LPIPS, nearest neighbours. All in the features of a network given by name.

Shapes: N, M images, S side, F features. Images are in [-1, 1]; masks are 1 inside the defect.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from defectfill_dataset import CropRule, crop_boxes, crop_mask, image_tensor, pool_mask

from ..likeness import FeatureNet, describe_defects, read_squeezenet, read_weights, squeezenet_features
from ..memory import in_batches


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Networks

# What a network is called in every report: a figure of one is not comparable with a figure of another.
NETWORKS = {"squeezenet": "SqueezeNet 1.0 (torchvision)", "inception": "Inception v3 (torchvision)"}

# The blocks of Inception v3 whose outputs are taken: the last ones before each change of size, and the last of all.
INCEPTION_LEVELS = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")
INCEPTION_SIDE = 299  # pixels

IMAGES_AT_ONCE = 16
NUMBERS_AT_ONCE = 100_000_000  # of all levels, on either side of a block of distances: 400 MB


def inception_features(file: Path, device: torch.device, flag: str) -> FeatureNet:
    """`INCEPTION_LEVELS` of images, which are first resized to 299 px, from a safetensors file of torchvision's.

    Raises:
        InputError: the file cannot be read, or holds something else (DF347).
    """
    from torchvision.models import inception_v3  # not at the top: it takes long

    model = read_weights(inception_v3(weights=None, init_weights=False), "inception_v3", file, flag)
    model = model.to(device).eval().requires_grad_(False)
    blocks = [(name, block) for name, block in model.named_children() if name not in ("AuxLogits", "avgpool")]
    blocks = blocks[: [name for name, _ in blocks].index(INCEPTION_LEVELS[-1]) + 1]

    def levels(images: torch.Tensor) -> list[torch.Tensor]:
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        x, maps = F.interpolate(images.to(device), size, mode="bilinear", antialias=True), []
        for name, block in blocks:
            x = block(x)
            if name in INCEPTION_LEVELS:
                maps.append(x)
        return maps

    return levels


class Features:
    """What a network sees in images.

    Args:
        network: squeezenet or inception.
        file: its weights, a safetensors file with torchvision's names.
        flag: the option that names the file, for the message.

    Raises:
        InputError: the file cannot be read, or holds something else (DF347).
    """

    def __init__(self, network: str, file: Path, device: torch.device, flag: str = "--likeness_net"):
        self.name = NETWORKS[network]
        self.unit_length = network != "inception"  # whose KID is published as its features are
        self.net: FeatureNet
        if network == "squeezenet":
            self.net = squeezenet_features(read_squeezenet(file, flag), device)
        else:
            self.net = inception_features(file, device, flag)

    @torch.no_grad()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(N, F) on the CPU: the mean of the last level over each of the (N, 3, S, S) images.

        Of other networks than Inception the squares of a row are 1 on average, so that KID is of a handy size.
        """
        pooled = torch.cat(in_batches(lambda x: self.net(x)[-1].mean(dim=(2, 3)).cpu(), images, IMAGES_AT_ONCE))
        return F.normalize(pooled.float(), dim=1) * pooled.shape[1] ** 0.5 if self.unit_length else pooled

    def of_defects(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """(N, F) on the CPU: what the defects of (N, 3, S, S) images look like inside their (N, 1, S, S) masks.

        Raises:
            ValueError: an empty mask.
        """
        if not masks.flatten(1).any(dim=1).all():
            raise ValueError("a mask is empty: its defect has no features")

        def describe(batch: range) -> torch.Tensor:
            rows = slice(batch.start, batch.stop)
            return describe_defects(self.net, images[rows], masks[rows].to(images)).cpu()

        return torch.cat(in_batches(describe, range(len(images)), IMAGES_AT_ONCE))

    @torch.no_grad()
    def distances(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(N, M) LPIPS without its learned weights, of each of the (N, 3, S, S) images to each of (M, 3, S, S).

        Each cell's features have length 1; squared differences are summed over channels and levels and averaged over
        cells. Exact to about 1e-4: an image is not at 0 from itself.

        Source: Zhang et al., LPIPS, CVPR 2018.
        """

        def describe(images: torch.Tensor) -> torch.Tensor:  # squared distances of these are LPIPS
            maps = [F.normalize(level.float(), dim=1) for level in self.net(images)]
            return torch.cat([level.flatten(1) / level[0, 0].numel() ** 0.5 for level in maps], dim=1)

        block = max(1, NUMBERS_AT_ONCE // describe(b[:1]).shape[1])
        rows = []
        for some in a.split(block):
            x, row = describe(some), []
            for others in b.split(block):
                y = describe(others)
                row.append(x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T)
            rows.append(torch.cat(row, dim=1).clamp_min(0).cpu())
        return torch.cat(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Sets of images


def kid(real: torch.Tensor, fake: torch.Tensor, subset_size: int, subsets: int, seed: int) -> tuple[float, float]:
    """KID in these features: mean and standard deviation over random subsets.

    Only Inception's is the KID of published tables (times 1000 there); the size of the figure depends on the network.
    With few images it may be negative.

    Source: Binkowski et al., Demystifying MMD GANs, ICLR 2018.

    Args:
        real, fake: (N, F) and (M, F) features.
        subset_size: images in a subset; lowered to min(N, M), with a warning.

    Raises:
        ValueError: fewer than 2 images on a side.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # not at the top: it takes long

    fitting = min(subset_size, len(real), len(fake))
    if fitting < 2:
        raise ValueError(f"KID needs 2 images or more: {len(real)} real, {len(fake)} generated, subset {subset_size}")
    if fitting < subset_size:
        logger.warning(f"KID on subsets of {fitting} images, not {subset_size}: there are no more")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save", UserWarning)
        metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=subsets, subset_size=fitting)
    metric.update(real.cpu().double(), real=True)
    metric.update(fake.cpu().double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return mean.item(), std.item()


# (N, 3, S, S) and (M, 3, S, S) images  ->  (N, M) distances
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class IcLpips(NamedTuple):
    value: float
    clusters: int  # that it is averaged over
    left_out: int  # references with fewer than 2 generated images


def ic_lpips(references: torch.Tensor, generated: torch.Tensor, distance: Distance) -> IcLpips:
    """Variety around each reference: mean pairwise distance of the images nearest to it, averaged over references.

    Source: Ojha et al., Few-shot Image Generation via Cross-domain Correspondence, CVPR 2021.

    Args:
        references: (N, 3, S, S).
        generated: (M, 3, S, S).
        distance: `Features.distances`, or another.

    Raises:
        ValueError: no reference has 2 generated images or more.
    """
    owners = distance(generated, references).argmin(dim=1)
    means = []
    for reference in range(len(references)):
        members = generated[owners == reference]
        if len(members) > 1:
            first, second = torch.triu_indices(len(members), len(members), offset=1)
            means.append(distance(members, members)[first, second].mean().item())
    if not means:
        raise ValueError("IC-LPIPS is undefined: no reference has 2 generated images or more")
    return IcLpips(sum(means) / len(means), len(means), len(references) - len(means))


def nearest(generated: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N,) distance of each of the (N, F) features to the nearest of (M, F).

    Small distances to training defects are a sign that they were memorized.
    """
    return torch.cdist(generated, others, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


def quality_figures(
    features: Features,
    references: torch.Tensor,
    held_out: torch.Tensor,
    generated: torch.Tensor,
    subset_size: int = 50,
    subsets: int = 100,
    seed: int = 0,
) -> dict[str, str | float | int]:
    """KID against held-out images and IC-LPIPS around the references, with the network's name and all settings.

    Args:
        references, held_out, generated: (N, 3, S, S) whole images, or crops of defects, all alike.

    Raises:
        ValueError: too few images.
    """
    mean, std = kid(features.pooled(held_out), features.pooled(generated), subset_size, subsets, seed)
    variety = ic_lpips(references, generated, features.distances)
    return {
        "network": features.name,
        "kid": mean,
        "kid_std": std,
        "kid_subset_size": min(subset_size, len(held_out), len(generated)),
        "kid_subsets": subsets,
        "kid_seed": seed,
        "ic_lpips": variety.value,
        "ic_lpips_clusters": variety.clusters,
        "ic_lpips_left_out": variety.left_out,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Crops

CONTEXT = 3.0  # side of a crop, in sides of its defect


def defect_crop(image: Image.Image, mask: np.ndarray, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A square around the defect, three times as large: (3, side, side) in [-1, 1] and its mask (1, side, side).

    It lies inside the image. It is smaller than three times the defect where the image is, and not below side / 4
    pixels. Of a defect longer than the image's shorter side it shows a part.

    Args:
        mask: (H, W) bool, not empty.

    Raises:
        ValueError: an empty mask, or one of another size than the image.
    """
    if mask.shape != image.size[::-1]:
        raise ValueError(f"the mask {mask.shape} and the image {image.size[::-1]} differ in size")
    if not mask.any():
        raise ValueError("the mask is empty: there is no defect to crop")
    box = crop_boxes(mask, side, CropRule(CONTEXT, 0))[0]
    return image_tensor(image.crop(box), side), pool_mask(crop_mask(mask, box), side)
