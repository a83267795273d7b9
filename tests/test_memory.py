"""Out of memory: generation goes on in smaller batches, training without a validation image; else a clear end."""

import json
import sys
import weakref

import pytest
import torch
from runs import FAST, content, generate, options, reset_accelerate
from toy_model import toy_pipeline

import generate_defectfill
import train_defectfill
from defectfill import memory, sampling
from defectfill.lora import read_lora
from defectfill.memory import in_batches
from defectfill.runs import checkpoint as checkpoints
from defectfill_dataset import Problem, RunError


@pytest.fixture(autouse=True)
def told_anew():
    memory.warn_of_size.cache_clear()


@pytest.fixture
def little_memory(monkeypatch):
    """A device with room for so many candidates at once: little_memory(2); the sizes that were tried."""
    tried, original = [], sampling.inpaint_batch

    def little(room: int) -> list[int]:
        def inpaint_batch(pipe, conditions, prompts, seeds, scales):
            tried.append(len(seeds))
            if len(seeds) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            return original(pipe, conditions, prompts, seeds, scales)

        monkeypatch.setattr(sampling, "inpaint_batch", inpaint_batch)
        return tried

    return little


def test_candidates_are_the_same_in_smaller_batches(little_memory, caplog):
    pipe = toy_pipeline()
    pipe.scheduler = sampling.ddim(pipe.scheduler)
    images, masks = torch.linspace(-1, 1, 32).expand(2, 3, 32, 32), torch.zeros(2, 1, 16, 16)
    masks[..., 4:9, 4:9] = 1
    seeds = [[1, 2, 3], [4, 5, 6]]
    masks = masks[..., :: 16 // (32 // pipe.vae_scale_factor), :: 16 // (32 // pipe.vae_scale_factor)]
    expected = sampling.inpaint(pipe, images, masks, "A nut", seeds, num_inference_steps=2)
    tried = little_memory(2)
    found = sampling.inpaint(pipe, images, masks, "A nut", seeds, num_inference_steps=2)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1] and torch.allclose(found, expected, atol=1e-4)
    assert "out of memory with 6 candidates at once: going on with 3" in caplog.text


def test_a_generation_goes_on_in_smaller_batches(trained, inputs, tmp_path, little_memory, caplog):
    flags = [*inputs, "--lora", trained, *FAST]
    for room in (3, 1):
        little_memory(room)
        generate(*flags, "--output_dir", tmp_path / str(room))
    one, other = (content(tmp_path / str(room)) for room in (3, 1))
    assert one.keys() == other.keys()
    chosen = [[window["chosen"] for line in run["manifest"] for window in line["windows"]] for run in (one, other)]
    assert chosen[0] == chosen[1]
    assert len([r for r in caplog.records if "out of memory" in r.message]) == 1  # not for each image


def test_images_that_do_not_fit_alone_are_left_out(little_memory, trained, inputs, tmp_path):
    little_memory(0)
    with pytest.raises(SystemExit, match="DF328 000.png(.|\n)*DF328 002.png"):
        generate(*inputs, "--lora", trained, *FAST, "--output_dir", tmp_path / "out")


def test_another_error_is_not_tried_again():
    tried = []

    def broken(batch):
        tried.append(batch)
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(broken, [1, 2, 3, 4], 4)
    assert tried == [[1, 2, 3, 4]]


def test_what_did_not_fit_is_freed_before_the_next_attempt():
    held = []

    def function(batch):
        assert not held or held[-1]() is None
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch[0]

    assert in_batches(function, [1, 2, 3], 3) == [1, 2, 3]


def test_a_validation_that_does_not_fit_is_left_out(train, little_memory, caplog, tmp_path):
    little_memory(0)
    out = train("--validation_steps", "1", "--validation_inference_steps", "1")
    assert not list((out / "validation").iterdir())
    assert caplog.text.count("The validation image of step") == 2
    assert json.loads((out / "run_record.json").read_text())["after"]
    little_memory(9)
    out = train("--validation_steps", "1", "--validation_inference_steps", "1", output=tmp_path / "fits")
    assert len(list((out / "validation").iterdir())) == 2


def test_a_validation_that_fails_otherwise_ends_the_run(train, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes")

    monkeypatch.setattr(train_defectfill, "validation_image", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train("--validation_steps", "1")


def ends_with(command, argv, monkeypatch, capsys) -> str:
    """What a command prints last, ended by too little memory."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        command()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in told
    return told.strip().splitlines()[-1]


def exhausted(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_training_out_of_memory_says_what_needs_less_and_keeps_its_checkpoint(
    train, base, data, tmp_path, monkeypatch, capsys
):
    flags, losses, calls = ["--checkpointing_steps", "1"], train_defectfill.training_losses, []

    def second_step_exhausted(models, *args):
        calls.append(models.unet.training)
        return exhausted() if sum(calls) == 2 else losses(models, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_defectfill, "training_losses", second_step_exhausted)
        reset_accelerate()
        told = ends_with(train_defectfill.command, options(base, data, tmp_path / "out", *flags), patch, capsys)
    assert told.startswith("DF331 out of memory (CUDA out of memory. Tried to allocate 20 MiB); ")
    for flag in ("gradient_checkpointing", "train_batch_size", "gradient_accumulation_steps", "resolution"):
        assert f"--{flag}" in told
    assert [file.name for file in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    out = train(*flags, "--resume_from_checkpoint", "latest", "--gradient_checkpointing")
    assert read_lora(out).record["steps"] == 2


def test_generation_out_of_memory_says_what_needs_less(trained, inputs, tmp_path, monkeypatch, capsys):
    def exhausted_on_one_process(*args):
        monkeypatch.setenv("LOCAL_RANK", "1")  # the others know nothing of it
        exhausted()

    monkeypatch.setattr(generate_defectfill, "load_pipeline", exhausted_on_one_process)
    argv = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST]
    told = ends_with(generate_defectfill.command, argv, monkeypatch, capsys)
    assert told.startswith("DF331 out of memory (CUDA out of memory. ") and "--batch_size or --resolution" in told


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory.told_if_out_of_memory(""):
        raise RuntimeError("shapes")
    problem = Problem("DF324", "", "the disk is out of memory.")
    with pytest.raises(RunError, match="DF324"), memory.told_if_out_of_memory(""):
        raise RunError(problem)
    with pytest.raises(RunError, match=r"DF331 out of memory \(MemoryError\)"), memory.told_if_out_of_memory(""):
        raise MemoryError
