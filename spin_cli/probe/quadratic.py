"""The inner problem: a quadratic with an l1 penalty, small enough for dense algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

Array = NDArray[Any]

FISTA_CHUNK = 30
"""FISTA steps that settle the signs before a solve with fixed signs is tried."""


def solve_quadratic(
    H: Array, c: Array, penalty: Array, u: Array, tol: float, max_rounds: int = 40
) -> Array:
    """Minimise ``½ uᵀHu + cᵀu + Σ_j penalty_j |u_j|``.

    Parameters
    ----------
    H : (m, m), symmetric, positive semi-definite
    c, penalty, u : (m,), of H's dtype; ``u`` is where to start
    tol : largest violation of the optimality conditions accepted

    Notes
    -----
    Two methods take turns. FISTA with restart (Beck & Teboulle 2009, O'Donoghue & Candès 2015)
    always makes progress and finds the signs; with the signs known, what is left is a linear
    system, and one Cholesky factor gives the optimum that FISTA would only creep up to
    (feature-sign search, Lee et al. 2007).
    """
    if not penalty.any():
        return _solve_free(H, c, u)
    step = 1.0 / _largest_eigenvalue(H)
    best_violation = np.inf
    best = u
    for _ in range(max_rounds):
        u = _fista(H, c, penalty, u, step, FISTA_CHUNK)
        u, gradient = _polish(H, c, penalty, u)
        worst = float(_violation(u, gradient, penalty).max())
        if worst < best_violation:
            best_violation, best = worst, u
        if worst <= tol:
            break
    return best


def _violation(u: Array, gradient: Array, penalty: Array) -> Array:
    at_zero = np.maximum(np.abs(gradient) - penalty, 0.0)
    return np.asarray(np.where(u != 0, np.abs(gradient + penalty * np.sign(u)), at_zero))


def _largest_eigenvalue(H: Array, steps: int = 8) -> float:
    """Power iteration from a fixed start plus a margin, never over the Frobenius norm."""
    flat = H.ravel()
    bound = float(np.sqrt(flat @ flat))
    v = np.ones(len(H), H.dtype)
    v[::2] *= 1.5
    v /= np.sqrt(v @ v)
    norm = 0.0
    for _ in range(steps):
        v = H @ v
        norm = float(np.sqrt(v @ v))
        if norm == 0.0:
            return bound or 1.0
        v /= norm
    return min(1.2 * norm, bound) or 1.0


def _fista(H: Array, c: Array, penalty: Array, u: Array, step: float, steps: int) -> Array:
    threshold = penalty * step
    v, t = u, 1.0
    for _ in range(steps):
        w = v - step * (H @ v + c)
        new = w - np.clip(w, -threshold, threshold)
        moved = new - u
        if float((v - new) @ moved) > 0.0:
            t = 1.0  # the momentum points uphill
        t_new = 0.5 * (1.0 + (1.0 + 4.0 * t * t) ** 0.5)
        v = new + ((t - 1.0) / t_new) * moved
        u, t = new, t_new
    return u


def _value(H: Array, c: Array, penalty: Array, u: Array) -> float:
    return float(u @ (0.5 * (H @ u) + c) + penalty @ np.abs(u))


def _polish(H: Array, c: Array, penalty: Array, u: Array, tries: int = 6) -> tuple[Array, Array]:
    """Solve with the signs held; drop what crosses zero; keep each step that is downhill."""
    value = _value(H, c, penalty, u)
    for _ in range(tries):
        free = np.flatnonzero((u != 0) | (penalty == 0))
        if len(free) == 0:
            break
        sign = np.sign(u[free])
        target = _newton_target(H[np.ix_(free, free)], -(c[free] + penalty[free] * sign))
        if target is None:
            break
        crossed = (target * sign < 0) & (penalty[free] > 0)
        target[crossed] = 0
        trial = np.zeros_like(u)
        trial[free] = target
        trial_value = _value(H, c, penalty, trial)
        if not trial_value < value:
            break
        u, value = trial, trial_value
        if not crossed.any():
            break
    return u, H @ u + c


def _newton_target(H: Array, right: Array) -> Array | None:
    """``H⁻¹ right``; None where H is too close to singular for its dtype."""
    try:
        factor = cho_factor(H, lower=True, check_finite=False)
    except LinAlgError:
        return None
    target = np.asarray(cho_solve(factor, right, check_finite=False))
    return target if np.isfinite(target).all() else None


def _solve_free(H: Array, c: Array, u: Array) -> Array:
    """Minimise without a penalty; where H is singular, the smallest ridge that mends it."""
    ridge = 0.0
    unit = float(np.trace(H)) / len(H) * float(np.finfo(H.dtype).eps)
    for _ in range(12):
        A = H + ridge * np.eye(len(H), dtype=H.dtype) if ridge else H
        target = _newton_target(A, -(c - ridge * u))
        if target is not None:
            return target
        ridge = max(unit, 10.0 * ridge)
    return u
