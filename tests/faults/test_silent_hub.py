"""A Hub that accepts a connection and never answers: every command ends in time, and what it made is safe."""

import os
import shlex
import subprocess
import sys
import time

from offline import ROOT

import pytest
from fake_hub import TOKEN
from runs import FAST, FULL, generate, options

from defectfill import patience
from defectfill.base_model import read_base
from defectfill.lora import LORA_FILE, read_lora
from defectfill.runs import hub as hub_module
from defectfill_dataset import InputError, RunError


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 1)
    monkeypatch.setattr(hub_module, "START", 1)


@pytest.fixture
def clock():
    """clock(): the seconds since the test began."""
    began = time.monotonic()
    return lambda: time.monotonic() - began


@pytest.mark.parametrize("pattern", ["whoami", "repos/create", "auth-check"])
def test_training_does_not_begin(hub, patient, train, tmp_path, clock, pattern):
    hub.fault = (pattern, "hang")
    with pytest.raises(InputError, match="DF503 --push_to_hub: the Hub has not answered within 1 s"):
        train("--push_to_hub", "--hub_model_id", "ann/lora")
    assert clock() < 60 and [f.name for f in (tmp_path / "out").iterdir()] in ([".lock"], [])


def test_the_start_has_no_more_time_than_the_push(hub, train, clock):
    hub.fault = ("whoami", "hang")
    with pytest.raises(InputError, match="DF503 .*within 0.5 s"):
        train("--push_to_hub", "--push_timeout", "0.5")
    assert clock() < 60


@pytest.mark.parametrize("pattern", ["whoami", "repos/create", "GET .*/ann/lora$"])
@pytest.mark.parametrize("answer", [429, 501, "reset", "no JSON"])
def test_a_hub_out_of_reach_is_no_wrong_token(hub, patient, pattern, answer):
    """Nor a repository that may not be written."""
    hub.fault = (pattern, answer)
    with pytest.raises(InputError, match=r"DF503 --push_to_hub: the Hub (cannot be reached \(|has not answered)"):
        hub_module.check_hub("ann/lora", False, "lora", 60)


def test_whatever_a_client_raises_is_a_hub_out_of_reach(train, monkeypatch):
    monkeypatch.setattr(hub_module.HfApi, "whoami", lambda self: 1 / 0)  # whatever it is
    with pytest.raises(InputError, match="DF503 --push_to_hub: the Hub cannot be reached.*division"):
        train("--push_to_hub")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [FULL("/preupload/"), "/blob/", FULL("/commit/")])
def test_a_push_ends_in_time_and_so_does_the_process(hub, trained, tmp_path, clock, pattern):
    """Also where the upload's threads, which a process waits for, would hold it."""
    hub.repos["ann/lora"] = {"private": True, "files": {}}
    hub.fault = (pattern, "hang")
    code = f"""
from pathlib import Path
from defectfill.runs.hub import push
push(Path({str(trained)!r}), "ann/lora", 4)
"""
    before = (trained / LORA_FILE).read_bytes()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and clock() < 60
    last = done.stderr.rstrip().splitlines()[-2:]
    assert "DF504 Push to ann/lora failed: no answer within 4 s; all is safe in" in last[0]
    assert shlex.split(last[1])[:4] == ["hf", "upload", "ann/lora", str(trained)]
    assert (trained / LORA_FILE).read_bytes() == before and not hub.repos["ann/lora"]["files"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern, answer",
    [("/preupload/", 404), ("/commit/", 409), ("/preupload/", 429), ("/commit/", 500), ("/blob/", 503),
     ("/commit/", "reset"), ("/preupload/", "no JSON"), ("/commit/", "hang")],
)  # fmt: skip
def test_a_push_that_fails_otherwise_is_one_message_and_can_be_made_again(hub, trained, clock, pattern, answer):
    """After "hang" the upload was killed."""
    hub.repos["ann/lora"] = {"private": True, "files": {}}
    hub.fault, before = (pattern, answer), (trained / LORA_FILE).read_bytes()
    with pytest.raises(hub_module.PushError) as caught:
        hub_module.push(trained, "ann/lora", 3)
    told, command = str(caught.value).splitlines()
    assert told.startswith("DF504 Push to ann/lora failed: ") and "; all is safe in " in told
    assert shlex.split(command)[:4] == ["hf", "upload", "ann/lora", str(trained)] and clock() < 60
    assert not hub.repos["ann/lora"]["files"]
    hub.fault = None
    hub_module.push(trained, "ann/lora", 60)
    assert (trained / LORA_FILE).read_bytes() == before == hub.repos["ann/lora"]["files"][LORA_FILE]
    assert hub.repos["ann/lora"]["files"].keys() == {LORA_FILE, "README.md"} and list(hub.repos) == ["ann/lora"]


@pytest.mark.slow
def test_the_command_ends_without_a_traceback_and_with_its_weights(hub, base, data, tmp_path):
    hub.fault = ("/preupload/", "hang")
    argv = options(base, data, tmp_path / "out", "--push_to_hub", "--hub_model_id", "lora", "--push_timeout", "3")
    command = [sys.executable, str(ROOT / "train_defectfill.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=os.environ | {"HF_TOKEN": TOKEN})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "hf upload ann/lora" in done.stderr.rstrip().splitlines()[-1]
    assert read_lora(tmp_path / "out").record["steps"] == 2


def test_a_lora_is_not_waited_for(hub, patient, inputs, base, tmp_path, clock):
    hub.fault = (".*", "hang")
    with pytest.raises(InputError, match="DF400 --lora ann/never: .*no answer within 1 s"):
        generate("--lora", "ann/never", *inputs, "--output_dir", tmp_path / "out", *FAST)
    with pytest.raises(InputError, match="DF180 .*no answer within 1 s"):
        read_base("ann/never-base")
    assert clock() < 60


@pytest.mark.parametrize("how", ["hang", "hang in the body"])
def test_a_lora_that_stops_coming_is_not_waited_for(hub, patient, trained, inputs, tmp_path, clock, how):
    """The Hub says what there is, and then does not send it."""
    hub.repos["ann/stuck"] = {"private": True, "files": {LORA_FILE: (trained / LORA_FILE).read_bytes()}}
    hub.fault = ("GET .*/resolve/", how)
    with pytest.raises(InputError, match=r"DF400 --lora ann/stuck: .*no answer within 1\.\d+ s"):
        generate("--lora", "ann/stuck", *inputs, "--output_dir", tmp_path / "out", *FAST)
    assert clock() < 60


def test_a_lora_that_was_downloaded_is_used(hub, patient, trained, caplog):
    hub.repos["ann/kept"] = {"private": True, "files": {LORA_FILE: (trained / LORA_FILE).read_bytes()}}
    first = read_lora("ann/kept")
    hub.fault = (".*", "hang")
    assert read_lora("ann/kept").sha256 == first.sha256
    assert f"The Hub: no answer within 1 s; {LORA_FILE} of ann/kept is as it was downloaded before" in caplog.text


def test_a_network_that_fails_is_one_message(monkeypatch):
    monkeypatch.setattr(patience, "hf_hub_download", lambda *args, **options: 1 / 0)  # no OSError: some client's own
    with pytest.raises(InputError, match="DF400 --lora ann/x: .*cannot be downloaded .ZeroDivisionError"):
        read_lora("ann/x")


def test_what_a_call_raises_is_raised():
    assert patience.within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        patience.within(5, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        patience.within(0.1, lambda: time.sleep(5))


def test_a_failed_push_is_a_run_error():
    assert issubclass(hub_module.PushError, RunError)  # one message, no traceback
