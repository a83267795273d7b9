"""evaluate_defectfill.py: views, leaks, arms, and the command at toy size."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import COLOURS
from huggingface_hub import ModelCard
from networks import make_squeezenet
from PIL import Image
from runs import FULL, fork, wait_for, wait_until
from safetensors.numpy import load_file, save_file
from sklearn.metrics import average_precision_score
from toy_model import toy_pipeline

from defectfill.evaluation import detectors, training
from defectfill.evaluation.arms import Backgrounds, Pool, bank_pool, control_pools, cut_pieces, paste_views, pasted
from defectfill.evaluation.figures import part_figures
from defectfill.evaluation.report import Results, Run, read_run, write_misses, write_report
from defectfill.evaluation.views import (
    View,
    Viewing,
    bank_views,
    find_leaks,
    painted_rows,
    real_views,
    same_images,
    sample,
)
from defectfill.runs import signals
from defectfill_dataset import InputError, RunError, load_defect_pairs, random_mask
from defectfill_scripts import evaluate_defectfill as evaluate


def viewing(window=None, group=None, defects=("hole",), resolution=32) -> Viewing:
    return Viewing(resolution, window, re.compile(group) if group else None, defects)


def squares(*boxes, size=64) -> np.ndarray:
    """(size, size) uint8 with (left, top, side, label) squares."""
    labels = np.zeros((size, size), np.uint8)
    for left, top, side, label in boxes:
        labels[top : top + side, left : left + side] = label
    return labels


def noise(size=64, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def plain_view(value: int, labels: np.ndarray | None = None, side: int = 32) -> View:
    labels = np.zeros((side, side), np.uint8) if labels is None else labels
    return View("x", "x", (0, 0, side, side), np.full((side, side, 3), value, np.uint8), labels)


def put(root: Path, image: str, seed: int, mask: str | None = None, defect: str = "hole", size: int = 48) -> None:
    """A picture of noise of its own; with a blob of its own, if it has a mask."""
    rng = np.random.default_rng(seed)
    pixels = np.array((150, 90, 60)) + rng.integers(-15, 16, (size, size, 3))
    for file in (root / image, *([root / mask] if mask else [])):
        file.parent.mkdir(parents=True, exist_ok=True)
    if mask:
        inside = random_mask(rng, size, size)
        pixels[inside] = COLOURS[defect]
        Image.fromarray(inside).convert("L").save(root / mask)
    Image.fromarray(pixels.astype(np.uint8)).save(root / image)


def make_object(root: Path, defects=("hole",)) -> Path:
    """Nine pictures of each type and eight good ones, in MVTec AD's layout."""
    for i in range(9):
        for place, defect in enumerate(defects):
            name = f"{i:03d}"
            put(root, f"test/{defect}/{name}.png", 100 * place + i, f"ground_truth/{defect}/{name}_mask.png", defect)
    for i in range(8):
        put(root, f"train/good/{i:03d}.png", 1000 + i)
    return root


@pytest.fixture
def nut(tmp_path) -> Path:
    return make_object(tmp_path / "nut")


@pytest.fixture
def bank(tmp_path, nut) -> Path:
    """Images as if generated into the good ones that train, in the plain layout of images and masks."""
    folder, data = tmp_path / "bank", load_defect_pairs(nut)
    rows = real_views(data, viewing(), 1, 0).good_rows[0]
    for i in range(6):
        put(folder, f"images/hole/{i}.png", 2000 + i, f"masks/hole/{i}.png")
        inside = np.array(Image.open(folder / f"masks/hole/{i}.png")) > 0
        pixels = np.array(data["good"][rows[i % len(rows)]]["image"].convert("RGB"))
        pixels[inside] = (20, 20, 20)
        Image.fromarray(pixels).save(folder / f"images/hole/{i}.png")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Views


def test_each_defect_lies_whole_in_one_window_at_least_and_other_types_in_none():
    labels = squares((3, 3, 5, 1), (6, 50, 4, 1), (50, 50, 6, 2))
    others = squares((50, 3, 6, 1)) > 0
    found = [
        *viewing(window=24, resolution=24, defects=("hole", "stain")).defect_views("a", noise(), labels, others, 0)
    ]
    assert len(found) == 3 and sorted(int(view.labels.max()) for view in found) == [1, 1, 2]
    assert {int((view.labels > 0).sum()) for view in found} == {25, 16, 36}
    assert not any(others[view.box[1] : view.box[3], view.box[0] : view.box[2]].any() for view in found)
    for view in found:  # what is seen is what is there
        left, top, right, bottom = view.box
        assert np.array_equal(view.image, np.asarray(noise())[top:bottom, left:right])


def test_a_defect_too_near_another_type_is_in_no_window():
    labels, others = squares((20, 20, 5, 1)), squares((26, 20, 5, 1)) > 0
    assert [*viewing(window=32).defect_views("a", noise(), labels, others, 0)] == []
    assert [*viewing().defect_views("a", noise(), labels, others, 0)] == []
    assert len([*viewing().defect_views("a", noise(), labels, np.zeros_like(others), 0)]) == 1


def test_a_thin_defect_survives_the_smaller_view():
    labels = squares(size=64)
    labels[10, :] = 1
    (view,) = viewing(resolution=16).defect_views("a", noise(), labels, None, 0)
    assert view.mask[2].all() and view.mask.sum() == 16


def test_a_part_on_both_sides_is_refused_and_a_group_must_be_in_every_name(nut):
    data = load_defect_pairs(nut)
    with pytest.raises(InputError, match="DF351.*1 parts"):
        real_views(data, viewing(group="test"), 1, 0)
    with pytest.raises(InputError, match="DF350"):
        real_views(data, viewing(group="board-7"), 1, 0)


