"""Threads share work: results in order, the dearest first, nothing begun after a failure."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from spin_cli.probe import fit
from spin_cli.workers import ahead, in_order, side_by_side, worker_count


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


def test_tasks_on_one_thread_keep_their_order_and_their_distance():
    done: list[int] = []

    def task(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    with in_order(waiting=2) as later:
        for number in range(10):
            later(lambda number=number: task(number))
            assert len(done) >= number - 2
    assert done == list(range(10))


def test_no_task_is_called_after_one_that_failed():
    done: list[int] = []

    def fail() -> None:
        time.sleep(0.05)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), in_order(waiting=5) as later:
        later(lambda: done.append(1))
        later(fail)
        later(lambda: done.append(2))
    assert done == [1]
    with pytest.raises(KeyError, match="broken"), in_order(waiting=0) as later:
        later(fail)
        done.append(3)
    assert done == [1]


def test_what_a_task_raised_is_not_lost_where_the_body_fails_too():
    def fail() -> None:
        raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full") as caught, in_order(waiting=5) as later:
        later(fail)
        time.sleep(0.05)
        raise ValueError("body")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(KeyboardInterrupt), in_order(waiting=5) as later:
        later(fail)
        raise KeyboardInterrupt


def test_the_next_item_is_taken_while_one_is_worked_on_but_no_more():
    taken: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for item in range(4):
            taken.append(item)
            if item == 1:
                second.set()
            yield item

    with closing(ahead(items())) as found:
        assert next(found) == 0
        assert second.wait(5)  # nobody has asked for it
        time.sleep(0.05)
        assert taken == [0, 1]
        assert [*found] == [1, 2, 3]
    assert [*ahead(iter([]))] == []


def test_what_taking_an_item_raises_comes_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(KeyError, match="broken"):
        next(found)


def test_no_item_is_taken_once_nobody_listens():
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(9):
            taken.append(item)
            yield item

    with pytest.raises(KeyError, match="stop"), closing(ahead(items())) as found:
        next(found)
        raise KeyError("stop")
    time.sleep(0.05)
    assert len(taken) <= 2


def test_an_item_that_is_being_taken_is_not_waited_for():
    begun, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        begun.set()
        go_on.wait(60)
        yield 2

    with pytest.raises(KeyboardInterrupt), closing(ahead(items())) as found:
        next(found)
        assert begun.wait(5)
        started = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 5
    assert not go_on.is_set()
    go_on.set()


def test_no_thread_changes_the_filters_of_warnings(spin, tiny_run, tmp_path, monkeypatch, recwarn):
    """They are the whole process's: one thread would restore what another has changed."""
    elsewhere = []
    enter = warnings.catch_warnings.__enter__

    def watched(self):
        caller = sys._getframe(1).f_globals["__name__"]  # scikit-learn's own are its own affair
        main = threading.current_thread() is threading.main_thread()
        if caller.startswith("spin_cli") and not main:
            elsewhere.append(caller)
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", watched)
    run = tiny_run / "run"
    for name, options in (
        ("reference", ["--solver", "reference"]),
        ("newton", ["--bootstrap", "2"]),
    ):
        done = spin(
            "select", run / "activations", "-o", tmp_path / name, "--workers", "4", *options
        )  # fmt: skip
        assert done.code == 0, done.err
    done = spin("train", run / "selection", "-o", tmp_path / "head", "--workers", "4")
    assert done.code == 0, done.err
    assert elsewhere == []
    said = [each.category.__name__ for each in recwarn]
    assert "ConvergenceWarning" not in said


def test_a_fit_that_stops_short_can_be_silent():
    X = np.random.default_rng(0).normal(size=(60, 5))
    y = (X[:, 0] > 0).astype(int)
    labels = np.stack([y, 1 - y], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target, classes, l1 in ((y, 2, 0.1), (labels, 2, 0.1), (labels, 2, 0.0)):
            found = fit(X, target, classes, l1=l1, l2=0.1, tol=1e-14, max_iter=1, warn=False)
            assert not found.converged
