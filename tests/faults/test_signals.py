"""Real commands, alone and under `accelerate launch`, that are signalled at any moment: all processes end, and the
folder's lock is free."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from offline import ROOT

import pytest
from folders import make_mvtec
from runs import FAST, FULL, fork, options, wait_for

from defectfill.runs import signals
from defectfill.runs.checkpoint import list_checkpoints
from defectfill.runs.files import exclusive_lock
from defectfill_dataset import InputError


SECONDS = 90  # for a start, and for an end; processes of the toy models need a few


def wait_until(condition, seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def processes(mark: Path) -> list[int]:
    """The processes whose command names this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(mark).encode() in (folder / "cmdline").read_bytes() and "Z" not in status(folder):
                found.append(int(folder.name))
        except OSError:
            pass
    return sorted(found)


def status(folder: Path) -> str:
    return (folder / "stat").read_text().rpartition(")")[2].split()[0]


class Command:
    """A run of a command that would take for ever; `until` waits for a moment of it."""

    def __init__(self, base, trained, folder: Path, name: str, ranks: int):
        """ranks: 0 for a process without a launcher."""
        self.out, self.folder, self.ranks = folder / "out", folder, max(1, ranks)
        if name == "train":
            data = make_mvtec(folder / "nut")
            more = ["--max_train_steps", "100000", "--train_batch_size", "1", "--lr_warmup_steps", "0"]
            words = [ROOT / "train_defectfill.py", *options(base, data, self.out, *more)]
            self.working = lambda: (self.out / "losses.jsonl").exists() and (self.out / "losses.jsonl").stat().st_size
        else:
            good = make_mvtec(folder / "nut") / "train/good"
            words = [ROOT / "generate_defectfill.py", "--lora", trained, "--image", good, "--mask_source", "random"]
            words += ["--num_images", 2000, "--output_dir", self.out, *FAST]
            self.working = lambda: any(self.out.glob("images/0*.png"))
        launch = [sys.executable]
        if ranks:
            flags = f"--num_processes {ranks} --num_machines 1 --mixed_precision no --dynamo_backend no".split()
            launch += ["-m", "accelerate.commands.launch", *flags, *(["--multi_gpu"] if ranks > 1 else [])]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
        with (folder / "said").open("wb") as said:
            self.process = subprocess.Popen(
                [*map(str, launch), *map(str, words)],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.launched = bool(ranks)

    def until(self, moment: str) -> None:
        wanted = self.ranks + self.launched
        assert wait_until({
            "at once": lambda: time.sleep(0.5) is None,
            "child": lambda: len(processes(self.folder)) >= wanted,
            "import": lambda: len(processes(self.folder)) >= wanted and time.sleep(1) is None,
            "lock": (self.out / ".lock").exists,
            "work": self.working,
        }[moment]), self.said  # fmt: skip

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def has_ended(self) -> bool:
        """Whether nothing is left of it."""
        return wait_until(lambda: self.process.poll() is not None and not processes(self.folder))

    def kill(self) -> None:
        for pid in processes(self.folder):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(base, trained, tmp_path):
    """start(name, ranks): a `Command`; nothing of it outlives the test."""
    started = []

    def run(name: str, ranks: int) -> Command:
        started.append(Command(base, trained, tmp_path, name, ranks))
        return started[0]

    yield run
    for command in started:
        command.kill()


def check_left(command: Command) -> None:
    assert command.has_ended(), (processes(command.folder), command.said)
    assert wait_until(lambda: is_free(command.out), 10)  # a process that ends closes its files last


def is_free(folder: Path) -> bool:
    try:
        with exclusive_lock(folder):
            return True
    except InputError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "generate"])
@pytest.mark.parametrize(
    "moment, number",
    [("import", signal.SIGTERM), FULL("import", signal.SIGINT), FULL("lock", signal.SIGTERM),
     FULL("work", signal.SIGTERM), ("work", signal.SIGINT)],
)  # fmt: skip
def test_a_signal_ends_a_process_with_its_number_and_says_how_to_go_on(start, name, moment, number):
    command = start(name, 0)
    command.until(moment)
    command.process.send_signal(number)
    check_left(command)
    assert command.process.returncode == 128 + number
    assert "Traceback" not in command.said
    if moment == "import":
        assert "Stopped before the run began. Run the same command again." in command.said
    elif name == "train":
        assert "resume with --resume_from_checkpoint latest" in command.said and list_checkpoints(command.out)
    else:
        count = (
            rf"\d+ of 2000 images are finished in {command.out}" if moment == "work" else ".*generated yet|0 of 2000"
        )
        assert re.search(rf"Stopped: ({count}).*\. Run the same command again", command.said)


