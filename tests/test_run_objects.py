"""scripts/run_objects.py: with commands that only note how they were called, and once with the real ones."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from offline import ROOT

import pytest
from folders import make_free_folder, make_mvtec, make_seed_layout
from runs import wait_until
from toy_model import RESOLUTION

from defectfill.runs.files import exclusive_lock
from defectfill_dataset import InputError, RunError
from defectfill_scripts import run_objects


# Writes how it was called, then what its command would. The folder "control" may hold files named by a job: fail-NAME
# makes it fail, and wait lets it wait to be stopped.
STUB = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
from defectfill.runs import signals
control, (stage, *argv) = Path(CONTROL), sys.argv[1:]
output = Path(argv[argv.index("--output_dir") + 1])
line = {"stage": stage, "job": "/".join(output.parts[-3:-1]), "argv": argv, "time": time.monotonic(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
with (control / "calls").open("a") as calls:
    calls.write(json.dumps(line) + "\\n")
print("called")
if (control / f"fail-{stage}-{output.parts[-2]}").exists():
    sys.exit("it failed")
if (control / "wait").exists():
    stop = signals.StopSignal()
    (control / f"waiting-{os.getpid()}").touch()
    while not stop.number:
        time.sleep(0.05)
    (control / f"stopped-{os.getpid()}").write_text(str(int(stop.number)))
    sys.exit(stop.exit_status)
output.mkdir(parents=True, exist_ok=True)
if stage == "generate":
    (output / "images").mkdir(exist_ok=True)
    for i in range(int(argv[argv.index("--num_images") + 1])):
        (output / f"images/{i}.png").touch()
time.sleep(0.1)  # seconds are told to a tenth
"""


@pytest.fixture
def control(tmp_path, monkeypatch) -> Path:
    """The stub's folder; from now on it runs in place of the commands."""
    folder = tmp_path / "control"
    folder.mkdir()
    stub = folder / "stub.py"
    stub.write_text(STUB.replace("ROOT", repr(str(ROOT))).replace("CONTROL", repr(str(folder))))
    monkeypatch.setattr(run_objects, "COMMANDS", {s: [sys.executable, str(stub), s] for s in run_objects.STAGES})
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in run_objects.signals.STOPPING}
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def objects(tmp_path) -> Path:
    """Two objects, of two layouts, with three jobs: nut/hole, plate/hole and plate/stain."""
    make_mvtec(tmp_path / "data/nut")
    make_seed_layout(tmp_path / "data/plate", {"hole": 3, "stain": 3})
    return tmp_path / "data"


def run(*argv) -> str | int | None:
    """How it ended: None, a status or a message."""
    try:
        run_objects.main(run_objects.parse_args([str(a) for a in argv]))
    except SystemExit as end:
        return end.code


def calls(control: Path) -> list[dict]:
    file = control / "calls"
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def names(control: Path) -> list[str]:
    return [f"{call['stage']} {call['job']}" for call in calls(control)]


def summary(folder: Path) -> list[dict]:
    with (folder / "summary.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


JOBS = ["nut/hole", "plate/hole", "plate/stain"]
STEPS = [f"{stage} {job}" for job in JOBS for stage in ("train", "generate")]


def test_each_type_of_each_object_is_trained_and_generated_once(tmp_path, control, objects):
    out = tmp_path / "out"
    given = ["--train_args=--rank 3", "--generate_args", "--batch_size 8 --seed 5"]
    argv = [objects, "--output_dir", out, "--num_images", 2, "--split", "first_third", *given]
    assert run(*argv) is None and names(control) == STEPS
    train, generate = (call["argv"] for call in calls(control)[:2])
    assert train[:2] == ["--rank", "3"] and generate[2:6] == ["--batch_size", "8", "--seed", "5"]
    assert "--defect=hole" in train
    for words in (train, generate):
        assert "--object=nut" in words and words[words.index("--split") + 1] == "first_third"
    assert generate[generate.index("--lora") + 1] == train[train.index("--output_dir") + 1]
    assert generate[:2] == ["--image", str(out / "nut/hole/good")]
    assert {file.name for file in (out / "nut/hole/good").iterdir()} == {f"train-good-00{i}.png" for i in range(3)}
    lines = summary(out)
    assert [f"{line['object']}/{line['defect']}" for line in lines] == JOBS
    assert all(line["status"] == "done" and line["images"] == "2" for line in lines)
    assert all(float(line[f"{stage}_seconds"]) > 0 for line in lines for stage in ("train", "generate"))
    assert run(*argv) is None and names(control) == STEPS  # there is nothing left to do
    argv[argv.index("--num_images") + 1] = 4
    assert run(*argv) is None and names(control)[6:] == STEPS[1::2]
    assert [line["images"] for line in summary(out)] == ["4", "4", "4"]
    assert run(*argv, "--train_args=--rank 4") is None and names(control)[9:] == STEPS


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path, control, objects):
    out = tmp_path / "out"
    (control / "fail-train-stain").touch(), (control / "fail-generate-hole").touch()
    message = run(objects, "--output_dir", out)
    assert message.splitlines()[0] == "Failed:" and len(message.splitlines()) == 4
    log = out / "plate/stain/train.log"
    assert f"plate/stain: train failed with status 1: it failed ({log})" in message
    assert log.read_text() == "called\nit failed\n"
    assert "generate plate/stain" not in names(control)
    assert [line["status"] for line in summary(out)] == ["failed"] * 3
    (control / "fail-train-stain").unlink(), (control / "fail-generate-hole").unlink()
    before = len(calls(control))
    assert run(objects, "--output_dir", out) is None
    assert names(control)[before:] == [STEPS[1], STEPS[3], *STEPS[4:]]
    assert [line["status"] for line in summary(out)] == ["done"] * 3


