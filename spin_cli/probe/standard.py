"""Standardised copies of feature matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from spin_cli.errors import DataError
from spin_cli.probe import blocks
from spin_cli.probe.blocks import Blocks

BLOCK_BYTES = 4 * 2**20
"""Rows are upcast to float64 in blocks of about this size, so that they stay in the cache."""


@dataclass(frozen=True)
class Standardised:
    """Training rows with mean 0 and standard deviation 1, and what it takes to do others alike."""

    X: NDArray[np.float32]
    """(N, d_kept), C-contiguous, or F-contiguous where it was to lie by column; `Blocks` that stand
    for it where it was to be streamed."""
    mean: NDArray[np.float64]
    """(d,), of the raw columns."""
    scale: NDArray[np.float64]
    """(d,), standard deviations of the raw columns (divisor N); 1.0 for dropped ones."""
    kept: NDArray[np.intp]
    """(d_kept,), the columns that are not constant, ascending."""

    def transform(self, X: NDArray[Any]) -> NDArray[np.float32]:
        """Other rows ``X`` (M, d) on the same footing: (M, d_kept), float32.

        Raises
        ------
        DataError
            Where the number of columns differs.
        """
        if X.ndim != 2 or X.shape[1] != len(self.mean):
            raise DataError(f"features of shape {X.shape}; expected (rows, {len(self.mean)})")
        return _apply(X, self.mean, self.scale, self.kept)


def standardise(X: Any, *, stream: bool = False, by_column: bool = False) -> Standardised:
    """Standardise the columns of ``X``, leaving out those that are constant.

    Parameters
    ----------
    X : (N, d), float16, float32 or float64
        Anything sliced by rows that gives such arrays will do, an HDF5 dataset too: rows are read
        in blocks, twice, and never upcast as a whole.
    stream : make rows of the result anew each time they are asked for, from ``X``, and hold none
    by_column : lay the result out column by column if columns are long; the solver then needs no
        copy of those in use

    Raises
    ------
    DataError
        Where there are no rows, or a value is not finite.

    Notes
    -----
    A column counts as constant where its standard deviation is no larger than the noise that
    rounding leaves on a constant: half a unit in the last place of ``|mean|`` for float16 (which is
    how features are stored), eight of them for float32 and float64 (which are computed with).
    Moments are taken in float64 and joined over blocks after Chan et al. (1983), because the naive
    sum of squares cancels for columns whose mean is large.
    """
    check_shape(X)
    parts = row_blocks(*X.shape)
    mean, variance = moments(np.asarray(X[rows]).astype(np.float64) for rows in parts)
    scale, kept = scale_columns(mean, variance, X.dtype)
    by_column = by_column and len(X) >= blocks.LONG and len(kept) > 1  # one lies both ways
    if stream:
        rows = Blocks(
            lambda part: _apply(X[part], mean, scale, kept),
            (X.shape[0], len(kept)),
            np.dtype(np.float32),
            by_column,
        )
        return Standardised(cast(NDArray[np.float32], rows), mean, scale, kept)
    out = np.empty((X.shape[0], len(kept)), np.float32, "F" if by_column else "C")
    return Standardised(_apply(X, mean, scale, kept, out), mean, scale, kept)


def row_blocks(rows: int, columns: int, itemsize: int = 8) -> list[slice]:
    """Slices that cut ``rows`` into blocks of about `BLOCK_BYTES`."""
    step = max(64, BLOCK_BYTES // max(1, columns * itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def check_shape(X: Any) -> None:
    """Refuse what is no matrix, or one without rows."""
    if X.ndim != 2 or X.shape[0] == 0:
        raise DataError(f"features of shape {X.shape}; expected (rows, columns) with some rows")


def moments(blocks: Iterable[Any]) -> tuple[Any, Any]:
    """Means and variances (d,) of the columns of a matrix that comes in blocks of rows.

    Parameters
    ----------
    blocks : float64 (n, d), arrays or tensors, which are changed
    """
    seen: int = 0
    mean: Any = 0.0
    squares: Any = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks:
            count = len(block)
            here = block.mean(0)
            block -= here
            step = here - mean
            block *= block
            squares = squares + block.sum(0) + step * step * (seen * count / (seen + count))
            mean = mean + step * (count / (seen + count))
            seen += count
    return mean, squares / seen


def scale_columns(
    mean: NDArray[np.float64], variance: NDArray[np.float64], dtype: np.dtype[Any]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """`Standardised.scale` and `Standardised.kept` for columns that were stored as *dtype*."""
    bad = np.flatnonzero(~np.isfinite(mean) | ~np.isfinite(variance))
    if len(bad):
        raise DataError(f"{len(bad)} feature columns hold NaN or infinity, the first is {bad[0]}")
    sd = np.sqrt(variance)
    noise = (0.5 if dtype == np.float16 else 8.0) * float(np.finfo(dtype).eps)
    kept = np.flatnonzero(sd > noise * np.abs(mean))
    scale = np.ones_like(sd)
    scale[kept] = sd[kept]
    return scale, kept


def _apply(
    X: NDArray[Any],
    mean: NDArray[np.float64],
    scale: NDArray[np.float64],
    kept: NDArray[np.intp],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    if out is None:
        out = np.empty((X.shape[0], len(kept)), np.float32)
    whole = len(kept) == X.shape[1]
    for rows in row_blocks(*X.shape):
        block = X[rows].astype(np.float64)
        if not whole:
            block = block[:, kept]
        # Subtract in float64: a large mean would eat the resolution of float32.
        block -= mean[kept]
        np.divide(block, scale[kept], out=out[rows], casting="same_kind")
    return out
