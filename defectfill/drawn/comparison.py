"""What the scripts that compare LoRAs on drawn parts share."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline

from ..base_model import read_base
from ..lora import LoraFile, load_lora, read_lora
from ..sampling import load_pipeline
from ..seam import feather_alpha


def load_base(base: str, lora: LoraFile | None) -> StableDiffusionInpaintPipeline:
    """The base's pipeline with DDIM on the CPU, in fp32, with the LoRA if there is one."""
    pipe = load_pipeline(read_base(base), None, "no", torch.device("cpu"))
    if lora:
        load_lora(pipe, lora)
    return pipe


def read_whole_image_lora(path: Path) -> LoraFile:
    """A LoRA trained on whole images: the comparisons inpaint no crops."""
    lora = read_lora(path)
    if lora.record.get("zoom"):
        raise SystemExit(f"{path}: trained on crops; use a LoRA of ablate.py's variant 'whole images'")
    return lora


def feather(image: torch.Tensor, candidates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(..., 3, R, R) candidates blended into the (3, R, R) image inside the (1, R, R) mask."""
    return torch.lerp(image, candidates, torch.from_numpy(feather_alpha(mask[0].numpy() > 0.5)) / 255)


def add_comparison_flags(add: Callable, images: int) -> None:
    """The flags of the scripts that compare what LoRAs of ablate.py generate."""
    add("--base", required=True, metavar="DIR", help="Base made by make_tiny_base.py.")
    add("--segmenter", required=True, metavar="DIR", help="Segmenter made by train_segmenter.py.")
    lora_help = "LoRAs of the variant 'whole images', in the runs/ of an output folder of ablate.py."
    add("--lora", nargs="+", type=Path, required=True, metavar="DIR", help=lora_help)
    add("--images", type=int, default=images, metavar="N", help="Good parts for each LoRA.")
    add("--resolution", type=int, default=128, metavar="PX", help="Side of the images.")
    add("--seed", type=int, default=0, metavar="N", help="Of parts, masks and noise.")
