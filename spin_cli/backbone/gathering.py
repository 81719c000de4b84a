"""Pooled vectors of many texts: batches planned, windows joined, memory respected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spin_cli.backbone.batching import Encoded, Part, plan_for
from spin_cli.backbone.fetching import Fetched, release, taking_turns
from spin_cli.backbone.loading import Backbone
from spin_cli.backbone.reading import Check, Wanted, read, unchecked
from spin_cli.backbone.replicas import models_of, run_on
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import ModelError

Key = tuple[str, Site, Pooling]
Store = Callable[[str, Site, Pooling, Sequence[int], NDArray[Any]], None]
"""Takes (layer, site, pooling, rows, (n, F) values) of every row and key.

Values are there during the call alone. Where memory ran out in the middle of a batch, its rows come
again, with the same meaning."""
Task = Callable[[], None]
Later = Callable[[Task], None]
"""Calls what it is given, at once or on another thread, in the order in which it was given."""
STORED_AT_ONCE = ("cpu",)
"""Devices that do not go on while a vector is copied and stored."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""What errors say that torch does not raise as `torch.OutOfMemoryError`: of the C library, of
cuBLAS's workspace, of pinned memory."""
STORED = {
    StorageDtype.FLOAT16: torch.float16,
    StorageDtype.BFLOAT16: torch.bfloat16,
    StorageDtype.FLOAT32: torch.float32,
}
"""torch's name for each storage format; numpy, too, rounds to nearest, ties to even."""
FLOAT16_MAX = torch.finfo(torch.float16).max
"""What is stored in float16 of a number that it cannot hold."""


def as_stored(vectors: torch.Tensor, dtype: StorageDtype) -> torch.Tensor:
    """float32 vectors in a format of the disk, as they are once `extract` has stored them.

    Numbers that float16 cannot hold become its largest; NaN remains, and so do the infinities of
    the other formats: `extract` refuses these.
    """
    if dtype is StorageDtype.FLOAT16:
        vectors = vectors.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return vectors.to(STORED[dtype])


def at_once(task: Task) -> None:
    """Call *task*."""
    task()


class MemoryWarning(UserWarning):
    """Batches were made smaller, since the device ran out of memory."""


def gather(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    wanted: Wanted,
    store: Store,
    done: Callable[[int], None] | None = None,
    *,
    dtype: StorageDtype = StorageDtype.FLOAT32,
    later: Later = at_once,
) -> None:
    """Read every wanted vector of every text.

    Parameters
    ----------
    backbone : Backbone
    encoded : the texts; rows are positions in it
    wanted : the (layer, site) pairs and their poolings
    store : called batch by batch; on a CPU by several threads, each with rows of its own
    done : called with the number of texts read so far
    dtype : format in which *store* is given vectors, as on the disk: of bfloat16 the bits, uint16
    later : is given what stores a batch, to call it at once or on another thread while the next
        batch runs; a CPU has stored most of it by then

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
    out = _Out(store, dtype, later)
    whole = [row for row, item in enumerate(encoded) if not item.parts]
    finished = 0

    def count(rows: int) -> None:
        nonlocal finished
        finished += rows
        if done is not None:
            done(finished)

    texts = [(row, Part(encoded[row].ids, 0, len(encoded[row].ids))) for row in whole]
    _read_all(backbone, texts, wanted, out, count)
    if len(whole) < len(encoded):
        joined = [row for row, item in enumerate(encoded) if item.parts]
        _gather_parts(backbone, joined, [encoded[row].parts for row in joined], wanted, out)
        count(len(joined))


@dataclass(frozen=True)
class _Out:
    """Where vectors go; see `gather`."""

    store: Store
    dtype: StorageDtype
    later: Later
    once: bool = False
    """No row may come again, and rows come in order."""
    check: Check = unchecked
    """Raises where the vectors are not wanted any more."""


def _read_all(
    backbone: Backbone,
    items: Sequence[tuple[int, Part]],
    wanted: Wanted,
    out: _Out,
    done: Callable[[int], None] | None = None,
) -> None:
    """Read items, each of a row, in batches, and tell *done* of how many after each."""
    lengths = [len(part.ids) for _, part in items]
    batches = plan_for(backbone, lengths)
    batches.sort(key=lambda batch: -len(batch) * lengths[batch[0]])

    def run(model: nn.Module, batch: list[int], check: Check) -> list[Task]:
        stores: list[Task] = []
        rows, parts = [items[number][0] for number in batch], [items[number][1] for number in batch]
        own = replace(out, later=stores.append, check=check)
        # What is stored at once is waited for: nothing would run beside it.
        with nullcontext() if out.later is at_once else taking_turns(backbone):
            _read(replace(backbone, model=model), rows, parts, wanted, own)
        return stores

    with run_on(models_of(backbone, len(batches)), run, batches) as results:
        for batch, stores in zip(batches, results, strict=True):
            for store in stores:
                out.later(store)
            if done is not None:
                done(len(batch))


def _gather_parts(
    backbone: Backbone,
    rows: Sequence[int],
    parts: Sequence[Sequence[Part]],
    wanted: Wanted,
    out: _Out,
) -> None:
    """Read texts of several windows, and pool over all of a text's windows as over one text."""
    joined = _Joined(parts)
    one_by_one = _Out(joined.add, StorageDtype.FLOAT32, out.later, once=True)
    items = [(number, part) for number, (_, part) in enumerate(joined.items)]
    _read_all(backbone, items, wanted, one_by_one)

    def store() -> None:
        for key, vectors in joined.pooled():
            out.store(*key, rows, bits(torch.from_numpy(vectors).to(STORED[out.dtype])))

    out.later(store)


