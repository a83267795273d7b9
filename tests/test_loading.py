"""What a thread prepares while the device works."""

import threading

import pytest

from defectfill.runs.loading import ahead


def test_the_next_is_prepared_while_one_is_used():
    begun = [threading.Event() for _ in range(3)]

    def work(i: int) -> tuple[int, bool]:
        begun[i].set()
        return i, threading.current_thread() is threading.main_thread()

    for i, in_main in ahead(work, range(3)):
        assert not in_main and all(event.wait(60) for event in begun[: i + 2])
        assert not any(event.is_set() for event in begun[i + 2 :])
    assert list(ahead(work, [])) == []


def test_an_error_comes_when_its_turn_comes():
    found = []
    with pytest.raises(ZeroDivisionError):
        for x in ahead(lambda i: 6 // i, [3, 2, 0, 1]):
            found.append(x)
    assert found == [2, 3]
