"""What a run writes as it goes, and what it says when it cannot go on."""

import errno
import json
import math
import shutil

import pytest
import torch
from runs import read_lines
from safetensors import SafetensorError

import train_defectfill
from defectfill.lora import LORA_FILE
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import disks, record
from defectfill.runs.files import write_json
from defectfill.runs.record import LossLog
from defectfill_dataset.commands import exit_on_input_error


def strict_lines(path) -> list[dict]:
    """The lines of a file that any JSON parser reads."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def fails(run, capsys) -> str:
    """The one line with which a command fails, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("DF")]
    assert ended.value.code == 1 and len(lines) == 1
    return lines[0]


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of a step NaN: poison(3)."""

    def at(step: int) -> None:
        original, calls = train_defectfill.training_losses, []

        def poisoned(*args):
            losses = original(*args)
            if torch.is_grad_enabled():
                calls.append(1)
                if len(calls) == step:
                    losses["loss"] = losses["loss"] * math.nan
            return losses

        monkeypatch.setattr(train_defectfill, "training_losses", poisoned)

    return at


# Losses


def test_a_stop_at_a_loss_that_is_not_finite_leaves_a_line_of_every_step(train, tmp_path, poison, capsys):
    poison(3)
    message = fails(lambda: train("--max_train_steps", "5"), capsys)
    lines = strict_lines(tmp_path / "out/losses.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[2]["loss"] is None and lines[2]["l_def"] > 0
    assert message.startswith("DF323 step 3: ") and "no checkpoint was written" in message
    assert "is good" not in message and "--learning_rate" in message


def test_the_checkpoint_that_is_good_is_one_that_exists(train, tmp_path, poison, capsys):
    poison(4)
    flags = ["--max_train_steps", "5", "--checkpointing_steps", "1"]
    message = fails(lambda: train(*flags), capsys)
    assert "checkpoint-3 is good" in message
    (tmp_path / "out/checkpoint-3/optimizer.safetensors").write_bytes(b"damaged")
    poison(2)
    message = fails(lambda: train(*flags, "--resume_from_checkpoint", "checkpoint-2"), capsys)
    assert "checkpoint-3 is good" in message  # written anew
    assert [line["step"] for line in strict_lines(tmp_path / "out/losses.jsonl")] == [1, 2, 3, 4]


def test_losses_are_on_disk_after_each_step(train, tmp_path, monkeypatch):
    seen, write = [], LossLog.write

    def write_and_look(self, line):
        write(self, line)
        seen.append(len(read_lines(tmp_path / "out/losses.jsonl")))

    monkeypatch.setattr(LossLog, "write", write_and_look)
    train("--max_train_steps", "3")
    assert seen == [1, 2, 3]


def test_a_loss_that_is_not_a_number_is_null(tmp_path):
    log = LossLog(tmp_path / "losses.jsonl", 0)
    for step, loss in enumerate((1.0, math.inf, -math.inf, math.nan, 3.0), 1):
        log.write({"step": step, "loss": loss, "never": math.nan})
    assert [line["loss"] for line in strict_lines(tmp_path / "losses.jsonl")] == [1.0, None, None, None, 3.0]
    assert log.summary() == {"first_tenth": {"loss": 1, "never": None}, "last_tenth": {"loss": 3, "never": None}}
    write_json(tmp_path / "x.json", {"a": [math.nan, {"b": math.inf}], "c": 1})
    assert strict_lines(tmp_path / "losses.jsonl") and json.loads((tmp_path / "x.json").read_text()) == {
        "a": [None, {"b": None}], "c": 1
    }  # fmt: skip


def test_a_resumed_log_has_no_step_twice(tmp_path):
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": step})
    for torn in ('{"step": 6, "lo', '{"step": 6, "lo\n{"step": 7}\n', "\0\0\0\n"):
        with path.open("a") as stream:
            stream.write(torn)
        log = LossLog(path, 3)
        log.write({"step": 4, "loss": 40})
        assert strict_lines(path) == [{"step": n, "loss": n} for n in (1, 2, 3)] + [{"step": 4, "loss": 40}]


def test_losses_that_find_no_room_are_written_later(tmp_path, monkeypatch, caplog):
    log = LossLog(tmp_path / "losses.jsonl", 0)
    log.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(record, "append_text", half_written)
        patch.setattr(record, "atomic_write", full_disk)
        for step in (2, 3):
            log.write({"step": step})
        log.flush()
    assert caplog.text.count("could not be written") == 1
    log.write({"step": 4})
    log.flush()
    assert [line["step"] for line in strict_lines(tmp_path / "losses.jsonl")] == [1, 2, 3, 4]


def half_written(path, text):
    with path.open("a") as stream:
        stream.write(text[:3])
    full_disk()


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


# The last save


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A fallback that cannot be made, tried once."""
    monkeypatch.setattr(disks, "ROOM_PATIENCE", 0.0)
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file/fallback")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_full_disk_at_the_last_save_is_one_line(train, tmp_path, monkeypatch, capsys, nowhere, error):
    save = train_defectfill.save_lora

    def full(path, *args):
        if path.parent == tmp_path / "out":
            raise error
        save(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_defectfill, "save_lora", full)
        message = fails(lambda: train("--fallback_dir", nowhere), capsys)
    assert message.startswith("DF324 ") and str(error) in message
    assert "--resume_from_checkpoint latest" in message and "checkpoint-2 is good" in message
    assert (train("--resume_from_checkpoint", "latest") / LORA_FILE).exists()


def test_a_full_disk_without_any_checkpoint_promises_nothing(train, tmp_path, monkeypatch, capsys, nowhere):
    monkeypatch.setattr(train_defectfill, "save_lora", full_disk)
    message = fails(lambda: train("--fallback_dir", nowhere), capsys)
    assert message.startswith("DF324 ") and "no checkpoint was written" in message and "resume" not in message
    assert not checkpoints.list_checkpoints(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
