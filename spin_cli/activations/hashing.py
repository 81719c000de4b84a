"""The hash of a layer file, made of hashes of its rows.

Rows are hashed when they are written. A SHA-256 of the whole file could only begin when its last
row is there, and would have to read hundreds of gigabytes again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from spin_cli import hdf5
from spin_cli.activations.features import DISK_DTYPES, Feature
from spin_cli.activations.places import Piece, Place, find_place
from spin_cli.artifacts import EXTRACT_AGAIN
from spin_cli.choices import StorageDtype

HASHED_AT_ONCE = 2**20


def hash_block(block: NDArray[Any]) -> bytes:
    """SHA-256 of consecutive rows (n, F) of a matrix, in its disk dtype, as they are in memory."""
    return hashlib.sha256(np.ascontiguousarray(block).data).digest()


def join_hashes(blocks: Iterable[bytes], beside: bytes) -> str:
    """SHA-256 of a layer file by way of its blocks, as hex.

    Parameters
    ----------
    blocks : for one matrix after the other, the hashes of its blocks of rows
    beside : hash of all other bytes of the file, from `create_layer`
    """
    total = hashlib.sha256()
    for digest in chain(blocks, (beside,)):
        total.update(digest)
    return total.hexdigest()


def hash_layer(
    path: Path, features: Sequence[Feature], rows: int, dtype: StorageDtype, block_rows: int
) -> str:
    """What `join_hashes` gives for a file as it is on the disk.

    Parameters
    ----------
    features : all that are in the file, in their order
    block_rows : rows of a block; the last one may have fewer

    Raises
    ------
    ArtifactError
        The file cannot be read, or does not hold these matrices as spin writes them.
    """
    with hdf5.opened(path, EXTRACT_AGAIN) as layer, path.open("rb") as file:
        places = [
            find_place(hdf5.plain_dataset(layer, f.dataset, (rows, f.width), DISK_DTYPES[dtype]))
            for f in features
        ]
        blocks = (
            _hash_pieces(file, place.pieces(start, min(block_rows, rows - start)))
            for place in places
            for start in range(0, rows, block_rows)
        )
        return join_hashes(blocks, hash_beside(file, rows, places))


def hash_beside(file: BinaryIO, rows: int, places: Sequence[Place]) -> bytes:
    """SHA-256 of all bytes of a layer file that are in no row."""
    spans = sorted(piece for place in places for piece in place.pieces(0, rows))
    return _hash_pieces(file, _others(spans, os.fstat(file.fileno()).st_size))


def _others(spans: Sequence[Piece], size: int) -> Iterator[Piece]:
    """What of so many bytes is in none of the sorted *spans* (first byte, bytes), likewise."""
    end = 0
    for start, count in (*spans, (size, 0)):
        if start > end:
            yield end, start - end
        end = max(end, start + count)


def _hash_pieces(file: BinaryIO, pieces: Iterable[Piece]) -> bytes:
    digest = hashlib.sha256()
    for place, count in pieces:
        file.seek(place)
        while count > 0 and (data := file.read(min(count, HASHED_AT_ONCE))):
            digest.update(data)
            count -= len(data)
    return digest.digest()
