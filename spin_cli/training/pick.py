"""Which of many heads: by what they did on rows that they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.activations import Feature
from spin_cli.choices import Metric
from spin_cli.label_metrics import resampled
from spin_cli.training.table import Choice, Reader

RESAMPLES = 200
SAME_LOSS = 1e-4
"""Log losses so near are ties, however sure the difference: where every head is right, the surest
would win, which is mostly the deepest."""


@dataclass(frozen=True)
class Part:
    """One head, or one of several whose logits are averaged."""

    choice: Choice
    strength: float
    """Penalty as a share of the training rows."""
    share: float = 1.0
    """Weight of its logits; those of all parts add up to 1."""
    whole: bool = False
    """A stack of whole matrices: `Judged.linear` holds its weights."""


@dataclass(frozen=True)
class Linear:
    """A finished head on all neurons of some matrices."""

    features: tuple[Feature, ...]
    weight: NDArray[np.float32]
    """(K, n) on raw columns, matrix by matrix"""
    bias: NDArray[np.float64]
    """(K,)"""


@dataclass(frozen=True)
class Judged:
    """A candidate head and its probabilities on the rows that it is judged by."""

    parts: tuple[Part, ...]
    """One, or several whose logits are averaged, a stack or the largest share first."""
    neurons: int
    """Read by all parts together."""
    probs: NDArray[np.float64]
    """(N, n_classes)"""
    linear: Linear | None = None
    """Weights of the stack among its parts, which judging that brought along."""

    @property
    def main(self) -> Part:
        """The part with the largest share."""
        return self.parts[0]

    @property
    def choices(self) -> list[Choice]:
        """What each part reads."""
        return [part.choice for part in self.parts]

    @property
    def depth(self) -> int:
        """Position of the last layer read."""
        return max(choice.depth for choice in self.choices)

    def columns(self, reader: Reader) -> list[tuple[Feature, NDArray[np.int32]]]:
        """What it reads: matrices, and which of their neurons."""
        whole = () if self.linear is None else self.linear.features
        masked = reader.union([part.choice for part in self.parts if not part.whole])
        return [
            *((feature, np.arange(feature.width, dtype=np.int32)) for feature in whole),
            *((i.feature, i.neurons[:count]) for i, count in masked if i.feature not in whole),
        ]

    def size(self, reader: Reader) -> int:
        """How many neurons it reads."""
        return sum(len(neurons) for _, neurons in self.columns(reader))

    def gather(self, reader: Reader) -> NDArray[Any]:
        """The values of `columns`, (rows, n)."""
        if self.linear is None:
            return reader.gather(*self.choices)
        whole = self.linear.features
        return np.hstack(
            [
                reader.whole(f) if f in whole else np.take(reader.whole(f), neurons, axis=1)
                for f, neurons in self.columns(reader)
            ]
        )


def score(metric: Metric, y: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """*metric* on some rows; macro-F1 of two classes or of labels at its best threshold on them."""
    return metrics.score_at(metric, y, probs, metrics.tuned_threshold(metric, y, probs))


def best_of(judged: Sequence[Judged], y: NDArray[np.int64], metric: Metric) -> Judged:
    """The best on rows with codes *y*, where ties go to the cheaper head.

    Scores within one standard error of the highest are ties: of a hundred candidates the highest
    is mostly lucky. Among these the log loss decides, which is far less noisy; and where that too
    is within one standard error, or `SAME_LOSS`, of the lowest, the shallowest head wins, then the
    smallest. Both errors are those of the *difference* from the best, over the same rows; so
    whatever is no worse than a tied head is tied too, though it be so much like the best that the
    difference is sure.
    """
    thresholds = [metrics.tuned_threshold(metric, y, item.probs) for item in judged]
    scores = [
        metrics.score_at(metric, y, item.probs, threshold)
        for item, threshold in zip(judged, thresholds, strict=True)
    ]
    tied = [judged[at] for at in _no_worse(scores, _errors(judged, thresholds, scores, y, metric))]
    losses = [metrics.row_losses(y, item.probs) for item in tied]
    means = [float(rows.mean()) for rows in losses]
    lowest = losses[int(np.argmin(means))]
    errors = [max(SAME_LOSS, float((rows - lowest).std()) / len(y) ** 0.5) for rows in losses]
    equal = _no_worse([-mean for mean in means], errors)
    return tied[min(equal, key=lambda at: (tied[at].depth, tied[at].neurons, means[at]))]


def _no_worse(scores: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Positions that score at least as high as some one within its *error* of the highest."""
    top = max(scores)
    tied = (s for s, e in zip(scores, errors, strict=True) if s == top or top - s <= e)
    least = min(tied)
    return [at for at, s in enumerate(scores) if s >= least]


def _errors(
    judged: Sequence[Judged],
    thresholds: Sequence[metrics.Threshold],
    scores: Sequence[float],
    y: NDArray[np.int64],
    metric: Metric,
) -> list[float]:
    """Bootstrap standard errors of the differences from the highest score.

    A threshold was chosen once, on all rows.
    """
    samples = metrics.resamples(len(y), RESAMPLES)

    def again(item: Judged, threshold: metrics.Threshold) -> NDArray[np.float64]:
        """The score on every resample."""
        if metric is Metric.LOG_LOSS:
            losses = metrics.row_losses(y, item.probs)
            return np.array([-losses[rows].mean() for rows in samples])
        if metric is Metric.AUROC:
            return np.array([score(metric, y[rows], item.probs[rows]) for rows in samples])
        predicted = metrics.decide(item.probs, threshold)
        if y.ndim == 2:
            name = "accuracy" if metric is Metric.ACCURACY else "macro_f1"
            return resampled(y, predicted, samples)[name]
        if metric is Metric.ACCURACY:
            right = (predicted == y).astype(float)
            return np.array([right[rows].mean() for rows in samples])
        count = item.probs.shape[1]
        return np.array([metrics.macro_f1(y[rows], predicted[rows], count) for rows in samples])

    top = int(np.argmax(scores))
    best = again(judged[top], thresholds[top])
    pairs = zip(judged, thresholds, strict=True)
    least = SAME_LOSS if metric is Metric.LOG_LOSS else 0.0
    return [max(least, float(np.nanstd(best - again(item, t)))) for item, t in pairs]


def frontier(judged: Sequence[Judged], y: NDArray[np.int64]) -> list[Judged]:
    """Heads such that every other is deeper, larger or has a higher log loss; shallowest first."""
    loss = {id(item): metrics.log_loss(y, item.probs) for item in judged}
    ranked = sorted(judged, key=lambda item: (item.depth, item.neurons, loss[id(item)]))
    kept: list[Judged] = []
    for item in ranked:
        if all(o.neurons > item.neurons or loss[id(o)] > loss[id(item)] for o in kept):
            kept.append(item)
    return kept
