"""Every layout that is read: what it makes of a tiny tree of its own, and of a wrong one."""

import json
import shutil
from pathlib import Path

from offline import ROOT

import numpy as np
import pytest
from datasets import Image as Encoded
from drawn import square, write_image, write_mask, write_values
from folders import (
    BOXED,
    EXAMPLES,
    POLYGON,
    make_btad,
    make_coco,
    make_free_folder,
    make_ksdd2,
    make_labelme,
    make_loco,
    make_magnetic_tile,
    make_metadata,
    make_mvtec,
    make_mvtec_ad2,
    make_visa,
    make_yolo,
    write_json,
    write_lines,
)
from PIL import Image
from pycocotools import mask as coco_mask
from readings import codes, masks_of, table, told

from defectfill_dataset import (
    DefectPairs,
    InputError,
    binarise,
    check_pairs,
    data_digest,
    find_objects,
    load_defect_pairs,
    load_image,
)
from defectfill_dataset.masks import MaskFiles, MaskShapes
from defectfill_dataset.readers import LAYOUTS, layout_of, pair_by_name


LAZY = Encoded(decode=False)
SHARED = ROOT.parent / "shared" / "data"  # real images, where they are


# Masks


def test_a_single_plain_file_stays_as_it_is(data):
    """The digest of a run's data must not change with how masks are described."""
    rows = load_defect_pairs(data)["train"].cast_column("mask", LAZY)
    assert rows[0]["mask"]["path"] == str(data / "ground_truth/hole/000_mask.png") and not rows[0]["mask"]["bytes"]


def test_mask_files_are_united_and_must_agree_in_size(tmp_path):
    first = write_values(tmp_path / "1.png", (255, 0, 0, 4, 4))
    second = write_values(tmp_path / "2.png", (255, 8, 8, 9, 9))
    files = (tmp_path / "1.png", tmp_path / "2.png")
    assert np.array_equal(MaskFiles(files).render(), first | second) and MaskFiles(files).plain is None
    assert MaskFiles(files[:1]).plain == files[0] and MaskFiles(files[:1], nonzero=True).plain is None
    write_values(tmp_path / "2.png", (255, 0, 0, 4, 4), size=40)
    with pytest.raises(ValueError, match="1.png 48x48, 2.png 40x40"):
        MaskFiles(files).render()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB", "1"])
def test_any_value_above_zero_is_defect_where_the_format_says_so(tmp_path, mode):
    pixels = np.zeros((8, 8), dtype=np.uint16 if mode == "I;16" else np.uint8)
    pixels[1, 1:4] = 1, 2, 255
    mask = Image.fromarray(pixels).convert(mode) if mode != "P" else Image.fromarray(pixels)
    if mode == "P":
        mask.putpalette([200, 200, 200] * 256)
    if mode == "1":
        mask = Image.fromarray(pixels > 0)
    mask.save(tmp_path / "x.png")
    assert np.argwhere(MaskFiles((tmp_path / "x.png",), nonzero=True).render()).tolist() == [[1, 1], [1, 2], [1, 3]]


def test_polygons_mark_the_pixels_inside_and_no_thin_one_is_lost():
    box = ((2.0, 2.0), (6.0, 2.0), (6.0, 6.0), (2.0, 6.0))
    assert np.array_equal(MaskShapes((12, 12), (box,)).render(), square(2, 2, 6, 6, 12))
    crack = ((2.0, 2.0), (2.4, 2.0), (2.4, 9.0), (2.0, 9.0))
    assert MaskShapes((12, 12), (crack,)).render()[2:9, 2].all()
    flat = [value for point in crack for value in point]
    assert not coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([flat], 12, 12))).any()  # COCO's own loses it
    sliver = ((0.0, 0.0), (12.0, 12.0), (11.9, 12.0))
    assert MaskShapes((12, 12), (sliver,)).render().diagonal().all()


