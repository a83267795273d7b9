"""Labels as found in practice: encodings, links, capitals, hidden files, odd numbers, stale names."""

import base64
import io
import json
import math
import os
import unicodedata

import numpy as np
import pytest
from drawn import square, write_image, write_mask
from folders import make_mvtec, write_json
from PIL import Image
from readings import masks_of, table, told
from runs import check

from defectfill_dataset import InputError, binarise, find_objects, load_defect_pairs
from defectfill_dataset.readers import files, read_object
from defectfill_dataset.text import read_text


LINE = "0 0.5 0.25 0.25 0.25\n"
BOX = square(6, 18, 18, 30)


def make_labels(root, names: str | bytes | None = "names: [hole]\n", number: int = 2, places=("images", "labels")):
    """YOLO: images and labels in these folders, all with the same box."""
    for i in range(number):
        write_image(root / places[0] / f"{i}.png")
        (root / places[1]).mkdir(parents=True, exist_ok=True)
        (root / places[1] / f"{i}.txt").write_text(LINE)
    root.mkdir(parents=True, exist_ok=True)
    if names is not None:
        (root / "data.yaml").write_bytes(names if isinstance(names, bytes) else names.encode())
    return root


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_class_names_by_their_byte_order_mark(tmp_path, encoding):
    root = make_labels(tmp_path / "nut", None)
    (root / "classes.txt").write_bytes("划痕\r\nhole\r\n".encode(encoding))
    assert set(table(root).values()) == {("划痕", None)}


@pytest.mark.parametrize("encoding", ["gbk", "cp932", "big5", "cp1252"])
def test_other_encodings_are_refused_by_name(tmp_path, encoding):
    text = {"cp1252": "Kratzer\nBläschen\n", "cp932": "傷\n打痕\n"}.get(encoding, "刮痕\n凹坑\n")
    root = make_labels(tmp_path / "nut", None)
    (root / "classes.txt").write_bytes(text.encode(encoding))
    (problem,) = told(root)
    assert problem.startswith(f"DF166 {root / 'classes.txt'}: is not UTF-8 (byte 0x") and "save it as UTF-8" in problem
    assert {"gbk": "gb18030"}.get(encoding, encoding)[:4] in problem or encoding == "cp1252"


