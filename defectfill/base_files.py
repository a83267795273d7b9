"""The files of a base model that is a local folder: which of them are loaded, and the digest of their content."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from defectfill_dataset import InputError, Problem, file_digest
from defectfill_dataset.text import Schema, parse_json, read_bytes, read_json


CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
# The names that diffusers and transformers give to weights.
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SHARD = re.compile(r"[\w.\-]+\.safetensors")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
AGAIN = "download it again"

# Bounds far above Stable Diffusion's own, so that no configuration builds models for ever.
Channels = Annotated[int, Field(gt=0, le=2**20)]
Layers = Annotated[int, Field(ge=0, le=64)]
Layout = Annotated[list[str], Field(max_length=16)]


class ConfigFile(Schema):
    """What is bounded in a configuration of any model, before the libraries check its types."""

    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=16)] | None = None
    down_block_types: Layout | None = None
    up_block_types: Layout | None = None
    layers_per_block: Layers | list[Layers] | None = None
    transformer_layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    reverse_transformer_layers_per_block: Layers | list[Layers | list[Layers]] | None = None
    in_channels: Channels | None = None
    out_channels: Channels | None = None
    latent_channels: Channels | None = None
    cross_attention_dim: Channels | list[Channels] | None = None
    num_hidden_layers: Layers | None = None
    hidden_size: Channels | None = None
    intermediate_size: Channels | None = None
    vocab_size: Channels | None = None
    max_position_embeddings: Channels | None = None
    num_train_timesteps: Annotated[int, Field(gt=0, le=100_000)] | None = None


class WeightIndex(Schema):
    """An index of weights in several files: the file of each tensor."""

    weight_map: dict[str, str]


def weight_files(folder: Path, model: str, variant: str | None) -> list[Path]:
    """The safetensors files of a model: a whole file, or an index with its shards; empty if there are none."""
    stem = WEIGHTS[model]
    indexes = [  # with a variant the two libraries, and their versions, write its name in different places
        file
        for file in sorted((folder / model).glob(f"{stem}.safetensors*index*.json"))
        if set(file.name.removeprefix(stem).split(".")) - {"", "safetensors", "index", "json"} == {variant} - {None}
    ]
    whole = folder / model / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    shards = {index.parent / name for index in indexes for name in shard_names(index)}
    return [*([whole] if whole.is_file() else []), *indexes, *sorted(shards)]


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        InputError: it cannot be read (DF176), or names anything but safetensors files of its own folder (DF182): the
            libraries would unpickle those.
    """
    names = sorted(set(read_json(index, WeightIndex, "DF176", AGAIN)["weight_map"].values()))
    for name in names:
        if not SHARD.fullmatch(name):
            what = f"names '{name}', which is no safetensors file beside it; pickled weights are not loaded"
            raise InputError(Problem("DF182", index, what, "use a base with safetensors weights"))
    return names


def check_weight_files(folder: Path, variant: str | None) -> None:
    """Checks that each model has safetensors weights and that no file to load is a git-lfs pointer.

    Raises:
        InputError: weights of this variant are missing (DF182), or git-lfs pointers (DF178).
    """
    files = {model: weight_files(folder, model, variant) for model in WEIGHTS}
    without = [model for model, found in files.items() if not found]
    if without:
        where = ", ".join(without)
        if variant and all(weight_files(folder, model, None) for model in without):
            what, fix = f"no {variant} weights in {where}", "leave out --variant"
        elif variant != "fp16" and all(weight_files(folder, model, "fp16") for model in without):
            what, fix = f"only fp16 weights in {where}", "add --variant fp16"
        else:
            what, fix = f"no safetensors weights in {where}; pickled weights are not loaded", ""
        raise InputError(Problem("DF182", folder, what, fix))
    named = [file for found in files.values() for file in found]
    missing = [file.relative_to(folder).as_posix() for file in named if not file.is_file()]
    if missing:
        raise InputError(Problem("DF182", folder, f"{', '.join(missing)} is missing", "download it again"))
    check_pointers(folder, named)