def test_sixteen_bit_images_and_masks_reach_training(tmp_path):
    root = make_mvtec(tmp_path / "nut")
    for file in (root / "test/hole/000.png", root / "ground_truth/hole/000_mask.png"):
        grey = np.asarray(Image.open(file).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(file)
    before, after = (np.asarray(load_image(row["image"])) for row in load_defect_pairs(root)["train"])
    assert len(masks_of(root)) == 4 and before.shape == after.shape and abs(before.mean() - after.mean()) < 12


# Folder layouts


def test_every_layout_is_known_by_itself_and_by_its_name(tmp_path):
    made = {name: make(tmp_path / name) for name, make in EXAMPLES.items()}
    assert made.keys() <= LAYOUTS.keys()  # tests/test_read_folders.py has the others
    for name, root in made.items():
        assert layout_of(root) == name
        for layout in ("auto", name):
            data = load_defect_pairs(root, split="all", layout=layout)
            assert set(data["train"]["object"]) == {name} and len(data["good"]) > 0
            check_pairs(data["train"])
            assert {type(mask["bytes"] or mask["path"]) for mask in data["train"].cast_column("mask", LAZY)["mask"]}
    assert list(find_objects(tmp_path)) == sorted(made)
    assert list(find_objects(tmp_path, "visa")) == ["visa"]


def test_a_layout_that_is_not_there_or_not_known(tmp_path, data):
    assert told(data, "coco")[0].startswith(f"DF161 {data}: no images of the layout coco")
    assert "there are: auto, defectfill" in told(data, "kodak")[0]


def test_two_layouts_at_once_are_a_question_that_a_flag_answers(tmp_path, train):
    root = make_yolo(tmp_path / "plate")
    write_mask(root / "masks/box.png")
    assert told(root) == (f"DF161 {root}: may be folder or yolo; choose one with --layout",)
    assert codes(told(root, "folder")) == ["DF142"] * 4
    output = train("--layout", "yolo", "--split", "all", data=root)
    split = json.loads((output / "split.json").read_text())
    assert split["train"] == ["images/both.JPG", "images/box.JPG", "images/outline.JPG"]


def test_a_table_says_which_masks_the_images_of_a_folder_have(tmp_path):
    root = make_free_folder(tmp_path / "nut")
    lines = [{"file_name": "images/a.JPG", "mask_file_name": "masks/d.seg.png", "defect": "hole"}]
    write_lines(root / "metadata.csv", lines)
    assert table(root) == {"images/a.JPG": ("hole", None)}


def test_the_builder_alone_tells_an_unknown_layout(tmp_path):
    with pytest.raises(InputError, match="DF161 .*no known layout"):
        DefectPairs(dataset_name="pairs", config_name="nut", data_dir=str(tmp_path)).download_and_prepare()


def test_stray_files_and_hidden_folders_decide_nothing(tmp_path):
    root = make_mvtec(tmp_path / "nut")
    shutil.copytree(root / "ground_truth/hole", root / "ground_truth/hole/.ipynb_checkpoints")
    (root / "ground_truth/hole/empty").mkdir()
    write_json(root / "notes.json", {"images": 3, "annotations": "none"})
    assert layout_of(root) == "mvtec"
    root = make_coco(tmp_path / "plate")
    write_json(root / "split.json", ["a", "list"])
    assert layout_of(root) == "coco" and len(masks_of(root)) == 6


def test_a_single_mask_is_one_file(tmp_path):
    """Generation takes one mask an image; so it refuses what training unites."""
    image, masks = tmp_path / "7.png", [tmp_path / "7_mask_1.png", tmp_path / "7_mask_2.png"]
    pairs, problems = pair_by_name([image], masks, tmp_path)
    assert not pairs and [*map(str, problems)] == [
        "DF144 7_mask_1.png, 7_mask_2.png: more than one mask of 7.png; keep one"
    ]
    assert pair_by_name([image], masks[:1], tmp_path) == ({image: masks[0]}, [])


@pytest.mark.parametrize("masks", ["test_public/ground_truth/bad", "ground_truth/bad"])
def test_mvtec_ad2(tmp_path, masks):
    root = make_mvtec_ad2(tmp_path / "can", masks)
    assert table(root) == {
        "test_public/bad/000_regular.png": ("bad", None),
        "test_public/bad/001_overexposed.png": ("bad", None),
        **{f"{place}/000_regular.png": ("good", "good") for place in ("train/good", "validation/good")},
        "test_public/good/000_regular.png": ("good", "good"),
    }
    (root / masks / "001_overexposed_mask.png").unlink()
    more = write_values(root / masks / "001_overexposed_mask_1.png", (255, 1, 1, 4, 4))
    more |= write_values(root / masks / "001_overexposed_mask_2.PNG", (255, 20, 1, 24, 9))
    assert np.array_equal(masks_of(root)["test_public/bad/001_overexposed.png"], more)
    write_mask(root / masks / "001_overexposed_mask.png")
    write_mask(root / masks / "002_mask.png")
    assert codes(told(root)) == ["DF143", "DF144"]


def test_mvtec_loco(tmp_path):
    root = make_loco(tmp_path / "breakfast_box")
    united = square(2, 2, 5, 5) | write_values(
        root / "ground_truth/logical_anomalies/000/001.png", (7, 30, 30, 33, 40), (236, 40, 2, 42, 4)
    )
    masks = masks_of(root)
    assert len(masks) == 4 and np.array_equal(masks["test/logical_anomalies/000.png"], united)
    assert sum(defect == "good" for defect, _ in table(root).values()) == 3
    (root / "ground_truth/logical_anomalies/000").rename(root / "ground_truth/logical_anomalies/009")
    (root / "ground_truth/structural_anomalies/000/000.png").unlink()
    write_image(root / "test/structural_anomalies/001.jpg")
    problems = told(root)
    assert codes(problems) == ["DF142", "DF142", "DF143", "DF144"]
    assert any("holds no mask of 000.png" in line for line in problems)


def test_loco_masks_of_different_sizes_and_unreadable_ones_are_told(tmp_path):
    root = make_loco(tmp_path / "breakfast_box")
    write_values(root / "ground_truth/logical_anomalies/000/001.png", (255, 3, 3, 5, 5), size=40)
    (root / "ground_truth/structural_anomalies/001/000.png").write_bytes(b"no image")
    problems = told(root)
    assert codes(problems) == ["DF103", "DF103"]
    assert "000.png 48x48, 001.png 40x40" in problems[0] and "structural_anomalies/001.png" in problems[1]
    for file in (root / "ground_truth").rglob("*.png"):
        write_values(file, (9, 3, 3, 5, 5), size=40)
    write_values(root / "ground_truth/structural_anomalies/000/000.png")
    assert codes(told(root)) == ["DF140", "DF140", "DF140", "DF145"]


def test_visa_by_its_folders(tmp_path):
    root = make_visa(tmp_path / "candle")
    assert table(root) == {
        "Data/Images/Anomaly/000.JPG": ("anomaly", None),
        "Data/Images/Anomaly/001.JPG": ("anomaly", None),
        "Data/Images/Normal/0000.JPG": ("good", "good"),
    }
    for mask in masks_of(root).values():
        assert np.array_equal(mask, square(2, 2, 5, 5) | square(9, 9, 12, 20))
    (root / "Data/Masks/Anomaly/000.png").rename(root / "Data/Masks/Anomaly/007.png")
    assert codes(told(root)) == ["DF142", "DF143"]


def test_visa_by_its_table(tmp_path):
    root, other = make_visa(tmp_path / "candle"), make_visa(tmp_path / "pcb1")
    (root / "Data/Masks/Anomaly/001.png").rename(root / "Data/Masks/Anomaly/other.png")
    lines = [
        "object,split,label,image,mask",
        "candle,test,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/other.png",
        "candle,train,normal,candle/Data/Images/Normal/0000.JPG,",
    ]
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    assert list(find_objects(tmp_path)) == ["candle", "pcb1"]
    assert {name: defect for name, (defect, _) in table(root).items()} == {
        "Data/Images/Anomaly/001.JPG": "anomaly",
        "Data/Images/Normal/0000.JPG": "good",
    }
    assert len(masks_of(other)) == 2  # the table does not name it
    lines += ["candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/no.png", "candle,test,anomaly,../x.JPG,"]
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    assert codes(told(root)) == ["DF142", "DF166"]
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,split\nca\xff\xfe")
    assert codes(told(root)) == ["DF166"]


def test_kolektor(tmp_path):
    root = make_ksdd2(tmp_path / "KSDD2")
    assert {name: row for name, row in table(root).items() if row[0] != "good"} == {
        "train/10001.png": ("defect", "train"),
        "test/20001.png": ("defect", "test"),
    }
    data = load_defect_pairs(root)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 1, "test": 1, "good": 4}
    (root / "train/10001_GT.png").unlink()
    (root / "test/20000.png").unlink()
    (root / "test/20001_GT.png").write_bytes(b"")
    assert codes(told(root)) == ["DF103", "DF142", "DF143"]


