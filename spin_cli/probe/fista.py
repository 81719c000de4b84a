"""FISTA on a working set too large for a Hessian."""

from __future__ import annotations

import numpy as np

from spin_cli.probe.columns import Columns
from spin_cli.probe.problem import F64, Problem, centre, violation


def fista(
    problem: Problem,
    columns: Columns,
    W: F64,
    b: F64,
    l1: float,
    l2: float,
    tol: float,
    max_iter: int,
) -> tuple[F64, F64, int]:
    """Minimise over the columns held, in X's dtype.

    Parameters
    ----------
    W, b : (K, d), (K,), where to start
    tol : largest violation accepted, absolute

    Returns
    -------
    W, b, and the number of steps.

    Notes
    -----
    Beck & Teboulle (2009) with the gradient-based restart of O'Donoghue & Candès (2015). The step
    is 1/L with L = ‖diag(√w) [1 X]‖² times the largest curvature of the loss, 1/4 for the sigmoid
    and 1/2 for the softmax, plus l2.
    """
    held = np.flatnonzero(columns.number_of >= 0)
    numbers = columns.number_of[held]
    U = np.zeros((problem.K, columns.count))
    U[:, 0] = b
    U[:, numbers] = W[:, held]
    step = 1.0 / (_lipschitz(problem, columns) + l2)
    V, t, used = U, 1.0, 0
    for used in range(1, max_iter + 1):
        R = problem.residual(columns.times(V).T.astype(np.float64))
        G = columns.products(R.T).astype(np.float64)
        G[:, 1:] += l2 * V[:, 1:]
        worst = np.abs(G[:, 0]).max()
        if used % 5 == 1:
            worst = max(worst, violation(V[:, 1:], G[:, 1:], l1).max(initial=0.0))
            if worst <= tol:
                U = V
                break
        new = V - step * G
        new[:, 1:] -= np.clip(new[:, 1:], -step * l1, step * l1)
        moved = new - U
        if float(((V - new) * moved).sum()) > 0.0:
            t = 1.0
        if problem.K > 1 and l2 == 0.0 and used % 10 == 0:
            new[:, 1:] = centre(new[:, 1:])
            moved, t = new - U, 1.0
        t_new = 0.5 * (1.0 + (1.0 + 4.0 * t * t) ** 0.5)
        V = new + ((t - 1.0) / t_new) * moved
        U, t = new, t_new
    W = np.zeros_like(W)
    W[:, held] = U[:, numbers]
    return W, U[:, 0].copy(), used


def _lipschitz(problem: Problem, columns: Columns) -> float:
    """Power iteration from a fixed start, with a margin."""
    dtype = problem.X.dtype
    v = np.ones((1, columns.count), dtype)
    weight = problem.weight.astype(dtype)
    norm = 1.0
    for _ in range(30):
        v = columns.products(weight * columns.times(v))
        norm = float(np.linalg.norm(v.astype(np.float64)))
        if norm == 0.0:
            return 1.0
        v /= dtype.type(norm)
    return 1.1 * norm * (0.25 if problem.K == 1 else 0.5)
