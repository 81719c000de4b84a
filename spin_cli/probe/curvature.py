"""The Hessian on the columns that matter now."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.probe.blocks import panels
from spin_cli.probe.columns import Columns
from spin_cli.probe.problem import F64, Problem

Array = NDArray[Any]
Index = NDArray[np.intp]


class Curvature:
    """``H[(k,j),(l,m)] = Σ_i w_i x_ij x_im p_ik (δ_kl - p_il)`` for pairs (class, column).

    The probabilities are those of the last `reset`. They change slowly along a path, so that a
    Hessian that is a little old still gives good steps at a fraction of the cost.
    """

    def __init__(self, problem: Problem, columns: Columns) -> None:
        self.problem = problem
        self.columns = columns
        self.slot = np.zeros((problem.K, 0), np.intp)
        self.H = np.zeros((0, 0), problem.X.dtype)
        self.numbers: list[Index] = [np.zeros(0, np.intp) for _ in range(problem.K)]
        self.P: F64 = np.zeros((0, problem.K))
        self.mean_weight = 1.0

    def reset(self, P: F64) -> None:
        """Forget all, and take new probabilities (N, K)."""
        self.P = P
        self.slot = np.zeros((self.problem.K, 0), np.intp)
        self.H = np.zeros((0, 0), self.problem.X.dtype)
        self.numbers = [np.zeros(0, np.intp) for _ in range(self.problem.K)]
        self.mean_weight = self._mean_weight(P)

    def _mean_weight(self, P: F64) -> float:
        return float(self.problem.weight @ (P * (1.0 - P)).sum(1))

    def matrix(self, classes: Index, numbers: Index, P: F64) -> Array:
        """H (m, m) on the pairs, in their order, scaled to the mean curvature at ``P``."""
        self._extend(classes, numbers)
        slots = self.slot[classes, numbers]
        scale = self._mean_weight(P) / self.mean_weight if self.mean_weight else 1.0
        return np.asarray(self.H[np.ix_(slots, slots)] * self.H.dtype.type(scale))

    def _extend(self, classes: Index, numbers: Index) -> None:
        K = self.problem.K
        if self.slot.shape[1] < self.columns.count:
            grown = np.full((K, self.columns.count), -1, np.intp)
            grown[:, : self.slot.shape[1]] = self.slot
            self.slot = grown
        fresh = self.slot[classes, numbers] < 0
        if not fresh.any():
            return
        old = len(self.H)
        classes, numbers = classes[fresh], numbers[fresh]
        self.slot[classes, numbers] = np.arange(old, old + len(numbers))
        for k in range(K):
            self.numbers[k] = np.concatenate([self.numbers[k], numbers[classes == k]])
        H = np.zeros((old + len(numbers),) * 2, self.H.dtype)
        H[:old, :old] = self.H
        self.H = H
        for new_class in range(K):
            new = numbers[classes == new_class]
            for k in range(K if len(new) else 0):
                self._fill(k, new_class, new)

    def _fill(self, k: int, new_class: int, new: Index) -> None:
        """The block of all pairs of class ``k`` with the new pairs of ``new_class``."""
        every = self.numbers[k]
        if len(every) == 0:
            return
        dtype, P, weight = self.H.dtype, self.P, self.problem.weight
        block = np.zeros((len(every), len(new)), self.H.dtype)
        same = k == new_class
        D = weight * P[:, k] * ((1.0 - P[:, k]) if same else -P[:, new_class])
        D = D.astype(dtype)
        symmetric = same and len(every) == len(new)
        root = np.sqrt(D) if symmetric else D
        for part in panels(len(D)):
            right = self.columns.panel(new, part) * root[part]
            block += (right if symmetric else self.columns.panel(every, part)) @ right.T
        left, top = self.slot[k, every], self.slot[new_class, new]
        self.H[np.ix_(left, top)] = block
        self.H[np.ix_(top, left)] = block.T
