"""scripts/prepare_real_parts.py: two public datasets, split by part."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectfill_dataset import InputError, load_defect_pairs
from defectfill_scripts import prepare_real_parts


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


def put_boards(root: Path, names: list[str]) -> None:
    """Boards of parallel traces, each with a square of every type, and their templates."""
    (root / "images").mkdir(parents=True)
    copper = np.zeros((96, 96), bool)
    copper[:, 20:30] = copper[:, 36:46] = copper[60:, 60:] = True
    types, images, annotations = ["open", "short", "mousebite", "spur"], [], []
    for i, name in enumerate(names):
        Image.fromarray(~copper).save(root / f"images/{name}_template.png")
        Image.fromarray(~copper).save(root / f"images/{name}.png")
        for file in (f"{name}.png", f"{name}_template.png"):
            images.append({"id": len(images) + 1, "file_name": file, "width": 96, "height": 96})
        for k in range(len(types)):
            x, y = 4 + 20 * k, 4 + i
            box = {"segmentation": [[x, y, x + 6, y, x + 6, y + 6, x, y + 6]], "bbox": [x, y, 6, 6], "area": 36}
            annotation = {"id": len(annotations) + 1, "image_id": len(images) - 1, "category_id": k + 1, "iscrowd": 0}
            annotations.append(annotation | box)
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(types)]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(record))


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
        missing = tmp_path / "in/images/20085001_template.png"
    else:
        put_tile(tmp_path / "in", "MT_Free", 1, 7)
        missing = tmp_path / "in/MT_Free/Imgs/exp1_num_7.png"
    missing.unlink()
    with pytest.raises(InputError, match=f"DF1.. .*{missing.name}"):
        prepare_real_parts.main(argv)
