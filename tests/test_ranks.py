"""Ranks that wait for each other, at a store in memory."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

import pytest
from torch.distributed import HashStore

from spin_cli import ranks
from spin_cli.errors import UsageError
from spin_cli.ranks import Ranks


@pytest.fixture
def store(monkeypatch) -> HashStore:
    store = HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "_meetings", itertools.count())
    return store


def test_all_go_on_when_the_last_has_come(store, monkeypatch):
    # Each thread stands for a process, and counts its meetings for itself.
    own = threading.local()

    class Own:
        def __next__(self) -> int:
            own.count = getattr(own, "count", -1) + 1
            return own.count

    monkeypatch.setattr(ranks, "_meetings", Own())
    come, gone = [], []

    def go(rank: int) -> None:
        for meeting in range(3):
            time.sleep(0.05 * ((rank + meeting) % 3))
            come.append(meeting)
            Ranks(rank, 3).wait()
            gone.append((meeting, come.count(meeting)))

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(gone) == [(meeting, 3) for meeting in range(3) for _ in range(3)]


def test_a_rank_that_waits_can_be_interrupted(store):
    def rescue() -> None:  # else a wait that heeds no signal would last for ever
        store.set("spin/0/0/all", "yes")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    kept = signal.signal(signal.SIGALRM, interrupt)
    timer = threading.Timer(10, rescue)
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            Ranks(1, 2).wait()
        assert timer.is_alive()
    finally:
        timer.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def test_contradictory_places_are_refused(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(UsageError, match="not below WORLD_SIZE"):
        ranks.current()
    monkeypatch.setitem(os.environ, "RANK", "one")
    with pytest.raises(UsageError, match="not all are numbers"):
        ranks.current()
