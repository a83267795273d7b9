"""Full and vanished disks, killed loader workers, items that cannot be made: what was paid for is not lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from offline import ROOT

import pyarrow.parquet as pq
import pytest
import torch
from runs import FAST, content, generate, launch, options, read_lines
from safetensors.torch import load_file

import generate_defectfill
import train_defectfill
from defectfill import sampling
from defectfill.lora import LORA_FILE, read_lora
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import disks, space
from defectfill.runs.source_images import SourceImage
from defectfill_dataset import InputError, RunError, commands
from defectfill_scripts import check_data, export_generated, merge_lora, prepare_data, preview_masks


@pytest.fixture
def full(monkeypatch):
    """A disk without room for some files: full(lambda folder, name: ...) is asked before each file is made.

    Every write of a run makes a temporary file first; the true name is not known then, but its folder and suffix are.
    """

    def set_full(refuses) -> None:
        make = tempfile.mkstemp

        def mkstemp(suffix=None, prefix=None, dir=None, **more):
            if refuses(Path(dir), suffix):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dir))
            return make(suffix, prefix, dir, **more)

        monkeypatch.setattr(tempfile, "mkstemp", mkstemp)

    return set_full


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(disks, "ROOM_PATIENCE", 0.0)


def raises(error: Exception):
    def function(*args, **kwargs):
        raise error

    return function


def fails(run, capsys) -> str:
    """The message and exit status 1 of a command that ends with a RunError."""
    with pytest.raises(SystemExit) as ended:
        commands.exit_on_input_error(run)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1
    return message


def same_lora(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / LORA_FILE) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_results_that_cannot_be_written_go_to_the_fallback(train, tmp_path, full, impatient, capsys):
    whole = train("--checkpointing_steps", "1", output=tmp_path / "whole")
    out, fallback = tmp_path / "out", tmp_path / "other/disk"
    full(lambda folder, suffix: folder == out and suffix == ".safetensors")
    message = fails(lambda: train("--checkpointing_steps", "1", "--fallback_dir", fallback), capsys)
    [refuge] = fallback.iterdir()
    assert message.startswith(f"DF324 {out}: ") and "No space left" in message and str(refuge) in message
    assert {f.name for f in refuge.iterdir()} == {LORA_FILE, "README.md", "run_record.json"}
    assert same_lora(whole, refuge) and read_lora(refuge).record["steps"] == 2
    assert json.loads((refuge / "run_record.json").read_text())["after"]


def test_results_are_written_once_there_is_room_again(train, tmp_path, full, monkeypatch):
    out, refused, pauses = tmp_path / "out", [], []
    full(lambda folder, suffix: folder == out and suffix == ".md" and len(refused) < 2 and not refused.append(1))
    monkeypatch.setattr(disks.time, "sleep", pauses.append)
    train("--fallback_dir", tmp_path / "fallback")
    assert (out / LORA_FILE).exists() and (out / "README.md").exists() and [x for x in pauses if x >= 1] == [1.0, 2.0]
    assert not any((tmp_path / "fallback").iterdir())


def test_neither_disk_has_room(train, tmp_path, full, impatient, capsys):
    out, fallback = tmp_path / "out", tmp_path / "fallback"
    full(lambda folder, suffix: folder == out and suffix == ".safetensors" or folder.is_relative_to(fallback))
    message = fails(lambda: train("--checkpointing_steps", "1", "--fallback_dir", fallback), capsys)
    assert message.startswith("DF324 ") and "checkpoint-2 is good" in message and "latest" in message
    assert not any(fallback.iterdir())


def test_the_default_fallback_is_in_the_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    args = train_defectfill.parse_args(["--output_dir", "x"])
    assert args.fallback_dir == Path("/somewhere/defectfill/results")


def test_an_output_folder_that_vanishes(train, tmp_path, impatient, capsys, monkeypatch):
    out, save = tmp_path / "out", train_defectfill.save

    def save_and_vanish(*args):
        written = save(*args)
        shutil.rmtree(out, ignore_errors=True)
        return written

    monkeypatch.setattr(train_defectfill, "save", save_and_vanish)
    flags = ["--validation_steps", "1", "--validation_inference_steps", "1", "--fallback_dir", tmp_path / "fallback"]
    message = fails(lambda: train(*flags, "--checkpointing_steps", "1", "--report_to", "tensorboard"), capsys)
    [refuge] = (tmp_path / "fallback").iterdir()
    assert message.startswith(f"DF324 {out}: ") and str(refuge) in message and (refuge / LORA_FILE).exists()
    assert not out.exists()  # it may have been a disk's


def test_a_checkpoint_that_is_missing_is_told_at_the_end(train, tmp_path, full, capsys, caplog):
    full(lambda folder, suffix: folder.name.endswith("checkpoint-1"))
    message = fails(lambda: train("--checkpointing_steps", "1"), capsys)
    assert message.startswith("DF326 ") and "checkpoint-1" in message and "checkpoint-2" not in message
    assert "checkpoint-1 could not be written" in caplog.text and (tmp_path / "out" / LORA_FILE).exists()


def test_a_checkpoint_that_would_be_deleted_by_now_is_not_missing(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    checkpoints.check_complete(tmp_path, tmp_path, None, ["checkpoint-9"], 1)
    for name, limit in (("checkpoint-9", 2), ("checkpoint-11", 1), ("checkpoint-9", None), ("losses.jsonl", 1)):
        with pytest.raises(RunError, match=f"DF326 .*: could not be written: {name};"):
            checkpoints.check_complete(tmp_path, tmp_path, None, [name], limit)


def test_a_log_that_is_not_complete_is_told_at_the_end(train, tmp_path, full, monkeypatch, capsys):
    monkeypatch.setattr("defectfill.runs.record.append_text", raises(OSError(errno.ENOSPC, "No space left on device")))
    full(lambda folder, suffix: suffix == ".jsonl")
    message = fails(train, capsys)
    assert message.startswith("DF326 ") and "could not be written: losses.jsonl; the results are complete" in message


def test_a_validation_image_that_cannot_be_written_costs_a_warning(train, tmp_path, full, caplog):
    full(lambda folder, suffix: folder.name == "validation")
    out = train("--validation_steps", "1", "--validation_inference_steps", "1")
    assert (out / LORA_FILE).exists() and not any((out / "validation").iterdir())
    assert caplog.text.count("The validation image of step") == 2


def test_a_tracker_that_cannot_write_costs_a_warning(train, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for method in ("log", "finish", "log_images"):
        monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", refuse)
    out = train("--report_to", "tensorboard", "--validation_steps", "1", "--validation_inference_steps", "1")
    assert (out / LORA_FILE).exists() and caplog.text.count("tensorboard cannot be written") == 1


def test_a_full_disk_at_the_start_is_one_line(train, tmp_path, full, capsys):
    full(lambda folder, suffix: folder == tmp_path / "out" and suffix == ".json")
    message = fails(train, capsys)
    assert message.startswith(f"DF324 {tmp_path}/out: cannot be written ([Errno 28]") and "start again" in message


def test_a_stopped_run_without_room_leaves_its_checkpoint_elsewhere(train, tmp_path, full, capsys, monkeypatch):
    flags = ["--max_train_steps", "3", "--lora_dropout", "0.2"]
    whole, out = train(*flags, output=tmp_path / "whole"), tmp_path / "out"
    write = train_defectfill.LossLog.write

    def write_and_signal(self, line):
        write(self, line)
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_defectfill.LossLog, "write", write_and_signal)
        full(lambda folder, suffix: folder.name == ".tmp-defectfill-checkpoint-1" and folder.parent == out)
        train(*flags, "--fallback_dir", tmp_path / "fallback")
    assert ended.value.code == 143
    [checkpoint] = (tmp_path / "fallback").glob("*/checkpoint-1")
    train(*flags, "--resume_from_checkpoint", checkpoint)
    assert same_lora(whole, out)


# Room


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--checkpointing_steps", "1", "--max_train_steps", "3"], marks=pytest.mark.slow),
        ["--checkpointing_steps", "1", "--checkpoints_total_limit", "1"],
        ["--rank", "64", "--lora_targets", "all", "--conv_rank", "3", "--checkpointing_steps", "2"],
        pytest.param(["--rank", "128", "--use_8bit_adam"], marks=pytest.mark.slow),
        pytest.param(["--validation_steps", "1", "--validation_inference_steps", "1"], marks=pytest.mark.slow),
    ],
)
def test_the_room_that_a_run_needs_is_known_before_it_starts(train, tmp_path, monkeypatch, flags):
    """Never less than it writes, and little more."""
    free = 0
    monkeypatch.setattr(space, "RECORDS", 20000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="DF325 --output_dir") as refused:
        patch.setattr(train_defectfill, "load_models", None)  # not reached
        train(*flags)
    needed = float(str(refused.value).partition("will write ")[2].split()[0]) * 2**20
    free = 2**40
    out = train(*flags)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert size < needed * 1.01 < 2.5 * size + 2**17


def test_the_room_that_a_generation_needs_is_known_before_it_starts(trained, inputs, tmp_path, monkeypatch):
    """Of the images that are left, from the sizes of the good ones."""
    argv, out, free = ["--lora", trained, *inputs, "--output_dir", tmp_path / "out", *FAST], tmp_path / "out", 0
    monkeypatch.setattr(space, "RECORDS", 20000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    def needed(images: int) -> float:
        with monkeypatch.context() as patch, pytest.raises(InputError, match="DF325 --output_dir") as refused:
            patch.setattr(generate_defectfill, "load_pipeline", None)  # not reached
            generate(*argv)
        assert f"(images ({images}) " in str(refused.value) and "generate fewer images" in str(refused.value)
        return float(str(refused.value).partition("will write ")[2].split()[0]) * 2**20

    all_three, free = needed(3), 2**40
    generate(*argv)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert size < all_three * 1.01 < 4 * size
    (out / "images/001.png").unlink()
    free = 0
    assert needed(1) < all_three / 2


@pytest.fixture
def mounted(tmp_path):
    """A disk of its own with 4 MiB, and what fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")

    def fill() -> Path:
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        return disk / "filler"

    yield disk, fill
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_training(train, mounted, tmp_path, impatient, capsys, caplog, monkeypatch):
    """As it is: losses, a tracker, validation images, checkpoints and results."""
    flags = "--max_train_steps 4 --checkpointing_steps 1 --validation_steps 1 --validation_inference_steps 1".split()
    flags += ["--report_to", "tensorboard", "--fallback_dir", tmp_path / "fallback"]
    whole, write = train(*flags, output=tmp_path / "whole"), train_defectfill.LossLog.write

    def write_and_fill(self, line):
        write(self, line)
        if line["step"] == 2:
            mounted[1]()

    monkeypatch.setattr(train_defectfill.LossLog, "write", write_and_fill)
    message = fails(lambda: train(*flags, output=mounted[0] / "out"), capsys)
    [refuge] = (tmp_path / "fallback").iterdir()
    assert message.startswith(f"DF324 {mounted[0]}/out: ") and str(refuge) in message
    assert same_lora(whole, refuge)
    for what in ("checkpoint-2", "checkpoint-4", "The validation image of step 2"):
        assert what in caplog.text
    (mounted[0] / "filler").unlink()
    monkeypatch.undo()
    train(*flags, "--resume_from_checkpoint", "latest", output=mounted[0] / "out")
    assert same_lora(whole, mounted[0] / "out")
    assert read_lines(whole / "losses.jsonl") == read_lines(mounted[0] / "out/losses.jsonl")


