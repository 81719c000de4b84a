"""Threads share work: results in order, the dearest first, nothing begun after a failure."""

from __future__ import annotations

import threading
import time

import pytest

from spin_cli.workers import side_by_side, worker_count


def test_results_are_in_the_order_of_the_items():
    begun: list[int] = []

    def one(item: int) -> int:
        begun.append(item)
        return item * item

    assert side_by_side(one, [2, 5, 3], 1, float) == [4, 25, 9]
    assert begun == [5, 3, 2]
    assert side_by_side(one, [2, 5, 3], 2) == [4, 25, 9]
    assert side_by_side(one, [], 2, float) == []


def test_a_failure_drops_what_has_not_begun():
    begun: list[int] = []
    lock = threading.Lock()

    def one(item: int) -> None:
        with lock:
            begun.append(item)
        if item == 0:
            raise KeyError("zero")
        time.sleep(0.2)

    with pytest.raises(KeyError, match="zero"):
        side_by_side(one, list(range(100)), 2)
    assert len(begun) < 10


def test_a_core_for_each_worker():
    assert worker_count(3) == 3
    assert worker_count(0) >= 1