def test_btad(tmp_path):
    root = make_btad(tmp_path / "01")
    assert {name: defect for name, (defect, _) in table(root).items()} == {
        **{f"test/ko/{name}": "ko" for name in ("0000.bmp", "0001.png", "0002.BMP")},
        "train/ok/0000.bmp": "good",
        "test/ok/0009.bmp": "good",
    }
    shutil.copy(root / "ground_truth/ko/0000.png", root / "ground_truth/ko/0000.bmp")
    assert codes(told(root)) == ["DF144"]


def test_magnetic_tile(tmp_path):
    root = make_magnetic_tile(tmp_path / "tile")
    assert sorted(table(root).values(), key=str) == [
        *[("blowhole", None)] * 2, *[("crack", None)] * 2, ("good", "good")
    ]  # fmt: skip
    (root / "MT_Crack/Imgs/exp0.png").unlink()
    (root / "MT_Crack/Imgs/exp1.jpg").unlink()
    write_values(root / "MT_Blowhole/Imgs/exp0.png", size=40)
    write_values(root / "MT_Blowhole/Imgs/exp1.png")
    assert codes(told(root)) == ["DF140", "DF142", "DF143", "DF145"]
    shutil.rmtree(root / "MT_Crack")
    assert codes(told(root)) == ["DF140", "DF145"]


