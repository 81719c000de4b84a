"""Scores of texts with any number of labels. Pure functions on arrays.

Truth ``Y`` and answers are indicators (N, L): 1 where a label applies. Probabilities ``P`` (N, L)
are independent of one another: a row's do not sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.choices import Metric

Indicator = NDArray[Any]
F64 = NDArray[np.float64]
GRID = np.round(np.linspace(0.01, 0.99, 99), 2)
"""Thresholds tried."""
SPAN = 3
"""Neighbours to either side over which the curve of F1 is smoothed."""
HALF = 0.5
DRAWN_BYTES = 2**26


def row_losses(Y: Indicator, P: F64) -> F64:
    """Mean over labels of each row's binary log loss (N,), probabilities cut at 1e-15."""
    right = np.where(Y > 0, P, 1.0 - P)
    return np.asarray(-np.log(np.clip(right, 1e-15, 1.0)).mean(1))


def decide(P: F64, thresholds: F64 | None = None) -> NDArray[np.int64]:
    """Answers (N, L): labels whose probability reaches their threshold (L,), else one half."""
    return np.asarray((HALF if thresholds is None else thresholds) <= P, np.int64)


def certainty(P: F64, said: Indicator) -> F64:
    """Probability (N,) that exactly the labels *said* apply, taken as independent."""
    return np.asarray(np.where(said > 0, P, 1.0 - P).prod(1))


def best_thresholds(Y: Indicator, P: F64) -> F64:
    """For each label the threshold (L,) with the highest F1 on these rows; see `peak`."""
    found = np.full(P.shape[1], HALF)
    for k, p in enumerate(P.T):
        if true := int((Y[:, k] > 0).sum()):
            right, said = reached(Y[:, k], p)
            found[k] = peak(2.0 * right / (said + true))
    return found


