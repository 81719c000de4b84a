"""Work shared out over threads, each on one core."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(wanted: int) -> int:
    """Threads to use: what was asked for, else one for each core this process may use."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return wanted or cores


def ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Give *items*, each taken on another thread while the one before it is worked on.

    Closed before its end it does not wait for the one that is being taken (see `pool_of`).
    """
    with pool_of(1) as pool:
        coming = pool.submit(list, islice(items, 1))
        while found := coming.result():
            coming = pool.submit(list, islice(items, 1))
            yield found[0]


@contextmanager
def pool_of(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; what the body raises drops all that has not begun.

    An interrupt does not wait for what has begun either, which may take many seconds: whoever ends
    the process on it must not wait for threads (`__main__`).
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()


def side_by_side(
    one: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    size: Callable[[Item], float] | None = None,
) -> list[Result]:
    """Apply *one* to every item; an exception, or an interrupt, as in `pool_of`.

    Parameters
    ----------
    workers : threads; 0: one for each core
    size : what an item costs, in any unit. The dearest are begun first, so that no thread is left
        with one when the others are done (Graham 1969).

    Returns
    -------
    list
        Results in the order of *items*.
    """
    order = list(range(len(items)))
    if size is not None:
        costs = [size(item) for item in items]
        order.sort(key=lambda place: -costs[place])
    with threadpool_limits(1), pool_of(worker_count(workers)) as pool:
        found = list(pool.map(lambda place: one(items[place]), order))
    by_place = dict(zip(order, found, strict=True))
    return [by_place[place] for place in range(len(items))]


@contextmanager
def in_order(waiting: int) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that has tasks called on one thread, in the order in which they are given.

    What a task raises is raised by a later call or at the end, and no task is called after it; it
    comes before what the body raises. Tasks given before the body ended so are still called; but an
    interrupt waits for none (see `pool_of`).

    Parameters
    ----------
    waiting : tasks that may be left when the function returns
    """
    left: deque[Future[None]] = deque()
    failures: list[BaseException] = []

    def call(task: Callable[[], None]) -> None:
        if failures:
            return
        try:
            task()
        except BaseException as error:
            failures.append(error)
            raise

    def wait(most: int) -> None:
        while len(left) > most:
            left.popleft().result()

    def give(task: Callable[[], None]) -> None:
        left.append(pool.submit(call, task))
        wait(waiting)

    with pool_of(1) as pool:
        try:
            yield give
            wait(0)
        except Exception as error:
            pool.shutdown()  # all that was given is called first
            if failures and failures[0] is not error:
                raise failures[0] from error
            raise