@pytest.mark.parametrize("layout", ["coco", "labelme", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gbk"])
def test_every_text_file_is_decoded_alike(tmp_path, layout, encoding):
    root = tmp_path / "nut"
    write_image(root / "0.png")
    write_mask(root / "marks/0.png")
    shape = {"label": "划痕", "shape_type": "rectangle", "points": [[18, 6], [30, 18]]}
    images = [{"id": 0, "file_name": "0.png"}]
    mark = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [18, 6, 12, 12]}
    texts = {
        "coco": {"images": images, "annotations": [mark], "categories": [{"id": 0, "name": "划痕"}]},
        "labelme": {"shapes": [shape], "imagePath": "0.png"},
        "metadata.jsonl": {"file_name": "0.png", "mask_file_name": "marks/0.png", "defect": "划痕"},
    }
    name = layout if "." in layout else "0.json"
    text = json.dumps(texts[layout], ensure_ascii=False) if layout in texts else None
    (root / name).write_bytes((text or "file_name,mask_file_name,defect\n0.png,marks/0.png,划痕\n").encode(encoding))
    if encoding == "gbk":
        assert "is not UTF-8" in told(root, layout.partition(".")[0])[0]
    else:
        assert table(root) == {"0.png": ("划痕", None)}


def test_utf_16_without_its_mark_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes("hole".encode("utf-16-le"))
    with pytest.raises(InputError, match="zero bytes, as UTF-16 without its byte order mark does"):
        read_text(tmp_path / "x.txt")


# YAML


@pytest.mark.parametrize(
    "names, read",
    [
        ("names:\n  0: off\n", "off"),
        ("names: [no]\n", "no"),
        ("names: [007]\n", "007"),
        ("nc: 2\nnames:\n  hole: 0\n  crack: 1\n", "hole"),
        ("nc: 1\nnames: hole\n", "hole"),
        ("names: ['1.0']\n", "1.0"),
    ],
)
def test_yaml_names_are_text(tmp_path, names, read):
    assert set(table(make_labels(tmp_path / "nut", names)).values()) == {(read, None)}


@pytest.mark.parametrize(
    "names, words",
    [
        ("nc: 2\nnames: hole, crack\n", "its 'names' are 'hole, crack'; write names: [first, second]"),
        ("names:\n  hole: 0\n  crack: 0\n", "its 'names' are {'hole': '0', 'crack': '0'}"),
        ("names: [[hole]]\n", "its 'names' are"),
        ("names: [hole]\nkpt_shape: [4, 3]\n", "is of poses (kpt_shape)"),
        ("names: [", "is not YAML"),
        ("names:\n  0:\n", "line 1: class 0 has no name"),
    ],
)
def test_other_yaml_names_are_refused_with_what_is_there(tmp_path, names, words):
    problems = told(make_labels(tmp_path / "nut", names))
    assert words in problems[0] and problems[0][:5] in ("DF166", "DF167")


def test_class_files_that_differ_are_refused(tmp_path):
    root = make_labels(tmp_path / "nut", None)
    (root / "classes.txt").write_text("hole\n")
    (root / "labels/classes.txt").write_text("hole\n\n")
    assert set(table(root).values()) == {("hole", None)}
    (root / "labels/classes.txt").write_text("crack\n")
    assert "names other classes than" in told(root)[0]


# Numbers of a label line


@pytest.mark.parametrize(
    "line, mask",
    [
        ("0,0.5,0.25,0.25,0.25", BOX),
        ("0;0.5;0.25;0.25;0.25", BOX),
        ("0 0,5 0,25 0,25 0,25", BOX),
        ("0.0\t0.5  0.25 0.25 0.25", BOX),
        ("0 0.875 0.25 0.250001 0.25", square(6, 36, 18, 48)),
        ("0 0.75 0.1 1.000001 0.1 1.002 0.5 0.75 0.5", square(5, 36, 24, 48)),
        ("0 0.375 0.125 0.625 0.125 0.625 0.375 0.375 0.375", BOX),
    ],
)
def test_numbers_whose_meaning_is_plain(tmp_path, line, mask):
    root = make_labels(tmp_path / "nut", number=1)
    (root / "labels/0.txt").write_text(line)
    assert np.array_equal(masks_of(root)["images/0.png"], mask)


@pytest.mark.parametrize(
    "line, words",
    [
        ("0 0.5 0.5 1.2 0.1", "line 2: 1.2 is not between 0 and 1"),
        ("0 0.5 0.5 0.1", "line 2: has 3 numbers after the class; a box has 4, a polygon 6, 8, 10 ..."),
        ("0 0.5 0.5 0.1 0.1 0.93", "line 2: has 5 numbers"),
        ("hole 0.5 0.5 0.1 0.1", "line 2: 'hole' is not a number"),
        ("0.5 0.5 0.5 0.1 0.1", "line 2: there is no class 0.5"),
        ("0 0.5 0.5 inf 0.1", "line 2: 'inf' is not a finite number"),
        ("7 0.5 0.5 0.1 0.1", "line 2: there is no class 7; there are 0 hole"),
    ],
)
def test_other_numbers_are_refused_with_file_line_and_value(tmp_path, line, words):
    root = make_labels(tmp_path / "nut", number=1)
    (root / "labels/0.txt").write_text(LINE + line + "\n")
    (problem,) = told(root)[:1]
    assert problem.startswith("DF167 labels/0.txt: ") and words in problem


# Places


def test_labels_beside_the_images_and_half_of_them_elsewhere(tmp_path):
    beside = make_labels(tmp_path / "beside", None, places=(".", "."))
    (beside / "classes.txt").write_text("hole\n")
    write_image(beside / "clean.png")
    assert table(beside) == {"0.png": ("hole", None), "1.png": ("hole", None), "clean.png": ("good", "good")}
    half = make_labels(tmp_path / "half", number=4)
    for i in (2, 3):
        (half / f"labels/{i}.txt").rename(half / f"images/{i}.txt")
    assert len(masks_of(half)) == 4
    (half / "labels/2.txt").write_text("0 0.1 0.1 0.1 0.1\n")
    assert told(half)[0].startswith("DF144 images/2.png, images/2.txt, labels/2.txt: has several label files")
    (half / "labels/2.txt").write_text(LINE)
    assert len(masks_of(half)) == 4  # twice the same is one


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    root = make_labels(tmp_path / "nut")
    (root / "labels").rename(tmp_path / "store")
    (root / "labels").symlink_to(tmp_path / "store")
    (tmp_path / "store/again").symlink_to(tmp_path / "store")
    (root / "images/loop").symlink_to(root)
    assert len(masks_of(root)) == 2


def test_capitals_are_the_same(tmp_path):
    root = make_labels(tmp_path / "nut", places=("Images", "LABELS"))
    (root / "LABELS/0.txt").rename(root / "LABELS/0.TXT")
    assert set(table(root).values()) == {("hole", None)}
    loud = make_mvtec(tmp_path / "bolt")
    for old, new in (("test", "Test"), ("ground_truth", "Ground_Truth"), ("train/good", "train/Good")):
        (loud / old).rename(loud / new)
    (loud / "Ground_Truth/hole").rename(loud / "Ground_Truth/Hole")
    data = load_defect_pairs(loud)
    assert len(data["train"]) == 2 and len(data["good"]) == 3


def test_files_of_systems_and_programs_are_no_data(tmp_path):
    root = make_labels(tmp_path / "parts/nut")
    for name in ("images/._0.png", "labels/._0.txt", "images/.DS_Store", "images/Thumbs.db", "images/desktop.ini"):
        (root / name).write_bytes(b"\0\5\26\7")
    for folder in ("images/.ipynb_checkpoints", "images/__MACOSX", "labels/@eaDir"):
        (root / folder).mkdir()
        write_image(root / folder / "0.png")
        (root / folder / "9.txt").write_text(LINE)
    (tmp_path / "parts/lost+found").mkdir()
    make_mvtec(tmp_path / "parts/$RECYCLE.BIN/old")
    assert list(find_objects(tmp_path / "parts")) == ["nut"] and len(masks_of(root)) == 2


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """Beside objects it is passed over; inside one it may hold the labels, and is a problem."""
    nut, locked = make_labels(tmp_path / "parts/nut"), []
    scandir = os.scandir

    def refuse(folder="."):
        if folder in locked:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    locked.append(tmp_path / "parts/private")
    locked[0].mkdir()
    assert list(find_objects(tmp_path / "parts")) == ["nut"]
    locked[:] = [nut / "labels"]
    assert (
        told(tmp_path / "parts")[0]
        == f"DF108 {nut / 'labels'}: this folder may not be read; allow it, or move it away"
    )


def test_names_whose_accents_are_apart(tmp_path):
    root = make_labels(tmp_path / "nut", number=0)
    for i in range(2):
        write_image(root / "images" / unicodedata.normalize("NFD", f"ガラス{i}.png"))
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / unicodedata.normalize("NFC", f"ガラス{i}.txt")).write_text(LINE)
    assert len(masks_of(root)) == 2
    name = unicodedata.normalize("NFD", "Größe.png")
    write_image(tmp_path / "coco" / name)
    mark = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [18, 6, 12, 12]}
    images = [{"id": 0, "file_name": unicodedata.normalize("NFC", name)}]
    write_json(
        tmp_path / "coco/a.json",
        {"images": images, "annotations": [mark], "categories": [{"id": 0, "name": "hole"}]},
    )
    assert len(masks_of(tmp_path / "coco")) == 1


