"""Dealing out rows with several labels, so that every part has its share of every label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.dataset.splits import hash_numbers


def deal_out(labels: NDArray[Any], shares: Sequence[float], seed: int) -> NDArray[np.int64]:
    """The part (N,) of each row, by iterative stratification (Sechidis et al. 2011).

    The rarest label is dealt out first, since later there would be no rows left to mend its share:
    each of its rows goes to the part that wants most of the label, of equals to the one that wants
    most rows. Rows without a label come last.

    Parameters
    ----------
    labels : (N, L), 1 where a label applies
    shares : of each part, adding up to 1
    seed : decides the order of rows and ties, and nothing else does
    """
    rows, width = labels.shape
    there = np.asarray(labels > 0)
    wanted = np.outer(shares, there.sum(0)).astype(float)
    room = np.asarray(shares, float) * rows
    ties = hash_numbers(rows * len(shares), seed + 1).reshape(rows, len(shares))
    order = np.argsort(hash_numbers(rows, seed), kind="stable")
    part = np.full(rows, -1, np.int64)
    left = there.sum(0)
    for _ in range(width):
        open_labels = np.flatnonzero(left > 0)
        if not len(open_labels):
            break
        label = int(open_labels[np.argmin(left[open_labels])])
        for row in order[there[order, label] & (part[order] < 0)]:
            here = int(np.lexsort((ties[row], -room, -wanted[:, label]))[0])
            part[row] = here
            room[here] -= 1
            wanted[here, there[row]] -= 1
            left[there[row]] -= 1
    for row in order[part[order] < 0]:
        here = int(np.lexsort((ties[row], -room))[0])
        part[row] = here
        room[here] -= 1
    return part


def pick_val_labels(labels: NDArray[Any], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Rows (N,) of train that become val; every label keeps a row in train."""
    val = deal_out(labels, (1.0 - fraction, fraction), seed) == 1
    for label in np.flatnonzero((labels[val] > 0).any(0)):
        rows = np.flatnonzero(labels[:, label] > 0)
        if val[rows].all():
            val[rows[0]] = False
    return np.asarray(val)
