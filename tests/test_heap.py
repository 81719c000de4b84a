import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from spin_cli import heap

SHAPES = """
import ctypes, sys
from spin_cli import heap
heap.settle()
import torch

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
dtype = getattr(torch, sys.argv[1])
linear, gelu = torch.nn.Linear(64, 256, dtype=dtype), torch.nn.GELU()
torch.set_num_threads(1)
with torch.inference_mode():
    for start in (100, 300, 500):
        for rows in range(start, start + 200):
            gelu(linear(torch.ones(rows, 64, dtype=dtype)))
        if start > 100:
            print(library.mallinfo2().uordblks)
"""


def run_fresh(code: str, *arguments: str) -> str:
    """What a new process prints; torch looks at its settings once."""
    plain = {name: value for name, value in os.environ.items() if name not in heap.SETTINGS}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout


glibc = pytest.mark.skipif(
    heap._find("malloc_trim") is None, reason="this C library hands back nothing on request"
)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@glibc
def test_holes_are_handed_back_once_enough_tokens_were_read():
    heap.settle()
    step = heap.watch()
    step(heap.READ_BETWEEN)  # else the blocks could lie in what earlier tests left free
    before = resident()
    blocks = [np.ones(2**17) for _ in range(64)]  # 1 MiB each: out of the heap, not pages apart
    grown = resident()
    assert grown - before > 32 * 2**20
    del blocks[:-1]  # the last one keeps the heap's end where it is
    step(heap.READ_BETWEEN - 1)
    assert resident() > grown - 4 * 2**20
    step(1)
    assert resident() < grown - 32 * 2**20
    assert len(blocks) == 1


def test_free_pages_are_looked_for_after_so_many_tokens_again_and_again(monkeypatch):
    trims = []
    monkeypatch.setattr(heap, "_find", lambda _name: trims.append)
    step = heap.watch()
    found = []
    for part in (0.5, 0.5, 0.75, 0.75, 3.0, 0.5):
        step(int(part * heap.READ_BETWEEN))
        found.append(len(trims))
    assert found == [0, 1, 1, 2, 3, 3]


def test_settings_are_made_unless_they_are_there_already(monkeypatch):
    for name in heap.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    heap.settle()
    assert {name: os.environ[name] for name in heap.SETTINGS} == heap.SETTINGS
    for name in heap.SETTINGS:
        monkeypatch.setenv(name, "0")
    heap.settle()
    assert {os.environ[name] for name in heap.SETTINGS} == {"0"}


@pytest.mark.skipif(heap._find("mallinfo2") is None, reason="this C library does not tell")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_in_use_does_not_grow_with_the_number_of_shapes(dtype):
    found = run_fresh(SHAPES, dtype)
    first, second = map(int, found.split())
    assert second - first < 2 * 2**20  # as torch has it: 5 MB in float32, 110 in bfloat16


def test_what_is_there_is_left_out_of_the_search_for_garbage_for_a_while():
    class Node:
        pass

    before = gc.get_freeze_count()
    with pytest.raises(KeyError), heap.frozen():
        assert gc.get_freeze_count() > before
        node = Node()
        node.itself, gone = node, weakref.ref(node)
        del node
        gc.collect()
        assert gone() is None  # what is new is still looked through
        raise KeyError
    assert gc.get_freeze_count() == 0
