"""What training and generation import first: signals are handled while the libraries load, which takes seconds."""

import multiprocessing
import sys
from pathlib import Path

from . import signals


COMMANDS = ("train_defectfill", "generate_defectfill", "defectfill-train", "defectfill-generate")
if Path(*sys.argv[:1]).stem in COMMANDS and multiprocessing.parent_process() is None:
    early = signals.exit_on_signal(lambda: "Stopped before the run began. Run the same command again.")
    early.__enter__()  # until the command handles them itself
    signals.end_with_launcher()

import defectfill.quiet  # noqa: E402, F401
