"""One BLAS thread for the solver."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped,unused-ignore]


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold numpy's and scipy's BLAS to one thread inside the ``with`` block.

    The solver's products are small: threads gain little, and where other processes compete for the
    cores OpenBLAS's threads wait for each other by spinning, which makes them 30 times slower
    (measured). One thread also gives the same bits whatever the number of cores. The place for
    parallelism is over probes.
    """
    controller: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return controller


@cache
def _controller() -> ThreadpoolController:
    # Looking for the loaded libraries takes milliseconds: once per process is enough.
    import scipy.linalg  # noqa: F401  (loads scipy's own BLAS, so that it is found)

    return ThreadpoolController()
