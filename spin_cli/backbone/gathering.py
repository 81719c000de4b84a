"""Pooled vectors of many texts: batches planned, windows joined, memory respected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli.backbone.batching import Encoded, Part, plan_batches
from spin_cli.backbone.loading import Backbone
from spin_cli.backbone.reading import Wanted, read
from spin_cli.choices import Pooling, Site
from spin_cli.errors import ModelError

Key = tuple[str, Site, Pooling]
Store = Callable[[str, Site, Pooling, Sequence[int], NDArray[np.float32]], None]
"""Takes (layer, site, pooling, rows, (n, F) float32) of every row and key.

Where memory ran out in the middle of a batch, its rows come again, with the same meaning."""


class MemoryWarning(UserWarning):
    """Batches were made smaller, since the device ran out of memory."""


def gather(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    wanted: Wanted,
    store: Store,
    done: Callable[[int], None] | None = None,
) -> None:
    """Read every wanted vector of every text.

    Parameters
    ----------
    backbone : Backbone
    encoded : the texts; rows are positions in it
    wanted : the (layer, site) pairs and their poolings
    store : called batch by batch
    done : called with the number of texts read so far

    Raises
    ------
    ModelError
        A single text does not fit into the device's memory.

    Warns
    -----
    MemoryWarning
        A batch did not fit and was halved. Vectors can then differ in their last bits from those
        of a run whose batches all fitted.
    """
    whole = [row for row, item in enumerate(encoded) if not item.parts]
    finished = 0

    def count(rows: int) -> None:
        nonlocal finished
        finished += rows
        if done is not None:
            done(finished)

    lengths = [len(encoded[row].ids) for row in whole]
    for batch in plan_batches(lengths, backbone.batch_tokens):
        rows = [whole[index] for index in batch]
        parts = [Part(encoded[row].ids, 0, len(encoded[row].ids)) for row in rows]
        _read(backbone, rows, parts, wanted, store)
        count(len(rows))
    if len(whole) < len(encoded):
        joined = [row for row, item in enumerate(encoded) if item.parts]
        _gather_parts(backbone, joined, [encoded[row].parts for row in joined], wanted, store)
        count(len(joined))


def _gather_parts(
    backbone: Backbone,
    rows: Sequence[int],
    parts: Sequence[Sequence[Part]],
    wanted: Wanted,
    store: Store,
) -> None:
    """Read texts of several windows, and pool over all of a text's windows as over one text."""
    items = [(index, part) for index, own in enumerate(parts) for part in own]
    heads = {id(own[0]) for own in parts}
    tails = {id(own[-1]) for own in parts}
    sums: dict[Key, NDArray[np.float32]] = {}
    counts = np.array([sum(part.count for part in own) for own in parts], np.float32)[:, None]

    def join(
        layer: str, site: Site, pooling: Pooling, at: Sequence[int], vectors: NDArray[np.float32]
    ) -> None:
        key = layer, site, pooling
        if key not in sums:
            start = -np.inf if pooling is Pooling.MAX else 0.0
            sums[key] = np.full((len(rows), vectors.shape[1]), start, np.float32)
        total = sums[key]
        for number, vector in zip(at, vectors, strict=True):
            index, part = items[number]
            if pooling is Pooling.MEAN:
                total[index] += vector * part.count
            elif pooling is Pooling.MAX:
                np.maximum(total[index], vector, out=total[index])
            elif id(part) in (heads if pooling is Pooling.FIRST else tails):
                total[index] = vector

    for batch in plan_batches([len(part.ids) for _, part in items], backbone.batch_tokens):
        _read(backbone, batch, [items[number][1] for number in batch], wanted, join, once=True)
    for (layer, site, pooling), total in sums.items():
        if pooling is Pooling.MEAN:
            total /= counts
        store(layer, site, pooling, rows, total)


def _read(
    backbone: Backbone,
    rows: Sequence[int],
    parts: Sequence[Part],
    wanted: Wanted,
    store: Store,
    *,
    once: bool = False,
) -> None:
    """Read one batch, or its halves where it does not fit into memory.

    What becomes known is stored at once, for small tensors that wait between the large ones of the
    forward pass break up memory. They do wait where *store* may be called only *once* for a row,
    and on a GPU, whose copies run beside the layers that follow.
    """
    found: list[tuple[Key, torch.Tensor]] = []
    wait = once or backbone.device.type != "cpu"
    # Of several GPUs only the first one is waited for below.
    together = backbone.options.device_map is None

    def keep(layer: str, site: Site, pooling: Pooling, vectors: torch.Tensor) -> None:
        if wait:
            found.append(((layer, site, pooling), vectors.to("cpu", non_blocking=together)))
        else:
            store(layer, site, pooling, rows, vectors.cpu().numpy())

    try:
        spans = [(part.start, part.stop) for part in parts]
        read(backbone, [part.ids for part in parts], wanted, keep, spans=spans)
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found.clear()
        if len(parts) == 1:
            raise ModelError(
                f"row {rows[0]} of its window: {len(parts[0].ids)} tokens do not fit into the"
                f" memory of {backbone.device}",
                "Give a smaller --max-length, or another --dtype or --device.",
            ) from error
    else:
        for (layer, site, pooling), vectors in found:
            store(layer, site, pooling, rows, vectors.numpy())
        return
    warnings.warn(
        f"{len(rows)} texts at once did not fit into the memory of {backbone.device}: halved."
        " A smaller --batch-tokens avoids the detour",
        MemoryWarning,
        stacklevel=2,
    )
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(rows) // 2
    _read(backbone, rows[:middle], parts[:middle], wanted, store, once=once)
    _read(backbone, rows[middle:], parts[middle:], wanted, store, once=once)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether *error* says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
