"""The smooth part of the objective: the data, the logistic loss and its derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.metrics import sigmoid
from spin_cli.probe.blocks import PANEL, Remote, column_major, panels
from spin_cli.probe.standard import row_blocks

Array = NDArray[Any]
F64 = NDArray[np.float64]
COLUMN_BYTES = 8 * 2**20
"""Rows of a matrix that lies by column are multiplied in blocks of about this size."""
CORRELATED = 1e-3
"""Gradient at zero weights, as a share of ``Σ|residual|``, that is no rounding error in float32."""


@dataclass(frozen=True)
class Problem:
    """``f(z) = Σ_i w_i loss(y_i, z_i)`` with logits ``z = X Wᵀ + b``.

    K = 1: loss = log(1 + exp(z)) - y z.  K > 1: loss = log Σ_k exp(z_k) - z_y.
    """

    X: Any
    """(N, d), float32 or float64, C-contiguous or `column_major`; or `Blocks`, or `Remote`."""
    Y: F64
    """(N, K), one-hot; for K = 1 the indicator of class 1."""
    weight: F64
    """(N,), not negative."""

    @property
    def K(self) -> int:  # noqa: N802
        """Columns of logits."""
        return int(self.Y.shape[1])

    def probs(self, z: F64) -> F64:
        """Probabilities (N, K)."""
        if self.K == 1:
            return sigmoid(z)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return np.asarray(p)

    def residual(self, z: F64) -> F64:
        """``∂f/∂z`` (N, K)."""
        return np.asarray((self.probs(z) - self.Y) * self.weight[:, None])

    def loss(self, z: F64) -> float:
        """``f(z)``."""
        if self.K == 1:
            s = z[:, 0]
            # log(1 + exp(s)); numpy's logaddexp takes three times as long
            losses = np.log1p(np.exp(-np.abs(s))) + np.maximum(s, 0.0) - self.Y[:, 0] * s
        else:
            top = z.max(1)
            losses = np.log(np.exp(z - top[:, None]).sum(1)) + top - (z * self.Y).sum(1)
        return float(losses @ self.weight)

    def gradient(self, R: F64, *, exact: bool = False) -> F64:
        """``Rᵀ X`` (K, d) of a residual (N, K).

        Products in X's dtype within blocks of rows, sums over blocks in float64; all in float64
        where ``exact``.
        """
        X = self.X
        if isinstance(X, Remote):
            return np.ascontiguousarray(X.transposed_times(R, exact=exact).T)
        dtype = np.float64 if exact else X.dtype
        right = np.ascontiguousarray(R.T, dtype)
        out = np.zeros((self.K, X.shape[1]))
        for rows in self._parts():
            out += right[:, rows] @ X[rows].astype(dtype, copy=False)
        return out

    def logits(self, W: Array, b: F64, *, exact: bool = False) -> F64:
        """``X Wᵀ + b`` (N, K), from the columns with a weight."""
        X = self.X
        if isinstance(X, Remote):
            return np.asarray(X.times(W.T, exact=exact) + b)
        support = np.flatnonzero(W.any(0))
        dtype = np.float64 if exact else X.dtype
        z = np.empty((X.shape[0], self.K))
        V = np.ascontiguousarray(W[:, support].T, dtype)
        for rows in self._parts():
            z[rows] = self._some(rows, support).astype(dtype, copy=False) @ V
        z += b
        return z

    def _parts(self) -> list[slice]:
        if not column_major(self.X):
            return row_blocks(*self.X.shape)
        rows, columns = self.X.shape  # short runs of a column read slowly: larger blocks
        return panels(rows, max(256, min(PANEL, COLUMN_BYTES // (4 * columns))))

    def _some(self, rows: slice, columns: NDArray[np.intp]) -> Array:
        X = self.X
        if len(columns) == X.shape[1]:
            return np.asarray(X[rows])
        return np.asarray(X[rows].T[columns].T if column_major(X) else X[rows].take(columns, 1))

    def null_intercept(self) -> F64:
        """The intercept (K,) that is best with all weights zero: the log odds of the classes."""
        total = self.weight.sum()
        # A class without a row gets a probability that no gradient will notice.
        mass = np.maximum(self.weight @ self.Y, 1e-13 * total)
        if self.K == 1:
            return np.asarray(np.log(mass) - np.log(np.maximum(total - mass, 1e-13 * total)))
        b = np.log(mass)
        return np.asarray(b - b.mean())

    def lambda_max(self) -> float:
        """The smallest l1 penalty at which all weights are zero.

        Exactly 0 where no column is correlated with the labels, but for what rounding leaves: texts
        that are all alike, say, half of them of each class. On a path below such a remainder a
        solver would chase rounding errors, and no step of it would end.
        """
        z = np.broadcast_to(self.null_intercept(), self.Y.shape)
        R = self.residual(np.asarray(z))
        g = np.abs(self.gradient(R))
        top = float(g.max(initial=0.0))
        # Standardised columns leave less than this to rounding: then their sizes need no look.
        if top > CORRELATED * float(np.abs(R).sum(0).max()):
            return top
        eps = float(np.finfo(self.X.dtype).eps)
        remainder = eps * self._norms() * np.sqrt((R * R).sum(0))[:, None]
        return top if (g > remainder).any() else 0.0

    def _norms(self) -> F64:
        """The Euclidean norms (d,) of the columns."""
        rows, columns = self.X.shape
        if isinstance(self.X, Remote):  # standardised, always
            return np.full(columns, rows**0.5)
        squares = np.zeros(columns)
        for part in self._parts():
            block = self.X[part].astype(np.float64)
            squares += np.einsum("ij,ij->j", block, block)
        return np.asarray(np.sqrt(squares))


def violation(W: Array, gradient: F64, l1: float) -> F64:
    """Violation of ``0 ∈ gradient + l1 ∂|W|`` for each weight, same shape as ``W``."""
    at_zero = np.maximum(np.abs(gradient) - l1, 0.0)
    if l1 == 0.0:
        return np.asarray(at_zero)
    return np.asarray(np.where(W != 0, np.abs(gradient + l1 * np.sign(W)), at_zero))


def centre(W: Array) -> Array:
    """The shift of each column of ``W`` (K, m) that the softmax does not notice and l1 likes best.

    The same number added to all classes' weights of a feature changes no probability. Along that
    direction the loss is flat, its Hessian singular and every method slow, while the l1 penalty is
    least where the median is zero (of a whole interval of medians, the one nearest to zero).
    """
    order = np.sort(W, axis=0)
    low, high = order[(len(W) - 1) // 2], order[len(W) // 2]
    return np.asarray(W - np.clip(0, low, high))
