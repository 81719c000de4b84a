"""Scores of predicted probabilities. Pure functions on arrays.

Truth is a code per row (N,), or for texts with several labels an indicator (N, L): then the
functions of `label_metrics` answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import label_metrics
from spin_cli.choices import Metric
from spin_cli.errors import DataError

Codes = NDArray[Any]
Probs = NDArray[np.float64]
Threshold = float | NDArray[np.float64] | None
"""Of class 1 of two classes; or (L,), one for each label; or none."""


@dataclass(frozen=True)
class OfFirst:
    """A threshold of class 0 of two classes: their probabilities need not sum to one exactly."""

    limit: float


def probabilities(
    z: NDArray[Any], n_classes: int, multi_class: str = "multinomial"
) -> NDArray[np.float64]:
    """Class probabilities (N, n_classes) of logits ``z`` (N, K).

    *multi_class*: ``multinomial``, ``ovr`` (sigmoids that are made to sum to one), or ``labels``
    (sigmoids as they are).
    """
    z = np.asarray(z, np.float64)
    if multi_class == "labels":
        return sigmoid(z)
    if z.shape[1] == 1 and n_classes == 2:
        p = sigmoid(z[:, 0])
        return np.stack([sigmoid(-z[:, 0]), p], 1)
    if multi_class == "ovr":
        # Divided by the largest first: sigmoids may all underflow at once.
        log_p = -np.logaddexp(0.0, -z)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
    else:
        p = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


def logits(probs: Probs, multi_class: str = "multinomial") -> NDArray[np.float64]:
    """Logits (N, n_classes), one a class, of which `probabilities` makes *probs*; cut at 1e-15."""
    if multi_class == "labels":
        p = np.clip(probs, 1e-15, 1.0 - 1e-15)
        return np.asarray(np.log(p) - np.log1p(-p))
    return np.asarray(np.log(np.clip(probs, 1e-15, 1.0)))


def sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-z)), without overflow."""
    e = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1.0, e) / (1.0 + e))


def accuracy(y: Codes, predicted: Codes) -> float:
    """Share of rows that are `right`."""
    return float(np.mean(right(y, predicted)))


def right(y: Codes, predicted: Codes) -> NDArray[np.bool_]:
    """Rows (N,) whose predicted class is right; with several labels, all of them."""
    same = np.asarray(y == predicted)
    return np.asarray(same.all(1)) if y.ndim == 2 else same


def certainty(probs: Probs, predicted: Codes) -> NDArray[np.float64]:
    """Probability (N,) that the predicted class, or exactly the predicted labels, are right."""
    if predicted.ndim == 2:
        return label_metrics.certainty(probs, predicted)
    return np.asarray(probs[np.arange(len(predicted)), predicted])


def confusion(y: Codes, predicted: Codes, n_classes: int) -> NDArray[np.int64]:
    """Counts (n_classes, n_classes): true class by row, predicted class by column."""
    flat = np.bincount(y * n_classes + predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes)


