"""The C library's heap, kept small: batches of every shape would leave holes in it that add up.

Only glibc is spoken to. On other systems these functions do nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of two parameters in glibc's ``malloc.h``."""
LARGE = 4 * 2**20
"""Bytes from which an allocation gets pages of its own: the tensors of an FFN, but not the many
smaller ones, for which new pages would cost too much time."""
KEPT = 64 * 2**20
"""Bytes that may stay free at the heap's end, so that batch after batch does not ask anew."""


def settle() -> None:
    """Let large tensors have pages of their own, which go back to the system when they are freed.

    glibc raises the size from which it does so by itself, up to 32 MB, as it sees large blocks
    come and go; the heap then grows with the number of batches of different shapes.
    """
    if (mallopt := _find("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Hand pages that are free within the heap back to the system."""
    if (trim := _find("malloc_trim")) is not None:
        trim(0)


@cache
def _find(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
