"""scripts/benchmark.py: every variant does the same work, and costs what it says."""

import contextlib
import csv
import functools
import json
import math
import statistics

import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from PIL import Image
from runs import FULL
from toy_model import toy_pipeline

from defectfill.drawn.pairs import drawn_pairs
from defectfill_dataset import InputError
from defectfill_scripts import benchmark


@pytest.fixture
def toy_pairs():
    images, _ = drawn_pairs([("nut", None)], 3, 32, 0)
    grids = torch.zeros(3, 1, 8, 8)
    grids[:, :, 2:6, 3:7] = 1
    return benchmark.Pairs(images, grids, [[1, 2], [3, 4], [5, 6]])


def quiet_pipeline():
    pipe = toy_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_ways_that_only_save_work_paint_the_same(toy_pairs):
    pipe = quiet_pipeline()
    _, *same, fast, half = benchmark.make_variants(6, 4, candidates=2, batch_size=4).values()
    alone, in_pairs, together = (benchmark.inpaint_pairs(pipe, toy_pairs, variant) for variant in same)
    assert alone.shape == (3, 2, 3, 32, 32)
    assert torch.allclose(alone, in_pairs, atol=2e-4) and torch.allclose(alone, together, atol=2e-4)
    one_by_one, at_once = (torch.tensor(benchmark.score(alone, toy_pairs, number)) for number in (1, 2))
    assert one_by_one.shape == (3, 2) and torch.allclose(one_by_one, at_once, atol=1e-6) and one_by_one.min() > 0
    assert not torch.allclose(alone, benchmark.inpaint_pairs(pipe, toy_pairs, half), atol=1e-2)
    assert (fast.scheduler, fast.steps, half.steps) == ("unipc", 4, 4)


@pytest.mark.slow
def test_the_stock_way_differs_in_the_sampled_latents_and_the_background_alone(toy_pairs, monkeypatch):
    pipe = quiet_pipeline()
    stock, once, *_ = benchmark.make_variants(6, 4, candidates=2, batch_size=4).values()
    whole = toy_pairs._replace(grids=torch.ones_like(toy_pairs.grids))  # no background to replace
    assert not torch.allclose(
        benchmark.inpaint_pairs(pipe, toy_pairs, stock), benchmark.inpaint_pairs(pipe, toy_pairs, once), atol=1e-2
    )
    monkeypatch.setattr(pipeline_stable_diffusion_inpaint, "retrieve_latents", lambda x, **_: x.latent_dist.mode())
    assert torch.allclose(
        benchmark.inpaint_pairs(pipe, whole, stock), benchmark.inpaint_pairs(pipe, whole, once), atol=2e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["base", "sd2_size"])
def test_generation_is_measured_in_every_way(base, tmp_path, monkeypatch, model):
    monkeypatch.setattr(benchmark, "random_sd2_pipeline", lambda device, dtype: toy_pipeline().to(device, dtype))
    command = f"""generate --images 2 --num_candidates 2 --batch_size 4 --rounds 2 --num_inference_steps 4
        --fast_steps 2 --resolution 32 --output_dir {tmp_path}"""
    which = ["--base", str(base)] if model == "base" else ["--sd2_size"]
    benchmark.main(benchmark.parse_args([*command.split(), *which]))
    _, _, *lines, _, note = (tmp_path / "generate.md").read_text().splitlines()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in lines)}
    assert list(rows) == list(benchmark.make_variants(4, 2, 2, 4)) and len(rows) == 6
    assert [int(cells[0]) for cells in rows.values()] == [8, 8, 8, 8, 4, 3]
    assert [*rows.values()][0][2] == "1.00 (1.00 to 1.00)" and all(float(cells[1]) > 0 for cells in rows.values())
    assert "2 images of 2 candidates, 32 px, 2 rounds" in note and note.count("%") == 2