def test_a_folder_of_ones_own(tmp_path):
    root = make_free_folder(tmp_path / "nut")
    assert table(root) == {
        **{f"images/{name}": ("defect", None) for name in ("a.JPG", "b.tif", "c 1.bmp", "d.png")},
        "good/x.png": ("good", "good"),
    }
    write_image(root / "images/hole/a.png", mask=write_mask(root / "masks/hole/a_mask.png"))
    write_image(root / "images/good/y.png")
    united = write_values(root / "masks/e/1.png", (255, 1, 1, 3, 3)) | write_values(
        root / "masks/e/2.png", (255, 9, 9, 12, 12)
    )
    write_image(root / "images/e.png")
    assert table(root)["images/hole/a.png"] == ("hole", None) and table(root)["images/good/y.png"][0] == "good"
    assert np.array_equal(masks_of(root)["images/e.png"], united)
    write_image(root / "images/hole/b.png"), write_mask(root / "masks/hole/c.png"), write_mask(root / "masks/a_gt.png")
    (root / "masks/f").mkdir()
    write_image(root / "images/f.png")
    assert codes(told(root)) == ["DF142", "DF142", "DF143", "DF144"]


# Tables


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata(tmp_path, name):
    root = make_metadata(tmp_path / "nuts", name)
    assert table(root) == {
        "pictures/0.png": ("hole", None),
        "pictures/1.png": ("defect", None),
        "pictures/good.png": ("good", "good"),
    }
    shutil.copytree(root, tmp_path / "by_split/train")
    assert table(tmp_path / "by_split")["train/pictures/0.png"] == ("hole", "train")
    write_lines(
        root / name,
        [
            {"file_name": "pictures/0.png", "mask_file_name": "marks/7.png", "defect": "hole"},
            {"file_name": "pictures/1.png", "mask_file_name": "", "defect": "hole"},
            {"file_name": "pictures/1.png", "mask_file_name": "marks/1.png", "defect": "good"},
            {"file_name": "../nuts2/1.png", "mask_file_name": "marks/1.png", "defect": ""},
            {"file_name": "pictures/good.png", "mask_file_name": "", "defect": ""},
            {"file_name": "pictures/good.png", "mask_file_name": "", "defect": "good"},
        ],
    )
    problems = told(root)
    assert codes(problems) == ["DF142", "DF142", "DF144", "DF166", "DF167"]
    assert f"{name}, row 1" in problems[0] and "marks/7.png" in problems[0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_several_objects(tmp_path, name):
    root = make_metadata(tmp_path / "parts", name, objects=True)
    assert list(find_objects(root)) == ["bolt", "nut"]
    data = load_defect_pairs(root, "nut")
    assert data["train"]["source_file"] == ["pictures/0.png"] and len(data["good"]) == 1
    assert load_defect_pairs(root, "bolt")["train"]["object"] == ["bolt"]
    assert "choose one with --object: bolt, nut" in told(root)[0]


def test_tables_of_several_folders(tmp_path):
    make_metadata(tmp_path / "line1", objects=True), make_mvtec(tmp_path / "plate")
    assert list(find_objects(tmp_path)) == ["bolt", "nut", "plate"]
    assert load_defect_pairs(tmp_path, "bolt")["train"]["source_file"] == ["pictures/1.png"]
    make_metadata(tmp_path / "line2", objects=True)
    problems = told(tmp_path, object_name="plate")
    assert codes(problems) == ["DF162", "DF162"] and "line1" in problems[0] and "line2" in problems[0]


def test_broken_metadata(tmp_path):
    root = make_metadata(tmp_path / "nuts", "metadata.jsonl")
    with (root / "metadata.jsonl").open("a") as stream:
        stream.write('["mask_file_name"]\n')
    assert told(root)[0].startswith(f"DF166 {root / 'metadata.jsonl'}, line 4")
    root = make_metadata(tmp_path / "bolts", "metadata.csv", objects=True)
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(text.replace(",bolt", ","))
    assert codes(told(root)) == ["DF166"]
    (root / "metadata.csv").write_text(text.replace(",", ";"))
    assert told(root) == ("DF166 metadata.csv: has no column file_name; its columns are file_name;mask_file_name;"
        "defect;object",)  # fmt: skip


# COCO


def test_coco(tmp_path):
    root = make_coco(tmp_path / "nut")
    assert table(root) == {
        **{f"images/{i}.png": (d, None) for i, d in enumerate(["hole", "crack", "crack", "hole", "crack+hole"])},
        "images/5.png": ("good", "good"),
    }
    masks = masks_of(root)
    assert np.array_equal(masks["images/0.png"], BOXED) and np.array_equal(masks["images/3.png"], BOXED)
    for name in ("images/1.png", "images/2.png"):
        assert np.array_equal(masks[name], square(3, 5, 9, 40))
    y, x = np.mgrid[:48, :48] + 0.5
    triangle = (x > 30) & (x < 40) & (y > 30) & (y - 30 <= x - 30)
    assert np.array_equal(masks["images/4.png hole"], BOXED | triangle)
    assert np.array_equal(masks["images/4.png crack"], square(1, 1, 4, 4))


@pytest.mark.parametrize(
    "file, images, split",
    [
        ("train/_annotations.coco.json", "train", "train"),
        ("annotations/instances_val2017.json", "val2017", "test"),
        ("annotations/train.json", "images/train", "train"),
        ("coco.json", "images", None),
        ("coco.json", ".", None),
        ("latest.json", "pictures", None),
    ],
)
def test_coco_places_and_splits(tmp_path, file, images, split):
    root = make_coco(tmp_path / "nut", file, images)
    assert table(root)[(Path(images) / "0.png").as_posix()] == ("hole", split)


def test_coco_of_two_splits(tmp_path):
    root = make_coco(tmp_path / "nut", "annotations/train2017.json", "train2017")
    make_coco(root, "annotations/val2017.json", "val2017")
    data = load_defect_pairs(root)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "test": 6, "good": 2}
    (root / "annotations/val2017.json").rename(root / "annotations/other.json")
    assert codes(told(root)) == ["DF144"] * 6


