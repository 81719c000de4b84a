"""Several heads as one: their logits averaged.

The mean of linear heads is a linear head on the union of their neurons, so that it is stored, run
and explained like any other. Heads that read different sites and poolings err on different texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.training.pick import Judged, Part
from spin_cli.training.table import Choice

STEPS = 10
"""Heads in a blend, counted as often as they are in it."""
GAIN = 3e-4
"""Log loss that another head has to take off."""


def blends(
    judged: Sequence[Judged], y: NDArray[np.int64], count: Callable[..., int]
) -> list[Judged]:
    """For each depth the blend of heads that are no deeper, where several do better than one.

    Parameters
    ----------
    judged : heads and their probabilities on the same rows, with codes *y*
    count : how many neurons some choices read together
    """
    kind = "labels" if y.ndim == 2 else "multinomial"
    logs = np.stack([_logits(item.probs, kind) for item in judged])
    found: list[Judged] = []
    for depth in sorted({item.depth for item in judged}):
        within = [i for i, item in enumerate(judged) if item.depth <= depth]
        members = _greedy(logs[within], y, kind)
        chosen = [judged[within[i]] for i in members]
        parts = _parts(chosen)
        if len(parts) == 1 or max(part.choice.depth for part in parts) < depth:
            continue
        neurons = count(*(part.choice for part in parts))
        probs = mean_probs([item.probs for item in chosen], [1 / len(chosen)] * len(chosen), kind)
        found.append(Judged(parts, neurons, probs))
    return found


def with_stacks(
    judged: Sequence[Judged],
    stacked: Sequence[Judged],
    y: NDArray[np.int64],
    size: Callable[[Judged], int],
) -> list[Judged]:
    """The mean of each stack and the best head on masked neurons that is no deeper.

    The two are fitted in other ways to other columns, so that each is right where the other errs;
    equal shares leave nothing to overfit.

    Parameters
    ----------
    judged, stacked : heads and their probabilities on the same rows, with codes *y*
    size : how many neurons a head reads
    """
    kind = "labels" if y.ndim == 2 else "multinomial"
    losses = [metrics.log_loss(y, item.probs) for item in judged]
    found = []
    for stack in stacked:
        within = [at for at, item in enumerate(judged) if item.depth <= stack.depth]
        if not within:
            continue
        best = judged[min(within, key=losses.__getitem__)]
        parts = tuple(replace(p, share=p.share / 2) for p in (*stack.parts, *best.parts))
        probs = mean_probs([stack.probs, best.probs], [0.5, 0.5], kind)
        item = Judged(parts, 0, probs, stack.linear)
        found.append(replace(item, neurons=size(item)))
    return found


def mean_probs(
    probs: Sequence[NDArray[np.float64]], shares: Sequence[float], kind: str = "multinomial"
) -> NDArray[np.float64]:
    """Class probabilities (N, n_classes) of the weighted mean of heads' logits.

    *kind*: ``labels`` where those of a row are independent of one another.
    """
    total = sum(share * _logits(each, kind) for share, each in zip(shares, probs, strict=True))
    return metrics.probabilities(np.asarray(total), probs[0].shape[1], kind)


def _greedy(logs: NDArray[np.float64], y: NDArray[np.int64], kind: str) -> list[int]:
    """Heads taken one by one, each that which lowers the log loss of the mean most, also again.

    Forward selection with replacement (Caruana et al. 2004): as few steps as bring a gain, so that
    it hardly overfits the rows that it sees.
    """
    total = np.zeros_like(logs[0])
    taken: list[int] = []
    last = np.inf
    while len(taken) < STEPS:
        size = len(taken) + 1
        means = (metrics.probabilities((total + each) / size, logs.shape[2], kind) for each in logs)
        losses = [metrics.log_loss(y, probs) for probs in means]
        best = int(np.argmin(losses))
        if losses[best] > last - GAIN:
            break
        last = losses[best]
        total += logs[best]
        taken.append(best)
    return taken


def _parts(chosen: Sequence[Judged]) -> tuple[Part, ...]:
    """Each head once, with its share; the largest share first."""
    shares: dict[tuple[Choice, float], float] = {}
    for item in chosen:
        for part in item.parts:
            key = part.choice, part.strength
            shares[key] = shares.get(key, 0.0) + part.share / len(chosen)
    parts = [Part(choice, strength, share) for (choice, strength), share in shares.items()]
    return tuple(sorted(parts, key=lambda part: -part.share))


def _logits(probs: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    z = metrics.logits(probs, kind)
    return z if kind == "labels" else np.asarray(z - z.mean(1, keepdims=True))
