"""A few mutations of each target of tests/faults/fuzz.py; `python tests/faults/fuzz.py --trials 10000` for more."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))
from fuzz import TARGETS, fuzz  # noqa: E402


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_file_is_read_or_refused(name, tmp_path):
    assert [*fuzz(name, range(10), 0, tmp_path / "x")] == []
