"""The files of a base model that is a local folder: which of them are loaded, and the digest of their content."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from defectfill_dataset import InputError, Problem, file_digest


CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
# The names that diffusers and transformers give to weights.
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        InputError: it names none (DF176).
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(Problem("DF176", index, "has no weight_map of file names", "download it again"))
    return list(names.values())


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


def read_json(file: Path) -> dict:
    """The JSON object of a configuration file.

    Raises:
        InputError: it cannot be read, is not JSON, or not an object (DF176).
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(Problem("DF176", file, f"cannot be read as JSON: {error}", "download it again")) from error
    if not isinstance(content, dict):
        raise InputError(Problem("DF176", file, f"holds a {type(content).__name__}, not an object"))
    return content


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
        check, _, line = entry.read_text(encoding="ascii").partition(" ")
        if check == hashlib.sha256(line.encode()).hexdigest():
            *kept, digest = json.loads(line)
            if kept == stamp:
                return digest
    except (OSError, ValueError):
        pass
    digest = file_digest(file)
    if digest and stamp[1:] == file_stamp(file):  # not while it is written
        line = json.dumps([*stamp, digest])
        write_entry(entry, f"{hashlib.sha256(line.encode()).hexdigest()} {line}")
    return digest


def file_stamp(file: Path) -> list[int]:
    """What changes with the file: size, time of its content, and time of its entry, which no copy carries over."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def cache_folder() -> Path:
    """Where digests are kept: `defectfill/digests` in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root, "defectfill", "digests")


def write_entry(entry: Path, text: str) -> None:
    """Writes a file of the cache atomically, if it can be written."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(text)
        os.replace(temporary, entry)
    except OSError:  # a full disk or a home that is read-only: the next start reads the file again
        pass
