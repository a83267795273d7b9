"""Stopping at a step boundary when the system asks for it."""

import ctypes
import dataclasses
import logging
import os
import signal
import sys

import torch
from accelerate import Accelerator

from defectfill_dataset import Problem, RunError


logger = logging.getLogger(__name__)


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 so that the loop can write a checkpoint and leave.

    A second SIGTERM or SIGINT ends the process at once. On Linux, under a launcher, it also asks for SIGUSR1 when the
    launcher ends: a SIGTERM to `accelerate launch` stops only the launcher, and training would live on without a word.
    SIGUSR1 because a Ctrl-C reaches both at once, and the launcher's end must not count as the second.
    """

    def __init__(self):
        self.number: int | None = None
        self.problem: Problem | None = None
        self.gentle = getattr(signal, "SIGUSR1", None)
        for number in filter(None, (signal.SIGTERM, signal.SIGINT, self.gentle)):
            signal.signal(number, self._note)
        launched = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        if sys.platform == "linux" and launched:
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)

    def _note(self, number, frame) -> None:
        if self.number not in (None, self.gentle) and number != self.gentle:
            os._exit(128 + number)
        if self.number is None or number != self.gentle:  # they may come in either order
            self.number = number

    def end_with(self, problem: Problem) -> None:
        """Asks for the end from within, as SIGUSR1 does from outside; here the run ends with the problem."""
        logger.error(str(problem))  # at once, and on any process
        self.problem = problem
        self.number = self.number or self.gentle or signal.SIGTERM

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop at the same step.

        A signal that comes during the gather counts at the next step, because the others have not heard of it.
        """
        if accelerator.num_processes == 1:
            return self.number is not None
        asked = torch.tensor(self.number or 0, device=accelerator.device)
        gathered = int(accelerator.gather(asked).max())
        if gathered:
            self.number = self.number or gathered
        return gathered > 0

    def end(self, kept: str) -> RunError | SystemExit:
        """What to raise where the run ends: the problem, with what is kept, or the signal's `exit_status`."""
        if self.problem:
            return RunError(dataclasses.replace(self.problem, fix=kept))
        return SystemExit(self.exit_status)

    @property
    def exit_status(self) -> int:
        """The shell's status for a process ended by the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.number or signal.SIGTERM)