def test_wrong_coco_is_told_at_once(tmp_path):
    def mark(i, segmentation, category=1):
        return {"id": i, "image_id": i, "category_id": category, "segmentation": segmentation}

    broken = [
        mark(0, [[1, 2, 3, 4]]),  # two corners
        mark(1, {"size": [40, 48], "counts": "0"}),  # another size
        mark(2, {"size": [48, 48], "counts": [5, 5]}),  # too few runs
        mark(3, [[1, 1, 90, 1, 90, 9]]),  # outside
        mark(4, [POLYGON], category=9),
        mark(5, None),
        mark(77, [POLYGON]),
    ]
    root = make_coco(tmp_path / "nut", annotations=broken)
    problems = told(root)
    assert codes(problems) == ["DF143", *["DF167"] * 6]
    for words in ("2 corners", "48x40", "does not fill 48x48", "(90, 1)", "the id 9", "neither"):
        assert any(words in line for line in problems), words
    (root / "images/1.png").unlink()
    shutil.copy(root / "images/2.png", root / "2.png")
    Image.new("RGB", (20, 48)).save(root / "images/3.png")
    (root / "images/4.png").write_bytes(b"no image")
    make = {"images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 48} for i in range(1, 5)]}
    content = json.loads((root / "annotations/instances.json").read_text())
    good = [mark(i, [POLYGON]) for i in range(1, 5)]
    write_json(root / "annotations/instances.json", content | make | {"annotations": good})
    assert codes(told(root)) == ["DF103", "DF140", "DF144", "DF166"]
    for images in ([{"id": 1}], [{"id": 1, "file_name": "0.png"}] * 2, 3):
        write_json(root / "annotations/instances.json", content | {"images": images})
        assert codes(told(root)) == ["DF166"]
    (root / "annotations/more.json").write_text("{")
    assert codes(told(root)) == ["DF166", "DF166"]


@pytest.mark.parametrize("counts", ["", "3", "345", "o", "0o", "\x00", "zz", "Pd1oooO"])
def test_damaged_run_lengths_are_refused(tmp_path, counts):
    """pycocotools leaves memory as it was where they are too few, and reads on where they do not end."""
    mark = {"id": 0, "image_id": 0, "category_id": 1, "segmentation": {"size": [48, 48], "counts": counts}}
    assert codes(told(make_coco(tmp_path / "nut", annotations=[mark]))) in (["DF103"], ["DF167"])


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_an_image_turned_by_exif_after_its_annotation(tmp_path, image_format):
    root = make_coco(tmp_path / "nut")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 48)).save(root / "images/0.png", image_format, exif=exif)
    content = json.loads((root / "annotations/instances.json").read_text())
    content["images"][0] |= {"width": 40, "height": 48}
    write_json(root / "annotations/instances.json", content)
    assert "48x40 (an EXIF tag turns it), its annotation 40x48" in told(root)[0]
    content["images"][0] |= {"width": 48, "height": 40}
    write_json(root / "annotations/instances.json", content)
    assert masks_of(root)["images/0.png"].shape == (40, 48)


