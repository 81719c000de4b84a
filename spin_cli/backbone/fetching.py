"""What a GPU does by itself while the processor goes on: batches in turn, vectors copied from it.

One GPU alone: of several only the first one could be waited for, and Apple's could not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import cycle
from queue import Empty, SimpleQueue
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spin_cli.backbone.discovery import keeps_nothing
from spin_cli.backbone.loading import Backbone
from spin_cli.backbone.reading import turn_of

Rooms = SimpleQueue[torch.Tensor]
"""Main memory (uint8) that nothing is copied to at the moment."""
_pure: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
FETCHED_BYTES = 64 * 2**20
"""Vectors on a GPU are copied from it, and freed there, before they would be of more bytes."""


def is_one_gpu(backbone: Backbone) -> bool:
    """Whether the model is on one CUDA device as a whole."""
    return backbone.device.type == "cuda" and backbone.options.device_map is None


@contextmanager
def taking_turns(backbone: Backbone) -> Iterator[None]:
    """Have a GPU run what it is told within this beside what it was told the time before.

    One batch alone leaves gaps: a model asks its device for a result (is anything padded?) and so
    waits for all that it was told before, and only then goes on to tell it more. What is asked on
    one stream does not wait for the other, and pooling, which waits for memory, runs beside matrix
    products, which do not.
    """
    if not _may_overlap(backbone):
        yield
        return
    stream = next(_streams(backbone.device))
    stream.wait_stream(torch.cuda.current_stream(backbone.device))
    with torch.cuda.stream(stream):
        yield


def _may_overlap(backbone: Backbone) -> bool:
    """Whether no pass can come into the way of another.

    Foreign code and the kernels of quantised checkpoints (but bitsandbytes') may write where the
    last pass still reads; AMD's matrix products share what they keep for a thread.
    """
    model, options = backbone.model, backbone.options
    if not is_one_gpu(backbone) or torch.version.hip is not None or options.trust_remote_code:
        return False
    if getattr(model, "hf_quantizer", None) is not None and options.bits is None:
        return False
    with turn_of(model):
        if model not in _pure:
            _pure[model] = keeps_nothing(model)
        return _pure[model]


@cache
def _streams(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Two, in turn; always the same ones, for freed memory is kept for each."""
    return cycle([torch.cuda.Stream(device) for _ in range(2)])  # type: ignore[no-untyped-call]


def release(backbone: Backbone) -> None:
    """Hand back the memory that is kept for batches to come, once those told are done."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
        torch.cuda.empty_cache()


class Fetched:
    """Vectors of one batch that wait in main memory to be stored.

    From a GPU they come in a few copies: its next layer waits for every one.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._device = backbone.device
        self._together = is_one_gpu(backbone)
        self._there: list[torch.Tensor] = []
        self._held = 0
        self._here: list[torch.Tensor] = []
        self._rooms: list[torch.Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def add(self, vectors: torch.Tensor) -> None:
        """Take vectors (B, F) of the batch, all of one dtype."""
        if not self._together:
            self._here.append(vectors.cpu())
            return
        if self._held + vectors.nbytes > FETCHED_BYTES:
            self._copy()
        self._there.append(vectors)
        self._held += vectors.nbytes

    def close(self) -> None:
        """Have copied what is left; nothing is added behind this."""
        if self._together:
            self._copy()
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # keeps no core busy
            self._copied.record(torch.cuda.current_stream(self._device))

    def used(self) -> Iterator[torch.Tensor]:
        """Give all in order, once they are here; to be gone through once, on any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        yield from self._here
        self._here.clear()
        while self._rooms:
            _idle(self._device).put(self._rooms.pop())

    def _copy(self) -> None:
        if self._there:
            vectors, room = fetch(self._there, _idle(self._device))
            self._here += vectors
            self._rooms.append(room)
            self._there.clear()
            self._held = 0


@cache
def _idle(_device: torch.device) -> Rooms:
    """Kept for good: to get memory that a GPU copies to stops it for 40 ms each time."""
    return SimpleQueue()


@torch.inference_mode()
def fetch(vectors: Sequence[torch.Tensor], idle: Rooms) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Copy tensors of one device and dtype to main memory; of a GPU's the copy may still run.

    Parameters
    ----------
    vectors : at least one
    idle : one of these is copied to where there is one

    Returns
    -------
    the copies, and the memory in which they are; to be put into *idle* when they were used
    """
    flat = torch.cat([each.reshape(-1) for each in vectors])
    room = None
    with suppress(Empty):
        room = idle.get_nowait()
    if room is None or len(room) < flat.nbytes:
        size = 1 << (flat.nbytes - 1).bit_length()
        room = torch.empty(size, dtype=torch.uint8, pin_memory=flat.is_cuda)
    here = room[: flat.nbytes].view(flat.dtype)
    parts = torch.split(here.copy_(flat, non_blocking=True), [each.numel() for each in vectors])
    return [part.view(each.shape) for part, each in zip(parts, vectors, strict=True)], room
