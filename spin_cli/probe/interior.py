"""The inner problem by an interior-point method, for matrices whose columns are much alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

Array = NDArray[Any]
F64 = NDArray[np.float64]

MAX_STEPS = 40
INWARDS = 0.99
"""Share of the way to the boundary that a step may go."""
SETTLED = 1e-3
"""Complementarity, as a share of the accepted violation, at which it is clear what is zero."""


def solve_interior(H: Array, g: Array, penalty: Array, start: Array, tol: float) -> F64 | None:
    """Minimise ``½ (u-s)ᵀH(u-s) + gᵀ(u-s) + Σ_j penalty_j |u_j|`` with s = ``start``.

    Parameters
    ----------
    H : (m, m), symmetric, positive semi-definite
    g, penalty, start : (m,); the penalty may be zero for some, not for all
    tol : largest violation of the optimality conditions accepted

    Returns
    -------
    (m,) float64
        Weights that the optimum has at zero are exactly zero; None where H is not positive
        semi-definite.

    Notes
    -----
    Mehrotra's predictor and corrector (1992) on ``u = p - n`` with p, n > 0. The distances of the
    slopes to the penalty, ``zp = penalty + slope`` and ``zn = penalty - slope``, are their
    multipliers, which leaves one system in ``H + diag(1/d)``, ``d = p/zp + n/zn``, for a step. Six
    to fifteen steps will do however alike the columns are, where methods that go from sign to sign
    take hundreds.
    """
    H = H.astype(np.float64, copy=False)
    g, penalty, start = (np.asarray(a, np.float64) for a in (g, penalty, start))
    held, free = np.flatnonzero(penalty), np.flatnonzero(penalty == 0)
    lam, u = penalty[held], start.copy()
    room = np.empty_like(
        H, order="F"
    )  # for every step's factor: a new one would lie beside the old
    unit = float(np.abs(u[held]).mean()) or 1.0
    x = np.concatenate([np.maximum(u[held], 0.0), np.maximum(-u[held], 0.0)]) + unit
    z = np.maximum(_twice(lam, g[held]), 0.1 * np.tile(lam, 2))
    for _ in range(MAX_STEPS):
        slope = H @ (u - start) + g
        short = _twice(lam, slope[held]) - z
        mean = float(x @ z) / len(x)
        worst = max(float(np.abs(short).max()), float(np.abs(slope[free]).max(initial=0.0)))
        if worst <= 0.3 * tol and mean <= SETTLED * tol * unit:
            break
        d = (x / z).reshape(2, -1).sum(0)
        np.copyto(room, H.T)  # H is symmetric, and so both are read along their rows
        room[held, held] += 1.0 / d
        try:
            factor = cho_factor(room, lower=True, overwrite_a=True, check_finite=False)[0]
        except LinAlgError:
            return None
        state = H, factor, slope, held, d, x, z, short
        _, dx, dz = _step(state, -x * z)
        t = _length(x, z, dx, dz)
        centring = (float((x + t * dx) @ (z + t * dz)) / len(x) / mean) ** 3
        du, dx, dz = _step(state, centring * mean - x * z - dx * dz)
        t = _length(x, z, dx, dz)
        u, x, z = u + t * du, x + t * dx, z + t * dz
    p, n = (x < z / np.tile(lam, 2) * unit).reshape(2, -1)
    u[held[p & n]] = 0.0
    return u if np.isfinite(u).all() else None


def _twice(lam: F64, slope: F64) -> F64:
    """How far each slope is from the penalty on either side."""
    return np.concatenate([lam + slope, lam - slope])


def _step(state: tuple[Any, ...], aim: F64) -> tuple[F64, F64, F64]:
    """The changes of u, x and z that change the products ``x z`` by ``aim``, to first order."""
    H, factor, slope, held, d, x, z, short = state
    up, down = ((aim - x * short) / z).reshape(2, -1)
    right = -slope
    right[held] = (up - down) / d
    du = cho_solve((factor, True), right, check_finite=False)
    turn = (H @ du)[held]
    dz = np.concatenate([turn, -turn]) + short
    return du, (aim - x * dz) / z, dz


def _length(x: F64, z: F64, dx: F64, dz: F64) -> float:
    """The longest step, of one at most, that keeps x and z positive."""
    v, dv = np.concatenate([x, z]), np.concatenate([dx, dz])
    falling = dv < 0
    return min(1.0, INWARDS * float((-v[falling] / dv[falling]).min(initial=np.inf)))
