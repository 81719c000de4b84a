"""Logistic regression whose weights are not negative, for a few columns and any number of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls

from spin_cli import metrics

F64 = NDArray[np.float64]

MOST_STEPS, HALVINGS = 50, 30
MOST_TURNS = 30
"""For each column, of the least squares problem: ten times what scipy allows by itself."""
LEAST_CURVATURE = 1e-6
"""Of a row, in a Newton step: rows that are settled would leave it without a solution."""


def fit_nonnegative(
    X: F64, y: NDArray[np.int64], weight: F64, l2: float, tol: float = 1e-6
) -> tuple[F64, float]:
    """Minimise ``Σ w_i log(1 + exp(-s_i z_i)) + l2/2 ‖u‖²``, z = X u + b, for u >= 0.

    Parameters
    ----------
    X : (N, m), columns of comparable scale
    y : (N,), 0 or 1; s is -1 or 1
    weight : (N,), not negative
    l2 : above zero
    tol : largest violation of the optimality conditions accepted, a unit of weight

    Returns
    -------
    u (m,) and b

    Notes
    -----
    Newton's method. Each step is a least squares problem without negative weights (Lawson & Hanson
    1974) on the Cholesky factor of the Hessian, the intercept eliminated.
    """
    u, b = np.zeros(X.shape[1]), 0.0
    total = float(weight.sum())
    value = _objective(X @ u + b, y, weight, u, l2)
    for _ in range(MOST_STEPS):
        z = X @ u + b
        p = metrics.sigmoid(z)
        residual = weight * (p - y)
        slope = residual @ X + l2 * u
        wrong = np.where(u > 0, np.abs(slope), np.maximum(-slope, 0.0))
        if max(float(wrong.max(initial=0.0)), abs(float(residual.sum()))) <= tol * total:
            break
        v = np.maximum(weight * p * (1.0 - p), LEAST_CURVATURE * weight)
        to, at = _newton(X, residual, v, u, b, l2)
        t = 1.0
        for _ in range(HALVINGS):
            new_u, new_b = u + t * (to - u), b + t * (at - b)
            new = _objective(X @ new_u + new_b, y, weight, new_u, l2)
            if new <= value:
                break
            t *= 0.5
        else:
            break  # rounding decides from here on
        u, b, value = new_u, new_b, new
    return u, b


def logit_losses(z: F64, y: NDArray[np.int64]) -> F64:
    """``log(1 + exp(-s_i z_i))`` (N,) of each row."""
    return np.asarray(np.logaddexp(0.0, np.where(y == 1, -z, z)))


def _objective(z: F64, y: NDArray[np.int64], weight: F64, u: F64, l2: float) -> float:
    return float(weight @ logit_losses(z, y) + 0.5 * l2 * (u @ u))


def _newton(X: F64, residual: F64, v: F64, u: F64, b: float, l2: float) -> tuple[F64, float]:
    """The least of the quadratic model of the objective around u and b, for weights >= 0."""
    total = v.sum()
    if len(u) == 0:
        return u, float(b - residual.sum() / total)
    means = v @ X / total
    # With d = u' - u, the model is least at b' = b - (Σ residual)/Σv - means·d.
    H = (X.T * v) @ X - total * np.outer(means, means)
    H[np.diag_indices(len(u))] += l2
    shift = residual.sum()
    slope = residual @ X - shift * means + l2 * u
    # ½ u'ᵀHu' - (Hu - slope)ᵀu' = ½ ‖Lᵀu' - L⁻¹(Hu - slope)‖² + constant, H = L Lᵀ
    L = cholesky(H, lower=True, check_finite=False)
    right = solve_triangular(L, H @ u - slope, lower=True, check_finite=False)
    to = nnls(L.T, right, maxiter=MOST_TURNS * len(u))[0]
    return to, float(b - shift / total - means @ (to - u))
