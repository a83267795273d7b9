"""scripts/gpu_check.py at toy size on the CPU, and the clock of a training's steps."""

import json
import math
import os
import subprocess
import sys

from offline import ROOT

import pytest
import torch
from runs import read_lines

from defectfill.runs import speed as clocks
from defectfill_scripts import gpu_check
from defectfill_scripts.gpu_check import STEPS, TOY, Check, Step, StepError


TINY_BASE = ROOT / "scripts/tiny_base"
GPU = torch.cuda.is_available()


@pytest.mark.slow
def test_the_check_measures_and_goes_on_after_what_fails(tmp_path):
    names = ["small-fp16", "small-bf16", "train-bf16-b1", "generate"]
    argv = f"--toy --base {TINY_BASE} --minutes 10 --output_dir {tmp_path} --only {' '.join(names)}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/gpu_check.py"), *argv.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = {line["name"]: line for line in read_lines(tmp_path / "results.jsonl")}
    assert list(results) == ["environment", *names]
    assert all(line["seconds"] > 0 for line in results.values())
    status = {name: line["status"] for name, line in results.items()}
    if not GPU:
        assert status["small-fp16"] == "refused"
        assert results["environment"]["gpu"] is None and "DF189" in results["small-fp16"]["error"]
    assert status["small-bf16"] == "ok", results["small-bf16"]
    assert math.isfinite(results["small-bf16"]["last_loss"])
    assert results["train-bf16-b1"]["seconds_per_step"] > 0 and results["train-bf16-b1"]["batch_size"] == 1
    assert results["generate"]["seconds_per_image"] > 0
    page = (tmp_path / "gpu_check.md").read_text()
    assert all(f"| `{name}` |" in page for name in names) and "Which flags fit" in page
    assert {file.name for file in tmp_path.iterdir()} == {"gpu_check.md", "logs", "results.jsonl"}


def step_result(tmp_path, monkeypatch, run, minutes: float = 1, limit: int = 60, expected: float = 0) -> dict:
    """The result of one step that runs `run`."""
    check = Check(tmp_path, TOY, None, minutes)
    check.work.mkdir(), check.logs.mkdir()
    monkeypatch.setitem(STEPS, "tried", Step(run, "--flag", limit))
    return gpu_check.run_step(check, "tried", expected)


def test_a_flag_that_a_command_does_not_know_is_not_available(tmp_path, monkeypatch):
    run = lambda check, name, flags: check.command("train_defectfill", "--output_dir out --no_such_flag 3")
    result = step_result(tmp_path, monkeypatch, run)
    assert (result["ok"], result["status"]) == (False, "not available")
    assert result["error"] == "unrecognized arguments: --no_such_flag 3"


def test_a_step_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    result = step_result(
        tmp_path, monkeypatch, lambda check, *_: check.call(subprocess.call, ["sleep", "300"]), limit=3
    )
    assert result["status"] == "timeout" and result["seconds"] < 100


def test_a_step_without_time_left_is_skipped(tmp_path, monkeypatch):
    assert step_result(tmp_path, monkeypatch, None, minutes=1, expected=70)["status"] == "skipped"


def test_stable_diffusions_sizes_need_a_gpu(tmp_path):
    with pytest.raises(StepError, match="no GPU") as caught:
        _ = Check(tmp_path, TOY, None, 1).base
    assert caught.value.status == "skipped"


@pytest.mark.parametrize(
    "text, status",
    [
        ("x.py: error: unrecognized arguments: --x", "not available"),
        ("torch.OutOfMemoryError: CUDA out of memory.\nTried to allocate 2 GiB", "out of memory"),
        ("\nDF189 --mixed_precision fp16: needs a GPU", "refused"),
        ("\nDF323 step 3: loss nan", "failed"),
        ("Traceback\nValueError: no", "failed"),
        ("", "failed"),
    ],
)
def test_why_a_step_ended(tmp_path, text, status):
    log = tmp_path / "log"
    log.write_text(text)
    assert gpu_check.failure(log).status == status


def test_advice_is_the_fastest_that_fits():
    results = [
        {"ok": True, "flags": "--small", "samples_per_second": 5, "peak_reserved_gib": 5.0},
        {"ok": True, "flags": "--large", "samples_per_second": 9, "peak_reserved_gib": 9.0},
        {"ok": True, "flags": "", "seconds_per_image": 3, "peak_reserved_gib": 7.0},
        {"ok": False, "flags": "--broken"},
    ]
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in gpu_check.advice(results)}
    assert rows["| 6 GB"] == ["`--small` (5.0 GiB)", "none measured |"]
    assert rows["| 12 GB"] == ["`--large` (9.0 GiB)", "`no flags` (7.0 GiB) |"]


def test_the_list_names_every_step(capsys):
    gpu_check.main(gpu_check.parse_args(["--list"]))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STEPS)


def test_the_clock_leaves_out_warm_up_checkpoints_and_validation(monkeypatch):
    clock, now = clocks.StepClock(), iter([0, 10, 20, 30, 40, 41, 61, 64])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    for step in range(1, 9):
        clock.tick()
        if step == 6:
            clock.interrupt()
    assert clock.seconds == [1, 3]  # steps 6 and 8; the seventh came after a checkpoint
    assert clock.summary(torch.device("cpu")) == {"seconds_per_step": 2}


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("flags", [("--mixed_precision", "fp16"), ("--mixed_precision", "bf16", "--use_8bit_adam")])
def test_training_on_a_gpu_resumes_and_tells_its_memory(train, tmp_path, flags):
    train(
        *flags,
        "--max_train_steps",
        "4",
        output=tmp_path / "half",
    )
    out = train(*flags, "--max_train_steps", "8", "--resume_from_checkpoint", "latest", output=tmp_path / "half")
    assert [line["step"] for line in read_lines(out / "losses.jsonl")] == [*range(1, 9)]
    speed = json.loads((out / "run_record.json").read_text())["speed"]
    assert 0 < speed["peak_memory_gib"] <= speed["peak_reserved_gib"]


@pytest.mark.parametrize("name", ["results.jsonl", "gpu_check.md"])
def test_files_of_something_else_stay(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gpu_check, "preload", None)  # not reached
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match="not of this script"):
        gpu_check.main(gpu_check.parse_args(["--output_dir", str(tmp_path)]))
    assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(SystemExit, match="cannot be used"):
        gpu_check.check_output(tmp_path / name / "out")


def test_a_folder_work_of_something_else_stays(tmp_path, monkeypatch):
    """Only the check's own, by a name that nothing else has, is deleted."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    monkeypatch.setattr(gpu_check, "preload", lambda: None)
    monkeypatch.setattr(gpu_check, "STEPS", {"environment": Step(lambda *args: {"gpu": None})})
    monkeypatch.setattr(gpu_check, "page", lambda *args: "# GPU check\n")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *args: None)
    for _ in range(2):
        gpu_check.main(gpu_check.parse_args(["--output_dir", str(tmp_path)]))
        assert not (tmp_path / "logs/environment.log").exists()
        (tmp_path / "logs/environment.log").write_text("of an earlier check")
    assert {f.name for f in tmp_path.iterdir()} == {"work", "logs", "results.jsonl", "gpu_check.md"}
    assert (tmp_path / "work/thesis.txt").exists()
