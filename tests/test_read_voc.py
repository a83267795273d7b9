"""Pascal VOC and LabelMe 3.0: what is made of their XML files and class masks, and of wrong ones."""

import shutil

import numpy as np
import pytest
from annotated import (
    CVAT_TURN,
    OUTLINE,
    bndbox,
    make_labelme_3,
    make_voc,
    make_voc_masks,
    marks,
    robndbox,
    turned_box,
    write_class_mask,
    write_text,
    write_voc,
)
from drawn import square, write_image, write_values
from folders import write_json
from PIL import Image
from readings import codes, masks_of, table, told

from defectfill_dataset.readers import read_object


# Pascal VOC


@pytest.mark.parametrize(
    "annotations, images", [("Annotations", "JPEGImages"), (".", "."), ("images", "images"), ("labelled/x", "some/y")]
)
def test_voc(tmp_path, annotations, images):
    root = make_voc(tmp_path / "nut", annotations, images)
    place = "" if images == "." else f"{images}/"
    rows = read_object(root, "nut").rows
    assert {row.image.stem for row in rows if row.defect == "good"} == {"clean", "unmarked"}
    assert np.array_equal(marks(root, f"{place}box.jpg")["hole"], square(12, 10, 30, 20))
    two = marks(root, f"{place}two.jpg")
    assert two.keys() == {"hole", "crack"} and np.array_equal(two["crack"], square(1, 1, 9, 4))
    assert np.array_equal(marks(root, f"{place}turned.jpg")["scratch"], turned_box(30))
    assert np.array_equal(marks(root, f"{place}cvat.jpg")["scratch"], turned_box(30))
    assert np.array_equal(marks(root, f"{place}outline.jpg")["hole"], square(12, 10, 30, 20))


def test_voc_splits(tmp_path):
    root = make_voc(tmp_path / "nut")
    write_text(root / "ImageSets/Main/train.txt", "box\ntwo.jpg\n")
    write_text(root / "ImageSets/Main/val.txt", "outline\nelsewhere\n")
    write_text(root / "ImageSets/Main/trainval.txt", "box\ntwo\noutline\n")
    write_text(root / "ImageSets/Main/hole_train.txt", "box  1\ntwo -1\n")
    rows = table(root)
    assert {name: rows[f"JPEGImages/{name}.jpg"][1] for name in ("box", "outline", "cvat")} == {
        "box": "train", "outline": "test", "cvat": None
    }  # fmt: skip
    write_text(root / "ImageSets/Main/test.txt", "two")
    assert told(root) == ("DF144 ImageSets/Main/train.txt: is in two splits; keep one",)
    root = make_voc(
        make_voc(tmp_path / "neu", "train/annotations", "train/images"), "valid/annotations", "valid/images"
    )
    rows = table(root)
    assert rows["train/images/box.jpg"][1] == "train" and rows["valid/images/box.jpg"][1] == "test"
    assert not read_object(root, "neu").problems


def test_voc_stale_and_missing_names(tmp_path):
    root = make_voc(tmp_path / "nut")
    write_voc(root / "Annotations/two.xml", bndbox("hole", 1, 1, 5, 5), name="box.jpg")
    assert (
        "DF144 Annotations/two.xml: says it is of 'box.jpg', but by its name it is of 'JPEGImages/two.jpg'; "
        in (told(root)[0])
    )
    shutil.copy(root / "JPEGImages/box.jpg", root / "JPEGImages/two.jpg")  # the same picture: two files of one image
    assert codes(told(root)) == ["DF144"]
    root = make_voc(tmp_path / "bolt")
    write_voc(root / "Annotations/two.xml", bndbox("hole", 1, 1, 5, 5), name="long gone.jpg")
    write_voc(root / "Annotations/extra.xml", bndbox("hole", 1, 1, 5, 5))
    assert told(root) == ("DF143 Annotations/extra.xml: has no image; there must be one of its name",)
    (root / "Annotations/extra.xml").unlink()
    assert table(root)["JPEGImages/two.jpg"] == ("hole", None)
    (root / "Annotations/two.xml").rename(root / "Annotations/002.xml")
    write_voc(root / "Annotations/002.xml", bndbox("hole", 1, 1, 5, 5), name="two")
    assert table(root)["JPEGImages/two.jpg"] == ("hole", None)


