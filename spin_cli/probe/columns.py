"""The columns of X that a solver works on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.probe.blocks import column_major
from spin_cli.probe.problem import Problem
from spin_cli.probe.standard import row_blocks

Array = NDArray[Any]
Index = NDArray[np.intp]


class Columns:
    """The columns that any solve has worked on, numbered from 1; number 0 is all ones.

    Few columns are ever touched on the sparse side of a path. Number 0 is for the intercept. Where
    X is an array that is `column_major`, they are read where they lie, which halves what a large
    matrix takes; else they are copied to the rows of a buffer. A streamed X that is `column_major`
    goes through the same products one by one, so that it gives the same bits.
    """

    def __init__(self, problem: Problem) -> None:
        self.X = problem.X
        n, d = self.X.shape
        self.row_of = np.full(d, -1, np.intp)
        """Number of each column of X; -1: not held."""
        self.count = 1
        self._feature = np.full(d + 1, -1, np.intp)
        self._singly = column_major(self.X)
        self._buffer: Array | None = None
        if not (self._singly and isinstance(self.X, np.ndarray)):
            # Of full size, as memory that nothing was written to takes no room: growing would copy.
            self._buffer = np.empty((d + 1, n), self.X.dtype)
            self._buffer[0] = 1

    def add(self, columns: Index) -> None:
        """Hold these columns too."""
        new = columns[self.row_of[columns] < 0]
        if len(new) == 0:
            return
        rows = slice(self.count, self.count + len(new))
        if self._buffer is not None:
            self._copy(new, self._buffer[rows])
        self.row_of[new] = np.arange(rows.start, rows.stop)
        self._feature[rows] = new
        self.count = rows.stop

    def _copy(self, columns: Index, target: Array) -> None:
        step = max(64, 2**15 // len(columns))  # small blocks transpose within the cache
        for rows in row_blocks(*self.X.shape):  # large ones read well where X is streamed
            block = self.X[rows]
            for start in range(0, len(block), step):
                part = block[start : start + step].take(columns, 1).T
                at = rows.start + start
                target[:, at : at + part.shape[1]] = part

    def block(self, numbers: Index, part: slice) -> Array:
        """Columns by number, (len(numbers), n), of the rows *part* of X."""
        if self._buffer is None:
            found = np.asarray(self.X.T[self._feature[numbers], part])
            found[numbers == 0] = 1
            return found
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers) and (np.diff(numbers) == 1).all():
            return np.asarray(self._buffer[first : last + 1, part])  # spares a copy
        return np.asarray(self._buffer[numbers, part])

    def times(self, V: Array) -> Array:
        """``V`` (K, count) times the columns: (K, N), in X's dtype."""
        V = V.astype(self.X.dtype)
        if not self._singly:
            return np.asarray(V @ self._held())
        out = np.repeat(V[:, :1], len(self.X), 1)
        for number in np.flatnonzero(V[:, 1:].any(0)) + 1:
            out += V[:, number, None] * self._column(number)
        return out

    def products(self, R: Array, numbers: Index | None = None) -> Array:
        """``R`` (K, N) times the columns by number, or all: (K, len(numbers)), in X's dtype."""
        if numbers is None:
            numbers = np.arange(self.count)
        right = R.T.astype(self.X.dtype)
        if not self._singly:  # with all that are held: a gather costs more
            return np.asarray((self._held() @ right).T[:, numbers])
        right = np.ascontiguousarray(right)
        wanted, place = np.unique(numbers, return_inverse=True)
        found = [self._column(n) @ right if n else right.sum(0) for n in wanted]
        return np.stack(found, 1)[:, place]

    def _held(self) -> Array:
        assert self._buffer is not None
        return self._buffer[: self.count]

    def _column(self, number: Any) -> Array:
        if self._buffer is None:
            return np.asarray(self.X[:, self._feature[number]])
        return np.asarray(self._buffer[number])
