"""One fit: the objective, its checks, and the choice of the right method."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.errors import DataError
from spin_cli.probe.blocks import Blocks, Remote, column_major
from spin_cli.probe.labels import (
    CERTAIN,
    balanced_label_weights,
    check_labels,
    columns_of,
    fit_ridge,
)
from spin_cli.probe.problem import F64, Problem, violation
from spin_cli.probe.results import ConvergenceWarning, Fit
from spin_cli.probe.smooth import Gram
from spin_cli.probe.solver import Solver
from spin_cli.probe.threads import one_blas_thread

DEFAULT_TOL = 1e-5
DEFAULT_MAX_ITER = 2000


def fit(
    X: NDArray[Any],
    y: NDArray[Any],
    n_classes: int,
    *,
    l1: float,
    l2: float = 0.0,
    sample_weight: NDArray[Any] | None = None,
    multi_class: str = "multinomial",
    init: Fit | None = None,
    gram: Gram | None = None,
    tol: float = DEFAULT_TOL,
    max_iter: int = DEFAULT_MAX_ITER,
    warn: bool = True,
) -> Fit:
    """Minimise ``Σ_i w_i loss_i(W, b) + l1 ‖W‖₁ + l2/2 ‖W‖₂²`` over W and b.

    The loss is the logistic one for two classes and the softmax cross-entropy for more, or one
    logistic loss per class for ``ovr``, or per label for an indicator. The intercept b is not
    penalised. ``l1 = 1/C`` gives scikit-learn's objective with ``l1_ratio=1``, ``l2 = 1/C`` that
    with ``l1_ratio=0``.

    Parameters
    ----------
    X : (N, d), float32 or float64
        Columns of comparable scale (see `standardise`). float32 is solved in float32 with sums and
        the final certificate in float64; float64 in float64 throughout.
    y : (N,), integers from 0 to n_classes - 1; or (N, n_classes), 1 where a label applies
    l1, l2 : not negative, not both zero
    sample_weight : (N,), not negative; None: ones; for an indicator (N, n_classes) too
    init : where to start, a fit on the same columns and classes
    gram : handed to each of several ridge fits to the same X, it spares all but the first a product
    tol : largest violation of the optimality conditions accepted, relative to `lambda_max`
    max_iter : steps allowed (each of Newton, FISTA or L-BFGS)
    warn : where ``tol`` is not reached. A warning cannot be caught on a thread: the filters are the
        whole process's

    Raises
    ------
    DataError
        Where shapes, labels or weights do not fit.

    Warns
    -----
    ConvergenceWarning
        Where ``tol`` was not reached, unless *warn* is False; `Fit.converged` is False then.

    Notes
    -----
    Classes without a (weighted) row get weights of zero and a probability of next to nothing.
    """
    if l1 < 0 or l2 < 0 or l1 + l2 <= 0:
        raise ValueError(f"penalties l1={l1}, l2={l2}: not negative and not both zero")
    if np.ndim(y) == 2:
        return _fit_labels(X, y, l1, l2, sample_weight, init, tol, max_iter, warn)
    X, y, weight = check_data(X, y, n_classes, sample_weight)
    if n_classes > 2 and multi_class == "ovr":
        parts = [
            fit(
                X, (y == k).astype(np.intp), 2, l1=l1, l2=l2, sample_weight=weight,
                init=_class_of(init, k), gram=gram, tol=tol, max_iter=max_iter, warn=warn,
            )
            for k in range(n_classes)
        ]  # fmt: skip
        return stack(parts)
    only = only_class(y, weight)
    if only is not None:
        return constant(X, only, n_classes, l1 + l2)
    problem = make_problem(X, y, n_classes, weight)
    W, b = (None, None) if init is None else (init.coef, init.intercept)
    with one_blas_thread():
        solver = Solver(problem, W, b, gram)
        if init is None and l1 > 0.0:
            _approach(solver, l1, l2, max_iter)
        # Half: what the certificate in float64 finds may be a little more.
        solver.solve(l1, l2, 0.5 * tol, max_iter)
        return certify(problem, solver.W, solver.b, l1, l2, solver.iterations, tol, warn)


def _fit_labels(
    X: NDArray[Any],
    Y: NDArray[Any],
    l1: float,
    l2: float,
    sample_weight: NDArray[Any] | None,
    init: Fit | None,
    tol: float,
    max_iter: int,
    warn: bool,
) -> Fit:
    Y, weight = check_labels(X, Y, sample_weight)
    X = check_data(X, Y[:, 0], 2, None)[0]
    if l1 == 0.0 and not isinstance(X, Blocks):
        return fit_ridge(X, Y, weight, l2, init, tol, max_iter, warn)
    parts = [
        fit(
            X, y, 2, l1=l1, l2=l2, sample_weight=weight[:, k], init=_class_of(init, k), tol=tol,
            max_iter=max_iter, warn=warn,
        )
        for k, y in enumerate(columns_of(Y, 0))
    ]  # fmt: skip
    return stack(parts, "labels")


def _approach(solver: Solver, l1: float, l2: float, max_iter: int) -> None:
    """Halve the penalty from `lambda_max` down to near ``l1``, solving each roughly.

    From all zero, nearly every weight violates a small penalty; on the way down only those that
    will count ever join the working set.
    """
    penalty = 0.5 * solver.lambda_max
    while penalty > 1.5 * l1:
        solver.solve(penalty, l2, 0.1 * penalty / solver.lambda_max, max_iter)
        penalty *= 0.5


def certify(
    problem: Problem,
    W: F64,
    b: F64,
    l1: float,
    l2: float,
    iterations: int,
    tol: float,
    warn: bool = True,
) -> Fit:
    """Round the weights to X's dtype and state in float64 how good they are."""
    coef = W.astype(problem.X.dtype)
    exact = coef.astype(np.float64)
    if problem.K > 1:
        b = b - b.mean()  # any shift gives the same probabilities
    z = problem.logits(coef, b, exact=True)
    R = problem.residual(z)
    gradient = problem.gradient(R, exact=True) + l2 * exact
    worst = float(violation(exact, gradient, l1).max(initial=0.0))
    worst = max(worst, float(np.abs(R.sum(0)).max()))
    top = problem.lambda_max()
    kkt = worst / top if top > 0 else 0.0
    penalty = l1 * np.abs(exact).sum() + 0.5 * l2 * (exact * exact).sum()
    converged = bool(kkt <= tol)
    if warn and not converged:
        warnings.warn(
            f"the probe stopped at a violation of {kkt:.1e}, above the tolerance {tol:.1e}, "
            f"after {iterations} steps (l1={l1:g}, l2={l2:g})",
            ConvergenceWarning,
            stacklevel=4,
        )
    objective = problem.loss(z) + float(penalty)
    return Fit(coef, b, 1.0 / (l1 + l2), objective, kkt, iterations, converged)


