"""The columns of X that a solver works on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.probe.blocks import column_major, panels
from spin_cli.probe.problem import Problem
from spin_cli.probe.standard import row_blocks

Array = NDArray[Any]
Index = NDArray[np.intp]


class Columns:
    """The columns that any solve has worked on, numbered from 1; number 0 is all ones.

    Few columns are ever touched on the sparse side of a path. Number 0 is for the intercept.

    Notes
    -----
    Where X is an array that is `column_major`, columns are gathered from it panel by panel, which
    takes half of the memory; else they are copied to the rows of a buffer. A streamed X that is
    `column_major` is copied too, and multiplied in the same panels, so that it gives the same bits.
    """

    def __init__(self, problem: Problem) -> None:
        self.X = problem.X
        n, d = self.X.shape
        self.number_of = np.full(d, -1, np.intp)
        """Number of each column of X; -1: not held."""
        self.count = 1
        self._feature = np.full(d + 1, -1, np.intp)
        self._by_panel = column_major(self.X)
        self._buffer: Array | None = None
        if not (self._by_panel and isinstance(self.X, np.ndarray)):
            # Of full size, as memory that nothing was written to takes no room: growing would copy.
            self._buffer = np.empty((d + 1, n), self.X.dtype)
            self._buffer[0] = 1

    def add(self, columns: Index) -> None:
        """Hold these columns too."""
        new = columns[self.number_of[columns] < 0]
        if len(new) == 0:
            return
        numbers = slice(self.count, self.count + len(new))
        if self._buffer is not None:
            self._copy(new, self._buffer[numbers])
        self.number_of[new] = np.arange(numbers.start, numbers.stop)
        self._feature[numbers] = new
        self.count = numbers.stop

    def _copy(self, columns: Index, target: Array) -> None:
        step = max(64, 2**15 // len(columns))  # small blocks transpose within the cache
        for rows in row_blocks(*self.X.shape):  # large ones read well where X is streamed
            block = self.X[rows]
            if self._by_panel:
                target[:, rows] = block.T[columns]
                continue
            for start in range(0, len(block), step):
                part = block[start : start + step].take(columns, 1).T
                at = rows.start + start
                target[:, at : at + part.shape[1]] = part

    def panel(self, numbers: Index, rows: slice) -> Array:
        """Columns by number, (len(numbers), rows), of some *rows* of X."""
        if self._buffer is None:
            found = np.asarray(self.X.T[self._feature[numbers], rows])
            found[numbers == 0] = 1
            return found
        first, last = int(numbers[0]), int(numbers[-1])
        if self._by_panel or not (np.diff(numbers) == 1).all():
            return np.asarray(self._buffer[numbers, rows])
        return np.asarray(self._buffer[first : last + 1, rows])  # spares a copy

    def times(self, V: Array) -> Array:
        """``V`` (K, count) times the columns: (K, N), in X's dtype."""
        V = V.astype(self.X.dtype)
        if not self._by_panel:
            return np.asarray(V @ self._held())
        used = np.flatnonzero(V.any(0))
        out = np.zeros((len(V), len(self.X)), V.dtype)
        for rows in panels(len(self.X)) if len(used) else []:
            out[:, rows] = V[:, used] @ self.panel(used, rows)
        return out

    def products(self, R: Array, numbers: Index | None = None) -> Array:
        """``R`` (K, N) times the columns by number, or all of them: (K, len(numbers))."""
        if numbers is None:
            numbers = np.arange(self.count)
        if not self._by_panel:  # with all that are held: a gather costs more
            return np.asarray((self._held() @ R.T.astype(self.X.dtype)).T[:, numbers])
        R = np.ascontiguousarray(R, self.X.dtype)
        wanted, place = np.unique(numbers, return_inverse=True)
        out = np.zeros((len(R), len(wanted)))
        for rows in panels(len(self.X)):
            out += R[:, rows] @ self.panel(wanted, rows).T
        return out[:, place]

    def _held(self) -> Array:
        assert self._buffer is not None
        return self._buffer[: self.count]
