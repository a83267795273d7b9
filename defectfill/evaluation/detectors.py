"""The detectors that an evaluation trains: a segmenter of defects and a classifier of their types.

Each is trained for a fixed number of steps with a fixed schedule, and its last weights are used: nothing is chosen.

Shapes: B views, N views, R side, C defect types.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler

from defectfill_dataset import InputError, Problem, RunError, derive_seed

from .arms import Pool


logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 32
DECODER_CHANNELS = (128, 64, 32, 16)
DIVISOR = 2 ** len(DECODER_CHANNELS)  # of R


class Recipe(NamedTuple):
    """How detectors are trained, the same for every arm.

    Args:
        encoder: of the segmenter, a name of segmentation_models_pytorch.
        classifier: a name of timm.
        pretrained: start both from ImageNet's weights.
        mixed_precision: "no" or "bf16", of the networks; losses and scores are fp32.
    """

    steps: int
    batch_size: int
    learning_rate: float
    encoder: str
    classifier: str
    pretrained: bool
    mixed_precision: str
    device: torch.device

    def outputs(self, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The fp32 logits of (B, R, R, 3) uint8 views."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            return model(normalised(images, self.device)).float()


def check_networks(encoder: str, classifier: str) -> None:
    """Raises InputError (DF355) if a network is not known to its library."""
    if classifier not in timm.list_models():
        what, fix = "timm has no such model", "give one that timm.list_models() names"
        raise InputError(Problem("DF355", f"--classifier {classifier}", what, fix))
    try:
        smp.encoders.get_encoder(encoder, depth=len(DECODER_CHANNELS), weights=None)
    except (KeyError, RuntimeError) as error:
        what, fix = "segmentation_models_pytorch has no such encoder", "give one that it documents, such as resnet18"
        raise InputError(Problem("DF355", f"--encoder {encoder}", what, fix)) from error


def can_load_pretrained(recipe: Recipe) -> bool:
    """Whether ImageNet's weights of both networks are on this machine or can be downloaded."""
    try:
        smp.Unet(recipe.encoder, encoder_weights="imagenet")
        timm.create_model(recipe.classifier, pretrained=True)
    except Exception as error:  # each library and hub has its own
        which = f"{recipe.encoder} or {recipe.classifier}"
        logger.warning(f"the detectors start from random weights: ImageNet's of {which} cannot be had: {error}")
        return False
    return True


def normalised(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B, R, R, 3) uint8 -> (B, 3, R, R), shifted and scaled as ImageNet's weights expect."""
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(device)


def fit(model: torch.nn.Module, loss_of: Callable, pool: Pool, recipe: Recipe, seed: int) -> None:
    """Trains with AdamW and a one-cycle cosine for `recipe.steps` batches of the pool."""
    model.to(recipe.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-2)
    warmup = recipe.steps // 10
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=recipe.steps)
    for step in range(recipe.steps):
        images, labels = pool.batch(recipe.batch_size, derive_seed(seed, "batch", step))
        loss = loss_of(recipe.outputs(model, images), labels.to(recipe.device))
        if not torch.isfinite(loss):
            what = f"the detector's loss at step {step} is {loss.item()}; give a lower --learning_rate"
            raise RunError(f"{what} and another --output_dir.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Focal loss and Dice of (B, 1, R, R) logits against (B, R, R) labels."""
    target = (labels > 0).float()[:, None]
    return 10 * smp.losses.FocalLoss("binary")(logits, target) + smp.losses.DiceLoss("binary")(logits, target)


def train_segmenter(pool: Pool, recipe: Recipe, seed: int) -> torch.nn.Module:
    """A U-Net that gives (B, 1, R, R) logits of a defect of any type."""
    torch.manual_seed(derive_seed(seed, "segmenter"))
    weights = "imagenet" if recipe.pretrained else None
    depth = len(DECODER_CHANNELS)
    model = smp.Unet(recipe.encoder, depth, weights, decoder_channels=DECODER_CHANNELS)
    fit(model, segmentation_loss, pool, recipe, seed)
    return model


@torch.no_grad()
def score_maps(model: torch.nn.Module, images: np.ndarray, recipe: Recipe) -> np.ndarray:
    """(N, R, R) fp32 logits of (N, R, R, 3) uint8 views."""
    batches = torch.from_numpy(images).split(SCORES_AT_ONCE)
    return torch.cat([recipe.outputs(model, x)[:, 0].cpu() for x in batches]).numpy()


def train_classifier(pool: Pool, classes: int, recipe: Recipe, seed: int) -> torch.nn.Module:
    """A network that gives (B, 1 + C) logits: good, and each type."""
    torch.manual_seed(derive_seed(seed, "classifier"))
    model = timm.create_model(recipe.classifier, pretrained=recipe.pretrained, num_classes=1 + classes)
    fit(model, lambda logits, labels: F.cross_entropy(logits, main_types(labels)), pool, recipe, seed)
    return model


def main_types(labels: torch.Tensor) -> torch.Tensor:
    """(B,) the type that marks most of each (B, R, R) view; 0 where nothing is marked."""
    counts = torch.stack([torch.bincount(view.flatten(), minlength=256) for view in labels.long()])
    counts[:, 0] = 0
    return counts.argmax(dim=1)


@torch.no_grad()
def classify(model: torch.nn.Module, images: np.ndarray, recipe: Recipe) -> np.ndarray:
    """(N,) the class of each (N, R, R, 3) uint8 view."""
    batches = torch.from_numpy(images).split(SCORES_AT_ONCE)
    return torch.cat([recipe.outputs(model, x).argmax(dim=1).cpu() for x in batches]).numpy()