def test_good_images_go_with_their_part(nut):
    data, view = load_defect_pairs(nut), viewing()
    found = real_views(data, view, 2, 0)
    assert {v.group for v in found.train} & {v.group for v in found.test} == set()
    assert {v.group for v in found.train_good} & {v.group for v in found.test_good} == set()
    assert len(found.train_good) + len(found.test_good) == 8  # whole images: one view each
    by_number = viewing(group=r"(\d)\D*$")  # 000.png of hole and of good are one part
    found = real_views(data, by_number, 1, 0)
    assert {v.group for v in found.train + found.train_good} & {v.group for v in found.test + found.test_good} == set()


def test_good_images_that_were_painted_into_train(nut):
    data = load_defect_pairs(nut)
    before = real_views(data, viewing(), 1, 0).good_rows
    painted = {before[1][0], before[1][1]}
    train, test = real_views(data, viewing(), 1, 0, painted).good_rows
    assert painted <= {*train} and test and not painted & {*test}
    with pytest.raises(InputError, match="DF352 .*no good images of test parts; add some that no image was"):
        real_views(data, viewing(), 1, 0, range(8))
    bank = nut.parent / "bank"
    put(bank, "images/hole/0.png", 2000, "masks/hole/0.png")
    data["good"][before[1][0]]["image"].convert("RGB").save(bank / "images/hole/0.png")
    assert painted_rows(data["good"], [bank], ["hole"]) == {before[1][0]}


# ---------------------------------------------------------------------------------------------------------------------
# Leaks


def leaks(nut: Path, bank: Path) -> list[str]:
    data = load_defect_pairs(nut)
    return [
        leak.what for leak in find_leaks(data, viewing(), real_views(data, viewing(), 1, 0).good_rows[1], {"b": bank})
    ]


def test_test_images_and_test_masks_are_found_by_content(nut, bank):
    assert leaks(nut, bank) == []
    data = load_defect_pairs(nut)
    test_good = real_views(data, viewing(), 1, 0).good_rows[1][0]
    data["good"][test_good]["image"].convert("RGB").save(bank / "images/hole/0.png")
    assert leaks(nut, bank) == ["images of b were painted into test images"]
    mask = max((np.array(row["mask"].convert("L")) for row in data["test"]), key=np.sum)
    Image.fromarray(np.roll(mask, (2, 3), (0, 1))).save(bank / "masks/hole/1.png")
    assert leaks(nut, bank)[1:] == ["masks of b are test masks"]
    shutil.copy(nut / "test/hole/008.png", nut / "test/hole/000.png")  # a test image under a training name
    assert leaks(nut, bank)[0] == "training images are test images"


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def test_a_pool_draws_by_copies_and_moves_masks_with_their_images():
    labels = squares((2, 3, 6, 1), size=32)
    image = np.where(labels[..., None] > 0, 250, 10).astype(np.uint8).repeat(3, axis=2)
    view = View("a", "a", (0, 0, 32, 32), image, labels)
    for augmented in (False, True):
        pool = Pool([view, plain_view(100)], [3, 1], [augmented, False])
        images, found = pool.batch(400, 5)
        again, _ = pool.batch(400, 5)
        assert images.equal(again) and not images.equal(pool.batch(400, 6)[0])
        drawn = (found > 0).flatten(1).any(dim=1)
        assert 0.68 < drawn.float().mean() < 0.82
        inside = images[drawn].float().mean(dim=3)[found[drawn] > 0]
        assert (inside > 120).float().mean() > 0.9
    assert len({tuple(row.flatten().tolist()) for row in Pool([view]).batch(60, 0)[1]}) == 4  # mirrored both ways


def test_all_arms_but_the_first_see_as_many_defects_as_the_generated_one():
    good, references = [plain_view(0)] * 10, [plain_view(1, squares((2, 2, 4, 1), size=32))] * 2
    generated = [plain_view(2, squares((2, 2, 4, 1), size=32))] * 6
    pools = {name: make() for name, make in control_pools(references, good, generated, 6).items()}
    pools["generated"] = bank_pool(references, good, generated)
    share = {
        name: float(p.copies[(p.labels > 0).flatten(1).any(1)].sum() / p.copies.sum()) for name, p in pools.items()
    }
    assert share.pop("real") == pytest.approx(2 / 12)
    assert len(share) == 4 and all(value == pytest.approx(8 / 18) for value in share.values())
    half = bank_pool(references, good, generated, 0.5).copies
    assert half[:2].sum() == pytest.approx(4) and half[2:8].sum() == pytest.approx(4) and half[8:].sum() == 10


def test_copy_and_paste_puts_a_real_defect_of_the_type_in_the_same_place():
    red = np.full((32, 32, 3), 10, np.uint8)
    reference = squares((4, 4, 8, 2), size=32)
    red[reference > 0] = (200, 0, 0)
    pieces = cut_pieces([View("r", "r", (0, 0, 32, 32), red, reference)])
    place = squares((20, 18, 6, 2), size=32)
    image, labels = pasted(np.full((32, 32, 3), 90, np.uint8), place, pieces, 0)
    assert np.array_equal(labels, place) and (image[20:22, 22:24] == (200, 0, 0)).all()
    assert (image[:16] == 90).all()  # nothing elsewhere


