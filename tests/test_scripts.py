"""The demo's data and base."""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from offline import ROOT

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from drawn import write_image
from networks import make_squeezenet
from PIL import Image
from runs import fork, in_clean_process, launch, read_lines, reset_accelerate, wait_for
from safetensors.torch import load_file, save_file
from scipy import ndimage
from scipy.spatial import ConvexHull

from defectfill.drawn.comparison import read_whole_image_lora
from defectfill.drawn.pairs import drawn_pairs
from defectfill.drawn.parts import BUMPS, PARTS, blob, render, write_parts
from defectfill.drawn.scores import defect_features, iou
from defectfill.drawn.small_base import SHAPES, WORDS
from defectfill.random_base import random_sd2_pipeline
from defectfill.sampling import ddim, inpaint
from defectfill.seam import RAMP_PIXELS
from defectfill_dataset import InputError, binarise, check_pairs, image_tensor, load_defect_pairs, upsample_mask
from defectfill_scripts import (
    ablate,
    compare_samplers,
    compare_selection,
    make_demo_data,
    make_tiny_base,
    train_segmenter,
)


TINY_BASE = ROOT / "scripts/tiny_base"
SD2_MILLIONS = {"unet": 865, "vae": 83, "text_encoder": 340}  # parameters of Stable Diffusion 2 inpainting


@pytest.mark.slow
def test_demo_data_is_a_dataset_with_exact_masks(tmp_path):
    """Drawn by several processes as by one."""
    make_demo_data.main(["--output_dir", str(tmp_path), "--size", "64", "--defects", "3", "--good", "2"])
    for part, (_, defects) in PARTS.items():
        data = load_defect_pairs(tmp_path, part)
        assert len(data["train"]) == len(defects) and len(data["test"]) == 2 * len(defects) and len(data["good"]) == 2
        check_pairs(data["train"]), check_pairs(data["test"])
        assert data["train"][0]["image"].size == (64, 64)
    write_parts(tmp_path / "alone", ["nut"], size=64, defects=3, good=2, seed=0)
    alone = {file.relative_to(tmp_path / "alone"): file.read_bytes() for file in tmp_path.rglob("alone/**/*.png")}
    assert len(alone) == 14 and all((tmp_path / name).read_bytes() == drawn for name, drawn in alone.items())


def test_masks_for_good_boards_lie_on_copper(tmp_path):
    sizes = "--size 64 --defects 1 --good 4 --parts board cloth --types open --good_masks open".split()
    make_demo_data.main(["--output_dir", str(tmp_path), *sizes])
    board = tmp_path / "board"
    folders = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    drawn = {f"board/{kind}" for kind in ("train/good", "test/open", "ground_truth/open", "good_masks/open")}
    assert folders == {*drawn, "cloth/train/good"}
    for file in (board / "train/good").iterdir():
        green = np.asarray(Image.open(file))[..., 1]
        inside = np.asarray(Image.open(board / "good_masks/open" / f"{file.stem}_mask.png")) > 0
        assert inside.any() and np.quantile(green[inside], 0.7) > 1.5 * np.quantile(green, 0.1)
    assert load_defect_pairs(tmp_path, "board")["good"].num_rows == 4


