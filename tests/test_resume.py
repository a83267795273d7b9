"""Killed and resumed runs against uninterrupted ones, bit for bit; checkpoints that must not be used."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from offline import ROOT

import pytest
import torch
from folders import make_mvtec
from runs import FULL, fork, options, read_lines, reset_accelerate, wait_for
from safetensors.torch import load_file, save_file
from toy_model import toy_pipeline

import train_defectfill
from defectfill.lora import LORA_FILE, add_lora, portable_name, read_lora
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import files
from defectfill.runs.files import TEMPORARY, atomic_write, clear_leftovers, exclusive_lock
from defectfill_dataset import InputError, RunError


# Rank 128 gives matrices of 4096 elements, from which bitsandbytes really keeps 8-bit moments.
RUN = """--max_train_steps 6 --checkpointing_steps 2 --rank 128 --lora_dropout 0.2 --split all
    --learning_rate 0.01""".split()
KILLED = -signal.SIGKILL


def killed_run(argv: list[str], point: str) -> int:
    """Runs training in a child process that kills itself at `point`; returns its exit status."""

    def run():
        plant_kill(point)
        reset_accelerate()
        train_defectfill.main(train_defectfill.parse_args(argv))

    return wait_for(fork(run))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def plant_kill(point: str) -> None:
    """Arms one of three points: mid-step after step 3, inside the second checkpoint's write, before its rename."""
    if point == "step":
        clip, calls = train_defectfill.Accelerator.clip_grad_norm_, []

        def clip_or_die(self, *args):
            calls.append(1)
            return die() if len(calls) == 4 else clip(self, *args)

        train_defectfill.Accelerator.clip_grad_norm_ = clip_or_die
    else:
        name = {"write": "save_file", "rename": "flush"}[point]
        original, calls = getattr(checkpoints, name), []

        def original_or_die(*args):
            calls.append(str(args[-1]))
            of_second = "checkpoint-4" in calls[-1]
            if point == "write" and of_second:
                Path(args[-1]).write_bytes(b"torn")
            return die() if of_second else original(*args)

        setattr(checkpoints, name, original_or_die)