class _Joined:
    """Vectors of texts of several windows, pooled as their windows come in, in any order."""

    def __init__(self, texts: Sequence[Sequence[Part]]) -> None:
        self.items = [(index, part) for index, own in enumerate(texts) for part in own]
        self._heads = {id(own[0]) for own in texts}
        self._tails = {id(own[-1]) for own in texts}
        counts = [sum(part.count for part in own) for own in texts]
        self._counts = np.array(counts, np.float32)[:, None]
        self._found: dict[Key, NDArray[np.float32]] = {}

    def add(
        self, layer: str, site: Site, pooling: Pooling, at: Sequence[int], vectors: NDArray[Any]
    ) -> None:
        """Take the vectors of the windows *at* these places among the items."""
        key = layer, site, pooling
        if key not in self._found:
            start = -np.inf if pooling is Pooling.MAX else 0.0
            self._found[key] = np.full((len(self._counts), vectors.shape[1]), start, np.float32)
        total = self._found[key]
        for number, vector in zip(at, vectors, strict=True):
            index, part = self.items[number]
            if pooling is Pooling.MEAN:
                total[index] += vector * part.count
            elif pooling is Pooling.MAX:
                np.maximum(total[index], vector, out=total[index])
            elif id(part) in (self._heads if pooling is Pooling.FIRST else self._tails):
                total[index] = vector

    def pooled(self) -> Iterator[tuple[Key, NDArray[np.float32]]]:
        """Every key and its vectors (n, F); to be gone through once."""
        for key, total in self._found.items():
            if key[2] is Pooling.MEAN:
                total /= self._counts
            yield key, total


def _read(
    backbone: Backbone, rows: Sequence[int], parts: Sequence[Part], wanted: Wanted, out: _Out
) -> None:
    """Read one batch, or its halves where it does not fit into memory."""
    if _stored(backbone, rows, parts, wanted, out):
        return
    release(backbone)
    if len(parts) == 1:  # what other batches left behind may have been in the way
        if _stored(backbone, rows, parts, wanted, out):
            return
        raise ModelError(
            f"row {rows[0]} of its window: {len(parts[0].ids)} tokens do not fit into the memory of"
            f" {backbone.device}",
            "Give a smaller --max-length, or another --dtype or --device.",
        )
    warnings.warn(
        f"{len(rows)} texts at once did not fit into the memory of {backbone.device}: halved."
        " A smaller --batch-tokens avoids the detour",
        MemoryWarning,
        stacklevel=2,
    )
    middle = len(rows) // 2
    for half in (slice(middle), slice(middle, None)):
        _read(backbone, rows[half], parts[half], wanted, out)


def _stored(
    backbone: Backbone, rows: Sequence[int], parts: Sequence[Part], wanted: Wanted, out: _Out
) -> bool:
    """Run one batch and have it stored; False where the device has not enough memory."""
    try:
        out.later(_run(backbone, rows, parts, wanted, out))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _run(
    backbone: Backbone, rows: Sequence[int], parts: Sequence[Part], wanted: Wanted, out: _Out
) -> Task:
    """Run one batch; returns what stores that which is not stored yet.

    What becomes known is stored at once, for small tensors that wait between the large ones of the
    forward pass break up memory. They do wait where a row may not come again, and on a GPU, which
    goes on while the processor stores them.
    """
    keys: list[Key] = []
    fetched = Fetched(backbone)
    wait = out.once or backbone.device.type not in STORED_AT_ONCE

    def keep(layer: str, site: Site, pooling: Pooling, vectors: torch.Tensor) -> None:
        vectors = vectors.to(STORED[out.dtype])
        if wait:
            keys.append((layer, site, pooling))
            fetched.add(vectors)
        else:
            out.store(layer, site, pooling, rows, bits(vectors.cpu()))

    spans = [(part.start, part.stop) for part in parts]
    read(backbone, [part.ids for part in parts], wanted, keep, spans=spans, check=out.check)
    fetched.close()

    def store() -> None:
        for key, vectors in zip(keys, fetched.used(), strict=True):  # to the end of both
            out.store(*key, rows, bits(vectors))

    return store


def bits(vectors: torch.Tensor) -> NDArray[Any]:
    """Vectors in main memory as an array; of bfloat16, which numpy lacks, the bits as uint16."""
    if vectors.dtype is torch.bfloat16:
        return np.asarray(vectors.view(torch.int16).numpy().view(np.uint16))
    return np.asarray(vectors.numpy())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether *error* says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )
