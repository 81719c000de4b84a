"""The problem without an l1 penalty, where the Hessian would be too large."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from spin_cli.probe.problem import F64, Problem


def minimise_smooth(
    problem: Problem, W: F64, b: F64, l2: float, tol: float, max_iter: int
) -> tuple[F64, F64, int]:
    """Minimise ``f + l2/2 ‖W‖²`` by L-BFGS, with products in X's dtype and the rest in float64.

    Parameters
    ----------
    W, b : (K, d), (K,), where to start
    tol : largest entry of the gradient accepted, absolute

    Returns
    -------
    W, b, and the number of steps.
    """
    K, d = W.shape
    # As in scikit-learn: an objective per unit of weight keeps L-BFGS's first step in bounds.
    total = problem.weight.sum()

    def value_and_gradient(u: F64) -> tuple[float, F64]:
        V = u[: K * d].reshape(K, d)
        z = problem.logits(V, u[K * d :])
        R = problem.residual(z)
        G = problem.gradient(R) + l2 * V
        value = problem.loss(z) + 0.5 * l2 * float((V * V).sum())
        return value / total, np.concatenate([G.ravel(), R.sum(0)]) / total

    out = minimize(
        value_and_gradient,
        np.concatenate([W.ravel(), b]),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iter,
            "maxfun": 2 * max_iter,
            "gtol": 0.5 * tol / total,
            "ftol": 1e-15,
            "maxcor": 20,
        },
    )
    return out.x[: K * d].reshape(K, d), out.x[K * d :], int(out.nit)
