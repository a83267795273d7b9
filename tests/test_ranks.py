"""What several processes of one run must agree on, and when each of them may leave."""

import os
import signal

import pytest
import torch
from runs import launch

from defectfill.runs.signals import StopSignal


# Signals


class TwoProcesses:
    """An accelerator whose gather takes a while: `meanwhile` happens in it."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, meanwhile, other: int = 0):
        self.meanwhile, self.other = meanwhile, other

    def gather(self, tensor):
        gathered = torch.stack([tensor, torch.tensor(self.other)])
        self.meanwhile()
        return gathered


@pytest.fixture
def stop():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield StopSignal()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_signal_during_the_gather_stops_at_the_next_step(stop):
    """Not at this one: the other process has not heard of it, and would wait for this one for ever."""
    for _ in range(50):
        stop.number = None
        assert not stop.requested(TwoProcesses(lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert stop.requested(TwoProcesses(lambda: None)) and stop.exit_status == 143


def test_another_process_stops_this_one(stop):
    assert stop.requested(TwoProcesses(lambda: None, other=signal.SIGINT)) and stop.exit_status == 130


GATHERS = """
import os
import signal

from accelerate import Accelerator

from defectfill.runs.signals import StopSignal

accelerator, stop = Accelerator(cpu=True), StopSignal()
gather, rank = accelerator.gather, accelerator.process_index


def gather_and_signal(tensor):
    gathered = gather(tensor)
    os.kill(os.getpid(), signal.SIGTERM)
    return gathered


for number in range(50):
    stop.number = None
    accelerator.wait_for_everyone()
    accelerator.gather = gather_and_signal if rank == number % 2 else gather
    first = stop.requested(accelerator)
    accelerator.gather = gather
    second = stop.requested(accelerator)
    assert (first, second) == (False, True), (number, rank, first, second)
    assert stop.exit_status == 143
    print("stopped", rank, number, flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_sigterm_during_the_gather_of_two_processes_50_times(tmp_path):
    (tmp_path / "gathers.py").write_text(GATHERS)
    assert launch(tmp_path / "gathers.py").stdout.count("stopped") == 100