# YOLO


def test_yolo(tmp_path):
    root = make_yolo(tmp_path / "nut")
    assert table(root) == {
        "images/box.JPG": ("hole", None),
        "images/outline.JPG": ("crack", None),
        "images/both.JPG": ("crack+hole", None),
        "images/empty.JPG": ("good", "good"),
        "images/none.png": ("good", "good"),
    }
    masks = masks_of(root)
    assert np.array_equal(masks["images/box.JPG"], square(6, 18, 18, 30))
    assert np.array_equal(masks["images/both.JPG hole"], square(6, 18, 18, 30))
    assert np.array_equal(masks["images/both.JPG crack"], square(24, 12, 36, 24))


def test_yolo_splits_and_class_files(tmp_path):
    root = make_yolo(make_yolo(tmp_path / "nut", "labels/train", "images/train"), "labels/val", "images/val")
    assert table(root)["images/train/box.JPG"] == ("hole", "train")
    assert table(root)["images/val/box.JPG"] == ("hole", "test")
    root = make_yolo(make_yolo(tmp_path / "roboflow", "train/labels", "train/images"), "valid/labels", "valid/images")
    (root / "data.yaml").write_text("names: [hole, crack]")
    assert {split: len(rows) for split, rows in load_defect_pairs(root).items()} == {"train": 4, "test": 4, "good": 4}
    (root / "data.yaml").unlink()
    assert codes(told(root)) == ["DF166"]
    (root / "classes.txt").write_text("pit\ncrack\n")
    assert table(root)["train/images/box.JPG"] == ("pit", "train")
    (root / "data.yaml").write_text("names: [")
    assert codes(told(root)) == ["DF166"]


