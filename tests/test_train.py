"""Whole runs of the training script: what it leaves, what it refuses, and that its LoRA loads elsewhere."""

import json
import math
import re
import shutil
import stat

from offline import ROOT

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from drawn import write_image
from folders import make_mvtec, make_seed_layout
from PIL import Image
from runs import FULL, in_clean_process, options, read_lines, reset_accelerate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from toy_model import RESOLUTION, toy_pipeline

import train_defectfill
from defectfill.base_model import read_base
from defectfill.lora import (
    LORA_FILE,
    add_lora,
    check_fits,
    load_lora,
    lora_parameters,
    read_lora,
    reload_and_compare,
    save_lora,
)  # fmt: skip
from defectfill.runs import flags as option_checks
from defectfill.runs import logs, record
from defectfill_dataset import InputError, RunError


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# What a run leaves


def test_a_run_leaves_lora_card_record_split_and_checkpoint(trained):
    names = {f.name for f in trained.iterdir()}
    assert names == {LORA_FILE, "README.md", "run_record.json", "losses.jsonl", "split.json", "checkpoint-2", ".lock"}
    record = json.loads((trained / "run_record.json").read_text())
    assert record["options"]["rank"] == 4 and record["versions"]["diffusers"] and len(record["data_sha256"]) == 64
    assert record["images"] == {"train": 2, "test": 2, "good": 3}
    assert record["prompts"] == {"hole": ["A photo of sks", "A nut with sks"]}
    assert record["held_out"] != record["after"]  # other images
    for moment in ("before", "after", "held_out"):
        assert record[moment].keys() >= {
            "loss",
            "l_def",
            "l_obj",
            "l_attn",
            "attention_iou",
            "attention_inside",
            "mask_area",
        }
        errors = record[moment]["x0_error"]
        assert list(errors["defect"]) == list(errors["object"]) == ["999", "900", "800", "600", "400"]
        assert errors["variance"] > 0
        assert f"{errors['defect']['999']:.3f} |" in (trained / "README.md").read_text()
    assert record["speed"]["seconds_per_step"] is None  # two steps: all of them are warm-up
    lines = read_lines(trained / "losses.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == pytest.approx(
        sum(w * lines[0][k] for k, w in dict(l_def=0.5, l_obj=0.2, l_attn=0.05).items())
    )
    assert json.loads((trained / "split.json").read_text())["train"] == ["test/hole/000.png", "test/hole/001.png"]


