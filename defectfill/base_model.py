"""The base inpainting model: its configuration, checked before a weight is loaded, and the one loader of its parts."""

import dataclasses
import json
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import file_exists
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from defectfill_dataset import InputError, Problem

from .base_files import (
    ADAPTER_CONFIG,
    CONFIGS,
    WEIGHTS,
    adapter_error,
    base_digest,
    check_plain,
    check_pointers,
    check_weight_files,
    read_config,
    shard_names,
    tokenizer_files,
)
from .patience import download, file_names


SD2_MIRROR = "sd2-community/stable-diffusion-2-inpainting"
SD1_MIRROR = "stable-diffusion-v1-5/stable-diffusion-inpainting"

# Beginnings of ids that left the Hub, when, and where the inpainting model is today.
MOVED = {
    "stabilityai/stable-diffusion-2": ("November 2025", SD2_MIRROR),
    "runwayml/": ("August 2024", SD1_MIRROR),
}
SINGLE_FILES = (".safetensors", ".ckpt")
SD2_LAYER = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"  # of a single file
KINDS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "clip_text_model"}
USABLE = f"use an inpainting model of Stable Diffusion 1 or 2, such as {SD2_MIRROR}"
BYTES = 512  # tokens of the smallest CLIP tokenizer: each byte, within and at the end of a word
UNREADABLE = (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The configuration of a base model.

    Args:
        name: Hub id, or the folder's full path.
        revision: the commit on the Hub, None for a folder.
        variant: of its weight files, such as fp16.
        digest: sha256 of a folder's configuration, tokenizer and weights; None on the Hub, where the commit says it.
    """

    name: str
    revision: str | None
    unet: dict
    vae: dict
    text_encoder: dict
    scheduler: dict
    variant: str | None = None
    digest: str | None = None

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels a side of one latent cell."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def unet_scale_factor(self) -> int:
        """Latent cells a side of one cell of the UNet's lowest level."""
        return 2 ** (len(self.unet["block_out_channels"]) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def read_local_base(name: str) -> BaseModel | None:
    """`read_base` of a folder; None for a base on the Hub."""
    return read_base(name) if Path(name).expanduser().is_dir() else None


def read_base(
    name: str, revision: str | None = None, cache_dir: str | None = None, variant: str | None = None
) -> BaseModel:
    """Reads and checks the base model `name`, a folder or a Hub id, without loading a weight.

    Raises:
        InputError: not found (DF180), a single file (DF177), git-lfs pointers (DF178), a broken configuration
            (DF176), not an inpainting model (DF181), parts that do not fit, as in SDXL (DF175), no safetensors
            weights of the variant, or anything else in their place (DF182), or a prediction type the equations do not
            cover (DF183).
    """
    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    if is_local:
        folder = folder.resolve()
        name = str(folder)
    elif folder.is_file() or folder.suffix.lower() in SINGLE_FILES:
        raise single_file_error(folder)
    files = find_configs(name, folder if is_local else None, revision, cache_dir)
    if is_local:
        check_plain(folder)
        check_pointers(folder, [*files.values(), *tokenizer_files(folder)])
    unet, vae, text_encoder, scheduler, _ = (read_config(file) for file in files.values())
    sha = None if is_local else files["unet/config.json"].parents[1].name
    base = BaseModel(name, sha, unet, vae, text_encoder, scheduler, variant)
    check_kind(base)
    check_parts(base)
    if is_local:
        check_weight_files(folder, variant)
        return dataclasses.replace(base, digest=base_digest(folder, variant))
    check_hub_files(base, cache_dir)
    return base


def check_hub_files(base: BaseModel, cache_dir: str | None) -> None:
    """Checks on the Hub, as `base_files` in a folder, that no index names pickled weights and there is no adapter.

    Raises:
        InputError: there is (DF182), or an index cannot be read (DF176).
    """
    options: dict = {"revision": base.revision, "cache_dir": cache_dir}
    ends = [f".safetensors.index{f'.{variant}' if variant else ''}.json" for variant in {None, base.variant}]
    files = [*(f"{part}/{stem}{end}" for part, stem in WEIGHTS.items() for end in ends)]
    files.append(f"text_encoder/{ADAPTER_CONFIG}")
    try:
        there = file_names(base.name, base.revision)
        files = [file for file in files if file in there]
    except TimeoutError:  # the Hub is silent: one wait is enough
        options["local_files_only"] = True
    except Exception:  # offline, or a mirror without lists: each file is looked for
        pass
    for file in files:
        try:
            found = download(base.name, file, **options)
        except UNREADABLE as error:  # it is not there, or cannot be reached, by the libraries neither
            if isinstance(error, TimeoutError):
                options["local_files_only"] = True
            continue
        if found.name == ADAPTER_CONFIG:
            raise adapter_error(f"{base.name}/{file}")
        shard_names(found)


def find_configs(name: str, folder: Path | None, revision: str | None, cache_dir: str | None) -> dict[str, Path]:
    """The file of each of `CONFIGS`, in the folder or downloaded.

    Raises:
        InputError: one cannot be found (DF180).
    """
    files = {}
    for part in CONFIGS:
        try:
            files[part] = folder / part if folder else download(name, part, revision=revision, cache_dir=cache_dir)
            files[part].stat()
        except UNREADABLE as error:
            moved = [
                f" It left the Hub in {when}; use {mirror}."
                for start, (when, mirror) in MOVED.items()
                if name.startswith(start)
            ]
            reason = str(error).strip().splitlines()[0]
            what = f"cannot read {part}: not a diffusers model folder, and not reachable on the Hub."
            text = f"{what}{''.join(moved)} ({reason})"
            raise InputError(Problem("DF180", f"--pretrained_model_name_or_path {name}", text)) from error
    return files


def single_file_error(file: Path) -> InputError:
    """The error of a checkpoint in one file, the form that other programs use: how to make it a diffusers folder."""
    where = f"--pretrained_model_name_or_path {file}"
    if not file.is_file():
        return InputError(Problem("DF180", where, "no such file", "give a diffusers model folder or a Hub id"))
    check_pointers(file.parent, [file])
    target = str(file.with_suffix("")) if file.suffix else f"{file}-diffusers"
    # For Stable Diffusion 2, diffusers would look for the configuration where it no longer is.
    config = f', config="{SD2_MIRROR}"' if is_sd2_file(file) else ""
    source, folder = (json.dumps(path, ensure_ascii=False) for path in (str(file), target))
    code = (
        "from diffusers import StableDiffusionInpaintPipeline as P; "
        f"P.from_single_file({source}{config}).save_pretrained({folder})"
    )
    fix = f"convert it once and give {target}: python -c {shlex.quote(code)}"
    return InputError(Problem("DF177", where, "is a single file, not a diffusers model folder", fix))


def is_sd2_file(file: Path) -> bool:
    """Whether a single file holds Stable Diffusion 2, by its text embeddings of 1024 channels."""
    try:
        with safe_open(file, "pt") as tensors:
            return SD2_LAYER in tensors.keys() and tensors.get_slice(SD2_LAYER).get_shape()[-1] == 1024
    except (SafetensorError, OSError):
        return False


def check_kind(base: BaseModel) -> None:
    """Checks that the configurations are of a Stable Diffusion 1 or 2, from what they say of themselves.

    Raises:
        InputError: they are of other models (DF175), or their prediction type is unknown (DF183).
    """
    kinds = {"unet": base.unet.get("_class_name"), "vae": base.vae.get("_class_name")}
    kinds["text_encoder"] = base.text_encoder.get("model_type")
    for part, kind in kinds.items():
        if kind not in (None, KINDS[part]):
            raise InputError(Problem("DF175", base.name, f"its {part} is a {kind}, not a {KINDS[part]}", USABLE))
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if base.unet.get(key) is not None:
            what = f"its UNet needs more than the text, as SDXL's does ({key} {base.unet[key]})"
            raise InputError(Problem("DF175", base.name, what, USABLE))
    prediction_type = base.scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        fix = "epsilon and v_prediction are supported"
        raise InputError(Problem("DF183", base.name, f"predicts '{prediction_type}'", fix))


def check_parts(base: BaseModel) -> None:
    """Builds the base's models without weights, and checks that they fit each other.

    Raises:
        InputError: a configuration cannot be used (DF176), the UNet is not for inpainting (DF181), or the models do
            not fit each other (DF175).
    """
    unet, vae, text_encoder, _ = (
        build_empty(base, *part)
        for part in (
            ("unet/config.json", lambda: UNet2DConditionModel.from_config(base.unet)),
            ("vae/config.json", lambda: AutoencoderKL.from_config(base.vae)),
            ("text_encoder/config.json", lambda: CLIPTextModel(CLIPTextConfig.from_dict(base.text_encoder))),
            ("scheduler/scheduler_config.json", lambda: DDPMScheduler.from_config(base.scheduler)),
        )
    )
    for name, config in {"unet": base.unet, "vae": base.vae}.items():
        if "block_out_channels" not in config:
            raise InputError(Problem("DF176", f"{base.name}/{name}/config.json", "has no block_out_channels"))
    if unet.config.in_channels != 9:
        what = f"its UNet takes {unet.config.in_channels} channels, not 9: not an inpainting model"
        raise InputError(Problem("DF181", base.name, what, USABLE))
    widths, width = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if {width} != (set(widths) if isinstance(widths, (list, tuple)) else {widths}):
        what = f"its UNet takes text embeddings of {widths} channels, its text encoder makes {width}"
        raise InputError(Problem("DF175", base.name, what, USABLE))
    if unet.config.out_channels != vae.config.latent_channels:
        what = f"its UNet makes latents of {unet.config.out_channels} channels, its VAE {vae.config.latent_channels}"
        raise InputError(Problem("DF175", base.name, what, USABLE))


def build_empty(base: BaseModel, file: str, build: Callable):
    """What `build` makes of a configuration file, without weights.

    Raises:
        InputError: the configuration cannot be used (DF176).
    """
    try:
        with silenced(), init_empty_weights():
            return build()
    except Exception as error:  # a wrong value may break anything in the libraries
        what = f"cannot be used: {' '.join(str(error).split())}"
        raise InputError(Problem("DF176", f"{base.name}/{file}", what, "download it again")) from error


def check_resolution(base: BaseModel, resolution: int) -> None:
    """Raises InputError (DF184) unless the base's VAE and UNet can halve `resolution` at each of their levels."""
    step = base.vae_scale_factor * base.unet_scale_factor
    if resolution < step or resolution % step:
        what = f"must be a multiple of {step} with {base.name}"
        raise InputError(Problem("DF184", f"--resolution {resolution}", what))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and weights


def load_tokenizer(base: BaseModel, cache_dir: str | None) -> CLIPTokenizer:
    """The base's tokenizer.

    Raises:
        InputError: it cannot be loaded (DF176), or does not fit the text encoder (DF175).
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            base.name, subfolder="tokenizer", revision=base.revision, cache_dir=cache_dir
        )
    except Exception as error:  # the tokenizers library raises no narrower one
        what = f"cannot be loaded: {' '.join(str(error).split())}"
        raise InputError(Problem("DF176", f"{base.name}/tokenizer", what, "download it again")) from error
    config = CLIPTextConfig.from_dict(base.text_encoder)
    known, longest = len(tokenizer), tokenizer.model_max_length
    short = isinstance(longest, int) and 0 < longest <= config.max_position_embeddings
    if not BYTES <= known <= config.vocab_size or not short:
        what = (
            f"its tokenizer has {known} tokens and prompts of {longest}, its text encoder takes {config.vocab_size} "
            f"and {config.max_position_embeddings}"
        )
        raise InputError(Problem("DF175", base.name, what, "the files of tokenizer/ are of another model or missing"))
    return tokenizer


def check_prompt(prompt: str, tokenizer: CLIPTokenizer) -> None:
    """Raises InputError (DF174) if the prompt is longer than what the text encoder reads."""
    number = len(tokenizer(prompt).input_ids)
    if number > tokenizer.model_max_length:
        what = f"{number} tokens, but the text encoder reads {tokenizer.model_max_length}"
        raise InputError(Problem("DF174", f"'{prompt}'", what, "shorten it"))


def load_models(base: BaseModel, cache_dir: str | None, dtype: torch.dtype) -> tuple:
    """(unet, text_encoder, vae, noise scheduler) of the base, the vae frozen, in `dtype`; each weight is the file's.

    Raises:
        InputError: the weights cannot be loaded (DF182), or do not match the configuration (DF179).
    """
    unet = load_model(base, "unet", UNet2DConditionModel, cache_dir, dtype)
    text_encoder = load_model(base, "text_encoder", CLIPTextModel, cache_dir, dtype)
    vae = load_model(base, "vae", AutoencoderKL, cache_dir, dtype).requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(
        base.name, subfolder="scheduler", revision=base.revision, cache_dir=cache_dir
    )
    return unet, text_encoder, vae, scheduler


def load_model(base: BaseModel, part: str, kind: type, cache_dir: str | None, dtype: torch.dtype):
    """A model of the base, all its weights and no others from the part's files.

    What the libraries themselves allow stays allowed: the position ids of old text encoders, the `text_model.` level
    of transformers before 5.6, the VAE's attention layers by their old names.

    Raises:
        InputError: the weights cannot be loaded (DF182), or keys are missing, unexpected or of another shape (DF179).
    """
    options = {
        "subfolder": part, "revision": base.revision, "variant": base.variant, "cache_dir": cache_dir, "dtype": dtype,
        "use_safetensors": True, "output_loading_info": True,
    }  # fmt: skip
    if kind is CLIPTextModel:
        options["ignore_mismatched_sizes"] = True  # they are in the loading info
    try:
        with silenced():
            try:
                model, info = kind.from_pretrained(base.name, **options)
            except ValueError:  # diffusers, at the first weight of another shape; once more, to know all
                options |= {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
                model, info = kind.from_pretrained(base.name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"its {part}'s safetensors weights cannot be loaded: {' '.join(str(error).split())}"
        raise InputError(Problem("DF182", base.name, what, variant_hint(base, part))) from error
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": {name for name, *_ in info["mismatched_keys"]},
    }
    told = [f"{len(keys)} keys are {how} (first: {min(keys)})" for how, keys in wrong.items() if keys]
    if told:
        what = f"the weights do not match config.json: {', '.join(told)}"
        raise InputError(
            Problem("DF179", f"{base.name}/{part}", what, "they are of another model; download both again")
        )
    return model


def variant_hint(base: BaseModel, part: str) -> str:
    """What to do if the Hub has only fp16 weights of a part; of a folder the files were checked before."""
    try:
        if base.revision and not base.variant:
            file = f"{part}/{WEIGHTS[part]}.fp16.safetensors"
            return "add --variant fp16" if file_exists(base.name, file, revision=base.revision) else ""
    except UNREADABLE:
        pass  # it cannot be reached: then that is the error
    return ""


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps diffusers and transformers from printing what one message says after it."""
    libraries = diffusers.utils.logging, transformers.utils.logging
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
