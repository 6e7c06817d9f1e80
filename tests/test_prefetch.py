"""Steps made ahead: the right ones, once, and their errors where they are taken."""

import threading

import pytest

from trsd.prefetch import Prefetcher


def test_steps_in_order_are_made_once_and_ahead():
    made, ahead = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread().name))
        if step == 1:
            ahead.set()
        return 10 * step

    prefetcher = Prefetcher(make, 3)
    assert prefetcher.take(0) == 0 and ahead.wait(10)
    assert [prefetcher.take(step) for step in (1, 2)] == [10, 20]
    assert [step for step, _ in made] == [0, 1, 2] and all(name.startswith("prefetch") for _, name in made)


def test_a_step_out_of_order_is_the_right_one():
    prefetcher = Prefetcher(lambda step: 10 * step, 100)
    assert [prefetcher.take(step) for step in (0, 7, 7, 3)] == [0, 70, 70, 30]


def test_what_went_wrong_ahead_is_raised_when_it_is_taken():
    def make(step):
        if step == 1:
            raise ZeroDivisionError("of step 1")
        return step

    prefetcher = Prefetcher(make, 3)
    prefetcher.take(0)
    with pytest.raises(ZeroDivisionError, match="of step 1"):
        prefetcher.take(1)
