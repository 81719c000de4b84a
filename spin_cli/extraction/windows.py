"""Reading and storing one window: consecutive rows whose vectors wait in memory together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import activations, backbone
from spin_cli.activations import Feature
from spin_cli.backbone import FLOAT16_MAX, Backbone, Encoded
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import ModelError

INFINITY, MINUS_INFINITY = 0x7C00, 0xFC00
"""Bits of float16's infinities; NaN of the same sign has larger ones, every number smaller ones."""
Blocks = dict[Feature, NDArray[Any]]


def wanted_of(features: Sequence[Feature]) -> dict[tuple[str, Site], list[Pooling]]:
    """What `backbone.gather` is asked for."""
    wanted: dict[tuple[str, Site], list[Pooling]] = {}
    for feature in features:
        wanted.setdefault((feature.layer, feature.site), []).append(feature.pooling)
    return wanted


def make_blocks(features: Sequence[Feature], rows: int, dtype: StorageDtype) -> Blocks:
    """Room for so many rows of every feature, as parts of one allocation.

    Pieces of a few MB each would lie between the tensors of the forward pass, and what these leave
    behind could not be used again: with them, a process grows by hundreds of MB. torch allocates,
    for it asks for huge pages (see `heap`).
    """
    disk = activations.DISK_DTYPES[dtype]
    count = rows * sum(feature.width for feature in features)
    room = torch.empty(count * disk.itemsize, dtype=torch.uint8).numpy().view(disk)
    blocks, start = {}, 0
    for feature in features:
        stop = start + rows * feature.width
        blocks[feature] = room[start:stop].reshape(rows, feature.width)
        start = stop
    return blocks


def read_rows_into(
    model: Backbone,
    encoded: Sequence[Encoded],
    features: Sequence[Feature],
    *,
    dtype: StorageDtype = StorageDtype.FLOAT32,
    done: Callable[[int], None] | None = None,
    blocks: Blocks | None = None,
    later: backbone.Later = backbone.at_once,
) -> Blocks:
    """Read all *features* of some texts.

    Parameters
    ----------
    blocks : from `make_blocks`, with room for at least as many rows; default new ones
    later : see `backbone.gather`

    Returns
    -------
    dict of arrays (n, F), in the disk format of *dtype*, rows as in *encoded*; filled when all that
    *later* was given is done
    """
    if blocks is None:
        blocks = make_blocks(features, len(encoded), dtype)
    blocks = {feature: blocks[feature][: len(encoded)] for feature in features}
    by_key = {(f.layer, f.site, f.pooling): f for f in features}

    def store(
        layer: str, site: Site, pooling: Pooling, rows: Sequence[int], vectors: NDArray[Any]
    ) -> None:
        blocks[by_key[layer, site, pooling]][rows] = vectors

    backbone.gather(model, encoded, wanted_of(features), store, done, dtype=dtype, later=later)
    return blocks


def compute_window(
    model: Backbone,
    features: Sequence[Feature],
    dtype: StorageDtype,
    encoded: Sequence[Encoded],
    done: Callable[[int], None] | None = None,
    blocks: Blocks | None = None,
    later: backbone.Later = backbone.at_once,
) -> tuple[Blocks, NDArray[np.int32]]:
    """Read all features of consecutive rows, into *blocks* where given (see `read_rows_into`).

    Returns
    -------
    blocks : dict of arrays (n, F), in their disk dtype, rows in input order
    lengths : (n,) int32
        Tokens of each text; negative where it was cut.
    """
    blocks = read_rows_into(
        model, encoded, features, dtype=dtype, done=done, blocks=blocks, later=later
    )
    lengths = np.array([e.n_tokens * (-1 if e.truncated else 1) for e in encoded], np.int32)
    return blocks, lengths


def settle_overflow(
    block: NDArray[Any], feature: Feature, first_row: int, dtype: StorageDtype, compute: str
) -> int:
    """Set values that float16 could not hold to its largest number; how many they were.

    Parameters
    ----------
    block : (n, F), in the disk format of *dtype*; changed in place
    compute : number format that the model computed in

    Raises
    ------
    ModelError
        NaN, or an infinity that the number format on the disk is not to blame for.
    """
    if dtype is StorageDtype.FLOAT16:
        # Not with torch: in this thread it would start threads beside those of the forward pass.
        # The sign is the first bit, so the largest bits are those of the most negative number if
        # read as unsigned, and of the most positive one if read as signed.
        signed, unsigned = block.view(np.int16), block.view(np.uint16)
        if signed.max(initial=0) < INFINITY and unsigned.max(initial=0) < MINUS_INFINITY:
            return 0
        flawed = ~np.isfinite(block)
        if compute != "float16" and not np.isnan(block).any():
            np.clip(block, -FLOAT16_MAX, FLOAT16_MAX, out=block)
            return int(flawed.sum())
    else:
        flawed = ~np.isfinite(activations.from_disk(block, dtype))
        if not flawed.any():
            return 0
    row, column = np.argwhere(flawed)[0]
    value = activations.from_disk(block, dtype)[row, column]
    raise ModelError(
        f"row {first_row + row}: {feature.layer} {feature.dataset} neuron {column} is {value},"
        f" computed in {compute} ({int(flawed.sum())} such values among {len(block)} rows)",
        "Try --dtype float32 or bfloat16; a model that gives NaN in float32 is damaged.",
    )


def write_at(path: Path, values: NDArray[Any], place: int) -> None:
    """Write *values* at byte *place* of a file that exists, and sync it."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())
