"""A few kills of tests/faults/storms.py; `python tests/faults/storms.py --kills 500` for more."""

import sys
from pathlib import Path

import pytest
from folders import make_mvtec


sys.path.insert(0, str(Path(__file__).parent))
from storms import generation, storm, training  # noqa: E402


NOTHING = {"lost": 0, "damaged": 0, "unequal": 0}


@pytest.mark.slow
def test_training_killed_while_it_writes_checkpoints_loses_nothing(base, data, tmp_path):
    table = storm(training(base, data), tmp_path, 4)
    assert table.items() >= NOTHING.items() and table["in a write"], table


@pytest.mark.slow
def test_whatever_the_moment_of_a_kill_nothing_is_lost_or_twice(trained, tmp_path):
    table = storm(generation(trained, make_mvtec(tmp_path / "nut") / "train/good"), tmp_path, 4)
    assert table.items() >= NOTHING.items(), table
