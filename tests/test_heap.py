import gc
import os
import sys
import weakref

import numpy as np
import pytest

from spin_cli.extraction import heap

glibc = pytest.mark.skipif(
    heap._find("malloc_trim") is None, reason="this C library hands back nothing on request"
)


@glibc
def test_holes_are_handed_back_once_a_process_has_grown():
    heap.settle()
    heap._find("malloc_trim")(0)  # else the blocks could lie in what earlier tests left free
    step = heap.watch()
    step()
    before = heap.resident()
    blocks = [np.ones(2**17) for _ in range(64)]  # 1 MiB each: out of the heap, not pages apart
    grown = heap.resident()
    assert grown - before > 2 * heap.GROWTH
    del blocks[:-1]  # the last one keeps the heap's end where it is
    step()
    assert heap.resident() < grown - 2 * heap.GROWTH
    assert len(blocks) == 1


@glibc
def test_nothing_is_handed_back_where_nothing_has_grown(monkeypatch):
    trims = []
    monkeypatch.setattr(heap, "_find", lambda _name: trims.append)
    sizes = iter([500, 500, 494, 494, 510, 495, 502, 510])
    monkeypatch.setattr(heap, "resident", lambda: next(sizes) * 2**20)
    step = heap.watch()
    for _ in range(4):
        step()
    assert trims == []
    step()  # 20 MiB more than at the lowest
    assert trims == [0]
    for _ in range(2):  # what a batch takes anew counts as no growth
        step()
    assert trims == [0]
    step()  # 15 MiB more than at the lowest since then
    assert trims == [0, 0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
def test_resident_bytes_are_those_of_this_process():
    before = heap.resident()
    block = np.ones(2**22)
    assert heap.resident() - before > 0.9 * block.nbytes


def test_large_tensors_ask_for_huge_pages_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv(heap.HUGE_PAGES, raising=False)
    heap.settle()
    assert os.environ[heap.HUGE_PAGES] == "1"
    monkeypatch.setenv(heap.HUGE_PAGES, "0")
    heap.settle()
    assert os.environ[heap.HUGE_PAGES] == "0"


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
