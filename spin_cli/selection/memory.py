"""How many matrices are held at once, and which are too large to be held at all."""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin_cli.activations import Feature
from spin_cli.config import SelectConfig
from spin_cli.workers import worker_count

STANDARD = 4
"""Bytes per value of a standardised matrix."""
COPY = 4
"""Bytes per value of the matrix as read, which is let go before the solver makes its copy of the
columns in use (at most all of them; none of a large matrix)."""
BESIDE = 350 * 10**6
"""Bytes taken beside the largest matrix without being asked. With 130 MB for the program and its
libraries that makes one matrix and 500 MB."""
FALLBACK = 4 * 2**30
"""Taken to be free where the system does not say."""


def need(feature: Feature, rows: int) -> int:
    """Bytes that a probe may come to hold."""
    return rows * feature.width * (STANDARD + COPY)


def limit_of(config: SelectConfig) -> int:
    """Bytes that all matrices together may take."""
    if config.memory_limit is not None:
        return config.memory_limit
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = FALLBACK
    return free // 2


def plan(
    features: Sequence[Feature], rows: int, config: SelectConfig, processes: int
) -> tuple[int, frozenset[Feature]]:
    """Threads of this process, and the features to stream.

    Memory comes first: what fits alone is never streamed for the sake of a second thread, and
    without a set limit a second thread is for matrices that are small beside what a process takes
    anyway.

    Parameters
    ----------
    processes : that share this machine, its cores and, without a set limit, its memory
    """
    limit = limit_of(config)
    if config.memory_limit is None:
        limit //= processes
    streamed = frozenset(feature for feature in features if need(feature, rows) > limit)
    largest = max((need(f, rows) for f in features if f not in streamed), default=1)
    if config.memory_limit is None and not config.workers:
        values = largest // (STANDARD + COPY)
        limit = min(limit, values * STANDARD + BESIDE)
        largest = values * (STANDARD + COPY // 2)  # as a rule half of the columns are in use
    threads = max(1, worker_count(config.workers) // (1 if config.workers else processes))
    return max(1, min(threads, limit // max(1, largest))), streamed
