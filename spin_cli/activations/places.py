"""Where rows lie in a layer file, for those who read and write past HDF5."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Piece = tuple[int, int]
"""First byte in the file, and bytes."""


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in its file."""

    chunk_rows: int
    row_bytes: int
    offsets: Sequence[int]
    """Of each chunk."""

    def pieces(self, start: int, count: int) -> Iterator[Piece]:
        """Where *count* rows from *start* on are; what lies together is one piece."""
        stop, begin, end = start + count, 0, 0
        while start < stop:
            chunk, inside = divmod(start, self.chunk_rows)
            rows = min(self.chunk_rows - inside, stop - start)
            first = self.offsets[chunk] + inside * self.row_bytes
            if first != end:
                if begin < end:
                    yield begin, end - begin
                begin = first
            end = first + rows * self.row_bytes
            start += rows
        if begin < end:
            yield begin, end - begin


def find_place(dataset: Any) -> Place:
    """Where the values of an open dataset are, which has chunks of whole rows."""
    rows = dataset.chunks[0]
    places: dict[int, int] = {}

    def note(info: Any) -> None:
        places[info.chunk_offset[0] // rows] = info.byte_offset

    dataset.id.chunk_iter(note)  # to ask for one chunk after the other takes quadratic time
    offsets = array("q", (places[index] for index in range(-(-len(dataset) // rows))))
    return Place(rows, dataset.shape[1] * dataset.dtype.itemsize, offsets)