def test_wrong_voc_is_told_at_once(tmp_path):
    root = make_voc(tmp_path / "nut")
    write_voc(root / "Annotations/box.xml", bndbox("hole", 20, 12, 10, 30))
    write_voc(root / "Annotations/two.xml", "<object><name>hole</name><point><x>3</x></point></object>")
    write_voc(root / "Annotations/turned.xml", robndbox(24, 24, 10, 0, 0.3))
    write_voc(root / "Annotations/cvat.xml", bndbox("good", 1, 1, 5, 5))
    write_voc(root / "Annotations/outline.xml", bndbox("hole", 1, 1, 5, 5), size=40)
    write_voc(root / "Annotations/clean.xml", bndbox("hole", 1, 1, 90, 5))
    write_text(root / "Annotations/unmarked.xml", "<annotation>")
    write_text(root / "Annotations/other.xml", "<doc><outputs/></doc>")
    write_text(root / "Annotations/bomb.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>")
    problems = told(root)
    assert codes(problems) == ["DF140", "DF166", "DF166", *["DF167"] * 5]
    for words in (
        "Annotations/box.xml: its annotation cannot be used: object 1: its box goes from (20, 12) to (10, 30)",
        "object 1: has no bndbox, robndbox or polygon", "10 wide and 0 high", "cannot be called 'good'", "(90, 1)",
    ):  # fmt: skip
        assert any(words in line for line in problems), words
    (noted,) = read_object(root, "nut").notes
    assert str(noted).startswith("DF158 Annotations/other.xml: not read: XML of <doc>")


def test_voc_boxes_a_pixel_wide_and_a_polygon_of_odd_numbers(tmp_path):
    root = make_voc(tmp_path / "nut")
    write_voc(root / "Annotations/box.xml", bndbox("crack", 10, 12, 10, 30))
    assert marks(root, "JPEGImages/box.jpg")["crack"][12:30, 10].all()
    shape = "<polygon><x1>1</x1><y1>1</y1><x2>9</x2><y2>9</y2><x3>9</x3></polygon>"
    write_voc(root / "Annotations/box.xml", f"<object><name>hole</name>{shape}</object>")
    assert "object 1: None is not a number" in told(root)[0]


@pytest.mark.parametrize("palette", [True, False])
def test_voc_masks_by_labelmap(tmp_path, palette):
    root = make_voc_masks(tmp_path / "nut", palette)
    assert table(root) == {
        "JPEGImages/hole.png": ("hole", None),
        "JPEGImages/both.png": ("crack: big+hole", None),
        "JPEGImages/crack.png": ("crack: big", None),
        "JPEGImages/clean.png": ("good", "good"),
    }
    both = marks(root, "JPEGImages/both.png")
    assert both.keys() == {"hole", "crack: big"}
    assert np.array_equal(both["hole"], square(12, 10, 30, 20)) and np.array_equal(
        both["crack: big"], square(1, 1, 9, 4)
    )
    assert len(masks_of(root)) == 4
    write_class_mask(root / "SegmentationClass/hole.png", (3, 1, 1, 9, 9), palette=palette)
    write_class_mask(root / "SegmentationClass/clean.png", (255, 1, 1, 9, 9), palette=palette)
    (root / "JPEGImages/crack.png").unlink()
    problems = told(root)
    assert codes(problems) == ["DF103", "DF143", "DF167"]
    assert any("clean.png: marks nothing but what is to be ignored" in line for line in problems)


def test_voc_masks_of_colours_that_have_no_name(tmp_path):
    root = make_voc_masks(tmp_path / "nut", palette=False)
    pixels = np.asarray(Image.open(root / "SegmentationClass/hole.png")).copy()
    pixels[:4, :4] = 0, 0, 128
    Image.fromarray(pixels).save(root / "SegmentationClass/hole.png")
    assert told(root) == (
        "DF103 SegmentationClass/hole.png: its mask cannot be read: holds values that labelmap.txt does not name: "
        "0,0,128 (16 pixels); name them too",
    )  # fmt: skip
    for text, words in (
        ("hole:128,0,0::\ncrack:128,0,0::\n", "line 2: 'crack' has the colour of 'hole'"),
        ("hole 128 0 0\n", "line 1 is 'hole 128 0 0'; write name:red,green,blue::"),
    ):
        (root / "labelmap.txt").write_text(text)
        assert codes(told(root)) == ["DF166"] and words in told(root)[0]


