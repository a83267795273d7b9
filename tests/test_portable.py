"""The LoRA file in other programs, and their LoRA files here."""

import dataclasses
import json
import re

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from folders import write_image
from runs import FAST, generate, read_lines
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_model import toy_pipeline

from defectfill.lora import (
    LORA_FILE,
    add_lora,
    load_lora,
    lora_parameters,
    portable_layer,
    portable_name,
    read_lora,
    save_lora,
)
from defectfill_dataset import InputError, RunError
from defectfill_scripts import merge_lora


KOHYA = r"(lora_unet|lora_te1?_text_model)_\w+\.lora_(down|up)\.weight"
KOHYA_UNET = r"lora_unet_\w+\.lora_(down|up)\.weight"
PEFT = r"(unet|text_encoder(\.text_model)?)\.[\w.]+\.lora(_A|_B|\.down|\.up)\.weight"
PEFT_UNET = r"unet\.[\w.]+\.lora(_A|_B|\.down|\.up)\.weight"
PEFT_TEXT = r"text_encoder\.text_model\.[\w.]+\.lora_[AB]\.weight"
PROCESSOR = r"unet\.[\w.]+\.processor\.\w+_lora\.(down|up)\.weight"
# The names by which each program finds a LoRA's matrices, and whether it reads peft's configuration in the header. All
# of them read `.alpha` of kohya's names; without any, alpha is the rank. Read off their loaders, and run through them.
PROGRAMS = {
    "diffusers 0.27-0.33": ([KOHYA, PEFT], False),
    "diffusers from 0.34": ([KOHYA, PEFT], True),
    "ComfyUI": ([KOHYA, PEFT_TEXT, PROCESSOR], False),
    "Forge": ([KOHYA], False),
    "AUTOMATIC1111": ([KOHYA], False),
    "SD.Next": ([KOHYA], False),
    "InvokeAI": ([KOHYA], False),
    "kohya": ([KOHYA], False),
    "stable-diffusion.cpp": ([KOHYA, PEFT_UNET], False),
    "OneTrainer": ([KOHYA, PEFT], False),
}