def per_class(y: Codes, predicted: Codes, n_classes: int) -> list[dict[str, float]]:
    """Precision, recall, F1 and number of rows of each class; 0 where undefined."""
    table = confusion(y, predicted, n_classes)
    right, said, true = np.diag(table), table.sum(0), table.sum(1)
    precision = np.divide(right, said, out=np.zeros(n_classes), where=said > 0)
    recall = np.divide(right, true, out=np.zeros(n_classes), where=true > 0)
    f1 = np.divide(2 * right, said + true, out=np.zeros(n_classes), where=said + true > 0)
    return [
        {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for p, r, f, n in zip(precision, recall, f1, true, strict=True)
    ]


def macro_f1(y: Codes, predicted: Codes, n_classes: int) -> float:
    """Mean of the classes' F1 scores; a class that neither occurs nor is predicted is left out."""
    return scores_of(confusion(y, predicted, n_classes))[1]


def scores_of(table: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy and macro-F1 of a `confusion` table."""
    sizes, right = table.sum(0) + table.sum(1), np.diag(table)
    there = sizes > 0
    return float(right.sum() / table.sum()), float(np.mean(2 * right[there] / sizes[there]))


def auroc(y: Codes, score: NDArray[Any]) -> float:
    """Area under the ROC curve of *score* for ``y == 1``, ties counted half (Mann-Whitney)."""
    positive = y == 1
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = float(ranks[inverse][positive].sum())
    return (total - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def row_losses(y: Codes, probs: Probs) -> NDArray[np.float64]:
    """-log p of each row's true class, p cut at 1e-15."""
    if y.ndim == 2:
        return label_metrics.row_losses(y, probs)
    return np.asarray(-np.log(np.clip(probs[np.arange(len(y)), y], 1e-15, 1.0)))


def log_loss(y: Codes, probs: Probs) -> float:
    """Mean of `row_losses`."""
    return float(row_losses(y, probs).mean())


def decide(probs: Probs, threshold: Threshold | OfFirst = None) -> Codes:
    """Predicted classes: the likeliest; with a threshold (two classes) class 1 from there on.

    With an array of thresholds, one for each label: an indicator of those that reach theirs.
    """
    if isinstance(threshold, np.ndarray):
        return label_metrics.decide(probs, threshold)
    if isinstance(threshold, OfFirst):
        return (probs[:, 0] < threshold.limit).astype(np.int64)
    if threshold is not None and probs.shape[1] == 2:
        return (probs[:, 1] >= threshold).astype(np.int64)
    return np.asarray(probs.argmax(1))


def score_function(metric: Metric) -> Callable[[Codes, Probs], float]:
    """The function of codes and probabilities that *metric* names; higher is better."""
    one = _score_function(metric)
    return lambda y, probs: label_metrics.score(metric, y, probs) if y.ndim == 2 else one(y, probs)


def _score_function(metric: Metric) -> Callable[[Codes, Probs], float]:
    if metric is Metric.ACCURACY:
        return lambda y, probs: accuracy(y, decide(probs))
    if metric is Metric.MACRO_F1:
        return lambda y, probs: macro_f1(y, decide(probs), probs.shape[1])
    if metric is Metric.LOG_LOSS:
        return lambda y, probs: -log_loss(y, probs)
    return _mean_auroc


def _mean_auroc(y: Codes, probs: Probs) -> float:
    """AUROC of class 1, or the mean over classes of each against the rest."""
    if probs.shape[1] == 2:
        return auroc(y, probs[:, 1])
    each = [auroc((y == k).astype(int), probs[:, k]) for k in range(probs.shape[1])]
    return float(np.nanmean(each))


def check_defined(metric: Metric, y: Codes, split: str) -> None:
    """Refuse rows of *split* with codes *y* that *metric* says nothing of, whatever is predicted.

    `DataError`: AUROC takes a class, or a label, that some of them have and others do not.
    """
    columns = y.reshape(len(y), -1)
    if metric is Metric.AUROC and (columns == columns[:1]).all():
        same = "labels" if y.ndim == 2 else "class"
        raise DataError(
            f"--metric auroc: all {len(y):,} {split} rows have the same {same}, so that there is"
            " nothing to be told apart",
            f"Take another --metric, or extract again with {split} rows of other classes too.",
        )


def best_threshold(y: Codes, probs: Probs) -> float:
    """The threshold on class 1's probability with the best macro-F1 on these rows.

    Chosen as for a label, see `label_metrics.peak`.
    """
    right, said = label_metrics.reached(y, probs[:, 1])
    rows, true = len(y), int((y == 1).sum())
    refused = rows - true - (said - right)  # rightly
    counts = (right, refused), (said, rows - said), np.array([true, rows - true])
    return label_metrics.peak(label_metrics.f1_of(*(np.transpose(each) for each in counts))[1])


def tuned_threshold(metric: Metric, y: Codes, probs: Probs) -> Threshold:
    """The threshold by which *metric* decides, tuned on these rows.

    For macro-F1 of two classes or of labels the best one; else one half for every label, or none.
    """
    if y.ndim == 2 and metric is not Metric.MACRO_F1:
        return np.full(y.shape[1], label_metrics.HALF)
    if y.ndim == 2:
        return label_metrics.best_thresholds(y, probs)
    tuned = metric is Metric.MACRO_F1 and probs.shape[1] == 2
    return best_threshold(y, probs) if tuned else None


def score_at(metric: Metric, y: Codes, probs: Probs, threshold: Threshold) -> float:
    """*metric*, higher is better, of the answers that a threshold decides, where it is of these."""
    if metric is Metric.ACCURACY:
        return accuracy(y, decide(probs, threshold))
    if metric is not Metric.MACRO_F1:
        return score_function(metric)(y, probs)
    said = decide(probs, threshold)
    return label_metrics.macro_f1(y, said) if y.ndim == 2 else macro_f1(y, said, probs.shape[1])


def evaluate(
    y: Codes, probs: Probs, classes: Sequence[str], threshold: Threshold | OfFirst = None
) -> dict[str, Any]:
    """Every metric of a set of rows, under the names that ``metrics.json`` has."""
    if isinstance(threshold, np.ndarray):
        return label_metrics.evaluate(y, probs, classes, threshold)
    predicted = decide(probs, threshold)
    scores: dict[str, Any] = {
        "rows": len(y),
        "accuracy": accuracy(y, predicted),
        "macro_f1": macro_f1(y, predicted, len(classes)),
        "log_loss": log_loss(y, probs),
        "per_class": dict(zip(classes, per_class(y, predicted, len(classes)), strict=True)),
        "ece": calibration_error(y, probs),
        "confusion": confusion(y, predicted, len(classes)).tolist(),
    }
    if len(classes) == 2:
        scores["auroc"] = auroc(y, probs[:, 1])
    return scores


def calibration_error(y: Codes, probs: Probs, bins: int = 15) -> float:
    """Expected calibration error of the likeliest class (Guo et al. 2017), bins of equal width."""
    if y.ndim == 2:
        return label_metrics.calibration_error(y, probs, bins)
    sure, right = probs.max(1), probs.argmax(1) == y
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = np.bincount(place, right - sure, bins)
    return float(np.abs(gaps).sum() / len(y))


def resamples(rows: int, times: int, seed: int = 0) -> list[NDArray[np.intp]]:
    """Row numbers of bootstrap samples, each as many rows as there are."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, rows, rows) for _ in range(times)]


def mcnemar(right: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Two-sided exact p value of McNemar's test that two classifiers err equally often.

    Only rows on which one is right and the other wrong count: under the hypothesis, a fair coin.
    """
    from scipy.stats import binomtest  # late: half a second that `predict` need not wait

    a, b = int((right & ~other).sum()), int((~right & other).sum())
    return float(binomtest(a, a + b).pvalue) if a + b else 1.0
