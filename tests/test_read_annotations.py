"""Annotation files of CVAT and Datumaro, right and wrong; and folders that are of no layout."""

import json

import numpy as np
import pytest
from annotated import (
    BOTTOM,
    BOX,
    CVAT,
    EXAMPLES_ANNOTATIONS,
    LEFT,
    RIGHT,
    SIZE,
    TOP,
    datum,
    is_oval,
    make_cvat,
    make_datumaro,
    make_voc_masks,
    marks,
    turned_box,
    write_cvat,
    write_text,
)
from drawn import square, write_image
from folders import write_json
from readings import codes, masks_of, table, told

from defectfill_dataset import InputError, find_objects
from defectfill_dataset.readers import layout_of, read_object


# CVAT


def test_cvat(tmp_path):
    root = make_cvat(tmp_path / "nut")
    rows = table(root)
    assert {name for name in CVAT if rows[f"images/{name}"][0] == "good"} == {"clean.png", "fine.png"}
    mask = {name: marks(root, f"images/{name}") for name in CVAT if rows[f"images/{name}"][0] != "good"}
    assert np.array_equal(mask["outline.png"]["hole"], square(12, 10, 30, 20))
    assert np.array_equal(mask["box.png"]["scratch"], square(TOP, LEFT, BOTTOM, RIGHT))
    assert np.array_equal(mask["turned.png"]["scratch"], turned_box(30))
    assert np.array_equal(mask["over.png"]["scratch"], turned_box(-30))
    assert is_oval(mask["oval.png"]["pit"], 24, 20, 16, 6, 30)
    assert np.argwhere(mask["mask.png"]["hole"]).tolist() == [[40, 4], [40, 5], [41, 5]]
    assert mask["two.png"].keys() == {"scratch", "hole"}


@pytest.mark.parametrize("images", [".", "images", "images/train", "elsewhere"])
def test_cvat_finds_images(tmp_path, images):
    root = make_cvat(tmp_path / "nut", images)
    write_cvat(root, CVAT, subset="train")
    assert len(masks_of(root)) == 8  # of seven images, one of two types
    assert {split for defect, split in table(root).values() if defect != "good"} == {"train"}
    for name in CVAT:
        write_image(root / "images/val" / name)
    found = codes(tuple(map(str, read_object(root, "nut").problems)))
    assert found == ([] if images == "images/train" else ["DF144"] * len(CVAT))  # `subset` tells them apart


def test_cvat_of_a_project_with_subsets(tmp_path):
    root = tmp_path / "nut"
    for subset in ("train", "val"):
        write_image(root / f"images/{subset}/a.png"), write_image(root / f"images/{subset}/b/c.png")
    entries = "".join(
        f'<image id="0" name="{name}" subset="{subset}" width="48" height="48">{BOX}/></image>'
        for subset in ("train", "val") for name in ("a.png", "b/c.png")
    )  # fmt: skip
    write_text(root / "annotations.xml", f"<annotations>{entries}</annotations>")
    write_image(root / "good/x.png"), write_image(root / "images/train/new.png")
    rows = table(root)
    assert rows.pop("good/x.png") == ("good", "good")
    assert rows == {
        f"images/{subset}/{name}": ("scratch", {"train": "train", "val": "test"}[subset])
        for subset in ("train", "val") for name in ("a.png", "b/c.png")
    }  # fmt: skip
    (told_,) = read_object(root, "nut").notes
    assert str(told_).startswith(
        f"DF158 {root}: not read: 1 images that no annotation file names, 'images/train/new.png'"
    )


