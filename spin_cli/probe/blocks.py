"""Matrices that are made block by block on demand, for those that do not fit in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LONG = 4096
"""Rows from which columns may be read where they lie: of shorter ones, a copy is read faster."""
PANEL, SHORT = 2048, 64


@dataclass(frozen=True)
class Blocks:
    """A matrix that only ever exists a block of rows at a time.

    The solver touches X by slices of rows alone, so this serves in the place of an array.
    """

    read: Callable[[slice], Array]
    """Rows start to stop, (stop - start, d); the slice has both and no step."""
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    by_column: bool = False
    """Hand blocks out as an array that lies column by column would."""

    @property
    def ndim(self) -> int:
        """Always 2."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        block = self.read(slice(start, stop))
        return np.asfortranarray(block) if self.by_column else block


class Remote(ABC):
    """A matrix (N, d) that lies where it can be multiplied, but not looked at: on a GPU."""

    shape: tuple[int, int]
    dtype: np.dtype[Any] = np.dtype(np.float32)
    ndim: int = 2

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def times(self, V: Array, *, exact: bool = False) -> NDArray[np.float64]:
        """``X V`` (N, k) for V (d, k); in float64 throughout where *exact*."""

    @abstractmethod
    def transposed_times(self, R: Array, *, exact: bool = False) -> NDArray[np.float64]:
        """``Xᵀ R`` (d, k) for R (N, k)."""

    def __matmul__(self, V: Array) -> NDArray[np.float64]:
        return self.times(V)


def column_major(X: Any) -> bool:
    """Whether *X* lies column by column, and its columns are long."""
    if not isinstance(X, np.ndarray):
        return isinstance(X, Blocks) and X.by_column
    return bool(X.flags.f_contiguous and not X.flags.c_contiguous and len(X) >= LONG)


def panels(rows: int, step: int = PANEL) -> list[slice]:
    """Slices of *step* rows; a short rest goes with the last of them.

    BLAS multiplies a few rows in another order where they lie in another way, so that a matrix in
    memory and one that is streamed would differ in their last bits.
    """
    starts = list(range(0, rows, step))
    if len(starts) > 1 and rows - starts[-1] < SHORT:
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]


def take_columns(X: Any, columns: NDArray[np.integer[Any]]) -> Blocks:
    """Some *columns* of ``X`` (an array or `Blocks`)."""

    def read(part: slice) -> Array:
        return np.asarray(X[part][:, columns])

    return Blocks(read, (X.shape[0], len(columns)), X.dtype)


def take_rows(X: Any, rows: NDArray[np.integer[Any]]) -> Any:
    """The *rows* of ``X`` (an array or `Blocks`): a view if they follow one another, else `Blocks`.

    A copy of the whole would double what one matrix takes.
    """
    if len(rows) and (np.diff(rows) == 1).all():
        first, last = int(rows[0]), int(rows[-1]) + 1
        if isinstance(X, np.ndarray):
            return np.asarray(X[first:last])

    def read(part: slice) -> Array:
        chosen = rows[part]
        if isinstance(X, np.ndarray) or len(chosen) == 0:
            return np.asarray(X[chosen] if len(chosen) else X[0:0])
        low = int(chosen.min())
        block: Array = X[low : int(chosen.max()) + 1]
        return np.asarray(block[chosen - low])

    return Blocks(read, (len(rows), X.shape[1]), X.dtype)
