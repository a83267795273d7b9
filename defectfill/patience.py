"""Calls that do not wait for ever: a Hub may accept a connection and never answer."""

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download


logger = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS = 60  # for an answer; huggingface_hub itself tries again for minutes
SLOWEST = 2**18  # bytes a second of a file that comes


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; a thread makes it, which is left behind when the time is over.

    Raises:
        TimeoutError: after `seconds`.
    """
    returned: list[T] = []
    raised: list[Exception] = []

    def make() -> None:
        try:
            returned.append(call())
        except Exception as error:  # whatever it is, it is raised below
            raised.append(error)

    thread = threading.Thread(target=make, daemon=True)  # it holds up no exit
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return returned[0]


def file_names(repo_id: str, revision: str | None) -> list[str]:
    """The files of a model on the Hub.

    Raises:
        Exception: whatever the network may raise, TimeoutError for a Hub that does not answer.
    """
    return within(SECONDS, lambda: HfApi().list_repo_files(repo_id, revision=revision))


def download(repo_id: str, file: str, **options) -> Path:
    """A file of a model on the Hub, or as it was downloaded before if the Hub does not answer or send it in time.

    Raises:
        OSError, ValueError: as `hf_hub_download` does, with TimeoutError (an OSError) for a Hub that is too slow.
    """
    call = functools.partial(hf_hub_download, repo_id, file, **options)
    try:
        size = within(SECONDS, lambda: call(dry_run=True)).file_size
        return Path(within(SECONDS + size / SLOWEST, call))
    except TimeoutError as error:
        try:
            kept = call(local_files_only=True)
        except OSError:
            raise error from None
        logger.warning(f"The Hub: {error}; {file} of {repo_id} is as it was downloaded before")
        return Path(kept)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the network's, of the client that huggingface_hub uses
        raise OSError(f"{file} of {repo_id} cannot be downloaded ({type(error).__name__}: {error})") from error