def test_names_that_are_no_unicode_are_told_by_check_data_and_training(tmp_path, capsys):
    root = make_mvtec(tmp_path / "nut")
    for file in (root / "test/hole/000.png", root / "ground_truth/hole/000_mask.png"):
        os.rename(file, os.fsencode(file).replace(b"000", "傷".encode("cp932")))
    assert check(root) == 2
    assert "DF115 test/hole/\\udc8f\\udc9d.png: its name or path is not UTF-8; rename it" in capsys.readouterr().out
    assert [line[:5] for line in told(root)] == ["DF115", "DF115"]


def test_nested_folders_of_types_and_of_unpacked_archives(tmp_path):
    root = tmp_path / "data/nut/nut"
    for i in range(2):
        for name in (f"crack/batch1/{i}", f"crack/{i}", f"hole/{i}"):
            write_image(root / f"images/{name}.png", mask=write_mask(root / f"masks/{name}.png"))
    write_image(root / "good/batch1/0.png")
    assert list(find_objects(tmp_path / "data")) == ["nut"]
    found = table(root)
    assert found["images/crack/batch1/1.png"] == ("crack", None) and found["good/batch1/0.png"] == ("good", "good")
    assert len(found) == 7
    (root / "masks/crack/batch1/1.png").unlink()
    assert told(root)[0].startswith("DF142 images/crack/batch1/1.png: its mask is missing")


