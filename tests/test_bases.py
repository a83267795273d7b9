"""Base models: which are refused and how, by training and generation alike; the identity of a base in a folder."""

import json
import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from runs import FAST, generate
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import defectfill.base_files as base_files
import generate_defectfill
import train_defectfill
from defectfill.base_model import SD2_MIRROR, load_models, read_base
from defectfill.lora import LORA_FILE, read_lora
from defectfill.runs.checkpoint import check_identity
from defectfill.sampling import SCHEDULERS, load_pipeline
from defectfill_dataset import InputError


MODELS = ("unet", "vae", "text_encoder")
CPU = torch.device("cpu")


@pytest.fixture
def other(base, tmp_path) -> Path:
    """A copy of the base, to change."""
    return shutil.copytree(base, tmp_path / "other")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of digests, and the files that were read for one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/defectfill/digests"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The weights that were read to digest them."""
    names, digest = [], base_files.file_digest
    record = lambda file: (names.append(file.name) if file.suffix == ".safetensors" else None, digest(file))[1]
    monkeypatch.setattr(base_files, "file_digest", record)
    return names


def change_config(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights_of(folder: Path, model: str) -> Path:
    [file] = (folder / model).glob("*.safetensors")
    return file


def change_weights(folder: Path, model: str, change) -> None:
    file = weights_of(folder, model)
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load(folder: Path):
    return load_models(read_base(str(folder)), None, torch.float32)


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    [problem] = caught.value.problems
    return str(problem)


# Weights that are the file's, all of them


def old_names(tensors: dict) -> dict:
    """As transformers before 5.6 and before 4.31 wrote them."""
    old = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def flat_with_position_ids(tensors: dict) -> dict:
    return tensors | {"embeddings.position_ids": torch.arange(77)[None]}


def old_attention(tensors: dict) -> dict:
    """As diffusers before 0.15 named the VAE's attention."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        return name

    return {old(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "model, change",
    [("text_encoder", old_names), ("text_encoder", flat_with_position_ids), ("vae", old_attention)],
)
def test_names_of_older_versions_load_as_the_same_weights(base, other, model, change):
    before = load_file(weights_of(other, model))
    change_weights(other, model, change)
    assert load_file(weights_of(other, model)).keys() != before.keys()
    for honest, loaded in zip(load(base)[:3], load(other)[:3]):
        assert honest.state_dict().keys() == loaded.state_dict().keys()
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in honest.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: dict(sorted(tensors.items())[2:]), "2 keys are missing (first: {0})"),
        (lambda tensors: tensors | {"foo.weight": torch.zeros(3)}, "1 keys are unexpected (first: foo.weight)"),
        (
            lambda tensors: tensors | {name: torch.zeros(3, 5) for name in sorted(tensors)[:3]},
            "3 keys are of another shape (first: {0})",
        ),
        (
            lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()},
            "{1} keys are missing (first: {0}), {1} keys are unexpected (first: x.{0})",
        ),
    ],
    ids=["missing", "unexpected", "another-shape", "another-model"],
)
def test_weights_that_do_not_match_are_refused(other, capfd, model, change, words):
    names = sorted(load_file(weights_of(other, model)))
    change_weights(other, model, change)
    told = refusal(load, other)
    assert told.startswith(f"DF179 {other}/{model}: ") and words.format(names[0], len(names)) in told
    assert capfd.readouterr().err == ""  # the libraries' reports would only repeat it


def test_training_and_generation_refuse_a_text_encoder_that_does_not_match(train, trained, inputs, tmp_path, other):
    change_config(other / "text_encoder/config.json", num_hidden_layers=3)
    assert "16 keys are missing (first: encoder.layers.2" in refusal(train, base=other)
    assert not (tmp_path / "out" / LORA_FILE).exists()
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "gen", *FAST]
    told = refusal(generate, *argv, "--pretrained_model_name_or_path", other)
    assert told.startswith("DF179") and "16 keys are missing" in told


# What is refused before a weight is loaded


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test if a model is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_defectfill, "load_models", loaded)
    monkeypatch.setattr(generate_defectfill, "load_pipeline", loaded)


def only_fp16(folder: Path) -> None:
    for model in MODELS:
        file = weights_of(folder, model)
        file.rename(file.with_suffix(".fp16.safetensors"))


def pointer(name: str):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3463726504\n"
    return lambda folder: (folder / name).write_text(text)


def config(name: str, **values):
    return lambda folder: change_config(folder / name, **values)


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


UNET, VAE, TEXT, SCHEDULER = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
)  # fmt: skip
BROKEN = {
    "sdxl": (config(UNET, addition_embed_type="text_time"), "DF175", "as SDXL's does (addition_embed_type text_time)"),
    "width": (config(UNET, cross_attention_dim=64), "DF175", "embeddings of 64 channels, its text encoder makes 32"),
    "text-width": (config(TEXT, hidden_size=64), "DF175", "embeddings of 32 channels, its text encoder makes 64"),
    "classes": (config(UNET, class_embed_type="timestep"), "DF175", "class_embed_type timestep"),
    "t5": (config(TEXT, model_type="t5"), "DF175", "its text_encoder is a t5, not a clip_text_model"),
    "vae-kind": (config(VAE, _class_name="AutoencoderTiny"), "DF175", "its vae is a AutoencoderTiny"),
    "latents": (config(VAE, latent_channels=16), "DF175", "latents of 4 channels, its VAE 16"),
    "tokenizer": (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "DF175", "tokenizer has 2 tokens"),
    "no-json": (text(UNET, "{"), "DF176", f"{UNET}: cannot be read as JSON"),
    "binary": (lambda folder: (folder / VAE).write_bytes(b"\xff\xfe"), "DF176", f"{VAE}: cannot be read as JSON"),
    "list": (text(TEXT, "[]"), "DF176", f"{TEXT}: holds a list, not an object"),
    "type": (config(TEXT, num_hidden_layers="two"), "DF176", f"{TEXT}: cannot be used: .*_layers' is 'two'"),
    "channels": (config(UNET, in_channels="9"), "DF176", f"{UNET}: cannot be used"),
    "blocks": (config(UNET, block_out_channels=None), "DF176", f"{UNET}: cannot be used"),
    "no-blocks": (text(VAE, "{}"), "DF176", f"{VAE}: has no block_out_channels"),
    "schedule": (config(SCHEDULER, beta_schedule="x"), "DF176", f"{SCHEDULER}: cannot be used: x is not implemented"),
    "vocabulary": (text("tokenizer/tokenizer.json", "{"), "DF176", "tokenizer: cannot be loaded"),
    "pointer": (pointer("text_encoder/model.safetensors"), "DF178", "text_encoder/model.safetensors is a git-lfs"),
    "config-pointer": (pointer("tokenizer/tokenizer.json"), "DF178", "run `git lfs pull`"),
    "fp16": (only_fp16, "DF182", "only fp16 weights in unet, vae, text_encoder; add --variant fp16"),
}


@pytest.mark.parametrize("break_base, code, words", BROKEN.values(), ids=BROKEN)
def test_a_base_that_cannot_serve_is_refused_alike(
    train, trained, inputs, tmp_path, other, no_models, break_base, code, words
):
    break_base(other)
    of_training = refusal(train, base=other)
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "gen", *FAST]
    of_generation = refusal(generate, *argv, "--pretrained_model_name_or_path", other)
    assert of_training == of_generation and of_training.startswith(code)
    first, _, last = words.partition(".*")
    assert first in of_training and last in of_training


def test_all_pointers_are_counted(other, no_models, train):
    for model in MODELS:
        pointer(weights_of(other, model).relative_to(other))(other)
    assert "unet/diffusion_pytorch_model.safetensors and 2 more is a git-lfs pointer" in refusal(train, base=other)


def test_a_variant_that_is_not_there(other, no_models, train):
    told = refusal(train, "--variant", "fp16", base=other)
    assert told.startswith("DF182") and "no fp16 weights in unet, vae, text_encoder; leave out --variant" in told


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"<html>" * 99]
)
@pytest.mark.parametrize("model", MODELS)
def test_damaged_weights_are_one_message(other, model, damage):
    file = weights_of(other, model)
    file.write_bytes(damage(file.read_bytes()))
    assert refusal(load, other).startswith(f"DF182 {other}: its {model}'s safetensors weights cannot be loaded")


def split_in_shards(folder: Path, model: str, variant: str = "") -> None:
    """As the libraries write weights that are too large for one file."""
    file = weights_of(folder, model)
    tensors, stem = load_file(file), base_files.WEIGHTS[model]
    file.unlink()
    names = {name: f"{stem}{variant}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        save_file(part, folder / model / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / model / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_shards(base, other, variant):
    for model in MODELS:
        split_in_shards(other, model, f".{variant}" if variant else "")
    read = read_base(str(other), variant=variant)
    for honest, loaded in zip(load(base)[:3], load_models(read, None, torch.float32)[:3]):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in honest.state_dict().items())
    shard = sorted((other / "vae").glob("*.safetensors"))[1]
    pointer(shard.relative_to(other))(other)
    assert refusal(read_base, str(other), variant=variant).startswith("DF178")
    shard.unlink()
    assert f"vae/{shard.name} is missing" in refusal(read_base, str(other), variant=variant)
    index = next((other / "vae").glob("*index*.json"))
    index.write_text('{"weight_map": 5}')
    assert "'weight_map' is 5: input must be a valid dictionary" in refusal(read_base, str(other), variant=variant)


@pytest.mark.parametrize("width, config", [(1024, f', config="{SD2_MIRROR}"'), (768, "")])
def test_a_single_file_is_told_how_to_convert_it(
    train, trained, inputs, tmp_path, no_models, monkeypatch, width, config
):
    layer = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    file = tmp_path / 'it\'s a "model".safetensors'
    save_file({layer: torch.zeros(2, width)}, file)
    told = refusal(train, "--pretrained_model_name_or_path", file)
    assert told.startswith("DF177") and "is a single file" in told
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "gen", *FAST]
    assert refusal(generate, *argv, "--pretrained_model_name_or_path", file) == told
    python, flag, code = shlex.split(told.partition("give ")[2].partition(": ")[2])  # as a shell would read it
    assert (python, flag) == ("python", "-c") and config in code
    calls = []

    class Pipeline:
        def from_single_file(self, *args, **options):
            calls.append((args, options))
            return self

        def save_pretrained(self, folder):
            calls.append(folder)

    monkeypatch.setattr(diffusers, "StableDiffusionInpaintPipeline", Pipeline())
    exec(code)
    options = {"config": SD2_MIRROR} if config else {}
    assert calls == [((str(file),), options), str(file.with_suffix(""))]


def test_other_single_files(tmp_path):
    (tmp_path / "old.ckpt").write_bytes(b"PK a pickle")
    assert refusal(read_base, str(tmp_path / "old.ckpt")).startswith("DF177")
    (tmp_path / "model").write_bytes(b"")
    assert f"{tmp_path}/model-diffusers" in refusal(read_base, str(tmp_path / "model"))
    assert "no such file" in refusal(read_base, str(tmp_path / "absent.safetensors"))
    pointer("it.safetensors")(tmp_path)
    assert refusal(read_base, str(tmp_path / "it.safetensors")).startswith("DF178")


# Training and generation accept the same bases


@pytest.mark.slow
def test_a_base_of_the_five_parts_alone_trains_and_generates(train, inputs, tmp_path, other):
    (other / "model_index.json").unlink()
    assert {path.name for path in other.iterdir()} == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    out = train(base=other)
    generate("--lora", out, *inputs, "--output_dir", tmp_path / "gen", *FAST)
    assert len(list((tmp_path / "gen/images").iterdir())) == 3


@pytest.mark.slow
def test_a_base_of_half_precision_alone_trains_and_generates(train, inputs, tmp_path, other):
    only_fp16(other)
    out = train("--variant", "fp16", base=other)
    argv = ["--lora", out, *inputs, "--output_dir", tmp_path / "gen", *FAST]
    assert "add --variant fp16" in refusal(generate, *argv)
    generate(*argv, "--variant", "fp16")


def test_the_pipeline_is_the_one_that_diffusers_loads(base, other):
    change_config(other / SCHEDULER, _class_name="PNDMScheduler", steps_offset=0, skip_prk_steps=False)
    theirs = StableDiffusionInpaintPipeline.from_pretrained(other, safety_checker=None, requires_safety_checker=False)
    for name, make in SCHEDULERS.items():
        ours = load_pipeline(read_base(str(other)), None, "no", CPU, name)
        configs = [scheduler.config.items() for scheduler in (ours.scheduler, make(theirs.scheduler))]
        values, expected = ({k: v for k, v in items if not k.startswith("_")} for items in configs)
        assert values == expected and type(ours.scheduler) is type(make(theirs.scheduler))
        for model in MODELS:
            weights = getattr(theirs, model).state_dict()
            assert all(torch.equal(t, weights[k]) for k, t in getattr(ours, model).state_dict().items())
            assert not getattr(ours, model).training


# A base in a folder is identified by its content


def test_the_digest_is_of_what_is_loaded_wherever_it_lies(base, other, cache):
    digest = read_base(str(base)).digest
    assert len(digest) == 64 and read_base(str(other)).digest == digest
    for name in ("README.md", "model_index.json", "unet/notes.txt", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (other / name).write_text("of no effect")
    assert read_base(str(other)).digest == digest
    (other / "link").symlink_to(other)
    assert read_base(str(other / "link")).digest == digest


@pytest.mark.parametrize(
    "name", ["unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json",
             *(f"{model}/{name}.safetensors" for model, name in base_files.WEIGHTS.items())]
)  # fmt: skip
def test_the_digest_changes_with_each_part(other, cache, name):
    digest = read_base(str(other)).digest
    if name.endswith(".json"):
        (other / name).write_text((other / name).read_text() + " ")
    else:
        change_weights(other, name.split("/")[0], lambda tensors: {key: t + 1 for key, t in tensors.items()})
    assert read_base(str(other)).digest != digest


def test_a_second_start_reads_no_weights(other, cache, hashed):
    first = read_base(str(other)).digest
    assert len(hashed) == 3 and len(list(cache.iterdir())) == 3
    assert read_base(str(other)).digest == first and len(hashed) == 3
    file = weights_of(other, "vae")
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)  # same size, same time, as `cp --preserve` leaves a file
    assert read_base(str(other)).digest != first and hashed[3:] == [file.name]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other", "folder"])
def test_a_damaged_cache_is_ignored(other, cache, hashed, damage):
    first = read_base(str(other)).digest
    for entry in cache.iterdir():
        content = bytearray(entry.read_bytes())
        content[-5] ^= 1  # in the digest
        changed = {"flip": bytes(content), "cut": content[:-20], "empty": b"", "other": b"[1, 2]", "folder": b""}
        entry.write_bytes(changed[damage])
        if damage == "folder":
            entry.unlink(), entry.mkdir()
    assert read_base(str(other)).digest == first and len(hashed) == 6
    assert read_base(str(other)).digest == first and len(hashed) == (9 if damage == "folder" else 6)


def test_a_cache_that_cannot_be_written_costs_only_time(other, cache, hashed):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in its place")
    assert read_base(str(other)).digest == read_base(str(other)).digest
    assert len(hashed) == 6


def test_two_writers_do_not_disturb_each_other(other, cache):
    with ThreadPoolExecutor(8) as threads:
        digests = set(threads.map(lambda _: base_files.base_digest(other, None), range(24)))
    assert len(digests) == 1 and len(list(cache.iterdir())) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(other, cache, monkeypatch):
    file, digest = weights_of(other, "vae"), base_files.file_digest
    monkeypatch.setattr(base_files, "file_digest", lambda path: (digest(path), path.write_bytes(b"new"))[0])
    base_files.cached_digest(file)
    assert not cache.exists()


def test_the_identity_of_runs():
    old, new = {"base": "/a", "rank": 4}, {"base": "/a", "rank": 4, "base_sha256": "1"}
    check_identity(old, new)
    check_identity(new, new | {"base": "/moved"})
    check_identity({"base": "ann/base", "base_sha256": None}, {"base": "ann/base", "base_sha256": None})
    for saved, now, words in [
        (new, new | {"base_sha256": "2"}, "DF320 base_sha256: /a has other content than the run was started with"),
        (old, new | {"base": "/moved"}, "DF320 base: the run was started with '/a', now it is '/moved'"),
        (new, new | {"base": "ann/base", "base_sha256": None}, "DF320 base: "),
        (new | {"base": "ann/base", "base_sha256": None}, new, "DF320 base: "),
    ]:
        assert refusal(check_identity, saved, now).startswith(words)


@pytest.mark.slow
def test_a_run_resumes_after_its_base_moved_and_not_after_it_was_retrained(train, tmp_path, other):
    constant = ["--lr_scheduler", "constant"]
    out = train(*constant, base=other)
    moved, resume = other.rename(tmp_path / "moved"), [*constant, "--resume_from_checkpoint", "latest"]
    train(*resume, "--max_train_steps", "3", base=moved)
    assert read_lora(out).record["steps"] == 3 and read_lora(out).record["base"] == str(moved)
    change_weights(moved, "unet", lambda tensors: {name: t * 1.01 for name, t in tensors.items()})
    told = refusal(train, *resume, "--max_train_steps", "4", base=moved)
    assert told.startswith(f"DF320 base_sha256: {moved} has other content than the run was started with")


def change_record(lora: Path, to: Path, **values) -> Path:
    with safe_open(lora / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    record = json.loads(header["defectfill"]) | values
    header["defectfill"] = json.dumps({key: value for key, value in record.items() if value is not None})
    save_file(tensors, to, metadata=header)
    return to


@pytest.mark.slow
def test_generation_with_a_base_that_changed(trained, inputs, tmp_path, other, caplog):
    lora = change_record(trained, tmp_path / "lora.safetensors", base=str(other))
    argv = ["--lora", lora, *inputs, *FAST]
    assert read_lora(lora).record["base_sha256"] == read_base(str(other)).digest
    generate(*argv, "--output_dir", tmp_path / "same")
    settings = json.loads((tmp_path / "same/settings.json").read_text())
    assert settings["base_sha256"] == read_base(str(other)).digest
    moved = shutil.copytree(other, tmp_path / "moved")
    generate(*argv, "--output_dir", tmp_path / "same", "--pretrained_model_name_or_path", moved)  # goes on
    assert caplog.text == ""

    change_weights(other, "vae", lambda tensors: {name: t * 1.01 for name, t in tensors.items()})
    told = refusal(generate, *argv, "--output_dir", tmp_path / "changed")
    assert told.startswith(f"DF414 {lora}: its base {other} has other weights") and "retrain, or give" in told
    generate(*argv, "--output_dir", tmp_path / "chosen", "--pretrained_model_name_or_path", other)
    assert f"was trained on another base than {other}" in caplog.text and caplog.text.count("DF414") == 1
    chosen = ["--output_dir", tmp_path / "same", "--pretrained_model_name_or_path", other]
    assert refusal(generate, *argv, *chosen).startswith("DF320 base_sha256")
    old = change_record(trained, tmp_path / "old.safetensors", base=str(other), base_sha256=None)
    generate("--lora", old, *inputs, *FAST, "--output_dir", tmp_path / "old")


def test_another_variant_is_not_another_base(trained, inputs, tmp_path, other, monkeypatch):
    for model in MODELS:
        file = weights_of(other, model)
        half = {name: t.half() for name, t in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    lora = change_record(trained, tmp_path / "lora.safetensors", base=str(other))
    assert read_base(str(other)).digest == read_lora(lora).record["base_sha256"]
    assert read_base(str(other), variant="fp16").digest != read_lora(lora).record["base_sha256"]
    argv = ["--lora", lora, *inputs, "--variant", "fp16", "--output_dir", tmp_path / "gen", *FAST]
    command = generate_defectfill.parse_args([str(a) for a in argv])
    assert generate_defectfill.prepare(command, CPU).base.variant == "fp16"


def test_loras_of_one_base_in_two_places(trained, inputs, tmp_path, other):
    moved = change_record(trained, tmp_path / "moved.safetensors", base=str(other))
    argv = [*inputs, "--output_dir", tmp_path / "gen", *FAST]
    generate_defectfill.prepare(
        generate_defectfill.parse_args([str(a) for a in ["--lora", trained, moved, *argv]]), CPU
    )
    unknown = change_record(trained, tmp_path / "unknown.safetensors", base=str(other), base_sha256=None)
    assert refusal(generate, "--lora", trained, unknown, *argv).startswith("DF414")
