"""The Hugging Face Hub: access is checked at the start of a run, listed files are pushed at its end."""

import shlex
import threading
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from defectfill_dataset import InputError, Problem
from defectfill_dataset.errors import one_line

from ..lora import LORA_FILE


# The only files that are ever pushed.
PUBLISHED_FILES = [LORA_FILE, "README.md"]
PUBLISHED_DATA = {
    "parquet": ["README.md", "data/*.parquet"],
    "imagefolder": [
        "README.md",
        *(f"{s}/{f}" for s in ("train", "test", "good") for f in ("metadata.jsonl", "images/*", "masks/*.png")),
    ],
}


def check_hub(repo_id: str | None, public: bool, default_name: str, repo_type: str = "model") -> str:
    """Makes sure, before the work, that its result can be pushed; returns the repository's full id.

    The token comes from the environment or `hf auth login`. A missing repository is made, private unless `public`.

    Raises:
        InputError: no valid token (DF500), a repository that is public unasked or private (DF501), or no right to
            write (DF502).
    """
    api, flag = HfApi(), f"--hub_{repo_type}_id"
    try:
        user = api.whoami()["name"]
    except Exception as error:  # whatever a Hub or a network can raise
        fix = f"run 'hf auth login' or set HF_TOKEN ({error})"
        raise InputError(Problem("DF500", "--push_to_hub", "no valid token", fix)) from error
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=not public, exist_ok=True)
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_public = not api.repo_info(repo_id, repo_type=repo_type).private
    except Exception as error:
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
        RuntimeError: the upload failed; the files are safe where they are, and the message tells how to push them.
    """
    failure: list[Exception] = []

    def upload() -> None:
        try:
            HfApi().upload_folder(
                repo_id=repo_id,
                repo_type=repo_type,
                folder_path=folder,
                allow_patterns=list(files),
                commit_message="DefectFill LoRA" if repo_type == "model" else "Defect images with masks",
            )
        except Exception as error:  # whatever it is, it is raised below
            failure.append(error)

    thread = threading.Thread(target=upload, daemon=True)  # a server that never answers must not hold the process
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        failure.append(TimeoutError(f"no answer within {timeout:.0f} s"))
    if failure:
        command = ["hf", "upload", repo_id, str(folder), ".", "--repo-type", repo_type]
        command += [word for name in files for word in ("--include", name)]
        raise RuntimeError(
            f"Push to {repo_id} failed: {one_line(str(failure[0]))}. All is safe in {folder}; push it with:\n"
            f"    {shlex.join(command)}"
        ) from failure[0]