@pytest.mark.parametrize("flag", ["--types", "--good_masks"])
def test_a_type_that_no_chosen_part_has_is_refused(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        make_demo_data.main(["--output_dir", str(tmp_path), "--parts", "nut", "board", flag, "open", "stain"])
    assert f"{flag} stain: no type of nut, board; add plate or cloth to --parts" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_bumps_make_an_outline_ragged():
    def solidity(*roughness: float) -> float:
        shapes = [blob(np.random.default_rng(seed), 128, np.zeros(2), 0.4, *roughness) < 0 for seed in range(12)]
        return np.mean([shape.sum() / ConvexHull(np.argwhere(shape)).volume for shape in shapes])

    assert solidity(0.2, BUMPS) < solidity(0.2) < solidity(0.1)
    assert solidity(0.2, BUMPS) < solidity(0.1) - 0.05


@pytest.mark.parametrize("part, defect", [(p, d) for p, (_, ds) in PARTS.items() for d in ds])
def test_a_defect_changes_the_picture_inside_its_mask_alone(part, defect):
    make, defects = PARTS[part]
    for seed in range(3):
        good, bad = (make(np.random.default_rng(seed), 128) for _ in range(2))
        mask = defects[defect](np.random.default_rng(100 + seed), bad)
        assert mask.any() and mask.mean() < 0.2 and (mask & bad.part).sum() > 0.9 * mask.sum()
        change = np.abs(bad.colour - good.colour).sum(axis=-1) + np.abs(bad.height - good.height)
        assert change[mask].mean() > 20 * change[~mask].mean() + 1e-6


@pytest.mark.parametrize("defect", PARTS["board"][1])
def test_a_boards_defect_leaves_pads_alone_and_lies_deeper_in_its_mask_than_the_blending_reaches(defect):
    make, defects = PARTS["board"]
    for seed in range(6):
        good, bad = (make(np.random.default_rng(seed), 512) for _ in range(2))  # halved, 256 px
        mask = defects[defect](np.random.default_rng(seed), bad)
        copper = np.abs(bad.height - good.height) > 1
        assert ndimage.distance_transform_edt(mask)[copper].min() > 2 * RAMP_PIXELS
        assert np.array_equal(bad.colour[good.shine > 0.3], good.colour[good.shine > 0.3])


def test_a_short_joins_two_tracks():
    make, defects = PARTS["board"]
    for seed in range(6):
        board = make(np.random.default_rng(seed), 256)
        tracks, _ = ndimage.label(board.tracks > 0.5)
        mask = defects["short"](np.random.default_rng(seed), board)
        assert len(np.unique(tracks[mask & (tracks > 0)])) > 1


def test_pictures_are_a_function_of_their_seed():
    first, second = (render("nut", "hole", 48, (0, 3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    other = render("nut", "hole", 48, (0, 4))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])
    assert set(np.unique(np.asarray(first[1]))) == {0, 255} and binarise(first[1]).any()


@pytest.mark.slow
def test_a_random_base_is_made_from_the_command_line_and_needs_nothing_of_ours(tmp_path):
    command = [sys.executable, ROOT / "scripts/make_tiny_base.py", "--output_dir", "tiny", "--random_weights"]
    subprocess.run([*command, "--resolution", "64"], cwd=tmp_path, check=True, capture_output=True)
    code = """
import sys
from pathlib import Path
from diffusers import StableDiffusionInpaintPipeline
pipe = StableDiffusionInpaintPipeline.from_pretrained(sys.argv[1])
print(pipe.unet.config.in_channels, pipe.unet.config.sample_size * pipe.vae_scale_factor,
      pipe.tokenizer.tokenize("a photo of sks hazelnut"))
"""
    printed = in_clean_process(code, tmp_path / "tiny", cwd=tmp_path)
    assert printed.split(maxsplit=2)[:2] == ["9", "64"] and "'sks</w>', 'hazelnut</w>'" in printed


SMALL = (
    "--resolution 32 --pictures 20 --workers 1 --vae_steps 3 --crop_steps 2 --whole_steps 2 --decoder_steps 2".split()
)


@pytest.fixture(autouse=True)
def toy_sizes(monkeypatch):
    """A base of a few thousand weights, where nothing is started from the command line."""
    sizes = dict(vae_channels=(8, 8, 8), unet_channels=(16, 16, 16), head=8, text_width=16)
    monkeypatch.setattr(make_tiny_base, "Sizes", functools.partial(make_tiny_base.Sizes, **sizes))


def make_base(*argv) -> None:
    reset_accelerate()
    make_tiny_base.main(make_tiny_base.parse_args([str(a) for a in argv]))
    reset_accelerate()


def make_random_base(folder: Path) -> Path:
    make_base("--output_dir", folder, *SMALL, "--seed", 1, "--random_weights")
    return folder


@pytest.mark.slow
def test_a_base_is_trained_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    make_base("--output_dir", tmp_path / "whole", *SMALL)

    more = [*SMALL, "--vae_steps", 0, "--decoder_steps", 0, "--base", tmp_path / "whole"]
    make_base("--output_dir", tmp_path / "more", *more)  # goes on from the weights, not from random ones
    with pytest.raises(InputError, match="DF183"):
        make_base("--output_dir", tmp_path / "other", *more, "--prediction_type", "epsilon")
    random, whole, more = (
        load_file(tmp_path / run / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].float()
        for run in (make_random_base(tmp_path / "random"), "whole", "more")
    )
    assert 0 < (more - whole).norm() < 0.3 * (random - whole).norm()
    one, other = (load_file(tmp_path / run / "vae/diffusion_pytorch_model.safetensors") for run in ("whole", "more"))
    assert all(torch.equal(one[k], other[k]) for k in one.keys() | other.keys())  # no steps: the base's own
    for run in ("whole", "more"):
        StableDiffusionInpaintPipeline.from_pretrained(tmp_path / run)  # of classes that diffusers has
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        one, other = (json.loads((tmp_path / run / file).read_text()) for run in ("whole", "more"))
        assert one | {"scaling_factor": 1} == other | {"scaling_factor": 1}, file
    one, other = ((tmp_path / run / "tokenizer/tokenizer.json").read_text() for run in ("whole", "more"))
    assert one == other

    def killed_run():  # dies between the two stages of the UNet
        fit, calls = make_tiny_base.fit, []
        make_tiny_base.fit = lambda *args: (calls.append(1), fit(*args), len(calls) == 2 and os._exit(9))
        make_base("--output_dir", tmp_path / "killed", *SMALL)

    assert wait_for(fork(killed_run)) == 9
    monkeypatch.setattr(make_tiny_base, "make_scenes", None)  # pictures and latents are there already
    monkeypatch.setattr(make_tiny_base, "encode", None)
    make_base("--output_dir", tmp_path / "killed", *SMALL)
    with pytest.raises(InputError, match="DF320 vae_steps"):
        make_base("--output_dir", tmp_path / "killed", *SMALL, "--vae_steps", "4")
    for part in ("unet", "vae", "text_encoder"):
        (one,), (other,) = ((tmp_path / run / part).glob("*.safetensors") for run in ("whole", "killed"))
        one, other = load_file(one), load_file(other)
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == torch.float16 for k in one.keys() | other.keys())
    figures = json.loads((tmp_path / "whole/figures.json").read_text())
    assert figures["reconstruction_psnr"] > 0 and figures["inpainting_psnr"] > 0
    assert Image.open(tmp_path / "whole/samples.png").height == 4 * 32


def test_no_steps_of_the_autoencoder_need_one(capsys):
    with pytest.raises(SystemExit):
        make_tiny_base.parse_args(["--output_dir", "base", "--vae_steps", "0"])
    assert "give --base" in capsys.readouterr().err


def test_the_base_that_ships_is_small_whole_and_made_as_its_page_says():
    files = [file for file in TINY_BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png"}
    assert not any("_name_or_path" in file.read_text() for file in files if file.suffix == ".json")  # of a machine
    figures = json.loads((TINY_BASE / "figures.json").read_text())
    readme = (TINY_BASE / "README.md").read_text()
    command = readme.partition("make_tiny_base.py ")[2].partition("\n\n")[0].replace("\\\n", " ")
    options = vars(make_tiny_base.parse_args(command.split()))
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    assert figures["options"] == {k: v for k, v in options.items() if k not in make_tiny_base.WITHOUT_EFFECT}
    assert f"{figures['reconstruction_psnr']} dB" in readme and f"{figures['inpainting_psnr']} dB" in readme


def test_the_base_that_ships_fills_a_hole_with_the_parts_own_texture():
    """Without a LoRA a good part comes back about as it was, and better than grey."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(TINY_BASE, dtype=torch.float32)
    pipe.scheduler = ddim(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    image, _ = render("nut", None, 128, (5, 5))
    x, grid = image_tensor(image, 128), torch.zeros(1, 32, 32)
    grid[:, 13:18, 13:18] = 1
    [[painted]] = inpaint(pipe, x[None], grid[None], "A photo of a nut", [[0]], 10, guidance_scale=1.0) * 2 - 1
    inside = upsample_mask(grid, 4)[0] > 0.5
    assert (painted - x)[:, inside].square().mean() < 0.25 * x[:, inside].square().mean()


@pytest.mark.slow
def test_a_base_of_ones_own_images(tmp_path):
    for i in range(18):
        write_image(tmp_path / "images/steel_disc" / f"{i}.png", 40)
    make_base("--output_dir", tmp_path / "base", "--data_dir", tmp_path / "images", *SMALL)
    captions = json.loads((tmp_path / "base/work/scenes.json").read_text())["captions"]
    assert captions[0][0] == "A photo of a steel disc" and " steel disc with a " in captions[1][0]
    make_base("--output_dir", tmp_path / "crops", "--data_dir", tmp_path / "images", "--scenes_only", *SMALL,
              "--crop_size", "24", "--marks", "2", "--workers", "2")  # fmt: skip
    scenes = load_file(tmp_path / "crops/work/scenes.safetensors")
    assert scenes["pixels"].shape == (60, 32, 32, 3) and not (tmp_path / "crops/unet").exists()
    assert len({picture.tobytes() for picture in scenes["pixels"][::3].numpy()}) > 15
    with pytest.raises(InputError, match="give at least 17"):
        make_base("--output_dir", tmp_path / "other", "--data_dir", tmp_path / "nowhere", *SMALL)


def test_marks_are_named_and_inside_their_masks():
    rng, plain = np.random.default_rng(0), np.full((64, 64, 3), (150, 120, 100), dtype=np.uint8)
    words = set()
    for _ in range(80):
        marked, mask, name = make_tiny_base.draw_mark(rng, plain)
        assert not ((marked != plain).any(axis=-1) & ~mask).any()
        assert sum(shape in name.split() for shape in SHAPES) == 1
        words |= {*name.split()}
    assert words <= {*WORDS}
    assert {*SHAPES, "faint", "deep", "raised", "plain", "same", "rim", "red"} <= words


def test_marks_of_the_same_colour_are_of_the_pictures_own():
    rng, picture = np.random.default_rng(0), np.full((64, 64, 3), (30, 90, 60), dtype=np.uint8)
    picture[:, 32:] = 90, 200, 110
    marks = [make_tiny_base.draw_mark(rng, picture) for _ in range(120)]
    same = [(marked, mask) for marked, mask, words in marks if words.startswith("same") and "rim" not in words]
    assert len(same) > 15
    for marked, mask in same:
        off = np.abs(marked[mask].astype(float)[:, None] - picture[0, [0, -1]]).max(axis=-1)
        assert np.median(off.min(axis=1)) < 25  # one of the two, but for its soft edge
    changed = [np.abs(marked.astype(float) - picture).max() > 80 for marked, _ in same]
    assert any(changed) and not all(changed)


def test_a_grey_picture_gets_grey_marks():
    rng, grey = np.random.default_rng(0), np.full((64, 64, 3), 128, dtype=np.uint8)
    names = " ".join(make_tiny_base.draw_mark(rng, grey)[2] for _ in range(40)).split()
    assert not {*names} & {"red", "brown", "green", "blue"} and {*names} & {"black", "white"}


def test_drawn_pictures_show_each_part_whole_and_one_close_up():
    pictures = [make() for make in make_tiny_base.drawn_pictures(16, 32, seed=0)]
    parts = [*PARTS]
    assert [name for _, name in pictures] == parts + parts[:1] * 4 + parts + parts[1:2] * 4
    assert all(image.size == (32, 32) for image, _ in pictures)
    whole = np.asarray(render(parts[0], None, 64, (1_000_003, 4))[0])
    for image, _ in pictures[4:8]:
        assert any(
            np.array_equal(np.asarray(image), whole[top : top + 32, left : left + 32])
            for top in range(33)
            for left in range(33)
        )


def test_crops_of_the_autoencoder_show_the_marks():
    """A mark of one cell, at a place that two random quarter crops of three miss."""
    pixels, masks = np.zeros((40, 32, 32, 3), dtype=np.uint8), torch.zeros(40, 3, 1, 8, 8, dtype=torch.bool)
    pixels[:, 4:8, 24:28], masks[:, 0, 0, 1, 6] = 255, True
    scenes = make_tiny_base.Scenes(pixels, masks, [["A nut"]] * 40, group=2)
    torch.manual_seed(0)
    for _ in range(20):
        crops = make_tiny_base.crops_of(scenes, 4)
        assert crops.shape == (4, 3, 16, 16) and (crops.amax(dim=(1, 2, 3)) > 0.3).all()


def test_the_picture_loss_tells_brown_from_grey_as_well_as_dark_from_light():
    grey, loss = torch.zeros(1, 3, 8, 8), make_tiny_base.picture_loss
    brown, light = (grey + 0.3 * torch.tensor(tone).view(1, 3, 1, 1) for tone in ([1.0, 0, -1], [1.0, 1, 1]))
    assert loss(brown, grey) > 1.3 * loss(light, grey)


@pytest.mark.slow
def test_two_processes_train_a_base_together(tmp_path):
    argv = [*SMALL, "--base", TINY_BASE, "--crop_batch_size", 4, "--whole_batch_size", 4, "--decoder_steps", 0]
    launch(ROOT / "scripts/make_tiny_base.py", "--output_dir", tmp_path, *argv)
    vae = StableDiffusionInpaintPipeline.from_pretrained(tmp_path, dtype=torch.float32).vae
    kept = load_file(tmp_path / "work/latents.safetensors")
    scenes = make_tiny_base.load_scenes(tmp_path / "work/scenes.safetensors", None)
    alone = make_tiny_base.encode(vae, scenes, torch.device("cpu"))
    assert kept["clean"].shape == alone["clean"].shape == (40, 4, 8, 8) and kept["cut"].shape == alone["cut"].shape
    assert (kept["clean"] - alone["clean"]).abs().max() < 0.1 < kept["clean"].std()
    assert json.loads((tmp_path / "figures.json").read_text())["options"]["whole_batch_size"] == 4


def test_no_caption_of_the_base_holds_the_rare_word():
    """What `sks` looks like is the LoRA's to learn."""
    picture = lambda: (Image.new("RGB", (32, 32)), "nut")  # noqa: E731
    scenes = make_tiny_base.make_scenes([picture] * 2, 32, 8, marks=2, seed=0)
    assert not any("sks" in caption for captions in scenes.captions for caption in captions)
    assert (
        scenes.masks.shape == (6, make_tiny_base.MASKS, 1, 8, 8) and scenes.masks.any(dim=(3, 4)).float().mean() > 0.9
    )


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    reset_accelerate()
    train_segmenter.main(f"--output_dir {folder} --resolution 32 --pairs 1 --steps 2".split())
    reset_accelerate()
    return folder


@pytest.mark.slow
def test_a_segmenter_learns_and_is_measured_on_pictures_it_has_not_seen(segmenter):
    figures = json.loads((segmenter / "figures.json").read_text())["iou"]
    assert "nut hole" in figures and "cloth" in figures and all(0 <= x <= 1 for x in figures.values())
    images, masks = drawn_pairs([("cloth", "stain")], 3, 32, 0)
    reset_accelerate()
    torch.manual_seed(0)
    unet = train_segmenter.build_segmenter(32)
    loss = train_segmenter.Segmentation(unet)
    before, optimizer = loss(images, masks).item(), torch.optim.AdamW(unet.parameters(), 1e-2)
    for _ in range(15):
        loss(images, masks).backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss(images, masks).item() < 0.7 * before


def test_iou_of_masks():
    masks = torch.zeros(3, 1, 4, 4)
    masks[0, 0, :2] = masks[1, 0, :2] = 1
    found = torch.zeros(3, 1, 4, 4)
    found[0, 0, :, :2] = 1
    assert iou(found, masks).tolist() == pytest.approx([1 / 3, 0, 1])


@pytest.mark.slow
def test_features_see_the_defect_and_not_the_rest(segmenter):
    unet = ablate.UNet2DModel.from_pretrained(segmenter)
    images, masks = drawn_pairs([("nut", "hole")], 2, 32, 0)
    features = defect_features(unet, images, masks)
    assert features.shape[0] == 2 and torch.equal(features, defect_features(unet, images, masks))
    assert not torch.allclose(features, defect_features(unet, images, 1 - masks))


@pytest.mark.slow
def test_an_ablation_is_run_once_and_tabled(base, segmenter, tmp_path, monkeypatch):
    out, trained, handler = tmp_path / "my ablation", [], signal.getsignal(signal.SIGTERM)
    command = f"""--base {base} --segmenter {segmenter} --resolution 32 --steps 1 --images 2 --train_batch_size 1
        --num_inference_steps 2 --cases nut:hole --variants recipe --seeds 1""".split()
    main = ablate.train_defectfill.main
    monkeypatch.setattr(ablate.train_defectfill, "main", lambda args: (trained.append(args), main(args)))
    for more in ([], ["no L_attn"]):
        reset_accelerate()
        ablate.main(ablate.parse_args(["--output_dir", str(out), *command[:-2], *more, "--seeds", "1"]))
    lines = read_lines(out / "results.jsonl")
    assert [line["variant"] for line in lines] == [ablate.REAL, ablate.NO_LORA, "recipe", "no L_attn"]
    assert [args.lambda_attn for args in trained] == [0.05, 0]  # the first is not trained again
    table = (out / "table.md").read_text()
    assert "| no L_attn | 1 | 0." in table and f"| {ablate.REAL} | 1 |  |  | " in table
    assert "| segmenter IoU | nut hole |" in table
    assert all(line["x0_error"] > 0 for line in lines[2:])
    assert ["object_prompt_iou" in line for line in lines] == [False, False, True, False]
    assert Image.open(out / "samples.png").height == 4 * 64
    assert signal.getsignal(signal.SIGTERM) == handler  # a kill between two trainings is not just noted
    with pytest.raises(SystemExit, match="recipe-nut-hole-0: trained on crops; use a LoRA of .*'whole images'"):
        read_whole_image_lora(out / "runs/recipe-nut-hole-0")


@pytest.mark.slow
def test_an_ablation_inpaints_in_crops_as_a_lora_was_trained_and_nothing_else_changes(base, monkeypatch):
    args = argparse.Namespace(base=str(base), resolution=32, num_inference_steps=1, guidance_scale=1.0)
    good, mask = Image.new("RGB", (64, 64), "grey"), Image.new("L", (64, 64))
    mask.paste(255, (20, 24, 24, 28))
    seen = []
    inpaint = ablate.inpaint
    monkeypatch.setattr(ablate, "inpaint", lambda pipe, *given: (seen.append(given[1]), inpaint(pipe, *given))[1])
    [on_crop] = ablate.inpaint_parts(args, None, "A nut", [good], [mask], 0)
    monkeypatch.setattr(ablate, "CropRule", lambda: None)
    [on_whole] = ablate.inpaint_parts(args, None, "A nut", [good], [mask], 0)
    changed = [np.argwhere((np.asarray(picture) != np.asarray(good)).any(-1)) for picture in (on_crop, on_whole)]
    assert all(len(c) and (c >= (24, 20)).all() and (c < (28, 24)).all() for c in changed)
    crop, whole = (cells.sum().item() for cells in seen)
    assert crop > whole  # a crop shows the hole larger
    images, masks = ablate.halved([on_crop], [mask], 32)
    assert images.shape == (1, 3, 32, 32) and masks.sum() == 4 and masks[0, 0, 12:14, 10:12].all()


@pytest.mark.parametrize("variant", ablate.VARIANTS)
def test_training_takes_the_options_of_each_variant(variant, base, tmp_path):
    words = f"--pretrained_model_name_or_path {base} --train_data_dir {tmp_path} --output_dir {tmp_path}/out".split()
    ablate.train_defectfill.parse_args([*words, *ablate.VARIANTS[variant]])


def test_an_ablation_killed_while_it_draws_parts_draws_them_again(tmp_path, monkeypatch):
    draw = ablate.write_parts

    def killed(*args, **options):
        draw(*args, **options)
        raise KeyboardInterrupt

    command = f"--base x --segmenter y --output_dir {tmp_path}/out --resolution 32 --cases nut:hole".split()
    for write, error in ((killed, KeyboardInterrupt), (draw, ZeroDivisionError)):
        monkeypatch.setattr(ablate, "write_parts", write)
        monkeypatch.setattr(ablate, "run_all", lambda *args: 1 / 0)
        with pytest.raises(error):
            ablate.main(ablate.parse_args(command))
        assert (tmp_path / "out/data/nut").exists() == (write is draw)
    assert len([*tmp_path.glob("out/data/nut/test/hole/*.png")]) == 12


def test_an_ablation_of_a_case_that_is_not_drawn_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablate.parse_args("--base x --segmenter y --output_dir z --cases nut:hole screw:hole".split())
    assert "--cases: invalid choice: 'screw:hole'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablate.parse_args("--base x --segmenter y --output_dir z --seeds 0".split())
    assert "--seeds 0: must be at least 1" in capsys.readouterr().err


def test_held_out_crops_are_of_images_that_nothing_is_learnt_from(tmp_path, capsys):
    for i in range(make_tiny_base.HELD_OUT + 3):
        Image.new("RGB", (40, 40), (i, i, i)).save(tmp_path / f"{i:02d}.png")
    pictures = make_tiny_base.read_pictures(tmp_path, 60, 20, 0)
    shown = [np.asarray(make()[0])[0, 0, 0] for make in pictures]
    assert len(shown) == 60 and shown[: make_tiny_base.HELD_OUT] == [*range(make_tiny_base.HELD_OUT)]
    assert {*shown[make_tiny_base.HELD_OUT :]} == {16, 17, 18}
    with pytest.raises(SystemExit):
        make_tiny_base.parse_args("--output_dir x --pictures 16".split())
    assert "--pictures 16: must be above 16" in capsys.readouterr().err


@pytest.mark.slow
def test_selections_are_compared_by_labels(base, segmenter, tmp_path, capsys):
    words = f"""--base {base} --segmenter {segmenter} --output_dir {tmp_path}/a --resolution 32 --steps 1 --images 1
        --train_batch_size 1 --num_inference_steps 2 --cases nut:hole --seeds 1""".split()
    ablate.main(ablate.parse_args([*words, "--variants", "whole images"]))
    lora = tmp_path / "a/runs/whole-images-nut-hole-0"
    command = f"""--base {base} --segmenter {segmenter} --lora {lora} --resolution 32
        --likeness_net {make_squeezenet(tmp_path / "net.safetensors")}
        --output_dir {tmp_path}/s --images 2 --num_inference_steps 2""".split()
    compare_selection.main(compare_selection.parse_args(command))
    record = json.loads((tmp_path / "s/candidates.json").read_text())
    assert sorted(record["order"]) == list(range(8)) and "Label the sheets" in capsys.readouterr().out
    assert Image.open(tmp_path / "s/sheet-0.png").width == 8 * compare_selection.CELL
    kept = record["images"][0]["kept"]
    assert list(kept) == [
        "ssim+likeness, VAE encoder", "ssim", "likeness, VAE encoder",
        "ssim+likeness, SqueezeNet", "likeness, SqueezeNet",
    ]  # fmt: skip

    labels = ["0"] * 8
    labels[record["order"].index(kept["ssim"])] = "2"  # of the first image
    (tmp_path / "s/labels.txt").write_text("\n".join(labels[:-1]))
    with pytest.raises(SystemExit, match="write 8 lines"):
        compare_selection.main(compare_selection.parse_args(command))
    (tmp_path / "s/labels.txt").write_text("\n".join(labels))
    compare_selection.main(compare_selection.parse_args(command))
    rows = [line.split(" | ") for line in (tmp_path / "s/table.md").read_text().splitlines()]
    found = {row[0].strip("| "): row[1:6] for row in rows if len(row) == 7}
    assert found["ssim"] == ["1", "0", "1", "0.50", "1.00"] == found["the best label"]


@pytest.mark.slow
def test_samplers_are_compared_on_the_same_parts(base, segmenter, trained, tmp_path):
    command = f"""--base {base} --segmenter {segmenter} --lora {trained} --output {tmp_path}/table.md --images 2
        --resolution 32 --guidance_scale 3 --seed 1"""
    compare_samplers.main(compare_samplers.parse_args(command.split()))
    head, _, *lines, _, number = (tmp_path / "table.md").read_text().splitlines()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in lines)}
    assert "| nut |" in head and number == "2 images per variant." and list(rows) == list(compare_samplers.VARIANTS)
    assert [int(cells[0]) for cells in rows.values()] == [100, 40, 40, 40, 20, 30, 30, 20]
    changes = [float(cells[-1]) for cells in rows.values()]
    assert changes[0] == 0 and rows["DDIM, 50 steps"][3] == "" and all(0 < x < 1 for x in changes[1:])