@pytest.mark.slow
def test_loading_and_writing_are_measured_at_each_size(tmp_path):
    command = f"""data --image_sizes 64 256 --resolution 32 --samples 3 --workers 0 1 --images 2 --num_candidates 2
        --output_dir {tmp_path}"""
    benchmark.main(benchmark.parse_args(command.split()))
    head, _, *rows, _, note = (tmp_path / "data.md").read_text().splitlines()
    assert head.split("|")[2:-1] == [
        " samples per second, 0 workers ", " samples per second, 1 workers ", " image and mask, ms of CPU ",
        " scores, ms of CPU ", " files, ms of CPU ",
    ]  # fmt: skip
    cells = [[float(cell) for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [64, 256] and all(value > 0 for row in cells for value in row)
    lines = list(csv.DictReader((tmp_path / "data.csv").open()))
    files = [float(line["seconds"]) for line in lines if line["variant"] == "files"]
    assert [row[-1] for row in cells] == pytest.approx([1000 * seconds for seconds in files], abs=0.51)
    assert Image.open(tmp_path / "data.png").size == (960, 600) and "2 images of 2 candidates" in note


@pytest.mark.slow
def test_growth_is_measured_in_every_direction(base, tmp_path):
    command = f"""growth --base {base} --resolution 32 --rounds 2 --numbers 1 6 --num_inference_steps 2
        --mixed_precision no --output_dir {tmp_path}"""
    benchmark.main(benchmark.parse_args(command.split()))
    lines = list(csv.DictReader((tmp_path / "growth.csv").open()))
    found = {(line["variant"], int(line["number"])) for line in lines}
    by_number = ("training step, by batch", "image, by candidates", "start of training, by references")
    assert found == {
        *((f"{what}, by resolution", size) for what in ("training step", "image") for size in (32, 64, 96)),
        *((kind, number) for kind in (*by_number, "generation, by images") for number in (1, 6)),
    }
    rows = [row.split("|")[1:-1] for row in (tmp_path / "growth.md").read_text().splitlines()[2:-2]]
    powers = {row[0].strip(): float(row[2]) for row in rows}
    assert len(lines) == 2 * len(found) and len(powers) == 6
    steps = [line for line in lines if line["variant"] == "training step, by batch"]
    one, six = (
        statistics.median(float(line["seconds"]) for line in steps if line["number"] == number) for number in "16"
    )
    assert powers["training step, by batch"] == pytest.approx(math.log(six / one, 6), abs=0.006)


def test_a_batch_smaller_than_a_pictures_candidates_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args("generate --base x --output_dir y --num_candidates 8 --batch_size 4".split())
    assert "--batch_size 4: must be at least --num_candidates 8" in capsys.readouterr().err


@pytest.fixture
def training_bench(base):
    command = f"train --base {base} --output_dir x --resolution 32 --train_batch_size 2 --mixed_precision no"
    return benchmark.make_training_bench(benchmark.parse_args(command.split()), torch.device("cpu"))


def test_every_way_to_do_a_step_has_its_losses(training_bench):
    """The first two as well: they cost more, and learn the same. Without the map, L_attn is another."""
    found = {}
    for name, step in benchmark.STEPS.items():
        training_bench.optimizer.param_groups[0]["lr"] = 0
        training_bench.arrange(step)
        found[name] = training_bench.run(step).item()
    without = found.pop("no attention map")
    assert len(found) == 8 and without != pytest.approx(found["ours"], rel=1e-3)
    assert list(found.values()) == pytest.approx([found["ours"]] * 8, rel=1e-5)


def test_steps_cost_what_they_say(training_bench):
    """Calls of VAE, UNet and text encoder in a step, and its arithmetic against the public code's."""
    models, calls = training_bench.models, []
    for model in ("unet", "text_encoder"):
        getattr(models, model).register_forward_pre_hook(
            lambda _, args, kwargs, model=model: calls.append((model, len((args or [*kwargs.values()])[0]))),
            with_kwargs=True,
        )
    encode = models.vae._encode
    models.vae._encode = lambda x: (calls.append(("vae", len(x))), encode(x))[1]

    def counted(name):
        calls.clear()
        training_bench.arrange(benchmark.STEPS[name])
        with benchmark.FlopCounterMode(display=False) as counter:
            training_bench.run(benchmark.STEPS[name])
        totals = {
            model: sum(rows for found, rows in calls if found == model) for model in ("vae", "unet", "text_encoder")
        }
        return len([c for c in calls if c[0] == "unet"]), totals, counter.get_total_flops()

    public = counted("cost of the public code")
    assert public[:2] == (4, {"vae": 8, "unet": 8, "text_encoder": 4})
    assert counted("the paper to the letter")[:2] == (2, {"vae": 6, "unet": 4, "text_encoder": 4})
    calls_, rows, flops = counted("ours, latents not cached")
    assert (calls_, rows) == (1, {"vae": 6, "unet": 4, "text_encoder": 2}) and flops < 0.8 * public[2]
    calls_, rows, cached = counted("ours")
    assert (calls_, rows) == (1, {"vae": 0, "unet": 4, "text_encoder": 2}) and cached < 0.6 * public[2]
    assert cached - counted("no attention map")[2] < 0.05 * cached


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [FULL(False), True])
def test_steps_are_measured(base, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(benchmark, "compile_unet", functools.partial(benchmark.compile_unet, backend="aot_eager"))
    command = f"""train --base {base} --output_dir {tmp_path} --resolution 32 --train_batch_size 1 --rounds 2
        --mixed_precision no"""
    benchmark.main(benchmark.parse_args([*command.split(), *["--torch_compile"] * compiled]))
    _, _, *lines, _, note = (tmp_path / "train.md").read_text().splitlines()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in lines)}
    assert list(rows) == [*benchmark.STEPS, *["compiled blocks"] * compiled] and "Batch 1, 32 px, no, 2 rounds" in note
    assert ("first compiled step" in note) == compiled and Image.open(tmp_path / "train.png").width > 500
    cost = {name: float(cells[0]) for name, cells in rows.items()}
    assert cost["ours"] < cost["ours, latents not cached"] == cost["the paper to the letter"]
    with (tmp_path / "train.csv").open() as file:
        assert len([*csv.DictReader(file)]) == 2 * len(rows)
    assert json.loads((tmp_path / "environment.json").read_text())["mixed_precision"] == "no"


