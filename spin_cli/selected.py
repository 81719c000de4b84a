"""What a selection folder holds, read: masks and scores.

Both may come from a stranger, so ranges, shapes and sizes are checked before use.
"""

from __future__ import annotations

import csv
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import hdf5
from spin_cli.config import MAX_WIDTH
from spin_cli.errors import ArtifactError

MASKS, PROBES, SCORES = "masks.h5", "probes.safetensors", "scores.csv"
MEND = "Make it again: spin select … --force"
MAX_SCORES_BYTES = 64 * 2**20
SLACK = 1e-6
"""Of shares, for rounding."""
Key = tuple[str, str, str]
"""Layer, site and pooling of a matrix."""


@dataclass(frozen=True)
class Mask:
    """A matrix's neurons by importance."""

    neurons: NDArray[np.int32]
    """(n,), most important first."""
    cumulative: NDArray[np.float64]
    """(n,), share of all importance that the first 1, 2, … reach."""
    width: int
    """Of the matrix."""


def open_masks(folder: Path) -> AbstractContextManager[Any]:
    """The masks' file, for the functions here."""
    return hdf5.opened(folder / MASKS, MEND)


def matrices(file: Any) -> list[Key]:
    """All matrices that there are masks of."""
    return [
        (layer, site, pooling)
        for layer in hdf5.names(file)
        for site in hdf5.names(file, layer)
        for pooling in hdf5.names(file, f"{layer}/{site}")
    ]


def read_mask(file: Any, key: Key, width: int | None = None) -> Mask:
    """The mask of a matrix; *width*: that of the matrix, where it is known.

    Raises
    ------
    ArtifactError
        Anything is missing, of the wrong type, shape or range.
    """
    group = "/".join(key)
    own = hdf5.number(file, group, "width")
    if own not in range(1, MAX_WIDTH + 1) or (width is not None and own != width):
        right = f"1 to {MAX_WIDTH}" if width is None else width
        raise ArtifactError(f"{file.filename}: {group} has width {own:g}, expected {right}", MEND)
    neurons = hdf5.read(file, f"{group}/neurons", [range(int(own) + 1)], "iu")
    shares = hdf5.read(file, f"{group}/cumulative", neurons.shape, "f").astype(np.float64)
    if len(neurons) and not 0 <= neurons.min() <= neurons.max() < own:
        raise ArtifactError(f"{file.filename}: {group}/neurons are not below {own:g}", MEND)
    if len(np.unique(neurons)) < len(neurons):
        raise ArtifactError(f"{file.filename}: {group}/neurons has the same one twice", MEND)
    bounds = np.concatenate([[0.0], shares, [1.0]])
    if not (np.diff(bounds) >= -SLACK).all():  # nor is NaN
        raise ArtifactError(
            f"{file.filename}: {group}/cumulative does not rise from 0 to 1 at most", MEND
        )
    return Mask(neurons.astype(np.int32), shares, int(own))


def read_importance(file: Any, key: Key, mask: Mask) -> NDArray[np.float64]:
    """(n,) importance of a mask's neurons."""
    name = "/".join((*key, "importance"))
    return hdf5.read(file, name, mask.neurons.shape, "f").astype(np.float64)


def read_class_importance(
    file: Any, key: Key, mask: Mask, n_classes: int
) -> NDArray[np.float64] | None:
    """(K, n) importance of a mask's neurons by class; None where it is not there."""
    if "class_importance" not in hdf5.names(file, "/".join(key)):
        return None
    name = "/".join((*key, "class_importance"))
    return hdf5.read(file, name, (n_classes, len(mask.neurons)), "f").astype(np.float64)


def read_scores(folder: Path) -> list[dict[str, str]]:
    """The rows of ``scores.csv``, all values as text.

    Raises
    ------
    ArtifactError
        The file is missing, has no scores, or something else where there should be a number.
    """
    path = folder / SCORES
    try:
        if path.stat().st_size > MAX_SCORES_BYTES:
            raise ValueError(f"larger than {MAX_SCORES_BYTES} bytes")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        if not rows:
            raise ValueError("no rows")
        for row in rows:
            _check_row(row)
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"{path}: not the scores of spin ({error})", MEND) from error
    return rows


def _check_row(row: dict[Any, Any]) -> None:
    if missing := {"layer", "site", "pooling", "val_score", "width"} - set(row):
        raise ValueError(f"no column {sorted(missing)[0]}")
    if None in row or None in row.values():
        raise ValueError("rows of different lengths")
    for name, text in row.items():
        whole = name == "width" or name.startswith("neurons_eta_")
        if whole and not (text.isascii() and text.isdigit() and int(text) <= MAX_WIDTH):
            raise ValueError(f"{name} is {text[:20]!r}, expected a whole number up to {MAX_WIDTH}")
        if name in ("val_score", "C") and not math.isfinite(float(text)):
            raise ValueError(f"{name} is {text[:20]!r}")
