"""What several processes of one run must agree on, and when each of them may leave."""

import json
import os
import signal
from types import SimpleNamespace

from offline import ROOT

import pytest
import torch
from folders import make_mvtec
from runs import FAST, generate, launch, options, read_lines, reset_accelerate
from safetensors.torch import load_file

import train_defectfill
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs.processes import check_launch, from_main_process, launch_notes, slow_precision
from defectfill.runs.signals import StopSignal
from defectfill_dataset import InputError


# Signals


class TwoProcesses:
    """An accelerator whose gather takes a while: `meanwhile` happens in it."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, meanwhile, other: int = 0):
        self.meanwhile, self.other = meanwhile, other

    def gather(self, tensor):
        gathered = torch.stack([tensor, torch.tensor(self.other)])
        self.meanwhile()
        return gathered


@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield StopSignal()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_during_the_gather_stops_at_the_next_step(stop):
    """Not at this one: the other process has not heard of it, and would wait for this one for ever."""
    for _ in range(50):
        stop.number = None
        assert not stop.requested(TwoProcesses(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert stop.requested(TwoProcesses(lambda: None)) and stop.exit_status == 143


def test_another_process_stops_this_one(stop):
    assert stop.requested(TwoProcesses(lambda: None, other=signal.SIGINT)) and stop.exit_status == 130


GATHERS = """
import os
import signal

from accelerate import Accelerator

from defectfill.runs.signals import StopSignal

accelerator, stop = Accelerator(cpu=True), StopSignal()
gather, rank = accelerator.gather, accelerator.process_index


def gather_and_signal(tensor):
    gathered = gather(tensor)
    os.kill(os.getpid(), signal.SIGTERM)
    return gathered