@pytest.mark.slow
def test_arithmetic_at_the_size_of_stable_diffusion_2(monkeypatch):
    """On the meta device, which computes shapes alone: against the public code's step, 0.38 with cached latents."""
    pairs = torch.zeros(1, 3, 512, 512), torch.ones(1, 1, 512, 512)
    monkeypatch.setattr(benchmark, "drawn_pairs", lambda *_, **__: pairs)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
    command = "train --sd2_size --output_dir x --resolution 512 --train_batch_size 1 --mixed_precision no"
    bench = benchmark.make_training_bench(benchmark.parse_args(command.split()), torch.device("meta"))

    def counted(name):
        with benchmark.FlopCounterMode(display=False) as counter:
            bench.run(benchmark.STEPS[name])
        return counter.get_total_flops()

    public = counted("cost of the public code")
    assert counted("ours") < 0.38 * public and counted("ours, latents not cached") < 0.73 * public


@pytest.mark.parametrize("name", ["environment.json", "train.md", "train.csv", "train.png"])
def test_files_of_something_else_stay(tmp_path, monkeypatch, name):
    monkeypatch.setattr(benchmark, "bench_training", None)  # not reached
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"DF192 .*{name}"):
        benchmark.main(benchmark.parse_args(["train", "--base", "x", "--output_dir", str(tmp_path)]))
    assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(InputError, match="DF190 "):
        benchmark.main(benchmark.parse_args(["train", "--base", "x", "--output_dir", str(tmp_path / name / "x")]))
