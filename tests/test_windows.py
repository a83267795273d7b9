"""File handling under the rules of Windows, which are simulated: no Windows machine was used.

There a folder cannot be opened, fsync needs a handle that may write, and nothing is renamed, replaced or deleted while
a file of it is open or mapped, in this process or another.
"""

import ast
import contextlib
import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

from offline import ROOT

import filelock
import pytest
from runs import FAST, content, generate, read_lines

from defectfill.lora import LORA_FILE
from defectfill.runs import checkpoint as checkpoints
from defectfill.runs import files
from defectfill.runs.files import atomic_write, clear_leftovers, exclusive_lock, flush, publish_dir, write_json
from defectfill_dataset import InputError


def in_use(path) -> bool:
    """Whether this process has the file, or one inside the folder, open or mapped."""
    path = os.path.abspath(path)
    used = [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            used.append(os.readlink(f"/proc/self/fd/{handle}"))
    return any(name == path or name.startswith(f"{path}/") for name in used)


@pytest.fixture
def windows(monkeypatch, tmp_path):
    """Windows' rules for all that lies in `tmp_path`."""
    refused = []

    def inside(path) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(str(tmp_path))

    def refuse(path):
        refused.append(Path(path).name)
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def guard(name: str, *forbidden):
        original = getattr(os, name)

        def guarded(path, *args, **kwargs):
            for rule in forbidden if inside(path) else ():
                rule(path, *args)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, guarded)

    def not_in_use(*paths):
        for path in paths:
            if in_use(path):
                refuse(path)

    def no_folder(path, *_):
        if os.path.isdir(path):
            refuse(path)

    def no_target(source, target):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))

    def no_target_folder(source, target):
        no_folder(target)

    guard("open", no_folder)
    guard("rename", not_in_use, no_target)
    guard("replace", not_in_use, no_target_folder)
    for name in ("unlink", "remove", "rmdir"):
        guard(name, not_in_use)
    fsync = os.fsync

    def fsync_of_a_writer(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync_of_a_writer)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    monkeypatch.setattr(files.filelock, "FileLock", filelock.SoftFileLock)  # filelock's own without fcntl
    return refused


@pytest.fixture
def held(windows):
    """Another program that opens a file, to the end of the test or until it was in the way once."""
    ended, threads = threading.Event(), []

    def hold(path: Path, once: bool = False) -> None:
        stream = path.open()

        def close():
            while not (ended.wait(0.01) or once and windows):
                pass
            stream.close()

        threads.append(threading.Thread(target=close))
        threads[-1].start()

    yield hold
    ended.set()
    for thread in threads:
        thread.join()


def test_the_rules_are_those_of_windows(windows, tmp_path):
    """The simulation refuses what ours must not do."""
    (tmp_path / "a").write_text("a")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    with (tmp_path / "a").open() as stream:
        with pytest.raises(OSError, match="Bad file"):
            os.fsync(stream.fileno())
        for forbidden in (os.unlink, lambda a: os.replace(a, tmp_path / "b"), lambda a: os.rename(a, tmp_path / "b")):
            with pytest.raises(PermissionError):
                forbidden(tmp_path / "a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        os.rename(tmp_path / "a", tmp_path / "b")


def test_files_and_folders_are_flushed(windows, tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    flush(tmp_path / "x.json"), flush(tmp_path)
    assert windows == []


def test_a_file_that_another_program_has_open_for_a_while_is_replaced_after_it(held, windows, tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    held(tmp_path / "x.json", once=True)
    write_json(tmp_path / "x.json", {"a": 2})
    assert windows and (tmp_path / "x.json").read_text() == '{\n  "a": 2\n}\n'
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_stays_open_is_an_error_and_keeps_its_content(held, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    write_json(tmp_path / "x.json", {"a": 1})
    held(tmp_path / "x.json")
    with pytest.raises(PermissionError):
        write_json(tmp_path / "x.json", {"a": 2})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


def test_elsewhere_a_forbidden_rename_is_an_error_at_once(tmp_path, monkeypatch):
    calls = []

    def forbidden(source, target):
        calls.append(target)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", forbidden)
    with pytest.raises(PermissionError), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert len(calls) == 1


def test_leftovers_that_are_open_wait_for_the_next_start(held, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{files.TEMPORARY}{name}").write_text("")
    held(tmp_path / f"{files.TEMPORARY}a")
    clear_leftovers(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [f"{files.TEMPORARY}a"]


def test_a_folder_is_published(windows, tmp_path):
    for name in ("new/data/a.txt", "new/README.md", "old/data/a.txt", "old/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a" if name.endswith("a.txt") else name)
    publish_dir(tmp_path / "new", tmp_path / "old", last="README.md")
    assert (tmp_path / "old/README.md").read_text() == "new/README.md"
    (tmp_path / "new/README.md").write_text("new")
    (tmp_path / "empty").mkdir()
    publish_dir(tmp_path / "new", tmp_path / "empty", last="README.md")
    assert (tmp_path / "empty/data/a.txt").exists()


def test_one_writer_at_a_time(windows, tmp_path):
    with exclusive_lock(tmp_path / "out"):
        with pytest.raises(InputError, match="DF191"), exclusive_lock(tmp_path / "out"):
            pass
    with exclusive_lock(tmp_path / "out"):
        pass


def test_a_training_saves_rotates_and_resumes(windows, train, tmp_path):
    flags = "--checkpointing_steps 1 --checkpoints_total_limit 2 --max_train_steps".split()
    out = train(*flags, "3")
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    train(*flags, "6", "--resume_from_checkpoint", "latest", output=out)  # deletes what it resumed from
    train(*flags, "6", "--resume_from_checkpoint", "checkpoint-5", output=out)
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-5", "checkpoint-6"]
    assert len(read_lines(out / "losses.jsonl")) == 6 and (out / LORA_FILE).exists()
    assert set(windows) <= {".lock"} and not list(out.glob(f"{files.TEMPORARY}*"))


def test_an_old_checkpoint_that_is_open_does_not_end_the_run(windows, train, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    flags = "--checkpointing_steps 1 --checkpoints_total_limit 1 --max_train_steps".split()
    out = train(*flags, "1")
    with (out / "checkpoint-1/state.json").open():
        train(*flags, "2", "--resume_from_checkpoint", "latest", output=out)
    assert [c.name for c in checkpoints.list_checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert "checkpoint-1 could not be deleted" in caplog.text and (out / LORA_FILE).exists()


def test_a_generation_is_made_and_repeated(windows, trained, inputs, tmp_path):
    flags = [*inputs, "--lora", trained, *FAST, "--output_dir", tmp_path / "out"]
    generate(*flags)
    made = content(tmp_path / "out")
    generate(*flags)
    assert content(tmp_path / "out") == made and len(made) == 14 and set(windows) <= {".lock"}


UNIX_ALONE = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}


def test_no_module_of_ours_needs_unix():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("defectfill*/**/*.py"), *ROOT.glob("scripts/*.py")]
    assert len(sources) > 60
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not UNIX_ALONE.intersection(names), source
            assert not (isinstance(node, ast.ImportFrom) and node.module in UNIX_ALONE), source
