"""Activations in HDF5: one file per layer, one dataset per site and pooling.

A layer file is created with its final shape and all its space, and never changes its metadata
again: rows are then written with plain `os.pwrite` into the chunks' places. So a file is readable
at every moment, a kill loses at most the rows in flight, and rewriting them gives the same bytes.
(h5py's own writes keep metadata in memory: killed before a flush, they lose everything.)
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spin_cli import hdf5
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import ArtifactError

CHUNK_BYTES = 2**18
DISK_DTYPES: dict[StorageDtype, np.dtype[Any]] = {
    StorageDtype.FLOAT16: np.dtype("<f2"),
    StorageDtype.FLOAT32: np.dtype("<f4"),
    StorageDtype.BFLOAT16: np.dtype("<u2"),
}
"""bfloat16 has no HDF5 type: its bits are stored in uint16."""


@dataclass(frozen=True)
class Feature:
    """One matrix of activations: a layer, a site and a pooling."""

    layer: str
    site: Site
    pooling: Pooling
    width: int
    hookpoint: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Layer, site and pooling as they are called in files."""
        return self.layer, self.site.value, self.pooling.value

    @property
    def dataset(self) -> str:
        """Name of the dataset in the layer's file."""
        return f"/{self.site.value}/{self.pooling.value}"

    @property
    def file(self) -> str:
        """Name of the layer's file."""
        return f"{self.layer}.h5"

    @property
    def number(self) -> int:
        """Tells it apart from others that share a seed."""
        return zlib.crc32(f"{self.layer}{self.dataset}".encode())


def features_of(manifest: dict[str, Any]) -> tuple[Feature, ...]:
    """The matrices that an activations manifest lists."""
    try:
        return tuple(
            Feature(
                str(f["layer"]),
                Site(f["site"]),
                Pooling(f["pooling"]),
                int(f["width"]),
                str(f["hookpoint"]),
            )
            for f in manifest["features"]
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"the activations' manifest lists its features wrongly: {error}"
        ) from error


# -- number formats --------------------------------------------------------------------------


def to_disk(values: NDArray[np.float32], dtype: StorageDtype) -> NDArray[Any]:
    """Round float32 values to what is stored."""
    if dtype is StorageDtype.BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        return (rounded >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # overflow is counted and refused by the caller
        return values.astype(DISK_DTYPES[dtype])


def from_disk(stored: NDArray[Any], dtype: StorageDtype) -> NDArray[Any]:
    """Undo `to_disk`: float16 and float32 as they are, bfloat16 exactly, as float32."""
    if dtype is not StorageDtype.BFLOAT16:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


# -- writing ---------------------------------------------------------------------------------


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


def create_layer(path: Path, features: Sequence[Feature], rows: int, dtype: StorageDtype) -> None:
    """Create a layer file of its final size, every chunk allocated, nothing written yet.

    Raises
    ------
    OSError
        Among others ``ENOSPC``: the space is claimed now, so that a disk which is too small is
        found before the first batch is run.
    """
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
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RowWriter:
    """Writes blocks of rows into layer files that `create_layer` made."""

    def __init__(self, folder: Path, features: Sequence[Feature]) -> None:
        self._descriptors: dict[str, int] = {}
        self._places: dict[Feature, tuple[int, list[int]]] = {}
        for name in dict.fromkeys(feature.file for feature in features):
            with h5py.File(folder / name, "r") as file:
                for feature in features:
                    if feature.file == name:
                        self._places[feature] = _chunk_places(file[feature.dataset])
            self._descriptors[name] = os.open(folder / name, os.O_RDWR)

    def write(self, feature: Feature, start: int, block: NDArray[Any]) -> None:
        """Write *block* (n, F), in its disk dtype, to the rows from *start* on."""
        rows_per_chunk, offsets = self._places[feature]
        descriptor = self._descriptors[feature.file]
        row_bytes = block.strides[0]
        done = 0
        while done < len(block):
            chunk, inside = divmod(start + done, rows_per_chunk)
            count = min(rows_per_chunk - inside, len(block) - done)
            place = offsets[chunk] + inside * row_bytes
            part = np.ascontiguousarray(block[done : done + count])
            _write_all(descriptor, part.data.cast("B"), place)
            done += count

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


def _chunk_places(dataset: Any) -> tuple[int, list[int]]:
    """Rows per chunk and the place of each chunk in the file."""
    rows = dataset.chunks[0]
    places: dict[int, int] = {}

    def note(info: Any) -> None:
        places[info.chunk_offset[0] // rows] = info.byte_offset

    dataset.id.chunk_iter(note)  # to ask for one chunk after the other takes quadratic time
    return rows, [places[index] for index in range(len(places))]


def _write_all(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


# -- reading ---------------------------------------------------------------------------------


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
    with hdf5.opened(path, "Make the activations again: spin extract … --force") as file:
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
