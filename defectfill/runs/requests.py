"""What a generation command asks for, parsed: one request for the command itself, or one for each line of `--cases`.

Field names are flag names.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """Images to make, by the flags that a line of `--cases` may hold."""

    # model and sampling
    lora: list[str]
    lora_alpha: float | None  # of files that do not tell their own
    prompt: str | None
    generation_prompt: str | None  # defect or object: which of the LoRA's own prompts, without `prompt`
    prompt_noise: float
    lora_scale: list[float] | None  # one strength, or least and greatest; None: 1
    num_images: int | None  # of each defect type; None: one an image
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: list[float]  # start and end, in [0, 1]
    composite: str  # feather, exact or grid
    zoom: str  # auto, on or off
    zoom_context: float | None
    zoom_min_area: float | None
    # source images and masks
    image: Path
    defect: list[str] | None
    mask_source: str
    mask: Path | None
    reference_data: str | None
    object: str | None
    split: str
    layout: str
    mask_classes: Sequence[str]
    skip_problems: bool
    like: Path | None  # defects that a detector missed
    max_rotation: float  # degrees
    shapes: list[str]
    seed: int
    # placement of masks
    placement: str  # auto, anywhere, like_references or like_surroundings
    foreground: str  # auto, none or a path
    roi: Path | None
    coverage: float  # in (0, 1]
    masks_per_image: int


@dataclasses.dataclass(frozen=True)
class GenerationCommand:
    """The requests, and the flags that hold for all of them."""

    requests: list[GenerationRequest]
    # base model; None: as the LoRA was trained
    pretrained_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None
    mixed_precision: str | None  # None: by the device
    resolution: int | None  # pixels
    scheduler: str
    # speed
    fuse_lora: bool
    channels_last: bool
    torch_compile: str | None  # blocks or unet
    # candidates and selection
    num_candidates: int
    batch_size: int | None
    selection: str
    lpips_net: str
    likeness_net: Path | None  # None: the base's VAE encoder
    min_change: float
    max_deviation: float | None
    max_attempts: int
    # output
    output_dir: Path
    keep_metadata: bool
    verify: bool
