"""The paper's probe recipe (``--solver reference``), for comparison.

scikit-learn's saga with an l1 penalty at five values of C, each trained in 16 rounds of 4 epochs
that go on from one another; the state with the best validation score wins. Two defects of the
published code are mended: the winner is a copy rather than a reference to an estimator that goes
on training, and it is the best over all C rather than the C that finished last. Features are
expected to be standardised, which the published code left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.probe.logistic import certify, check_data, make_problem
from spin_cli.probe.problem import F64
from spin_cli.probe.results import Fit, Path, predict_proba

REFERENCE_C = (0.1, 0.2, 1.0, 10.0, 100.0)
ROUNDS = 16
EPOCHS = 4


def fit_reference(
    X_train: NDArray[Any],
    y_train: NDArray[Any],
    X_val: NDArray[Any],
    y_val: NDArray[Any],
    n_classes: int,
    *,
    score: Callable[[NDArray[Any], F64], float],
    seed: int = 0,
    grid: Sequence[float] = REFERENCE_C,
) -> Path:
    """Run the recipe on standardised features.

    Parameters
    ----------
    X_train, y_train, X_val, y_val, n_classes, score : as for `fit_path`
    seed : of saga's order of rows
    grid : values of C

    Returns
    -------
    Path
        One fit per C, the best of its rounds (the earliest of equal ones); `Path.best` is the best
        of them. Hardly any is converged, which `Fit.kkt` shows.

    Warns
    -----
    ConvergenceWarning
        scikit-learn's, of every round. Who does not want to see them has to set a filter before
        threads begin: filters are the whole process's.
    """
    X_train, y_train, weight = check_data(X_train, y_train, n_classes, None)
    problem = make_problem(X_train, y_train, n_classes, weight)
    fits: list[Fit] = []
    scores: list[float] = []
    for C in grid:
        W, b, epochs, best = _rounds(C, X_train, y_train, X_val, y_val, n_classes, score, seed)
        fits.append(certify(problem, W, b, 1.0 / C, 0.0, epochs, 1e-5, warn=False))
        scores.append(best)
    return Path(tuple(fits), tuple(scores), int(np.argmax(scores)))


def _rounds(
    C: float,
    X_train: NDArray[Any],
    y_train: NDArray[Any],
    X_val: NDArray[Any],
    y_val: NDArray[Any],
    n_classes: int,
    score: Callable[[NDArray[Any], F64], float],
    seed: int,
) -> tuple[F64, F64, int, float]:
    """The best of the rounds for one C: weights, intercept, epochs, score."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=C, l1_ratio=1, solver="saga", max_iter=EPOCHS, warm_start=True, random_state=seed
    )
    best: tuple[F64, F64, int, float] | None = None
    for round_ in range(1, ROUNDS + 1):
        model.fit(X_train, y_train)
        W, b = model.coef_.copy(), model.intercept_.astype(np.float64)
        here = Fit(W, b, C, 0.0, 0.0, round_ * EPOCHS, False)
        value = float(score(y_val, predict_proba(here, X_val, n_classes)))
        if best is None or value > best[3]:
            best = (W.astype(np.float64), b, round_ * EPOCHS, value)
    if best is None:
        raise AssertionError("no rounds")
    return best
