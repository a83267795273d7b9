"""Published datasets with tables of their own: Real-IAD's JSON, and the defect types of VisA's image_anno.csv."""

from pathlib import Path

import numpy as np
import pytest
from drawn import square, write_image, write_values
from folders import folder_at, make_real_iad, make_visa, write_json
from PIL import Image
from readings import codes, good, masks_by_type, masks_of, notes, rows_of, told

from defectfill_dataset import find_objects
from defectfill_dataset.readers import layout_of


# Real-IAD

REAL_IAD = [
    ("NG/AK/S0001/part__0001_NG_AK_C1_2023.jpg", "AK", None),
    ("NG/BX/S0001/part__0001_NG_BX_C1_2023.jpg", "BX", None),
]
UNSEEN = "NG/BX/S0001/part__0001_NG_BX_C2_2023.jpg"
SEEN = "OK/S0001/part_0001_OK_C1_2023.jpg"


@pytest.mark.parametrize(
    "table",
    ["../realiad_jsons/{}.json", "../../realiad_jsons/realiad_jsons/{}.json", "../../realiad_jsons/{}.json",
     "../{}.json", "{}.json"],
)  # fmt: skip
def test_real_iad_by_its_table(tmp_path, table):
    root = make_real_iad(tmp_path / "Real-IAD/realiad_1024/audiojack", table)
    assert list(find_objects(tmp_path)) == ["audiojack"]
    assert rows_of(root) == [*REAL_IAD, *good(UNSEEN, SEEN)] and not notes(root)
    assert len(masks_of(root)) == 2


def test_real_iad_by_its_folders(tmp_path):
    root = make_real_iad(tmp_path / "audiojack", "")
    assert rows_of(root) == [*REAL_IAD, *good(SEEN)]
    assert len(masks_of(root)) == 2
    (note,) = notes(root)
    assert UNSEEN in note and "mask: 1" in note and "audiojack.json" in note
    mask = root / REAL_IAD[0][0].replace(".jpg", ".png")
    mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    assert len(masks_of(root)) == 2
    mask.with_stem(f"{mask.stem}_mask").rename(mask.with_stem("other"))
    assert codes(told(root)) == ["DF142", "DF143"]  # no mask of the type is left


def test_wrong_real_iad_is_told_at_once(tmp_path):
    root = make_real_iad(tmp_path / "audiojack", "{}.json")
    (root / REAL_IAD[0][0].replace(".jpg", ".png")).rename(root / "NG/AK/S0001/stray.png")
    (root / SEEN).unlink()
    write_image(root / "OK/S0009/new.jpg")
    problems = told(root)
    assert codes(problems) == ["DF142", "DF143", "DF166"] and "stray.png" in "".join(problems)
    table = root / "audiojack.json"
    entry = {"image_path": REAL_IAD[1][0], "mask_path": REAL_IAD[1][0].replace(".jpg", ".png"), "anomaly_class": "OK"}
    write_json(table, {"train": [], "test": [entry, {"image_path": 3}, "x", None]})
    assert codes(told(root)) == ["DF143", "DF166", "DF166", "DF166", "DF167"]
    write_json(table, {"train": [], "test": [entry | {"anomaly_class": "BX", "mask_path": None}]})
    assert any("without a mask" in note for note in notes(root)) and any("OK/S0009/new.jpg" in n for n in notes(root))
    for content in ([], {"train": {}}, 3):
        write_json(table, content)
        assert codes(told(root)) == ["DF166"] and "no lists 'train' and 'test'" in told(root)[0]
    table.write_text("{")
    assert codes(told(root)) == ["DF166"]


def test_loose_images_of_defects_are_not_real_iad(tmp_path):
    write_image(tmp_path / "nut/NG/1.png"), write_image(tmp_path / "nut/OK/2.png"), folder_at(tmp_path / "nut/NG/AK")
    assert layout_of(tmp_path / "nut") is None


# VisA with types

BENT, MELT = square(4, 4, 9, 12), square(20, 20, 26, 30)


