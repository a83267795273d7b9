"""The lock, the package, and what the commands print at their start and end."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from offline import ROOT

import pytest
from lock import differences, failures, read_lock, read_requirements
from packaging.utils import canonicalize_name
from runs import FULL, options

import generate_defectfill
import train_defectfill
from defectfill_dataset import commands


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PYPROJECT["project"]["scripts"]
REQUIREMENTS = [ROOT / folder / "requirements.txt" for folder in ("", "tests", "tests/consumers")]
LAUNCH = "--num_machines 1 --mixed_precision no --dynamo_backend no".split()


# The lock


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_lock_holds_all_requirements_within_their_ranges(python):
    lock = read_lock(python)
    for requirement in (r for path in REQUIREMENTS for r in read_requirements(path)):
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), requirement


@pytest.mark.skipif("NEWEST" in os.environ, reason="--newest does without the lock")
def test_what_is_installed_is_what_the_lock_says():
    assert differences() == {}, "remove the environment and make it anew"


def test_setuptools_is_the_same_for_the_build_and_the_tests():
    assert PYPROJECT["build-system"]["requires"] == [f"setuptools=={read_lock()['setuptools']}"]


def test_a_failure_names_the_packages_that_differ_in_its_traceback(tmp_path):
    (tmp_path / "tests.xml").write_text("""<testsuites><testsuite>
        <testcase classname="tests.test_a" name="one"><failure>site-packages/peft/x.py:1: in f</failure></testcase>
        <testcase classname="tests.test_a" name="two"><error>tests/test_a.py:3: in g</error></testcase>
        <testcase classname="tests.test_a" name="three"/></testsuite></testsuites>""")
    assert failures(tmp_path / "tests.xml", {"peft": "0.21.2 -> 0.22.0", "torch": "1 -> 2"}) == [
        "tests.test_a::one: inside of peft 0.21.2 -> 0.22.0",
        "tests.test_a::two: inside of nothing that differs",
    ]


# The package


def files(*names: str) -> set[str]:
    """The files of the clone with these names or in these folders."""
    paths = (path for name in names for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


CODE = files("defectfill", "defectfill_dataset", "generate_defectfill.py", "scripts", "train_defectfill.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the clone, without a download."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in CODE | files("LICENSE", "README.md", "docs", "pyproject.toml", "requirements.txt", "tests"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = "-m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir".split()
    subprocess.run([sys.executable, *command, folder, source], check=True)
    [wheel] = folder.iterdir()
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name.replace("scripts/", "defectfill_scripts/", 1) for name in CODE if not name.endswith(".sh")}


@pytest.mark.slow
def test_the_wheel_demands_what_requirements_txt_says(wheel):
    [name] = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    demanded = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert demanded == {str(r) for r in read_requirements(REQUIREMENTS[0])}


@pytest.mark.slow
def test_a_command_of_the_wheel_runs_far_from_the_clone(wheel, tmp_path):
    target = [*"-m pip install --quiet --no-deps --no-index --target".split(), tmp_path / "site"]
    subprocess.run([sys.executable, *target, wheel], check=True)
    code = "import defectfill_scripts.make_demo_data as m; m.main(); print(m.__file__)"
    flags = "--output_dir data --parts nut --size 32 --good 1 --defects 1".split()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path)) and (tmp_path / "data/nut/train/good/000.png").exists()


def test_every_script_is_a_command():
    expected = {
        f"defectfill-{Path(name).stem.removesuffix('_defectfill').replace('_', '-')}"
        for name in CODE
        if re.fullmatch(r"(scripts/)?[a-z]\w+\.py", name)
    }
    assert COMMANDS.keys() == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_help(name, monkeypatch, capsys):
    [command] = importlib.metadata.entry_points(group="console_scripts", name=name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        command.load()()
    assert not end.value.code and capsys.readouterr().out.startswith(f"usage: {name}")


def test_a_script_runs_as_a_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(ROOT / "scripts/prepare_data.py", run_name="__main__")
    assert "--license" in capsys.readouterr().out


# What is printed


@pytest.mark.slow
@pytest.mark.parametrize("script, word", [("train_defectfill", "--lambda_attn"), FULL("generate_defectfill", "--roi")])
def test_help_is_all_that_help_prints(script, word):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and word in done.stdout and done.stderr == ""


def launched(*argv, processes: int = 1) -> subprocess.CompletedProcess:
    several = ["--multi_gpu"] if processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *several, *LAUNCH]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launch, ROOT / "train_defectfill.py", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_shows_our_progress_alone(base, data, tmp_path):
    done = launched(*options(base, data, tmp_path / "out"))
    assert done.returncode == 0 and done.stdout == ""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert all(re.match(r"Steps: |\d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in lines), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_refusal_is_the_last_thing_on_the_screen(base, data, tmp_path, processes):
    done = launched(*options(base, data, tmp_path / "out", "--defect", "nope"), processes=processes)
    *before, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("DF162 --defect nope")
    assert any("Error" in line for line in before) and done.stderr.count("DF162") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", ["raise InputError(Problem('DF199', 'it', 'is wrong'))", "Parser('it').error('is wrong')"]
)
def test_a_refusal_outlives_a_launcher_that_is_killed(code, tmp_path):
    """And waits for it: the launcher, here asleep, is killed after its process has ended."""
    script, launcher = tmp_path / "refuse.py", tmp_path / "accelerate.py"
    script.write_text(f"""if True:
        from defectfill_dataset import InputError, Problem
        from defectfill_dataset.commands import Parser, exit_on_input_error
        def main():
            {code}
        exit_on_input_error(main)""")
    launcher.write_text("""if True:
        import os, signal, subprocess, sys, time
        status = subprocess.run([sys.executable, sys.argv[1]]).returncode
        time.sleep(1)
        print("a traceback, after", status, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)""")
    done = subprocess.run([sys.executable, launcher, script], capture_output=True, text=True, timeout=60)
    told = "\nDF199 it: is wrong\n" if "raise" in code else "usage: it [-h]\nit: error: is wrong\n"
    assert done.stderr == f"a traceback, after 2\n{told}" and done.returncode == -9


@pytest.mark.parametrize("script", [train_defectfill, generate_defectfill])
def test_wrong_flags_are_told_as_wrong_input_is(script, monkeypatch):
    told = []
    monkeypatch.setattr(commands, "tell", told.append)
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--no_such_flag"])
    assert end.value.code == 2 and told[0].startswith("usage: ")
