"""The arms of an evaluation: what a detector is trained on, all else being equal.

Shapes: N views, B views of a batch, R side.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy import ndimage
from torchvision import tv_tensors
from torchvision.transforms import v2

from defectfill_dataset import derive_seed, load_image
from defectfill_dataset.masks import components

from .views import SAME, View, Viewing, sameness, sample


CONTROLS = {
    "real": "the real defects alone",
    "real repeated": "the real defects, repeated until they are as many as with generated ones",
    "real augmented": "the same, each time turned, sheared, scaled, blurred and in other colours",
    "copy-paste": "the real defects, and as many cut out of them and pasted where the generated ones are",
}


def file_name(arm: str) -> str:
    """What an arm is called in names of files."""
    return arm.replace(" ", "-").replace(",", "")


class Pool:
    """Views that a detector is trained on; each is drawn as often as it has copies.

    Args:
        views: some N views.
        copies: of each, 1 if not given.
        augmented: whether each is strongly augmented; all views are mirrored at random.
    """

    def __init__(
        self, views: Sequence[View], copies: Sequence[float] | None = None, augmented: Sequence[bool] | None = None
    ):
        self.images = torch.from_numpy(np.stack([view.image for view in views]))
        self.labels = torch.from_numpy(np.stack([view.labels for view in views]))
        self.copies = torch.tensor(copies if copies else [1.0] * len(views), dtype=torch.float64)
        self.augmented = augmented if augmented else [False] * len(views)

    def batch(self, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, R, R, 3) uint8 images and (B, R, R) uint8 labels, a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            items = [self._item(row) for row in torch.multinomial(self.copies, size, replacement=True).tolist()]
        images, labels = zip(*items)
        return torch.stack(images), torch.stack(labels)

    def _item(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, labels = self.images[row], self.labels[row]
        flips = [axis for axis in (0, 1) if torch.rand(()) < 0.5]
        image, labels = image.flip(flips), labels.flip(flips)
        if self.augmented[row]:
            image, labels = STRONG(tv_tensors.Image(image.permute(2, 0, 1)), tv_tensors.Mask(labels))
            image = image.permute(1, 2, 0)
        return torch.Tensor.as_subclass(image, torch.Tensor), torch.Tensor.as_subclass(labels, torch.Tensor)


STRONG = v2.Compose(
    [
        v2.RandomAffine(degrees=30, translate=(0.1, 0.1), scale=(0.8, 1.25), shear=10),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], p=0.3),
    ]
)


# ---------------------------------------------------------------------------------------------------------------------
# Copy and paste


class Backgrounds:
    """The good images that generated ones were painted into, found again by their pixels."""

    def __init__(self, good: Dataset, rows: Sequence[int], viewing: Viewing):
        self.images = [load_image(good[i]["image"]) for i in rows]
        self.samples = [sample(image) for image in self.images]
        self.viewing = dataclasses.replace(viewing, group=None)  # generated images are named as they like

    def under(self, view: View, image: Image.Image) -> np.ndarray | None:
        """(R, R, 3), what the view of this image showed before; None if no good image is that."""
        one = sample(image)
        equal = [sameness(one, other) for other in self.samples]
        best = int(np.argmax(equal))
        if equal[best] < SAME:
            return None
        nothing = np.zeros(image.size[::-1], np.uint8)
        return self.viewing.view(view.source, self.images[best], nothing, view.box).image


class Piece(NamedTuple):
    """A defect cut out of a view: its (h, w, 3) pixels and (h, w) mask."""

    image: np.ndarray
    mask: np.ndarray


def cut_pieces(views: Sequence[View]) -> dict[int, list[Piece]]:
    """The defects in these views by their label."""
    pieces: dict[int, list[Piece]] = {}
    for view in views:
        for left, top, part in components(view.mask):
            box = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
            pieces.setdefault(int(view.labels[box][part][0]), []).append(Piece(view.image[box], part))
    return pieces


def turned(piece: Piece, shape: tuple[int, int]) -> Iterator[Piece]:
    """The piece in its eight orientations, each stretched to the (h, w) shape."""
    for quarter in range(4):
        for mirror in (False, True):
            image, mask = (np.rot90(x[:, ::-1] if mirror else x, quarter) for x in piece)
            factors = (shape[0] / mask.shape[0], shape[1] / mask.shape[1])
            yield Piece(
                ndimage.zoom(image, (*factors, 1), order=1, grid_mode=True, mode="nearest"),
                ndimage.zoom(mask.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest") > 0.5,
            )


def pasted(background: np.ndarray, labels: np.ndarray, pieces: dict[int, list[Piece]], seed: int) -> tuple:
    """An (R, R, 3) image and its (R, R) labels with a real defect at the place of each one in `labels`.

    Each is drawn at random among those of its type, and turned as fits its place best.
    """
    rng = np.random.default_rng(seed)
    image, marked = background.astype(np.float32), np.zeros_like(labels)
    for left, top, part in components(labels > 0):
        box = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
        label = int(labels[box][part][0])
        piece = pieces[label][int(rng.integers(len(pieces[label])))]
        best = max(turned(piece, part.shape), key=lambda t: float((t.mask & part).sum() / (t.mask | part).sum()))
        blend = ndimage.gaussian_filter(best.mask.astype(np.float32), 0.5)[..., None]
        image[box] += blend * (best.image - image[box])
        marked[box][best.mask] = label
    return image.clip(0, 255).astype(np.uint8), marked


def paste_views(
    banks: Sequence[tuple[View, Image.Image]],
    references: Sequence[View],
    backgrounds: Backgrounds,
    seed: int,
) -> list[View]:
    """Copy and paste of the references' defects at the places of generated ones, each on its own good image.

    Args:
        banks: views of generated images, each with its whole image.
    """
    pieces, views = cut_pieces(references), []
    for number, (view, image) in enumerate(banks):
        background = backgrounds.under(view, image)
        if background is not None and {int(x) for x in np.unique(view.labels)} - {0} <= pieces.keys():
            image, labels = pasted(background, view.labels, pieces, derive_seed(seed, "paste", number))
            if labels.any():
                views.append(View(view.source, view.group, view.box, image, labels))
    return views


# ---------------------------------------------------------------------------------------------------------------------
# The arms


def control_pools(
    references: Sequence[View], good: Sequence[View], pasted_views: Sequence[View], number: int
) -> dict[str, Callable[[], Pool]]:
    """The pools of `CONTROLS`: each holds the good views too, all but "real" as many defects as with generated ones.

    Args:
        number: of generated views that the other arms have.
    """
    often = [1 + number / len(references)] * len(references)
    ones = [1.0] * len(good)
    return {
        "real": lambda: Pool([*references, *good]),
        "real repeated": lambda: Pool([*references, *good], [*often, *ones]),
        "real augmented": lambda: Pool(
            [*references, *good], [*often, *ones], [True] * len(references) + [False] * len(good)
        ),
        "copy-paste": lambda: Pool(
            [*references, *pasted_views, *good],
            [*[1.0] * len(references), *[number / len(pasted_views)] * len(pasted_views), *ones],
        ),
    }


def bank_pool(
    references: Sequence[View], good: Sequence[View], generated: Sequence[View], share: float | None = None
) -> Pool:
    """The references, generated views and good ones; `share` is that of the references among the defects drawn."""
    views = [*references, *generated, *good]
    if share is None or not references:
        return Pool(views)
    defects = len(references) + len(generated)
    each = [share * defects / len(references)] * len(references)
    each += [(1 - share) * defects / len(generated)] * len(generated)
    return Pool(views, [*each, *[1.0] * len(good)])