def test_the_lora_file_is_portable(trained):
    """Alpha differs between training and inference because the file does not carry it."""
    with safe_open(trained / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert "lora_adapter_metadata" not in header  # with it, diffusers refuses kohya's names
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {8}
    shown = {key: header[f"ss_{key}"] for key in ("network_dim", "network_alpha", "steps", "v2", "network_module")}
    assert shown == {
        "network_dim": "4", "network_alpha": "8.0", "steps": "2", "v2": "False", "network_module": "networks.lora",
    }  # fmt: skip
    assert header["ss_tag_frequency"] == '{"defectfill": {"A photo of sks": 1}}'
    size = int.from_bytes((trained / LORA_FILE).read_bytes()[:8], "little")
    stored = json.loads((trained / LORA_FILE).read_bytes()[8 : 8 + size])["__metadata__"]
    assert list(stored) == sorted(stored)  # equal LoRAs are equal files
    record = json.loads(header["defectfill"])
    assert record["prompts"] == {"hole": "A nut with sks"} and record["resolution"] == RESOLUTION
    mode = stat.S_IMODE((trained / LORA_FILE).stat().st_mode)
    assert mode == 0o666 & ~current_umask()


def current_umask() -> int:
    import os

    umask = os.umask(0)
    os.umask(umask)
    return umask


RENDER = """
import sys, numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
torch.set_num_threads(1)
base, lora, image = sys.argv[1:]
pipe = StableDiffusionInpaintPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
if lora != "none":
    pipe.load_lora_weights(lora)
def render(pipe):
    image, mask = torch.linspace(0, 1, 32).expand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:20] = 1
    return pipe("A nut with sks", image=image, mask_image=mask, height=32, width=32, num_inference_steps=4,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np").images
if __name__ == "__main__":
    np.save(image, render(pipe))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layers", [FULL(()), ("--lora_targets", "all", "--conv_rank", "3")], ids=["attention", "all"])
def test_stock_diffusers_paints_the_same_image_in_a_process_without_our_code(
    train, base, tmp_path, monkeypatch, layers
):
    """Bit for bit: alpha other than rank, text encoder included, dropout in training."""
    finish, rendered = train_defectfill.finish, {}

    def render_then_finish(args, job, training, *rest):
        models = training.bare_models
        scope = {"__name__": "ours"}
        exec(RENDER[RENDER.index("def render") : RENDER.index("if __name__")], globals() | {"torch": torch}, scope)
        for model in (models.unet, models.text_encoder):
            model.eval()
        rendered["in memory"] = scope["render"](train_defectfill.make_pipeline(job, models))
        finish(args, job, training, *rest)

    monkeypatch.setattr(train_defectfill, "finish", render_then_finish)
    flags = "--learning_rate 0.05 --text_encoder_lr 0.05 --rank 4 --lora_alpha 12 --lora_dropout 0.1"
    out = train(*flags.split(), "--max_train_steps", "4", *layers)
    for name, lora in (("with", out), ("without", "none")):
        in_clean_process(RENDER, base, lora, tmp_path / f"{name}.npy", cwd=tmp_path)
        rendered[name] = np.load(tmp_path / f"{name}.npy")
    assert np.array_equal(rendered["with"], rendered["in memory"])
    assert np.abs(rendered["without"] - rendered["with"]).max() > 0.01  # the LoRA does something


def test_checkpoints_hold_no_pickle_and_load_as_a_lora(trained, base):
    """Checkpoints are pickles, from which load_lora_weights loads nothing and only logs."""
    files = [f for f in trained.rglob("*") if f.is_file() and f.name != ".lock"]
    assert {f.suffix for f in files} == {".safetensors", ".json", ".jsonl", ".md"}
    pipe = toy_pipeline()
    load_lora(pipe, read_lora(trained / "checkpoint-2"))
    saved, final = (load_file(folder / LORA_FILE) for folder in (trained / "checkpoint-2", trained))
    assert all(torch.equal(saved[name], final[name]) for name in saved.keys() | final.keys())


@pytest.mark.slow
def test_loss_weights_change_what_is_trained(train, tmp_path):
    first = load_file(train("--lambda_attn", "0") / LORA_FILE)
    second = load_file(train(output=tmp_path / "other") / LORA_FILE)
    assert any(not torch.equal(first[k], second[k]) for k in first)


def test_learning_rates_warm_up_from_the_first_step(train):
    """A warm-up that multiplies the current rate stays 0 for ever."""
    out = train(
        "--max_train_steps", "5", "--lr_warmup_steps", "4", "--learning_rate", "0.4", "--text_encoder_lr", "0.04"
    )
    lines = read_lines(out / "losses.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [line["text_encoder_lr"] for line in lines] == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])
    moved = [
        name for name, tensor in load_file(out / LORA_FILE).items() if "lora_up" in name and tensor.abs().max() > 0
    ]
    assert len(moved) == len(load_file(out / LORA_FILE)) / 3  # A, alpha, and B, which began at 0


def test_gradients_are_cleared_and_dropout_is_on_in_steps_alone(train, monkeypatch):
    original, steps, modes = train_defectfill.training_losses, [], set()

    def watched(models, *rest):
        modes.add((torch.is_grad_enabled(), models.unet.training, models.text_encoder.training))
        if torch.is_grad_enabled():
            steps.append([p.grad is None for p in lora_parameters(models.unet, models.text_encoder).values()])
        return original(models, *rest)

    monkeypatch.setattr(train_defectfill, "training_losses", watched)
    train("--gradient_accumulation_steps", "2", "--validation_steps", "1", "--validation_inference_steps", "1")
    assert [all(cleared) for cleared in steps] == [True, False] * 2 and not any(steps[1] + steps[3])
    assert modes == {(True, True, True), (False, False, False)}


def test_a_step_of_several_micro_batches_is_logged_and_warmed_up_as_one(train, monkeypatch):
    original, losses = train_defectfill.training_losses, []

    def watched(*args):
        result = original(*args)
        if torch.is_grad_enabled():
            losses.append(result["loss"].item())
        return result

    monkeypatch.setattr(train_defectfill, "training_losses", watched)
    lines = read_lines(train("--gradient_accumulation_steps", "2", "--learning_rate", "0.4") / "losses.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 0.2]) and len(losses) == 4


def test_one_image_and_a_batch_of_four_trains(train, tmp_path):
    """Fewer images than the batch, in a whole run."""
    out = train("--train_batch_size", "4", data=make_mvtec(tmp_path / "single", {"hole": 1}, good=0))
    assert len(read_lines(out / "losses.jsonl")) == 2


@pytest.mark.slow
def test_several_types_in_one_run(train, tmp_path):
    data = make_seed_layout(tmp_path / "metal_nut", {"hole": 2, "scratch": 2})
    record = read_lora(train(data=data)).record
    assert record["prompts"] == {"hole": "A metal nut with hole", "scratch": "A metal nut with scratch"}


def test_prepared_dataset(train, base, data, tmp_path):
    shutil.copytree(data / "test/hole", tmp_path / "prepared/train/images")
    shutil.copytree(data / "ground_truth/hole", tmp_path / "prepared/train/masks")
    lines = [
        {"file_name": f"images/{i:03d}.png", "mask_file_name": f"masks/{i:03d}_mask.png", "object": "nut",
         "defect": "hole", "source_file": f"{i:03d}.png"} for i in range(4)
    ]  # fmt: skip
    (tmp_path / "prepared/train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = [a for a in train_defectfill_options(base, tmp_path / "out") if a]
    train_defectfill.main(train_defectfill.parse_args([*argv, "--dataset_name", str(tmp_path / "prepared")]))
    record = json.loads((tmp_path / "out/run_record.json").read_text())
    assert record["images"] == {"train": 4} and record["held_out"] is None


def test_held_out_defects_are_those_of_trained_types_evenly_over_all():
    rows = [{"defect": "hole" if i % 2 else "crack", "place": i} for i in range(100)]
    data = DatasetDict(train=Dataset.from_list([{"defect": "hole"}]), test=Dataset.from_list(rows))
    assert train_defectfill.held_out_rows(data)["place"] == [1, 9, 17, 25, 33, 41, 49, 57, 65, 73, 81, 89, 97]
    assert len(train_defectfill.held_out_rows(DatasetDict(train=data["train"]))) == 0


def test_a_held_out_image_that_cannot_be_read_is_told_before_training(base, data, tmp_path, train):
    (data / "test/hole/003.png").write_bytes(b"no image")
    assert refusal(train, data=data).startswith("DF103 test/hole/003.png")


def train_defectfill_options(base, output) -> list[str]:
    return f"""--pretrained_model_name_or_path {base} --output_dir {output} --resolution {RESOLUTION}
        --max_train_steps 1
        --train_batch_size 2 --validation_steps 0 --report_to none""".split()


def test_validation_pictures_go_to_disk_and_tracker(train):
    out = train(
        "--validation_steps", "1", "--validation_inference_steps", "2", "--num_validation_images", "2",
        "--report_to", "tensorboard",
    )  # fmt: skip
    pictures = sorted((out / "validation").iterdir())
    assert [p.name for p in pictures] == ["step-000001.png", "step-000002.png"]
    assert Image.open(pictures[0]).size == (4 * RESOLUTION, 2 * RESOLUTION)  # good | mask | result | attention
    good, mask, result, attention = np.split(np.asarray(Image.open(pictures[0])), 4, axis=1)
    inside = mask[..., 0] > 127
    assert inside.any() and np.array_equal(good[~inside], result[~inside]) and not np.array_equal(good, result)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((out / "logs/defectfill").glob("events*")).parent)).Reload()
    assert events.Tags()["images"] == ["validation"] and "l_attn" in events.Tags()["scalars"]


def test_a_tracker_gets_the_options_of_the_method_alone(train, tmp_path):
    """None that holds a path, a name or a free text."""
    out = train("--report_to", "tensorboard")
    [file] = (out / "logs").rglob("hparams.yml")
    text = file.read_text()
    assert yaml.safe_load(text).keys() == set(train_defectfill.IDENTITY) and "rank: 4" in text
    assert not any(word in text for word in (str(tmp_path), tmp_path.name, "nut", "hole", "sks"))


def test_pictures_go_to_trackers_that_take_them():
    class Plain:
        name = "mlflow"

    class Taking(Plain):
        name = "wandb"

        def log_images(self, values, step):
            self.got = (values, step)

    taking, picture = Taking(), Image.new("RGB", (4, 4))
    logs.log_image([Plain(), taking], picture, 7)
    assert taking.got == ({"validation": [picture]}, 7)


def test_validation_falls_back_on_the_references_without_good_images(train, tmp_path):
    out = train(
        "--validation_steps", "2", "--validation_inference_steps", "1", data=make_mvtec(tmp_path / "bolt", good=0)
    )  # fmt: skip
    assert Image.open(out / "validation/step-000002.png").size == (4 * RESOLUTION, 2 * RESOLUTION)


@pytest.mark.parametrize(
    "precision",
    ["bf16", pytest.param("fp16", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU"))],
)
def test_mixed_precision_keeps_fp32_lora(train, precision):
    out = train("--mixed_precision", precision, "--validation_steps", "2", "--validation_inference_steps", "1")
    tensors = load_file(out / LORA_FILE)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert any((t != t.to(torch.bfloat16).float()).any() for t in tensors.values())  # really fp32, not rounded
    assert all(math.isfinite(line["loss"]) for line in read_lines(out / "losses.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_checkpointing",),
        ("--dataloader_num_workers", "2"),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_must_not_change_the_result(train, trained_tensors, tmp_path, flags):
    tensors = load_file(train(*flags, output=tmp_path / "other") / LORA_FILE)
    assert all(torch.equal(tensors[k], trained_tensors[k]) for k in tensors)


@pytest.fixture(scope="module")
def plain_run(base, tmp_path_factory):
    """The folder of a run of defaults, on the data that `train` has."""
    folder = tmp_path_factory.mktemp("plain")
    reset_accelerate()
    train_defectfill.main(train_defectfill.parse_args(options(base, make_mvtec(folder / "nut"), folder / "out")))
    return folder / "out"


@pytest.fixture(scope="module")
def trained_tensors(plain_run):
    return load_file(plain_run / LORA_FILE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--lambda_def", "0.1"),
        ("--lambda_obj", "0.9"),
        ("--object_prompt", "A part of {object} with {phrase}"),
        ("--adam_beta1", "0.5"),
        ("--adam_beta2", "0.5"),
        ("--adam_epsilon", "0.1"),
        ("--loss_reduction", "mask"),
        ("--attention_pass", "defect"),
        ("--attention_map_scale", "minmax"),
        ("--background_alpha", "0.9"),
        ("--num_random_boxes", "1"),
        ("--center_crop",),
        ("--max_resize_scale", "1"),
        ("--cache_latents", "2"),
        ("--seed", "1"),
        ("--use_8bit_adam",),
        ("--lr_scheduler", "constant"),
        ("--split", "all"),
        ("--validation_defects", "1"),
        ("--phrase", "hole"),
        ("--object_words", "hazelnut"),
        ("--defect_prompt", "A close up of {phrase}"),
        ("--lora_dropout", "0.5"),
        ("--adam_weight_decay", "0.9"),
        ("--max_grad_norm", "0.0001"),
        ("--snr_gamma", "0.01"),
        ("--high_noise_power", "0.5"),
        ("--noise_offset", "0.1"),
        ("--prompt_noise", "0.1"),
        ("--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "9"),
        ("--timestep_bias_strategy", "earlier", "--timestep_bias_portion", "0.9", "--timestep_bias_multiplier", "9"),
        (
            "--timestep_bias_strategy",
            "range",
            "--timestep_bias_begin",
            "100",
            "--timestep_bias_end",
            "900",
            "--timestep_bias_multiplier",
            "9",
        ),
        ("--lora_targets", "attention+ff"),
        ("--lora_targets", "all"),
        ("--lora_targets", "all", "--conv_rank", "2"),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_must_change_the_result(train, trained_tensors, tmp_path, flags):
    tensors = load_file(train(*flags, output=tmp_path / "other") / LORA_FILE)
    assert any(not torch.equal(tensors[k], trained_tensors[k]) for k in trained_tensors)


def test_the_lora_of_all_layers_says_its_ranks_and_fits_its_base_alone(train, base, tmp_path):
    out = train("--lora_targets", "all", "--conv_rank", "2")
    lora = read_lora(out)
    assert (lora.record["lora_targets"], lora.record["conv_rank"]) == ("all", 2)
    with safe_open(out / LORA_FILE, "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "4.0"}
    conv = "lora_unet_mid_block_resnets_0_conv1"
    assert len(lora.tensors[f"{conv}.lora_down.weight"]) == 2 and lora.tensors[f"{conv}.alpha"] == 4
    assert "rank 4 (2 for convolutions), alpha 8.0, layers: all" in " ".join((out / "README.md").read_text().split())
    check_fits(lora, read_base(str(base)))
    toy_pipeline(unet_channels=(32, 32, 32)).save_pretrained(tmp_path / "wider")
    assert refusal(check_fits, lora, read_base(str(tmp_path / "wider"))).startswith("DF410")


@pytest.mark.parametrize(
    "device, scaler, fused", [("cpu", None, False), ("cuda", None, True), ("cuda", "fp16", False)]
)
def test_adamw_is_fused_on_a_gpu_but_not_with_a_loss_scale(monkeypatch, device, scaler, fused):
    """With one, accelerate would take every step that fp16 skips for a step."""

    class Made(Exception):
        pass

    def make_optimizer(unet, text_encoder, args, fused):
        raise Made(fused)

    class Accelerator:
        mixed_precision = "no"

    accelerator = Accelerator()
    accelerator.device, accelerator.scaler = torch.device(device), scaler
    for name, stand_in in (("make_models", lambda *_: toy_models()), ("lora_parameters", lambda *_: {})):
        monkeypatch.setattr(train_defectfill, name, stand_in)
    monkeypatch.setattr(train_defectfill, "make_optimizer", make_optimizer)
    with pytest.raises(Made, match=str(fused)):
        train_defectfill.start_training(None, None, accelerator)


def toy_models() -> train_defectfill.Models:
    return train_defectfill.Models(*[None] * 6)


@pytest.mark.parametrize("fused", [False, True])
def test_fused_adamw_steps_alike(fused):
    args = train_defectfill.parse_args(["--output_dir", "x", "--learning_rate", "0.1"])
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = train_defectfill.make_optimizer(model, other, args, fused)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] == fused
    assert torch.allclose(model.weight, before * (1 - 0.1 * 0.01) - 0.1, atol=1e-6)  # the first step of Adam is lr


@pytest.mark.slow
def test_channels_last_reaches_the_convolutions_and_trains_alike(train, plain_run, tmp_path, monkeypatch):
    original, seen = train_defectfill.training_losses, []

    def training_losses(models, *rest):
        seen.extend((models.unet.conv_in.weight, models.vae.encoder.conv_in.weight))
        return original(models, *rest)

    monkeypatch.setattr(train_defectfill, "training_losses", training_losses)
    out = train("--channels_last", output=tmp_path / "other")
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in seen)
    assert not any(weight.is_contiguous() for weight in seen)
    losses = [[line["loss"] for line in read_lines(run / "losses.jsonl")] for run in (out, plain_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], FULL(["--gradient_checkpointing"])], ids=["", "checkpointing"])
def test_compiled_blocks_train_alike(train, plain_run, tmp_path, monkeypatch, more):
    """The maps of L_attn are recorded inside them. No C++ compiler is needed."""
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        UNet2DConditionModel, "compile_repeated_blocks", lambda unet: compile_blocks(unet, backend="aot_eager")
    )
    torch._dynamo.reset()
    counters["stats"].clear()
    out = train("--torch_compile", *more, output=tmp_path / "other")
    assert counters["stats"]["unique_graphs"]
    losses = [
        [line[k] for line in read_lines(run / "losses.jsonl") for k in train_defectfill.LOSSES]
        for run in (out, plain_run)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_tf32_is_switched_on(train):
    train("--allow_tf32")
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def test_help_comes_in_groups(capsys):
    with pytest.raises(SystemExit):
        train_defectfill.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n{group}:\n" in text for group in ("base model", "data", "method", "LoRA", "Hugging Face Hub"))
    assert "Default: 2000." in text and "Default: 0.0002." in text


def test_the_defaults_are_the_papers():
    args = train_defectfill.parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y"])
    expected = dict(
        lambda_def=0.5, lambda_obj=0.2, lambda_attn=0.05, background_alpha=0.3, num_random_boxes=30, rank=8,
        lora_alpha=16, lora_dropout=0.1, learning_rate=2e-4, text_encoder_lr=4e-5, max_train_steps=2000,
        train_batch_size=4,
        lr_warmup_steps=100, lr_scheduler="constant_with_warmup", resolution=512, max_resize_scale=1.125,
        center_crop=False,
        loss_reduction="mean", attention_pass="object", attention_map_scale="raw", lora_targets="attention",
        conv_rank=None, snr_gamma=None, high_noise_power=0, noise_offset=0, timestep_bias_strategy="none",
        prompt_noise=0,
    )  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected
    assert train_defectfill.LossOptions(*(getattr(args, f) for f in train_defectfill.LossOptions._fields)) == (
        train_defectfill.LossOptions()
    )


# Nothing is swallowed


def test_an_image_that_breaks_while_training_stops_the_run_and_is_named(train, monkeypatch):
    """A broad `except: continue` around all of it."""
    original = train_defectfill.TrainingSamples.resize_and_crop

    def broken(self, image, mask, rng):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise OSError("disk went away")
        return original(self, image, mask, rng)

    monkeypatch.setattr(train_defectfill.TrainingSamples, "resize_and_crop", broken)
    with pytest.raises(OSError, match="disk went away"):
        train()


def test_a_step_that_fails_stops_the_run(train, monkeypatch):
    original = train_defectfill.training_losses

    def broken(*args):
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return original(*args)

    monkeypatch.setattr(train_defectfill, "training_losses", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train()


@pytest.mark.parametrize("term", ["l_def", "l_obj", "l_attn"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(train, monkeypatch, tmp_path, term):
    original, calls = train_defectfill.training_losses, []

    def poisoned(models, batch, draws, options):
        losses = original(models, batch, draws, options)
        calls.append(1)
        if len(calls) > 8 and torch.is_grad_enabled():  # 8 calls measure the references before the first step
            losses[term] = losses[term] * float("nan")
            losses["loss"] = losses["loss"] + losses[term]
        return losses

    monkeypatch.setattr(train_defectfill, "training_losses", poisoned)
    with pytest.raises(RunError, match=rf"DF323 step 1: .*{term} nan.* last images test/hole"):
        train()
    assert not (tmp_path / "out" / LORA_FILE).exists()


def test_steps_that_fp16_skips_for_ever_are_an_error(train, monkeypatch):
    """Steps silently skipped."""
    skipped = property(lambda self: True)
    monkeypatch.setattr(train_defectfill.Accelerator, "optimizer_step_was_skipped", skipped)
    monkeypatch.setattr(record, "MAX_SKIPPED_STEPS", 2)
    with pytest.raises(RunError, match="DF323 step 2: 2 steps in a row skipped by fp16"):
        train("--max_train_steps", "4")


@pytest.mark.slow
def test_the_written_split_can_be_given_back(train, tmp_path):
    data = make_mvtec(tmp_path / "bolt", {"hole": 3, "scratch": 3})
    out = train("--defect", "hole", data=data)
    split = json.loads((out / "split.json").read_text())
    assert len(split["train"]) == 2 and len(split["test"]) == 4
    again = train("--defect", "hole", "--split", out / "split.json", data=data, output=tmp_path / "again")
    records = [json.loads((run / "run_record.json").read_text()) for run in (out, again)]
    assert records[0]["data_sha256"] == records[1]["data_sha256"]


def test_trackers_write_where_they_are_told(train, tmp_path):
    train("--report_to", "tensorboard", "--logging_dir", "board")
    assert list((tmp_path / "out/board").rglob("events*"))


def test_a_lora_that_does_not_load_is_an_error(train, monkeypatch, tmp_path):
    def loads_nothing(self, *args, **kwargs):
        train_defectfill.add_lora(self.unet, self.text_encoder, 4, 8, 0.0)  # what a wrong prefix gives: B is all 0

    monkeypatch.setattr(train_defectfill.StableDiffusionInpaintPipeline, "load_lora_weights", loads_nothing)
    with pytest.raises(RuntimeError, match="did not load as it was saved"):
        train()


def test_a_lora_file_of_another_alpha_is_an_error(tmp_path):
    for alpha in (8, 16):
        pipe = toy_pipeline()
        add_lora(pipe.unet, pipe.text_encoder, 4, alpha, 0.0)
        if alpha == 8:
            save_lora(tmp_path / LORA_FILE, pipe.unet, pipe.text_encoder, {})
            reload_and_compare(pipe, tmp_path / LORA_FILE)
    with pytest.raises(RuntimeError, match="has strength 4.0, in the file 2.0"):
        reload_and_compare(pipe, tmp_path / LORA_FILE)


# What is refused, before any weight is loaded


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test if a model is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_defectfill, "load_models", loaded)


def empty_mask(data):
    Image.new("L", (48, 48)).save(data / "ground_truth/hole/000_mask.png")


def missing_mask(data):
    (data / "ground_truth/hole/000_mask.png").unlink()


def other_size(data):
    write_image(data / "test/hole/000.png", size=40)


def no_images(data):
    for image in [*(data / "test/hole").iterdir(), *(data / "ground_truth/hole").iterdir()]:
        image.unlink()


def deep_image(data):
    Image.fromarray(np.full((48, 48), 4000, dtype=np.uint16)).save(data / "test/hole/000.png")


def broken_good_image(data):
    file = data / "train/good/000.png"
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 1] ^= 0x80  # Pillow calls this a SyntaxError
    file.write_bytes(content)


@pytest.mark.parametrize(
    "break_data, code, words",
    [
        (empty_mask, "DF145", "test/hole/000.png: its mask is empty"),
        (missing_mask, "DF142", "test/hole/000.png: its mask is missing"),
        (other_size, "DF140", "40x40, its mask 48x48"),
        (no_images, "DF163", "no defect images"),
        (deep_image, "DF103", "12 bits or fewer"),
        (broken_good_image, "DF103", "train/good/000.png: the image cannot be read"),
    ],
)
def test_bad_data_is_refused(train, data, no_models, break_data, code, words):
    break_data(data)
    told = refusal(train, "--validation_steps", "2")
    assert told.startswith(code) and words in told


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (("--defect", "hoel"), "DF162", "Did you mean 'hole'?"),
        (("--object", "nutt"), "DF162", "Did you mean 'nut'?"),
        (("--train_data_dir", "nowhere"), "DF160", "no such folder"),
        (("--dataset_name", "x"), "DF188", "either"),
        (("--dataset_name", "x", "--layout", "coco"), "DF188", "--layout"),
        (("--layout", "coco"), "DF161", "no images of the layout coco"),
        (("--pretrained_model_name_or_path", "nowhere"), "DF180", "cannot read unet/config.json"),
        (("--resolution", "33"), "DF184", "multiple of 16"),
        (("--phrase", "very " * 80 + "sks"), "DF174", "77"),
        (("--rank", "0"), "DF187", "at least 1"),
        (("--learning_rate", "nan"), "DF187", "finite"),
        (("--lambda_attn", "-1"), "DF187", "at least 0"),
        (("--max_train_steps", "0"), "DF187", "at least 1"),
        (("--checkpoints_total_limit", "0"), "DF187", "at least 1"),
        (("--lora_dropout", "1"), "DF187", "below 1"),
        (("--adam_beta2", "1"), "DF187", "below 1"),
        (("--seed", "-1"), "DF187", "at least 0"),
        (("--cache_latents", "-1"), "DF187", "at least 0"),
        (("--seed", str(2**32)), "DF187", "below 4294967296"),
        (("--max_grad_norm", "0"), "DF187", "above 0"),
        (("--lora_alpha", "0"), "DF187", "above 0"),
        (("--lora_targets", "all", "--conv_rank", "0"), "DF187", "at least 1"),
        (("--conv_rank", "4"), "DF188", "--lora_targets all"),
        (("--snr_gamma", "0"), "DF187", "above 0"),
        (("--high_noise_power", "-1"), "DF187", "at least 0"),
        (("--noise_offset", "nan"), "DF187", "at least 0"),
        (("--prompt_noise", "-1"), "DF187", "at least 0"),
        (("--snr_gamma", "5", "--high_noise_power", "1"), "DF188", "give only one of them"),
        (("--timestep_bias_strategy", "later"), "DF188", "together"),
        (("--timestep_bias_multiplier", "2"), "DF188", "together"),
        (("--timestep_bias_portion", "0.5"), "DF188", "earlier or later"),
        (("--timestep_bias_portion", "0"), "DF187", "at most 1"),
        (("--timestep_bias_begin", "1000"), "DF187", "above --timestep_bias_begin 1000"),
        (("--timestep_bias_end", "1001"), "DF187", "at most 1000"),
        (("--phrase", " "), "DF187", "empty"),
        (("--report_to", "nosuch"), "DF189", "tensorboard"),
        pytest.param(
            ("--mixed_precision", "fp16", "--num_validation_images", "3"),
            "DF189",
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("--resume_from_checkpoint", "checkpoint-7"), "DF185", "no such checkpoint"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_bad_options_are_refused(train, no_models, flags, code, words):
    told = refusal(train, *flags)
    assert told.startswith(code) and words in told


def test_xformers_without_cuda_is_refused(train, no_models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refusal(train, "--enable_xformers_memory_efficient_attention")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(option_checks, "is_xformers_available", lambda: False)
    assert "xformers is not installed" in refusal(train, "--enable_xformers_memory_efficient_attention")


def test_xformers_keeps_the_recording_processors(base, monkeypatch):
    """They are installed last: what xformers switches, it switches before."""
    args = train_defectfill.parse_args(
        [
            "--pretrained_model_name_or_path",
            str(base),
            "--output_dir",
            "x",
            "--enable_xformers_memory_efficient_attention",
        ]
    )
    job = train_defectfill.PreparedTraining(read_base(str(base)), *[None] * 11)
    replace_all = train_defectfill.UNet2DConditionModel.set_default_attn_processor
    name = "enable_xformers_memory_efficient_attention"
    monkeypatch.setattr(train_defectfill.UNet2DConditionModel, name, replace_all)
    models = train_defectfill.make_models(args, job, torch.float32, torch.device("cpu"))
    kinds = [type(p).__name__ for n, p in models.unet.attn_processors.items() if "up_blocks" in n and "attn2" in n]
    assert kinds == ["RecordingAttnProcessor"] * 4


def test_8bit_adam_without_bitsandbytes_is_refused(train, no_models, monkeypatch):
    monkeypatch.setattr(option_checks, "is_bitsandbytes_available", lambda: False)
    assert "pip install bitsandbytes" in refusal(train, "--use_8bit_adam")


def test_a_base_without_its_tokenizer_is_refused(train, no_models, tmp_path, base):
    shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer"))
    told = refusal(train, base=tmp_path / "other")
    assert told.startswith("DF180") and "cannot read tokenizer/tokenizer_config.json" in told


def test_a_base_that_is_no_inpainting_model_is_refused(train, no_models, tmp_path, base):
    config = json.loads((base / "unet/config.json").read_text()) | {"in_channels": 4}
    shutil.copytree(base, tmp_path / "other")
    (tmp_path / "other/unet/config.json").write_text(json.dumps(config))
    assert "takes 4 channels, not 9" in refusal(train, base=tmp_path / "other")


def test_a_base_of_pickles_is_refused(train, no_models, tmp_path, base):
    shutil.copytree(base, tmp_path / "other")
    weights = tmp_path / "other/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert refusal(train, base=tmp_path / "other").startswith("DF182")


def test_an_unknown_prediction_type_is_refused(train, no_models, tmp_path, base):
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    assert refusal(train, base=tmp_path / "other").startswith("DF183")


def test_an_earlier_run_is_not_overwritten(train, no_models, trained):
    before = (trained / LORA_FILE).read_bytes()
    assert refusal(train, output=trained).startswith("DF186")
    assert (trained / LORA_FILE).read_bytes() == before


@pytest.mark.slow
def test_wrong_input_ends_the_command_with_one_message(base, data, tmp_path):
    import subprocess
    import sys

    empty_mask(data), write_image(data / "test/hole/001.png", size=40)
    argv = options(base, data, tmp_path / "out", "--split", "all")
    done = subprocess.run([sys.executable, ROOT / "train_defectfill.py", *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.findall(r"^DF\d+ [\w/.]+", done.stderr, re.M) == ["DF145 test/hole/000.png", "DF140 test/hole/001.png"]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


# LoRA files that must not pass


def test_a_lora_of_foreign_names_or_broken_numbers_is_refused(trained, tmp_path):
    tensors = load_file(trained / LORA_FILE)
    name = next(iter(tensors))
    cases = {
        "DF403": tensors | {name: tensors[name] * float("nan")},
        "DF402": tensors | {"lora_unet_mid_block.dora_scale": torch.ones(1)},
        "DF404": {
            k: v for k, v in tensors.items() if k != name.replace("down", "up").replace("alpha", "lora_up.weight")
        },
    }
    for code, content in cases.items():
        save_file(content, tmp_path / "x.safetensors")
        assert refusal(read_lora, tmp_path / "x.safetensors").startswith(code)
    (tmp_path / "x.safetensors").write_bytes((trained / LORA_FILE).read_bytes()[:5000])
    assert refusal(read_lora, tmp_path / "x.safetensors").startswith("DF401")
    assert refusal(read_lora, tmp_path / "nowhere").startswith("DF400")
    assert refusal(read_lora, tmp_path).startswith("DF400")


def test_half_a_lora_does_not_load_silently(trained, tmp_path):
    with safe_open(trained / LORA_FILE, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    half = {name: tensor for name, tensor in tensors.items() if "_up_blocks_" not in name}
    save_file(half, tmp_path / "half.safetensors", metadata=header)
    assert refusal(read_lora, tmp_path / "half.safetensors").startswith("DF404")
    wrong = {name.replace("attentions_0", "attentions_9"): tensor for name, tensor in tensors.items()}
    save_file(wrong, tmp_path / "wrong.safetensors", metadata=header)
    with pytest.raises((RuntimeError, ValueError)):
        load_lora(toy_pipeline(), read_lora(tmp_path / "wrong.safetensors"))


def test_the_lora_serves_a_text_to_image_pipeline_too(trained, base):
    """An attention-only LoRA has no tensor that depends on the UNet's nine input channels."""
    parts = toy_pipeline().components
    from diffusers import UNet2DConditionModel

    config = dict(parts["unet"].config) | {"in_channels": 4}
    parts["unet"] = UNet2DConditionModel.from_config(config)
    parts.pop("image_encoder", None)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    load_lora(pipe, read_lora(trained))