def strengths(program: str, file) -> dict[str, float]:
    """How strongly a program applies each layer of a LoRA file, beside alpha / rank; 0 where it finds nothing."""
    patterns, reads_header = PROGRAMS[program]
    with safe_open(file, "pt") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    config = json.loads(header.get("lora_adapter_metadata", "{}"))
    assert not (reads_header and config and "lora_unet_" in " ".join(tensors)), "diffusers refuses it"
    found = {str(portable_name(name)) for name in tensors if any(re.fullmatch(pattern, name) for pattern in patterns)}
    lora = read_lora(file)
    result = {}
    for name, alpha in lora.tensors.items():
        layer, _, end = name.partition(".")
        if end == "alpha":
            rank = len(lora.tensors[f"{layer}.lora_down.weight"])
            used = alpha.item() if name in tensors or reads_header and config else rank
            whole = {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"} <= found
            result[layer] = used / alpha.item() if whole else 0
    return result


@pytest.mark.parametrize("layers", ["trained", "trained_all"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_reads_the_file_of_a_training_at_full_strength(request, layers, program):
    assert set(strengths(program, request.getfixturevalue(layers) / LORA_FILE).values()) == {1.0}


OLD_STRENGTHS = {  # of UNet and text encoder, measured with the programs themselves
    "diffusers 0.27-0.33": (0.5, 0.5), "diffusers from 0.34": (1, 1), "ComfyUI": (0, 0.5), "Forge": (0, 0),
    "AUTOMATIC1111": (0, 0), "SD.Next": (0, 0), "InvokeAI": (0, 0), "kohya": (0, 0), "stable-diffusion.cpp": (0.5, 0),
    "OneTrainer": (0.5, 0.5),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(folder of a LoRA of all layers, its pipeline)."""
    folder, pipe = tmp_path_factory.mktemp("lora"), toy_pipeline()
    add_lora(pipe.unet, pipe.text_encoder, 4, 8, 0.0, "all", 2)
    for parameter in lora_parameters(pipe.unet, pipe.text_encoder).values():
        torch.nn.init.normal_(parameter, std=0.1)
    save_lora(folder / LORA_FILE, pipe.unet, pipe.text_encoder, {})
    return folder, pipe


def dotted_names(pipe) -> dict[str, str]:
    """Layer in peft's form, by its name in kohya's."""
    found = {}
    for prefix, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for name, _ in model.named_modules():
            found[portable_layer(f"{prefix}.{name}")] = f"{prefix}.{name}"
    return found


FORMS = {  # layer, A, B
    "kohya-te1": (None, "lora_down", "lora_up"),
    "peft": ("{}", "lora_A", "lora_B"),
    "peft-default": ("{}", "lora_A.default", "lora_B.default"),
    "diffusers": ("{}", "lora.down", "lora.up"),
    "diffusers-text": ("{}", "lora_linear_layer.down", "lora_linear_layer.up"),
    "onetrainer": ("lora_{}", "lora_down", "lora_up"),
}


def foreign_file(form: str, lora, file, alphas: bool = True, header: dict | None = None) -> None:
    """Writes the LoRA in another program's form."""
    folder, pipe = lora
    dotted, (layer_form, down, up) = dotted_names(pipe), FORMS[form]
    tensors = {}
    for name, tensor in load_file(folder / LORA_FILE).items():
        layer, _, end = name.partition(".")
        place = (layer_form or "").format(dotted[layer]).replace("lora_text_encoder", "lora_te")
        place = place.replace("text_encoder.", "text_encoder.text_model.").replace("lora_te.", "lora_te.text_model.")
        place = place or layer.replace("lora_te_", "lora_te1_")
        end = {"alpha": "alpha", "lora_down.weight": f"{down}.weight", "lora_up.weight": f"{up}.weight"}[end]
        if alphas or end != "alpha":
            tensors[f"{place}.{end}"] = tensor
    save_file(tensors, file, metadata=header or {})


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_another_program_is_read_as_it_was_trained(lora, tmp_path, form):
    foreign_file(form, lora, tmp_path / "x.safetensors")
    ours, theirs = read_lora(lora[0]), read_lora(tmp_path / "x.safetensors")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
    load_lora(toy_pipeline(), theirs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_rules_of_the_programs_tell_what_they_make_of_pefts_names(lora, tmp_path, program):
    """The form of earlier versions: alpha, twice the rank, in the header alone. It is still read, and resumed."""
    config = {f"{model}.lora_alpha": 8 for model in ("unet", "text_encoder")} | {"unet.alpha_pattern": {"conv1": 4}}
    config["unet.alpha_pattern"] |= {"conv2": 4, "conv_shortcut": 4, "conv": 4}
    header = {"lora_adapter_metadata": json.dumps(config)}
    foreign_file("peft", lora, tmp_path / "x.safetensors", alphas=False, header=header)
    ours, theirs = read_lora(lora[0]), read_lora(tmp_path / "x.safetensors")
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
    of_layer = strengths(program, tmp_path / "x.safetensors")
    found = [{of_layer[x] for x in of_layer if x.startswith(prefix)} for prefix in ("lora_unet", "lora_te")]
    assert found == [{strength} for strength in OLD_STRENGTHS[program]]


def test_a_peft_adapter_takes_its_alpha_from_the_file_beside_it(lora, tmp_path):
    dotted = dotted_names(lora[1])
    tensors = {}
    for name, tensor in load_file(lora[0] / LORA_FILE).items():
        layer, _, end = name.partition(".")
        if layer.startswith("lora_unet") and end != "alpha":
            end = end.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            tensors[f"base_model.model.{dotted[layer].removeprefix('unet.')}.{end}"] = tensor
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 12, "use_rslora": true}')
    alphas = {n: a for n, a in read_lora(tmp_path / "adapter_model.safetensors").tensors.items() if "alpha" in n}
    ranks = {name: len(tensors_of(lora)[name.replace("alpha", "lora_down.weight")]) for name in alphas}
    assert alphas and all(alphas[name] == pytest.approx(12 * ranks[name] ** 0.5) for name in alphas)


def tensors_of(lora) -> dict[str, torch.Tensor]:
    return read_lora(lora[0]).tensors


def test_an_alpha_that_no_file_tells_is_asked_for_and_never_guessed(lora, base, tmp_path):
    foreign_file("peft", lora, tmp_path / "x.safetensors", alphas=False)
    with pytest.raises(InputError, match="DF405 .*does not tell its alpha.*--lora_alpha"):
        read_lora(tmp_path / "x.safetensors")
    alphas = {a.item() for n, a in read_lora(tmp_path / "x.safetensors", 6).tensors.items() if n.endswith("alpha")}
    assert alphas == {6}
    with pytest.raises(InputError, match="DF405 .*tells its own alpha"):
        read_lora(lora[0], 6)


def test_images_are_made_with_a_foreign_lora_and_the_alpha_given(lora, base, tmp_path):
    foreign_file("peft", lora, tmp_path / "x.safetensors", alphas=False)
    write_image(tmp_path / "good.png")
    argv = ["--lora", tmp_path / "x.safetensors", "--image", tmp_path / "good.png", "--mask_source", "random"]
    argv += ["--pretrained_model_name_or_path", base, "--resolution", 32, "--prompt", "A nut with sks", *FAST]
    for alpha in (8, 80):
        generate(*argv, "--lora_alpha", alpha, "--output_dir", tmp_path / str(alpha))
    assert [line["lora_alpha"] for line in read_lines(tmp_path / "80/plan.jsonl")] == [80]
    first, second = ((tmp_path / f"{alpha}/images/good.png").read_bytes() for alpha in (8, 80))
    assert first != second


def merge(*argv) -> None:
    merge_lora.main(merge_lora.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("layers, open_clip", [("trained", False), ("trained", True), ("trained_all", False)])
def test_a_merged_lora_needs_no_lora(request, base, tmp_path, monkeypatch, layers, open_clip):
    trained = request.getfixturevalue(layers)
    saved, files = merge_lora.save_single_file, []
    monkeypatch.setattr(merge_lora, "save_single_file", lambda pipe, path, **_: (
        saved(pipe, path, open_clip), files.append(set(load_file(path)))))  # fmt: skip
    single_file = tmp_path / "one.safetensors"
    merge(trained, "--output_dir", tmp_path / "out/merged", "--single_file", single_file, "--dtype", "fp32")
    plain, merged = (StableDiffusionInpaintPipeline.from_pretrained(f) for f in (base, tmp_path / "out/merged"))
    first, second = (pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q for pipe in (plain, merged))
    assert not torch.equal(first.weight, second.weight)
    load_lora(plain, read_lora(trained))
    lora = read_lora(trained)
    first, second = (merge_lora.inpaint_noise(pipe, lora, 32) for pipe in (plain, merged))
    assert (first - second).abs().max() < 1e-3
    text = "cond_stage_model." + ("model.transformer.resblocks.0.attn.in_proj_weight" if open_clip else
                                  "transformer.text_model.encoder.layers.0.self_attn.q_proj.weight")  # fmt: skip
    unet = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert {text, unet, "first_stage_model.decoder.mid.attn_1.q.weight"} <= files[0]


def test_what_would_be_overwritten_or_does_not_merge_is_refused(trained, base, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="DF192 --output_dir"):
        merge(trained, "--output_dir", tmp_path / "there")
    with pytest.raises(InputError, match="DF188 --single_file"):
        merge(trained, "--output_dir", tmp_path / "new", "--single_file", tmp_path / "one.ckpt")
    monkeypatch.setattr(merge_lora, "fuse_lora", lambda pipe: pipe.unload_lora_weights())
    monkeypatch.setattr(merge_lora, "TOLERANCE", 1e-6)
    with pytest.raises(RuntimeError, match="inpaints another image"):
        merge(trained, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_odd_numbers_and_folders_of_a_merge_are_one_line(trained, tmp_path, capsys, monkeypatch):
    flags = [["--resolution", "1000000000"], ["--resolution", "-8"], ["--lora_alpha", "nan"], ["--lora_alpha", "0"]]
    for flag, value in flags:
        with pytest.raises(SystemExit):
            merge(trained, "--output_dir", tmp_path / "new", flag, value)
        assert f"{flag} {value}: must be" in capsys.readouterr().err.replace("0.0", "0")
    monkeypatch.setattr(merge_lora, "load_pipeline", None)  # not reached
    with pytest.raises(InputError, match="DF184 --resolution 33"):
        merge(trained, "--output_dir", tmp_path / "new", "--resolution", 33)
    (tmp_path / "file").write_text("x")
    for place in (["--output_dir", tmp_path / "file/x"], ["--output_dir", tmp_path / "new", "--single_file",
                                                          tmp_path / "file/x.safetensors"]):  # fmt: skip
        with pytest.raises(RunError, match="DF324 .*cannot be written"):
            merge(trained, *place)


def test_a_base_that_changed_is_not_merged(trained, tmp_path, monkeypatch):
    read = merge_lora.read_base
    monkeypatch.setattr(merge_lora, "read_base", lambda *args: dataclasses.replace(read(*args), digest="ab"))
    monkeypatch.setattr(merge_lora, "load_pipeline", None)  # not reached
    with pytest.raises(InputError, match="DF414 .*has other weights or configuration than when it was trained"):
        merge(trained, "--output_dir", tmp_path / "new")
