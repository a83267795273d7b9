"""The training loop: what becomes of each step's gradient, and what each process draws and is told."""

import functools
import itertools
import json
import os
import signal
import socket

import pytest
import torch
from accelerate import Accelerator
from runs import fork, read_lines, reset_accelerate, wait_for
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_defectfill as t
from defectfill.lora import LORA_FILE
from defectfill.runs.signals import StopSignal
from defectfill_dataset import RunError, sampling_schedule


@pytest.fixture
def each_update():
    """Calls a function with the optimizer before each step that it takes."""
    handles = []
    yield lambda function: handles.append(register_optimizer_step_pre_hook(lambda optimizer, *_: function(optimizer)))
    for handle in handles:
        handle.remove()


@pytest.fixture
def break_gradient(monkeypatch):
    """Makes the gradient of a step not finite, though its losses are: break_gradient(step)."""
    original = t.training_losses

    def arm(step: int) -> None:
        steps = itertools.count(1)

        def training_losses(models, *rest):
            losses = original(models, *rest)
            if torch.is_grad_enabled() and next(steps) == step:
                parameter = next(p for p in models.unet.parameters() if p.requires_grad)
                losses["loss"] = losses["loss"] + (0 * parameter).sum().sqrt()
            return losses

        monkeypatch.setattr(t, "training_losses", training_losses)

    return arm


