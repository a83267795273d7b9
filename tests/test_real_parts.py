"""scripts/prepare_real_parts.py: two public datasets, split by part."""

import json
from pathlib import Path

from offline import ROOT

import numpy as np
import pytest
from PIL import Image

from defectfill_dataset import InputError, load_defect_pairs
from defectfill_scripts import prepare_real_parts


BOARDS = ROOT.parent / "shared/data/deep_pcb"


def put_tile(root: Path, kind: str, exposure: int, number: int) -> None:
    folder = root / kind / "Imgs"
    folder.mkdir(parents=True, exist_ok=True)
    rng, mask = np.random.default_rng(number), np.zeros((40, 30), np.uint8)
    mask[5:9, 5:9] = 255 * (kind != "MT_Free")
    Image.fromarray(rng.integers(0, 255, (40, 30), dtype=np.uint8)).save(folder / f"exp{exposure}_num_{number}.jpg")
    Image.fromarray(mask).save(folder / f"exp{exposure}_num_{number}.png")


def test_exposures_of_one_tile_stay_together(tmp_path):
    for tile in range(6):
        for exposure in range(1, 4):
            put_tile(tmp_path / "in", "MT_Blowhole", exposure, 10000 * tile + 20 * exposure)
            put_tile(tmp_path / "in", "MT_Crack", exposure, 10000 * tile + 2000 + 20 * exposure)
            put_tile(tmp_path / "in", "MT_Free", exposure, 10000 * tile + 5000 + 20 * exposure)
    out = tmp_path / "out"
    prepare_real_parts.main(["magnetic_tile", "--data_dir", str(tmp_path / "in"), "--output_dir", str(out)])
    split = json.loads((out / "split.json").read_text())
    tiles = {side: {name.split("/")[-1][:7] for name in names} for side, names in split.items()}
    assert tiles["train"] and tiles["test"] and not tiles["train"] & tiles["test"]
    assert len(split["train"]) == 5 + 2 * 4 and len(split["test"]) == 3 * (1 + 2)
    assert split["skipped"] and tiles["skipped"] <= tiles["train"]
    data = load_defect_pairs(out / "magnetic tile", split=str(out / "split.json"))
    assert {*data["train"]["defect"]} == {"blowhole", "crack"} and len(data["good"]) == 18
    good, paint = ({f.name for f in folder.glob("*.png")} for folder in (out / "good/magnetic tile", out / "paint"))
    assert len(good) == 9 and paint < good  # half of the tiles without a defect
    with pytest.raises(InputError, match="DF192 "):
        prepare_real_parts.main(["magnetic_tile", "--data_dir", str(tmp_path / "in"), "--output_dir", str(out)])


def put_board(root: Path, name: str, images: dict[str, Image.Image], lines: list[str]) -> None:
    """Images named by their suffixes, and a line for each defect, as DeepPCB is published."""
    board = root / f"group{name[:5]}" / name[:5]
    boxes = board.with_name(f"{name[:5]}_not")
    for folder in (board, boxes):
        folder.mkdir(parents=True, exist_ok=True)
    for suffix, image in images.items():
        image.convert("L").save(board / f"{name}_{suffix}.jpg", quality=95)
    (boxes / f"{name}.txt").write_text("\n".join(lines))


def put_boards(root: Path, names: list[str]) -> None:
    """Boards of parallel traces, each with a square of every type, and their templates."""
    copper = np.zeros((96, 96), bool)
    copper[:, 20:30] = copper[:, 36:46] = copper[60:, 60:] = True
    for i, name in enumerate(names):
        tested, lines = copper.copy(), []
        for k in range(6):
            x, y = 4 + 14 * k, 6 + i
            tested[y : y + 6, x : x + 6] ^= True
            lines.append(f"{x - 2} {y - 2} {x + 8} {y + 8} {k + 1}")
        put_board(root, name, {"test": Image.fromarray(~tested), "temp": Image.fromarray(~copper)}, lines)


def test_masks_are_what_differs_from_the_template(tmp_path):
    put_boards(tmp_path / "in", ["20085001", "12100001", "13000001"])
    out = tmp_path / "out"
    prepare_real_parts.main(["deep_pcb", "--data_dir", str(tmp_path / "in"), "--output_dir", str(out)])
    data = load_defect_pairs(out / "deep_pcb", split="all")
    assert len(data["train"]) == 3 * 6 and {*data["train"]["defect"]} == {*prepare_real_parts.BOARD_DEFECTS}
    assert len(data["good"]) == 3
    [row] = [r for r in data["train"] if r["source_file"].endswith("20085001.png") and r["defect"] == "short"]
    expected = np.zeros((96, 96), bool)
    expected[6:12, 17:25] = expected[5:13, 18:24] = True  # the square, widened by one pixel
    assert np.array_equal(np.asarray(row["mask"].convert("L")) > 0, expected)


