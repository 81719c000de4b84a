"""Ridge regression on class indicators, cross-validated for the price of a few solves.

The products of columns are summed fold by fold once; leaving a fold out is a subtraction, and each
penalty one Cholesky factor. Where there are fewer rows than columns, the same solution comes from
the products of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from spin_cli import probe

PENALTIES = (1.0, 0.3, 0.1, 0.03)
"""Times the rows' total weight, and times columns / 1,000 where there are more."""
QUIET = 1e-2
"""Of the median column's standard deviation; see `quieten`."""
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
    standard = quieten(probe.standardise(values))
    X, d = standard.X, standard.X.shape[1]
    if d == 0:
        return None
    fewer = len(X) < d
    solver = (_Rows if fewer else _Columns)(X, Y, sample_weight, fold)
    tried = []
    for share in PENALTIES:
        penalty = share * max(1.0, d / 1000.0)
        out = np.empty_like(Y)
        for k in range(int(fold.max()) + 1):
            W, b = solver.solve(penalty, k)
            out[fold == k] = solver.seen[fold == k] @ W + b
        error = float(sample_weight @ ((out - Y) ** 2).sum(1))
        tried.append((error, penalty, out))
        if len(tried) > 1 and error > tried[-2][0]:
            break  # the error has one valley
    _, penalty, out = min(tried, key=lambda item: item[0])
    W, b = solver.solve(penalty)
    W = X.T @ W if fewer else W
    like = probe.Fit(np.ascontiguousarray(W.T), b.astype(np.float64), 1.0, 0.0, 0.0, 0, True)
    weight, bias = probe.fold_back(like, standard)
    return Ridge(weight, bias, out, penalty)


def quieten(standard: probe.Standardised) -> probe.Standardised:
    """Keep columns that hardly vary below unit variance.

    What varies by less than `QUIET` of a matrix's median column is mostly what rounding leaves of
    a neuron that is off (the tail of GELU, say). At unit variance, weights of 1e5 would turn the
    last bits of a value, which depend on the batch it was computed in, into a part of the answer.
    Values are changed in place.
    """
    sd = standard.scale[standard.kept]
    floor = QUIET * float(np.median(sd)) if len(sd) else 0.0
    quiet = sd < floor
    if not quiet.any():
        return standard
    scale = standard.scale.copy()
    scale[standard.kept[quiet]] = floor
    standard.X[:, quiet] *= (sd[quiet] / floor).astype(np.float32)
    return replace(standard, scale=scale)


class _Rows:
    """By an equation for each row: ``W = Xᵀ A``."""

    def __init__(self, X: F32, Y: F32, weight: F64, fold: NDArray[np.int64]) -> None:
        self.seen: F32 = X @ X.T
        self._Y, self._weight, self._fold = Y, weight.astype(np.float32), fold

    def solve(self, penalty: float, left_out: int | None = None) -> tuple[F32, F32]:
        """A (N, K), zero for the fold *left_out*, and b (K,) for *penalty* a unit of weight."""
        rows = np.flatnonzero(self._fold != (-1 if left_out is None else left_out))
        weight, Y = self._weight[rows], self._Y[rows]
        total, root = weight.sum(), np.sqrt(weight)[:, None]
        gram, share = self.seen[np.ix_(rows, rows)], weight / weight.sum()
        means, y = gram @ share, share @ Y
        centred = gram - means[:, None] - means + share @ means
        centred *= root * root.T
        centred[np.diag_indices(len(rows))] += np.float32(penalty * total)
        inner = root * _solve(centred, root * (Y - y))
        inner -= share[:, None] * inner.sum(0)
        A = np.zeros_like(self._Y)
        A[rows] = inner
        return A, y - means @ inner


class _Columns:
    """By an equation for each column."""

    def __init__(self, X: F32, Y: F32, weight: F64, fold: NDArray[np.int64]) -> None:
        self.seen = X
        folds = [fold == k for k in range(int(fold.max()) + 1)]
        self._parts = [_Sums.of(X[rows], Y[rows], weight[rows]) for rows in folds]
        self._total = sum(self._parts[1:], self._parts[0])

    def solve(self, penalty: float, left_out: int | None = None) -> tuple[F32, F32]:
        """W (F, K) and b (K,) for *penalty* a unit of weight."""
        sums = self._total if left_out is None else self._total - self._parts[left_out]
        weight = np.float32(sums.weight)
        x, y = sums.x / weight, sums.y / weight
        A = sums.xx - weight * np.outer(x, x)
        A[np.diag_indices(len(A))] += np.float32(penalty * sums.weight)
        W = _solve(A, sums.xy - weight * np.outer(x, y))
        return W, y - x @ W


def _solve(A: NDArray[Any], right: NDArray[Any]) -> Any:
    """Solve for *right*; *A* is used up."""
    return cho_solve(cho_factor(A, overwrite_a=True, check_finite=False), right)


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
