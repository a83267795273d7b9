"""Reference statistics: the colours of the training defects, how far other defects' colours are from them, and the
strength of the training defects' seams.

Shapes: n pixels of a defect, N candidates, S side of a square image. Masks are 1 inside the defect. A colour is
relative: less the mean colour of the defect's surroundings, R, G and B in [-1, 1].
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from defectfill_dataset import TrainingSamples, image_tensor, pool_mask

from .seam import seam_step


COLOUR_NOISE = 16 / 255  # standard deviation of the noise that any image may have, in each channel


def defect_colours(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(..., n, 3) relative colours of the pixels inside a defect's mask.

    The surroundings are a band of a sixteenth of the image's side; the whole image where the mask leaves no band.

    Args:
        images: (..., 3, S, S) in [0, 1].
        mask: (1, S, S).
    """
    reach = max(1, images.shape[-1] // 16)
    wider = F.max_pool2d(mask, (2 * reach + 1, 1), stride=1, padding=(reach, 0))  # one axis at a time is far quicker
    around = (F.max_pool2d(wider, (1, 2 * reach + 1), stride=1, padding=(0, reach)) > mask)[0]
    surroundings = images[..., around] if around.any() else images.flatten(-2)
    return (images[..., mask[0] > 0.5] - surroundings.mean(dim=-1, keepdim=True)).mT.double()


def mahalanobis_distance(colours: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The 95 % quantile, a scalar, of the Mahalanobis distances of (n, 3) colours from a distribution of colours.

    Source: Reed and Yu's anomaly detector, IEEE Transactions on ASSP 38 (1990).
    """
    apart = colours - mean
    squared = (apart @ torch.linalg.inv(covariance + COLOUR_NOISE**2 * torch.eye(3).to(covariance)) * apart).sum(dim=1)
    return squared.sqrt().quantile(0.95)


def reference_statistics(references: Sequence[torch.Tensor]) -> dict:
    """The colour statistics of a defect type, as a LoRA's record holds them, from the `defect_colours` of each image.

    Returns:
        mean and covariance of all colours; and `strangest`, the greatest distance of one image's colours from those
        of the others, None for a single image.
    """

    def distribution(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = moments[0, 1:] / moments[0, 0]
        return mean, moments[1:, 1:] / moments[0, 0] - mean.outer(mean)

    with_ones = [F.pad(colours, (1, 0), value=1) for colours in references]
    moments = torch.stack([rows.T @ rows for rows in with_ones])  # number, sums and sums of products of each
    total = moments.sum(dim=0)
    others = total - moments if len(references) > 1 else ()
    distances = [mahalanobis_distance(a, *distribution(rest)).item() for a, rest in zip(references, others)]
    mean, covariance = distribution(total)
    return {"mean": mean.tolist(), "covariance": covariance.tolist(), "strangest": max(distances, default=None)}


def statistics_by_defect(samples: TrainingSamples) -> dict[str, dict]:
    """The statistics of each defect type that is trained on; all crops of an image count as one reference's colours.

    Returns:
        the `reference_statistics` of each type, and its `seam_step`, the mean of its crops'; None without an outline.
    """
    colours: dict[str, dict[str, torch.Tensor]] = {}  # defect type -> source image -> (n, 3)
    steps: dict[str, list[float]] = {}
    for crop in samples.crops:
        image, mask = image_tensor(crop.image, samples.resolution), pool_mask(crop.mask, samples.resolution)
        found, of_type = defect_colours(image / 2 + 0.5, mask), colours.setdefault(crop.defect, {})
        of_type[crop.source_file] = torch.cat([of_type.get(crop.source_file, found[:0]), found])
        step = seam_step(crop.image, crop.mask)
        steps.setdefault(crop.defect, []).extend([] if step is None else [step])
    return {
        defect: reference_statistics(list(of_type.values()))
        | {"seam_step": float(np.mean(steps[defect])) if steps[defect] else None}
        for defect, of_type in colours.items()
    }


def colour_distances(candidates: torch.Tensor, mask: torch.Tensor, statistics: dict) -> list[float]:
    """The colour distance of (N, 3, S, S) candidates from the training defects, over that of the most unusual one."""
    colours = defect_colours(candidates, mask)  # (N, n, 3)
    mean, covariance = (colours.new_tensor(statistics[name]) for name in ("mean", "covariance"))
    distances = torch.stack([mahalanobis_distance(of_one, mean, covariance) for of_one in colours])
    return (distances / statistics["strangest"]).tolist()
