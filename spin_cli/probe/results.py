"""What the solver hands back, and what can be computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.metrics import probabilities
from spin_cli.probe.standard import Standardised


class ConvergenceWarning(UserWarning):
    """A fit stopped before its tolerance was reached; `Fit.converged` is False."""


@dataclass(frozen=True)
class Fit:
    """One optimum of the penalised logistic loss (see `fit`)."""

    coef: NDArray[np.floating[Any]]
    """(K, d), float32 (float64 where X was float64), on the columns given to the solver.
    K = 1 for two classes, positive for class 1; else K = number of classes, or of labels."""
    intercept: NDArray[np.float64]
    """(K,)"""
    C: float
    """scikit-learn's C: 1 / (l1 + l2), its ``l1_ratio`` being l1 / (l1 + l2)."""
    objective: float
    """Sum of weighted losses plus penalties, in float64."""
    kkt: float
    """Largest violation of the optimality conditions, divided by `lambda_max`; float64."""
    iterations: int
    """Newton, FISTA or L-BFGS steps."""
    converged: bool
    """Whether ``kkt`` reached the tolerance."""
    multi_class: str = "multinomial"
    """``multinomial``, ``ovr`` or ``labels``: how probabilities come from the logits for K > 1."""

    def logits(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (N, K) of rows ``X`` (N, d) that were standardised like the training rows."""
        # All columns, though many count for nothing: to gather the others takes longer.
        z = X @ self.coef.T
        return np.asarray(z.astype(np.float64) + self.intercept)


@dataclass(frozen=True)
class Path:
    """Fits from sparse to dense, with their validation scores."""

    fits: tuple[Fit, ...]
    scores: tuple[float, ...]
    best: int
    """Index of the highest score; of equal ones the sparsest."""


def predict_proba(fit: Fit, X: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """Class probabilities (N, n_classes) of standardised rows ``X`` (N, d).

    Labels: the sigmoids. Two classes: the sigmoid; more: the softmax, or for one-versus-rest the
    sigmoids divided by their sum.
    """
    return probabilities(fit.logits(X), n_classes, fit.multi_class)


def fold_back(
    fit: Fit, standardised: Standardised
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Weights and intercept for raw features.

    With x the raw and s = (x - mean) / scale the standardised features, w·s + b equals
    (w / scale)·x + (b - Σ w mean / scale).

    Returns
    -------
    coef : (K, d) float32, zero for dropped columns
    intercept : (K,) float64
        Computed from the rounded weights, so that a large mean does not blow their rounding up.
    """
    coef = np.zeros((fit.coef.shape[0], len(standardised.mean)), np.float32)
    kept = standardised.kept
    coef[:, kept] = fit.coef.astype(np.float64) / standardised.scale[kept]
    intercept = fit.intercept - coef.astype(np.float64) @ standardised.mean
    return coef, intercept
