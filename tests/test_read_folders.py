"""Layouts that folders show: published datasets, other programs' output, and what unpacking and systems leave."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawn import square, write_image, write_mask
from folders import (
    MAKERS,
    folder_at,
    make_3d,
    make_anomalib,
    make_anomalydiffusion,
    make_dagm,
    make_ksdd,
    make_ksdd2,
    make_mvtec,
)
from readings import codes, good, masks_by_type, masks_of, notes, rows_of, told

from defectfill_dataset import check_pairs, find_objects, load_defect_pairs
from defectfill_dataset.readers import LAYOUTS, layout_of
from defectfill_dataset.readers.discovery import FOLDERS


# All of them


def test_every_folder_layout_has_an_example():
    assert FOLDERS.keys() <= MAKERS.keys() <= LAYOUTS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_no_layout_is_taken_for_another(tmp_path, name):
    root = MAKERS[name](tmp_path / "nut")
    assert layout_of(root) == name and list(find_objects(tmp_path)) == ["nut"]
    for layout in ("auto", name):
        data = load_defect_pairs(root, split="all", layout=layout)
        assert len(data["good"]) > 0
        check_pairs(data["train"])


# What unpacking, systems and people leave


@pytest.mark.parametrize("name", FOLDERS)
def test_objects_are_found_below_the_folders_that_archives_leave(tmp_path, name):
    plain = rows_of(MAKERS[name](tmp_path / "plain/nut"))
    root = MAKERS[name](tmp_path / "data/data/set/nut")
    assert find_objects(tmp_path / "data") == {"nut": root.resolve()} and rows_of(root) == plain


@pytest.mark.parametrize("name", FOLDERS)
def test_what_systems_leave_is_passed_over(tmp_path, name):
    root = MAKERS[name](tmp_path / "data/nut")
    plain, masks = rows_of(root), masks_by_type(root)
    shutil.copytree(root, tmp_path / "data/__MACOSX/nut"), shutil.copytree(root, root / "__MACOSX")
    for folder in [*(Path(place) for place, _, _ in os.walk(root) if "__MACOSX" not in place)]:
        for file in [f for f in folder.iterdir() if f.is_file()]:
            (folder / f"._{file.name}").write_bytes(b"\0\5\26\7")
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1"), (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
        folder_at(folder / ".ipynb_checkpoints"), folder_at(folder / "@eaDir/000.png")
    (tmp_path / "data/LICENSE-DATASET").write_text("x"), (tmp_path / "data/readme.txt").write_text("x")
    assert find_objects(tmp_path / "data") == {"nut": root.resolve()} and rows_of(root) == plain
    assert masks_by_type(root).keys() == masks.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_in_other_capitals(tmp_path, name):
    """Test/Hole, Ground_Truth/Hole, Train/Good."""
    root = MAKERS[name](tmp_path / "nut")
    plain = rows_of(root)
    for place, folders, _ in os.walk(root, topdown=False):
        for folder in folders:
            (Path(place) / folder).rename(Path(place) / folder.title())
    assert layout_of(root) == name
    assert [[str(part).casefold() for part in row] for row in rows_of(root)] == [
        [str(part).casefold() for part in row] for row in plain
    ]
    assert {row[1] for row in rows_of(root) if row[2] == "good"} == {"good"}


@pytest.mark.parametrize("name", FOLDERS)
def test_links_to_folders_are_followed(tmp_path, name):
    root = MAKERS[name](tmp_path / "data/nut")
    plain = rows_of(root)
    store = folder_at(tmp_path / "store")
    for folder in [f for f in root.iterdir() if f.is_dir()]:
        folder.rename(store / folder.name)
        folder.symlink_to(store / folder.name)
    (root / "itself").symlink_to("itself"), (root / "nowhere").symlink_to("gone")
    assert find_objects(tmp_path / "data") == {"nut": root.resolve()} and rows_of(root) == plain
    (tmp_path / "linked").mkdir(), (tmp_path / "linked/nut").symlink_to(root)
    assert list(find_objects(tmp_path / "linked")) == ["nut"]
    assert len(load_defect_pairs(tmp_path / "linked", split="all")["train"]) == sum(row[2] != "good" for row in plain)


def test_a_type_in_two_capitals_is_one(tmp_path):
    root = make_mvtec(tmp_path / "nut")
    (root / "ground_truth/hole").rename(root / "ground_truth/Hole")
    assert {row[1] for row in rows_of(root)} == {"hole", "good"} and not notes(root)
    (root / "ground_truth/Hole/000_mask.png").unlink()
    assert codes(told(root)) == ["DF142"]
    root = tmp_path / "own"
    write_image(root / "images/hole/1.png", mask=write_mask(root / "Masks/Hole/1.png"))
    write_image(root / "images/Good/2.png")
    assert rows_of(root) == [*good("images/Good/2.png"), ("images/hole/1.png", "hole", None)]


# anomalib


@pytest.mark.parametrize("masks", ["mask", "masks", "ground_truth"])
def test_anomalib(tmp_path, masks):
    root = make_anomalib(tmp_path / "hazelnut_toy", masks)
    assert rows_of(root) == [
        *[(f"{defect}/0{i}.jpg", defect, None) for defect in ("colour", "crack") for i in range(2)],
        *good("good/00.jpg"),
    ]
    assert len(masks_of(root)) == 4


def test_wrong_anomalib_is_told_at_once(tmp_path):
    root = make_anomalib(tmp_path / "hazelnut_toy")
    (root / "mask/colour/00.jpg").unlink(), (root / "crack/01.jpg").unlink()
    write_mask(root / "mask/pit/00.png"), write_mask(root / "mask/stray.png")
    write_image(root / "scratch/00.png")
    write_image(root / "crack/00.png")
    problems = told(root)
    assert codes(problems) == ["DF142", "DF142", "DF143", "DF143", "DF143", "DF144"]
    for name in ("colour/00.jpg", "mask/crack/01.jpg", "mask/pit/00.png", "mask/stray.png", "scratch/00.png"):
        assert any(name in line for line in problems), name


def test_anomalib_with_one_folder_of_defects(tmp_path):
    root = tmp_path / "nut"
    write_image(root / "abnormal/1.png", mask=write_mask(root / "mask/1.png")), write_image(root / "normal/0.png")
    write_image(root / "normal_test/9.png")
    assert rows_of(root) == [("abnormal/1.png", "abnormal", None), *good("normal/0.png", "normal_test/9.png")]
    (root / "mask/1.png").rename(folder_at(root / "mask/abnormal") / "1.png")
    assert rows_of(root)[0] == ("abnormal/1.png", "abnormal", None) and len(masks_of(root)) == 1
    write_mask(root / "mask/2.png")
    assert codes(told(root)) == ["DF143"]


@pytest.mark.parametrize("masks", ["mask", "mask/NG"])
def test_anomalib_with_types_in_a_folder_of_defects(tmp_path, masks):
    root = tmp_path / "nut"
    for defect in ("colour", "crack"):
        write_image(root / f"NG/{defect}/1.png", mask=write_mask(root / masks / defect / "1.png"))
    write_image(root / "OK/0.png")
    assert layout_of(root) == "anomalib"
    assert rows_of(root) == [
        ("NG/colour/1.png", "colour", None), ("NG/crack/1.png", "crack", None), *good("OK/0.png")
    ]  # fmt: skip
    write_mask(root / masks / "pit/1.png"), write_image(root / "NG/dent/1.png")
    assert codes(told(root)) == ["DF142", "DF143"]


def test_masks_beside_objects_and_splits_are_not_anomalib(tmp_path):
    make_mvtec(tmp_path / "parts/nut")
    write_mask(tmp_path / "parts/masks/nut/1.png")  # masks to generate with
    assert list(find_objects(tmp_path / "parts")) == ["nut"]
    for split in ("train", "val2017"):
        write_image(tmp_path / f"other/{split}/1.png", mask=write_mask(tmp_path / f"other/masks/{split}/1.png"))
        write_image(tmp_path / f"more/{split}/image/1.png", mask=write_mask(tmp_path / f"more/{split}/mask/1.png"))
    assert layout_of(tmp_path / "other") is None and layout_of(tmp_path / "more") is None


# Kolektor, MVTec 3D-AD, DAGM


def test_ksdd_is_one_object(tmp_path):
    root = make_ksdd(tmp_path / "KolektorSDD")
    assert find_objects(tmp_path) == {"KolektorSDD": root.resolve()}
    assert [row for row in rows_of(root) if row[1] != "good"] == [
        ("kos01/Part1.jpg", "defect", None), ("kos02/Part1.jpg", "defect", None)
    ]  # fmt: skip
    assert sum(row[1] == "good" for row in rows_of(root)) == 4
    for mask in masks_of(root).values():
        assert np.array_equal(mask, square(3, 3, 9, 9) | square(20, 20, 25, 25))
    (root / "kos01/Part0_label.bmp").unlink(), (root / "kos02/Part2.jpg").unlink()
    (root / "kos02/Part1_label.bmp").write_bytes(b"BM")
    assert codes(told(root)) == ["DF103", "DF142", "DF143"]


def test_the_copies_in_the_archive_of_ksdd2_are_left_out(tmp_path):
    root = make_ksdd2(tmp_path / "KSDD2")
    plain = rows_of(root)
    for stem in ("10001", "10001_GT"):
        shutil.copy(root / f"train/{stem}.png", root / f"train/{stem} (copy).png")
    assert rows_of(root) == plain and [note[:5] for note in notes(root)] == ["DF153", "DF153"]
    assert len(masks_of(root)) == 2
    write_image(root / "train/10001 (copy).png", colour=(0, 0, 0), seed=3)
    assert codes(told(root)) == ["DF142"]


def test_mvtec_3d_reads_colour_images(tmp_path):
    root = make_3d(tmp_path / "cookie")
    assert rows_of(root) == [
        ("test/combined/rgb/000.png", "combined", None),
        ("test/crack/rgb/000.png", "crack", None),
        *good("test/good/rgb/000.png"),
        ("test/hole/rgb/000.png", "hole", None),
        *good("train/good/rgb/000.png", "validation/good/rgb/000.png"),
    ]
    masks = masks_of(root)
    assert np.array_equal(masks["test/combined/rgb/000.png"], square(4, 4, 9, 12) | square(14, 4, 19, 12))
    (root / "test/hole/gt/000.png").rename(root / "test/hole/gt/001.png")
    shutil.rmtree(root / "test/crack/gt")
    assert codes(told(root)) == ["DF142", "DF142", "DF143"]


def test_dagm(tmp_path):
    for name in ("Class1", "Class2"):
        make_dagm(tmp_path / "DAGM" / name)
    root = tmp_path / "DAGM/Class1"
    assert list(find_objects(tmp_path)) == ["Class1", "Class2"]
    assert rows_of(root) == [
        *good("Test/0001.PNG"), ("Test/0002.PNG", "defect", "test"), *good("Test/0003.PNG", "Train/0575.PNG"),
        ("Train/0576.PNG", "defect", "train"), *good("Train/0577.PNG"),
    ]  # fmt: skip
    (root / "Train/Label/Labels.txt").unlink(), (root / "Test/Label/Labels.txt").unlink()
    assert len(rows_of(root)) == 6 and len(masks_of(root)) == 2


def test_dagm_whose_table_says_something_else(tmp_path):
    root = make_dagm(tmp_path / "Class1")
    table = root / "Train/Label/Labels.txt"
    text = table.read_text()
    table.write_text(text.replace("575\t0", "575\t1") + "578\t0\t0578.PNG\t0\t0\n")
    (root / "Test/Label/0002_label.PNG").rename(root / "Test/Label/0009_label.PNG")
    problems = told(root)
    assert codes(problems) == ["DF142", "DF142", "DF143", "DF166"] and any("0578" in p for p in problems)
    table.write_text(text.replace("576\t1", "576\t0"))
    shutil.rmtree(root / "Test")
    assert codes(told(root)) == ["DF167"]
    table.write_text(text + "577 yes\n")
    assert "line 5 is not" in told(root)[0]
    table.write_bytes(b"1\n575\t0\t\xff\xfa\n")
    assert codes(told(root)) == ["DF166"]


# AnomalyDiffusion


def test_anomalydiffusion(tmp_path):
    root = make_anomalydiffusion(tmp_path / "generated_dataset/hazelnut")
    make_anomalydiffusion(tmp_path / "generated_dataset/bottle")
    assert list(find_objects(tmp_path)) == ["bottle", "hazelnut"]
    pairs = [(f"{defect}/image/{i}.jpg", defect, None) for defect in ("crack", "hole") for i in range(2)]
    assert rows_of(root) == [*pairs[:2], *good("good/0.jpg"), *pairs[2:]]
    assert len(masks_of(root)) == 4
    (root / "crack/mask/0.jpg").rename(root / "crack/mask/7.jpg")
    shutil.rmtree(root / "hole/image")
    assert codes(told(root)) == ["DF142", "DF143", "DF143", "DF143"]