def test_pasted_defects_lie_on_the_good_image_under_the_generated_one(nut, bank):
    data = load_defect_pairs(nut)
    view = viewing(resolution=48, group=r"(?:test|train)/(.*)")  # which the names of generated images lack
    views = real_views(data, view, 1, 0)
    backgrounds = Backgrounds(data["good"], views.good_rows[0], view)
    generated = bank_views(bank, view, 0)
    found = paste_views([(v, Image.fromarray(v.image)) for v in generated], views.train, backgrounds, 0)
    assert len(found) == 6
    for new, old in zip(found, generated):
        assert new.mask.any() and not np.array_equal(new.image[old.mask], old.image[old.mask])
        untouched = ~old.mask & ~new.mask
        untouched[1:-1, 1:-1] &= untouched[:-2, 1:-1] & untouched[2:, 1:-1]  # but a seam of a pixel
        assert (np.abs(new.image.astype(int) - old.image)[untouched].max(axis=-1) > 0).mean() < 0.02
    foreign = Image.effect_noise((48, 48), 90).convert("RGB")
    assert paste_views([(generated[0], foreign)], views.train, backgrounds, 0) == []


# ---------------------------------------------------------------------------------------------------------------------
# The command

FAST = "--resolution 32 --steps 2 --batch_size 2 --encoder tu-mobilenetv3_small_050".split()


def run(*argv) -> None:
    evaluate.main(evaluate.parse_args([str(a) for a in argv]))


def test_detect_is_kept_goes_on_and_refuses_other_options(nut, bank, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (lora := tmp_path / "lora").mkdir()
    (lora / "README.md").write_text("---\ntags: [lora]\n---\n# A LoRA\n")
    argv = ["detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", out, "--lora", lora]
    argv += ["--seeds", 2, *FAST]
    split = {"train": ["test/hole/000.png"], "test": []}
    (lora / "split.json").write_text(json.dumps(split | {"train": ["test/hole/008.png"]}))
    with pytest.raises(InputError, match="DF353 --lora .* was trained on test images"):
        run(*argv)
    (lora / "split.json").write_text(json.dumps(split))
    train, trained = training.train_and_test, []

    def killed(run: Run, *more) -> None:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(run)
        train(run, *more)

    monkeypatch.setattr(training, "train_and_test", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*argv)
    assert len(trained) == 5 and {r.seed for r in trained} == {0}  # every arm once, before the next seed
    assert {r.arm for r in trained} == {"real", "real repeated", "real augmented", "copy-paste", "ours"}
    monkeypatch.setattr(training, "train_and_test", lambda *a: (trained.append(a[0]), train(*a)))
    run(*argv)
    assert len(trained) == 10 == len({*trained})  # none twice
    assert "ours against real repeated, pixel AP: " in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())["settings"]["kall-nall"]
    assert len(record["figures"]["ours"]["pixel_ap"]) == 2 and len(record["comparisons"]) == 4 * 2
    assert {c["verdict"] for c in record["comparisons"]} <= {"gain", "no gain", "loss"}
    page = (out / "report.html").read_text()
    assert "<table>" in page and "Missed by ours" in page
    assert "| real repeated | 2 |" in (out / "report.md").read_text()
    run(*argv)  # writes the report and the card again
    results = {r.metric_type: r.metric_value for r in ModelCard.load(lora / "README.md").data.eval_results}
    ap, control = (np.mean(record["figures"][arm]["pixel_ap"]) for arm in ("ours", "real repeated"))
    assert len(results) == 4 and results["pixel_ap"] == pytest.approx(ap, abs=1e-4)
    assert results["pixel_ap_gain"] == pytest.approx(ap - control, abs=0.01)  # of quantised scores
    with pytest.raises(InputError, match="DF320 recipe"):
        run(*argv, "--learning_rate", 0.5)
    for flag, value in (("seed", 1), ("real_share", 0.5)):
        with pytest.raises(InputError, match=f"{flag}: the run was started with"):
            run(*argv, f"--{flag}", value)
    put(bank, "images/hole/0.png", 99, "masks/hole/0.png")
    with pytest.raises(InputError, match="DF320 data"):
        run(*argv)


def test_curves_classes_and_synthetic_alone(tmp_path, bank, nut):
    data = make_object(tmp_path / "two", ("hole", "stain"))
    for i in range(6):
        put(bank, f"images/stain/{i}.png", 3000 + i, f"masks/stain/{i}.png", "stain")
    argv = ["detect", "--data_dir", data, "--bank", f"ours={bank},{bank}", "--output_dir", tmp_path / "out", *FAST]
    argv += ["--window", 40, "--views_per_good", 2, "--real_share", 0.5]
    run(*argv, "--seeds", 1, "--references", 2, 3, "--numbers", 4, "--synthetic_alone")
    with pytest.raises(InputError, match="DF320 recipe"):
        run(*argv, "--seeds", 1, "--references", 2, 3, "--numbers", 4, "--mixed_precision", "bf16")
    settings = json.loads((tmp_path / "out/report.json").read_text())["settings"]
    assert [*settings] == ["k2-nall", "k3-nall", "k3-n4"]
    of_type = settings["k3-nall"]["types"]["stain"]
    assert {*settings["k3-nall"]["types"]} == {"hole", "stain"} and len(of_type["comparisons"]) == len(
        settings["k3-nall"]["comparisons"]
    )
    assert 0 < np.mean(of_type["figures"]["ours"]["missed"]) <= 1 and not of_type["figures"]["ours"]["accuracy"]
    assert "stain: figures on its 6 views" in (tmp_path / "out/report.html").read_text()
    figures = settings["k3-nall"]["figures"]
    assert len(figures["ours"]["macro_f1"]) == 2 == len(figures["ours, alone"]["pixel_ap"])  # two banks
    assert "Curves: pixel AP" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(InputError, match="DF352.*only 3 training images"):
        run(*argv, "--references", 4)
    with pytest.raises(InputError, match="DF352 --numbers 13: --bank .* has 12"):
        run(*argv, "--numbers", 13)
    evaluation = evaluate.prepare(evaluate.parse_args([str(a) for a in argv]))
    labels = [int(view.labels.max()) for view in evaluation.bank(bank, evaluate.Setting(None, 4))]
    assert sorted(labels) == [1, 1, 2, 2]  # of both types


