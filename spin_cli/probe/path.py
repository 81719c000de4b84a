"""A path of fits from sparse to dense, and the choice of one on validation data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from spin_cli.probe.blocks import Remote
from spin_cli.probe.labels import check_labels, columns_of
from spin_cli.probe.logistic import (
    DEFAULT_MAX_ITER,
    DEFAULT_TOL,
    certify,
    check_data,
    constant,
    fit,
    make_problem,
    only_class,
    stack,
)
from spin_cli.probe.problem import F64
from spin_cli.probe.results import Fit, Path, predict_proba
from spin_cli.probe.solver import Solver
from spin_cli.probe.threads import one_blas_thread

LOOSE = 0.2
"""Violation, relative to the point's own l1, at which a point's validation score has settled."""

Score = Callable[[NDArray[Any], F64], float]


def fit_path(
    X_train: NDArray[Any],
    y_train: NDArray[Any],
    X_val: NDArray[Any],
    y_val: NDArray[Any],
    n_classes: int,
    *,
    score: Score,
    points: int = 30,
    ratio: float = 1e-3,
    l1_ratio: float = 1.0,
    sample_weight: NDArray[Any] | None = None,
    multi_class: str = "multinomial",
    tol: float = DEFAULT_TOL,
    max_iter: int = DEFAULT_MAX_ITER,
    patience: int = 3,
) -> Path:
    """Fit a falling sequence of penalties with warm starts, and choose by validation score.

    Parameters
    ----------
    X_train, y_train, n_classes, sample_weight, multi_class, tol, max_iter : see `fit`
        Labels share each penalty: the sum of their losses is what it weighs against.
    X_val, y_val : (M, d), (M,) or (M, n_classes), standardised with the training rows'
        moments; where ``X_train`` is `Remote`, ``X_val`` is as well
    score : of ``(y_val, probabilities (M, n_classes))``; higher is better
    points : most penalties to try, evenly spaced in their logarithm below `lambda_max`
    ratio : the smallest penalty as a share of `lambda_max`
    l1_ratio : share of l1 in the penalty, in [0, 1]; the rest is l2
    patience : leave the path once so many scores in a row were below the best

    Notes
    -----
    Points are solved until their validation score has settled (`LOOSE`), the chosen one to
    ``tol``: scores settle long before the set of weights that are not zero does. `Fit.converged`
    is about the tolerance that the point was solved to. Where `lambda_max` is 0, the path is one
    fit, with no weights.
    """
    X_train, y_train, weight = _checked(X_train, y_train, n_classes, sample_weight)
    targets = columns_of(y_train, n_classes)

    def judge(fit: Fit) -> float:
        return float(score(y_val, predict_proba(fit, X_val, n_classes)))

    with one_blas_thread():
        walk = None
        if any(only_class(target, weight) is None for target in targets):
            walk = _start(X_train, y_train, n_classes, weight, multi_class, tol, max_iter)
        if walk is None or walk.lambda_max == 0.0:  # no penalty but gives the same fit
            null = fit(
                X_train, y_train, n_classes, l1=1.0, sample_weight=weight, multi_class=multi_class
            )
            return Path((null,), (judge(null),), 0)
        # At a share under 0.1 the penalty at which all is zero runs off to infinity.
        top = walk.lambda_max / max(l1_ratio, 0.1)
        grid = np.geomspace(top, top * ratio, points + 1)[1:]
        walk.start(grid * l1_ratio)
        return _descend(walk, grid, l1_ratio, judge, patience)


def _checked(
    X: NDArray[Any], y: NDArray[Any], n_classes: int, sample_weight: NDArray[Any] | None
) -> tuple[NDArray[Any], NDArray[np.intp], F64]:
    """As `check_data`, for labels column by column."""
    if np.ndim(y) != 2:
        return check_data(X, y, n_classes, sample_weight)
    Y, _ = check_labels(X, y, sample_weight)
    X, _, weight = check_data(X, Y[:, 0], 2, sample_weight)
    return X, Y.astype(np.intp), weight


class Walk(Protocol):
    """What goes from penalty to penalty."""

    lambda_max: float
    """The largest of those of its problems; 0 where no column is correlated with any target."""

    def start(self, l1: F64) -> None:
        """Hear what is to come."""

    def step(self, l1: float, l2: float) -> Fit:
        """Loosely to the optimum for the next penalties."""

    def settle(self, fit: Fit, l1: float, l2: float) -> Fit:
        """To the tolerance, from a fit on the way."""


def _start(
    X: Any,
    y: NDArray[np.intp],
    n_classes: int,
    weight: F64,
    multi_class: str,
    tol: float,
    max_iter: int,
) -> Walk:
    if not isinstance(X, Remote):
        return _Walk(X, y, n_classes, weight, multi_class, tol, max_iter)
    from spin_cli.probe.walk_device import DeviceWalk  # torch takes a second to import

    return DeviceWalk(cast(Any, X), y, n_classes, weight, multi_class, tol, LOOSE)


def _descend(
    walk: Walk, grid: F64, l1_ratio: float, judge: Callable[[Fit], float], patience: int
) -> Path:
    fits: list[Fit] = []
    scores: list[float] = []
    for penalty in grid:
        l1 = float(penalty) * l1_ratio
        fits.append(walk.step(l1, float(penalty) - l1))
        scores.append(judge(fits[-1]))
        if scores[::-1].index(max(scores)) >= patience:
            break
    settled: set[int] = set()
    while (best := int(np.argmax(scores))) not in settled:
        # Settled, a fit may score a little lower than another: then that one is settled too.
        l1 = float(grid[best]) * l1_ratio
        fits[best] = walk.settle(fits[best], l1, float(grid[best]) - l1)
        scores[best] = judge(fits[best])
        settled.add(best)
    return Path(tuple(fits), tuple(scores), best)


class _Walk:
    """One solver, or one per class, that goes from penalty to penalty."""

    def __init__(
        self,
        X: NDArray[Any],
        y: NDArray[np.intp],
        n_classes: int,
        weight: F64,
        multi_class: str,
        tol: float,
        max_iter: int,
    ) -> None:
        self.tol, self.max_iter = tol, max_iter
        self.multi_class = "labels" if y.ndim == 2 else multi_class
        self.ovr = y.ndim == 2 or (n_classes > 2 and multi_class == "ovr")
        targets = columns_of(y, n_classes, ovr=self.ovr)
        classes = 2 if self.ovr else n_classes
        self.fixed = [only_class(target, weight) for target in targets]
        self.X = X
        self.solvers = [
            None if fixed is not None else Solver(make_problem(X, target, classes, weight))
            for target, fixed in zip(targets, self.fixed, strict=True)
        ]
        self.lambda_max = max(s.lambda_max for s in self.solvers if s is not None)

    def start(self, l1: F64) -> None:
        """Nothing: one penalty follows another."""

    def step(self, l1: float, l2: float) -> Fit:
        """Loosely to the optimum for the next penalties, from where the last one ended."""
        return self._join([self._one(i, l1, l2, None) for i in range(len(self.solvers))])

    def settle(self, fit: Fit, l1: float, l2: float) -> Fit:
        """To the tolerance, from a fit on the way."""
        return self._join([self._one(i, l1, l2, fit) for i in range(len(self.solvers))])

    def _join(self, parts: list[Fit]) -> Fit:
        return stack(parts, self.multi_class) if self.ovr else parts[0]

    def _one(self, i: int, l1: float, l2: float, start: Fit | None) -> Fit:
        solver = self.solvers[i]
        if solver is None:
            return constant(self.X, self.fixed[i] or 0, 2, l1 + l2)
        if start is None:
            # A ridge penalty says nothing about the size of gradients: a share of the largest.
            share = l1 / solver.lambda_max if l1 and solver.lambda_max else 0.01
            tol = max(LOOSE * share, self.tol)
            kkt = solver.solve(l1, l2, tol, self.max_iter)
            return solver.snapshot(l1, l2, kkt, tol)
        rows = slice(i, i + 1) if self.ovr else slice(None)
        solver.place(start.coef[rows], start.intercept[rows])
        solver.solve(l1, l2, 0.5 * self.tol, self.max_iter)
        return certify(solver.problem, solver.W, solver.b, l1, l2, solver.iterations, self.tol)