# Labels


def test_spellings_of_one_label_are_one_type_and_told(tmp_path, capsys):
    for i, label in enumerate(("crack", "crack ", "Crack", "crack", "cr-ack")):
        write_image(tmp_path / f"nut/{i}.png")
        shape = {"label": label, "shape_type": "rectangle", "points": [[18, 6], [30, 18 + i]]}
        write_json(tmp_path / f"nut/{i}.json", {"shapes": [shape, shape], "imagePath": f"{i}.png"})
    assert {defect for defect, _ in table(tmp_path / "nut").values()} == {"crack", "cr-ack"}
    assert check(tmp_path / "nut") == 0
    out = capsys.readouterr().out
    assert "DF156" in out and "'Crack' (1), 'crack' (2), 'crack ' (1); all are read as 'crack'" in out


def test_spellings_of_folders_too(tmp_path):
    root = make_mvtec(tmp_path / "nut", {"hole": 3})
    make_mvtec(tmp_path / "more", {"hole": 2})
    for part in ("test", "ground_truth"):
        (tmp_path / "more" / part / "hole").rename(root / part / "Hole")
    assert {row.defect for row in read_object(root, "nut").rows} == {"hole", "good"}


# Annotations of another image


def make_stale(root, same: bool = False):
    """LabelMe: the image was renamed from 1.png to 2.png after its annotation; another is called 1.png now."""
    write_image(root / "1.png")
    write_image(root / "2.png")
    if same:
        (root / "2.png").write_bytes((root / "1.png").read_bytes())
    shape = {"label": "hole", "shape_type": "rectangle", "points": [[18, 6], [30, 18]]}
    write_json(root / "2.json", {"shapes": [shape], "imagePath": "1.png"})
    return root


def test_a_stale_path_in_an_annotation_is_refused(tmp_path):
    (problem,) = told(make_stale(tmp_path / "nut"))[:1]
    assert problem == (
        "DF144 2.json: says it is of '1.png', but by its name it is of '2.png'; correct imagePath, or rename the file"
    )
    assert len(masks_of(make_stale(tmp_path / "same", same=True))) == 1
    with pytest.raises(InputError, match="DF163 .* no defect images"):
        load_defect_pairs(tmp_path / "nut", skip_problems=True)


def test_annotations_apart_from_their_images(tmp_path):
    root = tmp_path / "nut"
    shape = {"label": "hole", "shape_type": "rectangle", "points": [[18, 6], [30, 18]]}
    for i, path in enumerate(("../JPEGImages/0.png", "1.png", "D:\\photos\\2.png")):
        write_image(root / f"JPEGImages/{i}.png")
        write_json(root / f"jsons/{i}.json", {"shapes": [shape], "imagePath": path})
    write_image(root / "JPEGImages/clean.png"), write_image(root / "other/9.png")
    found = table(root)
    assert found.pop("JPEGImages/clean.png") == ("good", "good")
    assert found == {f"JPEGImages/{i}.png": ("hole", None) for i in range(3)}
    strange = tmp_path / "parts/bolt"  # folders of any name, one object
    for i in range(2):
        write_image(strange / f"shots/{i}.png")
        write_json(strange / f"marks/{i}.json", {"shapes": [shape], "imagePath": f"{i}.png"})
    assert list(find_objects(tmp_path / "parts")) == ["bolt"] and len(masks_of(strange)) == 2


