"""A folder that another run finished meanwhile, and folders of something else: nothing in them is overwritten."""

import errno
import fcntl
import functools
import json
import os
import shutil
import signal

import filelock
import pytest
from generated_folder import export
from runs import FAST, check, fork, generate, wait_for

from defectfill.lora import LORA_FILE
from defectfill.runs.files import exclusive_lock
from defectfill.runs.manifest import PLAN
from defectfill_dataset import InputError, RunError, data_digest, load_defect_pairs
from defectfill_dataset.builder import DefectPairs
from defectfill_scripts import prepare_data


def contents(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


@pytest.fixture
def before_the_lock(monkeypatch):
    """before_the_lock(action): does it when a command is about to lock its folder."""

    def plant(action):
        lock = filelock.FileLock

        def late(*args, **kwargs):
            action()
            return lock(*args, **kwargs)

        monkeypatch.setattr(filelock, "FileLock", late)

    return plant


@pytest.mark.parametrize("more", [[], ["--resume_from_checkpoint", "latest"]])
def test_a_run_that_finished_before_the_lock_is_not_trained_over(train, trained, tmp_path, before_the_lock, more):
    out = tmp_path / "out"
    before_the_lock(lambda: shutil.copytree(trained, out, dirs_exist_ok=True))
    whole = contents(trained)
    if more:
        train(*more, "--learning_rate", "0.01", "--text_encoder_lr", "0.01", data=trained.parent / "nut")
        assert contents(out)[LORA_FILE] == whole[LORA_FILE]  # it was resumed at its end
    else:
        with pytest.raises(InputError, match="DF186"):
            train()
        assert contents(out) == whole


def test_a_generation_that_finished_before_the_lock_is_not_made_again(trained, inputs, tmp_path, before_the_lock):
    argv = ["--lora", trained, *inputs, *FAST]
    generate(*argv, "--output_dir", tmp_path / "first")
    whole = contents(tmp_path / "first/images")
    before_the_lock(lambda: shutil.copytree(tmp_path / "first", tmp_path / "out", dirs_exist_ok=True))
    with pytest.raises(InputError, match="DF320"):
        generate(*argv, "--seed", 1, "--output_dir", tmp_path / "out")
    assert contents(tmp_path / "out/images") == whole


def test_of_processes_that_start_at_once_one_writes(tmp_path):
    """Whoever has the lock keeps it until the others have been refused."""
    for race in range(5):
        (start, go), (told, refused), out = os.pipe(), os.pipe(), tmp_path / str(race)

        def writer(start=start, told=told, refused=refused, out=out):
            os.read(start, 1)
            try:
                with exclusive_lock(out):
                    assert len(os.read(told, 1) + os.read(told, 1) + os.read(told, 1)) == 3
                os._exit(7)
            except InputError as error:
                assert error.problems[0].code == "DF191"
                os.write(refused, b"x")

        writers = [fork(writer, seconds=30) for _ in range(4)]
        os.write(go, b"xxxx")
        assert sorted(map(wait_for, writers)) == [0, 0, 0, 7]
        for end in (start, go, told, refused):
            os.close(end)


def test_a_cache_that_is_built_at_once_or_by_a_killed_process_is_whole(data, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    examples = DefectPairs._generate_examples

    def one_and_die(self, *args, **kwargs):
        yield next(iter(examples(self, *args, **kwargs)))
        os.kill(os.getpid(), signal.SIGKILL)

    def load(to=None):
        found = load_defect_pairs(data, cache_dir=str(cache))
        (tmp_path / to).write_text(json.dumps({split: data_digest(rows) for split, rows in found.items()}))

    with monkeypatch.context() as patch:
        patch.setattr(DefectPairs, "_generate_examples", one_and_die)
        assert wait_for(fork(functools.partial(load, "killed"))) == -signal.SIGKILL
    assert list(cache.rglob("*.incomplete"))
    loading = [fork(functools.partial(load, f"digest-{number}"), seconds=60) for number in range(3)]
    assert [wait_for(pid) for pid in loading] == [0, 0, 0]
    digests = {(tmp_path / f"digest-{number}").read_text() for number in range(3)}
    cache = tmp_path / "other"
    load("alone")
    assert digests == {(tmp_path / "alone").read_text()} and not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_lock_that_is_a_link_leads_nowhere(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "out/.lock").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="DF190"), exclusive_lock(tmp_path / "out"):
        pass
    (tmp_path / "out/.lock").unlink()
    (tmp_path / "out/.lock").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="DF190"), exclusive_lock(tmp_path / "out"):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """As some network drives: there is one writer at a time all the same, or none."""

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number != errno.ENOSYS:
        with pytest.raises(InputError, match="DF190"), exclusive_lock(tmp_path / "out"):
            pass
        return
    with exclusive_lock(tmp_path / "out"), pytest.raises(InputError, match="DF191"), exclusive_lock(tmp_path / "out"):
        pass


