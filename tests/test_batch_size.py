"""--auto_find_batch_size: smaller micro-batches if memory is short, and the same optimizer steps."""

import json

from offline import ROOT

import pytest
import torch
from runs import launch, options, read_lines
from safetensors.torch import load_file

import train_defectfill
from defectfill.lora import LORA_FILE
from defectfill.runs.batch_size import fit_batch_size
from defectfill_dataset import InputError, RunError


class Processes:
    """An accelerator whose other process found `other`."""

    device = torch.device("cpu")

    def __init__(self, other: int = 1000, steps: int = 1):
        self.other, self.gradient_accumulation_steps = other, steps

    def gather(self, tensor):
        return torch.cat([tensor, torch.tensor([self.other])])


def fit(wanted: int, fits: int, known: int | None = None, **processes) -> tuple[int, int, list[int]]:
    """The size found, the micro-batches of a step, and the sizes tried, of which those up to `fits` fit."""
    parameter, tried = torch.nn.Parameter(torch.ones(3)), []

    def try_batch(size: int) -> None:
        assert parameter.grad is None  # of the trial before
        tried.append(size)
        (parameter.sum() * size).backward()
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    accelerator = Processes(**processes)
    size = fit_batch_size(accelerator, try_batch, {"p": parameter}, wanted, known)
    assert parameter.grad is None
    return size, accelerator.gradient_accumulation_steps, tried


@pytest.mark.parametrize(
    "wanted, fits, size, tried",
    [(4, 4, 4, [4]), (4, 1, 1, [4, 2, 1]), (12, 5, 3, [12, 6, 3]), (10, 4, 2, [10, 5, 2]), (5, 4, 1, [5, 1])],
)
def test_the_batch_is_halved_until_it_fits_and_the_steps_keep_their_images(wanted, fits, size, tried):
    assert fit(wanted, fits, steps=3) == (size, 3 * wanted // size, tried)


def test_all_processes_take_the_smallest():
    assert fit(8, 8, other=2) == (2, 4, [8])


def test_what_was_found_is_not_tried_again():
    assert fit(8, 8, known=2) == (2, 4, [])


@pytest.mark.parametrize("fits, other", [(0, 8), (8, 0)])
def test_no_batch_fits_on_one_process(fits, other):
    with pytest.raises(RunError, match="DF189 --auto_find_batch_size: a single image does not fit"):
        fit(8, fits, other=other)


def test_other_errors_are_errors():
    def fail(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fit_batch_size(Processes(), fail, {}, 4, None)


@pytest.fixture
def short_memory(monkeypatch):
    """Memory for two samples in a micro-batch."""
    original = train_defectfill.training_losses

    def losses(models, batch, *others):
        found = original(models, batch, *others)
        if len(batch["mask"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return found

    monkeypatch.setattr(train_defectfill, "training_losses", losses)


BY_HAND = ["--train_batch_size", "2", "--gradient_accumulation_steps", "4"]
FOUND = ["--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--auto_find_batch_size"]
RUN = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--gradient_checkpointing"]


def same(one, other) -> bool:
    """Weights, moments and losses, bit for bit."""
    for file in (LORA_FILE, "checkpoint-4/optimizer.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return read_lines(one / "losses.jsonl") == read_lines(other / "losses.jsonl")


def test_training_is_as_with_the_same_numbers_given_and_resumes_with_them(train, tmp_path, short_memory, monkeypatch):
    by_hand = train(*RUN, *BY_HAND, output=tmp_path / "by_hand")
    found = train(*RUN, *FOUND, output=tmp_path / "found")
    assert same(by_hand, found)
    ours, theirs = (json.loads((folder / "run_record.json").read_text()) for folder in (found, by_hand))
    assert ours["options"]["train_batch_size"] == 2 == theirs["options"]["train_batch_size"]
    assert ours["gradient_accumulation_steps"] == 4 == theirs["gradient_accumulation_steps"]
    assert (found / "README.md").read_text() == (by_hand / "README.md").read_text()

    stopped = train(*RUN, *FOUND, "--max_train_steps", "2", output=tmp_path / "stopped")
    monkeypatch.undo()  # memory for all: what the run began with is what counts
    again = ["--resume_from_checkpoint", "latest"]
    assert same(by_hand, train(*RUN, *FOUND, *again, output=stopped))
    with pytest.raises(InputError, match="DF320 train_batch_size"):
        train(*RUN, *FOUND, *again, "--train_batch_size", "8", output=stopped)


def test_memory_for_all_changes_nothing(train, tmp_path):
    with_flag = train(*RUN, "--train_batch_size", "4", "--auto_find_batch_size", output=tmp_path / "with")
    assert same(train(*RUN, "--train_batch_size", "4", output=tmp_path / "without"), with_flag)


@pytest.mark.slow
def test_two_processes_try_each_for_itself(base, data, tmp_path):
    runs = [tmp_path / "with", tmp_path / "without"]
    for folder, flags in zip(runs, (["--auto_find_batch_size"], [])):
        launch(ROOT / "train_defectfill.py", *options(base, data, folder, *RUN, *flags))
    assert same(*runs)