# Killed loader workers, broken moments, modes


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_worker_ends_the_run_with_a_checkpoint(train, tmp_path, capsys, monkeypatch, accumulation):
    """It is killed while it loads the second step's last micro-batch."""
    flags = ["--dataloader_num_workers", "1", "--max_train_steps", "4", "--lora_dropout", "0.2"]
    flags += ["--gradient_accumulation_steps", str(accumulation)]
    whole, load = train(*flags, output=tmp_path / "whole"), train_defectfill.TrainingSamples.__getitem__

    def load_or_die(self, key):
        if key[0] == 2 * accumulation - 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(train_defectfill.TrainingSamples, "__getitem__", load_or_die)
        message = fails(lambda: train(*flags), capsys)
    assert message.startswith("DF327 --dataloader_num_workers 1: ") and "exited unexpectedly" in message
    assert message.endswith("; resume with --resume_from_checkpoint latest")
    [checkpoint] = checkpoints.list_checkpoints(tmp_path / "out")
    assert checkpoint.name in ("checkpoint-1", "checkpoint-2")  # a batch that is loaded may die with the worker
    out = train(*flags, "--resume_from_checkpoint", "latest")
    assert same_lora(whole, out) and read_lines(whole / "losses.jsonl") == read_lines(out / "losses.jsonl")
    moments = [load_file(run / "checkpoint-4/optimizer.safetensors") for run in (whole, out)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_an_error_in_a_worker_is_not_a_killed_one(train, monkeypatch):
    def broken(self, key):
        raise ValueError("shapes")

    monkeypatch.setattr(train_defectfill.TrainingSamples, "__getitem__", broken)
    monkeypatch.setattr(train_defectfill, "measure", lambda *args: {})
    with pytest.raises(ValueError, match="shapes"):
        train("--dataloader_num_workers", "1")


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_is_not_saved(train, tmp_path, monkeypatch, capsys, moment):
    step, steps = torch.optim.AdamW.step, []

    def step_and_break(self, *args, **kwargs):
        step(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 2:
            list(self.state.values())[3][moment].view(-1)[0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_break)
    message = fails(lambda: train("--checkpointing_steps", "1", "--max_train_steps", "3"), capsys)
    assert message.startswith("DF323 step 2: ") and moment in message and "checkpoint-1 is good" in message
    assert [c.name for c in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "umask", [pytest.param(0o022, marks=pytest.mark.slow), 0o007, pytest.param(0o077, marks=pytest.mark.slow)]
)
def test_every_file_has_the_mode_of_the_umask(train, base, data, inputs, generated, photos, tmp_path, umask):
    before = os.umask(umask)
    try:
        out = tmp_path / "of"
        lora = train("--validation_steps", "1", "--validation_inference_steps", "1", output=out / "training")
        generate(*inputs, "--lora", lora, *FAST, "--output_dir", out / "generation")
        prepare_data.main(prepare_data.parse_args([str(data), "--output_dir", f"{out}/prepared"]))
        export = [str(generated), "--format", "coco", "--good", str(photos), "--output_dir", f"{out}/exported"]
        export_generated.main(export_generated.parse_args(export))
        check_data.main(check_data.parse_args([str(data), "--output_dir", f"{out}/checked"]))
        merge = [f"{lora}", "--output_dir", f"{out}/merged", "--single_file", f"{out}/merged.safetensors"]
        merge_lora.main(merge_lora.parse_args(merge))
    finally:
        os.umask(before)
    files = [file for file in out.rglob("*") if file.is_file()]
    modes = {f"{file.relative_to(out)}": oct(file.stat().st_mode & 0o777) for file in files}
    assert len(modes) > 40 and {name: mode for name, mode in modes.items() if mode != oct(0o666 & ~umask)} == {}


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("where", ["images", pytest.param("contact", marks=pytest.mark.slow), "out"])
def test_a_disk_that_fills_up_in_generation(trained, inputs, tmp_path, full, capsys, where):
    """At an image, at a contact row, and at the end."""
    argv = [*inputs, "--lora", trained, *FAST]
    generate(*argv, "--output_dir", tmp_path / "whole")
    out, room = tmp_path / "out", [1]  # files in the folder

    def refuses(folder, suffix):
        room[0] -= folder.name == where and suffix in (".png", ".parquet")
        return room[0] < 0

    if where == "out":
        room = [0]
    full(refuses)
    message = fails(lambda: generate(*argv, "--output_dir", out), capsys)
    number = 3 if where == "out" else 1
    assert message.startswith(f"DF324 {out}: cannot be written ([Errno 28] No space")
    assert f"; make room on the disk: {number} of 3 images are finished in {out}. Run the same command" in message
    room = [99]
    generate(*argv, "--output_dir", out)
    assert content(out) == content(tmp_path / "whole")


def test_a_part_that_cannot_be_written(trained, inputs, tmp_path, capsys, monkeypatch):
    argv, out = [*inputs, "--lora", trained, *FAST], tmp_path / "out"
    generate(*argv, "--output_dir", tmp_path / "whole")

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("defectfill.runs.manifest.os.fsync", full_disk)
        message = fails(lambda: generate(*argv, "--output_dir", out), capsys)
    assert message.startswith(f"DF324 {out}: ") and "make room" in message
    generate(*argv, "--output_dir", out)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_in_generation(trained, inputs, mounted, tmp_path, capsys, monkeypatch):
    """As it is, after the first image."""
    argv, out, add = [*inputs, "--lora", trained, *FAST], mounted[0] / "out", generate_defectfill.write_image
    generate(*argv, "--output_dir", tmp_path / "whole")

    def write_and_fill(*args):
        line = add(*args)
        mounted[1]()
        return line

    with monkeypatch.context() as patch:
        patch.setattr(generate_defectfill, "write_image", write_and_fill)
        message = fails(lambda: generate(*argv, "--output_dir", out), capsys)
    assert message.startswith(f"DF324 {out}: ") and "No space left" in message
    (mounted[0] / "filler").unlink()
    generate(*argv, "--output_dir", out)
    assert content(out) == content(tmp_path / "whole")


def test_an_output_folder_that_vanishes_in_generation(trained, inputs, tmp_path, capsys, monkeypatch):
    write, out = generate_defectfill.write_image, tmp_path / "out"

    def write_and_vanish(*args):
        shutil.rmtree(out)
        return write(*args)

    monkeypatch.setattr(generate_defectfill, "write_image", write_and_vanish)
    message = fails(lambda: generate(*inputs, "--lora", trained, *FAST, "--output_dir", out), capsys)
    assert message.startswith(f"DF324 {out}: ") and "nothing was generated yet" in message


def passed_over(capsys, argv: list) -> list[str]:
    """The lines of the images that a generation leaves out."""
    with pytest.raises(SystemExit) as ended:
        commands.exit_on_input_error(lambda: generate(*argv))
    assert ended.value.code == 1
    return capsys.readouterr().err.partition("Not generated:\n")[2].splitlines()


def test_an_image_whose_name_is_too_long_is_passed_over(trained, inputs, tmp_path, capsys):
    """Its second image, whose name has a number, and so more than 255 bytes."""
    long = "ü" * 125 + "1"
    for file in (tmp_path / "good/000.png", tmp_path / "masks/000_mask.png"):
        file.rename(file.with_stem(long))
    argv = [*inputs, "--lora", trained, *FAST, "--num_images", 6, "--output_dir", tmp_path / "out"]
    [line] = passed_over(capsys, argv)
    assert line.startswith(f"DF329 {long}.png: ") and "255 bytes" in line
    names = [line["name"] for line in read_lines(tmp_path / "out/manifest.jsonl")]
    assert names == ["001", "002", long, "001-0001", "002-0001"]
    assert len(passed_over(capsys, argv)) == 1  # nothing is made twice, nothing fails


@pytest.mark.parametrize(
    "error", [MemoryError(), pytest.param(torch.OutOfMemoryError("CUDA out of memory."), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("place", ["load_with_mask", "inpaint_batch", "vae_error"])
def test_an_image_that_does_not_fit_in_memory_is_passed_over(
    trained, inputs, tmp_path, capsys, monkeypatch, error, place
):
    """While it is read, painted (with a single candidate, in a batch of three images) and pasted."""
    argv = [*inputs, "--lora", trained, *FAST, "--batch_size", 9]
    generate(*argv, "--output_dir", tmp_path / "whole")
    bad = first_seeds(tmp_path / "whole")
    owner = {"load_with_mask": SourceImage, "inpaint_batch": sampling, "vae_error": generate_defectfill}[place]
    original, calls = getattr(owner, place), []

    def exhausted(*args):
        calls.append(1)
        of_first = {
            "load_with_mask": lambda: args[0].name == "000",
            "inpaint_batch": lambda: bad & set(args[3]),
            "vae_error": lambda: args[0].width == 48,
        }[place]()
        if of_first:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, exhausted)
        [line] = passed_over(capsys, [*argv, "--output_dir", tmp_path / "out"])
    assert line.startswith("DF328 000.png: does not fit in memory")
    assert [line["name"] for line in read_lines(tmp_path / "out/manifest.jsonl")] == ["001", "002"]
    generate(*argv, "--output_dir", tmp_path / "out")
    assert [line["name"] for line in read_lines(tmp_path / "out/manifest.jsonl")] == ["000", "001", "002"]


def first_seeds(folder: Path) -> set[int]:
    """The seeds of the first image's candidates."""
    return {
        seed for window in read_lines(folder / "manifest.jsonl")[0]["windows"] for seed in window["candidate_seeds"]
    }


def test_an_image_that_vanishes_is_passed_over(trained, inputs, tmp_path, capsys, monkeypatch):
    load = SourceImage.load

    def load_or_vanish(self):
        self.file.unlink() if self.name == "001" else None
        return load(self)

    monkeypatch.setattr(SourceImage, "load", load_or_vanish)
    [line] = passed_over(capsys, [*inputs, "--lora", trained, *FAST, "--output_dir", tmp_path / "out"])
    assert line.startswith("DF103 001.png: cannot be read")
    assert [line["name"] for line in read_lines(tmp_path / "out/manifest.jsonl")] == ["000", "002"]


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_the_largest_seeds(trained, inputs, tmp_path, seed):
    generate(*inputs, "--lora", trained, *FAST, "--seed", seed, "--output_dir", tmp_path / "out")
    assert pq.read_table(tmp_path / "out/manifest.parquet")["seed"].to_pylist() == [seed] * 3


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**400])
def test_a_larger_seed_is_refused_where_it_is_parsed(trained, inputs, tmp_path, capsys, seed):
    argv = [*map(str, inputs), "--lora", str(trained), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        generate_defectfill.parse_args([*argv, "--seed", str(seed)])
    assert ended.value.code == 2 and "--seed: " in capsys.readouterr().err
    (tmp_path / "cases.jsonl").write_text(json.dumps({"seed": seed}) + "\n")
    with pytest.raises(InputError, match="DF416 .*line 1: argument --seed"):
        generate_defectfill.parse_args([*argv, "--cases", str(tmp_path / "cases.jsonl")])


# ---------------------------------------------------------------------------------------------------------------------
# The other commands


def test_a_full_disk_ends_the_other_commands_with_one_line(
    data, generated, photos, inputs, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    export = [str(generated), "--format", "coco", "--good", str(photos)]
    masks = [*map(str, inputs[:2]), "--mask_source", "random"]
    runs = {
        "prepared": lambda to: prepare_data.main(prepare_data.parse_args([str(data), "--output_dir", to])),
        "exported": lambda to: export_generated.main(export_generated.parse_args([*export, "--output_dir", to])),
        "checked": lambda to: check_data.main(check_data.parse_args([str(data), "--output_dir", to])),
        "masks.png": lambda to: preview_masks.main(preview_masks.parse_args([*masks, "--output", to])),
    }
    for name, run in runs.items():
        full_disk = OSError(errno.ENOSPC, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", raises(full_disk))
            message = fails(lambda run=run, name=name: run(str(out / name)), capsys)
        assert message.startswith("DF324 ") and "No space left" in message and "make room" in message
        run(str(out / name))
    assert not list(out.rglob(".tmp*"))


def test_a_full_disk_that_a_library_wraps(capsys):
    def run():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/x.arrow")
        except OSError as error:
            raise ValueError("An error occurred") from error

    message = fails(run, capsys)
    assert (
        message
        == "DF324 [Errno 28] No space left on device: '/cache/x.arrow'; make room, and run the same command again"
    )
    with pytest.raises(KeyError):
        commands.exit_on_input_error(raises(KeyError()))


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

PATCHED = """
import errno, os, signal, sys, tempfile
from pathlib import Path
rank = os.environ["LOCAL_RANK"]

def killed_worker():
    import torch
    import train_defectfill as command
    load = command.TrainingSamples.__getitem__

    def load_or_die(self, key):
        if rank == "1" and key[0] == 1 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, key)

    command.TrainingSamples.__getitem__ = load_or_die
    return command

def full_disk():
    import generate_defectfill as command
    make = tempfile.mkstemp

    def mkstemp(suffix=None, prefix=None, dir=None, **more):
        if rank == "1" and Path(dir).name == "images":
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(suffix, prefix, dir, **more)

    tempfile.mkstemp = mkstemp
    return command
"""


@pytest.mark.slow
def test_a_killed_worker_of_the_second_process_ends_both_with_a_checkpoint(base, data, tmp_path):
    (tmp_path / "script.py").write_text(PATCHED + "killed_worker().command()")
    flags = ["--dataloader_num_workers", "1", "--max_train_steps", "4", "--lora_dropout", "0.2"]
    launch(ROOT / "train_defectfill.py", *options(base, data, tmp_path / "whole", *flags))
    argv = options(base, data, tmp_path / "out", *flags)
    done = launch(tmp_path / "script.py", *argv, check=False)
    assert done.returncode and "DF327 --dataloader_num_workers 1" in done.stderr
    [checkpoint] = checkpoints.list_checkpoints(tmp_path / "out")
    assert f"Stopped at step {checkpoint.name[-1]}; resume with" in done.stderr
    launch(ROOT / "train_defectfill.py", *argv, "--resume_from_checkpoint", "latest")
    assert same_lora(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.full
def test_a_full_disk_of_the_second_process_is_told_by_the_first(trained, inputs, tmp_path):
    (tmp_path / "script.py").write_text(PATCHED + "full_disk().command()")
    argv, out = [*inputs, "--lora", trained, *FAST, "--output_dir", tmp_path / "out"], tmp_path / "out"
    done = launch(tmp_path / "script.py", *argv, check=False)
    assert done.returncode and done.stderr.count("DF324") == 1
    assert f"DF324 {out}: cannot be written" in done.stderr and ": 2 of 3 images are finished" in done.stderr
    launch(ROOT / "generate_defectfill.py", *argv)
    assert len(read_lines(out / "manifest.jsonl")) == 3