def test_a_file_system_that_cannot_rename_is_told_at_the_start(train, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr("defectfill.runs.files.os.replace", refuse)
    monkeypatch.setattr("train_defectfill.load_models", None)  # not reached
    with pytest.raises(RunError, match=r"DF324 .*out: cannot be written \(.*Invalid cross-device link"):
        train()
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.fixture
def project(tmp_path):
    """project(name): a folder of something else, with one file of this name; project.check(): it is untouched."""
    folder, files = tmp_path / "project", {}

    def make(name: str):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[1]")
        files[name] = b"[1]"
        return folder

    make.check = lambda: ({str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.*")}, files)
    return make


def untouched(project) -> bool:
    found, files = project.check()
    return found == files


TRAINING = ["split.json", "run_record.json", "losses.jsonl", "README.md", LORA_FILE, "validation/step-000002.png"]


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("more", [[], ["--resume_from_checkpoint", "latest"]])
def test_training_keeps_out_of_a_folder_of_something_else(train, project, name, more):
    with pytest.raises(InputError, match=f"DF186 --output_dir .*{name.partition('/')[0]}"):
        train(*more, output=project(name))
    assert untouched(project)


def test_training_from_anothers_checkpoint_keeps_out_of_a_folder_of_something_else(train, trained, project):
    out = project("split.json")
    with pytest.raises(InputError, match="DF186"):
        train("--resume_from_checkpoint", str(trained / "checkpoint-2"), output=out)
    assert untouched(project)


def test_a_start_that_was_killed_before_its_first_checkpoint_starts_anew(train):
    out = train()
    for file in out.iterdir():
        if file.name not in ("split.json", "run_record.json", "losses.jsonl"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert (train(output=out) / LORA_FILE).exists()


def test_the_record_comes_first(train, tmp_path, monkeypatch):
    """It tells that the rest is ours."""
    import train_defectfill

    def killed(path, content):
        path.write_text(json.dumps(content))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_defectfill, "write_json", killed)
        train()
    assert [f.name for f in (tmp_path / "out").glob("*.json")] == ["run_record.json"]


GENERATION = ["settings.json", PLAN, "manifest.jsonl", "manifest.parquet", "manifest-part-00000.jsonl", "summary.html"]


@pytest.mark.parametrize("name", [*GENERATION, "contact_sheet.png", "speed.json"])
def test_generation_keeps_out_of_a_folder_of_something_else(trained, inputs, project, name):
    with pytest.raises(InputError, match=f"DF192 --output_dir .*{name}"):
        generate("--lora", trained, *inputs, "--output_dir", project(name), *FAST)
    assert untouched(project)


def test_generation_looks_again_once_it_has_the_lock(trained, inputs, project, before_the_lock):
    before_the_lock(lambda: project("summary.html"))
    with pytest.raises(InputError, match="DF192 --output_dir .*summary.html"):
        generate("--lora", trained, *inputs, "--output_dir", project("notes.txt"), *FAST)
    assert {f.name for f in project("notes.txt").iterdir()} == {"notes.txt", "summary.html", ".lock"}


@pytest.mark.parametrize("file_format", ["parquet", "imagefolder"])
def test_a_readme_of_something_else_is_no_dataset_of_ours(data, project, file_format):
    out = project("README.md")
    argv = prepare_data.parse_args([str(data), "--output_dir", str(out), "--format", file_format])
    with pytest.raises(InputError, match="DF193 .*README.md"):
        prepare_data.main(argv)
    (out / ".lock").unlink(missing_ok=True)
    assert untouched(project)


@pytest.mark.parametrize(
    "file_format, name",
    [("yolo", "data.yaml"), ("coco", "annotations_train.json"), ("parquet", "README.md"), ("anomalib", "samples.csv")],
)
def test_an_export_keeps_out_of_a_folder_of_something_else(generated, photos, project, file_format, name):
    out = project(name)
    with pytest.raises(InputError, match=f"DF193 .*{name}"):
        export(out, file_format, generated, "--good", photos)
    (out / ".lock").unlink(missing_ok=True)
    assert untouched(project)


@pytest.mark.parametrize("name", ["report.json", "nut.png"])
def test_a_check_keeps_out_of_a_folder_of_something_else(data, project, name):
    with pytest.raises(InputError, match=f"DF192 --output_dir .*{name}"):
        check(data, "--output_dir", project(name))
    assert untouched(project)


def test_a_check_replaces_its_own_report(data, tmp_path):
    for _ in range(2):
        assert check(data, "--output_dir", tmp_path / "report") == 0
    assert {f.name for f in (tmp_path / "report").iterdir()} == {"report.json", "nut.png"}
