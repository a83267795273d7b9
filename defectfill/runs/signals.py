"""What a run does when the system asks it to stop, and that it ends with its launcher. Loads no library.

Training stops at a step boundary, everything else at once: whatever the moment, the files that are there are whole.
"""

import ctypes
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import Accelerator

    from defectfill_dataset import Problem, RunError

GENTLE = getattr(signal, "SIGUSR1", None)  # Windows has none
STOPPING = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, GENTLE)))
TOGETHER = 3.0  # seconds in which a launcher and the system signal the same wish
LAUNCHED = "DEFECTFILL_LAUNCHED"  # set for the children of our other commands


def end_with_launcher() -> None:
    """Under a launcher, sends this process a SIGUSR1 when the launcher ends, however it ends.

    A SIGTERM to `accelerate launch` stops only the launcher, and this process would live on without a word. SIGUSR1
    because a Ctrl-C reaches both at once, and the launcher's end must not count as the second.
    """
    if GENTLE is None or not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHED} & os.environ.keys():
        return
    parent = os.getppid()
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, GENTLE)
    else:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent or is_orphan(parent):  # it ended before it was asked for
        os.kill(os.getpid(), GENTLE)


def watch(parent: int, seconds: float = 1.0) -> None:
    """Signals this process once `parent` is no longer its parent; where the system cannot."""
    while os.getppid() == parent:
        time.sleep(seconds)
    os.kill(os.getpid(), GENTLE)


def is_orphan(parent: int) -> bool:
    """Whether the launcher that surely started this process has ended: the system's first process took its place."""
    if parent != 1 or not {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys():
        return False
    try:  # in a container the launcher can be the first itself
        return not any(name in Path("/proc/1/cmdline").read_bytes() for name in (b"accelerate", b"torch"))
    except OSError:
        return False


@contextmanager
def exit_on_signal(message: Callable[[], str]) -> Iterator[None]:
    """Inside it, SIGTERM, SIGINT or SIGUSR1 prints the message and ends the process at once, with 128 + its number.

    A thread does it, which Python wakes whatever the main thread is in: that may wait in a library for other
    processes, and would not run a handler.
    """
    read, write = socket.socketpair()
    write.setblocking(False)  # as Python wants it

    def end() -> None:
        while number := read.recv(1):  # of any signal with a handler
            if number[0] in STOPPING:
                try:
                    if os.environ.get("LOCAL_RANK", "0") == "0":
                        os.write(2, f"\n{message()}\n".encode())
                finally:
                    os._exit(128 + number[0])
        read.close()

    threading.Thread(target=end, daemon=True).start()
    woken = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    try:
        with handlers_restored():
            for number in STOPPING:
                signal.signal(number, wake)
            yield
    finally:
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        write.close()


@contextmanager
def handlers_restored() -> Iterator[None]:
    """After it, signals do what they did before: a training inside must not leave its `StopSignal` to the rest."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def wake(number, frame) -> None:
    """The handler: Python has already woken the thread."""


def forget() -> None:
    """In a forked child, which has no such thread and must not wake its parent's: a signal just ends it."""
    if signal.getsignal(signal.SIGTERM) is wake:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)

logger = logging.getLogger(__name__)


class StopSignal:
    """Notes SIGTERM, SIGINT or SIGUSR1 so that the loop can write a checkpoint and leave.

    A second SIGTERM or SIGINT ends the process at once; under a launcher, which passes on what the system may have
    sent to all, only one that comes later.
    """

    def __init__(self):
        self.number: int | None = None
        self.problem: Problem | None = None
        self.since = 0.0
        self.launched = "LOCAL_RANK" in os.environ
        for number in STOPPING:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(-1)
        end_with_launcher()

    def _note(self, number, frame) -> None:
        again = self.number not in (None, GENTLE) and number != GENTLE
        if again and not (self.launched and time.monotonic() - self.since < TOGETHER):
            os._exit(128 + number)
        if self.number is None or (number != GENTLE and not again):  # they may come in either order
            self.number, self.since = number, time.monotonic()

    def end_with(self, problem: "Problem") -> None:
        """Asks for the end from within, as SIGUSR1 does from outside; here the run ends with the problem."""
        logger.error(str(problem))  # at once, and on any process
        self.problem = problem
        self.number = self.number or GENTLE or signal.SIGTERM

    def requested(self, accelerator: "Accelerator") -> bool:
        """Whether any process was asked to stop: all of them must leave the loop at the same step.

        A signal that comes during the gather counts at the next step, because the others have not heard of it.
        """
        if accelerator.num_processes == 1:
            return self.number is not None
        import torch  # seconds: after the signals are handled

        asked = torch.tensor(self.number or 0, device=accelerator.device)
        gathered = int(accelerator.gather(asked).max())
        if gathered:
            self.number = self.number or gathered
        return gathered > 0

    def end(self, kept: str) -> "RunError | SystemExit":
        """What to raise where the run ends: the problem, with what is kept, or the signal's `exit_status`."""
        if self.problem:
            from defectfill_dataset import RunError

            return RunError(dataclasses.replace(self.problem, fix=kept))
        return SystemExit(self.exit_status)

    @property
    def exit_status(self) -> int:
        """The shell's status for a process ended by the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.number or signal.SIGTERM)