@pytest.fixture
def loss_scale(monkeypatch):
    """On the CPU, the loss scale that fp16 has on a GPU; it doubles after two sound steps."""

    class Scaled(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    monkeypatch.setattr(t, "Accelerator", Scaled)


def state(checkpoint) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


# Gradients


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(train, break_gradient, each_update):
    updates = []
    each_update(updates.append)
    break_gradient(2)
    with pytest.raises((ArithmeticError, RuntimeError), match=r"(?i)step 2: loss [\d.]+, .*gradient norm nan"):
        train("--max_train_steps", "3")
    assert len(updates) == 1


@pytest.fixture
def not_finite(monkeypatch):
    """Puts a NaN into the second step of a run: not_finite(where)."""

    def arm(where: str) -> None:
        load, encode, rates = t.TrainingSamples.__getitem__, t.encode_images, t.get_scheduler

        def item(self, key):
            found = load(self, key)
            return found | {"pixel_values": found["pixel_values"] * torch.nan} if key[0] == 1 else found

        calls = itertools.count(1)

        def latents(vae, pixels, masks):
            step = next(calls) if torch.is_grad_enabled() else 0
            return encode(vae, pixels * torch.nan if step == 2 else pixels, masks)

        def scheduler(*args, **kwargs):
            made = rates(*args, **kwargs)
            made.lr_lambdas = [lambda step: torch.nan if step == 1 else 1.0] * 2
            return made

        if where == "pixels":
            monkeypatch.setattr(t.TrainingSamples, "__getitem__", item)
        elif where == "latents":
            monkeypatch.setattr(t, "encode_images", latents)
        else:
            monkeypatch.setattr(t, "get_scheduler", scheduler)

    return arm


@pytest.mark.parametrize("where, step", [("pixels", 2), ("latents", 2), ("learning rate", 3)])
def test_what_is_not_finite_is_noticed_within_a_step_and_not_saved(train, not_finite, tmp_path, where, step):
    """A rate of the second step breaks the weights, and with them the third step's losses."""
    not_finite(where)
    with pytest.raises(RunError, match=f"DF323 step {step}: loss nan"):
        train("--max_train_steps", "4")
    assert not (tmp_path / "out" / LORA_FILE).exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_weights_that_a_learning_rate_has_broken_are_not_saved(train, not_finite, tmp_path):
    not_finite("learning rate")
    with pytest.raises(
        RunError, match="DF323 step 2: weights or moments of AdamW are not finite.*checkpoint-1 is good"
    ):
        train("--max_train_steps", "4", "--checkpointing_steps", "1")
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert all(
        tensor.isfinite().all() for file in checkpoint.glob("*.safetensors") for tensor in load_file(file).values()
    )


def test_the_gradients_of_both_models_are_clipped_as_one(train, each_update):
    norms = []

    def note(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    each_update(note)
    lines = read_lines(train("--max_grad_norm", "0.0001") / "losses.jsonl")
    assert all(line["grad_norm"] > 0.001 for line in lines)
    assert norms == pytest.approx([0.0001] * 2, rel=0.01)


def test_maps_that_gradient_checkpointing_records_again_are_forgotten(train, each_update, monkeypatch):
    """Kept, they would hold their memory through the next step."""
    record, backward, stores, recorded, kept = t.record_attention, Accelerator.backward, [], [], []

    def record_attention(unet):
        stores.append(record(unet))
        return stores[0]

    def backward_and_count(self, loss):
        backward(self, loss)
        recorded.append(len(stores[0].maps))

    monkeypatch.setattr(t, "record_attention", record_attention)
    monkeypatch.setattr(Accelerator, "backward", backward_and_count)
    each_update(lambda _: kept.append(len(stores[0].maps)))
    train("--gradient_checkpointing")
    assert (recorded, kept) == ([4, 4], [0, 0])


# The loss scale of fp16


def test_a_step_that_overflows_changes_no_weight_and_no_learning_rate(train, break_gradient, loss_scale):
    break_gradient(2)
    flags = "--max_train_steps 4 --lr_warmup_steps 4 --learning_rate 0.4 --checkpointing_steps 1"
    out = train(*flags.split())
    assert [line["lr"] for line in read_lines(out / "losses.jsonl")] == pytest.approx([0.0, 0.1, 0.1, 0.2])
    assert [state(out / f"checkpoint-{i}")["scaler"]["scale"] for i in (1, 2)] == [1024, 512]
    before, after, later = (load_file(out / f"checkpoint-{i}" / LORA_FILE) for i in (1, 2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(before[k], later[k]) for k in before)


def test_the_loss_scale_comes_back_with_a_checkpoint(train, break_gradient, loss_scale, tmp_path):
    flags = ("--checkpointing_steps", "2", "--max_train_steps")
    for out, first_run in ((tmp_path / "whole", "4"), (tmp_path / "resumed", "2")):
        break_gradient(1)
        train(*flags, first_run, output=out)
    train(*flags, "4", "--resume_from_checkpoint", "latest", output=out)
    scales = [state(tmp_path / run / "checkpoint-4")["scaler"] for run in ("whole", "resumed")]
    assert scales[0] == scales[1] and scales[0]["scale"] == 1024  # halved at step 1, doubled at step 3


# Several processes


def test_each_process_and_micro_batch_draws_dropout_of_its_own(train, monkeypatch, tmp_path):
    """A run as the first of two processes, and one as the second."""
    original, seeds = t.training_losses, []

    def training_losses(*args):
        if torch.is_grad_enabled():
            seeds.append(torch.initial_seed())
        return original(*args)

    monkeypatch.setattr(t, "training_losses", training_losses)
    for rank in range(2):
        as_rank = functools.partial(lambda rank, *args: sampling_schedule(*args[:3], rank, 2), rank)
        monkeypatch.setattr(t, "sampling_schedule", as_rank)
        train("--train_batch_size", "1", "--gradient_accumulation_steps", "2", output=tmp_path / f"rank-{rank}")
    assert len(seeds) == len(set(seeds)) == 8


def test_a_signal_to_one_process_stops_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        reset_accelerate()
        accelerator, stop = Accelerator(), StopSignal()
        asked = [stop.requested(accelerator)]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(stop.requested(accelerator))
        (tmp_path / str(rank)).write_text(json.dumps([*asked, stop.exit_status]))
        accelerator.end_training()

    processes = [fork(functools.partial(process, rank), seconds=60) for rank in range(2)]
    assert [wait_for(pid) for pid in processes] == [0, 0]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [[False, True, 143]] * 2