def same_results(one: Path, other: Path) -> bool:
    """Weights, moments, schedule and the log of every step's losses, bit for bit."""
    for file in (LORA_FILE, "checkpoint-6/optimizer.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        if a.keys() != b.keys() or any(not torch.equal(a[k], b[k]) for k in a):
            return False
    states = [json.loads((run / "checkpoint-6/state.json").read_text()) for run in (one, other)]
    return states[0] == states[1] and read_lines(one / "losses.jsonl") == read_lines(other / "losses.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """Runs by their extra flags, made once each."""
    runs = {}

    def run(data: Path, *flags: str) -> Path:
        if flags not in runs:
            runs[flags] = tmp_path_factory.mktemp("whole") / "out"
            reset_accelerate()
            train_defectfill.main(train_defectfill.parse_args(options(base, data, runs[flags], *RUN, *flags)))
        return runs[flags]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, accumulation, point",
    [("AdamW", 2, "step"), ("AdamW", 1, "write"), ("AdamW8bit", 2, "rename"), FULL("AdamW", 1, "step"),
     FULL("AdamW", 1, "rename"), FULL("AdamW", 2, "write"), FULL("AdamW", 2, "rename"), FULL("AdamW8bit", 1, "step"),
     FULL("AdamW8bit", 1, "write"), FULL("AdamW8bit", 1, "rename"), FULL("AdamW8bit", 2, "step"),
     FULL("AdamW8bit", 2, "write")],
)  # fmt: skip
def test_a_killed_run_resumes_bit_equal(train, base, data, tmp_path, uninterrupted, point, accumulation, optimizer):
    flags = ["--gradient_accumulation_steps", str(accumulation), *(["--use_8bit_adam"] if "8" in optimizer else [])]
    whole, out = uninterrupted(data, *flags), tmp_path / "killed"
    argv = options(base, data, out, *RUN, *flags)
    assert killed_run(argv, point) == KILLED
    assert checkpoints.list_checkpoints(out)[-1].name == "checkpoint-2"
    train(*RUN, *flags, "--resume_from_checkpoint", "latest", output=out)
    assert same_results(whole, out)
    assert [line["step"] for line in read_lines(out / "losses.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list(out.glob(f"{TEMPORARY}*"))
    moments = load_file(out / "checkpoint-6/optimizer.safetensors")
    assert any(t.dtype == torch.uint8 for t in moments.values()) == ("8" in optimizer)


@pytest.mark.slow
def test_a_killed_run_with_cached_latents_resumes_bit_equal(train, base, data, tmp_path, uninterrupted):
    """The cache is not saved: what the rest of the run draws is encoded again."""
    flags = ["--cache_latents", "2"]
    whole, out = uninterrupted(data, *flags), tmp_path / "killed"
    assert killed_run(options(base, data, out, *RUN, *flags), "step") == KILLED
    train(*RUN, *flags, "--resume_from_checkpoint", "latest", output=out)
    assert same_results(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point, schedule, more",
    [
        ("step", "cosine --lr_warmup_steps 3", []),
        (
            "write",
            "cosine_with_restarts --lr_warmup_steps 0 --gradient_accumulation_steps 2",
            ["--text_encoder_lr", "0"],
        ),
    ],
)
def test_a_killed_run_with_workers_and_a_schedule_resumes_bit_equal(
    train, base, data, tmp_path, uninterrupted, point, schedule, more
):
    """Like one that loads its images itself."""
    flags = ["--rank", "4", "--lr_scheduler", *schedule.split(), *more]
    whole, out = uninterrupted(data, *flags), tmp_path / "killed"
    flags += ["--dataloader_num_workers", "2"]
    assert killed_run(options(base, data, out, *RUN, *flags), point) == KILLED
    train(*RUN, *flags, "--resume_from_checkpoint", "latest", output=out)
    assert same_results(whole, out) and len({line["lr"] for line in read_lines(out / "losses.jsonl")}) > 3


def in_pefts_names(checkpoint: Path, models) -> None:
    """Writes a checkpoint as versions before kohya's names wrote it: alpha in the header alone."""
    dotted = {}
    for prefix, model in zip(("unet", "text_encoder.text_model"), models):
        for name, _ in model.named_parameters():
            portable = portable_name(f"{prefix}.{name.replace('.default.', '.')}")
            dotted[portable] = f"{prefix}.{name.replace('.default.', '.')}"
    header = {"lora_adapter_metadata": json.dumps({f"{m}.lora_alpha": 8.0 for m in ("unet", "text_encoder")})}
    lora = read_lora(checkpoint)
    weights = {dotted[k]: v for k, v in lora.tensors.items() if not k.endswith(".alpha")}
    record = json.dumps(lora.record | {"tensors": len(weights)})
    save_file(weights, checkpoint / LORA_FILE, metadata=header | {"defectfill": record})
    moments = load_file(checkpoint / "optimizer.safetensors")
    old = {f"{dotted[k.split('|')[0]]}|{k.split('|')[1]}": tensor for k, tensor in moments.items()}
    save_file(old, checkpoint / "optimizer.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_resumed(train, base, data, tmp_path, uninterrupted):
    whole, out = uninterrupted(data, "--gradient_accumulation_steps", "1"), tmp_path / "killed"
    assert killed_run(options(base, data, out, *RUN, "--gradient_accumulation_steps", "1"), "step") == KILLED
    pipe = toy_pipeline()
    add_lora(pipe.unet, pipe.text_encoder, 128, 8, 0.0)
    in_pefts_names(out / "checkpoint-2", (pipe.unet, pipe.text_encoder))
    assert not any("lora_unet" in name for name in load_file(out / "checkpoint-2/optimizer.safetensors"))
    train(*RUN, "--gradient_accumulation_steps", "1", "--resume_from_checkpoint", "latest", output=out)
    assert same_results(whole, out)


@pytest.mark.parametrize("fused", [False, True])
def test_adamws_step_count_comes_back_where_adamw_keeps_it(two_checkpoints, fused):
    """Fused AdamW keeps it beside the moments, on the GPU; shown on the meta device."""
    tensors = read_lora(two_checkpoints / "checkpoint-2").tensors
    weights = {k: v for k, v in tensors.items() if not k.endswith(".alpha")}
    parameters = {k: torch.nn.Parameter(torch.empty_like(v, device="meta")) for k, v in weights.items()}
    groups = [{"params": [p for k, p in parameters.items() if k.startswith(f"lora_{x}")]} for x in ("unet", "te")]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    optimizer.param_groups[0]["fused"] = fused
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpoints.restore(checkpoints.load(two_checkpoints / "checkpoint-2"), parameters, optimizer, scheduler, None)
    kept = optimizer.state[next(iter(parameters.values()))]
    assert kept["exp_avg"].is_meta and kept["step"].is_meta == fused


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["moments", "schedule", "step", "seed"])
def test_control_the_comparison_notices_what_is_not_restored(
    train, base, data, tmp_path, uninterrupted, monkeypatch, lost
):
    """Each thing that resume restores, left out: the results must differ."""
    whole, out = uninterrupted(data, "--gradient_accumulation_steps", "1"), tmp_path / "killed"
    assert killed_run(options(base, data, out, *RUN, "--gradient_accumulation_steps", "1"), "step") == KILLED
    restore = checkpoints.restore

    def restore_less(saved, parameters, optimizer, lr_scheduler, scaler):
        before = lr_scheduler.state_dict()
        state = restore(saved, parameters, optimizer, lr_scheduler, scaler)
        if lost == "moments":
            optimizer.state.clear()
        if lost == "schedule":
            lr_scheduler.load_state_dict(before)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        return state | ({"step": 0} if lost == "step" else {})

    monkeypatch.setattr(checkpoints, "restore", restore_less)
    if lost == "seed":
        monkeypatch.setattr(train_defectfill, "derive_seed", lambda *parts: 7)
    train(*RUN, "--gradient_accumulation_steps", "1", "--resume_from_checkpoint", "latest", output=out)
    assert not same_results(whole, out)


@pytest.mark.slow
def test_a_finished_run_resumes_to_nothing_and_can_be_extended(train, tmp_path):
    flags = ("--checkpointing_steps", "2", "--max_train_steps")
    out = train(*flags, "2")
    first = load_file(out / LORA_FILE)
    train(*flags, "2", "--resume_from_checkpoint", "latest", output=out)
    again = load_file(out / LORA_FILE)
    assert all(torch.equal(first[k], again[k]) for k in first)
    train(*flags, "4", "--resume_from_checkpoint", "latest", output=out)
    whole = load_file(train(*flags, "4", output=tmp_path / "whole") / LORA_FILE)
    extended = load_file(out / LORA_FILE)
    assert all(torch.equal(whole[k], extended[k]) for k in whole)


def test_only_the_newest_checkpoints_are_kept(train):
    out = train("--max_train_steps", "5", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.slow
def test_a_named_checkpoint(train, tmp_path):
    """Those after it are set aside: pruning by step would delete the new ones, and `latest` go on from the old."""
    out = train("--max_train_steps", "3", "--checkpointing_steps", "1")
    whole = load_file(out / LORA_FILE)
    limit = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    train("--max_train_steps", "2", *limit, "--resume_from_checkpoint", "checkpoint-1", output=out)
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert (out / "checkpoint-2.old").is_dir() and (out / "checkpoint-3.old").is_dir()
    train("--max_train_steps", "3", "--resume_from_checkpoint", "latest", output=out)
    assert all(torch.equal(whole[k], t) for k, t in load_file(out / LORA_FILE).items())
    assert [line["step"] for line in read_lines(out / "losses.jsonl")] == [1, 2, 3]


# Checkpoints that must not be used


@pytest.fixture(scope="module")
def two_checkpoints(base, tmp_path_factory):

    folder = tmp_path_factory.mktemp("two")
    reset_accelerate()
    argv = options(base, make_mvtec(folder / "nut"), folder / "out", "--checkpointing_steps", "1")
    train_defectfill.main(train_defectfill.parse_args(argv))
    reset_accelerate()
    return folder / "out"


@pytest.mark.parametrize("file", [LORA_FILE, "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_passed_over(two_checkpoints, tmp_path, caplog, file, damage):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    victim = out / "checkpoint-2" / file
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "delete":
        victim.unlink()
    assert checkpoints.find_checkpoint(out, "latest") == out / "checkpoint-1"
    assert "skipping checkpoint-2" in caplog.text
    with pytest.raises(InputError, match="DF310"):
        checkpoints.find_checkpoint(out, "checkpoint-2")


CHANGED = [
    ("--rank", "8"), ("--learning_rate", "0.1"), ("--seed", "3"), ("--phrase", "hole"), ("--lora_targets", "all"),
    ("--snr_gamma", "5"), ("--noise_offset", "0.1"), ("--cache_latents", "2"), ("--zoom", "on"),
    ("--mixed_precision", "bf16"), ("--object_prompt", "The {object} with {phrase}"), ("--object_words", "bolt"),
    ("--defect_prompt", "A picture of {phrase}"),
]  # fmt: skip


def test_stray_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-3.old", f"{TEMPORARY}checkpoint-4", ".tmp-of-others"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    (tmp_path / "checkpoint-999").mkdir()
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    clear_leftovers(tmp_path)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == [".tmp-of-others"]


@pytest.mark.parametrize("flags", CHANGED)
def test_a_run_resumes_only_with_the_options_it_began_with(train, two_checkpoints, tmp_path, flags):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    data = two_checkpoints.parent / "nut"
    with pytest.raises(InputError, match="DF320"):
        train(*flags, "--resume_from_checkpoint", "latest", output=out, data=data)


# Where things lie and are kept, what is shown, and what changes no weight, or by rounding alone.
MAY_CHANGE = """output_dir fallback_dir logging_dir cache_dir report_to push_to_hub hub_model_id hub_public
    push_timeout max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_steps
    num_validation_images validation_inference_steps dataloader_num_workers gradient_checkpointing
    enable_xformers_memory_efficient_attention""".split()
# What becomes the data, the prompts, the crops, the base and the precision, which the identity holds themselves.
HELD_AS_A_RESULT = """train_data_dir dataset_name dataset_config_name object defect split layout mask_classes
    skip_problems validation_defects phrase object_words defect_prompt object_prompt zoom zoom_context zoom_min_area
    pretrained_model_name_or_path revision variant mixed_precision""".split()


def test_every_other_option_must_stay_as_the_run_began(base, data, tmp_path):
    args = train_defectfill.parse_args(options(base, data, tmp_path / "out"))
    assert vars(args).keys() - {*MAY_CHANGE, *HELD_AS_A_RESULT} == set(train_defectfill.IDENTITY)


# A change of each flag that must stay; the second set holds what the first excludes.
EVERY_CHANGE = [
    """--resolution 64 --max_resize_scale 1.5 --center_crop --cache_latents 2 --lambda_def 0.1 --lambda_obj 0.1
    --lambda_attn 0.1 --background_alpha 0.1 --loss_reduction mask --attention_pass defect --attention_map_scale minmax
    --snr_gamma 5 --noise_offset 0.1 --timestep_bias_strategy range --timestep_bias_multiplier 2
    --timestep_bias_begin 1 --timestep_bias_end 999 --num_random_boxes 3 --rank 8 --lora_alpha 3 --lora_targets all
    --conv_rank 2 --lora_dropout 0.3 --seed 3 --train_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 0.1
    --text_encoder_lr 0.1 --lr_scheduler linear --lr_warmup_steps 1 --use_8bit_adam --adam_beta1 0.5 --adam_beta2 0.5
    --adam_weight_decay 0.5 --adam_epsilon 0.1 --max_grad_norm 0.5 --allow_tf32 --channels_last
    --torch_compile --auto_find_batch_size""".split(),
    """--high_noise_power 1 --timestep_bias_strategy later --timestep_bias_multiplier 2
    --timestep_bias_portion 0.5 --prompt_noise 0.1""".split(),
]


def test_a_change_of_each_option_that_must_stay_is_refused(train, two_checkpoints, tmp_path):
    out, refused = shutil.copytree(two_checkpoints, tmp_path / "out"), set()
    for flags in EVERY_CHANGE:
        with pytest.raises(InputError) as caught:
            train(*flags, "--resume_from_checkpoint", "latest", output=out, data=two_checkpoints.parent / "nut")
        refused |= {problem.where for problem in caught.value.problems}
    torch.backends.cuda.matmul.allow_tf32 = False
    assert refused >= set(train_defectfill.IDENTITY)


def test_steps_accumulated_by_the_environment_must_stay_too(train, two_checkpoints, tmp_path, monkeypatch):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(InputError, match="DF320 gradient_accumulation_steps"):
        train("--resume_from_checkpoint", "latest", output=out, data=two_checkpoints.parent / "nut")


def test_a_run_resumes_only_in_as_many_processes_as_it_began_with(train, two_checkpoints, tmp_path, monkeypatch):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    monkeypatch.setattr(train_defectfill.Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match="DF320 processes: the run was started with 1, now it is 2") as caught:
        train("--resume_from_checkpoint", "latest", output=out, data=two_checkpoints.parent / "nut")
    assert len(caught.value.problems) == 1


def test_a_run_resumes_only_on_the_data_it_began_with(train, two_checkpoints, tmp_path):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    with pytest.raises(InputError, match="DF320 data_sha256"):
        train("--split", "all", "--resume_from_checkpoint", "latest", output=out, data=two_checkpoints.parent / "nut")


def test_latest_without_a_checkpoint_starts_anew_but_never_over_something(train, tmp_path):
    out = train("--resume_from_checkpoint", "latest")
    shutil.rmtree(out / "checkpoint-2")
    with pytest.raises(InputError, match="DF186 .*without a usable checkpoint"):
        train("--resume_from_checkpoint", "latest", output=out)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("mine")
    for more in ([], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(InputError, match="DF186 .*other files"):
            train(*more, output=tmp_path / "project")
    assert (tmp_path / "project/README.md").read_text() == "mine"


def test_no_pickle_is_ever_loaded(two_checkpoints, tmp_path, monkeypatch):
    import pickle

    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        (out / "checkpoint-2" / name).write_bytes(b"cos\nsystem\n(S'touch boom'\ntR.")

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    weights = read_lora(out / "checkpoint-2").tensors
    parameters = {name: torch.nn.Parameter(tensor * 0) for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters.values())}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    saved = checkpoints.load(out / "checkpoint-2")
    assert checkpoints.restore(saved, parameters, optimizer, scheduler, None)["step"] == 2


# Faults while saving


def test_a_full_disk_costs_the_checkpoint_not_the_run(train, tmp_path, monkeypatch, caplog):
    def full(tensors, path, **kwargs):
        if "checkpoint-1" not in str(path):
            return save_file(tensors, path, **kwargs)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what safetensors itself makes of it
        try:
            save_file(tensors, path, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    monkeypatch.setattr(checkpoints, "save_file", full)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="DF326 .*checkpoint-1; the results are complete"):
        train("--checkpointing_steps", "1")
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-2"] and (out / LORA_FILE).exists()
    assert "checkpoint-1 could not be written" in caplog.text and not list(out.glob(f"{TEMPORARY}*"))


def test_everything_is_flushed_before_the_rename_and_the_old_deleted_after(train, tmp_path, monkeypatch):
    events = []
    flush, rename, rmtree = checkpoints.flush, checkpoints.rename, shutil.rmtree
    monkeypatch.setattr(checkpoints, "flush", lambda p: (events.append(("flush", Path(p).name)), flush(p)))
    monkeypatch.setattr(checkpoints, "rename", lambda a, b: (events.append(("rename", Path(b).name)), rename(a, b)))
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (events.append(("delete", Path(p).name)), rmtree(p, **k)))
    train("--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    second = events[events.index(("rename", "checkpoint-1")) + 2 :]
    kinds = [kind if kind != "rename" else name for kind, name in second]
    place = kinds.index("checkpoint-2")
    flushed = {name for kind, name in second[:place] if kind == "flush"}
    assert {LORA_FILE, "optimizer.safetensors", "state.json"} <= flushed
    assert "delete" not in kinds[:place] and kinds[place + 1] == "flush" and "delete" in kinds[place + 2 :]


def test_an_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def plant_kill_at_the_end(out: Path, point: str) -> None:
    """Kills the process while it leaves its results: in the LoRA file, after its rename, or as it is compared."""
    save, rename = train_defectfill.save_lora, files.rename

    def save_or_die(path, *args):
        if path.parent == out:
            path.write_bytes(b"torn")
            die()
        save(path, *args)

    def rename_and_die(source, target):
        rename(source, target)
        if target == out / LORA_FILE:
            die()

    if point == "in the file":
        train_defectfill.save_lora = save_or_die
    elif point == "in the comparison":
        train_defectfill.reload_and_compare = lambda *args: die()
    else:
        files.rename = rename_and_die


@pytest.mark.slow
def test_a_run_killed_at_its_end_again_and_again_leaves_the_same_lora(train, base, data, two_checkpoints, tmp_path):
    out, whole = tmp_path / "out", (two_checkpoints / LORA_FILE).read_bytes()
    shutil.copytree(two_checkpoints.parent / "nut", tmp_path / "data/nut")
    flags = ["--checkpointing_steps", "1", "--resume_from_checkpoint", "latest"]
    for point in ("in the file", "after the rename", "in the comparison"):

        def run(point=point):
            plant_kill_at_the_end(out, point)
            reset_accelerate()
            train_defectfill.main(train_defectfill.parse_args(options(base, tmp_path / "data/nut", out, *flags)))

        assert wait_for(fork(run)) == KILLED
        found = (out / LORA_FILE).read_bytes() if (out / LORA_FILE).exists() else None
        assert found == (None if point == "in the file" else whole)
        assert checkpoints.find_checkpoint(out, "latest") == out / "checkpoint-2"
    train(*flags, output=out, data=tmp_path / "data/nut")
    assert (out / LORA_FILE).read_bytes() == whole and (out / "README.md").exists()
    assert not list(out.glob(f"{TEMPORARY}*"))


# Signals and writers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_at_a_step_with_a_checkpoint(train, base, data, tmp_path, uninterrupted, number):
    flags = ["--gradient_accumulation_steps", "1"]
    whole, out = uninterrupted(data, *flags), tmp_path / "stopped"
    write = train_defectfill.LossLog.write

    def write_and_signal(self, line):
        write(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train_defectfill.LossLog, "write", write_and_signal)
        train(*RUN, *flags, output=out)
    assert ended.value.code == 128 + number
    assert checkpoints.list_checkpoints(out)[-1].name == "checkpoint-3"
    train(*RUN, *flags, "--resume_from_checkpoint", "latest", output=out)
    assert same_results(whole, out)


def test_a_signal_in_a_validation_ends_the_run_after_it(train, tmp_path, monkeypatch):
    original = train_defectfill.validation_image

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_defectfill, "validation_image", signalled)
    flags = ["--validation_steps", "1", "--validation_inference_steps", "1", "--max_train_steps", "3"]
    with pytest.raises(SystemExit) as ended:
        train(*flags)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [c.name for c in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert [f.name for f in (tmp_path / "out/validation").iterdir()] == ["step-000001.png"]


def test_a_signal_while_the_results_are_written_does_not_cost_them(train, monkeypatch):
    finish = train_defectfill.finish

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(*args)

    monkeypatch.setattr(train_defectfill, "finish", signalled)
    out = train()
    assert all((out / name).exists() for name in (LORA_FILE, "README.md", "run_record.json"))


def test_a_second_signal_ends_at_once():
    from defectfill.runs.signals import StopSignal

    def two_signals():
        StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    assert wait_for(fork(two_signals)) == 128 + signal.SIGTERM


def test_a_process_without_a_launcher_outlives_its_parent(monkeypatch):
    """`nohup python train_defectfill.py &` and a closed terminal."""
    from defectfill.runs import signals

    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signals.ctypes, "CDLL", None)  # not asked for
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signals.StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_to_launcher_and_process_counts_once(tmp_path, number):
    """A Ctrl-C in the terminal: the process is told twice, by the signal and by its launcher's end."""
    child = """
import os, sys, time
from defectfill.runs.signals import StopSignal
stop = StopSignal()
print("ready", flush=True)
while stop.number is None:
    time.sleep(0.05)
time.sleep(1.5)  # the checkpoint is written
open("written", "w").write(str(stop.number))
"""
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    environment = os.environ | {"LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=tmp_path, env=environment, start_new_session=True, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, number)
    process.wait()
    process.stdout.read()  # until the child, too, has ended
    assert (tmp_path / "written").read_text() == str(int(number))


def test_one_writer_at_a_time(tmp_path):
    ready, go = os.pipe(), os.pipe()

    def writer():
        with exclusive_lock(tmp_path / "out"):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            die()

    pid = fork(writer)
    os.close(ready[1])
    assert os.read(ready[0], 1)
    with pytest.raises(InputError, match="DF191"), exclusive_lock(tmp_path / "out"):
        pass
    os.write(go[1], b"x")
    assert wait_for(pid) == KILLED
    with exclusive_lock(tmp_path / "out"):  # free again, though its holder was killed
        pass


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="DF190"), exclusive_lock(tmp_path / "file" / "out"):
        pass