def test_a_stop_between_training_anew_and_generating_is_noticed(tmp_path, control, objects, monkeypatch):
    argv = [objects, "--output_dir", tmp_path / "out", "--objects", "nut"]
    assert run(*argv) is None

    def killed(job):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_objects, "link_images", killed)
        assert run(*argv, "--train_args=--rank 3") == "killed"
    assert run(*argv, "--train_args=--rank 3") is None and names(control) == [*STEPS[:2], *STEPS[:2]]


def test_a_second_signal_kills_unless_it_is_the_same_wish(tmp_path, control, objects, monkeypatch):
    (control / "wait").touch()

    def send():
        wait_until(lambda: list(control.glob("waiting-*")))
        [process] = (int(file.name.split("-")[1]) for file in control.glob("waiting-*"))
        os.kill(process, signal.SIGSTOP)  # so that it ends by SIGKILL alone
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: sent)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        sent.append(not Path(f"/proc/{process}/stat").read_text().split()[2] == "Z")
        monkeypatch.setattr(run_objects.signals, "TOGETHER", 0)
        os.kill(os.getpid(), signal.SIGTERM)

    sent, stop = [], run_objects.Children.stop
    noted = lambda self, *given: (stop(self, *given), sent.append("signal"))
    monkeypatch.setattr(run_objects.Children, "stop", noted)
    sender = threading.Thread(target=send)
    sender.start()
    assert run(objects, "--output_dir", tmp_path / "out") == 143
    sender.join()
    assert sent == ["signal", "signal", True, "signal"] and not list(control.glob("stopped-*"))


def test_shares_are_disjoint_and_complete(tmp_path, control, objects, monkeypatch):
    out = tmp_path / "out"
    assert run(objects, "--output_dir", out, "--shard", "0/2") is None
    assert names(control) == [*STEPS[:2], *STEPS[4:]]
    assert [line["status"] for line in summary(out)] == ["done", "not done", "done"]
    for name, value in {"ID": 2, "MIN": 1, "MAX": 2, "COUNT": 2}.items():  # sbatch --array=1-2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert run(objects, "--output_dir", out) is None
    assert names(control)[4:] == STEPS[2:4] and [line["status"] for line in summary(out)] == ["done"] * 3


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "1/0", ""])
def test_a_share_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        run_objects.parse_args(["data", "--output_dir", "out", f"--shard={text}"])
    assert "must be I/N" in capsys.readouterr().err


def test_an_array_with_gaps_needs_the_flag(monkeypatch, capsys):
    for name, value in {"ID": 5, "MIN": 3, "MAX": 5, "COUNT": 2}.items():  # sbatch --array=3,5
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(SystemExit):
        run_objects.parse_args(["data", "--output_dir", "out"])
    assert "--shard: a SLURM array with gaps" in capsys.readouterr().err
    assert run_objects.parse_args(["data", "--output_dir", "out", "--shard", "5/8"]).shard == (5, 8)