def reached(y: Indicator, p: F64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How many rows of ``y == 1``, and of all, have a *p* (N,) of at least each of `GRID`."""
    right, said = (len(q) - np.searchsorted(np.sort(q), GRID) for q in (p[y > 0], p))
    return right, said


def peak(curve: F64) -> float:
    """Where on `GRID` a score (99,) is highest.

    It is smoothed over neighbouring thresholds, so that a lucky spike does not win. Of equals the
    middle of the longest stretch is taken: no probability may lie near it.
    """
    padded = np.pad(curve, SPAN, mode="edge")
    smooth = np.convolve(padded, np.full(2 * SPAN + 1, 1 / (2 * SPAN + 1)), mode="valid")
    top = np.flatnonzero(smooth >= smooth.max() - 1e-12)
    longest = max(np.split(top, np.flatnonzero(np.diff(top) > 1) + 1), key=len)
    return float(GRID[longest[len(longest) // 2]])


def auroc(Y: Indicator, P: F64) -> F64:
    """Area under each label's ROC curve (L,), ties counted half; NaN where one side is empty."""
    from scipy.stats import rankdata  # late, as in `metrics.mcnemar`

    positive = np.asarray(Y > 0)
    n = positive.sum(0).astype(float)
    ranks = (rankdata(P, axis=0) * positive).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((ranks - n * (n + 1) / 2) / (n * (len(Y) - n)))


def subset_accuracy(Y: Indicator, said: Indicator) -> float:
    """Share of rows whose labels are all right, none missing and none too many."""
    return float((np.asarray(Y) == said).all(1).mean())


def f1_of(right: NDArray[Any], said: NDArray[Any], true: NDArray[Any]) -> tuple[F64, F64]:
    """Micro- and macro-F1 of counts (…, L) of right, given and true labels.

    As for classes, a label that neither occurs nor is given is left out of the mean.
    """
    total = np.asarray(said + true, np.float64)
    there = total > 0
    each = np.divide(2.0 * right, total, out=np.zeros_like(total), where=there)
    macro = each.sum(-1) / np.maximum(there.sum(-1), 1)
    return np.asarray(2.0 * right.sum(-1) / np.maximum(total.sum(-1), 1.0)), np.asarray(macro)


def _counts(Y: Indicator, said: Indicator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    true, given = np.asarray(Y > 0), np.asarray(said > 0)
    return (true & given).sum(0), given.sum(0), true.sum(0)


def micro_f1(Y: Indicator, said: Indicator) -> float:
    """F1 over all pairs of row and label."""
    return float(f1_of(*_counts(Y, said))[0])


def macro_f1(Y: Indicator, said: Indicator) -> float:
    """Mean of the labels' F1."""
    return float(f1_of(*_counts(Y, said))[1])


def score(metric: Metric, Y: Indicator, P: F64) -> float:
    """*metric*, higher is better; macro-F1 at the best thresholds for these very rows."""
    if metric is Metric.ACCURACY:
        return subset_accuracy(Y, decide(P))
    if metric is Metric.MACRO_F1:
        return macro_f1(Y, decide(P, best_thresholds(Y, P)))
    if metric is Metric.LOG_LOSS:
        return -float(row_losses(Y, P).mean())
    each = auroc(Y, P)
    return float(np.nanmean(each)) if not np.isnan(each).all() else float("nan")


def per_label(Y: Indicator, P: F64, said: Indicator) -> list[dict[str, float]]:
    """Precision, recall, F1 (0 where undefined), AUROC (NaN there) and rows of each label."""
    right, given, true = _counts(Y, said)
    size = len(right)
    precision = np.divide(right, given, out=np.zeros(size), where=given > 0)
    recall = np.divide(right, true, out=np.zeros(size), where=true > 0)
    f1 = np.divide(2 * right, given + true, out=np.zeros(size), where=given + true > 0)
    return [
        {
            "precision": float(p),
            "recall": float(r),
            "f1": float(f),
            "rows": int(n),
            "auroc": float(area),
        }
        for p, r, f, n, area in zip(precision, recall, f1, true, auroc(Y, P), strict=True)
    ]


def calibration_error(Y: Indicator, P: F64, bins: int = 15) -> float:
    """Mean over labels of the expected calibration error of "it applies", bins of equal width."""
    place = np.minimum((P * bins).astype(int), bins - 1)
    gaps = [np.bincount(place[:, k], P[:, k] - Y[:, k], bins) for k in range(P.shape[1])]
    return float(np.abs(gaps).sum() / P.size)


def evaluate(
    Y: Indicator, P: F64, names: Sequence[str], thresholds: F64 | None = None
) -> dict[str, Any]:
    """Every metric of a set of rows, under the names that ``metrics.json`` has."""
    said = decide(P, thresholds)
    micro, macro = f1_of(*_counts(Y, said))
    return {
        "rows": len(Y),
        "accuracy": subset_accuracy(Y, said),
        "micro_f1": float(micro),
        "macro_f1": float(macro),
        "log_loss": float(row_losses(Y, P).mean()),
        "per_class": dict(zip(names, per_label(Y, P, said), strict=True)),
        "ece": calibration_error(Y, P),
        "auroc": score(Metric.AUROC, Y, P),
    }


def resampled(
    Y: Indicator, said: Indicator, samples: Sequence[NDArray[np.intp]]
) -> dict[str, NDArray[np.float64]]:
    """Scores of answers on each of R bootstrap samples of the rows.

    Returns
    -------
    dict
        ``accuracy``, ``micro_f1``, ``macro_f1``: (R,); ``precision``, ``recall``, ``f1``: (R, L),
        NaN where undefined.
    """
    true, given = np.asarray(Y > 0), np.asarray(said > 0)
    columns = np.hstack([true & given, given, true, (true == given).all(1)[:, None]])
    columns = columns.astype(np.float32)
    found, step = [], max(1, DRAWN_BYTES // (4 * len(Y)))
    for start in range(0, len(samples), step):  # a resample is a count per row
        part = samples[start : start + step]
        counts = np.stack([np.bincount(rows, minlength=len(Y)) for rows in part])
        found.append((counts.astype(np.float32) @ columns).astype(np.float64))
    sums = np.concatenate(found)
    width = Y.shape[1]
    right, said_, true_ = (sums[:, i * width : (i + 1) * width] for i in range(3))
    micro, macro = f1_of(right, said_, true_)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "accuracy": sums[:, -1] / len(Y),
            "micro_f1": micro,
            "macro_f1": macro,
            "precision": right / said_,
            "recall": right / true_,
            "f1": 2 * right / (said_ + true_),
        }
