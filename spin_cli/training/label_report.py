"""What ``metrics.json`` says of texts with any number of labels, beside what it says of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import label_metrics

Drawn = Mapping[str, NDArray[np.float64]]
COMPARED = ("accuracy", "micro_f1", "macro_f1")
OF_LABELS = ("precision", "recall", "f1")


def percentiles(values: NDArray[np.float64], level: float) -> list[float]:
    """Both ends of the interval that holds the share *level* of *values*; NaN are left out."""
    tail = 50.0 * (1.0 - level)
    low, high = np.nanpercentile(values, [tail, 100.0 - tail])
    return [float(low), float(high)]


def add_intervals(scores: dict[str, Any], drawn: Drawn, level: float) -> None:
    """Percentile bootstrap intervals, of every label too, for what `resampled` has drawn."""
    scores["intervals"] = {name: percentiles(drawn[name], level) for name in COMPARED}
    for k, label in enumerate(scores["per_class"].values()):
        columns = {name: drawn[name][:, k] for name in OF_LABELS}
        label["intervals"] = {
            name: percentiles(column, level)
            for name, column in columns.items()
            if not np.isnan(column).all()
        }


def compare_labels(
    report: dict[str, Any],
    split: str,
    true: NDArray[np.int64],
    said: Mapping[str, NDArray[np.int64]],
    best: str,
    samples: list[NDArray[np.intp]],
    level: float,
) -> None:
    """Add intervals to all scores of a split, and on test a paired bootstrap with the best rival.

    Parameters
    ----------
    true, said : (N, L), 1 where a label applies, and where the head and each rival give it
    """
    drawn = {name: label_metrics.resampled(true, given, samples) for name, given in said.items()}
    for name, each in drawn.items():
        add_intervals(report[name][split], each, level)
    if split != "test":
        return
    differences = {name: drawn["spin"][name] - drawn[best][name] for name in COMPARED}
    report["comparison"] = {
        "against": best,
        "level": level,
        "difference": {
            name: {
                "value": report["spin"]["test"][name] - report[best]["test"][name],
                "interval": percentiles(values, level),
                "p": paired_p(values),
            }
            for name, values in differences.items()
        },
    }


def paired_p(differences: NDArray[np.float64]) -> float:
    """Two-sided bootstrap p value that a difference is none (Efron & Tibshirani 1993, ch. 16)."""
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    return min(1.0, 2.0 * (1 + min(below, above)) / (1 + len(differences)))
