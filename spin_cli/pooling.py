"""Pooling a text's token vectors into one. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch

from spin_cli.choices import Pooling

Span = tuple[int, int]
"""First position that counts, and one behind the last."""
RUN_BYTES = 8 * 2**20
"""Of token vectors for each run of equal span, at least, for a GPU to work on runs one by one: to
begin on a run takes it as long as the two more passes over so many bytes that a mask costs."""


def equal_runs(spans: Sequence[Span]) -> list[tuple[int, int, Span]]:
    """Runs ``(start, stop, span)`` of neighbours of equal span."""
    runs, start = [], 0
    for span, group in groupby(spans):
        stop = start + sum(1 for _ in group)
        runs.append((start, stop, span))
        start = stop
    return runs


def make_bounds(spans: Sequence[Span], device: torch.device) -> torch.Tensor | None:
    """The spans as a tensor (B, 2) on a GPU, which may pool with a mask; none on a CPU."""
    return None if device.type == "cpu" else send(spans, device)


def send(values: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Numbers on *device*, which need not have done all it was told before."""
    found = torch.from_numpy(np.array(values))
    if device.type == "cuda":
        return found.pin_memory().to(device, non_blocking=True)
    return found.to(device)


def pool(
    states: torch.Tensor,
    spans: Sequence[Span],
    poolings: Iterable[Pooling],
    bounds: torch.Tensor | None = None,
) -> dict[Pooling, torch.Tensor]:
    """Pool token vectors over each text's real tokens.

    Parameters
    ----------
    states : Tensor, (B, T, F), any float dtype
        Token vectors; of row *b* those in ``spans[b]`` count, the rest is padding or belongs to
        another window.
    spans : sequence of B pairs, each not empty
    poolings : the poolings wanted
    bounds : *spans* from `make_bounds`; where given, padding is masked if there are many short runs

    Returns
    -------
    dict of Tensor, (B, F), float32
        Sums for the mean are taken in float32 whatever the input's dtype.

    Notes
    -----
    Works on runs of neighbours of equal span, so that padding is sliced off rather than masked: a
    mask needs a copy of the whole (B, T, F) tensor and costs six times as much on a CPU. A GPU, to
    which copies are cheap and many small runs are not, may be given a mask. For inference alone: no
    gradient passes.
    """
    runs = equal_runs(spans)
    bounds = None if bounds is None else bounds.to(states.device)  # of several GPUs
    if bounds is not None and len(runs) * RUN_BYTES > states.nbytes:
        return {pooling: _pool_masked(states, bounds, pooling).float() for pooling in poolings}
    parts = [(states[start:stop, slice(*span)], slice(start, stop)) for start, stop, span in runs]
    found = {}
    for pooling in poolings:
        dtype = states.dtype if pooling is Pooling.MAX else torch.float32
        pooled = states.new_empty((len(spans), states.shape[2]), dtype=dtype)
        for part, rows in parts:
            _pool_run(part, pooling, pooled[rows])
        if pooling is Pooling.MEAN:  # once, not for every run
            pooled.div_(_counts(spans, bounds, pooled.device))
        found[pooling] = pooled.float()
    return found


def _pool_run(states: torch.Tensor, pooling: Pooling, out: torch.Tensor) -> None:
    if pooling is Pooling.MEAN:
        torch.sum(states, 1, dtype=torch.float32, out=out)
    elif pooling is Pooling.MAX:
        torch.amax(states, 1, out=out)
    else:
        out.copy_(states[:, -1 if pooling is Pooling.LAST else 0])


def _pool_masked(states: torch.Tensor, bounds: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    start, stop = bounds[:, :1], bounds[:, 1:]
    if pooling in (Pooling.FIRST, Pooling.LAST):
        at = start if pooling is Pooling.FIRST else stop - 1
        return states.gather(1, at[:, :, None].expand(-1, 1, states.shape[2]))[:, 0]
    steps = torch.arange(states.shape[1], device=states.device)
    left_out = ((steps < start) | (steps >= stop))[:, :, None]
    if pooling is Pooling.MAX:
        return states.masked_fill(left_out, -torch.inf).amax(1)
    return states.masked_fill(left_out, 0.0).sum(1, dtype=torch.float32) / (stop - start)


def _counts(
    spans: Sequence[Span], bounds: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Positions that count in each text, (B, 1)."""
    if bounds is not None:
        return bounds[:, 1:] - bounds[:, :1]
    return torch.tensor([[stop - start] for start, stop in spans], device=device)