def make_visa_types(root: Path) -> Path:
    """000: bent (value 1), 001: melt (value 2), 002 and 003: both."""
    lines = ["image,label,mask"]
    for i, (label, boxes) in enumerate(
        [("bent", [(1, 4, 4, 9, 12)]), ("melt", [(2, 20, 20, 26, 30)])]
        + [('"melt, bent"', [(1, 4, 4, 9, 12), (2, 20, 20, 26, 30)])] * 2
    ):
        image, mask = (f"Data/{kind}/Anomaly/{i:03d}" for kind in ("Images", "Masks"))
        write_image(root / f"{image}.JPG")
        write_values(root / f"{mask}.png", *boxes)
        lines.append(f"{root.name}/{image}.JPG,{label},{root.name}/{mask}.png")
    write_image(root / "Data/Images/Normal/0000.JPG")
    lines.append(f"{root.name}/Data/Images/Normal/0000.JPG,normal,")
    (root / "image_anno.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


def anomaly(number: int) -> str:
    return f"Data/Images/Anomaly/{number:03d}.JPG"


def test_visa_types(tmp_path):
    root = make_visa_types(tmp_path / "pcb1")
    assert rows_of(root) == [
        (anomaly(0), "bent", None), (anomaly(1), "melt", None),
        *[(anomaly(i), defect, None) for i in (2, 3) for defect in ("bent", "melt")],
        *good("Data/Images/Normal/0000.JPG"),
    ]  # fmt: skip
    assert not notes(root)
    masks = masks_by_type(root)
    for (name, defect), mask in masks.items():
        assert np.array_equal(mask, BENT if defect == "bent" else MELT), name


def test_visa_types_that_the_masks_do_not_tell_apart(tmp_path):
    root = make_visa_types(tmp_path / "pcb1")
    write_values(root / "Data/Masks/Anomaly/001.png", (1, 20, 20, 26, 30))  # 1 means both now
    assert [row[:2] for row in rows_of(root)][:4] == [
        (anomaly(0), "bent"), (anomaly(1), "melt"), (anomaly(2), "combined"), (anomaly(3), "combined")
    ]  # fmt: skip
    (note,) = notes(root)
    assert note.startswith("DF156") and "images of several types" in note and "apart: 2" in note and "002.JPG" in note
    assert np.array_equal(masks_of(root)[anomaly(2)], BENT | MELT)
    for i in range(4):  # 255 and black only
        write_values(root / f"Data/Masks/Anomaly/{i:03d}.png", (255, 4, 4, 9, 12))
    assert [row[1] for row in rows_of(root)].count("combined") == 2
    write_values(root / "Data/Masks/Anomaly/000.png", (1, 4, 4, 9, 12))
    write_values(root / "Data/Masks/Anomaly/001.png", (2, 4, 4, 9, 12))
    write_values(root / "Data/Masks/Anomaly/002.png", (1, 4, 4, 9, 12), (9, 30, 30, 33, 33))  # 9 means nothing known
    write_values(root / "Data/Masks/Anomaly/003.png", (1, 4, 4, 9, 12))  # one of two
    assert [row[1] for row in rows_of(root)].count("combined") == 2
    (root / "Data/Masks/Anomaly/003.png").write_bytes(b"no image")
    assert codes(told(root)) == ["DF103"]


def test_visa_masks_in_jpeg_have_no_classes(tmp_path):
    root = make_visa_types(tmp_path / "pcb1")
    for mask in (root / "Data/Masks/Anomaly").iterdir():
        Image.fromarray(np.where(BENT, 255, 0).astype(np.uint8)).save(mask.with_suffix(".jpg"))
        mask.unlink()
    assert [row[1] for row in rows_of(root)].count("combined") == 2
    assert all(np.array_equal(mask, BENT) for mask in masks_of(root).values())


def test_visa_types_with_the_split_table(tmp_path):
    root = make_visa_types(tmp_path / "pcb1")
    lines = ["object,split,label,image,mask"]
    lines += [f"pcb1,test,anomaly,pcb1/{anomaly(i)},pcb1/Data/Masks/Anomaly/{i:03d}.png" for i in (0, 2)]
    folder_at(tmp_path / "split_csv")
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    assert [row[:2] for row in rows_of(root)] == [(anomaly(0), "bent"), (anomaly(2), "combined")]
    assert {note[:5] for note in notes(root)} == {"DF156", "DF166"}  # two types, one shown; images that are not listed


@pytest.mark.parametrize("text", ["", "image,label,mask\n", "image,label,mask\nother/x.JPG,melt,\n"])
def test_visa_without_types_is_read_as_before(tmp_path, text):
    root = make_visa(tmp_path / "candle")
    plain = rows_of(root)
    (root / "image_anno.csv").write_text(text)
    assert rows_of(root) == plain
    assert [note[:5] for note in notes(root)] == (["DF166", "DF166"] if "other" in text else [])


def test_wrong_visa_types_are_told_at_once(tmp_path):
    root = make_visa_types(tmp_path / "pcb1")
    table = root / "image_anno.csv"
    text = table.read_text()
    table.write_text(text.replace("0000.JPG,normal", "0000.JPG,melt").replace("000.JPG,bent", "000.JPG,Normal"))
    problems = told(root)
    assert codes(problems) == ["DF167", "DF167"] and any("which image_anno.csv calls 'Normal'" in p for p in problems)
    table.write_text(text + f"pcb1/{anomaly(0)},melt,x\n")
    assert codes(told(root)) == ["DF144"]
    table.write_text(text.replace("image,label", "picture,label"))
    assert "has no columns image and label; its columns are picture, label, mask" in told(root)[0]
    table.write_text(text.replace(f"pcb1/{anomaly(0)},bent", f"pcb1/{anomaly(0)},"))
    assert (anomaly(0), "anomaly", None) in rows_of(root) and "does not name: 1" in notes(root)[-1]
    table.write_bytes(b"image,label\n\xff\xfe,x\n")
    assert codes(told(root)) == ["DF166"]
