"""scripts/check_data.py: every problem at once, what is suspicious, figures and pictures."""

import dataclasses
import json
import pickle
import re
import shutil

from offline import ROOT

import numpy as np
import pytest
from drawn import write_image
from folders import make_mvtec
from PIL import Image
from runs import check

from defectfill_dataset import InputError, Problem, sheets
from defectfill_dataset.checks import ImageReport, dataset_warnings
from defectfill_dataset.errors import folded


SHARED = ROOT.parent / "shared/data"


def test_a_good_dataset_is_reported_and_pictured(tmp_path, capsys):
    make_mvtec(tmp_path / "data/nut", {"hole": 4, "scratch": 3})
    make_mvtec(tmp_path / "data/bolt", {"stain": 2})
    assert check(tmp_path / "data", "--resolution", "64", "--output_dir", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    bolt, nut = report["objects"]
    assert (nut["references"], nut["held_out"], nut["problems"]) == (3, 4, []) and bolt["object"] == "bolt"
    hole = nut["defects"]["hole"]
    assert hole["images"] == 4 and hole["width"] == [48, 48, 48] and 0 < hole["area_percent"][0] < 10
    assert nut["defects"]["good"] == {"images": 3, "width": [48] * 3, "height": [48] * 3}
    sheet = np.asarray(Image.open(tmp_path / "report/nut.png"))
    assert (sheet == sheets.NEAR).all(axis=-1).sum() > 7 * 20  # an outline on each of the seven
    told = capsys.readouterr().out
    assert "nut: 3 references, 4 held out, 3 good\nNo problems.\n" in told
    assert re.search(r"\n  hole +4 +48 +48 +[\d.]+ / [\d.]+ / [\d.]+ +\d+ / ", told)
    assert f"report.json: {tmp_path}/report" in told
    assert check(tmp_path / "data", "--object", "nut") == 0
    assert "bolt" not in capsys.readouterr().out
    with pytest.raises(InputError, match="DF162 --object"):
        check(tmp_path / "data", "--object", "screw")


def test_every_problem_is_told_in_one_run(tmp_path, capsys):
    data = make_mvtec(tmp_path / "nut", {"hole": 7})
    masks = data / "ground_truth/hole"
    (masks / "000_mask.png").unlink()
    write_image(data / "test/hole/001.png", 40)
    Image.new("L", (48, 48)).save(masks / "002_mask.png")
    Image.new("L", (48, 48), 255).save(masks / "003_mask.png")
    (data / "test/hole/004.png").write_text("<html>")
    Image.new("L", (48, 48), 9).save(masks / "005_mask.png")
    Image.new("L", (48, 48), 255).save(masks / "stray.png")
    (data / "train/good/000.png").write_bytes(b"")
    assert check(data, "--resolution", "64", "--output_dir", tmp_path / "report") == 2
    told = capsys.readouterr().out
    for code, name in [
        ("DF142", "000.png"), ("DF140", "001.png"), ("DF145", "002.png"), ("DF146", "003.png"), ("DF103", "004.png"),
        ("DF103", "005.png"), ("DF143", "stray.png"), ("DF103", "train/good/000.png"),
    ]:  # fmt: skip
        assert any(line.startswith(code) and name in line for line in told.splitlines()), (code, name)
    assert "\nProblems that training would refuse:\nDF" in told and "No problems" not in told
    assert (tmp_path / "report/nut.png").exists()


def test_what_is_suspicious_is_told_and_does_not_stop(tmp_path, capsys):
    data = make_mvtec(tmp_path / "nut", {"hole": 4})
    for file in (data / "ground_truth/hole").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    shutil.copy(data / "test/hole/000.png", data / "test/hole/003.png")  # a reference, held out
    shutil.copy(data / "train/good/000.png", data / "train/good/001.png")
    assert check(data, "--resolution", "64") == 0
    told = capsys.readouterr().out
    assert "No problems.\nWarnings; training accepts the data as it is:\nDF1" in told and "DF150 all 4 masks" in told
    assert "DF154 test/hole/000.png, test/hole/003.png: the same image, held out and reference" in told
    assert "DF153 train/good/000.png, train/good/001.png" in told


def test_small_defects_are_named_with_what_is_left_of_them():
    image_reports = [
        ImageReport(f"{i}.png", "hole", (), str(i), (512, 512), 0.001, cells, mask=str(i))
        for i, cells in enumerate((1, 3, 4))
    ]
    (note,) = dataset_warnings(image_reports, set(), 512)
    assert str(note).startswith("DF151 0.png, 1.png: 2 of 3 defects cover fewer than 4 cells of the latent grid")
    problems = [Problem("DF100", "x", "is odd"), *(Problem("DF151", str(i), "is small") for i in range(25))]
    assert folded(problems)[-1] == "DF151 and 5 more like these"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real images beside the project")
def test_real_datasets_need_no_flag_but_the_path(capsys):
    assert check(SHARED / "mvtec_sample") == 0
    assert check(SHARED / "magnetic_tile") == 0
    assert re.search(r"\n  blowhole +115 ", capsys.readouterr().out)


def test_problems_are_values_and_become_text_once():
    empty = Problem("DF145", "a\n.png", "its mask is empty", "mark the area", "a.png")
    error = InputError(empty, dataclasses.replace(empty, image=None), Problem("DF163", "", "none"), advice="Stop.")
    assert str(error) == "DF145 a\\n.png: its mask is empty; mark the area\nDF163 none\nStop."
    assert len(error.problems) == 3 and error.problems[0].image == "a.png"
    sent = pickle.loads(pickle.dumps(error))  # between processes
    assert sent.problems == error.problems and str(sent) == str(error)
