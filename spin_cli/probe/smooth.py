"""The problem without an l1 penalty, where the Hessian would be too large."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from spin_cli.probe.problem import F64, Array, Problem


@dataclass(frozen=True)
class Smooth:
    """A minimiser W (K, d), b (K,) and the number of L-BFGS steps."""

    W: F64
    b: F64
    iterations: int


def minimise_smooth(
    problem: Problem, l2: float, W: Array | None, b: F64 | None, tol: float, max_iter: int
) -> Smooth:
    """Minimise ``f + l2/2 ‖W‖²`` by L-BFGS with products in X's dtype and the rest in float64.

    Parameters
    ----------
    tol : largest gradient entry accepted, relative to `Problem.lambda_max`
    """
    K, d = problem.K, problem.X.shape[1]
    unit = max(problem.lambda_max(), np.finfo(np.float64).tiny)
    W = np.zeros((K, d)) if W is None else W.astype(np.float64)
    b = problem.null_intercept() if b is None else b
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
            "gtol": 0.5 * tol * unit / total,
            "ftol": 1e-15,
            "maxcor": 20,
        },
    )
    return Smooth(out.x[: K * d].reshape(K, d), out.x[K * d :], int(out.nit))
