"""Pooling a text's token vectors into one. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby

import numpy as np
import torch

from spin_cli.choices import Pooling

Span = tuple[int, int]
"""First position that counts, and one behind the last."""
RUN_BYTES = 8 * 2**20
"""Of token vectors for each run of equal span, at least, for a GPU to work on runs one by one: to
begin on a run takes it as long as the two more passes over so many bytes that a mask costs."""
CHUNK_BYTES = 2**20
"""Of token vectors that a CPU pools at once, or one text: what it reads for one pooling is then
still in its cache for the next, a third less time for a mean and a maximum."""


@dataclass(frozen=True)
class Real:
    """Where a batch's real tokens are, found once for all of its layers.

    Parameters
    ----------
    spans : of each of B texts, none empty
    width : positions of each text in the batch, padding included
    bounds : (B, 3) int64, on the device: number of the text, and its span
    """

    spans: Sequence[Span]
    width: int
    bounds: torch.Tensor

    @cached_property
    def runs(self) -> list[tuple[slice, slice]]:
        """Texts, neighbours of equal span, and that span."""
        runs, start = [], 0
        for span, group in groupby(self.spans):
            stop = start + sum(1 for _ in group)
            runs.append((slice(start, stop), slice(*span)))
            start = stop
        return runs

    @cached_property
    def counts(self) -> torch.Tensor:
        """Tokens of each text, (B, 1)."""
        return self.bounds[:, 2:] - self.bounds[:, 1:2]

    @cached_property
    def ends(self) -> dict[Pooling, torch.Tensor]:
        """Places of the texts' first and last tokens among the batch's positions, (B,) each."""
        row, start, stop = self.bounds.unbind(1)
        begin = row * self.width
        return {Pooling.FIRST: begin + start, Pooling.LAST: begin + stop - 1}

    @cached_property
    def shared(self) -> slice:
        """Positions that are real in every text; none where no position is."""
        start = max(start for start, _ in self.spans)
        return slice(start, max(start, min(stop for _, stop in self.spans)))

    @cached_property
    def left_out(self) -> torch.Tensor:
        """(B, T, 1) bool: padding, and what belongs to another window."""
        steps = torch.arange(self.width, device=self.bounds.device)
        _, start, stop = self.bounds.unbind(1)
        return ((steps < start[:, None]) | (steps >= stop[:, None]))[:, :, None]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Real]:
        return {}

    def to(self, device: torch.device) -> Real:
        """The same for a layer on another of several GPUs."""
        if device == self.bounds.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Real(self.spans, self.width, self.bounds.to(device))
        return self._elsewhere[device]


def find_real(spans: Sequence[Span], width: int, device: torch.device) -> Real:
    """The real tokens of a batch that is run on *device*."""
    return Real(spans, width, send([(row, *span) for row, span in enumerate(spans)], device))


def send(values: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Numbers on *device*, which need not have done all it was told before."""
    found = torch.from_numpy(np.array(values))
    if device.type == "cuda":
        return found.pin_memory().to(device, non_blocking=True)
    return found.to(device)


def pool(
    states: torch.Tensor, real: Real, poolings: Iterable[Pooling]
) -> dict[Pooling, torch.Tensor]:
    """Pool token vectors over each text's real tokens.

    Parameters
    ----------
    states : Tensor, (B, T, F), any float dtype
        Token vectors; of each row those count that are *real*, the rest is padding or belongs to
        another window.
    real : from `find_real`
    poolings : the poolings wanted

    Returns
    -------
    dict of Tensor, (B, F), float32
        Sums for the mean are taken in float32 whatever the input's dtype.

    Notes
    -----
    A CPU works on runs of neighbours of equal span, so that padding is sliced off rather than
    masked: a mask needs a copy of the whole (B, T, F) tensor and costs six times as much. A GPU, to
    which copies are cheap and many small runs are not, masks where there are many. For inference
    alone: no gradient passes.
    """
    real = real.to(states.device)
    states = states[:, : real.width].contiguous()  # as places are counted; most are so already
    crowded = states.device.type != "cpu" and len(real.runs) * RUN_BYTES > states.nbytes
    found: dict[Pooling, torch.Tensor] = {
        pooling: states.reshape(-1, states.shape[2]).index_select(0, real.ends[pooling])
        for pooling in poolings
        if pooling in (Pooling.FIRST, Pooling.LAST)
    }
    way = _pool_masked if crowded else _pool_runs
    found |= way(states, real, [pooling for pooling in poolings if pooling not in found])
    return {pooling: found[pooling].float() for pooling in poolings}


def _pool_runs(
    states: torch.Tensor, real: Real, poolings: Sequence[Pooling]
) -> dict[Pooling, torch.Tensor]:
    on_cpu = states.device.type == "cpu"
    dtype = torch.float32 if on_cpu else states.dtype
    found: dict[Pooling, torch.Tensor] = {
        pooling: torch.empty(
            (len(real.spans), states.shape[2]),
            dtype=torch.float32 if pooling is Pooling.MEAN else dtype,
            device=states.device,
        )
        for pooling in poolings
    }
    most = CHUNK_BYTES // dtype.itemsize if on_cpu else states.numel()
    for rows, span in real.runs:
        texts = max(1, most // ((span.stop - span.start) * states.shape[2]))
        for start in range(rows.start, rows.stop, texts):
            some = slice(start, min(start + texts, rows.stop))
            part = states[some, span]
            if on_cpu:
                part = part.float()  # which a sum of halves would do by itself, and slower
            for pooling, out in found.items():
                (torch.amax if pooling is Pooling.MAX else torch.sum)(part, 1, out=out[some])
    if Pooling.MEAN in found:
        found[Pooling.MEAN] /= real.counts
    return found


def _pool_masked(
    states: torch.Tensor, real: Real, poolings: Sequence[Pooling]
) -> dict[Pooling, torch.Tensor]:
    """Only positions that are not real in every text are masked: that takes two more passes."""
    inner = real.shared
    outer = [slice(0, inner.start), slice(inner.stop, states.shape[1])]

    def pieces(left: float) -> Iterator[torch.Tensor]:
        if inner.start < inner.stop:
            yield states[:, inner]
        for some in outer:
            if some.start < some.stop:
                yield torch.where(real.left_out[:, some], left, states[:, some])

    found: dict[Pooling, torch.Tensor] = {}
    for pooling in poolings:
        if pooling is Pooling.MAX:
            found[pooling] = reduce(torch.maximum, (piece.amax(1) for piece in pieces(-torch.inf)))
        else:
            sums = (piece.sum(1, dtype=torch.float32) for piece in pieces(0.0))
            found[pooling] = reduce(torch.add, sums) / real.counts
    return found
