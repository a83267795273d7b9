"""Before the libraries read it: an empty home for what they keep, and a Hub that is the tests' own or nowhere."""

import os
import socket
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
HOME = tempfile.mkdtemp(prefix="defectfill-tests-")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]  # the fixture `server` starts a Hub there
os.environ.update(
    HF_HOME=HOME, TORCH_HOME=HOME, XDG_CACHE_HOME=HOME, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1",
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_PORT}", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1",
)  # fmt: skip
