"""Storms of SIGKILL, most of them while training writes checkpoints or generation images; nothing may be lost.

python tests/faults/storms.py --kills 500
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).parents[1]))
import offline  # noqa: E402, F401

import torch  # noqa: E402
from folders import make_mvtec  # noqa: E402
from runs import FAST, content, fork, generate, options, reset_accelerate, wait_for  # noqa: E402
from toy_model import toy_pipeline  # noqa: E402

import generate_defectfill as g  # noqa: E402
import train_defectfill  # noqa: E402
from defectfill.lora import LORA_FILE  # noqa: E402
from defectfill.runs.checkpoint import list_checkpoints, verify_checkpoint  # noqa: E402
from defectfill.runs.files import TEMPORARY  # noqa: E402
from defectfill.runs.manifest import MANIFEST, damage  # noqa: E402


STEPS, IMAGES = 8, 60  # of a run


class Command(NamedTuple):
    name: str
    start: Callable[[Path], None]  # runs it in a folder, from where that is
    reached: Callable[[Path, int, int], bool]  # (folder, what was saved at the start, random): whether to kill it soon
    saved: Callable[[Path], tuple[int, list[str]]]  # how much a folder holds, and what of it is amiss
    results: Callable[[Path], dict]  # what two runs must have in common


def training(base: Path, data: Path) -> Command:
    """A checkpoint after each step, the newest two kept; killed in the first, second or third that a start writes."""
    more = f"--max_train_steps {STEPS} --checkpointing_steps 1 --checkpoints_total_limit 2 --rank 64 --split all"
    more += " --lora_dropout 0.2 --learning_rate 0.01 --resume_from_checkpoint latest"

    def reached(out: Path, saved: int, wait: int) -> bool:
        name = f"checkpoint-{saved + 1 + wait % 3}"
        return (out / f"{TEMPORARY}{name}").exists() or (out / name).exists()

    def saved(out: Path) -> tuple[int, list[str]]:
        found = {c.name: verify_checkpoint(c) for c in list_checkpoints(out)}
        newest = max((int(name.split("-")[1]) for name in found), default=0)
        log = out / "losses.jsonl"
        redone = (log.read_bytes().count(b"\n") if log.exists() else 0) - newest
        return newest, [name for name, wrong in found.items() if wrong] + ["steps"] * (redone > 1)

    def results(out: Path) -> dict:
        files = [out / LORA_FILE, out / "losses.jsonl", *out.glob(f"checkpoint-{STEPS}/*")]
        return {str(f.relative_to(out)): f.read_bytes() for f in files}

    def start(out: Path) -> None:
        reset_accelerate()
        train_defectfill.main(train_defectfill.parse_args(options(base, data, out, *more.split())))

    return Command("training", start, reached, saved, results)


def stub_paint(pipe, images, grids, prompt, seeds, **_) -> torch.Tensor:
    """Candidates that are noise of their seeds."""
    size = images.shape[-1]
    noise = [[torch.rand(3, size, size, generator=torch.Generator().manual_seed(s)) for s in row] for row in seeds]
    return torch.stack([torch.stack(row) for row in noise])


def generation(lora: Path, good: Path) -> Command:
    """Everything real but the models; killed soon after up to five more images."""
    argv = ["--lora", lora, "--image", good, "--mask_source", "random", "--num_images", IMAGES, "--batch_size", 6]

    def start(out: Path) -> None:  # in a child: the stubs need not be taken back
        g.load_pipeline = lambda *args: SimpleNamespace(vae_scale_factor=4, unload_lora_weights=lambda: None)
        g.load_lora = lambda *args: None
        g.inpaint = stub_paint
        g.reconstruct = lambda pipe, images: images / 2 + 0.5
        generate(*argv, *FAST, "--output_dir", out)

    def saved(out: Path) -> tuple[int, list[str]]:
        files = [out / MANIFEST, *out.glob("manifest-part-*")]
        texts = [line for f in files if f.exists() for line in f.read_bytes().splitlines(keepends=True)]
        lines = {line["name"]: line for line in (json.loads(text) for text in texts if text.endswith(b"\n"))}
        return len(lines), [name for name, line in lines.items() if damage(out, name, line, 0)]

    reached = lambda out, saved, wait: len([*out.glob("images/*.png")]) >= saved + wait
    results = lambda out: content(out) | {"names": sorted(os.listdir(out))}
    return Command("generation", start, reached, saved, results)


def is_killed(command: Command, out: Path, rng: random.Random | None) -> bool:
    """Starts the command and kills it, one time in seven at any moment; False if it ends first, or without `rng`."""
    at_start, wait = command.saved(out)[0], rng.randrange(7) if rng else 0
    pid = fork(lambda: command.start(out))
    while rng and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if wait == 6 or command.reached(out, at_start, wait):
            time.sleep(rng.uniform(0, 2 if wait == 6 else 0.06))
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    assert (status := wait_for(pid)) in (-signal.SIGKILL, 0)
    return status != 0


def storm(command: Command, folder: Path, kills: int) -> dict[str, int]:
    """Run after run, each killed and started again until it ends, up to `kills` inside a write; what was lost."""
    rng, table = random.Random(0), dict.fromkeys(["kills", "in a write", "lost", "damaged", "runs", "unequal"], 0)
    assert not is_killed(command, folder / "whole", None)
    expected = command.results(folder / "whole")
    while table["in a write"] < kills:
        out, before, began = folder / f"run-{table['runs']}", 0, time.time()
        while is_killed(command, out, rng if table["in a write"] < kills else None):
            now, amiss = command.saved(out)
            table["kills"] += 1
            table["in a write"] += any(f.stat().st_mtime > began for f in out.rglob(f"{TEMPORARY}*"))
            table["lost"] += now < before
            table["damaged"] += bool(amiss)
            before, began = now, time.time()
        table["runs"] += 1
        table["unequal"] += command.results(out) != expected
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, help="inside a write, of each command")
    kills = parser.parse_args().kills
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), make_mvtec(Path(name, "nut"))
        toy_pipeline().save_pretrained(folder / "base")
        for command in (training(folder / "base", data), generation(folder / "training/whole", data / "train/good")):
            (place := folder / command.name).mkdir()
            print(command.name, storm(command, place, kills), flush=True)


if __name__ == "__main__":
    main()
