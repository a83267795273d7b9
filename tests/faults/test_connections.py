"""Without a push, a model on the Hub or another company's tracker, a run asks nobody for anything."""

import json
import os
import socket
import subprocess
import sys

import pytest
from runs import FAST, options


RUN = """
import json, sys
asked = []
sys.addaudithook(lambda event, args: asked.append([event, str(args[-1])]) if event in EVENTS else None)
import socket
import generate_defectfill, train_defectfill
training, generation, port = json.loads(sys.argv[1])
train_defectfill.main(train_defectfill.parse_args(training))
generate_defectfill.main(generate_defectfill.parse_args(generation))
print(json.dumps(asked))
try:
    socket.create_connection(("localhost", port), timeout=5)
except OSError:
    pass
print(json.dumps(asked))
"""
EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"}


@pytest.mark.slow
def test_a_run_asks_nobody(base, data, inputs, tmp_path):
    """From the first import on, with all that a run does by default, and not only since `HF_HUB_OFFLINE` forbids it.

    A connection to a port where nobody listens shows that they are seen.
    """
    more = ["--validation_steps", "2", "--validation_inference_steps", "1", "--report_to", "tensorboard"]
    training = options(base, data, tmp_path / "lora", *more)
    generation = ["--lora", tmp_path / "lora", *inputs, "--output_dir", tmp_path / "out", *FAST]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    words = json.dumps([training, [str(word) for word in generation], port])
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_ENDPOINT", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-c", RUN.replace("EVENTS", repr(EVENTS)), words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out/images").iterdir())) == 3
    of_runs, with_control = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert of_runs == [] and ["socket.connect", f"('127.0.0.1', {port})"] in with_control