def test_wrong_yolo_is_told_at_once(tmp_path):
    root = make_yolo(tmp_path / "nut")
    for name, text in (
        ("box", "7 0.5 0.5 0.1 0.1"),
        ("outline", "0 0.5 0.5 0.1 0.1 0.9"),
        ("both", "0 0.1 0.1\n"),
        ("empty", "0 0.5 0.5 nan 0.1"),
        ("none", "0 0.5 12 0.1 0.1"),
        ("orphan", ""),
    ):
        (root / f"labels/{name}.txt").write_text(text)
    write_image(root / "images/box2.png"), write_image(root / "images/box2.bmp")
    (root / "labels/box2.txt").write_text("0 0.5 0.5 0.1 0.1")
    problems = told(root)
    assert codes(problems) == ["DF143", "DF144", *["DF167"] * 5]
    assert any("line 1: there is no class 7; there are 0 hole, 1 crack" in line for line in problems)


# LabelMe


def test_labelme(tmp_path):
    root = make_labelme(tmp_path / "nut")
    assert table(root) == {
        "polygon.jpg": ("hole", None),
        "rectangle.jpg": ("hole", None),
        "circle.jpg": ("pit", None),
        "two.jpg": ("hole+pit", None),
        "clean.jpg": ("good", "good"),
        "unmarked.png": ("good", "good"),
    }
    masks = masks_of(root)
    assert np.array_equal(masks["polygon.jpg"], BOXED) and np.array_equal(masks["rectangle.jpg"], BOXED)
    y, x = np.mgrid[:48, :48] + 0.5
    assert np.array_equal(masks["circle.jpg"], (x - 24) ** 2 + (y - 24) ** 2 < 100)
    assert np.array_equal(masks["two.jpg hole"], BOXED)
    assert np.array_equal(masks["two.jpg pit"], (x - 40) ** 2 + (y - 40) ** 2 < 9)