LAUNCHED = [
    FULL("at once", signal.SIGTERM), FULL("child", signal.SIGKILL), ("import", signal.SIGINT),
    FULL("lock", signal.SIGKILL), ("work", signal.SIGTERM), FULL("work", signal.SIGKILL),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "generate"])
@pytest.mark.parametrize("ranks", [FULL(1), 2])
@pytest.mark.parametrize("moment, number", LAUNCHED)
def test_no_process_outlives_its_launcher(start, name, ranks, moment, number):
    command = start(name, ranks)
    command.until(moment)
    command.process.send_signal(number)
    check_left(command)
    assert list_checkpoints(command.out) or (name, moment) != ("train", "work")


@pytest.mark.slow
def test_a_launcher_that_ends_with_its_first_process_leaves_nothing(start):
    """The process has not loaded Python yet."""
    command = start("generate", 1)
    command.until("child")
    command.process.send_signal(signal.SIGTERM)
    assert command.has_ended(), command.said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "generate"])
def test_one_signal_to_all_processes_of_a_run_counts_once(start, name):
    """As a scheduler sends it; the launcher sends it to its processes again."""
    command = start(name, 2)
    command.until("work")
    for pid in processes(command.folder):
        os.kill(pid, signal.SIGTERM)
    check_left(command)
    assert ("resume with" if name == "train" else "images are finished in") in command.said


# Parts of it


def test_a_later_second_signal_ends_a_launched_process_at_once(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals, "TOGETHER", 0.5)
    read, write = os.pipe()

    def process():
        stop = signals.StopSignal()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by the launcher
        assert stop.number == signal.SIGINT
        os.write(write, b"goes on")
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGTERM)

    assert wait_for(fork(process)) == 143
    os.close(write)
    assert os.read(read, 9) == b"goes on"


@pytest.mark.parametrize("orphan, parents", [(True, [7, 7]), (False, [7, 1])])
def test_a_launcher_that_ended_before_its_end_was_asked_for_is_noticed(monkeypatch, orphan, parents):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals, "is_orphan", lambda parent: orphan)

    def process():
        monkeypatch.setattr(signals.os, "getppid", iter(parents).__next__)
        assert signals.StopSignal().number == signals.GENTLE

    assert wait_for(fork(process)) == 0


def test_a_library_that_does_not_return_holds_up_no_signal():
    """A gather waits for other processes in C++, where no handler runs; here a lock of C's does."""

    def hangs():
        import ctypes

        with signals.exit_on_signal(lambda: "Stopped"):
            libc = ctypes.CDLL(None)
            lock = ctypes.create_string_buffer(64)
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(0.3)
                os.kill(pid, signal.SIGTERM)
                os._exit(0)
            libc.pthread_mutex_lock(lock), libc.pthread_mutex_lock(lock)

    assert wait_for(fork(hangs, seconds=30)) == 143


def test_a_forked_child_has_its_own_signals():
    def parent():
        with signals.exit_on_signal(lambda: "Stopped"):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            time.sleep(0.3)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.3)
            os._exit(7)  # and is still there

    assert wait_for(fork(parent)) == 7


def test_signals_are_as_before_once_it_is_left():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with signals.exit_on_signal(lambda: ""):
        assert signal.getsignal(signal.SIGTERM) is signals.wake
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_the_process_ends_with_its_launcher(monkeypatch, platform):
    """SIGTERM to `accelerate launch` kills only the launcher. Where the system cannot, a thread watches it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(signals.sys, "platform", platform)
    read, write = os.pipe()

    def process():
        stop = signals.StopSignal()
        os.write(write, b"ready")
        wait_until(lambda: stop.number is not None, 20)
        os.write(write, f" {stop.number}".encode())

    assert wait_for(fork(lambda: (fork(process), os.read(read, 5)))) == 0
    os.close(write)
    assert os.read(read, 9) == f" {signal.SIGUSR1:d}".encode()


def test_an_orphan_is_known_by_its_parent(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    assert not signals.is_orphan(1)  # nothing says that it was launched
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"/sbin/init\0")
    assert signals.is_orphan(1) and not signals.is_orphan(2)
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"/usr/bin/python\0/usr/bin/accelerate\0launch")
    assert not signals.is_orphan(1)  # the launcher of a container