for number in range(50):
    stop.number = None
    accelerator.wait_for_everyone()
    accelerator.gather = gather_and_signal if rank == number % 2 else gather
    first = stop.requested(accelerator)
    accelerator.gather = gather
    second = stop.requested(accelerator)
    assert (first, second) == (False, True), (number, rank, first, second)
    assert stop.exit_status == 143
    print("stopped", rank, number, flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_sigterm_during_the_gather_of_two_processes_50_times(tmp_path):
    (tmp_path / "gathers.py").write_text(GATHERS)
    assert launch(tmp_path / "gathers.py").stdout.count("stopped") == 100


# Launches


@pytest.fixture
def no_launch(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    "environment, code, words",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DF188", "DeepSpeed splits weights"),
        ({"ACCELERATE_USE_FSDP": "true"}, "DF188", "FSDP splits weights"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "DF188", "Megatron"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "DF187", "at least 1"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, "DF187", "at least 1"),
        ({"LOCAL_WORLD_SIZE": "2"}, "DF189", "2 processes were launched, but there are 0 GPUs"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_first(no_launch, train, monkeypatch, environment, code, words):
    monkeypatch.setattr(train_defectfill, "Accelerator", None)  # not even begun
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{code} .*{words}"):
        train()
    if code == "DF188":
        with pytest.raises(InputError, match=f"{code} .*{words}"):
            generate("--image", "x", "--lora", "x", "--output_dir", "x", "--mask", "x")
    else:
        check_launch(training=False)


def test_processes_may_share_a_cpu_but_not_a_gpu(no_launch, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for training in (True, False):
        with pytest.raises(InputError, match="3 processes were launched, but there are 2 GPUs"):
            check_launch(training)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launch(training=True)


@pytest.mark.slow
def test_multi_gpu_without_a_gpu_ends_with_one_message(base, data, tmp_path):
    argv = options(base, data, tmp_path / "out")
    ended = launch(ROOT / "train_defectfill.py", *argv, check=False, ACCELERATE_USE_CPU="no", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode and not (tmp_path / "out").exists()
    assert ended.stderr.rstrip().splitlines()[-1].startswith("DF189 accelerate launch --multi_gpu: 2 processes")
    assert ended.stderr.count("DF189") == 1


def test_what_the_environment_overrides_is_told_and_recorded(no_launch, train, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = train("--gradient_accumulation_steps", "3", "--mixed_precision", "no")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 is used, not --gradient_accumulation_steps 3" in caplog.text
    assert "--mixed_precision no is used, not ACCELERATE_MIXED_PRECISION=bf16" in caplog.text
    record = json.loads((out / "run_record.json").read_text())
    expected = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert record["environment"].items() >= expected.items()
    assert record["gradient_accumulation_steps"] == 2 and record["mixed_precision"] == "no"


def test_what_agrees_is_not_told(no_launch, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    cpu = SimpleNamespace(mixed_precision="no", device=torch.device("cpu"))
    assert launch_notes(2, "bf16", cpu) == launch_notes(2, None, cpu) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_cpu_emulates_is_told(no_launch, monkeypatch, precision):
    cpu, gpu = (SimpleNamespace(mixed_precision=precision, device=torch.device(d)) for d in ("cpu", "cuda"))
    support = f"_is_mkldnn_{precision}_supported"
    monkeypatch.setattr(torch.ops.mkldnn, support, lambda: True)
    assert launch_notes(1, precision, cpu) == []
    monkeypatch.setattr(torch.ops.mkldnn, support, lambda: False)
    [note] = launch_notes(1, precision, cpu)
    assert note.startswith(f"--mixed_precision {precision} is many times slower")
    assert launch_notes(1, precision, gpu) == slow_precision("no", cpu.device) == []


# Two processes that resume

DRIVER = """
import os
import signal
import sys
import time

import train_defectfill as t
from safetensors.torch import save_file

rank, kept = int(os.environ["RANK"]), {}
original = t.lora_parameters
t.lora_parameters = lambda *models: kept.setdefault("parameters", original(*models))
args = t.parse_args(sys.argv[1:])
out = args.output_dir
if rank == 1 and "OTHER_FOLDER" in os.environ:
    args.output_dir = out.with_name("other")
if rank == 1 and "OTHER_DATA" in os.environ:
    args.train_data_dir = os.environ["OTHER_DATA"]
if "KILLED_AT" in os.environ:
    clip, calls = t.Accelerator.clip_grad_norm_, []

    def clip_or_die(self, *args):
        calls.append(1)
        if rank == 1 and len(calls) == int(os.environ["KILLED_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(self, *args)

    t.Accelerator.clip_grad_norm_ = clip_or_die
if "SLOW_PUSH" in os.environ:
    finish, end = t.finish, t.Accelerator.end_training
    t.finish = lambda *args: (finish(*args), time.sleep(2), print(rank, "finished", flush=True))
    t.Accelerator.end_training = lambda self: (print(rank, "leaves", flush=True), end(self))
t.main(args)
tensors = {k: p.detach().contiguous() for k, p in kept["parameters"].items()}
save_file(tensors, out.parent / f"rank-{rank}.safetensors")
"""
LONG = "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 0.01 --train_batch_size 1".split()


@pytest.fixture
def driver(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    return tmp_path / "driver.py"


@pytest.mark.slow
def test_two_processes_killed_and_resumed_though_one_sees_no_checkpoint(driver, base, data, tmp_path):
    """Bit for bit like two that were not killed."""
    whole = options(base, data, tmp_path / "whole/out", *LONG)
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    launch(driver, *whole)
    argv = options(base, data, tmp_path / "killed/out", *LONG)
    assert launch(driver, *argv, check=False, KILLED_AT="4").returncode
    assert [c.name for c in checkpoints.list_checkpoints(tmp_path / "killed/out")] == ["checkpoint-2"]
    launch(driver, *argv, "--resume_from_checkpoint", "latest", OTHER_FOLDER="yes")
    ranks = [load_file(tmp_path / f"{run}/rank-{n}.safetensors") for run in ("whole", "killed") for n in range(2)]
    assert all(torch.equal(ranks[0][k], rank[k]) for rank in ranks for k in rank)
    assert any(t.abs().max() > 0 for k, t in ranks[0].items() if "lora_up" in k)
    losses = [read_lines(tmp_path / f"{run}/out/losses.jsonl") for run in ("whole", "killed")]
    assert losses[0] == losses[1] and [line["step"] for line in losses[0]] == [1, 2, 3, 4]
    assert not (tmp_path / "killed/other").exists()


@pytest.mark.slow
def test_processes_that_read_other_data_are_refused(driver, base, data, tmp_path):
    argv = options(base, data, tmp_path / "out")
    other = make_mvtec(tmp_path / "other/nut", {"hole": 9})  # three train, not two
    ended = launch(driver, *argv, check=False, OTHER_DATA=str(other))
    assert ended.returncode and "DF322 data_sha256: process 0 has" in ended.stderr
    assert not (tmp_path / "out/losses.jsonl").exists()


def test_what_one_process_reads_or_raises_reaches_all():
    reset_accelerate()
    assert from_main_process(lambda: 3, True) == 3
    with pytest.raises(ZeroDivisionError):
        from_main_process(lambda: 1 / 0, True)
    assert from_main_process(lambda: 3, False) is None  # a process alone has nobody to hear from


@pytest.mark.slow
def test_no_process_leaves_before_the_first_has_saved_and_pushed(driver, base, data, tmp_path):
    done = launch(driver, *options(base, data, tmp_path / "out", "--train_batch_size", "1"), SLOW_PUSH="yes")
    lines = [line for line in done.stdout.splitlines() if line.endswith(("finished", "leaves"))]
    assert lines[0] == "0 finished" and sorted(lines[1:]) == ["0 leaves", "1 leaves"]


LEAVES = """
import runpy
import sys

import torch.distributed as group
from accelerate import PartialState

leave = PartialState.destroy_process_group
PartialState.destroy_process_group = lambda *given: (print("goes", flush=True), leave(*given))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("is out" if not group.is_initialized() else "is in", flush=True)
"""


@pytest.fixture
def small_runs(trained, data) -> dict[str, list]:
    """Arguments of a short run of each script, all but the output folder."""
    sizes = "--resolution 32 --pictures 20 --workers 1 --crop_batch_size 4 --whole_batch_size 4 --decoder_steps 0"
    steps, random_masks = "--vae_steps 1 --crop_steps 1 --whole_steps 1", ["--mask_source", "random", *FAST]
    small_base = ["--base", ROOT / "scripts/tiny_base", *f"{sizes} {steps}".split()]
    return {
        "generate_defectfill.py": ["--lora", trained, "--image", data / "train/good", *random_masks],
        "scripts/make_tiny_base.py": small_base,
        "scripts/make_tiny_base.py --scenes_only": small_base,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["generate_defectfill.py", "scripts/make_tiny_base.py", "scripts/make_tiny_base.py --scenes_only"]
)
def test_every_process_leaves_the_group(small_runs, tmp_path, command):
    """One that ended inside it, while the other still worked, has aborted: the launcher then ends with status 1."""
    (tmp_path / "driver.py").write_text(LEAVES)
    script, *flags = command.split()
    argv = [ROOT / script, *flags, *small_runs[command], "--output_dir", tmp_path / "out"]
    done = launch(tmp_path / "driver.py", *argv)
    assert done.stdout.count("goes") == done.stdout.count("is out") == 2  # lines of two processes may run together


def test_the_wait_is_longer_than_a_push(train, monkeypatch):
    kept = []
    handlers = train_defectfill.InitProcessGroupKwargs
    monkeypatch.setattr(
        train_defectfill, "InitProcessGroupKwargs", lambda timeout: kept.append(timeout) or handlers(timeout=timeout)
    )
    train("--push_timeout", "7200")
    assert kept[0].total_seconds() == 2 * 7200