def test_voc_masks_by_the_xml_files(tmp_path):
    root = make_voc_masks(tmp_path / "nut", label_map=False)
    assert codes(told(root)) == ["DF166"]
    assert "what its values mean: 1 (in 2 masks), 2 (in 2 masks); add labelmap.txt" in told(root)[0]
    write_voc(root / "Annotations/hole.xml", bndbox("hole", 10, 12, 20, 30), name="hole.png")
    assert codes(told(root)) == ["DF166"]
    write_voc(root / "Annotations/crack.xml", bndbox("crack", 5, 5, 30, 9), name="crack.png")
    both = bndbox("hole", 10, 12, 20, 30), bndbox("crack", 1, 1, 4, 9)
    write_voc(root / "Annotations/both.xml", *both, name="both.png")
    write_voc(root / "Annotations/boxes.xml", *both, name="boxes.png")
    write_image(root / "JPEGImages/boxes.png")
    found = marks(root, "JPEGImages/both.png")
    assert np.array_equal(found["crack"], square(1, 1, 9, 4)) and found.keys() == {"hole", "crack"}
    assert marks(root, "JPEGImages/boxes.png").keys() == {"hole", "crack"}
    assert [problem.code for problem in read_object(root, "nut").notes] == ["DF158"]
    write_class_mask(root / "SegmentationClass/both.png", (1, 12, 10, 30, 20))
    assert told(root) == (
        "DF167 SegmentationClass/both.png: does not mark 'crack', which its XML file names; draw it, or remove it "
        "there",
    )  # fmt: skip


def test_a_polygon_is_not_turned_by_what_is_said_of_its_box(tmp_path):
    root = make_voc(tmp_path / "nut")
    more = robndbox(9, 9, 4, 4, 0.5).split("</name>")[1].removesuffix("</object>")
    write_voc(root / "Annotations/box.xml", bndbox("hole", 10, 12, 20, 30, OUTLINE + more + CVAT_TURN))
    assert np.array_equal(marks(root, "JPEGImages/box.jpg")["hole"], square(12, 10, 30, 20))


def test_voc_masks_in_folders_of_splits(tmp_path):
    root = tmp_path / "nut"
    for split in ("train", "valid"):
        make_voc_masks(root / split)
    reading = read_object(root, "nut", "voc")
    assert not reading.problems
    assert {row.split for row in reading.rows if row.mask} == {"train", "test"} and len(reading.rows) == 10


def test_stale_names_where_annotations_lie_apart(tmp_path):
    """Of LabelMe's JSON too."""
    for name in ("001", "002"):
        write_image(tmp_path / f"nut/images/{name}.png")
    shape = {"label": "hole", "shape_type": "circle", "points": [[20, 20], [25, 25]]}
    write_json(tmp_path / "nut/jsons/002.json", {"shapes": [shape], "imagePath": "001.png"})
    assert told(tmp_path / "nut") == (
        "DF144 jsons/002.json: says it is of '001.png', but by its name it is of 'images/002.png'; correct imagePath, "
        "or rename the file",
    )  # fmt: skip


def test_binary_masks_in_voc_are_no_ignore_border(tmp_path):
    root = tmp_path / "nut"
    write_image(root / "JPEGImages/0.png"), write_values(root / "SegmentationClass/0.png", (255, 3, 3, 9, 9))
    assert codes(told(root)) == ["DF166"] and "255 (in 1 masks)" in told(root)[0]
    write_voc(root / "Annotations/0.xml", bndbox("hole", 3, 3, 9, 9), name="0.png")
    assert np.array_equal(marks(root, "JPEGImages/0.png")["hole"], square(3, 3, 9, 9))


def test_labelme_3(tmp_path):
    root = make_labelme_3(tmp_path / "nut")
    assert told(root) == (f"DF161 {root}: may be folder or voc; choose one with --layout",)  # for Images/ and Masks/
    rows = read_object(root, "nut", "voc").rows
    assert {row.image.stem: row.defect for row in rows} == {
        "outline": "hole", "gone": "good", "turned": "hole", "mask": "hole"
    }  # fmt: skip
    masks = masks_of(root, layout="voc")
    assert np.array_equal(masks["Images/default/outline.jpg"], square(12, 10, 30, 20))
    assert np.array_equal(masks["Images/default/turned.jpg"], turned_box(30))
    assert np.array_equal(masks["Images/default/mask.jpg"], square(3, 5, 9, 40))
    (root / "Masks/default/mask_mask_0.png").unlink()
    assert "object 1: its mask 'mask_mask_0.png' is not there" in told(root, "voc")[0]
