"""The LoRA file: diffusers and other programs load it as it was trained; reading it checks every tensor.

It has the names of kohya's scripts, with each layer's alpha beside its matrices: the one form that every program we
know reads at full strength. The layer `lora_unet_mid_block_attentions_0_proj_in` has the matrices `.lora_down.weight`
(A, as peft says) and `.lora_up.weight` (B), and `.alpha`; what it adds is scaled by alpha / rank.
"""

import dataclasses
import json
import logging
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from defectfill_dataset import InputError, Problem, file_digest
from defectfill_dataset.text import Schema, check_schema, parse_json, read_json

from .base_model import BaseModel
from .patience import download


logger = logging.getLogger(__name__)

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

# A tensor's name as kohya, diffusers (new and old) and peft write it, and its layer's in them all.
TENSOR = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<matrix>A|B|down|up)(?:\.default)?\.weight|\.alpha)"
)
LAYER = re.compile(
    r"(?:base_model_model_)?"
    r"(?:(?:lora_)?(?P<unet>unet)_|(?P<text>lora_te1?|text_encoder)_)?(?P<path>(?:text_model_)?(?P<place>.+))"
)
MATRICES = {"A": "lora_down.weight", "down": "lora_down.weight", "B": "lora_up.weight", "up": "lora_up.weight"}


def portable_name(name: str) -> str | None:
    """A LoRA tensor's name in kohya's form, from any known form; None if it is no plain LoRA's tensor."""
    tensor = TENSOR.fullmatch(name)
    if not tensor:
        return None
    dotted = tensor["layer"].replace(".processor.", ".")
    layer = LAYER.fullmatch(re.sub(r"to_out$", "to_out_0", dotted.replace(".", "_")))
    assert layer  # it matches any text
    of_text = layer["text"] or not layer["unet"] and re.match("(text_model_)?encoder_layers_", layer["path"])
    prefix = f"lora_te_text_model_{layer['place']}" if of_text else f"lora_unet_{layer['path']}"
    return f"{prefix}.{MATRICES[tensor['matrix']] if tensor['matrix'] else 'alpha'}"


def portable_layer(name: str) -> str:
    """The portable name of a layer, from its dotted one: `unet.` or `text_encoder.` and its place in the model."""
    return str(portable_name(f"{name}.alpha")).removesuffix(".alpha")


Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Texts = Annotated[dict[str, str], Field(max_length=10_000)]
# Of a layer, or the end of it. peft takes more for a regular expression, and some of those run for ever.
LayerName = Annotated[str, Field(pattern=r"^\^?[A-Za-z0-9_.\-]{1,200}\$?$")]
LayerNames = Annotated[list[LayerName], Field(max_length=10_000)]


class Appearance(Schema):
    """The `colour_stats.reference_statistics` of a defect type."""

    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    covariance: Annotated[
        list[Annotated[list[Finite], Field(min_length=3, max_length=3)]], Field(min_length=3, max_length=3)
    ]
    strangest: Annotated[float, Field(ge=0, le=1e12)] | None = None
    seam_step: Finite | None = None


class Zoom(Schema):
    """The crops it was trained on."""

    context: Annotated[float, Field(ge=1, le=1e6)] = 3.0
    min_area: Annotated[float, Field(ge=0, lt=1)] = 0.01


class Record(Schema):
    """What is used of a training run's record in its LoRA's header."""

    base: str | None = None
    base_sha256: str | None = None
    revision: str | None = None
    variant: str | None = None
    resolution: Annotated[int, Field(gt=0, le=8192)] | None = None
    object: str | None = None
    prompts: Texts = {}
    defect_prompts: Texts = {}
    zoom: Zoom | None = None
    appearance: dict[str, Appearance | None] = {}
    tensors: int | None = None


