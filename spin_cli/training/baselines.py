"""What a head has to beat: the usual ways, on the same splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ROWS, MAX_TERMS = 300_000, 300_000
STRENGTHS = (1.0, 3.0, 10.0, 30.0)
"""scikit-learn's C, tried on validation rows."""


def by_words(
    texts: Sequence[str],
    codes: NDArray[np.int64],
    train: NDArray[np.intp],
    other: NDArray[np.intp],
    n_classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> NDArray[np.float64]:
    """Class probabilities by logistic regression on word 1- and 2-grams.

    With any number of labels (*codes* (N, L)), by one for each label.

    Parameters
    ----------
    train : rows from which vocabulary and weights come
    other : rows to judge, M
    strengths : scikit-learn's C

    Returns
    -------
    (S, M, n_classes), for each strength

    Raises
    ------
    ValueError
        No text of *train* has a word.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's, where a fit is a little short of its optimum.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=MAX_TERMS, dtype=np.float64
    )
    X = words.fit_transform([texts[row] for row in train])
    Z = words.transform([texts[row] for row in other])
    y = codes[train]
    if y.ndim == 1:
        return _logistic(X, y, n_classes, strengths, Z)
    each = [_logistic(X, column, 2, strengths, Z)[:, :, 1] for column in y.T]
    return np.stack(each, 2)


def _logistic(
    X: Any, y: NDArray[np.int64], n_classes: int, strengths: Sequence[float], Z: Any
) -> NDArray[np.float64]:
    """Class probabilities of other rows Z; where all of *y* is one class, of that one."""
    from sklearn.linear_model import LogisticRegression

    probs = np.zeros((len(strengths), Z.shape[0], n_classes))
    if (y == y[0]).all():
        probs[:, :, y[0]] = 1.0
        return probs
    for found, C in zip(probs, strengths, strict=True):
        model = LogisticRegression(C=C, max_iter=300)
        model.fit(X, y)
        found[:, model.classes_] = model.predict_proba(Z)
    return probs
