"""Memory of a long run: what the C library and Python would do to it by themselves.

Batches of every shape leave holes in the C library's heap that add up. Of C libraries only glibc is
spoken to; elsewhere `settle` sets variables alone, and `watch` hands back nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Numbers of parameters in glibc's ``malloc.h``."""
LARGE = 2 * 2**20
"""Bytes from which an allocation gets pages of its own: where torch asks for huge pages. The many
smaller ones are left to the heap, for new pages would cost them too much time."""
KEPT = 64 * 2**20
"""Bytes that may stay free at the heap's end, so that batch after batch does not ask anew."""
READ_BETWEEN = 2**13
"""Tokens after which free pages are looked for."""
READ_WITHIN = 2**14
"""The same while other batches hold memory: where texts are long a window has 250 batches, whose
holes add up to 20 MB. One of sentences ends before."""
SETTINGS = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
"""Variables that torch and oneDNN look at once.

Where Linux leaves it to the program, tensors of 2 MiB and more ask for huge pages: large ones get
new pages for every batch, and one fault of 2 MiB is cheaper than 512 of 4 KiB. And oneDNN and
torch's layer above it keep code made for the shapes of 1,024 operations each, 28 KB for a GELU
and 290 KB for a linear layer in bfloat16. Nearly every batch has a shape of its own, so they are
to keep those of a few batches, which all layers share."""


def settle() -> None:
    """Let large tensors have pages of their own, which go back to the system when they are freed.

    glibc raises the size from which it does so by itself, up to 32 MB, as it sees large blocks
    come and go; the heap then grows with the number of batches of different shapes. To be called
    before torch computes anything. Variables that are set already are left as they are.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
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


def watch(every: int = READ_BETWEEN) -> Callable[[int], None]:
    """A function to be told of tokens read, which hands the heap's free pages back now and then.

    Best called when no batch holds memory: what batches of many shapes left free is then whole.
    The next batches fault the pages in again; after every batch that took an eighth of the time of
    a small model.
    """
    trim = _find("malloc_trim")
    read = 0

    def step(tokens: int) -> None:
        nonlocal read
        read += tokens
        if read >= every and trim is not None:
            trim(0)
            read = 0

    return step


@cache
def _find(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
