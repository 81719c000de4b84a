"""The problem without an l1 penalty, by L-BFGS, with the matrix XᵀX as a map of its slopes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.optimize import minimize

from spin_cli.probe.problem import F64, Problem

Array = NDArray[Any]
GRAM_ROWS = 2048


class Gram:
    """``Xᵀ diag(w) X`` of one matrix: made when it is first asked for, kept for the next fits.

    So is its last factor: a solve asks for the same one two or three times.
    """

    def __init__(self) -> None:
        self._weight: F64 | None = None
        self._matrix: Array | None = None
        self._factor: tuple[tuple[float, float], Array] | None = None

    def known(self, weight: F64) -> bool:
        """Whether it is there for these weights of rows."""
        return self._weight is not None and np.array_equal(self._weight, weight)

    def matrix(self, problem: Problem) -> Array:
        """(d, d), in X's dtype."""
        if self._matrix is None or not self.known(problem.weight):
            X, d = problem.X, problem.X.shape[1]
            root = np.sqrt(problem.weight).astype(X.dtype)
            out = np.zeros((d, d), X.dtype)
            for start in range(0, X.shape[0], GRAM_ROWS):
                rows = slice(start, min(start + GRAM_ROWS, X.shape[0]))
                part = X[rows] * root[rows, None]
                out += part.T @ part
            self._matrix, self._weight, self._factor = out, problem.weight, None
        return self._matrix

    def factor(self, problem: Problem, l2: float) -> Array | None:
        """L (d, d) with ``L Lᵀ = c XᵀWX + l2 I``; None where rounding leaves it without one.

        c is the mean curvature of the loss at zero weights, so that this is close to the Hessian of
        each class.
        """
        matrix = self.matrix(problem)
        P = problem.probs(problem.null_intercept()[None, :])
        curvature = float((P * (1.0 - P)).mean())
        if self._factor is not None and self._factor[0] == (curvature, l2):
            return self._factor[1]
        self._factor = None  # before the next is made: each is as large as the matrix
        M = matrix * problem.X.dtype.type(curvature)
        M.flat[:: len(M) + 1] += l2
        try:
            L = np.asarray(cholesky(M, lower=True, overwrite_a=True, check_finite=False))
        except LinAlgError:
            return None
        self._factor = (curvature, l2), L
        return L


def minimise_smooth(
    problem: Problem,
    W: F64,
    b: F64,
    l2: float,
    tol: float,
    max_iter: int,
    factor: Array | None = None,
) -> tuple[F64, F64, int]:
    """Minimise ``f + l2/2 ‖W‖²`` by L-BFGS, with products in X's dtype and the rest in float64.

    Parameters
    ----------
    W, b : (K, d), (K,), where to start
    tol : largest entry of the gradient accepted, absolute
    factor : of `Gram.factor`. Steps are then taken in ``V = W L``, in which all directions are
        about equally steep, and a tenth of them will do.

    Returns
    -------
    W, b, and the number of steps.
    """
    K, d = W.shape
    total = float(problem.weight.sum())
    # Unscaled, an objective per unit of weight keeps L-BFGS's first step in bounds (as in
    # scikit-learn); scaled, the objective itself has curvatures of about one.
    unit = total if factor is None else 1.0
    stretch = 1.0 if factor is None else 0.5 * total**0.5
    worst = np.inf

    def back(V: F64) -> F64:
        if factor is None:
            return V
        right = V.T.astype(factor.dtype)
        solved = solve_triangular(factor, right, lower=True, trans="T", check_finite=False)
        return np.asarray(solved.T, np.float64)

    def value_and_gradient(u: F64) -> tuple[float, F64]:
        nonlocal worst
        V = back(u[: K * d].reshape(K, d))
        R = problem.residual(z := problem.logits(V, u[K * d :] / stretch))
        G, g = problem.gradient(R) + l2 * V, R.sum(0)
        worst = max(float(np.abs(G).max()), float(np.abs(g).max()))
        value = problem.loss(z) + 0.5 * l2 * float((V * V).sum())
        if factor is not None:
            right = G.T.astype(factor.dtype)
            G = np.asarray(solve_triangular(factor, right, lower=True, check_finite=False).T)
        return value / unit, np.concatenate([G.ravel(), g / stretch]).astype(np.float64) / unit

    def look(_: F64) -> None:
        if worst <= 0.5 * tol:  # of the gradient for W, whatever the scale of the steps
            raise StopIteration

    start = W if factor is None else W @ factor
    out = minimize(
        value_and_gradient,
        np.concatenate([start.ravel(), b * stretch]),
        jac=True,
        method="L-BFGS-B",
        callback=look,
        options={
            "maxiter": max_iter,
            "maxfun": 2 * max_iter,
            "gtol": 0.0,
            "ftol": 1e-15,
            "maxcor": 20,
        },
    )
    return back(out.x[: K * d].reshape(K, d)), out.x[K * d :] / stretch, int(out.nit)
