"""Activations in HDF5: one file per layer, one dataset per site and pooling.

A layer file is created with its final shape and all its space, and never changes its metadata
again: rows are then written with plain `os.pwrite` into the chunks' places. So a file is readable
at every moment, a kill loses at most the rows in flight, and rewriting them gives the same bytes.
(h5py's own writes keep metadata in memory: killed before a flush, they lose everything.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spin_cli import atomic, hdf5
from spin_cli.activations.features import DISK_DTYPES, Feature, by_file, from_disk
from spin_cli.activations.hashing import hash_beside
from spin_cli.activations.places import Place, find_place
from spin_cli.artifacts import EXTRACT_AGAIN
from spin_cli.choices import StorageDtype
from spin_cli.errors import ArtifactError

CHUNK_BYTES = 2**18


def chunk_rows(feature: Feature, rows: int, dtype: StorageDtype) -> int:
    """Rows in one chunk of a matrix of *rows* rows."""
    return max(1, min(rows, CHUNK_BYTES // (feature.width * DISK_DTYPES[dtype].itemsize)))


def disk_bytes(features: Sequence[Feature], rows: int, dtype: StorageDtype) -> int:
    """Bytes of the layer files for so many rows: whole chunks, but for HDF5's own few KiB."""
    total = 0
    for feature in features:
        chunk = chunk_rows(feature, rows, dtype)
        total += -(-rows // chunk) * chunk * feature.width * DISK_DTYPES[dtype].itemsize
    return total


def create_layer(path: Path, features: Sequence[Feature], rows: int, dtype: StorageDtype) -> bytes:
    """Create a layer file of its final size, every chunk allocated, no row written yet.

    Returns
    -------
    bytes
        SHA-256 of all that will be in it beside the rows.

    Raises
    ------
    OSError
        Among others ``ENOSPC``: the space is claimed now, so that a disk which is too small is
        found at once.
    """
    places = []
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for feature in features:
            chunk = chunk_rows(feature, rows, dtype)
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_chunk((chunk, feature.width))
            plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            plan.set_obj_track_times(False)
            group = file.require_group(feature.site.value)
            dataset = h5py.Dataset(
                h5py.h5d.create(
                    group.id,
                    feature.pooling.value.encode(),
                    h5py.h5t.py_create(DISK_DTYPES[dtype]),
                    h5py.h5s.create_simple((rows, feature.width)),
                    plan,
                )
            )
            dataset.attrs["site"] = feature.site.value
            dataset.attrs["layer"] = feature.layer
            dataset.attrs["pooling"] = feature.pooling.value
            dataset.attrs["hookpoint"] = feature.hookpoint
            dataset.attrs["dtype"] = dtype.value
            places.append(find_place(dataset))
    with path.open("r+b") as file:
        atomic.claim(file, os.fstat(file.fileno()).st_size)
        os.fsync(file.fileno())
        return hash_beside(file, rows, places)


class RowWriter:
    """Writes blocks of rows into layer files that `create_layer` made."""

    def __init__(self, folder: Path, features: Sequence[Feature]) -> None:
        self._descriptors: dict[str, int] = {}
        self._places: dict[Feature, Place] = {}
        for name, mine in by_file(features).items():
            with h5py.File(folder / name, "r") as file:
                for feature in mine:
                    self._places[feature] = find_place(file[feature.dataset])
            self._descriptors[name] = os.open(folder / name, os.O_RDWR)

    def write(self, feature: Feature, start: int, block: NDArray[Any]) -> None:
        """Write *block* (n, F), in its disk dtype, to the rows from *start* on."""
        data = np.ascontiguousarray(block).data.cast("B")
        descriptor = self._descriptors[feature.file]
        for place, count in self._places[feature].pieces(start, len(block)):
            _write_all(descriptor, data[:count], place)
            data = data[count:]

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._descriptors:  # what comes after this finds no file, and not another's number
            os.close(self._descriptors.popitem()[1])


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def read_matrix(
    folder: Path, feature: Feature, rows: int, dtype: StorageDtype, start: int = 0
) -> NDArray[Any]:
    """Read *rows* rows of one feature, from row *start* on.

    Returns
    -------
    array, (rows, F), float16 or float32

    Raises
    ------
    ArtifactError
        The dataset is missing, of another shape or dtype, or holds NaN or infinity.
    """
    path = folder / feature.file
    shape = range(start + rows, hdf5.ANY.stop), feature.width
    with hdf5.opened(path, EXTRACT_AGAIN) as file:
        dataset = hdf5.dataset(file, feature.dataset, shape, DISK_DTYPES[dtype])
        values = from_disk(dataset[start : start + rows], dtype)
    # A sum is NaN or infinite if a member is, and needs no array of flags.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum(axis=0, dtype=np.float64)).all()
    if not finite:
        raise ArtifactError(
            f"{path}: NaN or infinity in {feature.dataset}",
            hint="Extract again with --storage-dtype float32 or bfloat16.",
        )
    return values