def test_the_large_pipeline_has_stable_diffusions_sizes():
    pipe = random_sd2_pipeline(torch.device("meta"), torch.bfloat16)
    millions = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) // 10**6 for name in SD2_MILLIONS}
    assert millions == SD2_MILLIONS


# Odd folders


def test_an_ablation_does_not_go_on_with_other_options_or_on_half_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate.UNet2DModel, "from_pretrained", lambda path: None)
    monkeypatch.setattr(ablate, "write_parts", lambda folder, parts, **sizes: (folder / parts[0]).mkdir())
    monkeypatch.setattr(ablate, "table", lambda results: "| nothing |")
    monkeypatch.setattr(ablate, "samples", lambda args, results: Image.new("RGB", (1, 1)))
    args = ablate.parse_args(f"--base x --segmenter y --output_dir {tmp_path}/out --cases nut:hole".split())
    args.seeds = 0  # nothing to run
    ablate.main(args)
    line = json.dumps({"variant": "recipe", "seed": 0, "part": "nut", "defect": "hole"})
    (tmp_path / "out/results.jsonl").write_text(f"{line}\n{line[:20]}")
    ablate.main(args)
    assert (tmp_path / "out/results.jsonl").read_text() == f"{line}\n"
    with pytest.raises(InputError, match="DF320 steps"):
        ablate.main(argparse.Namespace(**vars(args) | {"steps": 7}))
    (tmp_path / "out/results.jsonl").write_text('{"seed": 1}\n')
    with pytest.raises(InputError, match="DF310 .*line 1"):
        ablate.main(args)


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_a_damaged_working_file_of_a_base_is_one_line(tmp_path, content):
    file = tmp_path / "latents.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="DF310 .*latents.safetensors"):
        make_tiny_base.read_kept(file)


def test_working_files_are_read_into_memory(tmp_path):
    """A mapped file would be read anew in every batch, and its tensors change with it."""
    save_file({"pixels": torch.arange(10_000)}, file := tmp_path / "scenes.safetensors")
    kept = make_tiny_base.read_kept(file)["pixels"]
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(kept, torch.arange(10_000))


def test_a_base_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    for i in range(make_tiny_base.HELD_OUT + 1):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(make_folder(tmp_path / "nut") / f"{i:04d}.png")
    argv = [*SMALL, "--data_dir", tmp_path / "nut", "--scenes_only"]
    monkeypatch.setattr(make_tiny_base, "load_scenes", lambda file, make: None)
    make_base("--output_dir", tmp_path / "out", *argv)
    make_base("--output_dir", tmp_path / "out", *argv)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "nut/0000.png")
    with pytest.raises(InputError, match="DF320 data_sha256"):
        make_base("--output_dir", tmp_path / "out", *argv)


def make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
