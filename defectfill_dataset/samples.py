"""Training samples: zoom, joint resize and crop, random boxes, seeds; each a function of (seed, step, sample)."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from .crops import Box, CropRule, crop_boxes, crop_mask, fit_box
from .images import image_tensor, load_image
from .mask_values import binarise
from .masks import boxes_mask, pool_mask, random_boxes
from .prompts import PromptPair, TokenizedPrompts
from .seeds import derive_seed


CROP_TRIES = 10
BOXES_PER_VARIANT = 4  # M_rand of a cached variant are drawn from so many


def sampling_schedule(start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1) -> list[list[tuple]]:
    """The (step, sample, total) keys of each micro-batch of this process, for `TrainingSamples`, as a batch sampler.

    A step here is a micro-batch of all processes; with gradient accumulation several make an optimizer step.
    The samples of a step are numbered through all processes, so the order is the same for any number of them.
    """
    first = rank * batch_size
    total = world * batch_size
    return [[(step, first + i, total) for i in range(batch_size)] for step in range(start, stop)]


class Crop(NamedTuple):
    """A crop of a reference image that holds its defect or a part of it."""

    source_file: str
    defect: str
    image: Image.Image
    mask: np.ndarray  # (side, side) bool; without zoom (H, W)
    box: Box  # in the image
    image_size: tuple[int, int]  # (W, H)


class AllTypes:
    """What each defect type marks in the images of some datasets, whose rows are an image and a type each."""

    def __init__(self, *datasets: Dataset):
        self.rows: dict[str, list[tuple[str, Dataset, int]]] = {}
        for dataset in datasets:
            masks = dataset.select_columns("mask")
            for place, (name, defect) in enumerate(zip(dataset["source_file"], dataset["defect"])):
                self.rows.setdefault(name, []).append((defect, masks, place))

    def other_mask(self, source_file: str, defect: str) -> np.ndarray | None:
        """The (H, W) bool array of all other types in this image; None where there are none."""
        others = [masks[place]["mask"] for type_, masks, place in self.rows.get(source_file, []) if type_ != defect]
        return np.logical_or.reduce([binarise(mask) for mask in others]) if others else None


def make_crops(dataset: Dataset, resolution: int, zoom: CropRule | None, others: Dataset | None = None) -> list[Crop]:
    """The crops of each row's defect: with zoom those around it, without it the whole image.

    Args:
        dataset: rows with image, mask and defect.
        others: rows of further defect types in the same images: crops leave other types out if they can.
    """
    crops = []
    all_types = AllTypes(dataset, *([others] if others else []))
    for row in dataset:
        image, mask = load_image(row["image"]), binarise(row["mask"])
        apart = all_types.other_mask(row["source_file"], row["defect"]) if zoom else None
        crops += [
            Crop(row["source_file"], row["defect"], image.crop(box), crop_mask(mask, box).copy(), box, image.size)
            for box in crop_boxes(mask, resolution, zoom, apart)
        ]
    return crops


def shrink(crop: Crop, side: int) -> Crop:
    """The crop with image and mask of at most `side` pixels a side.

    Training resizes each crop at every step, and nothing beyond twice the model's resolution can be seen in it.
    """
    width, height = (min(length, side) for length in crop.image.size)
    if (width, height) == crop.image.size:
        return crop
    image = crop.image.resize((width, height), Image.Resampling.BICUBIC)
    return crop._replace(image=image, mask=pool_mask(crop.mask, (height, width))[0].numpy() > 0)


class TrainingSamples(torch.utils.data.Dataset):
    """Random access to the training stream: `samples[step, sample, total]` is always the same sample.

    Training uses crops: with zoom those around each defect, without it each image whole. They come in a new order each
    epoch; an epoch may end inside a batch, so every batch is full however few they are. Each item holds, for
    G = resolution // vae_scale_factor:

        pixel_values  (3, resolution, resolution) in [-1, 1]
        mask          (1, G, G), 1 inside the defect
        random_mask   (1, G, G), M_rand of the object pass
        defect_prompt, object_prompt   rows of the tokenized prompts
        seed          seed of everything the training step itself draws for this sample
        index         of its crop

    With `variants` above 0 a sample is one of so many augmented variants of its crop, with one of
    `BOXES_PER_VARIANT` random masks. Its item then holds `variant` and `boxes`, their numbers, in place of pixels and
    masks, which `variant` makes.

    Args:
        dataset: rows with image, mask and defect; decoded once, and their crops, shrunk if they are far larger than
            the resolution, kept in memory.
        max_scale: the crop is resized jointly with its mask by a factor in [1, max_scale], then cropped back.
        center_crop: crop the centre instead of a random place.
        number_of_boxes: boxes in M_rand.
        zoom: how crops are laid around a defect; None for whole images.
        others: rows of further defect types in the same images: crops leave other types out if they can.
        variants: of each crop; 0 augments every sample afresh.
    """

    def __init__(
        self,
        dataset: Dataset,
        prompts: dict[str, PromptPair],
        tokens: TokenizedPrompts,
        resolution: int,
        vae_scale_factor: int,
        seed: int,
        max_scale: float = 1.125,
        center_crop: bool = False,
        number_of_boxes: int = 30,
        zoom: CropRule | None = None,
        others: Dataset | None = None,
        variants: int = 0,
    ):
        crops = make_crops(dataset, resolution, zoom, others)
        self.crops = [shrink(crop, 2 * round(resolution * max_scale)) for crop in crops]
        self.prompts = prompts
        pairs = [prompts[crop.defect] for crop in self.crops]
        self.prompt_rows = [(tokens.index[pair.defect], tokens.index[pair.object]) for pair in pairs]
        self.resolution = resolution
        self.grid_size = resolution // vae_scale_factor
        self.seed = seed
        self.max_scale = max_scale
        self.center_crop = center_crop
        self.number_of_boxes = number_of_boxes
        self.variants = variants

    def __len__(self) -> int:
        return len(self.crops)

    def crop_index(self, position: int) -> int:
        """Index of the crop at `position` in the endless stream of shuffled epochs."""
        epoch, offset = divmod(position, len(self))
        return int(np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(len(self))[offset])

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        step, sample, total = key
        index = self.crop_index(step * total + sample)
        rng = np.random.default_rng(derive_seed(self.seed, "augment", step, sample))
        seed = derive_seed(self.seed, "draws", step, sample)
        if self.variants:
            numbers = {"variant": int(rng.integers(self.variants)), "boxes": int(rng.integers(BOXES_PER_VARIANT))}
            return self._numbers(index, seed) | numbers
        image, mask = self.resize_and_crop(self.crops[index].image, self.crops[index].mask, rng)
        return self._item(index, image, mask, rng, seed)

    def variant(self, index: int, variant: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels (3, resolution, resolution), mask (1, G, G) and random masks (BOXES_PER_VARIANT, 1, G, G)."""
        crop, seed = self.crops[index], derive_seed(self.seed, "variant", index, variant)
        image, mask = self.resize_and_crop(crop.image, crop.mask, np.random.default_rng(seed))
        seeds = [derive_seed(seed, "boxes", boxes) for boxes in range(BOXES_PER_VARIANT)]
        return image, mask, torch.stack([self._random_mask(np.random.default_rng(seed)) for seed in seeds])

    def references(self) -> Iterator[dict]:
        """Every crop once, whole and not augmented, its boxes and seed fixed: for metrics that can be compared."""
        for index, crop in enumerate(self.crops):
            seed = derive_seed(self.seed, "reference", index)
            rng = np.random.default_rng(seed)
            image, mask = image_tensor(crop.image, self.resolution), pool_mask(crop.mask, self.grid_size)
            yield self._item(index, image, mask, rng, seed)

    def validation_items(self, good: Dataset | None, number: int) -> list[dict]:
        """Up to `number` good images with the references' crops in turn; the references if there are none.

        Each is an item as above, with the text of the prompt to generate with as `prompt`: the defect pass's.
        """
        references = list(itertools.islice(self.references(), number))
        items = []
        for i in range(number if good else len(references)):
            item = references[i % len(references)]
            crop = self.crops[item["index"]]
            if good:
                image = load_image(good[i % len(good)]["image"])
                view = image.crop(fit_box(crop.box, crop.image_size, image.size))
                item["pixel_values"] = image_tensor(view, self.resolution)
            text = self.prompts[crop.defect].defect.text
            items.append(item | {"prompt": text, "seed": derive_seed(self.seed, "validation", i)})
        return items

    def _item(self, index: int, image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator, seed: int) -> dict:
        images = {"pixel_values": image, "mask": mask, "random_mask": self._random_mask(rng)}
        return images | self._numbers(index, seed)

    def _numbers(self, index: int, seed: int) -> dict:
        defect_prompt, object_prompt = self.prompt_rows[index]
        return {"defect_prompt": defect_prompt, "object_prompt": object_prompt, "seed": seed, "index": index}

    def _random_mask(self, rng: np.random.Generator) -> torch.Tensor:
        return pool_mask(boxes_mask(random_boxes(rng, self.number_of_boxes), self.resolution), self.grid_size)

    def resize_and_crop(
        self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image in [-1, 1] and the mask on the latent grid, resized and cropped as one.

        A crop that loses the whole defect is drawn again, `CROP_TRIES` times at most; then the image stays whole.
        """
        for attempt in range(CROP_TRIES + 1):
            scale = rng.uniform(1, self.max_scale) if attempt < CROP_TRIES else 1
            size = round(self.resolution * scale)
            spare = size - self.resolution
            top, left = (spare // 2,) * 2 if self.center_crop else rng.integers(0, spare + 1, 2)
            resized = pool_mask(mask, size)[0].numpy()
            cropped = resized[top : top + self.resolution, left : left + self.resolution]
            if cropped.any():
                break
        pixels = image_tensor(image, size)[:, top : top + self.resolution, left : left + self.resolution]
        return pixels, pool_mask(cropped, self.grid_size)
