"""What is known of each row: ``samples.h5``, beside the layers' files.

Row *i* here is row *i* in every layer file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spin_cli import hdf5
from spin_cli.artifacts import EXTRACT_AGAIN
from spin_cli.config import MAX_CLASSES, SPLITS
from spin_cli.errors import ArtifactError

SAMPLES = "samples.h5"
STRING_ROWS = 8192
"""Rows of strings that are written at once."""


@dataclass(frozen=True)
class Samples:
    """What is known of each row."""

    ids: NDArray[np.object_]
    labels: NDArray[np.object_]
    splits: NDArray[np.object_]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    indicator: NDArray[np.uint8] | None = None
    """(N, L), 1 where a label applies, if rows have any number of them."""

    def rows(self, split: str) -> NDArray[np.intp]:
        """Row numbers of a split."""
        return np.flatnonzero(self.splits == split)


def samples_bytes(rows: int, classes: Sequence[str], separator: str | None) -> int:
    """Bytes that ``samples.h5`` may take; exceeded by ids of more than 64 bytes alone.

    HDF5 keeps a string of each row and column in a heap, with 32 bytes beside it.
    """
    names = [len(name.encode()) for name in classes]
    label = max(names) if separator is None else sum(names) + 2 * len(names)
    return 2**15 + rows * (176 + label)


def write_samples(
    path: Path,
    *,
    ids: Iterable[str],
    labels: NDArray[Any],
    classes: Sequence[str],
    separator: str | None = None,
    splits: NDArray[np.uint8],
    n_tokens: NDArray[np.int32],
    truncated: NDArray[np.bool_],
) -> None:
    """Write what is known of each row; row *i* here is row *i* in every layer file.

    Strings are written block by block, so *ids* may be a stream of any length.

    Parameters
    ----------
    labels : (N,) index into *classes*; or, with a *separator*, (N, L), 1 where a label applies
        An indicator becomes the dataset ``labels`` (uint8, attribute ``names``), beside the text
        of ``label``, in which names are joined.
    """
    text = h5py.string_dtype("utf-8")
    count = len(labels)
    blocks = [slice(start, start + STRING_ROWS) for start in range(0, count, STRING_ROWS)]
    stream = iter(ids)
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        columns = [file.create_dataset(name, (count,), text) for name in ("id", "label", "split")]
        for rows in blocks:
            columns[0][rows] = list(islice(stream, STRING_ROWS))
            columns[1][rows] = _label_text(labels[rows], classes, separator)
            columns[2][rows] = np.array(SPLITS, object)[splits[rows]]
        file.create_dataset("n_tokens", data=n_tokens)
        file.create_dataset("truncated", data=truncated)
        if separator is not None:
            several = file.create_dataset("labels", data=labels.astype(np.uint8))
            several.attrs["names"] = np.array(classes, object)


def _label_text(
    labels: NDArray[Any], classes: Sequence[str], separator: str | None
) -> NDArray[np.object_]:
    names = np.array(classes, object)
    if separator is None:
        return np.asarray(names[labels])
    return np.array([separator.join(names[row > 0]) for row in labels], object)


def read_samples(folder: Path) -> Samples:
    """Read ``samples.h5``; `ArtifactError` where it is not what spin writes."""
    path = folder / SAMPLES
    with hdf5.opened(path, EXTRACT_AGAIN) as file:
        rows = hdf5.dataset(file, "label", [hdf5.ANY], hdf5.TEXT).shape
        ids, labels, splits = (
            hdf5.dataset(file, name, rows, hdf5.TEXT) for name in ("id", "label", "split")
        )
        several = (*rows, range(1, MAX_CLASSES + 1))
        samples = Samples(
            ids.asstr()[:], _read_text(labels), _read_text(splits),
            hdf5.read(file, "n_tokens", rows, "iu"), hdf5.read(file, "truncated", rows, "biu"),
            hdf5.read(file, "labels", several, "biu") if "labels" in hdf5.names(file) else None,
        )  # fmt: skip
    if not set(samples.splits) <= set(SPLITS):
        raise ArtifactError(f"{path}: split is not one of {', '.join(SPLITS)} in each row")
    return samples


def _read_text(column: Any) -> NDArray[np.object_]:
    """A column of strings, equal ones as one object: most rows share a label and a split."""
    found = np.empty(column.shape, object)
    known: dict[str, str] = {}
    for start in range(0, len(column), STRING_ROWS):
        part = column.asstr()[start : start + STRING_ROWS]
        found[start : start + STRING_ROWS] = [known.setdefault(text, text) for text in part]
    return found


def separator_of(manifest: dict[str, Any]) -> str | None:
    """What stands between the labels of a row, by an activations manifest; None: one label."""
    found = manifest["request"]["options"]["data"].get("label_separator")
    return None if found is None else str(found)


def read_targets(folder: Path, manifest: dict[str, Any]) -> tuple[Samples, NDArray[np.int64]]:
    """The samples of an activations folder, and what is to be learned.

    Returns
    -------
    Samples
    array, (N,) class codes, or (N, L), 1 where a label applies

    Raises
    ------
    ArtifactError
        The samples are not those that the manifest tells of.
    """
    samples = read_samples(folder)
    wrong = ArtifactError(f"{folder / SAMPLES}: does not agree with the manifest")
    classes = manifest["classes"]
    if len(samples.labels) != manifest["counts"]["rows"]:
        raise wrong
    if separator_of(manifest) is None:
        codes_of = {name: code for code, name in enumerate(classes)}
        if not set(samples.labels) <= set(codes_of):
            raise wrong
        return samples, np.array([codes_of[label] for label in samples.labels], np.int64)
    found = samples.indicator
    if found is None or found.shape != (len(samples.labels), len(classes)):
        raise wrong
    if found.dtype != np.uint8 or found.max(initial=0) > 1:
        raise wrong
    return samples, found.astype(np.int64)
