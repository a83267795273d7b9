"""--skip_problems: what cannot be used is left out, named and written down; what would be misread never is."""

import json
import logging

import numpy as np
import pytest
from drawn import write_image
from folders import make_coco, make_mvtec, make_yolo, write_json
from PIL import Image
from runs import check, read_lines

from defectfill_dataset import InputError, load_defect_pairs, split_names
from defectfill_scripts import prepare_data


def make_broken(root):
    """Six pairs: an empty mask, a mask missing, an image damaged, a mask without an image; three are whole."""
    make_mvtec(root, {"hole": 6})
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(root / "ground_truth/hole/000_mask.png")
    (root / "ground_truth/hole/002_mask.png").unlink()
    (root / "test/hole/004.png").write_bytes(b"no image")
    Image.fromarray(np.full((48, 48), 255, np.uint8)).save(root / "ground_truth/hole/099_mask.png")
    return root


BROKEN = [f"test/hole/00{i}.png" for i in (0, 2, 4)]


def test_without_the_flag_the_refusal_says_what_it_would_do(tmp_path, train, capsys):
    root = make_broken(tmp_path / "nut")
    with pytest.raises(InputError) as caught:
        train(data=root)
    *problems, hint = caught.value.problems
    assert sorted(problem.code for problem in problems) == ["DF103", "DF142", "DF143", "DF145"]
    assert str(hint) == "DF109 --skip_problems: leaves out these 3 images and uses the others"
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(root / "ground_truth/hole/001_mask.png")
    make_mvtec(tmp_path / "bolt", {"hole": 2})
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "bolt/ground_truth/hole/000_mask.png")
    with pytest.raises(InputError, match="DF109 --skip_problems: leaves out this image and uses the others$"):
        train(data=tmp_path / "bolt")
    assert check(root) == 2
    assert "With --skip_problems, these images are left out" in capsys.readouterr().out


def test_what_is_whole_trains_and_the_rest_is_written_down(tmp_path, train, caplog):
    root = make_broken(tmp_path / "nut")
    with caplog.at_level(logging.WARNING):
        output = train("--skip_problems", data=root)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("left out: ")]
    assert sorted(line.split()[2] for line in told) == ["DF103", "DF142", "DF143", "DF145"]
    split = json.loads((output / "split.json").read_text())
    assert split["skipped"] == BROKEN
    assert split["train"] + split["test"] == [f"test/hole/00{i}.png" for i in (1, 3, 5)]
    again = load_defect_pairs(root, split=str(output / "split.json"), skip_problems=True)
    assert split_names(again) == split
    make_mvtec(root, {"hole": 6})  # mended: what the file skips stays out
    (root / "ground_truth/hole/099_mask.png").unlink()
    assert split_names(load_defect_pairs(root, split=str(output / "split.json"))) == split


def test_check_and_prepare_leave_the_same_out(tmp_path, capsys):
    root = make_broken(tmp_path / "nut")
    assert check(root, "--skip_problems", "--output_dir", tmp_path / "report") == 0
    out = capsys.readouterr().out
    assert "Left out:\nDF1" in out and "1 references, 2 held out" in out
    (report,) = json.loads((tmp_path / "report/report.json").read_text())["objects"]
    assert len(report["skipped"]) == 4 and report["problems"] == []
    argv = [str(root), "--output_dir", str(tmp_path / "data"), "--format", "imagefolder"]
    with pytest.raises(InputError, match="DF145 nut: test/hole/000.png"):
        prepare_data.main(prepare_data.parse_args(argv))
    prepare_data.main(prepare_data.parse_args([*argv, "--skip_problems"]))
    assert capsys.readouterr().out.count("left out: ") == 4
    assert len(read_lines(tmp_path / "data/test/metadata.jsonl")) == 2


def test_an_image_whose_annotation_fails_is_left_out_and_not_good(tmp_path):
    root = make_coco(tmp_path / "nut")
    content = json.loads((root / "annotations/instances.json").read_text())
    content["annotations"][4]["segmentation"] = [[1, 2, 3]]  # one of two of that image
    write_json(root / "annotations/instances.json", content)
    data = load_defect_pairs(root, split="all", skip_problems=True)
    assert data.skipped == ["images/4.png"]
    assert "images/4.png" not in {*data["train"]["source_file"], *data["good"]["source_file"]}


@pytest.mark.parametrize("broken", ["json", "names", "missing"])
def test_what_more_than_one_image_hangs_on_is_never_skipped(tmp_path, broken):
    """Without a broken annotation file all its images would count as good."""
    root = (make_yolo if broken == "names" else make_coco)(tmp_path / "nut")
    if broken == "json":
        (root / "annotations/more.json").write_text('{"images": [], "annotations": [')
    elif broken == "names":
        (root / "data.yaml").write_text("names: {")
    else:
        (root / "images/0.png").rename(root / "images/renamed.png")
    with pytest.raises(InputError, match="DF166") as caught:
        load_defect_pairs(root, split="all", skip_problems=True)
    assert not any(problem.code == "DF109" for problem in caught.value.problems)


def test_good_images_that_cannot_be_read_are_left_out_too(tmp_path):
    root = make_mvtec(tmp_path / "nut")
    write_image(root / "train/good/tiny.png", 9)
    data = load_defect_pairs(root, skip_problems=True)
    assert data.skipped == ["train/good/tiny.png"] and len(data["good"]) == 3


def test_nothing_left_is_told(tmp_path):
    root = make_mvtec(tmp_path / "nut", {"hole": 1})
    (root / "test/hole/000.png").write_bytes(b"")
    with pytest.raises(InputError, match="DF163 .*: no defect images, only 3 good ones"):
        load_defect_pairs(root, skip_problems=True)
    assert check(root, "--skip_problems") == 2


def test_the_flags_of_a_folder_are_not_for_prepared_data(tmp_path, train):
    with pytest.raises(InputError, match="DF188 --skip_problems: belongs to --train_data_dir"):
        train("--dataset_name", "x", "--skip_problems")
