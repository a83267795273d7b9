"""Runs of the real commands, in this process or in one without our code, and what they leave."""

import faulthandler
import functools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from toy_model import RESOLUTION
from tqdm import tqdm

import generate_defectfill
from defectfill_scripts import check_data


def options(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    common = f"""--pretrained_model_name_or_path {base} --train_data_dir {data} --output_dir {output}
        --resolution {RESOLUTION} --max_train_steps 2 --train_batch_size 2 --lr_warmup_steps 2 --rank 4 --lora_alpha 8
        --validation_steps 0 --report_to none --checkpointing_steps 100"""
    return [*common.split(), *map(str, more)]


def reset_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


FULL = functools.partial(pytest.param, marks=pytest.mark.full)  # a variant that only scripts/test.sh --full runs
PARENT = os.getpid()
# tqdm's own lock is shared with forked children: one killed while it draws a bar keeps it, and the next bar waits
# for ever. Set before the first bar of any kind, this one is taken by all kinds.
tqdm.set_lock(threading.RLock())


def fork(function: Callable[[], object], seconds: float = 300) -> int:
    """Runs `function` in a forked child and returns the child's id.

    One that hangs shows where, and ends with 1; a child's child has no such timer.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # another thread may have held the parent's
        if os.getppid() == PARENT:  # a child's child would wait for ever for its parent's timer, which it replaces
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # an exception must not go on through the child's copy of the tests


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def wait_for(pid: int) -> int:
    """The exit status of a child; a signal's number counts below zero."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def launch(script: Path, *argv, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Runs a script in two processes on the CPU, through `accelerate launch`; it must succeed, unless not `check`."""
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, script, *map(str, argv)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | env
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


FAST = ["--num_inference_steps", 2, "--num_candidates", 3, "--selection", "rmse"]  # of a generation


def generate(*argv) -> None:
    generate_defectfill.main(generate_defectfill.parse_args([str(a) for a in argv]))


OURS = ["defectfill", "defectfill_dataset", "defectfill_scripts", "generate_defectfill", "train_defectfill"]


def in_clean_process(code: str, *argv, cwd: Path, **env: str) -> str:
    """Runs Python code that cannot import anything of ours; returns what it prints."""
    code = f"import sys; sys.modules |= dict.fromkeys({OURS})\n{code}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    command = [sys.executable, "-I", "-W", "error::DeprecationWarning:__main__", "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(*argv) -> int:
    """The exit status of check_data.py."""
    try:
        check_data.main(check_data.parse_args([str(a) for a in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


def content(folder) -> dict:
    """Every file's bytes; the manifest without its times."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "manifest.jsonl")]
    return files | {"manifest": lines}
