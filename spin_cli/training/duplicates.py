"""Near-duplicates among the texts: they have to stay on one side of a division.

A text whose twin is in the training rows is easy to get right, so that a division which parts the
two flatters every head, and weakly penalised ones most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

RUN = 5
"""Words in a row; two texts have them in common by copying more often than by chance."""
SHARE = 0.5
"""Of the runs of the shorter text: from there on two texts belong together."""
BOILERPLATE, COMMON = 50, 0.2
"""A run in more texts than this, or in more than this share of all, is a phrase of the trade, and
counts for nothing; a run in two texts never is."""
BASE = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(texts: Sequence[str]) -> NDArray[np.int64]:
    """The group (N,) of each text: those in one group have much of their wording in common.

    Two texts are joined where half of the runs of `RUN` words in the shorter one are in the other
    too, whatever their case and punctuation (containment, Broder 1997); texts of fewer words where
    all of these are the same. Groups are the connected components.
    """
    known: dict[str, int] = {}
    coded = [
        np.array([known.setdefault(w, len(known) + 1) for w in _words(text)], np.uint64)
        for text in texts
    ]
    short = [i for i, codes in enumerate(coded) if len(codes) < RUN]
    long = [i for i, codes in enumerate(coded) if len(codes) >= RUN]
    parts = [_runs(coded[i]) for i in long]
    keys = np.concatenate([*parts, np.array([_whole(coded[i]) for i in short], np.uint64)])
    owner = np.concatenate([np.repeat(long, [len(p) for p in parts]), short]).astype(np.int64)
    return _components(keys, owner, len(texts))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of every run of `RUN` words, each once."""
    n = len(codes) - RUN + 1
    total = np.zeros(n, np.uint64)
    for place in range(RUN):  # wraps around on purpose
        total = total * BASE + codes[place : place + n]
    return np.unique(total)


def _whole(codes: NDArray[np.uint64]) -> np.uint64:
    total = np.array([len(codes)], np.uint64)  # an array, as scalars warn of the wrap
    for code in codes:
        total = total * BASE + code
    return np.uint64(total[0])


def _components(
    keys: NDArray[np.uint64], owner: NDArray[np.int64], n_texts: int
) -> NDArray[np.int64]:
    total = np.bincount(owner, minlength=n_texts)
    _, run, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    most = max(2, min(BOILERPLATE, int(COMMON * n_texts)))
    common = ((sizes > 1) & (sizes <= most))[run]
    has = csr_matrix(
        (np.ones(common.sum(), np.int32), (owner[common], run[common])), (n_texts, len(sizes))
    )
    shared = (has @ has.T).tocoo()
    joined = shared.data >= SHARE * np.minimum(total[shared.row], total[shared.col])
    edges = coo_matrix(
        (np.ones(joined.sum(), bool), (shared.row[joined], shared.col[joined])), (n_texts,) * 2
    )
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)
