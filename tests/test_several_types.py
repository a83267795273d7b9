"""Images with defects of several types: a row and a mask for each, one side of the split, crops apart."""

import collections
import json
import re
import shutil

import datasets
import numpy as np
import pytest
from drawn import write_image
from folders import make_mvtec
from PIL import Image
from runs import check, read_lines

from defectfill_dataset import (
    CropRule,
    InputError,
    TrainingSamples,
    binarise,
    build_prompts,
    check_pairs,
    crop_boxes,
    load_defect_pairs,
    other_types,
    select_defects,
    split_names,
)
from defectfill_dataset.crops import crop_mask
from defectfill_scripts import prepare_data


SIZE = 200


def make_boards(root, number: int = 6, near: bool = False):
    """COCO: each board has an open at the left and a short at the right, the third also a spur; `near`: close by."""
    images, annotations = [], []
    for i in range(number):
        write_image(root / f"images/{i:02}.png", SIZE)
        images.append({"id": i, "file_name": f"{i:02}.png", "width": SIZE, "height": SIZE})
        boxes = [(1, [20, 20 + i, 8, 8]), (2, [29 if near else 80, 20 + i, 6, 6])] + [(3, [90, 120, 7, 7])] * (i == 2)
        for kind, box in boxes:
            annotations.append({"id": len(annotations), "image_id": i, "category_id": kind, "bbox": box})
    write_image(root / "images/99.png", SIZE)
    images.append({"id": 99, "file_name": "99.png", "width": SIZE, "height": SIZE})
    names = [{"id": i, "name": name} for i, name in enumerate(("open", "short", "spur"), 1)]
    content = {"images": images, "annotations": annotations, "categories": names}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def test_a_row_for_each_type_with_its_mask_alone(tmp_path):
    data = load_defect_pairs(make_boards(tmp_path / "pcb"), split="all")
    rows = data["train"]
    check_pairs(rows)
    assert collections.Counter(rows["defect"]) == {"open": 6, "short": 6, "spur": 1} and len(data["good"]) == 1
    sums = {(row["source_file"], row["defect"]): binarise(row["mask"]).sum() for row in rows}
    assert sums["images/02.png", "open"] == 64 and sums["images/02.png", "short"] == 36
    assert sums["images/02.png", "spur"] == 49


def test_an_image_is_on_one_side_of_the_split_with_all_its_types(tmp_path):
    data = load_defect_pairs(make_boards(tmp_path / "pcb"))
    names = split_names(data)
    # The rarest type chooses first: 02 trains for its spur, and is one of the two that open and short need.
    assert names == {"train": ["images/00.png", "images/02.png"], "test": [f"images/0{i}.png" for i in (1, 3, 4, 5)]}
    assert not set(data["train"]["source_file"]) & set(data["test"]["source_file"])
    (tmp_path / "split.json").write_text(json.dumps({"train": names["test"], "test": names["train"]}))
    turned = load_defect_pairs(tmp_path / "pcb", split=str(tmp_path / "split.json"))
    assert split_names(turned)["train"] == names["test"]


def test_crops_leave_out_other_types_where_they_can(tmp_path):
    data = load_defect_pairs(make_boards(tmp_path / "pcb"), split="all")
    chosen = select_defects(data, ["open"])["train"]
    others = other_types(data["train"], chosen)
    assert collections.Counter(others["defect"]) == {"short": 6, "spur": 1}
    row = next(row for row in chosen if row["source_file"] == "images/02.png")
    mask = binarise(row["mask"])
    rest = sum(binarise(o["mask"]) for o in others if o["source_file"] == "images/02.png").astype(bool)
    (free,), (box,) = (crop_boxes(mask, 200, CropRule(15, 0.001), o) for o in (None, rest))
    assert crop_mask(rest, free).any() and not crop_mask(rest, box).any() and crop_mask(mask, box).sum() == mask.sum()
    assert box[2] - box[0] == box[3] - box[1] and 0 <= min(box) and max(box) <= SIZE
    assert crop_boxes(mask, 200, CropRule(15, 0.001), rest * False) == [free]
    near = load_defect_pairs(make_boards(tmp_path / "near", near=True), split="all")["train"]
    masks = [binarise(r["mask"]) for r in near if r["source_file"] == "images/00.png"]
    assert crop_mask(masks[1], crop_boxes(masks[0], 400, CropRule(3), masks[1])[0]).any()  # no room: the crop stays


