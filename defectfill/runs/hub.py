"""The Hugging Face Hub: access is checked at the start of a run, listed files are pushed at its end."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from defectfill_dataset import InputError, Problem, RunError

from ..lora import LORA_FILE
from ..patience import within


# The only files that are ever pushed.
PUBLISHED_FILES = [LORA_FILE, "README.md"]
PUBLISHED_DATA = {
    "parquet": ["README.md", "data/*.parquet"],
    "imagefolder": [
        "README.md",
        *(f"{s}/{f}" for s in ("train", "test", "good") for f in ("metadata.jsonl", "images/*", "masks/*.png")),
    ],
}
START = 60  # seconds at most for the check at the start of a run
# A process of its own: it can be ended whatever it waits for; a process waits at its end for an upload's threads.
UPLOAD = """
import ctypes, json, sys
from pathlib import Path
from huggingface_hub import HfApi
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # ends with the process that started it
try:
    HfApi().upload_folder(**json.load(sys.stdin))
except Exception as error:
    sys.exit(print(error) or 1)
"""


class PushError(RunError):
    """A push that failed; its text ends with the command that does it, on a line of its own."""

    def __init__(self, problem: Problem, command: str):
        super().__init__(problem)
        self.args = (f"{problem}\n    {command}",)


def check_hub(repo_id: str | None, public: bool, default_name: str, timeout: float, repo_type: str = "model") -> str:
    """Makes sure, before the work, that its result can be pushed; returns the repository's full id.

    The token comes from the environment or `hf auth login`. A missing repository is made, private unless `public`.

    Raises:
        InputError: no valid token (DF500), a repository that is public unasked or private (DF501), no right to write
            (DF502), or no answer within `timeout`, or `START`, seconds (DF503).
    """
    seconds = min(timeout, START)
    fix = "try again later, or leave it out and push the result afterwards"
    try:
        return within(seconds, lambda: check_repository(repo_id, public, default_name, repo_type))
    except TimeoutError as error:
        what = f"the Hub has not answered within {seconds:g} s"
        raise InputError(Problem("DF503", "--push_to_hub", what, fix)) from error
    except InputError:
        raise
    except Exception as error:  # whatever a Hub or a network can raise
        what = f"the Hub cannot be reached ({error})"
        raise InputError(Problem("DF503", "--push_to_hub", what, fix)) from error


def is_the_hubs(error: Exception) -> bool:
    """Whether the Hub failed, was asked too often or is another server, and did not refuse."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    return status >= 500 or status == 429 or isinstance(error, json.JSONDecodeError)


def check_repository(repo_id: str | None, public: bool, default_name: str, repo_type: str) -> str:
    """As `check_hub`, however long it takes."""
    api, flag = HfApi(), f"--hub_{repo_type}_id"
    try:
        user = api.whoami()["name"]
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        if is_the_hubs(error):
            raise
        fix = f"run 'hf auth login' or set HF_TOKEN ({error})"
        raise InputError(Problem("DF500", "--push_to_hub", "no valid token", fix)) from error
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=not public, exist_ok=True)
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_public = not api.repo_info(repo_id, repo_type=repo_type).private
    except (HfHubHTTPError, ValueError) as error:
        if is_the_hubs(error):
            raise
        what = f"cannot be made or written with this token ({error})"
        raise InputError(Problem("DF502", f"{flag} {repo_id}", what)) from error
    if is_public and not public:
        fix = "add --hub_public to publish there, or name another"
        raise InputError(Problem("DF501", f"{flag} {repo_id}", "is public", fix))
    if public and not is_public:
        fix = "leave out --hub_public, or make it public on the Hub"
        raise InputError(Problem("DF501", f"{flag} {repo_id}", "is private", fix))
    return repo_id


def push(
    folder: Path, repo_id: str, timeout: float, files: Sequence[str] = PUBLISHED_FILES, repo_type: str = "model"
) -> None:
    """Uploads the files of these names or patterns, nothing else; gives up after `timeout` seconds.

    Raises:
        PushError: the upload failed (DF504); the files are safe where they are, and its text tells how to push them.
    """
    message = "DefectFill LoRA" if repo_type == "model" else "Defect images with masks"
    wanted = {"repo_id": repo_id, "repo_type": repo_type, "folder_path": str(folder), "allow_patterns": list(files)}
    upload = subprocess.Popen([sys.executable, "-c", UPLOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = upload.communicate(json.dumps(wanted | {"commit_message": message}), timeout)
        failure = said.strip() or f"the upload ended with {upload.returncode}" if upload.returncode else None
    except subprocess.TimeoutExpired:
        failure = f"no answer within {timeout:g} s"
    finally:
        upload.kill()
        upload.wait()
    if failure:
        command = ["hf", "upload", repo_id, str(folder), ".", "--repo-type", repo_type]
        command += [word for name in files for word in ("--include", name)]
        what, fix = f"Push to {repo_id} failed: {failure}", f"all is safe in {folder}; push it with:"
        raise PushError(Problem("DF504", "", what, fix), shlex.join(command))
