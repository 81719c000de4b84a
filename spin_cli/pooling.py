"""Pooling a text's token vectors into one. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch

from spin_cli.choices import Pooling

Span = tuple[int, int]
"""First position that counts, and one behind the last."""


def equal_runs(spans: Sequence[Span]) -> list[tuple[int, int, Span]]:
    """Runs ``(start, stop, span)`` of neighbours of equal span."""
    runs, start = [], 0
    for span, group in groupby(spans):
        stop = start + sum(1 for _ in group)
        runs.append((start, stop, span))
        start = stop
    return runs


def pool(
    states: torch.Tensor, spans: Sequence[Span], poolings: Iterable[Pooling]
) -> dict[Pooling, torch.Tensor]:
    """Pool token vectors over each text's real tokens.

    Parameters
    ----------
    states : Tensor, (B, T, F), any float dtype
        Token vectors; of row *b* those in ``spans[b]`` count, the rest is padding or belongs to
        another window.
    spans : sequence of B pairs, each not empty
    poolings : the poolings wanted

    Returns
    -------
    dict of Tensor, (B, F), float32
        Sums for the mean are taken in float32 whatever the input's dtype.

    Notes
    -----
    Works on runs of neighbours of equal span, so that padding is sliced off rather than masked: a
    mask needs a copy of the whole (B, T, F) tensor and costs six times as much on a CPU. For
    inference alone: no gradient passes.
    """
    parts = [
        (states[start:stop, slice(*span)], slice(start, stop))
        for start, stop, span in equal_runs(spans)
    ]
    found = {}
    for pooling in poolings:
        dtype = states.dtype if pooling is Pooling.MAX else torch.float32
        pooled = states.new_empty((len(spans), states.shape[2]), dtype=dtype)
        for part, rows in parts:
            _pool_run(part, pooling, pooled[rows])
        found[pooling] = pooled.float()
    return found


def _pool_run(states: torch.Tensor, pooling: Pooling, out: torch.Tensor) -> None:
    if pooling is Pooling.MEAN:
        torch.mean(states, 1, dtype=torch.float32, out=out)
    elif pooling is Pooling.MAX:
        torch.amax(states, 1, out=out)
    else:
        out.copy_(states[:, -1 if pooling is Pooling.LAST else 0])
