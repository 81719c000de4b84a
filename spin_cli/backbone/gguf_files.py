"""Reading a GGUF file once, and of its weights only those of the blocks that are built.

transformers parses the whole file for the configuration, again for the tokenizer and again for the
weights, the vocabulary byte by byte each time, and unpacks every tensor whether the model asks for
it or not. `reading` makes these calls share one pass and leaves out blocks that are not built; what
comes out is the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
from gguf.gguf_reader import GGUFReader
from transformers import modeling_gguf_pytorch_utils as converter

ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.")


class QuickReader(GGUFReader):  # type: ignore[misc] # gguf is untyped
    """gguf's reader, with arrays (of which a vocabulary is one) read in one go."""

    @property
    def data(self) -> Any:
        """The file as plain bytes: indexing a memory map costs more than what is read."""
        return self._bytes

    @data.setter
    def data(self, value: Any) -> None:
        self._bytes = np.asarray(value)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """(size, parts, indices of the values in parts, types), as in gguf's own reader."""
        if raw_type != ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        head: list[Any] = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        if kind == STRING:
            stop, parts = self._strings(start, count)
            indices = list(range(3, 2 + len(parts), 2))
        elif kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            stop, parts = start + int(values.nbytes), [[value] for value in values.tolist()]
            indices = list(range(2, 2 + count))
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return stop - orig_offs, head + parts, indices, [ARRAY, kind] if count else [ARRAY]

    def _strings(self, offset: int, count: int) -> tuple[int, list[Any]]:
        """End offset, and the length and bytes of each of *count* strings in turn."""
        parts: list[Any] = []
        view = memoryview(self._bytes)  # type: ignore[arg-type] # an array is a buffer
        unpack = struct.Struct("=Q").unpack_from
        for _ in range(count):
            (length,) = unpack(view, offset)
            offset += 8
            parts += (length, bytes(view[offset : offset + length]))
            offset += length
            if offset > len(view):
                raise ValueError("GGUF file ends within its metadata")
        return offset, parts


class _Shortened:
    """A file as its reader gives it, without the vocabulary and without blocks not wanted."""

    def __init__(self, reader: GGUFReader, depth: int | None) -> None:
        self.fields = {
            name: field
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.")
        }
        self.tensors = [t for t in reader.tensors if _is_wanted(t.name, depth)]


def _is_wanted(name: str, depth: int | None) -> bool:
    block = BLOCK.match(name)
    if block is not None and depth is not None:
        return int(block[1]) < depth
    return name != "output.weight"  # what turns the last layer into words


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let *name* in *module* mean *value* for a while."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextlib.contextmanager
def reading(depth: int | None = None) -> Iterator[None]:
    """Within it, transformers reads a GGUF file once and unpacks the first *depth* blocks alone.

    Parameters
    ----------
    depth : int, optional
        Blocks that the model is built with; None: all.
    """
    load = converter.load_gguf_checkpoint
    open_once = functools.cache(QuickReader)

    @functools.cache
    def parse_once(path: Any) -> Any:
        with _replaced(gguf, "GGUFReader", open_once):
            return load(path, return_tensors=False)

    def load_quickly(path: Any, return_tensors: bool = False, **options: Any) -> Any:
        if not return_tensors:
            return copy.deepcopy(parse_once(path))
        with _replaced(gguf, "GGUFReader", lambda p: _Shortened(open_once(p), depth)):
            return load(path, return_tensors=True, **options)

    names: Callable[..., Any] = functools.cache(gguf.get_tensor_name_map)
    with (
        _replaced(converter, "load_gguf_checkpoint", load_quickly),
        _replaced(gguf, "get_tensor_name_map", names),
        _replaced(converter, "tqdm", lambda items, **_options: items),  # a bar without a switch
    ):
        yield
