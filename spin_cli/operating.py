"""Where a decision threshold could be put: recall at a false positive rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATES = (0.001, 0.01, 0.05)
"""Shares of the rows without a class that may be given it."""


def operating_points(
    codes: NDArray[Any], probs: NDArray[np.float64], classes: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """Points of the ROC curve of each class that has a threshold: of two classes, or of labels.

    Parameters
    ----------
    codes : (n,) true class numbers, or (n, n_classes), 1 where a label applies
    probs : (n, n_classes)
    classes : their names

    Returns
    -------
    dict
        By class a list of ``max_false_positive_rate``, and of the lowest threshold that keeps to
        it: ``threshold`` (``--decision-threshold``), ``false_positive_rate``, ``recall``,
        ``precision`` (NaN where the class is given to no row). Left out are rates that take more
        rows than there are, and what no threshold up to 1 reaches.
    """
    if codes.ndim == 1 and len(classes) != 2:
        return {}
    found = {}
    for code, name in enumerate(classes):
        truth = codes[:, code] == 1 if codes.ndim == 2 else codes == code
        points = [_point(truth, probs[:, code], rate) for rate in RATES]
        found[name] = [point for point in points if point is not None]
    return {name: points for name, points in found.items() if points}


def _point(
    truth: NDArray[np.bool_], probs: NDArray[np.float64], rate: float
) -> dict[str, float] | None:
    others = np.sort(probs[~truth])[::-1]
    allowed = int(rate * len(others) + 1e-9)
    if not allowed or not truth.any():
        return None
    refused = float(others[allowed])
    threshold = _between(refused, float(probs[probs > refused].min(initial=1.0)))
    given = probs >= threshold
    if (given & ~truth).sum() > allowed:  # probabilities of 1
        return None
    right = int((given & truth).sum())
    return {
        "max_false_positive_rate": rate,
        "threshold": threshold,
        "false_positive_rate": float(given[~truth].mean()),
        "recall": right / int(truth.sum()),
        "precision": right / int(given.sum()) if given.any() else float("nan"),
    }


def _between(low: float, high: float) -> float:
    """The middle, above *low* and at most *high*, in no more digits than that takes."""
    middle = (low + high) / 2
    short = (round(middle, digits) for digits in range(2, 17))
    return next((number for number in short if low < number <= high), high)
