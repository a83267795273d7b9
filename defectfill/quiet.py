"""Silences what libraries print that tells a user nothing. Commands that load models import this before all others."""

import logging
import os


os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # that it found no faster CPU kernel

import diffusers  # noqa: E402
import transformers  # noqa: E402


diffusers.utils.logging.disable_progress_bar()  # of the files a model is loaded from; downloads keep theirs
transformers.utils.logging.disable_progress_bar()
