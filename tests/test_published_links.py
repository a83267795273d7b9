"""What is published lies in the folder that was given: no link and no row of a table reaches the rest of the disk."""

import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from drawn import write_image, write_mask
from folders import make_mvtec
from generated_folder import export

from defectfill_dataset import InputError, check_pairs, load_prepared
from defectfill_dataset.writers import datasets as writers
from defectfill_scripts import prepare_data


def prepare(data: Path, out: Path, *more) -> None:
    prepare_data.main(prepare_data.parse_args([str(a) for a in (data, "--output_dir", out, "--split", "all", *more)]))


def replace(file: Path, elsewhere: Path) -> None:
    """The file by a link to it at another place."""
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "kind, linked",
    [
        ("image", "test/hole/000.png"), ("mask", "ground_truth/hole/000_mask.png"), ("good", "train/good/001.png"),
        ("folder", "test/hole"), ("masks' folder", "ground_truth"), ("object", ""),
    ],
)  # fmt: skip
def test_links_out_of_a_dataset_are_not_published(tmp_path, kind, linked):
    root = make_mvtec(tmp_path / "parts/nut")
    replace(root / linked, tmp_path / "private" / (Path(linked).name or "nut"))
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "parts", tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"DF200"} and not (tmp_path / "out").exists()
    assert "--follow_links" in str(caught.value) and f"nut/{linked}".rstrip("/") in str(caught.value)
    prepare(tmp_path / "parts", tmp_path / "out", "--follow_links")
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 4


def test_links_inside_a_dataset_are_published(tmp_path):
    root = make_mvtec(tmp_path / "parts/nut")
    replace(root / "test/hole/000.png", tmp_path / "parts/store/x.png")
    (tmp_path / "linked").symlink_to(tmp_path / "parts")
    prepare(tmp_path / "linked", tmp_path / "out")


@pytest.mark.parametrize("linked", ["generated/images/000_0.png", "generated/masks/000_0.png", "photos/000.png"])
def test_links_out_of_generated_and_good_folders_are_not_exported(tmp_path, generated, photos, linked):
    replace(tmp_path / linked, tmp_path / "private/x.png")
    with pytest.raises(InputError) as caught:
        export(tmp_path / "out", "coco", generated, "--good", photos)
    (problem,) = caught.value.problems
    assert problem.code == "DF200" and linked.endswith(problem.where)
    export(tmp_path / "out", "coco", generated, "--good", photos, "--follow_links")


@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_row_that_names_a_file_of_the_machine_is_refused(tmp_path, column):
    files = {"image": tmp_path / "private/x.png", "mask": tmp_path / "private/y.png"}
    write_image(files["image"]), write_mask(files["mask"])
    row = {"object": "nut", "defect": "hole", "source_file": "x.png"}
    row |= {key: {"bytes": file.read_bytes(), "path": file.name} for key, file in files.items()}
    stranger = row | {column: {"bytes": None, "path": str(files[column])}}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_list([row, stranger], features=writers.FEATURES)
    pq.write_table(table.data.table, tmp_path / "data/train.parquet")
    with pytest.raises(InputError) as caught:
        load_prepared(str(tmp_path / "data"), None, None)
    (problem,) = caught.value.problems
    assert problem.code == "DF201" and "row 1 of its split 'train'" in problem.what and column in problem.what


@pytest.mark.parametrize("file_format", writers.WRITERS)
def test_what_prepare_data_writes_is_read(tmp_path, data, file_format):
    prepare(data, tmp_path / "out", "--format", file_format)
    check_pairs(load_prepared(str(tmp_path / "out"), None, None)["train"])