@pytest.mark.parametrize(
    "shape, words",
    [
        ('<polyline label="crack" points="1,1;5,5"/>', "shape 1 (polyline 'crack'): marks no area"),
        ('<points label="crack" points="1,1"/>', "shape 1 (points 'crack'): marks no area"),
        ('<cuboid label="x" xtl1="1"/>', "cuboid"),
        ('<skeleton label="x"><points label="1" points="1,1"/></skeleton>', "skeleton"),
        ('<tag label="scratched"/>', "is tagged 'scratched' as a whole, which marks no area; draw the defect"),
        ('<polygon label="x" points="1,1;5,5"/>', "2 corners"),
        ('<polygon label="x" points="1,1;5,5;60,5"/>', "the point (60, 5) is not in the image of 48x48"),
        ('<polygon label="x" points="1,1;5,5;6"/>', "a corner is not (x, y)"),
        ('<polygon label="x"/>', "has no 'points'"),
        ('<box label="x" xtl="5" ytl="5" xbr="5" ybr="9"/>', "0 wide and 4 high"),
        ('<box label="x" xtl="five" ytl="5" xbr="5" ybr="9"/>', "'five' is not a number"),
        ('<box label="x" xtl="60" ytl="5" xbr="70" ybr="9" rotation="20"/>', "(65, 7) is not in the image"),
        ('<ellipse label="x" cx="5" cy="5" rx="0" ry="3"/>', "the radii 0 and 3"),
        ('<ellipse label="x" cx="5" cy="5" rx="900" ry="3"/>', "the point (905, 5) is far from the image of 48x48"),
        ('<mask label="x" rle="1, 2" left="3" top="4" width="3" height="2"/>', "does not fill 3x2 pixels"),
        ('<mask label="x" rle="1, 2, 3.5, -0.5" left="3" top="4" width="3" height="2"/>', "not whole numbers"),
        ('<mask label="x" rle="9, -4, 1" left="3" top="4" width="3" height="2"/>', "does not fill 3x2 pixels"),
        ('<mask label="x" rle="1, 5" left="46" top="4" width="3" height="2"/>', "a mask of 3x2 at (46, 4) is not in"),
        (
            '<mask label="x" rle="1, 99" left="0" top="0" width="100" height="1"/>',
            "does not fill 100x1 pixels of the image",
        ),
        ('<box xtl="1" ytl="5" xbr="5" ybr="9"/>', "has no 'label'"),
        (BOX.replace("scratch", "Good") + "/>", "cannot be called 'good'"),
    ],
)
def test_wrong_cvat(tmp_path, shape, words):
    root = make_cvat(tmp_path / "nut")
    write_cvat(root, {"box.png": shape, "turned.png": BOX + "/>"})
    (problem,) = told(root)
    assert problem.startswith("DF167 annotations.xml, image 0: its annotation cannot be used: ") and words in problem


def test_wrong_cvat_files(tmp_path):
    root = make_cvat(tmp_path / "nut")
    write_text(root / "old/annotations.xml", f"<annotations><track id='0' label='x'>{BOX}/></track></annotations>")
    (root / "images/box.png").unlink()
    write_image(root / "images/turned.png", size=40)
    problems = told(root)
    assert codes(problems) == ["DF140", "DF143", "DF166"]
    assert "export the task as 'CVAT for images 1.1'" in problems[-1] or "CVAT for images" in " ".join(problems)
    assert any(line.startswith("DF143 annotations.xml, image 1: the image 'box.png' is not in") for line in problems)


