"""Likeness: how near a candidate's defect is to the references' defects, in the features of a network.

Shapes: N candidates of one crop, R crops of references, S side of the square the model works on, F numbers that
describe a defect. Images are in [-1, 1]; masks are 1 inside the defect.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file

from defectfill_dataset import InputError, Problem, image_tensor, pool_mask
from defectfill_dataset.samples import Crop

from .memory import in_batches


# (N, 3, S, S) images  ->  feature maps of a few levels, (N, channels, side, side) each
FeatureNet = Callable[[torch.Tensor], list[torch.Tensor]]


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def vae_features(vae: AutoencoderKL) -> FeatureNet:
    """The levels of the base's own encoder: it is always there, and knows what the base can draw."""

    def levels(images: torch.Tensor) -> list[torch.Tensor]:
        x, maps = vae.encoder.conv_in(images.to(vae.dtype)), []
        for block in vae.encoder.down_blocks:
            x = block(x)
            maps.append(x)
        return maps

    return levels


# The layers of SqueezeNet 1.0 whose outputs are taken: the last ones before each pooling, and the last of all.
SQUEEZENET_LEVELS = (1, 5, 10, 12)


def read_squeezenet(file: Path, flag: str = "--likeness_net") -> torch.nn.Sequential:
    """The layers of a SqueezeNet 1.0, in fp32, from a safetensors file with torchvision's names.

    Raises:
        InputError: the file cannot be read, or holds something else (DF347).
    """
    from torchvision.models import squeezenet1_0  # not at the top: training does without it

    return read_weights(squeezenet1_0(weights=None), "squeezenet1_0", file, flag).features.eval().requires_grad_(False)


def read_weights(model: torch.nn.Module, name: str, file: Path, flag: str) -> torch.nn.Module:
    """One of torchvision's models with the weights of a safetensors file, which has torchvision's names.

    The counters of batch norm may be absent, as in torchvision's older files.

    Args:
        name: torchvision's name of the model, for the message.
        flag: the option that names the file, for the message.

    Raises:
        InputError: the file cannot be read, or holds something else (DF347).
    """

    def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
        counted = "num_batches_tracked"
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(counted)}

    shapes = shapes_of(model.state_dict())
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(Problem("DF347", f"{flag} {file}", f"not a whole safetensors file: {error}")) from error
    found = shapes_of(tensors)
    wrong = sorted(tensor for tensor in shapes.keys() | found.keys() if shapes.get(tensor) != found.get(tensor))
    if wrong:
        first = wrong[0]
        what = f"{len(wrong)} tensors are not those of {name}: {first} is {found.get(first)}, not {shapes.get(first)}"
        raise InputError(Problem("DF347", f"{flag} {file}", what, f"give torchvision's {name}"))
    model.load_state_dict({tensor: tensors[tensor] for tensor in shapes}, strict=False)
    return model


def squeezenet_features(layers: torch.nn.Sequential, device: torch.device) -> FeatureNet:
    """`SQUEEZENET_LEVELS` of images, which are first shifted and scaled as in its training on ImageNet."""
    layers = layers.to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def levels(images: torch.Tensor) -> list[torch.Tensor]:
        x, maps = (images.to(device) / 2 + 0.5 - mean) / std, []
        for place, layer in enumerate(layers):
            x = layer(x)
            if place in SQUEEZENET_LEVELS:
                maps.append(x)
        return maps

    return levels


# ---------------------------------------------------------------------------------------------------------------------
# Distances

REFERENCES_AT_ONCE = 8


@torch.no_grad()
def describe_defects(net: FeatureNet, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(N, F) what the defects look like: mean and standard deviation of each channel inside the mask, at each level.

    Each cell's features have length 1, as in LPIPS, so that all levels weigh alike; a cell counts by the share of it
    that the mask covers.

    Args:
        images: (N, 3, S, S).
        masks: (1 or N, 1, S, S).
    """
    numbers = []
    for maps in net(images):
        cells = F.normalize(maps.float(), dim=1)
        weights = F.adaptive_avg_pool2d(masks.to(cells), cells.shape[-2:])
        weights = weights / weights.sum(dim=(2, 3), keepdim=True)
        mean = (cells * weights).sum(dim=(2, 3))
        variance = (cells.square() * weights).sum(dim=(2, 3)) - mean.square()
        numbers += [mean, variance.clamp_min(0).sqrt()]
    return torch.cat(numbers, dim=1)


class References(NamedTuple):
    """The training defects of one type, as rows of a dataset."""

    rows: Dataset
    others: Dataset  # rows of further defect types in the same images
    sha256: str  # of both


class Likeness:
    """Distances of candidates from the nearest reference.

    Args:
        crops: R crops with the references' defects.
        resolution: S.
        device: where the net is.
    """

    def __init__(self, net: FeatureNet, crops: Sequence[Crop], resolution: int, device: torch.device):
        def describe(batch: Sequence[Crop]) -> torch.Tensor:
            images = torch.stack([image_tensor(crop.image, resolution) for crop in batch])
            masks = torch.stack([pool_mask(crop.mask, resolution) for crop in batch])
            return describe_defects(net, images.to(device), masks.to(device))

        self.net = net
        self.references = torch.cat(in_batches(describe, crops, REFERENCES_AT_ONCE))  # (R, F)

    def distances(self, candidates: torch.Tensor, mask: torch.Tensor) -> list[float]:
        """Of (N, 3, S, S) candidates with the (1, S, S) mask; not finite for a broken candidate."""
        described = describe_defects(self.net, candidates, mask[None])
        return (described[:, None] - self.references).norm(dim=2).min(dim=1).values.tolist()