def test_labelme_finds_the_image_by_its_path_or_its_name(tmp_path):
    root = make_labelme(tmp_path / "nut")
    content = json.loads((root / "polygon.json").read_text())
    (root / "images/train").mkdir(parents=True), (root / "annotations").mkdir()
    (root / "polygon.jpg").rename(root / "images/train/a.jpg")
    (root / "polygon.json").unlink()
    write_json(root / "annotations/polygon.json", content | {"imagePath": "..\\images\\train\\a.jpg"})
    write_json(root / "circle.json", json.loads((root / "circle.json").read_text()) | {"imagePath": "old/place.jpg"})
    rows = table(root)
    assert rows["images/train/a.jpg"] == ("hole", "train") and rows["circle.jpg"] == ("pit", None)


def test_wrong_labelme_is_told_at_once(tmp_path):
    root = make_labelme(tmp_path / "nut")

    def change(name, **changes):
        write_json(root / f"{name}.json", json.loads((root / f"{name}.json").read_text()) | changes)

    change("polygon", shapes=[{"label": "hole", "shape_type": "line", "points": [[1, 1], [5, 5]]}])
    change("rectangle", imageWidth=40)
    change("circle", shapes=[{"label": "good", "shape_type": "circle", "points": [[9, 9], [5, 5]]}])
    change("two", shapes=[{"label": "pit", "shape_type": "circle", "points": [[90, 9], [5, 5]]}])
    write_image(root / "point.jpg")
    round_ = {"label": "pit", "shape_type": "circle", "points": [[9, 9], [9, 9]]}
    write_json(root / "point.json", {"shapes": [round_], "imagePath": "point.jpg"})
    write_json(root / "unrelated.json", {})
    (root / "unmarked.json").write_text("{")  # without it the image would count as good
    write_json(root / "orphan.json", json.loads((root / "clean.json").read_text()) | {"imagePath": "orphan.jpg"})
    write_json(root / "clean2.json", json.loads((root / "clean.json").read_text()))
    problems = told(root)
    assert codes(problems) == ["DF140", "DF143", "DF144", "DF166", *["DF167"] * 4]
    assert any("'line' marks no area" in line for line in problems)


# The cache, and real images


@pytest.mark.parametrize("layout", ["coco", "yolo", "labelme", "mvtec_loco", "visa"])
def test_changed_annotations_are_noticed(tmp_path, layout):
    root = EXAMPLES[layout](tmp_path / "nut")
    before = load_defect_pairs(root, split="all")["train"]
    changed = {
        "mvtec_loco": "ground_truth/logical_anomalies/000/000.png",
        "visa": "Data/Masks/Anomaly/000.png",
        "coco": ("annotations/instances.json", lambda t: t.replace("10, 12, 20, 12", "11, 12, 20, 12")),
        "yolo": ("labels/box.txt", lambda t: "0 0.5 0.25 0.25 0.5"),
        "labelme": ("polygon.json", lambda t: t.replace("[10, 12]", "[5, 12]")),
    }
    if isinstance(changed[layout], str):
        write_values(root / changed[layout], (5, 20, 20, 30, 30))
    else:
        file, change = changed[layout]
        (root / file).write_text(change((root / file).read_text()))
    assert data_digest(load_defect_pairs(root, split="all")["train"]) != data_digest(before)


@pytest.mark.skipif(not (SHARED / "magnetic_tile").is_dir(), reason="no real images here")
def test_real_magnetic_tiles():
    data = load_defect_pairs(SHARED / "magnetic_tile", split="all")
    assert len(data["train"]) == 115 + 57 and len(data["good"]) == 318
    assert set(data["train"]["defect"]) == {"blowhole", "crack"}
    shares = [binarise(row["mask"]).mean() for row in data["train"]]
    assert 0.0005 < np.median(shares) < 0.004


@pytest.mark.skipif(not (SHARED / "mvtec_sample").is_dir(), reason="no real images here")
def test_real_hazelnuts():
    data = load_defect_pairs(SHARED / "mvtec_sample", "hazelnut")
    check_pairs(data["train"])
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "good": 6}
