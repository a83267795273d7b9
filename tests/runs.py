"""Runs of the real commands, in this process or in one without our code, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from toy_model import RESOLUTION

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
