"""Label order and the split of train into train and val: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort label names; those that look like numbers by value, and before the others."""

    def place(label: str) -> tuple[int, float, str]:
        number = _NUMBER.fullmatch(label)
        return (0, float(label), label) if number else (1, 0.0, label)

    return tuple(sorted(labels, key=place))


def pick_val(codes: NDArray[np.int32], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Pick the rows of train that become val, stratified by class.

    The share of each class is ``fraction`` to within one row (largest remainders), the total is
    ``round(fraction * N)`` where classes are large enough, and each class keeps at least one row
    in train.

    Parameters
    ----------
    codes : ndarray of int32, shape (N,)
        Class of each row, in 0..K-1.
    fraction : float
        In [0, 1).
    seed : int
        Another seed, another choice. The choice depends on nothing else: not on the versions of
        NumPy, whose generators may change their streams.

    Returns
    -------
    ndarray of bool, shape (N,)
        True where a row goes to val.
    """
    picked = np.zeros(len(codes), dtype=np.bool_)
    if not len(codes):
        return picked
    sizes = np.bincount(codes)
    quota = _share_out(sizes, fraction, seed)
    keys = hash_numbers(len(codes), seed)
    by_class = np.lexsort((keys, codes))
    starts = np.cumsum(sizes) - sizes
    for start, count in zip(starts, quota, strict=True):
        picked[by_class[start : start + count]] = True
    return picked


def _share_out(sizes: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Return how many rows of each class go to val."""
    limit = np.maximum(sizes - 1, 0)
    exact = sizes * fraction
    quota: NDArray[np.int64] = np.minimum(np.floor(exact).astype(np.int64), limit)
    missing = round(fraction * int(sizes.sum())) - int(quota.sum())
    # Equal remainders are the rule with balanced classes: the seed decides, not the class order.
    ties = hash_numbers(len(sizes), seed + 1)
    order = np.lexsort((ties, np.floor(exact) - exact))
    open_classes = order[quota[order] < limit[order]]
    quota[open_classes[: max(missing, 0)]] += 1
    return quota


def hash_numbers(count: int, seed: int) -> NDArray[np.uint64]:
    """Hash 0..count-1 with a seed (SplitMix64; Steele, Lea & Flood, OOPSLA 2014)."""
    step = 0x9E3779B97F4A7C15
    base = (seed * 0xD1342543DE82EF95 + step) % 2**64
    x = np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(base)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
