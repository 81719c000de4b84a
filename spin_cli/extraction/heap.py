"""Memory of a long run: what the C library and Python would do to it by themselves.

Batches of every shape leave holes in the C library's heap that add up. Only glibc is spoken to; on
other systems `settle` and `watch` do nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of parameters in glibc's ``malloc.h``."""
LARGE = 4 * 2**20
"""Bytes from which an allocation gets pages of its own: the tensors of an FFN, but not the many
smaller ones, for which new pages would cost too much time."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's variable: where Linux leaves it to the program, tensors from 2 MiB on ask for huge pages.
Large tensors get new pages for every batch, and one fault of 2 MiB is cheaper than 512 of 4 KiB."""
KEPT = 64 * 2**20
"""Bytes that may stay free at the heap's end, so that batch after batch does not ask anew."""
GROWTH = 8 * 2**20
"""Bytes by which a process may grow before free pages are looked for: with 12 MiB, 50,000 short
texts took 5.6% more memory than 5,000."""


def settle() -> None:
    """Let large tensors have pages of their own, which go back to the system when they are freed.

    glibc raises the size from which it does so by itself, up to 32 MB, as it sees large blocks
    come and go; the heap then grows with the number of batches of different shapes. To be called
    before torch allocates anything: it looks at `HUGE_PAGES` once.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if (mallopt := _find("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_ARENA_MAX, 1)  # threads that run batches would each have holes of their own


@contextmanager
def frozen() -> Iterator[None]:
    """Leave the objects that are there now out of Python's search for unreachable ones.

    Token ids are many small lists, which set that search off; to go through all of torch's and
    transformers' objects takes it a quarter of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def watch() -> Callable[[], None]:
    """A function that hands free pages back to the system where the process has grown.

    To be called when a batch is done. Handing back after every few batches, whether they left
    holes or not, took an eighth of the time of a small model: the next batch faults all of the
    pages in again, and most batches fit into the holes of others.
    """
    trim = _find("malloc_trim")
    floor = 0  # the fewest bytes after a batch since pages were handed back; 0: no batch yet

    def step() -> None:
        nonlocal floor
        if trim is None:
            return
        now = resident()
        if floor and now > floor + GROWTH:
            trim(0)
            floor = 0
        else:
            floor = min(floor, now) if floor else now

    return step


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@cache
def _find(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
