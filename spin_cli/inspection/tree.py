"""The tree of any HDF5 file, and the tensors of any safetensors file.

The files may be anybody's. Of HDF5, no data are read but small attributes; soft and external links
are named and not followed (an external one can name any file of this machine), nor are sources of
virtual datasets; a group that is linked twice is shown once, so cycles end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors import SafetensorError, safe_open

from spin_cli.errors import ArtifactError
from spin_cli.hdf5 import UNREADABLE

MAX_OBJECTS = 20_000
MAX_DEPTH = 50
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 2**16
MAX_TEXT = 200
"""Characters of an attribute that are kept."""


def readable(name: Any) -> str:
    """*name* as text that can be printed; bytes that are no UTF-8, h5py's or in text, escaped."""
    if isinstance(name, bytes):
        return name.decode("utf-8", "backslashreplace")
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def hdf5_tree(path: Path) -> list[dict[str, Any]]:
    """Every object of an HDF5 file, groups before what is in them.

    Returns
    -------
    list of dict
        ``name``; ``depth``; ``kind`` (``group``, ``dataset``, ``type``, ``soft link``,
        ``external link``, ``seen above``, ``unreadable``, ``left out``); of datasets ``shape``,
        ``dtype``, ``bytes`` on the disk, ``chunks``, ``filters``, ``sources`` (other files that
        its values stand in); of links ``target``; ``attributes``.

    Raises
    ------
    ArtifactError
        The file cannot be opened.
    """
    found: list[dict[str, Any]] = []
    try:
        with h5py.File(path, "r") as file:
            root = {"name": "/", "depth": 0, "kind": "group", "attributes": _attributes(file)}
            found.append(root)
            _walk(file, 1, found, {_address(file)})
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    return found


def _address(item: Any) -> int:
    return int(h5py.h5o.get_info(item.id).addr)


def _walk(group: Any, depth: int, found: list[dict[str, Any]], seen: set[int]) -> None:
    for name in group:
        if len(found) > MAX_OBJECTS or depth > MAX_DEPTH:
            if found[-1]["kind"] != "left out":
                found.append({"name": "…", "depth": depth, "kind": "left out"})
            return
        entry: dict[str, Any] = {"name": readable(name), "depth": depth}
        found.append(entry)
        try:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                target = f"{readable(link.filename)}:{readable(link.path)}"
                entry |= {"kind": "external link", "target": target}
            elif isinstance(link, h5py.SoftLink):
                entry |= {"kind": "soft link", "target": readable(link.path)}
            else:
                _describe(group[name], entry, found, seen)
        except UNREADABLE as error:
            entry |= {"kind": "unreadable", "why": _cut(str(error))}


def _describe(
    item: Any, entry: dict[str, Any], found: list[dict[str, Any]], seen: set[int]
) -> None:
    if isinstance(item, h5py.Group):
        address = _address(item)
        if address in seen:
            entry["kind"] = "seen above"
            return
        seen.add(address)
        entry |= {"kind": "group", "attributes": _attributes(item)}
        _walk(item, entry["depth"] + 1, found, seen)
    elif isinstance(item, h5py.Dataset):
        entry |= {"kind": "dataset", **_dataset(item), "attributes": _attributes(item)}
    else:
        entry |= {"kind": "type", "dtype": _cut(str(item.dtype))}


def _dataset(item: Any) -> dict[str, Any]:
    plan = item.id.get_create_plist()
    sources = []
    if item.is_virtual:
        sources = sorted({source.file_name for source in item.virtual_sources()})
    elif plan.get_external_count():
        sources = [readable(plan.get_external(i)[0]) for i in range(plan.get_external_count())]
    filters = [readable(plan.get_filter(i)[3]) for i in range(plan.get_nfilters())]
    return {
        "shape": None if item.shape is None else list(item.shape),
        "dtype": _dtype(item),
        "bytes": int(item.id.get_storage_size()),
        "chunks": list(item.chunks) if item.chunks else None,
        "filters": filters,
        "sources": [readable(name) for name in sources[:MAX_ATTRIBUTES]],
    }


def _dtype(item: Any) -> str:
    """The name of a type; strings, references and enums by what they are to people."""
    dtype = item.dtype
    if h5py.check_string_dtype(dtype) is not None:
        return "string"
    if h5py.check_ref_dtype(dtype) is not None:
        return "reference"
    if (inner := h5py.check_vlen_dtype(dtype)) is not None:
        return _cut(f"lists of {inner}")
    if h5py.check_enum_dtype(dtype) is not None:
        return f"enum ({dtype})"
    return _cut(str(dtype))


def _attributes(item: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        names = list(item.attrs)
        for name in names[:MAX_ATTRIBUTES]:
            found[readable(name)] = _attribute(item.attrs, name)
        if len(names) > MAX_ATTRIBUTES:
            found["…"] = f"{len(names) - MAX_ATTRIBUTES} more"
    except UNREADABLE as error:
        found["…"] = f"unreadable ({_cut(str(error))})"
    return found


def _attribute(attributes: Any, name: str) -> str:
    try:
        identity = attributes.get_id(name)
        if identity.get_storage_size() > MAX_ATTRIBUTE_BYTES:
            return f"{identity.shape} {identity.dtype}, not shown"
        value = attributes[name]
    except UNREADABLE as error:
        return f"unreadable ({_cut(str(error))})"
    if isinstance(value, np.ndarray):
        with np.printoptions(threshold=20, edgeitems=5):
            return _cut(np.array2string(value, separator=", ", max_line_width=10**6))
    return _cut(readable(value))


def _cut(text: str) -> str:
    text = readable(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def tensors(path: Path) -> dict[str, Any]:
    """Name, shape, dtype and bytes of each tensor of a safetensors file, and its metadata.

    Raises
    ------
    ArtifactError
        The file's header is not valid.
    """
    bits = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F4": 4}
    try:
        with safe_open(path, "np") as file:
            found = []
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                size = bits.get(dtype) or int("".join(c for c in dtype if c.isdigit())[:2] or 0)
                total = int(np.prod(shape, dtype=object)) * size // 8
                found.append(
                    {"name": readable(name), "shape": shape, "dtype": dtype, "bytes": total}
                )
            pairs = (file.metadata() or {}).items()
            return {"tensors": found, "metadata": {readable(k): _cut(v) for k, v in pairs}}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
