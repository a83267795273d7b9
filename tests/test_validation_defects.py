"""`--validation_defects`: references that are never trained on, and choose the checkpoint."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from folders import make_mvtec
from runs import launch, options, reset_accelerate
from safetensors.torch import load_file

import train_defectfill
from defectfill.lora import LORA_FILE
from defectfill.runs.validation import best_step, measured_at, validation_record
from defectfill_dataset import InputError, validation_split


FLAGS = "--split all --validation_defects 1 --checkpointing_steps 2 --learning_rate 0.01".split()


def record_of(out) -> dict:
    return json.loads((out / "run_record.json").read_text())


# Which images


def names(data: DatasetDict, split: str) -> list[str]:
    return list(dict.fromkeys(data[split]["source_file"]))


def make_data(**types: str) -> DatasetDict:
    """A letter for each image that has a type."""
    rows = [{"defect": defect, "source_file": name} for defect, images in types.items() for name in images]
    return DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list([{"defect": "x", "source_file": "t"}]))


def test_the_last_images_of_each_type_are_held_out_and_one_stays():
    data = make_data(hole="dabc", crack="ef", stain="g")
    assert validation_split(data, 0) is data
    assert sorted(names(validation_split(data, 1), "validation_defects")) == ["d", "f"]
    assert sorted(names(validation_split(data, 2), "validation_defects")) == ["c", "d", "f"]
    all_but_one = validation_split(data, 9)
    assert sorted(names(all_but_one, "train")) == ["a", "e", "g"]
    assert names(all_but_one, "test") == ["t"]


def test_an_image_goes_with_all_of_its_types():
    data = validation_split(make_data(hole="abc", crack="cd", stain="c"), 1)
    assert names(data, "validation_defects") == ["b", "d"]  # c has the only stain
    data = validation_split(make_data(hole="abc", crack="bc"), 1)
    assert names(data, "validation_defects") == ["c"] and len(data["validation_defects"]) == 2


def test_one_image_of_each_type_is_too_few():
    with pytest.raises(InputError, match="DF187 --validation_defects 2: no defect type has two"):
        validation_split(make_data(hole="a", crack="b"), 2)


@pytest.mark.parametrize("number", [-1, 10_001])
def test_numbers_that_cannot_be(train, number):
    with pytest.raises(InputError, match="DF187 --validation_defects"):
        train("--validation_defects", number)


# What is measured


def figures(*errors: float) -> dict:
    return {"loss": 0.5, "x0_error": {"defect": dict(zip("abc", errors)), "object": {"a": 9.0}, "variance": 1.0}}


def test_the_best_step_has_the_lowest_mean_error_of_x_0():
    measured = measured_at(10, figures(1, 2)) | measured_at(20, figures(0.5, 1.5)) | measured_at(100, figures(1, 1))
    assert [x["mean_x0_error"] for x in measured.values()] == [1.5, 1, 1]
    assert best_step(measured) == 20
    assert best_step(measured | measured_at(9, figures(float("nan"), 0))) == 20
    assert measured_at(10, None) == {}
    assert best_step(measured_at(9, figures(float("nan")))) is None and validation_record([], {}) is None


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    reset_accelerate()
    argv = options(base, make_mvtec(folder / "nut"), folder / "out", *FLAGS, "--max_train_steps", "4")
    train_defectfill.main(train_defectfill.parse_args(argv))
    reset_accelerate()
    return folder / "out"


def test_the_record_has_the_figures_by_step_and_the_best(whole):
    record = record_of(whole)
    validation = record["validation"]
    assert record["images"] == {"train": 3, "good": 3, "validation_defects": 1}
    assert validation["images"] == ["test/hole/003.png"]
    errors = {int(step): x["mean_x0_error"] for step, x in validation["steps"].items()}
    assert list(errors) == [2, 4] and errors[validation["best_step"]] == min(errors.values())
    for step in validation["steps"].values():
        assert list(step["x0_error"]["defect"]) == ["999", "900", "800", "600", "400"] and step["loss"] > 0
    assert "test/hole/003.png" in json.loads((whole / "split.json").read_text())["train"]  # a reference all the same


def test_validation_defects_are_not_trained_on(base, data, tmp_path):
    reset_accelerate()
    args = train_defectfill.parse_args(options(base, data, tmp_path / "out", *FLAGS))
    prepared = train_defectfill.prepare(args, train_defectfill.Accelerator(cpu=True))
    reset_accelerate()
    trained = {crop.source_file for crop in prepared.samples.crops}
    held = {crop.source_file for crop in prepared.validation.crops}
    assert held == {"test/hole/003.png"} and trained == {f"test/hole/00{i}.png" for i in range(3)}
    assert prepared.record["appearance"]["hole"] and not prepared.held_out.crops


def test_a_resumed_run_keeps_earlier_figures_and_measuring_changes_no_weight(train, tmp_path, whole):
    part = train(*FLAGS, "--max_train_steps", "2", data=whole.parent / "nut")
    assert list(record_of(part)["validation"]["steps"]) == ["2"]
    more = ["--max_train_steps", "4", "--resume_from_checkpoint", "latest"]
    train(*FLAGS, *more, output=part, data=whole.parent / "nut")
    assert record_of(part)["validation"] == record_of(whole)["validation"]
    often = train(*FLAGS, "--max_train_steps", "4", "--checkpointing_steps", "1", output=tmp_path / "often",
                  data=whole.parent / "nut")  # fmt: skip
    assert list(record_of(often)["validation"]["steps"]) == ["1", "2", "3", "4"]
    tensors = [load_file(out / LORA_FILE) for out in (whole, part, often)]
    assert all(torch.equal(tensors[0][k], other[k]) for other in tensors for k in tensors[0])


def test_the_best_checkpoint_outlives_the_limit(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_defectfill, "measured_at", lambda step, _: {str(step): {"mean_x0_error": abs(step - 2)}})
    keep_one = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "1"]
    out = train(*FLAGS, *keep_one, "--max_train_steps", "5")
    assert record_of(out)["validation"]["best_step"] == 2
    assert sorted(folder.name for folder in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]


@pytest.mark.parametrize("number", [0, 2])
def test_a_run_resumes_only_with_the_number_it_began_with(train, whole, number):
    with pytest.raises(InputError, match="DF320 data_sha256(.|\n)*DF320 validation_defects_sha256"):
        train(*FLAGS, "--validation_defects", number, "--resume_from_checkpoint", "latest", output=whole,
              data=whole.parent / "nut")  # fmt: skip


@pytest.mark.slow
def test_two_processes_measure_once_and_go_on(base, data, tmp_path):
    launch(train_defectfill.__file__, *options(base, data, tmp_path / "out", *FLAGS, "--max_train_steps", "4"))
    assert list(record_of(tmp_path / "out")["validation"]["steps"]) == ["2", "4"]