def lambda_max(
    X: NDArray[Any], y: NDArray[Any], n_classes: int, sample_weight: NDArray[Any] | None = None
) -> float:
    """The smallest l1 penalty at which all weights are zero: ``max |Xᵀ w (p₀ - y)|``."""
    if np.ndim(y) == 2:
        Y, weight = check_labels(X, y, sample_weight)
        each = enumerate(columns_of(Y, 0))
        return max(lambda_max(X, column, 2, weight[:, k]) for k, column in each)
    X, y, weight = check_data(X, y, n_classes, sample_weight)
    if only_class(y, weight) is not None:
        return 0.0
    return make_problem(X, y, n_classes, weight).lambda_max()


def balanced_weights(y: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """Weights (N,) that give every class that occurs the same total; their sum is N.

    For an indicator (N, L), one for each row and label.
    """
    if y.ndim == 2:
        return balanced_label_weights(y)
    counts = np.bincount(y, minlength=n_classes)
    share = len(y) / (max(1, int((counts > 0).sum())) * np.maximum(counts, 1))
    return np.asarray(share[y], np.float64)


def check_data(
    X: NDArray[Any], y: NDArray[Any], n_classes: int, sample_weight: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[np.intp], F64]:
    """Arrays of the right types, or a `DataError`."""
    if not isinstance(X, Blocks | Remote):
        if X.dtype not in (np.float32, np.float64):
            X = X.astype(np.float32)
        if not column_major(X):
            X = np.ascontiguousarray(X)
    y = np.asarray(y)
    if X.ndim != 2 or y.shape != (X.shape[0],) or len(y) == 0:
        raise DataError(f"features {X.shape} and labels {y.shape} do not belong together")
    y = y.astype(np.intp)
    if n_classes < 2 or y.min() < 0 or y.max() >= n_classes:
        raise DataError(f"labels from {y.min()} to {y.max()}; expected 0 to {n_classes - 1}")
    weight = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    if weight.shape != y.shape or not np.isfinite(weight).all() or (weight < 0).any():
        raise DataError("sample weights must be one finite number per row, none negative")
    return X, y, weight


def only_class(y: NDArray[np.intp], weight: F64) -> int | None:
    """The class that all rows of some weight belong to; None where there are several."""
    present = np.unique(y[weight > 0])
    if len(present) > 1:
        return None
    return int(present[0]) if len(present) else int(y[0])


def make_problem(X: Any, y: NDArray[np.intp], n_classes: int, weight: F64) -> Problem:
    """One column of logits for two classes, else one per class."""
    if n_classes == 2:
        return Problem(X, (y == 1).astype(np.float64)[:, None], weight)
    return Problem(X, np.eye(n_classes)[y], weight)


def stack(parts: list[Fit], multi_class: str = "ovr") -> Fit:
    """Binary fits of each class against the rest, or of each label, as one."""
    return Fit(
        np.concatenate([p.coef for p in parts]),
        np.concatenate([p.intercept for p in parts]),
        parts[0].C,
        sum(p.objective for p in parts),
        max(p.kkt for p in parts),
        sum(p.iterations for p in parts),
        all(p.converged for p in parts),
        multi_class,
    )


def _class_of(init: Fit | None, k: int) -> Fit | None:
    if init is None:
        return None
    return Fit(init.coef[k : k + 1], init.intercept[k : k + 1], init.C, 0.0, 0.0, 0, True)


def constant(X: NDArray[Any], label: int, n_classes: int, penalty: float) -> Fit:
    """The fit to rows that are all of one class."""
    rows = 1 if n_classes == 2 else n_classes
    intercept = np.full(rows, -CERTAIN)
    intercept[0 if n_classes == 2 else label] = CERTAIN if n_classes > 2 or label == 1 else -CERTAIN
    return Fit(np.zeros((rows, X.shape[1]), X.dtype), intercept, 1.0 / penalty, 0.0, 0.0, 0, True)
