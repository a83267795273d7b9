"""The files that requests name: source images with their masks, LoRAs, mask sources; each is read and checked once."""

from collections.abc import Sequence

from defectfill_dataset import Case, MaskSource
from defectfill_dataset.inputs import MASK_FLAGS, read_cases, read_source

from ..lora import LoraFile, read_lora
from .plan import RequestInputs, choose_defects, make_recipe
from .requests import GenerationRequest


def read_inputs(requests: Sequence[GenerationRequest], cache_dir: str | None) -> list[RequestInputs]:
    """Each request with its source images and recipes.

    Raises:
        InputError: whatever is wrong with the files, the LoRAs, or the defect types asked of them.
    """
    images: dict[tuple[str, ...], list[Case]] = {}
    loras: dict[str, LoraFile] = {}
    sources: dict[tuple[str | None, ...], tuple[MaskSource | None, dict]] = {}
    inputs = []
    for request in requests:
        paths = tuple(map(str, (request.image, request.mask, request.foreground, request.zone)))
        if paths not in images:
            images[paths] = read_images(request)
        for path in request.lora:
            if path not in loras:
                loras[path] = read_lora(path)
        recipes = []
        for lora, defect, prompt in choose_defects(request, [loras[path] for path in request.lora]):
            flags = (defect, *(str(getattr(request, flag)) for flag in MASK_FLAGS))
            if flags not in sources:
                sources[flags] = read_source(request, defect, cache_dir)
            recipes.append(make_recipe(request, lora, defect, prompt, *sources[flags]))
        inputs.append(RequestInputs(request, images[paths], recipes))
    return inputs


def read_images(request: GenerationRequest) -> list[Case]:
    """The source images of a request, with the masks and areas given for each: opened, checked and hashed."""
    cases = read_cases(request)
    for case in cases:
        _ = case.digests  # cached there: planning reads no file
    return cases
