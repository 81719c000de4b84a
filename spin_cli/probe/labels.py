"""Any number of labels: one logistic regression for each, independent of the others.

The targets are an indicator (N, L) in place of codes (N,). Under an l1 penalty every label has a
solver of its own; under a ridge penalty alone L-BFGS does all of them in the same products with X.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.errors import DataError
from spin_cli.metrics import sigmoid
from spin_cli.probe.problem import F64, Problem
from spin_cli.probe.results import ConvergenceWarning, Fit
from spin_cli.probe.smooth import minimise_smooth
from spin_cli.probe.threads import one_blas_thread

CERTAIN = 30.0
"""Log odds of a label that applies to all rows, or to none."""


@dataclass(frozen=True)
class Labels(Problem):
    """``f(z) = Σ_i Σ_l w_il log(1 + exp(z_il)) - w_il y_il z_il``."""

    def probs(self, z: F64) -> F64:
        """Probabilities (N, L), each on its own."""
        return sigmoid(z)

    def residual(self, z: F64) -> F64:
        """``∂f/∂z`` (N, L)."""
        return np.asarray((sigmoid(z) - self.Y) * self.weight)

    def loss(self, z: F64) -> float:
        """``f(z)``."""
        losses = np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0.0) - self.Y * z
        return float((losses * self.weight).sum())

    def null_intercept(self) -> F64:
        """The log odds (L,) of the labels."""
        mass, total = (self.weight * self.Y).sum(0), self.weight.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            odds = np.log(mass) - np.log(total - mass)
        return np.asarray(np.clip(np.nan_to_num(odds, nan=-CERTAIN), -CERTAIN, CERTAIN))


def columns_of(y: NDArray[Any], n_classes: int, *, ovr: bool = False) -> list[NDArray[np.intp]]:
    """The 0-1 targets of each label, or of each class against the rest; else *y* by itself."""
    if y.ndim == 2:
        return [np.ascontiguousarray(y[:, k], np.intp) for k in range(y.shape[1])]
    return [(y == k).astype(np.intp) for k in range(n_classes)] if ovr else [y]


def check_labels(
    X: Any, Y: NDArray[Any], sample_weight: NDArray[Any] | None
) -> tuple[NDArray[Any], F64]:
    """Indicator and weights (N, L), or a `DataError`."""
    Y = np.asarray(Y)
    if Y.ndim != 2 or len(Y) != X.shape[0] or not Y.size or not np.isin(Y, (0, 1)).all():
        raise DataError(f"features {X.shape} and labels {Y.shape}; expected 0 or 1, a row each")
    weight = np.ones(len(Y)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    weight = weight[:, None] if weight.ndim == 1 else weight
    if len(weight) != len(Y) or not np.isfinite(weight).all() or (weight < 0).any():
        raise DataError("sample weights must be finite numbers, a row each, none negative")
    return Y, np.broadcast_to(weight, Y.shape)


def balanced_label_weights(Y: NDArray[Any]) -> F64:
    """Weights (N, L) by which, for each label, rows with and without it have the same total."""
    positive = np.asarray(Y > 0)
    share = np.where(positive, positive.sum(0), (~positive).sum(0))
    whole = positive.all(0) | ~positive.any(0)
    return np.asarray(np.where(whole, 1.0, len(Y) / (2.0 * np.maximum(share, 1))))


def fit_ridge(
    X: NDArray[Any], Y: NDArray[Any], weight: F64, l2: float, init: Fit | None, tol: float,
    max_iter: int, warn: bool,
) -> Fit:  # fmt: skip
    """All labels together, without an l1 penalty; arguments as of `fit`."""
    problem = Labels(X, Y.astype(np.float64), weight)
    top = problem.lambda_max()
    W, b, used = np.zeros((Y.shape[1], X.shape[1])), problem.null_intercept(), 0
    if init is not None and top > 0.0:
        W, b = init.coef.astype(np.float64), init.intercept
    with one_blas_thread():
        if top > 0.0:
            W, b, used = minimise_smooth(problem, W, b, l2, 0.5 * tol * top, max_iter)
        coef = W.astype(X.dtype)
        exact = coef.astype(np.float64)
        z = problem.logits(coef, b, exact=True)
        R = problem.residual(z)
        gradient = problem.gradient(R, exact=True) + l2 * exact
    worst = max(float(np.abs(gradient).max(initial=0.0)), float(np.abs(R.sum(0)).max()))
    kkt = worst / top if top > 0 else 0.0
    objective = problem.loss(z) + 0.5 * l2 * float((exact * exact).sum())
    if warn and kkt > tol:
        warnings.warn(
            f"the fit of {Y.shape[1]} labels stopped at a violation of {kkt:.1e}, above the"
            f" tolerance {tol:.1e}, after {used} steps (l2={l2:g})",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Fit(coef, b, 1.0 / l2, objective, kkt, used, kkt <= tol, "labels")
