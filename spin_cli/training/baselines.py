"""What a head has to beat: the usual ways, on the same splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics

MAX_ROWS, MAX_TERMS = 300_000, 300_000
STRENGTHS = (1.0, 3.0, 10.0, 30.0)
"""scikit-learn's C, tried on validation rows."""


def tfidf(
    texts: Sequence[str],
    codes: NDArray[np.int64],
    rows: dict[str, NDArray[np.intp]],
    n_classes: int,
) -> dict[str, NDArray[np.float64]]:
    """Class probabilities of val and test rows by logistic regression on word 1- and 2-grams.

    With any number of labels (*codes* (N, L)), by one for each label, all of the same C.

    C is chosen by log loss on val rows; vocabulary and weights come from train rows alone.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's, where a fit is a little short of its optimum.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=MAX_TERMS, dtype=np.float64
    )
    X = words.fit_transform([texts[row] for row in rows["train"]])
    other = {
        name: words.transform([texts[row] for row in rows[name]])
        for name in ("val", "test")
        if len(rows[name])
    }
    y = codes[rows["train"]]
    fitted = []
    for C in STRENGTHS:
        if y.ndim == 1:
            fitted.append(_logistic(X, y, n_classes, C, other))
            continue
        each = [_logistic(X, column, 2, C, other) for column in y.T]
        fitted.append({name: np.stack([one[name][:, 1] for one in each], 1) for name in other})
    return min(fitted, key=lambda probs: metrics.log_loss(codes[rows["val"]], probs["val"]))


def _logistic(
    X: Any, y: NDArray[np.int64], n_classes: int, C: float, other: dict[str, Any]
) -> dict[str, NDArray[np.float64]]:
    """Class probabilities of other rows; where all of *y* is one class, of that one."""
    from sklearn.linear_model import LogisticRegression

    probs = {name: np.zeros((Z.shape[0], n_classes)) for name, Z in other.items()}
    if (y == y[0]).all():
        for found in probs.values():
            found[:, y[0]] = 1.0
        return probs
    model = LogisticRegression(C=C, max_iter=300)
    model.fit(X, y)
    for name, Z in other.items():
        probs[name][:, model.classes_] = model.predict_proba(Z)
    return probs