@pytest.mark.parametrize("orientation, note", [(1, False), (3, True), (6, True)])
def test_images_turned_by_exif_are_named(tmp_path, capsys, orientation, note):
    """Whether a mask was drawn on the turned picture cannot be seen where both have the same size."""
    root = make_mvtec(tmp_path / "nut")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(root / "test/hole/000.png").save(root / "test/hole/000.png", exif=exif)
    assert check(root) == 0
    out = capsys.readouterr().out
    assert ("DF127 test/hole/000.png: is rotated by its EXIF tag" in out) is note


# Shapes


def turned_box(cx: float, cy: float, width: float, height: float, degrees: float) -> np.ndarray:
    """The 48 px mask of a box turned clockwise about its centre."""
    y, x = np.mgrid[:48, :48] + 0.5
    angle = math.radians(degrees)
    u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    v = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
    return (abs(u) < width / 2) & (abs(v) < height / 2)


def make_coco_with(root, *annotations: dict):
    write_image(root / "0.png")
    marks = [{"id": 7 + i, "image_id": 0, "category_id": 0, **a} for i, a in enumerate(annotations)]
    categories = [{"id": 0, "name": "hole"}]
    images = [{"id": 0, "file_name": "0.png", "width": 48, "height": 48}]
    write_json(root / "a.json", {"images": images, "annotations": marks, "categories": categories})
    return root


@pytest.mark.parametrize("degrees", [0, 30, 90, 135])
def test_turned_boxes(tmp_path, degrees):
    """CVAT writes a turned box into COCO upright, and its turn among the attributes; X-AnyLabeling writes corners."""
    mask = turned_box(24, 24, 30, 6, degrees)
    coco = {"bbox": [9, 21, 30, 6], "segmentation": [], "attributes": {"occluded": False, "rotation": degrees}}
    assert np.array_equal(masks_of(make_coco_with(tmp_path / "coco", coco))["0.png"], mask)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    corners = [
        (24 + u * cosine - v * sine, 24 + u * sine + v * cosine) for u, v in ((-15, -3), (15, -3), (15, 3), (-15, 3))
    ]
    shape = {"label": "hole", "shape_type": "rotation", "points": corners, "direction": math.radians(degrees)}
    write_image(tmp_path / "labelme/0.png")
    write_json(tmp_path / "labelme/0.json", {"shapes": [shape], "imagePath": "0.png"})
    assert np.array_equal(masks_of(tmp_path / "labelme")["0.png"], mask)
    line = " ".join(f"{value / 48:.6f}" for corner in corners for value in corner)
    root = make_labels(tmp_path / "yolo", number=1)
    (root / "labels/0.txt").write_text(f"0 {line}\n")
    assert np.array_equal(masks_of(root)["images/0.png"], mask)


def test_a_flat_list_is_one_polygon(tmp_path):
    for i, segmentation in enumerate(([18, 6, 30, 6, 30, 18, 18, 18], [[18, 6], [30, 6], [30, 18], [18, 18]])):
        root = make_coco_with(tmp_path / str(i), {"segmentation": segmentation})
        assert np.array_equal(masks_of(root)["0.png"], BOX)


