"""Defects that a detector missed, as `--like` names them: what masks and good images are made of them."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from datasets import DatasetDict
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import AfterValidator, Field
from tqdm.auto import tqdm

from defectfill_dataset import InputError, Problem, image_tensor, load_defect_pairs, load_image, open_image
from defectfill_dataset.text import Schema, numbered_lines, parse_json, read_text

from ..base_model import BaseModel, load_model
from ..likeness import describe_defects, vae_features
from .requests import GenerationRequest
from .source_images import SourceImage


logger = logging.getLogger(__name__)

LONGEST = 2**16  # pixels of a box's side, far above any image's


def in_order(box: list[int]) -> list[int]:
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError("must be [left, top, right, bottom]")
    return box


class MissLine(Schema):
    """What is used of a line of such a file."""

    image: str
    box: Annotated[
        list[Annotated[int, Field(ge=0, le=LONGEST)]], Field(min_length=4, max_length=4), AfterValidator(in_order)
    ]
    area: Annotated[int, Field(ge=0, le=LONGEST**2)]


class Miss(NamedTuple):
    """A missed defect: the name of its image in the dataset; its box and area there, in pixels."""

    image: str
    box: list[int]
    area: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the box; a small defect's may have been rounded to nothing."""
        left, top, right, bottom = self.box
        return max(1, right - left), max(1, bottom - top)


def read_misses(file: Path) -> list[Miss]:
    """The missed defects of a file that the evaluation wrote, a JSON object a line.

    Raises:
        InputError: no file (DF160), or none in it, or lines that are something else (DF354).
    """
    if not file.is_file():
        raise InputError(Problem("DF160", f"--like {file}", "no such file"))
    misses, problems = [], []
    fix = "give a misses-*.jsonl that evaluate_defectfill.py wrote"
    for number, text in numbered_lines(read_text(file, "DF354", fix)):
        try:
            line = parse_json(text, MissLine)
        except ValueError as error:
            problems.append(Problem("DF354", f"--like {file}, line {number}", str(error), fix))
        else:
            misses.append(Miss(line["image"], line["box"], line["area"]))
    if not misses and not problems:
        problems.append(Problem("DF354", f"--like {file}", "names no missed defect", "leave it out"))
    if problems:
        raise InputError(*problems)
    return misses


def load_data(request: GenerationRequest, cache_dir: str | None) -> DatasetDict:
    return load_defect_pairs(
        request.reference_data, request.object, request.split, cache_dir, request.layout, request.mask_classes,
        request.skip_problems,
    )  # fmt: skip


def misses_of_type(request: GenerationRequest, defect: str | None, cache_dir: str | None) -> list[Miss]:
    """The misses of a request in images with this defect type, and in images that `--reference_data` does not have.

    Raises:
        InputError: there are none (DF354), or what `read_misses` finds.
    """
    types: dict[str, set[str]] = {}
    for rows in load_data(request, cache_dir).values():
        for name, type_ in zip(rows["source_file"], rows["defect"]):
            types.setdefault(name, set()).add(type_)
    misses = [
        miss for miss in read_misses(request.like) if defect is None or defect in types.get(miss.image, {defect})
    ]
    if not misses:
        what = f"names no missed defect of '{defect}'"
        raise InputError(Problem("DF354", f"--like {request.like}", what, "choose other types with --defect"))
    return misses


def load_missed_images(request: GenerationRequest, misses: Sequence[Miss], cache_dir: str | None) -> dict[str, dict]:
    """A row of the dataset for each image that the misses name, by name; images that are not there are left out."""
    names, found = {miss.image for miss in misses}, {}
    for rows in load_data(request, cache_dir).values():
        found |= {name: rows[place] for place, name in enumerate(rows["source_file"]) if name in names}
    return found


def order_good_images(
    source_images: Sequence[SourceImage],
    missed_images: dict[str, dict],
    describe: Callable[[Image.Image], torch.Tensor],
) -> dict[str, list[int]]:
    """For each image with a missed defect the places of the good images, the nearest first.

    Args:
        missed_images: rows by name.
        describe: an RGB image's features, (F,).
    """
    good = [describe(load_image(open_image(image.file))) for image in tqdm(source_images, desc="Good images")]
    orders = {}
    for name, row in missed_images.items():
        missed = describe(load_image(row["image"]))
        orders[name] = sorted(range(len(good)), key=[float((missed - one).norm()) for one in good].__getitem__)
    return orders


def good_images_near(
    source_images: Sequence[SourceImage],
    request: GenerationRequest,
    base: BaseModel,
    resolution: int,
    cache_dir: str | None,
    device: torch.device,
) -> dict[str, list[int]]:
    """`order_good_images` of a request with `--like`, by the features of the base's VAE encoder; loads its weights."""
    misses = read_misses(request.like)
    missed_images = load_missed_images(request, misses, cache_dir)
    if unknown := len({miss.image for miss in misses} - missed_images.keys()):
        logger.warning(
            f"--like {request.like}: {unknown} of its images are not in {request.reference_data}; for what was missed "
            "there the good images are taken in turn"
        )
    if not missed_images:
        return {}
    vae = load_model(base, "vae", AutoencoderKL, cache_dir, torch.float32).to(device)
    net, whole = vae_features(vae), torch.ones(1, 1, 1, 1, device=device)

    def describe(image: Image.Image) -> torch.Tensor:
        return describe_defects(net, image_tensor(image, resolution)[None].to(device), whole)[0].cpu()

    return order_good_images(source_images, missed_images, describe)
