"""Calibration and thresholds of texts with any number of labels: each label has its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from spin_cli import label_metrics, metrics
from spin_cli.choices import Calibration, Metric
from spin_cli.names import list_names

MIN_ROWS = 100
"""Fewest rows for a temperature; of classes, for a threshold too."""
MIN_CLASS_ROWS = 50
"""Fewest rows of each class for a shift of its own, or for a target to be met on it; with a label,
and as many without, for a temperature or shift of its own."""
MIN_TUNED = 10
"""Fewest rows with a label for a threshold of its own."""
SMOOTHING = 1.0
"""Pull of the shifts towards none, in rows."""
BOUND = 4.0
NAMED = 5
F64 = NDArray[np.float64]


def fit_labels(
    Y: NDArray[np.int64],
    probs: F64,
    names: Sequence[str],
    kind: Calibration,
    what: str,
    notes: list[str],
) -> tuple[F64, F64]:
    """Slopes and shifts (L,) of the logits with the lowest log loss on rows of evidence.

    Labels with few rows share one slope, fitted to all labels together. ``per-class`` adds a
    shift (Platt 1999) to the labels that have a slope of their own.
    """
    width = Y.shape[1]
    slope, shift = np.ones(width), np.zeros(width)
    if kind is Calibration.NONE:
        return slope, shift
    if len(Y) < MIN_ROWS:
        notes.append(f"not calibrated: {len(Y)} {what} rows, and it takes {MIN_ROWS} or more")
        return slope, shift
    z = metrics.logits(probs, "labels")
    slope[:] = _temperature(z.ravel(), Y.ravel())
    counts = np.minimum(Y.sum(0), len(Y) - Y.sum(0))
    for k in np.flatnonzero(counts >= MIN_CLASS_ROWS):
        if kind is Calibration.PER_CLASS:
            slope[k], shift[k] = _platt(z[:, k], Y[:, k])
        else:
            slope[k] = _temperature(z[:, k], Y[:, k])
    if few := [names[k] for k in np.flatnonzero(counts < MIN_CLASS_ROWS).tolist()]:
        notes.append(
            f"calibrated by one temperature for all: {list_names(few, NAMED, '')}; a label's own"
            f" takes {MIN_CLASS_ROWS} {what} rows with and without it"
        )
    return slope, shift


def _loss(z: F64, y: NDArray[np.int64]) -> float:
    return float((np.logaddexp(0.0, z) - y * z).mean())


def _temperature(z: F64, y: NDArray[np.int64]) -> float:
    found = minimize_scalar(
        lambda u: _loss(np.exp(u) * z, y), bounds=(-BOUND, BOUND), method="bounded"
    )
    return float(np.exp(found.x)) if found.fun < _loss(z, y) else 1.0


def _platt(z: F64, y: NDArray[np.int64]) -> tuple[float, float]:
    def loss(u: F64) -> float:
        return _loss(np.exp(u[0]) * z + u[1], y) + SMOOTHING * float(u[1] ** 2) / len(y)

    found = minimize(loss, np.zeros(2), method="L-BFGS-B", bounds=[(-BOUND, BOUND), (-5, 5)])
    if found.fun >= loss(np.zeros(2)):
        return 1.0, 0.0
    return float(np.exp(found.x[0])), float(found.x[1])


def choose_thresholds(
    Y: NDArray[np.int64],
    probs: F64,
    names: Sequence[str],
    metric: Metric,
    what: str,
    notes: list[str],
) -> F64:
    """Probability (L,) from which each label is given: by F1 where macro-F1 is chosen by, else 0.5.

    Parameters
    ----------
    probs : (N, L), calibrated
    """
    thresholds = np.full(len(names), label_metrics.HALF)
    if metric is not Metric.MACRO_F1:
        return thresholds
    counts = Y.sum(0)
    enough = counts >= MIN_TUNED
    best = label_metrics.best_thresholds(Y, probs)
    all_alike = (probs >= best).all(0) & ~Y.all(0)  # it tells nothing of other rows
    tuned = enough & ~all_alike
    thresholds[tuned] = best[tuned]
    if none := [names[k] for k in np.flatnonzero(enough & all_alike).tolist()]:
        notes.append(
            f"threshold left at 0.5: {list_names(none, NAMED, '')}; on {what} rows none is better"
            " than to give the label to all"
        )
    if few := [f"{names[k]} ({counts[k]})" for k in np.flatnonzero(~enough).tolist()]:
        notes.append(
            f"threshold left at 0.5: {list_names(few, NAMED, '')}; tuning takes {MIN_TUNED} {what}"
            " rows with the label"
        )
    return thresholds
