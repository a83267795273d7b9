"""The files that requests name: source images with their masks, LoRAs, mask sources; each is read and checked once."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from defectfill_dataset import (
    InputError,
    LikeReferences,
    LikeSurroundings,
    MaskSource,
    PlacedShapes,
    Problem,
    check_pairs,
    choose_placement,
    data_digest,
    find_foreground,
    held_out_source,
    load_mask_rows,
    load_masks,
    locate_references,
    masks_digest,
    other_types,
    procedural_shapes,
    random_source,
    read_patches,
    reference_shapes,
    select_defects,
    shapes_like,
)

from ..likeness import References
from ..lora import LoraFile, read_lora
from .misses import load_data, misses_of_type
from .plan import REASON, RequestInputs, choose_defects, make_recipe
from .requests import GenerationRequest
from .source_images import SourceImage, check_source_images, find_source_images


logger = logging.getLogger(__name__)

# What decides a mask source.
MASK_FLAGS = (
    "mask_source", "reference_data", "object", "split", "layout", "mask_classes", "skip_problems", "like",
    "max_rotation", "shapes", "placement", "foreground", "roi", "coverage", "masks_per_image",
)  # fmt: skip


# What decides the references.
REFERENCE_FLAGS = ("reference_data", "object", "split", "layout", "mask_classes", "skip_problems")


def read_inputs(
    requests: Sequence[GenerationRequest], cache_dir: str | None, by_likeness: bool = False
) -> list[RequestInputs]:
    """Each request with its source images and recipes.

    Args:
        by_likeness: the recipes need references.

    Raises:
        InputError: whatever is wrong with the files, the LoRAs, or the defect types asked of them.
    """
    images: dict[tuple[str, ...], list[SourceImage]] = {}
    loras: dict[tuple[str, float | None], LoraFile] = {}
    sources: dict[tuple[str | None, ...], list[tuple[MaskSource | None, dict]]] = {}
    references: dict[tuple[str | None, ...], References | None] = {}
    inputs = []
    for request in requests:
        paths = tuple(map(str, (request.image, request.mask, request.foreground, request.roi)))
        if paths not in images:
            images[paths] = read_images(request)
        files = [(path, request.lora_alpha) for path in request.lora]
        for path, alpha in files:
            if (path, alpha) not in loras:
                loras[path, alpha] = read_lora(path, alpha)
        recipes = []
        for lora, defect, prompt in choose_defects(request, [loras[file] for file in files]):
            flags = (defect, *(str(getattr(request, flag)) for flag in MASK_FLAGS))
            if flags not in sources:
                sources[flags] = read_sources(request, defect, cache_dir)
            data = (defect, *(str(getattr(request, flag)) for flag in REFERENCE_FLAGS))
            if data not in references:
                references[data] = read_references(request, defect, cache_dir) if by_likeness else None
            recipes.append(
                [make_recipe(request, lora, defect, prompt, *source, references[data]) for source in sources[flags]]
            )
        inputs.append(RequestInputs(request, images[paths], recipes))
    return inputs


def read_images(request: GenerationRequest) -> list[SourceImage]:
    """The source images of a request, with the masks and areas given for each: opened, checked and hashed."""
    source_images = read_source_images(request)
    for source_image in source_images:
        _ = source_image.digests  # cached there: planning reads no file
    return source_images


def read_source_images(request: GenerationRequest) -> list[SourceImage]:
    """The source images that the flags name, every file opened and checked."""
    foreground = Path(request.foreground) if request.foreground not in ("auto", "none") else None
    source_images = find_source_images(request.image, request.mask, foreground, request.roi)
    check_source_images(source_images)
    return source_images


def read_references(request: GenerationRequest, defect: str | None, cache_dir: str | None) -> References:
    """The training defects of one type (all for None) in `--reference_data`, every file opened and checked.

    Raises:
        InputError: no references of this type (DF341), or whatever is wrong with the data.
    """
    data = load_data(request, cache_dir)
    rows = select_defects(data, [defect] if defect else None).get("train")
    if not rows:
        what = f"no reference {f'of {defect!r} ' if defect else ''}with --split {request.split}"
        raise InputError(Problem("DF341", f"--reference_data {request.reference_data}", what, "change the split"))
    check_pairs(rows)
    others = other_types(data["train"], rows)
    return References(rows, others, data_digest(rows) + (f"+{data_digest(others)}" if len(others) else ""))


def read_sources(
    request: GenerationRequest, defect: str | None, cache_dir: str | None = None
) -> list[tuple[MaskSource | None, dict]]:
    """The mask source of the flags, None for given masks, and the settings that decide its masks.

    With `--like` there is one for each missed defect of this type, which take turns.
    """
    if request.mask_source in ("given", "random"):
        return [(random_source if request.mask_source == "random" else None, {})]
    rows = None
    if request.reference_data is not None:
        rows = load_mask_rows(
            request.reference_data, request.object, request.split, defect, request.mask_source == "held_out",
            cache_dir, request.layout, request.mask_classes, request.skip_problems,
        )  # fmt: skip
    if request.mask_source == "procedural":
        shapes, settings = procedural_shapes(request.shapes), {"shapes": request.shapes}
    else:
        masks = load_masks(rows)
        settings = {"reference_masks_sha256": masks_digest(masks)}
        if request.mask_source == "held_out":
            return [(held_out_source(masks), settings)]
        shapes, settings["max_rotation"] = reference_shapes(masks, request.max_rotation), request.max_rotation
    foreground = request.foreground if request.foreground in ("auto", "none") else "given"
    settings |= {
        "foreground": foreground,
        "zone": request.roi is not None,  # its name in earlier plans
        "coverage": request.coverage,
        "masks_per_image": request.masks_per_image,
    }
    finder = find_foreground if foreground == "auto" else None
    places, placement_settings = read_placement(request, defect, rows)
    source = PlacedShapes(shapes, finder, request.coverage, request.masks_per_image, **places)
    settings |= placement_settings
    if request.like is None:
        return [(source, settings)]
    return [
        (
            dataclasses.replace(source, sample_shape=shapes_like(masks, miss.size, miss.area, request.max_rotation)),
            settings | {"like": miss._asdict()},
        )
        for miss in misses_of_type(request, defect, cache_dir)
    ]


def read_placement(request: GenerationRequest, defect: str | None, rows: Dataset | None) -> tuple[dict, dict]:
    """What `PlacedShapes` is given to place masks, nothing for anywhere, and the settings that say so.

    Logs what `auto` chose.
    """
    if request.placement == "anywhere" or rows is None:
        return {}, {"placement": "anywhere"}
    if request.placement == "like_surroundings":
        settings = {"placement": request.placement, "reference_images_sha256": data_digest(rows)}
        return {"surroundings": LikeSurroundings(read_patches(rows), request.max_rotation)}, settings
    references = locate_references(rows, None if request.foreground == "none" else find_foreground)
    placement, reason = "like_references", "--placement"
    if request.placement == "auto":
        placement, reason = choose_placement(references, np.random.default_rng(0))
        logger.warning(f"--placement auto{f' for {defect!r}' if defect else ''}: {placement}; {reason}")
    settings = {"placement": placement, REASON: reason}
    if placement == "anywhere":
        return {}, settings
    values = np.array([reference.values for reference in references])
    settings["reference_places_sha256"] = hashlib.sha256(values.round(4).tobytes()).hexdigest()
    return {"like_references": LikeReferences(values)}, settings