def test_each_process_has_a_gpu_of_its_own(tmp_path, control, objects, monkeypatch):
    monkeypatch.setattr(run_objects.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    running, most = [], []
    original = run_objects.Children.run

    def watched(self, command, log, gpu):
        running.append(gpu), most.append(sorted(running))
        time.sleep(0.3)
        try:
            return original(self, command, log, gpu)
        finally:
            running.remove(gpu)

    monkeypatch.setattr(run_objects.Children, "run", watched)
    assert run(objects, "--output_dir", tmp_path / "out") is None
    assert max(most, key=len) == ["4", "GPU-7"] and len(calls(control)) == 6
    assert {call["gpu"] for call in calls(control)} == {"4", "GPU-7"}


def test_a_job_that_another_start_has_is_left_to_it(tmp_path, control, objects, capsys):
    with exclusive_lock(tmp_path / "out/plate/hole"):
        assert run(objects, "--output_dir", tmp_path / "out") is None
    assert names(control) == [*STEPS[:2], *STEPS[4:]]
    assert "plate/hole: another start of this script is at it" in capsys.readouterr().out


def test_a_signal_stops_the_commands_gently_and_no_other_begins(tmp_path, control, objects):
    (control / "wait").touch()
    waiting = lambda: len(list(control.glob("waiting-*"))) == 2
    sender = threading.Thread(target=lambda: (wait_until(waiting), os.kill(os.getpid(), signal.SIGTERM)))
    sender.start()
    assert run(objects, "--output_dir", tmp_path / "out", "--processes", 2) == 143
    sender.join()
    assert [f.read_text() for f in control.glob("stopped-*")] == [str(int(signal.SIGUSR1))] * 2
    assert names(control) in (STEPS[:3:2], STEPS[2::-2])
    assert [line["status"] for line in summary(tmp_path / "out")] == ["not done"] * 3
    (control / "wait").unlink()
    assert run(objects, "--output_dir", tmp_path / "out") is None and names(control)[2:] == STEPS


def test_the_commands_end_with_a_killed_start(tmp_path, control, objects):
    (control / "wait").touch()
    code = f"""
from defectfill_scripts import run_objects
run_objects.COMMANDS = {run_objects.COMMANDS}
run_objects.main(run_objects.parse_args({[str(objects), "--output_dir", str(tmp_path / "out")]}))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: list(control.glob("waiting-*")))
    process.kill(), process.wait()
    wait_until(lambda: list(control.glob("stopped-*")))
    (control / "wait").unlink()
    assert run(objects, "--output_dir", tmp_path / "out") is None and names(control)[1:] == STEPS


def test_the_plan_is_printed_and_nothing_done(tmp_path, control, objects, capsys):
    run(objects, "--output_dir", tmp_path / "out", "--objects", "nut")
    capsys.readouterr()
    assert run(objects, "--output_dir", tmp_path / "out", "--plan") is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 jobs, 1 of them done" and len(calls(control)) == 2
    assert [line for line in lines if not line.startswith(" ")][1:] == JOBS[1:]
    assert "--defect=stain" in shlex.split(lines[-2])


def test_images_of_defects_are_not_generated_on(tmp_path, control):
    make_free_folder(tmp_path / "data/nut")
    assert run(tmp_path / "data", "--output_dir", tmp_path / "out") is None
    assert [file.name for file in (tmp_path / "out/nut/defect/good").iterdir()] == ["good-x.png"]


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--objects", "nit"], "DF162 --objects nit: not in .*'nut'"),
        (["--train_args=--output_dir x"], "DF188 --train_args: holds --output_dir"),
        (["--train_args=--push_to_hub"], "DF188 --train_args: holds --push_to_hub"),
        (["--generate_args", "--lora=x --num_images 3"], r"DF188 --generate_args: holds --lora(.|\n)*--num_images"),
    ],
)
def test_wrong_input_is_told_before_anything_begins(tmp_path, control, objects, argv, told):
    with pytest.raises(InputError, match=told):
        run(objects, "--output_dir", tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_a_flag_that_a_command_does_not_know_ends_it_at_once(tmp_path, control, objects, capsys):
    assert run(objects, "--output_dir", tmp_path / "out", "--train_args=--rnak 3") == 2
    assert "unrecognized arguments: --rnak 3" in capsys.readouterr().err and not calls(control)


def test_objects_without_good_images_or_defects_are_told(tmp_path, control):
    make_mvtec(tmp_path / "data/nut", good=0)
    with pytest.raises(InputError, match="DF160 .*nut.* no good images"):
        run(tmp_path / "data", "--output_dir", tmp_path / "out")
    assert run(tmp_path / "data", "--output_dir", tmp_path / "out", "--generate_args", "--image photos") is None


def test_files_that_are_not_ours(tmp_path, control, objects):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="DF192 .*summary.csv"):
        run(objects, "--output_dir", out)
    assert (out / "summary.csv").read_text() == "a,b\n"
    (out / "summary.csv").unlink()
    (out / "nut/hole").mkdir(parents=True)
    (out / "nut/hole/job.json").write_text('{"train": {"command": 3}}')
    message = run(objects, "--output_dir", out)
    assert "nut/hole: DF310" in message and len(names(control)) == 4


def test_the_name_of_a_type_that_failed_is_on_one_line(tmp_path, control):
    make_seed_layout(tmp_path / "data/plate", {"hole": 3})
    for folder in [*(tmp_path / "data/plate").rglob("hole")]:
        folder.rename(folder.with_name("hole\nForged: fine"))
    (control / "fail-train-hole_Forged_fine").touch()
    message = run(tmp_path / "data", "--output_dir", tmp_path / "out")
    assert [line.partition(":")[0] for line in message.split("\n")] == ["Failed", "plate/hole\\nForged"]


def test_other_data_and_another_base_are_not_taken_for_done(tmp_path, control, objects, base):
    argv = [objects, "--output_dir", tmp_path / "out", "--objects", "nut"]
    argv.append(f"--train_args=--pretrained_model_name_or_path {shutil.copytree(base, tmp_path / 'base')}")
    assert run(*argv) is None and run(*argv) is None and names(control) == STEPS[:2]
    for number, name in enumerate(("test/hole/000.png", "ground_truth/hole/000_mask.png", "train/good/000.png")):
        file = objects / "nut" / name
        file.write_bytes(file.read_bytes() + b"changed")
        assert run(*argv) is None and run(*argv) is None and names(control) == STEPS[:2] * (2 + number), name
    config = tmp_path / "base/scheduler/scheduler_config.json"
    config.write_text(config.read_text() + " ")
    assert run(*argv) is None and names(control) == STEPS[:2] * 5


def test_a_folder_good_of_something_else_stays(tmp_path, control, objects):
    (own := tmp_path / "out/nut/hole/good").mkdir(parents=True)
    (own / "photo.png").write_bytes(b"the only copy")
    (tmp_path / "out/plate/hole").mkdir(parents=True)
    (tmp_path / "out/plate/hole/good").symlink_to(own)
    message = run(objects, "--output_dir", tmp_path / "out")
    assert f"nut/hole: DF192 {own}: is not of this script" in message and "plate/hole: DF192" in message
    assert (own / "photo.png").read_bytes() == b"the only copy" and len(list(own.iterdir())) == 1
    assert names(control) == [*STEPS[:4:2], *STEPS[4:]]


@pytest.mark.parametrize("kind", ["pipe", "folder", "file above"])
def test_an_output_folder_that_cannot_be_used_is_one_line(tmp_path, control, objects, kind):
    out = tmp_path / "out"
    if kind == "file above":
        out.write_text("x")
        with pytest.raises(RunError, match="DF324 .*cannot be written"):
            run(objects, "--output_dir", out / "runs")
        return
    out.mkdir()
    os.mkfifo(out / "summary.csv") if kind == "pipe" else (out / "summary.csv").mkdir()
    with pytest.raises(InputError, match="DF192 .*summary.csv"):
        run(objects, "--output_dir", out)


def test_a_good_image_whose_path_is_too_long_a_name_is_told(tmp_path, control, objects):
    file = objects / f"nut/train/good/{'x' * 120}/{'y' * 130}.png"
    file.parent.mkdir()
    shutil.copy(objects / "nut/train/good/000.png", file)
    with pytest.raises(InputError, match="DF202 .*yyy"):
        run(objects, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("flag", ["--train_args", "--generate_args"])
def test_flags_in_quotes_that_cannot_be_split(capsys, flag):
    with pytest.raises(SystemExit):
        run_objects.parse_args(["data", "--output_dir", "out", flag, "--prompt 'a"])
    assert "cannot be split: No closing quotation" in capsys.readouterr().err


def test_numbers_of_the_machine_are_bounded(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_objects.parse_args(["data", "--output_dir", "out", "--processes", "1000000000"])
    assert "must be at most 1,000" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "x")
    assert run_objects.parse_args(["data", "--output_dir", "out", "--shard", "0/2"]).shard == (0, 2)


@pytest.mark.slow
def test_three_objects_with_two_processes_one_start_killed(tmp_path, base):
    for name in ("nut", "plate", "cloth"):
        make_mvtec(tmp_path / "data" / name)
    toy = f"""--pretrained_model_name_or_path {base} --resolution {RESOLUTION} --max_train_steps 2 --train_batch_size 2
        --rank 4 --validation_steps 0 --report_to none"""
    fast = "--num_inference_steps 2 --num_candidates 2 --selection rmse"
    out = tmp_path / "out"
    argv = ["--output_dir", out, "--processes", "2", "--num_images", "2", "--train_args", toy, "--generate_args", fast]
    command = [sys.executable, ROOT / "scripts/run_objects.py", tmp_path / "data", *argv]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: list(out.glob("*/*/job.json")), 200)
    first.kill(), first.wait()
    trained = len(list(out.glob("*/*/lora/pytorch_lora_weights.safetensors")))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 < trained < 3
    lines = summary(out)
    assert [line["object"] for line in lines] == ["cloth", "nut", "plate"]
    assert all(line["status"] == "done" and line["images"] == "2" for line in lines)
    for line in lines:
        folder = out / line["object"] / "hole"
        assert (folder / "lora/pytorch_lora_weights.safetensors").exists() and (folder / "train.log").stat().st_size
        assert len(list((folder / "generated/masks").iterdir())) == 2
