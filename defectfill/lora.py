"""The LoRA file: any diffusers loads it as it was trained; reading it checks every tensor."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from defectfill_dataset import InputError, Problem, file_digest

from .base_model import BaseModel


LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER = "default"

# The layers that get LoRA: (of the UNet, of the text encoder). Each choice holds the one before it. The last names are
# the convolutions of resnets, downsamplers and upsamplers, which `conv_rank` is for.
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2"), ("fc1", "fc2")
PROJECTIONS = ("proj_in", "proj_out", "time_emb_proj")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv")
WITH_FEED_FORWARD = tuple(a + b for a, b in zip(ATTENTION, FEED_FORWARD))
LORA_TARGETS = {
    "attention": ATTENTION,
    "attention+ff": WITH_FEED_FORWARD,
    "all": (WITH_FEED_FORWARD[0] + PROJECTIONS + CONVOLUTIONS, WITH_FEED_FORWARD[1]),
}

# Only what older peft versions also know, and no lora_dropout: diffusers would leave it active at inference.
PORTABLE_CONFIG = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "lora_bias", "fan_in_fan_out", "init_lora_weights",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file's content.

    Args:
        tensors: by portable name, as `lora_parameters` names them.
        record: the training run's base, prompts, resolution and more; empty if another program wrote the file.
        sha256: of the file.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    record: dict
    sha256: str


def add_lora(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str = "attention",
    conv_rank: int | None = None,
) -> None:
    """Adds LoRA to layers of both models, in fp32 whatever their own precision; the rest is frozen.

    Args:
        alpha: every layer is scaled by alpha / rank, convolutions of another rank too.
        targets: a key of `LORA_TARGETS`.
        conv_rank: of convolutions; None is `rank`.
    """
    for model, modules in zip((unet, text_encoder), LORA_TARGETS[targets]):
        model.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(modules)
        )
        if conv_rank not in (None, rank):
            convolutions = set(CONVOLUTIONS).intersection(modules)
            config.rank_pattern = dict.fromkeys(sorted(convolutions), conv_rank)
            config.alpha_pattern = dict.fromkeys(sorted(convolutions), alpha * conv_rank / rank)
        model.add_adapter(config, adapter_name=ADAPTER)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # Autocast brings the fp32 adapters down to the activations' precision; peft would bring the
                # activations up first, for the same result and 20-30 % more activation memory.
                module.cast_input_dtype_enabled = False
        cast_training_params(model, dtype=torch.float32)


def lora_parameters(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every LoRA parameter by its portable name.

    The text encoder's names keep the `text_model.` level that transformers 5.6 dropped: new diffusers strips it, old
    diffusers and other programs need it.
    """
    return {
        prefix + name.replace(f".{ADAPTER}.", "."): parameter
        for prefix, model in (("unet.", unet), ("text_encoder.text_model.", text_encoder))
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def save_lora(path: Path, unet: torch.nn.Module, text_encoder: torch.nn.Module, record: dict) -> None:
    """Writes the LoRA of both models, in fp32, with its alpha and `record` in the file's header; not atomically.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in lora_parameters(unet, text_encoder).items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} LoRA tensors are not finite, {broken[0]} first; no LoRA is written")
    adapter = {}
    for prefix, model in (("unet", unet), ("text_encoder", text_encoder)):
        config = model.peft_config[ADAPTER].to_dict()
        adapter |= {f"{prefix}.{key}": _plain(config[key]) for key in PORTABLE_CONFIG}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter),
        "defectfill": json.dumps(record | {"tensors": len(tensors)}),
    }
    save_file(tensors, path, metadata=header)


def _plain(value):
    return sorted(value) if isinstance(value, set) else value


def read_lora(source: str | Path) -> LoraFile:
    """Reads a LoRA from a file, a folder that holds `LORA_FILE`, or a Hub id.

    Raises:
        InputError: not found (DF400), not a safetensors file (DF401), not a LoRA of both models (DF402), or tensors
            that are not finite (DF403) or missing (DF404).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / LORA_FILE
    elif not path.exists():
        try:
            path = Path(hf_hub_download(str(source), LORA_FILE))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            what = f"no such file or folder, nor a Hub id that can be reached ({reason})"
            raise InputError(Problem("DF400", f"--lora {source}", what)) from error
    if not path.is_file():
        raise InputError(Problem("DF400", f"--lora {source}", f"holds no {LORA_FILE}"))
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        record = json.loads(header.get("defectfill", "{}"))
    except (SafetensorError, ValueError) as error:
        raise InputError(Problem("DF401", path, f"not a whole safetensors file: {error}")) from error
    for prefix in ("unet.", "text_encoder.text_model."):
        if not any(name.startswith(prefix) and ".lora_" in name for name in tensors):
            what = f"no '{prefix}... .lora_A.weight' tensors; not a LoRA of train_defectfill.py"
            raise InputError(Problem("DF402", path, what))
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = f"{len(broken)} tensors are not finite, {broken[0]} first"
        raise InputError(Problem("DF403", path, what, "train again"))
    if len(tensors) != record.get("tensors", len(tensors)):
        what = f"{len(tensors)} of {record['tensors']} tensors; the file was truncated or changed"
        raise InputError(Problem("DF404", path, what))
    return LoraFile(path, tensors, record, file_digest(path))


def check_fits(lora: LoraFile, base: BaseModel) -> None:
    """Checks from shapes alone, without loading a weight, that each tensor fits a layer of `base`.

    Raises:
        InputError: the LoRA was trained on a base of another shape (DF410).
    """
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(base.unet)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(base.text_encoder))
    places = {f"unet.{name}": module for name, module in unet.named_modules()}
    places |= {f"text_encoder.text_model.{name}": module for name, module in text_encoder.named_modules()}
    for name, tensor in lora.tensors.items():
        module, _, end = name.partition(".lora_")
        shape = getattr(places.get(module), "weight", torch.empty(0)).shape
        # A is (rank, in, ...), with the kernel of a convolution; B is (out, rank, ...), with a kernel of 1.
        fits = len(shape) == tensor.dim() > 1 and (
            tensor.shape[1:] == shape[1:] if end.startswith("A") else tensor.shape[0] == shape[0]
        )
        if not fits:
            trained_on = lora.record.get("base", "an unknown base")
            there = tuple(shape) if shape else "nothing"
            what = f"{name} is {tuple(tensor.shape)}, but {base.name} has {there} there"
            raise InputError(Problem("DF410", lora.path, what, f"the LoRA was trained on {trained_on}"))


