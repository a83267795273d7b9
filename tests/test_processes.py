"""Real launches: two processes on the CPU. And the forks of other tests."""

import os
import signal

import pytest
import torch
from folders import make_mvtec
from runs import fork, launch, options, read_lines, wait_for
from safetensors.torch import load_file
from tqdm.auto import tqdm

from defectfill.lora import LORA_FILE


DRIVER = """
import os
import sys

import train_defectfill as t
from safetensors.torch import save_file

kept = {}
original = t.lora_parameters
t.lora_parameters = lambda *models: kept.setdefault("parameters", original(*models))
args = t.parse_args(sys.argv[1:])
out = args.output_dir
t.main(args)
tensors = {k: p.detach().contiguous() for k, p in kept["parameters"].items()}
save_file(tensors, out / f"rank-{os.environ['RANK']}.safetensors")
"""


@pytest.fixture(scope="module", params=["0", "2"], ids=lambda number: f"cache_latents-{number}")
def variants(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory, variants):
    """A run of two processes, with accumulation and gradient checkpointing, through `accelerate launch`."""
    folder = tmp_path_factory.mktemp("two")
    data = make_mvtec(folder / "nut")
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    flags = "--train_batch_size 1 --max_train_steps 3 --gradient_accumulation_steps 2 --gradient_checkpointing".split()
    rates = "--lora_dropout 0 --learning_rate 0.01 --text_encoder_lr 0.01 --checkpointing_steps 2".split()
    argv = options(
        base,
        data,
        folder / "out",
        *flags,
        *rates,
        "--validation_steps",
        "2",
        "--validation_inference_steps",
        "1",
        "--cache_latents",
        variants,
    )
    launch(driver, *argv)
    return folder


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(two_processes):
    first, second = (load_file(two_processes / f"out/rank-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert any(t.abs().max() > 0 for k, t in first.items() if "lora_up" in k)
    assert len(read_lines(two_processes / "out/losses.jsonl")) == 3 and (two_processes / "out/checkpoint-2").exists()


@pytest.mark.slow
def test_two_processes_train_like_one_of_twice_the_batch(two_processes, train, tmp_path, variants):
    flags = "--train_batch_size 2 --max_train_steps 3 --gradient_accumulation_steps 2".split()
    flags += ["--cache_latents", variants]
    rates = "--lora_dropout 0 --learning_rate 0.01 --text_encoder_lr 0.01".split()
    one = load_file(train(*flags, *rates, data=two_processes / "nut") / LORA_FILE)
    two = load_file(two_processes / "out" / LORA_FILE)
    assert all(torch.allclose(one[k], two[k], atol=2e-4) for k in one)
    losses = [
        [line["loss"] for line in read_lines(run / "losses.jsonl")]
        for run in (tmp_path / "out", two_processes / "out")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_child_killed_while_it_shows_progress_stops_nobody():
    list(tqdm(range(2)))
    killed = fork(lambda: (tqdm.get_lock().acquire(), os.kill(os.getpid(), signal.SIGKILL)))
    assert wait_for(killed) == -signal.SIGKILL
    assert list(tqdm(range(2))) == [0, 1]


def test_a_child_that_fails_or_hangs_ends(capfd):
    assert wait_for(fork(lambda: 1 / 0)) == 1 and "ZeroDivisionError" in capfd.readouterr().err
    assert wait_for(fork(signal.pause, seconds=0.5)) == 1 and "test_processes.py" in capfd.readouterr().err