@pytest.mark.parametrize(
    "annotation, words",
    [
        ({"bbox": [9, 9, 5, 5, 30]}, "annotation 7: its box has 5 numbers"),
        ({"bbox": [9, 9, -5, 5]}, "annotation 7: its box is -5 wide and 5 high"),
        ({"bbox": ["a", 9, 5, 5]}, "annotation 7: 'a' is not a number"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "annotation 7: a polygon has 7 numbers"),
        (
            {"segmentation": {"size": [48, 48], "counts": [2000.5, 303.5]}},
            "its RLE counts are not whole",
        ),
        ({"segmentation": {"counts": "x"}}, "annotation 7: has no 'size'"),
        ({"bbox": [9, 9, 5, 5], "category_id": 4}, "annotation 7: no category has the id 4"),
    ],
)
def test_wrong_annotations_are_refused_by_their_number(tmp_path, annotation, words):
    (problem,) = told(make_coco_with(tmp_path / "nut", annotation))[:1]
    assert problem.startswith("DF167 0.png: ") and words in problem


def test_the_masks_of_labelme(tmp_path):
    """A picture in base64 between two corners, of whose pixels those that are not 0 count."""
    y, x = np.mgrid[:13, :21]
    part = ((x - 10) / 10) ** 2 + ((y - 6) / 6) ** 2 <= 1
    stream = io.BytesIO()
    Image.fromarray(part).save(stream, "PNG")
    shape = {"label": "stain", "points": [[20, 12], [40, 24]], "shape_type": "mask"}
    encoded = base64.b64encode(stream.getvalue()).decode()
    write_image(tmp_path / "nut/0.png")
    for mask, points, words in (
        (encoded, [[20, 12], [40, 24]], None),
        (encoded, [[20, 12], [30, 24]], "shape 1: its mask is 21x13, its box 10x12"),
        (encoded, [[40, 12], [60, 24]], "shape 1: a mask of 21x13 at (40, 12) is not in the image of 48x48"),
        ("?", [[20, 12], [40, 24]], "shape 1: its mask is not base64"),
        (encoded[:60], [[20, 12], [40, 24]], "shape 1: "),
    ):
        content = {"shapes": [shape | {"mask": mask, "points": points}], "imagePath": "0.png"}
        write_json(tmp_path / "nut/0.json", content)
        if words:
            assert words in told(tmp_path / "nut")[0]
        else:
            whole = np.zeros((48, 48), dtype=bool)
            whole[12:25, 20:41] = part
            assert np.array_equal(masks_of(tmp_path / "nut")["0.png"], whole)


def test_walking_takes_each_folder_once(tmp_path):
    for name in ("a/b", "a/.git", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "c/up").symlink_to(tmp_path)
    assert [f.relative_to(tmp_path).as_posix() for f in files.walk(tmp_path)] == [".", "a", "c", "a/b"]
    assert binarise(Image.fromarray(BOX)).sum() == 144


def test_an_image_listed_twice_is_never_united(tmp_path):
    """In two COCO files, by two LabelMe files, in two lines of a table: one of them is stale."""
    root = make_coco_with(tmp_path / "coco", {"bbox": [9, 9, 5, 5]})
    (root / "b.json").write_text((root / "a.json").read_text().replace("[9, 9, 5, 5]", "[20, 9, 5, 5]"))
    assert told(root) == ("DF144 0.png: is listed more than once; keep one",)
    shape = {"label": "hole", "shape_type": "rectangle", "points": [[18, 6], [30, 18]]}
    write_image(tmp_path / "labelme/1.png")
    for name in ("1", "2"):
        write_json(tmp_path / f"labelme/{name}.json", {"shapes": [shape], "imagePath": "1.png"})
    assert told(tmp_path / "labelme") == ("DF144 1.png: is listed more than once; keep one",)
    write_image(tmp_path / "table/1.png"), write_mask(tmp_path / "table/m.png"), write_mask(tmp_path / "table/n.png")
    lines = ["file_name,mask_file_name,defect", "1.png,m.png,hole", "1.png,n.png,hole"]
    (tmp_path / "table/metadata.csv").write_text("\n".join(lines))
    assert told(tmp_path / "table") == ("DF144 1.png: is listed more than once; keep one",)
    (tmp_path / "table/metadata.csv").write_text("\n".join([lines[0], "1.png,m.png,Good "]))
    assert told(tmp_path / "table")[0].startswith("DF167 metadata.csv, row 1: a good image with a mask")
