"""What the numbers in an activations folder are like, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import activations
from spin_cli.activations import Feature
from spin_cli.choices import StorageDtype

BLOCK_VALUES = 2**21
"""Values that are looked at at once: about 30 MiB with all copies."""
RUNS = 16
"""Places that a sample of rows is taken from, evenly spread."""
MASSIVE, RATIO = 100.0, 1000.0
"""An activation is massive if its magnitude is above 100 and 1,000 times the median magnitude of
its vector or more (Sun et al. 2024, "Massive Activations in Large Language Models",
arXiv:2402.17762). They define it for a token's hidden state; here the vectors are pooled ones."""


@dataclass(frozen=True)
class Statistics:
    """Of one matrix, over the rows that were looked at."""

    layer: str
    site: str
    pooling: str
    width: int
    rows: int
    mean: float
    sd: float
    zeros: float
    """Share of values that are exactly 0."""
    largest: float
    """Largest magnitude."""
    largest_neuron: int
    dead: int
    """Neurons that are 0 in every row."""
    constant: int
    """Neurons of one other value in every row."""
    massive: tuple[int, ...]
    """Neurons with a massive activation in some row."""
    overflowed: int
    """Values that were too large for float16, in all rows (as `extract` counted them)."""


def sample_of(rows: int, wanted: int) -> list[slice]:
    """Runs of rows, evenly spread, *wanted* rows in all; all rows if there are no more."""
    if wanted <= 0 or rows <= wanted:
        return [slice(0, rows)]
    size = max(1, wanted // RUNS)
    starts = np.linspace(0, rows - size, max(1, wanted // size)).astype(int)
    return [slice(int(start), int(start) + size) for start in starts]


def summarise(
    folder: Path, feature: Feature, dtype: StorageDtype, runs: list[slice], overflowed: int
) -> Statistics:
    """Look at one matrix, block by block.

    Raises
    ------
    ArtifactError
        The matrix is not what the manifest says, or holds NaN or infinity.
    """
    count, total, squares, zeros = 0, 0.0, 0.0, 0
    low = np.full(feature.width, np.inf, np.float32)
    high = np.full(feature.width, -np.inf, np.float32)
    massive = np.zeros(feature.width, bool)
    for block in _blocks(folder, feature, dtype, runs):
        count += len(block)
        total += float(block.sum(dtype=np.float64))
        squares += float(np.einsum("ij,ij->", block, block, dtype=np.float64))
        zeros += block.size - int(np.count_nonzero(block))
        np.minimum(low, block.min(0), out=low)
        np.maximum(high, block.max(0), out=high)
        massive |= massive_neurons(block)
    n = max(1, count * feature.width)
    mean = total / n
    magnitude = np.maximum(np.abs(low), np.abs(high))
    same = low == high
    return Statistics(
        layer=feature.layer,
        site=feature.site.value,
        pooling=feature.pooling.value,
        width=feature.width,
        rows=count,
        mean=mean,
        sd=max(0.0, squares / n - mean * mean) ** 0.5,
        zeros=zeros / n,
        largest=float(magnitude.max()),
        largest_neuron=int(magnitude.argmax()),
        dead=int((same & (low == 0)).sum()),
        constant=int((same & (low != 0)).sum()),
        massive=tuple(int(neuron) for neuron in np.flatnonzero(massive)),
        overflowed=overflowed,
    )


def massive_neurons(block: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(F,) neurons that are massive in some row of *block* (n, F): see `MASSIVE`."""
    magnitude = np.abs(block)
    some = magnitude.max(1) > MASSIVE  # rows where it is worth to sort
    if not some.any():
        return np.zeros(block.shape[1], bool)
    part = magnitude[some]
    median = np.median(part, axis=1, keepdims=True)
    return np.asarray(((part > MASSIVE) & (part >= RATIO * median)).any(0))


def _blocks(
    folder: Path, feature: Feature, dtype: StorageDtype, runs: list[slice]
) -> Iterator[NDArray[np.float32]]:
    step = max(1, BLOCK_VALUES // feature.width)
    for run in runs:
        for start in range(run.start, run.stop, step):
            rows = min(step, run.stop - start)
            yield activations.read_matrix(folder, feature, rows, dtype, start).astype(np.float32)


def summarise_all(
    folder: Path, manifest: dict[str, Any], wanted: int, progress: Callable[[str, int, int], None]
) -> list[Statistics]:
    """`summarise` every matrix of an activations folder on the same *wanted* rows (0: all)."""
    features = activations.features_of(manifest)
    dtype = StorageDtype(manifest["storage_dtype"])
    runs = sample_of(int(manifest["counts"]["rows"]), wanted)
    lost = [int(entry.get("overflowed", 0)) for entry in manifest["features"]]
    found = []
    for index, (feature, count) in enumerate(zip(features, lost, strict=True)):
        progress("inspect", index, len(features))
        found.append(summarise(folder, feature, dtype, runs, count))
    return found