def test_cvat_yolo(tmp_path):
    """CVAT's "YOLO 1.1" export."""
    root = tmp_path / "nut"
    for name, text in (("a", "0 0.5 0.25 0.25 0.25\n"), ("b", "")):
        write_image(root / f"obj_train_data/{name}.png")
        write_text(root / f"obj_train_data/{name}.txt", text)
    write_text(root / "obj.names", "hole\ncrack\n")
    write_text(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write_text(root / "train.txt", "data/obj_train_data/a.png\ndata/obj_train_data/b.png\n")
    assert table(root) == {"obj_train_data/a.png": ("hole", "train"), "obj_train_data/b.png": ("good", "good")}
    assert np.array_equal(marks(root, "obj_train_data/a.png")["hole"], square(6, 18, 18, 30))


# Datumaro


def test_datumaro(tmp_path):
    root = make_datumaro(tmp_path / "nut")
    mask = {
        row.image.stem: row.mask.render() for row in read_object(root, "nut").rows if row.mask and row.defect == "hole"
    }
    assert np.array_equal(mask["outline"], square(12, 10, 30, 20))
    assert np.array_equal(mask["box"], square(TOP, LEFT, BOTTOM, RIGHT))
    assert np.array_equal(mask["turned"], turned_box(30)) and np.array_equal(mask["obb"], turned_box(30))
    assert is_oval(mask["oval"], 24, 20, 16, 6, 30) and np.array_equal(mask["mask"], square(3, 5, 9, 40))
    two = marks(root, "images/default/two.png")
    assert np.array_equal(two["crack"], square(1, 1, 9, 4)) and np.array_equal(two["hole"], square(9, 9, 17, 12))
    assert table(root)["images/default/clean.png"] == ("good", "good")
    (root / "annotations/default.json").rename(root / "annotations/val.json")
    assert table(root)["images/default/box.png"] == ("hole", "test")


@pytest.mark.parametrize(
    "annotation, words",
    [
        (datum("polyline", points=[1, 1, 5, 5]), "annotation 7: the type 'polyline' marks no area"),
        (datum("label", label_id=1), "is tagged 'crack' as a whole"),
        (datum("bbox", bbox=[1, 1, 5]), "annotation 7: has 3 numbers where 4 belong"),
        (datum("bbox", bbox=[1, 1, 5, 5], label_id=2), "there is no label 2; there are 2, from 0"),
        (datum("bbox", bbox=[1, 1, 5, 5], label_id=None), "there is no label None"),
        (datum("polygon", points=[1, 1, 5, 5, 6]), "5 numbers"),
        (datum("mask", rle={"counts": "3", "size": [40, SIZE]}), "RLE is 48x40"),
        (datum("ellipse", points=[5, 5, 1, 9]), "the radii -2 and 2"),
    ],
)
def test_wrong_datumaro(tmp_path, annotation, words):
    root = make_datumaro(tmp_path / "nut")
    content = json.loads((root / "annotations/default.json").read_text())
    content["items"][1]["annotations"] = [annotation]
    write_json(root / "annotations/default.json", content)
    (problem,) = told(root)
    assert problem.startswith("DF167 annotations/default.json, item 'box': its annotation") and words in problem


def test_wrong_datumaro_files(tmp_path):
    root = make_datumaro(tmp_path / "nut")
    content = json.loads((root / "annotations/default.json").read_text())
    content["items"][0]["image"]["size"] = [SIZE, 40]
    content["items"][1]["id"] = "gone"
    content["items"][2] = {"id": "cloud", "annotations": [], "point_cloud": {"path": "x.pcd"}}
    write_json(root / "annotations/default.json", content)
    write_json(root / "annotations/other.json", content | {"categories": {}})
    problems = told(root)
    assert codes(problems) == ["DF140", "DF143", "DF166", "DF166"]
    assert "DF166 annotations/other.json: is not of Datumaro's form: has no 'label'" in problems


# None of them


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("data.zip", "PK", "'data.zip' must be unpacked. "),
        ("a/masks.mat", "x", "'a/masks.mat': .mat files are not read. "),
        (
            "via.json",
            '{"a": {"regions": [{"shape_attributes": {}, "region_attributes": {}}]}}',
            "'via.json' is from VIA; ",
        ),
        (
            "ann/1.png.json",
            '{"objects": [{"classTitle": "hole"}]}',
            "is from Supervisely; export the annotations as COCO. ",
        ),
        ("notes.json", "{}", "'notes.json' is from an unknown program"),
        ("labels.csv", "image,label\n", "'labels.csv' has no column mask_file_name"),
        ("notes.txt", "hello\n", "'notes.txt' holds no lines of YOLO labels"),
        ("x.xml", "<a/>", "'x.xml' is XML, but not from Pascal VOC, LabelMe or CVAT"),
    ],
)
def test_what_is_no_layout_is_explained(tmp_path, file, content, words):
    write_text(tmp_path / "nut" / file, content)
    with pytest.raises(InputError, match="DF161") as caught:
        find_objects(tmp_path / "nut")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES_ANNOTATIONS)
def test_annotations_without_images_are_explained(tmp_path, name):
    root = EXAMPLES_ANNOTATIONS[name](tmp_path / "nut")
    for image in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
        image.unlink()
    problems = told(root)
    assert (
        codes(problems) == ["DF143"] * len(problems) or "but no images; put them into the same folder" in problems[0]
    )


def test_images_or_masks_alone_are_explained(tmp_path):
    write_image(tmp_path / "nut/photos/1.png"), write_image(tmp_path / "nut/photos/2.png")
    with pytest.raises(InputError, match="'photos/1.png' and 1 more are images, but there is neither a mask nor an"):
        find_objects(tmp_path / "nut")
    write_image(tmp_path / "bolt/masks/1.png")
    with pytest.raises(InputError, match="'masks/1.png' may be masks, but there are no images beside that folder"):
        find_objects(tmp_path / "bolt")


def test_every_example_is_known_by_itself(tmp_path):
    for name, make in (EXAMPLES_ANNOTATIONS | {"voc_masks": make_voc_masks}).items():
        root = make(tmp_path / name)
        assert layout_of(root) == name.removesuffix("_masks") and masks_of(root)
    assert list(find_objects(tmp_path)) == sorted([*EXAMPLES_ANNOTATIONS, "voc_masks"])