def load_lora(pipe, lora: LoraFile) -> None:
    """Loads the LoRA through diffusers' `load_lora_weights` and checks that each tensor arrived.

    Raises:
        RuntimeError: the pipeline does not hold exactly the file's tensors.
    """
    pipe.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=ADAPTER)
    compare_lora(lora, pipe.unet, pipe.text_encoder)


@torch.no_grad()
def fuse_lora(pipe) -> Callable[[], None]:
    """Fuses the loaded LoRA into the weights of `pipe`; returns the function that takes it out again, bit for bit.

    The original weights are kept on the CPU: subtracting the LoRA, as diffusers' `unfuse_lora` does, would leave
    rounding errors in the images of the next one.
    """
    modules = (module for model in (pipe.unet, pipe.text_encoder) for module in model.modules())
    fused = [module.get_base_layer().weight for module in modules if isinstance(module, BaseTunerLayer)]
    kept = [weight.detach().to("cpu", copy=True) for weight in fused]
    pipe.fuse_lora()
    pipe.unload_lora_weights()

    @torch.no_grad()
    def unfuse() -> None:
        for weight, before in zip(fused, kept):
            weight.copy_(before)

    return unfuse


def compare_lora(lora: LoraFile, unet: torch.nn.Module, text_encoder: torch.nn.Module) -> None:
    """Raises RuntimeError unless both models hold exactly the file's tensors, bit for bit in the models' precision."""
    loaded = lora_parameters(unet, text_encoder)
    missing = sorted(lora.tensors.keys() ^ loaded.keys())
    if missing:
        raise RuntimeError(
            f"{lora.path}: {len(missing)} LoRA tensors are only in the file or only in the model: {missing[0]}"
        )
    for name, parameter in loaded.items():
        if not torch.equal(parameter.detach().cpu(), lora.tensors[name].to(parameter.dtype)):
            raise RuntimeError(f"{lora.path}: {name} did not load as it was saved")


def reload_and_compare(pipe, path: Path) -> None:
    """Replaces the trained LoRA in `pipe` by the saved one, and checks that weights and alpha are equal.

    Raises:
        RuntimeError: the file does not load as it was saved.
    """
    lora, scalings = read_lora(path), _scalings(pipe)
    pipe.unload_lora_weights()
    load_lora(pipe, lora)
    if _scalings(pipe) != scalings:
        raise RuntimeError(f"{path}: alpha did not load as it was saved")


def _scalings(pipe) -> list[float]:
    """alpha / rank of every LoRA layer."""
    modules = (module for model in (pipe.unet, pipe.text_encoder) for module in model.modules())
    return [module.scaling[ADAPTER] for module in modules if isinstance(module, BaseTunerLayer)]