def test_references_of_a_curve_are_images_that_detectors_see(nut, bank, tmp_path):
    """An image in which another type lies too near has no view."""
    argv = ["detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", *FAST]
    for seed in range(6):
        evaluation = evaluate.prepare(evaluate.parse_args([*map(str, argv), "--seed", str(seed)]))
        evaluation.views.train = [v for v in evaluation.views.train if v.source != "test/hole/001.png"]
        assert evaluation.reference_names(1) < evaluation.reference_names(2) == {
            "test/hole/000.png", "test/hole/002.png"
        }  # fmt: skip
        assert len(evaluation.reference_names(None)) == 3


def test_copy_and_paste_says_which_images_it_lacks(nut, bank, tmp_path):
    Image.fromarray(np.full((48, 48, 3), 7, np.uint8)).save(bank / "images/hole/0.png")
    detect(nut, bank, tmp_path / "out")
    assert "copy-paste has 5 of 6 views" in (tmp_path / "out/report.md").read_text()
    pools = {name: make() for name, make in control_pools([plain_view(1)], [], [plain_view(2)] * 5, 6).items()}
    assert pools["copy-paste"].copies.sum() == pytest.approx(7) == pools["real repeated"].copies.sum()


def test_the_figures_of_a_type_are_those_of_its_views_and_the_good_ones():
    rng = np.random.default_rng(0)
    labels = [squares((3, 3, 5, label), size=32) for label in (1, 2, 2)] + [
        squares((1, 1, 4, 1), (9, 9, 4, 2), size=32)
    ]
    tested = [plain_view(i, label) for i, label in enumerate([*labels, None, None])]
    maps, ours = rng.random((6, 32, 32)), Run("k", "ours", 0, 0)
    results = Results(tested, {ours: {}}, lambda run: maps)
    found = results.of_type(2)
    assert found.tested == [tested[i] for i in (1, 2, 4, 5)]
    only = maps[[1, 2, 4, 5]]
    ap = average_precision_score(found.masks.ravel(), only.ravel())
    assert found.figures[ours]["pixel_ap"] == pytest.approx(ap, rel=1e-9)
    assert found.values("ours", "missed") == [part_figures(only, found.masks)["missed"]]
    assert results.of_type(3) is None


def test_a_type_of_a_single_part_has_figures_and_no_verdicts(tmp_path):
    hole, stain = (squares((3, 3, 5, label), size=32) for label in (1, 2))
    groups = [("a", hole), ("b", hole), ("a", stain), ("a", None)]
    tested = [dataclasses.replace(plain_view(i, labels), group=group) for i, (group, labels) in enumerate(groups)]
    runs = [Run("kall-nall", arm, 0, 0) for arm in ("real repeated", "ours")]
    for run_of_arm in runs:
        file = tmp_path / f"detect/{run_of_arm.name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"maps": np.random.default_rng(0).random((4, 32, 32)).astype(np.float16)}, file)
        run_of_arm.file(tmp_path / "detect").write_text('{"threshold": 0.5, "pixel_ap": 0.5}')
    write_report(tmp_path, "x", runs, tested, [], ["hole", "stain"], resamples=20)
    types = json.loads((tmp_path / "report.json").read_text())["settings"]["kall-nall"]["types"]
    assert len(types["hole"]["comparisons"]) == 2 and types["stain"]["comparisons"] == []
    assert types["stain"]["figures"]["ours"]["pixel_ap"]


def test_a_missed_defect_of_several_views_has_one_line(tmp_path):
    """Two windows of an image show it, one of them cut; another image has a defect in the same place."""
    whole, cut = squares((10, 10, 6, 1), size=32), squares((0, 10, 3, 1), size=32)
    views = [("x", (0, 0, 32, 32), whole), ("x", (13, 0, 45, 32), cut), ("y", (0, 0, 32, 32), whole)]
    tested = [View(name, name, box, plain_view(0).image, labels) for name, box, labels in views]
    ours = Run("k", "ours", 0, 0)
    results = Results(tested, {ours: {"threshold": 1.0}}, lambda run: np.zeros((3, 32, 32)))
    assert write_misses(tmp_path / "misses.jsonl", results, "ours") == 2
    lines = [json.loads(line) for line in (tmp_path / "misses.jsonl").read_text().splitlines()]
    assert [(line["image"], line["box"]) for line in lines] == [(n, [10, 10, 16, 16]) for n in ("x", "y")]


def test_detectors_in_two_processes_are_those_of_one(nut, bank, tmp_path):
    for workers in (1, 2):
        detect(nut, bank, tmp_path / f"out{workers}", "--workers", workers)
    figures = [json.loads((tmp_path / f"out{n}/report.json").read_text()) for n in (1, 2)]
    assert figures[0] == figures[1]
    with pytest.raises(RunError, match="lower --learning_rate"):
        detect(nut, bank, tmp_path / "out", "--workers", 2, "--learning_rate", 1e30, "--steps", 5)