def check_plain(folder: Path) -> None:
    """Checks that the folders of the models hold files that end, and no adapter of peft, as whose base transformers
    would load another model than the folder's.

    Raises:
        InputError: a pipe or device (DF176), or an adapter (DF182).
    """
    for part in (config.partition("/")[0] for config in CONFIGS):
        for file in sorted((folder / part).glob("*")):
            if file.exists() and not file.is_file() and not file.is_dir():
                raise InputError(Problem("DF176", file, "is not a regular file", AGAIN))
            if file.name == ADAPTER_CONFIG:
                raise adapter_error(str(file))


def adapter_error(where: str) -> InputError:
    return InputError(Problem("DF182", where, "is an adapter in a base model", "remove it, or use another base"))


def check_pointers(folder: Path, files: Iterable[Path]) -> None:
    """Raises InputError (DF178) if some of the folder's files are git-lfs pointers in place of the content."""
    pointers = [file for file in files if file.is_file() and first_bytes(file) == LFS_POINTER]
    if pointers:
        more = f" and {len(pointers) - 1} more" if len(pointers) > 1 else ""
        what = f"{pointers[0].relative_to(folder).as_posix()}{more} is a git-lfs pointer, not the file itself"
        fix = "install git-lfs and run `git lfs pull` in that folder"
        raise InputError(Problem("DF178", folder, what, fix))


def first_bytes(file: Path) -> bytes:
    """As many bytes of the file as tell a git-lfs pointer."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER))


def read_config(file: Path) -> dict:
    """The JSON object of a configuration file.

    Raises:
        InputError: it cannot be read, is not JSON, not an object, or out of bounds (DF176).
    """
    return read_json(file, ConfigFile, "DF176", AGAIN)


# ---------------------------------------------------------------------------------------------------------------------
# Digest


def base_digest(folder: Path, variant: str | None) -> str:
    """The sha256 of everything that is loaded: names and contents of configuration, tokenizer and weights."""
    small = [*(folder / name for name in CONFIGS), *tokenizer_files(folder)]
    digests = {file: file_digest(file) for file in small}
    digests |= {file: cached_digest(file) for model in WEIGHTS for file in weight_files(folder, model, variant)}
    lines = sorted(f"{file.relative_to(folder).as_posix()} {digest}\n" for file, digest in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's vocabulary and configuration."""
    return [file for kind in ("*.json", "*.txt") for file in sorted((folder / "tokenizer").glob(kind))]


def cached_digest(file: Path) -> str:
    """The sha256 of a file. It is kept in the user's cache, so that gigabytes are read only when the file changed.

    Each file has its own entry, written whole or not at all, so processes do not disturb each other; an entry that
    is damaged or of an earlier state of the file is ignored, and so is a cache that cannot be written.
    """
    name = str(file.resolve())
    entry = cache_folder() / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    stamp = [name, *file_stamp(file)]
    try:
        check, _, line = read_bytes(entry, most=2**16).partition(b" ")
        if check.decode() == hashlib.sha256(line).hexdigest():
            *kept, digest = parse_json(line)
            if kept == stamp:
                return digest
    except (OSError, ValueError):
        pass
    digest = file_digest(file)
    if digest and stamp[1:] == file_stamp(file):  # not while it is written
        line = json.dumps([*stamp, digest])
        write_entry(entry, f"{hashlib.sha256(line.encode()).hexdigest()} {line}".encode())
    return digest


def file_stamp(file: Path) -> list[int]:
    """What changes with the file: size, time of its content, and time of its entry, which no copy carries over."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def cache_folder() -> Path:
    """Where digests are kept: `defectfill/digests` in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root, "defectfill", "digests")


def write_entry(entry: Path, content: bytes) -> None:
    """Writes a file of a cache atomically, if it can be written."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, entry)
    except OSError:  # a full disk or a home that is read-only: the next start reads the file again
        pass
