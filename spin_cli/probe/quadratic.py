"""The inner problem: a quadratic with an l1 penalty, small enough for dense algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from spin_cli.probe.interior import solve_interior
from spin_cli.probe.problem import centre

Array = NDArray[Any]

FISTA_CHUNK = 15
"""FISTA steps that settle the signs before a solve with fixed signs is tried."""


def solve_quadratic(
    H: Array,
    g: Array,
    penalty: Array,
    start: Array,
    tol: float,
    flat: NDArray[np.intp] | None = None,
    max_rounds: int = 20,
) -> Array:
    """Minimise ``½ (u-s)ᵀH(u-s) + gᵀ(u-s) + Σ_j penalty_j |u_j|`` with s = ``start``.

    Parameters
    ----------
    H : (m, m), symmetric, positive semi-definite
    g, penalty, start : (m,), of H's dtype
    tol : largest violation of the optimality conditions accepted
    flat : (K, G), indices of variables such that the same number added to each of a column changes
        nothing but the penalty (see `centre`)

    Notes
    -----
    A few steps of FISTA with restart (Beck & Teboulle 2009, O'Donoghue & Candès 2015) find the
    signs where columns are not much alike; with the signs known, what is left is a linear system
    (feature-sign search, Lee et al. 2007). Else `solve_interior` finds them.
    """
    if not penalty.any():
        return _solve_free(H, g, start)
    step = 1.0 / _largest_eigenvalue(H)
    u = best = start
    least, value, stalled = np.inf, float(penalty @ np.abs(start)), 0
    for turn in range(max_rounds):
        inside = solve_interior(H, g, penalty, start, tol) if turn == 1 else None
        if inside is None:
            new = _fista(H, g, penalty, start, u, step, FISTA_CHUNK)
        else:
            new = inside.astype(u.dtype)
        if flat is not None:
            new[flat] = centre(new[flat])
        new, gradient, new_value = _polish(H, g, penalty, start, new)
        if not new_value <= value + abs(value) * 1e-3:
            step *= 0.5  # the eigenvalue was underestimated, and FISTA ran away
            continue
        u, value = new, new_value
        worst = float(_violation(u, gradient, penalty).max())
        stalled = 0 if worst < 0.9 * least else stalled + 1
        if worst < least:
            least, best = worst, u
        if worst <= tol or stalled > 2:  # rounding decides from here on: the caller takes over
            break
    return best


def _violation(u: Array, gradient: Array, penalty: Array) -> Array:
    at_zero = np.maximum(np.abs(gradient) - penalty, 0.0)
    return np.asarray(np.where(u != 0, np.abs(gradient + penalty * np.sign(u)), at_zero))


def _largest_eigenvalue(H: Array, steps: int = 8) -> float:
    """Power iteration from a fixed start plus a margin, never over the Frobenius norm."""
    flat = H.ravel()
    bound = float(np.sqrt(flat @ flat))
    v = np.random.default_rng(0).standard_normal(len(H), np.float32).astype(H.dtype)
    v /= np.sqrt(v @ v)
    norm = 0.0
    for _ in range(steps):
        v = H @ v
        norm = float(np.sqrt(v @ v))
        if norm == 0.0:
            return bound or 1.0
        v /= norm
    return min(1.2 * norm, bound) or 1.0


def _fista(
    H: Array, g: Array, penalty: Array, start: Array, u: Array, step: float, steps: int
) -> Array:
    threshold = penalty * H.dtype.type(step)
    v, t = u, 1.0
    for _ in range(steps):
        w = v - step * (H @ (v - start) + g)
        new = w - np.clip(w, -threshold, threshold)
        moved = new - u
        if float((v - new) @ moved) > 0.0:
            t = 1.0  # the momentum points uphill
        t_new = 0.5 * (1.0 + (1.0 + 4.0 * t * t) ** 0.5)
        v = new + ((t - 1.0) / t_new) * moved
        u, t = new, t_new
    return u


def _polish(
    H: Array, g: Array, penalty: Array, start: Array, u: Array, tries: int = 6
) -> tuple[Array, Array, float]:
    """Solve with the signs held; drop what crosses zero; keep each step that is downhill.

    Returns
    -------
    u, and the gradient and the value of the quadratic there.
    """
    move = H @ (u - start)
    value = float((u - start) @ (0.5 * move + g) + penalty @ np.abs(u))
    for _ in range(tries):
        sign = np.sign(u)
        free = np.flatnonzero((u != 0) | (penalty == 0))
        if len(free) == 0:
            break
        right = -(move + g + penalty * sign)[free]
        step = _solve(H if len(free) == len(H) else H[np.ix_(free, free)], right)
        if step is None:
            break
        full = np.zeros_like(u)
        full[free] = step
        for t in _lengths(u, full, penalty):
            trial = u + t * full
            crossed = (trial * sign <= 0) & (u != 0) & (penalty > 0)
            trial[crossed] = 0
            trial_move = H @ (trial - start)
            trial_value = float((trial - start) @ (0.5 * trial_move + g) + penalty @ np.abs(trial))
            if trial_value < value:
                break
        else:
            break
        u, move, value = trial, trial_move, trial_value
        if t == 1.0 and not crossed.any():
            break
    return u, move + g, value


def _lengths(u: Array, step: Array, penalty: Array) -> tuple[float, ...]:
    """Step lengths to try; up to the first change of sign, the last one, the way is downhill."""
    crossing = (u * (u + step) < 0) & (penalty > 0)
    if not crossing.any():
        return (1.0,)
    first = float((-u[crossing] / step[crossing]).min())
    # A little further, so that rounding does not leave it short of zero.
    return 1.0, 0.5, 0.25, min(1.0, first * (1 + 8 * float(np.finfo(u.dtype).eps)))


def _solve(H: Array, right: Array) -> Array | None:
    """``H⁻¹ right``; None where H is too close to singular for its dtype."""
    try:
        factor = cho_factor(H, lower=True, check_finite=False)
    except LinAlgError:
        return None
    out = np.asarray(cho_solve(factor, right, check_finite=False))
    return out if np.isfinite(out).all() else None


def _solve_free(H: Array, g: Array, start: Array) -> Array:
    """Minimise without a penalty; where H is singular, the smallest ridge that mends it."""
    ridge = 0.0
    unit = float(np.trace(H)) / len(H) * float(np.finfo(H.dtype).eps)
    for _ in range(12):
        step = _solve(H + ridge * np.eye(len(H), dtype=H.dtype) if ridge else H, -g)
        if step is not None:
            return np.asarray(start + step)
        ridge = max(unit, 10.0 * ridge)
    return start
