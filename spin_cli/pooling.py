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
    Works on runs of neighbours of equal span, so that padding is sliced off rather than masked:
    a mask needs a copy of the whole (B, T, F) tensor and costs six times as much on a CPU.
    """
    runs = equal_runs(spans)
    return {pooling: _pool_one(states, runs, pooling) for pooling in poolings}


def _pool_one(
    states: torch.Tensor, runs: list[tuple[int, int, Span]], pooling: Pooling
) -> torch.Tensor:
    parts = [_pool_run(states[start:stop, slice(*span)], pooling) for start, stop, span in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pool_run(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling is Pooling.MEAN:
        return states.mean(1, dtype=torch.float32)
    if pooling is Pooling.MAX:
        return states.amax(1).float()
    at = -1 if pooling is Pooling.LAST else 0
    # A copy: a view would keep all of (B, T, F) in memory for as long as the vectors are kept.
    return states[:, at].to(torch.float32, copy=True)
