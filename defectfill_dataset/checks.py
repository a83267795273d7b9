"""Checks of the pixels of image and mask pairs, all problems at once, before any model is loaded."""

from datasets import Dataset
from PIL import ImageOps

from .errors import InputError
from .images import UNREADABLE, load_image
from .masks import binarise


def check_pairs(dataset: Dataset) -> None:
    """Proves that every image of a defect split opens, has a mask of its size, and that the mask marks part of it.

    Raises:
        InputError: one line a problem. DF103 unreadable, DF140 sizes differ, DF142 no mask, DF145 empty mask,
            DF146 full mask, DF163 no images at all.
    """
    if not len(dataset):
        raise InputError("DF163 no defect images to train on; check --defect and --split")
    problems = []
    for index in range(len(dataset)):
        name = dataset["source_file"][index]
        try:
            row = dataset[index]
            problems += _problems(name, row["image"], row["mask"])
        except UNREADABLE as error:
            problems.append(f"DF103 {name}: the image or its mask cannot be read: {error}")
    if problems:
        raise InputError(*problems)


def check_good(dataset: Dataset) -> None:
    """Proves that good images open; raises InputError (DF103) with all problems."""
    problems = []
    for index in range(len(dataset)):
        try:
            load_image(dataset[index]["image"])
        except UNREADABLE as error:
            problems.append(f"DF103 {dataset['source_file'][index]}: the image cannot be read: {error}")
    if problems:
        raise InputError(*problems)


def _problems(name: str, image, mask) -> list[str]:
    if image is None:
        return [f"DF103 {name}: its row holds no image"]
    if mask is None:
        return [f"DF142 {name}: its mask is missing"]
    load_image(image)
    size, mask_size = (ImageOps.exif_transpose(picture).size for picture in (image, mask))
    if size != mask_size:
        return [
            f"DF140 {name}: the image is {size[0]}x{size[1]}, its mask {mask_size[0]}x{mask_size[1]}; they must match"
        ]
    inside = binarise(mask)
    if not inside.any():
        return [f"DF145 {name}: its mask is empty; mark the defect or remove the pair"]
    if inside.all():
        return [f"DF146 {name}: its mask covers the whole image; mark the defect only"]
    return []
