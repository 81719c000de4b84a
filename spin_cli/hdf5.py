"""Opening what is in an HDF5 file of anybody's, once it is sure to be what is expected.

HDF5 follows links to any file of this machine, reads a virtual dataset whose sources are missing as
zeros, and has memory asked for as a shape says, whatever the file holds. So a dataset is opened by
its name along hard links alone, and with the shape and type that it has to have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spin_cli.errors import ArtifactError

UNREADABLE = (
    OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError
)  # fmt: skip
"""What h5py raises for objects that it does not understand."""
TEXT = "text"
ANY = range(2**62)
SQUEEZED = 1100
"""Times that a filter makes data smaller at most: deflate 1,032 times."""
SMALL = 2**30
"""Bytes that data under a filter may have in any case."""


@contextmanager
def opened(path: Path, mend: str) -> Iterator[Any]:
    """An HDF5 file, to read; whatever h5py raises in it is an `ArtifactError` with the hint *mend*.

    Raises
    ------
    ArtifactError
        The file is missing, not HDF5, or what is looked at in it cannot be read.
    """
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing") from error
    except OSError as error:
        raise ArtifactError(
            f"{path}: not a readable HDF5 file (truncated or foreign)", mend
        ) from error
    try:
        with file:
            yield file
    except UNREADABLE as error:
        raise ArtifactError(f"{path}: cannot be read ({error})", mend) from error


def find(file: Any, name: str) -> Any:
    """The group or dataset *name*; `ArtifactError` where none is, or a link leads to it."""
    place = file
    for part in name.strip("/").split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if link is None:
            raise ArtifactError(f"{file.filename}: no {name} in it")
        if not isinstance(link, h5py.HardLink):
            raise ArtifactError(f"{file.filename}: {name} is a link, which is not followed")
        place = place[part]
    return place


def names(file: Any, name: str = "/") -> list[str]:
    """What is in the group *name*."""
    group = file if name == "/" else find(file, name)
    if not isinstance(group, h5py.Group):
        raise ArtifactError(f"{file.filename}: {name} is not a group")
    return list(group)


def dataset(file: Any, name: str, shape: Sequence[int | range], kind: str | np.dtype[Any]) -> Any:
    """The dataset *name*, of which nothing is read yet.

    Parameters
    ----------
    shape : of each dimension the size, or the range that it is in
    kind : the dtype; or letters of numpy's kinds of it, or `TEXT`

    Raises
    ------
    ArtifactError
        It is missing, linked, of another shape or type, in another file, or larger than this one.
    """
    found = find(file, name)
    where = f"{file.filename}: {name}"
    if not isinstance(found, h5py.Dataset):
        raise ArtifactError(f"{where} is not a dataset")
    plan = found.id.get_create_plist()
    if found.is_virtual or plan.get_external_count():
        raise ArtifactError(f"{where} has its values in other files, which are not opened")
    if not _fits(found.shape, shape) or not _is(found.dtype, kind):
        sizes = ", ".join(map(_said, shape))
        said = {"iu": "whole numbers", "f": "fractions", "biu": "true or false"}
        raise ArtifactError(
            f"{where} is {found.shape} {found.dtype}, expected ({sizes})"
            f" {said.get(str(kind), kind)}"
        )
    size = math.prod(found.shape) * found.id.get_type().get_size()
    held = file.id.get_filesize()
    if size > (max(SMALL, SQUEEZED * held) if plan.get_nfilters() else held):
        raise ArtifactError(f"{where} has {size:,} bytes by its shape, the file {held:,}")
    return found


def plain_dataset(file: Any, name: str, shape: tuple[int, int], kind: np.dtype[Any]) -> Any:
    """As `dataset`; in the file itself its rows have to be, whole and as they are in memory.

    Raises
    ------
    ArtifactError
        As `dataset`; or there is a filter, or no chunks of whole rows.
    """
    found = dataset(file, name, shape, kind)
    whole = found.chunks is not None and found.chunks[1] == shape[1]
    if not whole or found.id.get_create_plist().get_nfilters():
        raise ArtifactError(
            f"{file.filename}: {name} is not in chunks of whole rows without a filter, so that its"
            " blocks have no hash",
            "Give the file's own `sha256` in the manifest.",
        )
    return found


def read(
    file: Any, name: str, shape: Sequence[int | range], kind: str | np.dtype[Any]
) -> NDArray[Any]:
    """All of a dataset: see `dataset`."""
    return np.asarray(dataset(file, name, shape, kind)[...])


def number(file: Any, name: str, attribute: str) -> float:
    """A number that the group or dataset *name* has as an attribute; `ArtifactError` without it."""
    place = find(file, name)
    if attribute not in place.attrs:
        raise ArtifactError(f"{file.filename}: {name} has no attribute {attribute}")
    entry = place.attrs.get_id(attribute)
    if entry.shape in ((), (1,)) and entry.dtype.kind in "iuf":
        value = float(np.ravel(place.attrs[attribute])[0])
        if math.isfinite(value):
            return value
    raise ArtifactError(f"{file.filename}: {name}'s attribute {attribute} is not a finite number")


def _fits(found: tuple[int, ...] | None, expected: Sequence[int | range]) -> bool:
    if found is None or len(found) != len(expected):
        return False
    return all(
        size in right if isinstance(right, range) else size == right
        for size, right in zip(found, expected, strict=True)
    )


def _said(size: int | range) -> str:
    if not isinstance(size, range):
        return str(size)
    return f"{size.start} or more" if size.stop == ANY.stop else f"{size.start} to {size.stop - 1}"


def _is(dtype: np.dtype[Any], kind: str | np.dtype[Any]) -> bool:
    if isinstance(kind, np.dtype):
        return dtype == kind
    if kind == TEXT:
        return h5py.check_string_dtype(dtype) is not None
    return dtype.kind in kind