class Killing:
    """A pool that ends the process which receives it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_detector_whose_process_is_killed_is_told(tmp_path):
    recipe = detectors.Recipe(1, 1, 1e-3, "resnet18", "resnet18", False, "no", torch.device("cpu"))
    test_set = training.TestSet.of([plain_view(0)], 1)
    jobs = [(Run("k", "real", 0, seed), Killing) for seed in range(3)]
    with pytest.raises(RunError, match="DF386 --workers 2: .*was killed; run the same command again"):
        [*training.train_all(jobs, test_set, recipe, 0, tmp_path, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("ticks_before", [50, FULL(1200)])  # while they load PyTorch, and in their training
def test_detectors_in_processes_end_with_the_command(nut, bank, tmp_path, ticks_before):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "defectfill_scripts.evaluate_defectfill", "detect", "--data_dir", nut, "--bank",
               f"ours={bank}", "--output_dir", out, *FAST, "--steps", 100000, "--workers", 2]  # fmt: skip
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def is_running(folder: Path) -> bool:
        try:
            return b"spawn_main" in (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            return False

    def training_now() -> list[Path]:
        spawned = filter(is_running, (Path("/proc", number) for number in children.read_text().split()))
        ticks = lambda folder: int((folder / "stat").read_text().split()[13])  # of its own time
        return [folder for folder in spawned if ticks(folder) > ticks_before]

    wait_until(lambda: len(training_now()) == 2, 300)
    workers = training_now()
    process.kill(), process.wait()
    wait_until(lambda: not any(is_running(folder) for folder in workers), 300)  # those that load end when they have


def test_leaks_end_the_command_before_anything_is_trained(nut, bank, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_and_test", None)
    largest = max((np.array(Image.open(f)) for f in nut.glob("ground_truth/hole/00[3-8]_mask.png")), key=np.sum)
    Image.fromarray(largest).save(bank / "masks/hole/1.png")
    argv = ["detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(InputError, match="DF353 masks of .* are test masks"):
        run(*argv)
    with pytest.raises(TypeError):  # goes on to train
        run(*argv, "--protocol", "paper")


def test_detectors_of_bf16_have_fp32_weights_and_scores():
    pool = Pool([plain_view(0), plain_view(1, squares((2, 2, 4, 1), size=32))])
    fp32 = detectors.Recipe(2, 2, 1e-3, "resnet18", "resnet18", False, "no", torch.device("cpu"))
    bf16 = fp32._replace(mixed_precision="bf16")
    one, other = (detectors.train_segmenter(pool, recipe, 0) for recipe in (fp32, bf16))
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert not torch.equal(one.encoder.conv1.weight, other.encoder.conv1.weight)
    scores, rounded = (detectors.score_maps(one, pool.images.numpy(), recipe) for recipe in (fp32, bf16))
    assert rounded.dtype == np.float32 and not np.array_equal(scores, rounded)
    assert np.abs(scores - rounded).max() < 0.05 * np.abs(scores).max()


def test_pretrained_weights_that_cannot_be_had_are_told(caplog):
    recipe = detectors.Recipe(1, 2, 1e-3, "resnet18", "resnet18", True, "no", torch.device("cpu"))
    assert not detectors.can_load_pretrained(recipe) and "start from random weights" in caplog.text


def test_quality_names_the_network_and_knows_copies(nut, bank, tmp_path, capsys):
    net = make_squeezenet(tmp_path / "squeezenet.safetensors")
    copies = tmp_path / "copies"  # the references themselves
    for i in range(3):
        (copies / "images/hole").mkdir(parents=True, exist_ok=True)
        (copies / "masks/hole").mkdir(parents=True, exist_ok=True)
        shutil.copy(nut / f"test/hole/{i:03d}.png", copies / f"images/hole/{i}.png")
        shutil.copy(nut / f"ground_truth/hole/{i:03d}_mask.png", copies / f"masks/hole/{i}.png")
        shutil.copy(nut / f"test/hole/{i:03d}.png", copies / f"images/hole/{i}b.png")
        shutil.copy(nut / f"ground_truth/hole/{i:03d}_mask.png", copies / f"masks/hole/{i}b.png")
    run("quality", "--data_dir", nut, "--bank", f"ours={bank}", "--bank", f"copies={copies}", "--output_dir",
        tmp_path / "out", "--resolution", 32, "--feature_net", net, "--kid_subsets", 5)  # fmt: skip
    assert "SqueezeNet 1.0" in capsys.readouterr().out
    banks = json.loads((tmp_path / "out/quality.json").read_text())["banks"]
    memorized = "nearer to a reference than any held-out defect is"
    assert banks["kall-nall, copies, bank 0"][memorized] == 1 > banks["kall-nall, ours, bank 0"][memorized]
    assert banks["kall-nall, copies, bank 0"]["to the nearest reference"] < 1e-3
    assert Image.open(tmp_path / "out/quality-kall-nall-ours-0.png").height == 3 * 32


def test_the_quality_of_a_single_reference(nut, bank, tmp_path, capsys):
    net = make_squeezenet(tmp_path / "squeezenet.safetensors")
    run("quality", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", "--resolution", 32,
        "--feature_net", net, "--kid_subsets", 5, "--references", 1)  # fmt: skip
    [bank_figures] = json.loads((tmp_path / "out/quality.json").read_text())["banks"].values()
    assert bank_figures["references"] is None and "| none |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("workers", [FULL(1), 2])
def test_run_trains_generates_and_goes_on(tmp_path, monkeypatch, nut, workers):
    toy_pipeline().save_pretrained(tmp_path / "base")
    argv = ["run", "--data_dir", nut, "--output_dir", tmp_path / "out", *FAST, "--seeds", 1, "--banks", 1,
            "--num_images", 2, "--pretrained_model_name_or_path", tmp_path / "base",
            "--train_args", "--resolution 32 --max_train_steps 2 --validation_steps 0",
            "--generate_args", "--num_candidates 2 --num_inference_steps 2 --selection ssim",
            "--filter_args", "--min_change 0.01 --max_attempts 1", "--workers", workers]  # fmt: skip
    run(*argv)
    figures = json.loads((tmp_path / "out/report.json").read_text())["settings"]["kall-nall"]["figures"]
    assert {"defectfill", "selection off", "filters off", "copy-paste"} <= {*figures}
    split = json.loads((tmp_path / "out/work/kall/split.json").read_text())
    assert len(split["train"]) == 3 and len(split["test"]) == 6
    logs = {file.name for file in (tmp_path / "out/work/kall").glob("*.log")}
    assert logs == ({"defectfill-0.log", "selection-off-0.log", "filters-off-0.log"} if workers == 2 else set())
    monkeypatch.setattr(evaluate.subprocess, "run", None)  # nothing is made again
    run(*argv)


def test_names_in_a_report_are_text(tmp_path):
    from defectfill.evaluation.report import escaped, html_table
    from defectfill.markdown import markdown_table

    rows = [["arm"], ["<script>alert(1)</script>"], ["[a](http://b)"], ["+0.1 [-0.2, +0.3]: no gain"]]
    table = markdown_table(escaped(rows))
    assert "<script>" not in html_table(rows) + table
    assert "](http" not in table and "| +0.1 [-0.2, +0.3]: no gain |" in table


def test_plain_ground_does_not_make_two_binary_images_the_same():
    white, boards = np.full((64, 64, 3), 255, np.uint8), []
    for row in (5, 40):
        boards.append(white.copy())
        boards[-1][row : row + 2, 4:60] = 0  # 97 % of the pixels are white in both
    painted = boards[0].copy()
    painted[20:23, 20:23] = 0
    board, other, plain, painted = (
        [(name, sample(Image.fromarray(pixels)))]
        for name, pixels in (("board", boards[0]), ("other", boards[1]), ("plain", white), ("painted", painted))
    )
    assert same_images(other + plain, board) == [] and same_images(painted, board) == [("painted", "board")]


def test_a_picture_of_another_size_is_no_leak(nut, bank):
    put(bank, "images/hole/0.png", 99, "masks/hole/0.png", size=64)
    assert leaks(nut, bank) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--group", "(a"], "no regular expression"),
        (["--window", 0], "must be from 1 to"),
        (["--resolution", 40], "multiple of 16"),
        (["--real_share", 1.5], "from 0 to 1"),
        (["--bank", "ours"], "NAME=FOLDER"),
    ],
)
def test_wrong_flags_are_told(nut, bank, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run("detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--encoder", "--classifier"])
def test_unknown_networks_are_told_before_anything_is_trained(nut, bank, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(training, "train_and_test", None)
    argv = ["detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(InputError, match=f"DF355 {flag} resnet180.*no such"):
        run(*argv, flag, "resnet180")


def test_a_loss_that_is_not_finite_ends_the_run(nut, bank, tmp_path):
    argv = ["detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out", *FAST]
    with pytest.raises(RunError, match="lower --learning_rate"):
        run(*argv, "--learning_rate", 1e30, "--steps", 5)


def test_run_checks_all_networks_before_it_trains_a_lora_and_its_children_end_with_it(nut, tmp_path, monkeypatch):
    started = []

    def record(words, env):
        started.append((words, env))
        return subprocess.CompletedProcess(words, 1)

    monkeypatch.setattr(evaluate.subprocess, "run", record)
    argv = [
        "run",
        "--data_dir",
        nut,
        "--output_dir",
        tmp_path / "out",
        *FAST,
        "--pretrained_model_name_or_path",
        "base",
    ]
    for wrong, code in ((["--encoder", "resnet180"], "DF355"), (["--feature_net", tmp_path / "none"], "DF347")):
        with pytest.raises(InputError, match=code):
            run(*argv, *wrong)
    assert not started
    with pytest.raises(RunError, match="DF386 .*exit code 1; run the same command again"):
        run(*argv)
    [(words, environment)] = started
    assert words[1:3] == ["-m", "train_defectfill"] and environment[signals.LAUNCHED] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# Odd input, and results that are not what was written


def detect(nut: Path, bank: Path, out: Path, *more) -> None:
    run("detect", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", out, *FAST, "--seeds", 1, *more)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training, "train_and_test", None)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--bank", "../../x=y"], "letters, digits"),
        (["--bank", f"{'x' * 300}=y"], "letters, digits"),
        (["--bank", "a\x1b[31m\nb=y"], r"letters, digits"),
        *((["--bank", f"{name}=y"], "is that of another arm") for name in ("real", "copy-paste", "ours-alone")),
        (["--bank", "ours=y"], "two have one name"),
        *((["--learning_rate", x], "must be a finite number above 0") for x in ("nan", "inf", "0", "-1")),
        (["--group", "(" * 5000], "no regular expression"),
        (["--group", "a{99999999999999}"], "no regular expression"),
        *(([flag, "1000000000000"], "must be from 1 to") for flag in (
            "--window", "--resolution", "--views_per_good", "--references", "--numbers", "--seeds", "--steps",
            "--batch_size",
        )),
    ],
)  # fmt: skip
def test_names_and_numbers_are_bounded(nut, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        detect(nut, tmp_path / "bank", tmp_path / "out", *flags)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--train_args", "--generate_args", "--filter_args"])
def test_flags_in_quotes_that_cannot_be_split(nut, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        run("run", "--data_dir", nut, "--output_dir", tmp_path, "--pretrained_model_name_or_path", "x", flag, "a 'b")
    assert "cannot be split: No closing quotation" in capsys.readouterr().err


FOREIGN = ["report.md", "report.html", "misses-x.jsonl", "quality.json", "quality-x.png", "detect/x", "work/x.json"]


@pytest.mark.parametrize("name", FOREIGN)
def test_an_evaluation_keeps_out_of_a_folder_of_something_else(nut, bank, tmp_path, no_training, name):
    (file := tmp_path / "out" / name).parent.mkdir(parents=True)
    file.write_text("[1]")
    with pytest.raises(InputError, match=f"DF192 --output_dir .*{name}"):
        detect(nut, bank, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").rglob("*") if f.is_file()} == {".lock", file.name}
    assert file.read_text() == "[1]"


def test_an_output_folder_that_cannot_be_made(nut, bank, tmp_path, no_training):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="DF190 .*cannot be written"):
        detect(nut, bank, tmp_path / "file/out")


def test_what_a_kill_left_unfinished_is_removed(nut, bank, tmp_path, no_training):
    left = [tmp_path / "out" / place / ".tmp-defectfill-x.json" for place in (".", "detect", "work")]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{")
    with pytest.raises(TypeError):  # goes on to train
        detect(nut, bank, tmp_path / "out")
    assert not any(file.exists() for file in left)


HEADS = (b"{a: [", b"- a", b"model-index: 3")


@pytest.mark.parametrize("card", [None, b"", b"\xff\xfe\xfd", *(b"---\n%b\n---\n" % head for head in HEADS)])
def test_a_card_that_cannot_be_read_is_told_before_anything_is_trained(nut, bank, tmp_path, no_training, card):
    (lora := tmp_path / "lora").mkdir()
    if card is not None:
        (lora / "README.md").write_bytes(card)
    with pytest.raises((InputError, TypeError)) as caught:
        detect(nut, bank, tmp_path / "out", "--lora", lora)
    assert (card == b"") == (caught.type is TypeError)  # an empty card can take figures
    assert card == b"" or str(caught.value).startswith("DF385 ")


@pytest.mark.parametrize("where", ["data", "bank"])
@pytest.mark.parametrize("content", [b"", b"\x89PNG no more", b"%!PS-Adobe"])
def test_images_that_cannot_be_read_are_told_before_anything_is_trained(
    nut, bank, tmp_path, no_training, where, content
):
    file = nut / "test/hole/007.png" if where == "data" else bank / "images/hole/3.png"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"DF10. .*{file.name}"):
        detect(nut, bank, tmp_path / "out")


def test_a_mask_of_another_size_and_a_group_that_is_not_in_every_name(nut, bank, tmp_path, no_training):
    with pytest.raises(InputError, match="DF350 "):
        detect(nut, bank, tmp_path / "out", "--group", "hole/00(9)?")
    put(bank, "images/hole/0.png", 99, size=64)
    with pytest.raises(InputError, match="DF1.. .*hole/0.png"):
        detect(nut, bank, tmp_path / "out")


def test_a_single_test_part_is_told_before_anything_is_trained(nut, bank, tmp_path, no_training):
    names = [f"test/hole/00{i}.png" for i in range(9)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:4], "test": names[4:5], "skipped": names[5:]}))
    for number in (5, 6, 7):
        (nut / f"train/good/00{number}.png").unlink()
    with pytest.raises(InputError, match="DF352 --data_dir: has a single test part"):
        detect(nut, bank, tmp_path / "out", "--split", tmp_path / "split.json", "--group", r"00(\d)")


def test_data_without_good_images_is_told(nut, bank, tmp_path, no_training):
    shutil.rmtree(nut / "train")
    with pytest.raises(InputError, match="DF352 --data_dir: has no good images"):
        detect(nut, bank, tmp_path / "out")


def test_a_type_that_is_named_twice_is_one(nut, bank, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_and_test", lambda run, pool, test_set, *more: 1 / (test_set.types - 1))
    with pytest.raises(ZeroDivisionError):
        detect(nut, bank, tmp_path / "out", "--defect", "hole", "hole")


def test_too_few_images_for_a_figure_of_quality(nut, bank, tmp_path):
    for i in range(1, 6):
        (bank / f"images/hole/{i}.png").unlink(), (bank / f"masks/hole/{i}.png").unlink()
    net = make_squeezenet(tmp_path / "squeezenet.safetensors")
    with pytest.raises(InputError, match="DF352 --bank .*KID needs 2 images or more"):
        run("quality", "--data_dir", nut, "--bank", f"ours={bank}", "--output_dir", tmp_path / "out",
            "--resolution", 32, "--feature_net", net)  # fmt: skip


def test_damaged_results_are_named_and_made_again(nut, bank, tmp_path, caplog, monkeypatch):
    out, train, trained = tmp_path / "out", training.train_and_test, []
    monkeypatch.setattr(training, "train_and_test", lambda run, *more: (trained.append(run), train(run, *more)))
    detect(nut, bank, out)
    report, folder, run = (out / "report.json").read_bytes(), out / "detect", trained[0]
    figures, scores = run.file(folder), folder / f"{run.name}.safetensors"
    whole, written = scores.read_bytes(), json.loads(figures.read_text())
    tested = [plain_view(0)] * len(load_file(scores)["maps"])
    assert read_run(run, folder, tested) == written
    for content in (b"", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b"x" * len(whole)):
        scores.write_bytes(content)
        with pytest.raises(InputError, match="DF330 .*not what was written"):
            read_run(run, folder, tested)
    scores.write_bytes(whole)
    for content in ("", "[]", "{}", '{"threshold": NaN}', json.dumps(written | {"pixel_ap": 1.0})):
        figures.write_text(content)
        with pytest.raises(InputError, match="DF330 "):
            read_run(run, folder, tested)
    trained.clear(), scores.unlink(), detect(nut, bank, out)
    assert trained == [run] and caplog.text.count("DF330 ") == 1 and (out / "report.json").read_bytes() == report
    figures.write_text(json.dumps({k: v for k, v in written.items() if "sha256" not in k}))  # of an earlier version
    assert read_run(run, folder, tested)["pixel_ap"] == written["pixel_ap"]


def test_a_run_does_not_go_on_with_other_data_or_another_base(nut, tmp_path, monkeypatch, base):
    monkeypatch.setattr(evaluate, "start_all", lambda *args: 1 / 0)
    shutil.copytree(base, tmp_path / "base")
    argv = ["run", "--data_dir", nut, "--output_dir", tmp_path / "out", *FAST]
    argv += ["--pretrained_model_name_or_path", tmp_path / "base"]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run(*argv)
    config = tmp_path / "base/scheduler/scheduler_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(InputError, match="DF320 base_sha256: .*has other content"):
        run(*argv)
    with pytest.raises(InputError, match="DF320 group"):
        run(*argv, "--group", r"test/.*|good/.*")
    put(nut, "test/hole/000.png", 77, "ground_truth/hole/000_mask.png")
    with pytest.raises(InputError, match="DF320 train_sha256"):
        run(*argv)


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--train_args", "--seed 3", "DF188 --train_args: holds --seed, which is set here"),
        ("--train_args", "--push_to_hub", "all LoRAs would have one name"),
        ("--generate_args", "--lora=x", "DF188 --generate_args or --filter_args: holds --lora"),
        ("--train_args", "--no_such", None),
        ("--filter_args", "--no_such", None),
    ],
)
def test_flags_in_quotes_that_a_run_cannot_use_are_told_before_it_trains(
    nut, tmp_path, monkeypatch, capsys, flag, value, message
):
    monkeypatch.setattr(evaluate, "start_all", None)
    argv = ["run", "--data_dir", nut, "--output_dir", tmp_path / "out", *FAST]
    argv += ["--pretrained_model_name_or_path", "x", f"{flag}={value}"]
    with pytest.raises(InputError if message else SystemExit, match=message):
        run(*argv)
    assert message or "unrecognized arguments: --no_such" in capsys.readouterr().err


def test_a_run_goes_on_from_a_split_file_that_leaves_images_out(nut, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "start_all", lambda *args: 1 / 0)
    names = [f"test/hole/00{i}.png" for i in range(9)]
    split = {"train": names[:3], "test": names[3:7], "skipped": names[7:]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    argv = ["run", "--data_dir", nut, "--output_dir", tmp_path / "out", *FAST, "--split", tmp_path / "split.json"]
    argv += ["--pretrained_model_name_or_path", "x", "--references", 2]
    with pytest.raises(ZeroDivisionError):
        run(*argv)
    made = tmp_path / "out/work/k2/split.json"
    found = {k: {*v} for k, v in json.loads(made.read_text()).items()}
    assert found["test"] == {*names[3:7]} and len(found["train"]) == 2 and {*names[7:]} < found["skipped"]
    assert len(load_defect_pairs(nut, split=str(made))["train"]) == 2


def test_leaks_end_a_run_before_it_trains(nut, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "start_all", None)
    shutil.copy(nut / "test/hole/008.png", nut / "test/hole/000.png")
    with pytest.raises(InputError, match="DF353 training images are test images"):
        run("run", "--data_dir", nut, "--output_dir", tmp_path / "out", *FAST, "--pretrained_model_name_or_path", "x")


def test_a_signal_ends_an_evaluation_with_one_line(nut, bank, tmp_path):
    def start():
        training.train_and_test = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))
        detect(nut, bank, tmp_path / "out")

    assert wait_for(fork(start)) == 143


EVIL = "<script>alert(1)</script>\x1b[31m\n| a |"


def test_a_report_of_evil_names_is_inert(nut, bank, tmp_path):
    out = tmp_path / "out"
    detect(nut, bank, out)
    run_of = lambda arm: Run("kall-nall", arm, 0, 0)
    tested = [dataclasses.replace(plain_view(9), source=f"{EVIL}{i}", group=f"{EVIL}{i}") for i in range(4)]
    labels = squares((3, 3, 5, 1), size=32)
    tested = [dataclasses.replace(v, labels=labels if i < 2 else v.labels) for i, v in enumerate(tested)]
    for arm in ("real", "real repeated", "ours"):
        maps = np.random.default_rng(0).random((4, 32, 32)).astype(np.float16)
        save_file({"maps": maps}, out / f"detect/{run_of(arm).name}.safetensors")
        (out / f"detect/{run_of(arm).name}.json").write_text('{"threshold": 1e9, "pixel_ap": 0.5}')
    told = write_report(
        out, EVIL, [run_of(arm) for arm in ("real", "real repeated", "ours")], tested, [EVIL], resamples=20
    )
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script>" not in page + text and "\x1b" not in text and len(told) == 4
    assert [json.loads(line)["image"] for line in (out / "misses-kall-nall.jsonl").read_text().splitlines()]