@pytest.mark.skipif(not BOARDS.exists(), reason="needs the shared images")
def test_masks_of_real_boards_are_those_of_another_program(tmp_path):
    """Boxes, images and templates as published; the masks of the shared dataset were not made by this code."""
    record = json.loads((BOARDS / "annotations.json").read_text())
    images = [i for i in record["images"] if not i["file_name"].endswith("_template.png")][:4]
    for image in images:
        name = Path(image["file_name"]).stem
        lines = []
        for annotation in record["annotations"]:
            if annotation["image_id"] == image["id"]:
                left, top, width, height = (round(v) for v in annotation["bbox"])
                lines.append(f"{left},{top},{left + width},{top + height} {annotation['category_id']}")
        files = {"test": f"{name}.png", "temp": f"{name}_template.png"}
        images_of = {suffix: Image.open(BOARDS / "images" / file) for suffix, file in files.items()}
        put_board(tmp_path / "in", name, images_of, lines)
    prepare_real_parts.write_boards(tmp_path / "in", tmp_path / "out")
    made = json.loads((tmp_path / "out/annotations.json").read_text())
    counts = lambda annotations, images: sorted(
        (i["file_name"], a["category_id"], a["segmentation"]["counts"])
        for a in annotations
        for i in images
        if a["image_id"] == i["id"]
    )
    assert counts(made["annotations"], made["images"]) == counts(record["annotations"], images) != []


def test_boards_are_split_and_each_type_has_its_region(tmp_path):
    put_boards(tmp_path / "in", ["20085001", "12100001", "77000001", "13000001", "13000002"])
    out = tmp_path / "out"
    prepare_real_parts.main(["deep_pcb", "--data_dir", str(tmp_path / "in"), "--output_dir", str(out)])
    split = json.loads((out / "split.json").read_text())
    assert {Path(n).name[:5] for n in split["test"]} == {"13000"} and len(split["train"]) == 3
    cases = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
    assert [case["defect"] for case in cases] == ["open", "short", "mousebite", "spur"]
    painted = sorted(f.name for f in (out / "paint").iterdir())
    assert len(painted) == 3 and not any(name.startswith("13000") for name in painted)
    copper = np.asarray(Image.open(out / "paint" / painted[0]).convert("L")) < 128
    open_, short, bite, spur = (np.asarray(Image.open(Path(c["roi"]) / painted[0])) > 0 for c in cases)
    assert open_[30, 25] and not open_[85, 85]  # a narrow trace, and the middle of a plane
    assert short[30, 33] and not short[30, 80]  # a narrow gap, and open ground
    assert not (bite & ~copper).any() and not (spur & copper).any() and bite.any() and spur.any()
    assert bite[80, 61] and not bite[80, 80] and spur[80, 55] and not spur[20, 85]


@pytest.mark.parametrize("dataset", ["magnetic_tile", "deep_pcb"])
def test_a_folder_of_something_else_and_a_missing_file_are_told(tmp_path, dataset):
    argv = [dataset, "--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="DF161 .*in"):
        prepare_real_parts.main(argv)
    (tmp_path / "in").rmdir()
    if dataset == "deep_pcb":
        put_boards(tmp_path / "in", ["20085001", "13000001"])
        missing = tmp_path / "in/group20085/20085/20085001_temp.jpg"
    else:
        put_tile(tmp_path / "in", "MT_Blowhole", 1, 7)
        with pytest.raises(InputError, match="DF161 .*has no images MT_Crack"):
            prepare_real_parts.main(argv)
        put_tile(tmp_path / "in", "MT_Crack", 1, 7), put_tile(tmp_path / "in", "MT_Free", 1, 7)
        missing = tmp_path / "in/MT_Free/Imgs/exp1_num_7.png"
    missing.unlink()
    with pytest.raises(InputError, match=f"DF160 .*{missing.name}"):
        prepare_real_parts.main(argv)
    assert not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("line", ["1 2 3 4", "1 2 3 4 7", "5 2 3 4 1", "1 2 3 4 open"])
def test_a_line_that_is_no_box_is_told(tmp_path, line):
    put_boards(tmp_path / "in", ["20085001"])
    (tmp_path / "in/group20085/20085_not/20085001.txt").write_text(line)
    with pytest.raises(InputError, match=f"DF161 .*20085001.txt: '{line}' is not a box and a type"):
        prepare_real_parts.main(
            ["deep_pcb", "--data_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
        )
