"""Stopping at a step boundary when the system asks for it."""

import ctypes
import os
import signal
import sys

import torch
from accelerate import Accelerator


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 so that the loop can write a checkpoint and leave; a second one ends at once.

    On Linux it also asks for SIGTERM when the parent ends: a SIGTERM to `accelerate launch` stops only the launcher,
    and the training process would live on without a word.
    """

    def __init__(self):
        self.number: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            signal.signal(number, self._note)
        if sys.platform == "linux":
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def _note(self, number, frame) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop at the same step."""
        if accelerator.num_processes == 1:
            return self.number is not None
        asked = torch.tensor(self.number or 0, device=accelerator.device)
        self.number = int(accelerator.gather(asked).max()) or None
        return self.number is not None

    @property
    def exit_status(self) -> int:
        """The shell's status for a process ended by the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.number or signal.SIGTERM)