class PeftConfig(Schema):
    """A configuration of peft: what is used of it, and what peft would read as regular expressions."""

    lora_alpha: Annotated[float, Field(gt=0, le=1e9)] | None = None
    alpha_pattern: (
        Annotated[dict[LayerName, Annotated[float, Field(gt=0, le=1e9)]], Field(max_length=10_000)] | None
    ) = None
    rank_pattern: Annotated[dict[LayerName, int], Field(max_length=10_000)] | None = None
    use_rslora: bool | None = None
    target_modules: LayerNames | None = None
    exclude_modules: LayerNames | None = None
    layers_pattern: LayerName | LayerNames | None = None


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA file's content.

    Args:
        tensors: by portable name: matrices as `lora_parameters` names them, and every layer's alpha.
        record: the training run's base, prompts, resolution and more; empty if another program wrote the file.
        sha256: of the file.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    record: dict
    sha256: str

    @property
    def best_pass(self) -> str:
        """Whose prompt to generate with: the defect pass's alone has seen defects with their own masks.

        Records of older versions have the object pass's only.
        """
        return "defect" if self.record.get("defect_prompts") else "object"

    def prompts(self, of_pass: str | None = None) -> dict[str, str]:
        """The prompt of each defect type, of the "defect" or the "object" pass; {} if the record has none."""
        return self.record.get({"defect": "defect_prompts", "object": "prompts"}[of_pass or self.best_pass], {})


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
        alpha: every layer is scaled by alpha / rank, convolutions of another rank too; in fp32, as in the file.
        targets: a key of `LORA_TARGETS`.
        conv_rank: of convolutions; None is `rank`.
    """
    alpha = torch.tensor(alpha, dtype=torch.float32).item()
    for model, modules in zip((unet, text_encoder), LORA_TARGETS[targets]):
        model.requires_grad_(False)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(modules)
        )
        if conv_rank not in (None, rank):
            convolutions = set(CONVOLUTIONS).intersection(modules)
            config.rank_pattern = dict.fromkeys(sorted(convolutions), conv_rank)
            conv_alpha = torch.tensor(alpha * conv_rank / rank, dtype=torch.float32).item()
            config.alpha_pattern = dict.fromkeys(sorted(convolutions), conv_alpha)
        model.add_adapter(config, adapter_name=ADAPTER)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # Autocast brings the fp32 adapters down to the activations' precision; peft would bring the
                # activations up first, for the same result and 20-30 % more activation memory.
                module.cast_input_dtype_enabled = False
        cast_training_params(model, dtype=torch.float32)


def lora_sizes(base: BaseModel, rank: int, targets: str = "attention", conv_rank: int | None = None) -> list[int]:
    """The number of elements of each LoRA matrix on this base, without loading a weight."""
    unet, text_encoder = empty_models(base)
    with init_empty_weights():
        add_lora(unet, text_encoder, rank, alpha=1, dropout=0, targets=targets, conv_rank=conv_rank)
    return [parameter.numel() for parameter in lora_parameters(unet, text_encoder).values()]


def lora_parameters(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every LoRA parameter by its portable name."""
    return {
        str(portable_name(f"{prefix}.{name}")): parameter
        for prefix, model in (("unet", unet), ("text_encoder", text_encoder))
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def lora_layers(unet: torch.nn.Module, text_encoder: torch.nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every layer with LoRA and its portable name."""
    for prefix, model in (("unet", unet), ("text_encoder", text_encoder)):
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield portable_layer(f"{prefix}.{name}"), module


def save_lora(path: Path, unet: torch.nn.Module, text_encoder: torch.nn.Module, record: dict) -> None:
    """Writes the LoRA of both models, in fp32, with `record` in the file's header; not atomically.

    Raises:
        FloatingPointError: a weight is not finite; nothing is written.
    """
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in lora_parameters(unet, text_encoder).items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} LoRA tensors are not finite, {broken[0]} first; no LoRA is written")
    for name, layer in lora_layers(unet, text_encoder):
        tensors[f"{name}.alpha"] = torch.tensor(layer.lora_alpha[ADAPTER], dtype=torch.float32)
    header = {"format": "pt", "defectfill": json.dumps(record | {"tensors": len(tensors)})}
    save_file(tensors, path, metadata=header | kohya_metadata(unet, record))
    sort_header(path)


def kohya_metadata(unet: torch.nn.Module, record: dict) -> dict[str, str]:
    """What programs that know kohya's files show of one: rank, alpha, base, steps, the trained phrases."""
    config = unet.peft_config[ADAPTER]
    conv_rank = config.rank_pattern.get("conv1", config.r)
    conv = {"conv_dim": str(conv_rank), "conv_alpha": str(config.alpha_pattern.get("conv1", config.lora_alpha))}
    width = unet.config["cross_attention_dim"]  # of the text encoder's output: 768 in version 1, 1024 in version 2
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": config.r,
        "ss_network_alpha": config.lora_alpha,
        "ss_network_args": json.dumps(conv) if "conv1" in config.target_modules else "{}",
        "ss_base_model_version": {768: "sd_v1", 1024: "sd_v2"}.get(width),
        "ss_v2": str(width == 1024),
        "ss_sd_model_name": record.get("base"),
        "ss_steps": record.get("steps"),
        "ss_seed": record.get("seed"),
        "ss_resolution": record.get("resolution") and "({0}, {0})".format(record["resolution"]),
        "ss_tag_frequency": json.dumps({"defectfill": dict.fromkeys(record.get("defect_prompts", {}).values(), 1)}),
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def sort_header(path: Path) -> None:
    """Sorts the metadata of a safetensors file, whose order is random, so that equal LoRAs are equal files."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_lora(source: str | Path, alpha: float | None = None) -> LoraFile:
    """Reads a LoRA from a file, a folder that holds `LORA_FILE`, or a Hub id.

    Args:
        alpha: of a file that does not tell its own.

    Raises:
        InputError: not found (DF400), not a safetensors file (DF401), not a plain LoRA (DF402), tensors that are not
            finite (DF403) or missing (DF404), or alpha is unknown or given twice (DF405).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / LORA_FILE
    elif not path.exists():
        try:
            path = download(str(source), LORA_FILE)
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
    except (SafetensorError, ValueError) as error:
        raise InputError(Problem("DF401", path, f"not a whole safetensors file: {error}")) from error
    record, configs = read_header(path, header)
    unknown = [name for name in tensors if portable_name(name) is None]
    if unknown or not tensors:
        what = f"{len(unknown)} tensors are not a plain LoRA's, {unknown[0]} first" if unknown else "holds no tensor"
        raise InputError(Problem("DF402", path, what))
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = f"{len(broken)} tensors are not finite, {broken[0]} first"
        raise InputError(Problem("DF403", path, what, "train again"))
    if len(tensors) != record.get("tensors", len(tensors)):
        what = f"{len(tensors)} of {record['tensors']} tensors; the file was truncated or changed"
        raise InputError(Problem("DF404", path, what))
    portable = {str(portable_name(name)): tensor for name, tensor in tensors.items()}
    for name, tensor in portable.items():
        if not tensor.is_floating_point() or (tensor.numel() != 1 if name.endswith(".alpha") else tensor.dim() < 2):
            raise InputError(Problem("DF402", path, f"{name} is {tuple(tensor.shape)} of {tensor.dtype}"))
    return LoraFile(path, portable | read_alphas(path, portable, configs, alpha), record, file_digest(path))


MOST_METADATA = 2**22  # characters of an entry: a thousand times what training writes


def read_header(path: Path, header: dict[str, str]) -> tuple[dict, dict[str, dict]]:
    """The training run's record in a file's header, and peft's configuration of each model, there or in its own file.

    Raises:
        InputError: one of them is not of its form, or has patterns where names of layers belong (DF402).
    """
    beside = path.with_name("adapter_config.json")  # of peft
    try:
        if (longest := max(map(len, header.values()), default=0)) > MOST_METADATA:
            raise ValueError(f"holds {longest:,} characters in one entry; at most {MOST_METADATA:,} are read")
        record = parse_json(header.get("defectfill", "{}"), Record)
        config = parse_json(header.get("lora_adapter_metadata", "{}"), Schema)
        configs = {
            model: {k.removeprefix(f"{model}."): v for k, v in config.items() if k.startswith(f"{model}.")}
            for model in CONFIG_PREFIX
        }
        for of_model in configs.values():
            check_schema(of_model, PeftConfig)
    except ValueError as error:
        raise InputError(Problem("DF402", path, f"its metadata {error}")) from error
    if path.name == "adapter_model.safetensors" and beside.exists():
        configs = dict.fromkeys(CONFIG_PREFIX, read_json(beside, PeftConfig, "DF402"))
    return record, configs


# Of a peft configuration's keys in a header, by a layer's portable prefix.
CONFIG_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def read_alphas(
    path: Path, tensors: dict[str, torch.Tensor], configs: dict[str, dict], given: float | None
) -> dict[str, torch.Tensor]:
    """The alpha of each layer that has none among its tensors: of peft's configuration, or the one given.

    Raises:
        InputError: a layer lacks a matrix (DF404), or alpha is unknown or given twice (DF405).
    """
    layers = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    for layer in layers:
        missing = {f"{layer}.{matrix}" for matrix in MATRICES.values()} - tensors.keys()
        if missing:
            raise InputError(Problem("DF404", path, f"{missing.pop()} is missing; the file was truncated or changed"))
    alphas, of_given = {}, False
    patterns = {
        model: [
            (re.sub(r"\W", "_", f"_{end.strip('^$')}"), alpha)
            for end, alpha in (of_model.get("alpha_pattern") or {}).items()
        ]
        for model, of_model in configs.items()
    }
    for layer in sorted(layer for layer in layers if f"{layer}.alpha" not in tensors):
        model = next(model for model, prefix in CONFIG_PREFIX.items() if layer.startswith(prefix))
        of_layer = [alpha for end, alpha in patterns[model] if layer.endswith(end)]
        alpha = [*of_layer, configs[model].get("lora_alpha")][0]
        if alpha is None:
            alpha, of_given = given, True
        elif configs[model].get("use_rslora"):
            alpha *= len(tensors[f"{layer}.lora_down.weight"]) ** 0.5
        if alpha is None:
            fix = "give --lora_alpha as in its training; the strength of a layer is alpha / rank"
            raise InputError(Problem("DF405", path, "does not tell its alpha", fix))
        alphas[f"{layer}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    if given is not None and not of_given:
        raise InputError(Problem("DF405", path, "tells its own alpha", "leave out --lora_alpha"))
    return alphas


def empty_models(base: BaseModel) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder of the base's shapes, without weights."""
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(base.unet)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(base.text_encoder))
    return unet, text_encoder


def check_fits(lora: LoraFile, base: BaseModel) -> None:
    """Checks from shapes alone, without loading a weight, that each tensor fits a layer of `base`.

    Raises:
        InputError: the LoRA was trained on a base of another shape (DF410).
    """
    unet, text_encoder = empty_models(base)
    places = {
        portable_layer(f"{prefix}.{name}"): module
        for prefix, model in (("unet", unet), ("text_encoder", text_encoder))
        for name, module in model.named_modules()
        if name
    }
    for name, tensor in lora.tensors.items():
        layer, _, end = name.partition(".")
        shape = getattr(places.get(layer), "weight", torch.empty(0)).shape
        # A is (rank, in, ...), with the kernel of a convolution; B is (out, rank, ...), with a kernel of 1.
        fits = len(shape) > 1 and (
            end == "alpha"
            or len(shape) == tensor.dim()
            and (tensor.shape[1:] == shape[1:] if end == "lora_down.weight" else tensor.shape[0] == shape[0])
        )
        if not fits:
            trained_on = lora.record.get("base", "an unknown base")
            there = tuple(shape) if shape else "nothing"
            what = f"{name} is {tuple(tensor.shape)}, but {base.name} has {there} there"
            raise InputError(Problem("DF410", lora.path, what, f"the LoRA was trained on {trained_on}"))


def check_content(lora: LoraFile, base: BaseModel, is_chosen: bool) -> None:
    """Compares the content of the base, a folder, with that of the one the LoRA was trained on, if it was recorded.

    Args:
        is_chosen: by `--pretrained_model_name_or_path`; another base is then only worth a warning.

    Raises:
        InputError: the recorded base was changed after the training (DF414).
    """
    trained = lora.record.get("base_sha256")
    if not trained or not base.digest or lora.record.get("variant") != base.variant or trained == base.digest:
        return
    if not is_chosen:
        what = f"its base {base.name} has other weights or configuration than when it was trained"
        fix = "put the base back, retrain, or give --pretrained_model_name_or_path to use the base as it is"
        raise InputError(Problem("DF414", lora.path, what, fix))
    logger.warning("%s", Problem("DF414", lora.path, f"was trained on another base than {base.name}"))


def load_lora(pipe, lora: LoraFile) -> None:
    """Loads the LoRA through diffusers' `load_lora_weights` and checks that each tensor arrived.

    Raises:
        RuntimeError: the pipeline does not hold exactly the file's tensors.
    """
    pipe.load_lora_weights(dict(lora.tensors), adapter_name=ADAPTER)
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
    loaded = {name: parameter.detach().cpu() for name, parameter in lora_parameters(unet, text_encoder).items()}
    matrices = {name: tensor for name, tensor in lora.tensors.items() if not name.endswith(".alpha")}
    missing = sorted(matrices.keys() ^ loaded.keys())
    if missing:
        raise RuntimeError(
            f"{lora.path}: {len(missing)} LoRA tensors are only in the file or only in the model: {missing[0]}"
        )
    for name, tensor in loaded.items():
        if not torch.equal(tensor, matrices[name].to(tensor.dtype)):
            raise RuntimeError(f"{lora.path}: {name} did not load as it was saved")
    for name, layer in lora_layers(unet, text_encoder):
        alpha, rank = lora.tensors[f"{name}.alpha"].item(), len(matrices[f"{name}.lora_down.weight"])
        if layer.scaling[ADAPTER] != alpha / rank:
            raise RuntimeError(
                f"{lora.path}: {name} has strength {layer.scaling[ADAPTER]}, in the file {alpha / rank}"
            )


def reload_and_compare(pipe, path: Path) -> None:
    """Replaces the trained LoRA in `pipe` by the saved one, and checks that weights and alpha are equal.

    Raises:
        RuntimeError: the file does not load as it was saved.
    """
    lora = read_lora(path)
    compare_lora(lora, pipe.unet, pipe.text_encoder)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
    compare_lora(lora, pipe.unet, pipe.text_encoder)