@pytest.mark.parametrize("defects", [["open"], None])
def test_training_windows_show_one_type(tmp_path, defects):
    data = load_defect_pairs(make_boards(tmp_path / "pcb"), split="all")
    chosen = select_defects(data, defects)["train"]
    prompts = build_prompts(sorted(chosen.unique("defect")), "pcb")
    places = {prompt: i for i, prompt in enumerate(p for pair in prompts.values() for p in (pair.defect, pair.object))}
    tokens = type("Tokens", (), {"index": places})
    samples = TrainingSamples(
        chosen, prompts, tokens, 200, 8, 0, zoom=CropRule(15, 0.001),
        others=other_types(data["train"], chosen),
    )  # fmt: skip
    assert len(samples.crops) == len(chosen)
    marks = {(row["source_file"], row["defect"]): binarise(row["mask"]) for row in data["train"]}
    for crop in samples.crops:
        assert crop.mask.any()
        for (name, defect), mask in marks.items():
            assert name != crop.source_file or defect == crop.defect or not crop_mask(mask, crop.box).any()


def test_check_data_says_where_types_are_too_close(tmp_path, capsys):
    assert check(make_boards(tmp_path / "far"), "--resolution", 128) == 0
    assert "DF157" not in capsys.readouterr().out
    assert check(make_boards(tmp_path / "near", near=True), "--resolution", 128) == 0
    told = capsys.readouterr().out
    assert "DF157 images/00.png, images/01.png" in told and "6 of 13 crops also show defects of other types" in told
    assert re.search(r"\n  open +6 +6 ", told) and "2 references" in told


@pytest.mark.slow
def test_training_follows_changes_of_the_other_types(tmp_path, train):
    """Their masks decide the crops, so a run does not go on with others."""
    root = make_boards(tmp_path / "pcb")
    flags = ("--defect", "open", "--zoom", "on", "--split", "all", "--checkpointing_steps", "1")
    train(*flags, "--max_train_steps", "1", data=root)
    text = (root / "annotations.json").read_text()
    (root / "annotations.json").write_text(text.replace("[80, 20, 6, 6]", "[81, 20, 6, 6]"))
    with pytest.raises(InputError, match="other_types_sha256"):
        train(*flags, "--resume_from_checkpoint", "latest", data=root)
    (root / "annotations.json").write_text(text)
    train(*flags, "--resume_from_checkpoint", "latest", data=root)


def test_published_data_keeps_the_types_of_an_image_together(tmp_path):

    root = make_boards(tmp_path / "pcb")
    for kind in ("imagefolder", "parquet"):
        argv = [root, "--output_dir", tmp_path / kind, "--format", kind, "--split", "all"]
        prepare_data.main(prepare_data.parse_args([str(a) for a in argv]))
    assert len(list((tmp_path / "imagefolder/train/images").iterdir())) == 6
    lines = read_lines(tmp_path / "imagefolder/train/metadata.jsonl")
    assert len(lines) == 13 and len({line["file_name"] for line in lines}) == 6
    back = load_defect_pairs(tmp_path / "imagefolder", split="all")["train"]
    assert collections.Counter(back["defect"]) == {"open": 6, "short": 6, "spur": 1}
    published = datasets.load_dataset(str(tmp_path / "imagefolder"), split="train")
    assert collections.Counter(published["defect"]) == {"open": 6, "short": 6, "spur": 1}
    embedded = datasets.load_dataset(str(tmp_path / "parquet"), split="train")
    assert len(set(embedded["source_file"])) == 6 and len(embedded) == 13


def test_combined_of_mvtec_stays_one_type(tmp_path):
    """What a layout names combined is a type like any other: its masks do not say which part is what."""
    for i in range(2):
        write_image(tmp_path / f"nut/test/combined/{i}.png")
        mask = tmp_path / f"nut/ground_truth/combined/{i}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(np.full((5, 5), 255, np.uint8), 21)).resize((48, 48)).save(mask)
    assert set(load_defect_pairs(tmp_path / "nut", split="all")["train"]["defect"]) == {"combined"}


def test_combined_is_learnt_only_if_it_is_named(train, tmp_path, caplog):
    """The word names no appearance: MVTec AD puts there what has several types at once."""
    data, alone = make_mvtec(tmp_path / "nut", {"hole": 3, "stain": 3, "scratch": 3}), tmp_path / "bolt"
    for name in ("test", "ground_truth"):
        (data / name / "stain").rename(data / name / "combined")
        shutil.copytree(data / name / "combined", alone / name / "combined")
    record = json.loads((train(data=data) / "run_record.json").read_text())
    assert record["prompts"].keys() == {"hole", "scratch"}
    assert "combined is not learnt, because the word names no appearance; name it with --defect" in caplog.text
    named = train("--defect", "combined", data=data, output=tmp_path / "named")
    assert json.loads((named / "run_record.json").read_text())["prompts"].keys() == {"combined"}
    with pytest.raises(InputError, match="DF163 .*combined"):
        train(data=alone, output=tmp_path / "alone")
