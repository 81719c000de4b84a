"""How many matrices are held at once, and which are too large to be held at all."""

from __future__ import annotations

import os
from collections.abc import Sequence

from spin_cli.activations import Feature
from spin_cli.config import SelectConfig, worker_count

RAW, STANDARD, COLUMNS = 4, 4, 4
"""Bytes per value: of a matrix as read (at most), of its standardised copy, and of the solver's
copy of the columns in use (at most all of them)."""
FALLBACK = 4 * 2**30
"""Taken to be free where the system does not say."""


def need(feature: Feature, rows: int) -> int:
    """Bytes that a probe may come to hold."""
    return rows * feature.width * (RAW + STANDARD + COLUMNS)


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

    Memory comes first: what fits alone is never streamed for the sake of a second thread.

    Parameters
    ----------
    processes : that share this machine, its cores and, without a set limit, its memory
    """
    limit = limit_of(config)
    if config.memory_limit is None:
        limit //= processes
    streamed = frozenset(feature for feature in features if need(feature, rows) > limit)
    largest = max((need(f, rows) for f in features if f not in streamed), default=1)
    threads = max(1, worker_count(config.workers) // (1 if config.workers else processes))
    return max(1, min(threads, limit // max(1, largest))), streamed
