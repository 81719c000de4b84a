"""Ridge regression on class indicators, cross-validated for the price of a few solves.

The products of columns are summed fold by fold once; leaving a fold out is a subtraction, and each
penalty one Cholesky factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from spin_cli import probe

PENALTIES = (1.0, 0.3, 0.1, 0.03)
"""Times the rows' total weight, and times columns / 1,000 where there are more."""
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Ridge:
    """A regression on all columns of one matrix, and what it says of rows it has not seen."""

    weight: F32
    """(K, F), on raw columns"""
    bias: F64
    """(K,)"""
    out_of_fold: F32
    """(N, K)"""
    penalty: float


def targets(codes: NDArray[np.int64], n_classes: int) -> F32:
    """-1 and 1, (N, 1) for two classes and (N, L) for labels; else indicators (N, n_classes)."""
    if codes.ndim == 2:
        return (2.0 * codes - 1.0).astype(np.float32)
    if n_classes == 2:
        return (2.0 * codes[:, None] - 1.0).astype(np.float32)
    return np.eye(n_classes, dtype=np.float32)[codes]


def fit_ridge(
    values: NDArray[Any], Y: F32, sample_weight: F64, fold: NDArray[np.int64]
) -> Ridge | None:
    """Minimise ``Σ w_i ‖y_i - W x_i - b‖² + penalty ‖W‖²``; None where all columns are constant.

    Parameters
    ----------
    values : (N, F), any float dtype; standardised here, over all rows
    Y : (N, K)
    sample_weight : (N,)
    fold : (N,), 0 to k - 1; the penalty is that of the lowest out-of-fold squared error
    """
    standard = probe.standardise(values)
    X, d = standard.X, standard.X.shape[1]
    if d == 0:
        return None
    parts = [_Sums.of(X[fold == k], Y[fold == k], sample_weight[fold == k]) for k in _folds(fold)]
    total = sum(parts[1:], parts[0])
    tried = []
    for share in PENALTIES:
        penalty = share * max(1.0, d / 1000.0)
        out = np.empty_like(Y)
        for k, part in enumerate(parts):
            W, b = (total - part).solve(penalty)
            out[fold == k] = X[fold == k] @ W + b
        error = float(sample_weight @ ((out - Y) ** 2).sum(1))
        tried.append((error, penalty, out))
        if len(tried) > 1 and error > tried[-2][0]:
            break  # the error has one valley
    _, penalty, out = min(tried, key=lambda item: item[0])
    W, b = total.solve(penalty)
    like = probe.Fit(np.ascontiguousarray(W.T), b.astype(np.float64), 1.0, 0.0, 0.0, 0, True)
    weight, bias = probe.fold_back(like, standard)
    return Ridge(weight, bias, out, penalty)


def _folds(fold: NDArray[np.int64]) -> range:
    return range(int(fold.max()) + 1)


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over some rows."""

    weight: float
    x: F32
    y: F32
    xx: F32
    xy: F32

    @classmethod
    def of(cls, X: F32, Y: F32, weight: F64) -> _Sums:
        root = np.sqrt(weight).astype(np.float32)[:, None]
        X, Y = X * root, Y * root  # the root twice: numpy then sees that XᵀX is symmetric
        return cls(float(weight.sum()), (X.T @ root)[:, 0], (Y.T @ root)[:, 0], X.T @ X, X.T @ Y)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.weight + other.weight, self.x + other.x, self.y + other.y,
            self.xx + other.xx, self.xy + other.xy,
        )  # fmt: skip

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.weight - other.weight, self.x - other.x, self.y - other.y,
            self.xx - other.xx, self.xy - other.xy,
        )  # fmt: skip

    def solve(self, penalty: float) -> tuple[F32, F32]:
        """W (F, K) and b (K,) for *penalty* a unit of weight."""
        x, y = self.x / self.weight, self.y / self.weight
        A = self.xx - np.float32(self.weight) * np.outer(x, x)
        A[np.diag_indices(len(A))] += np.float32(penalty * self.weight)
        right = self.xy - np.float32(self.weight) * np.outer(x, y)
        W = cho_solve(cho_factor(A, overwrite_a=True, check_finite=False), right)
        return W, y - x @ W
