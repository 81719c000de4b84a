"""What `spin inspect` shows of an HDF5 or safetensors file, also of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin_cli.cli.terminal import print_line, print_table, width
from spin_cli.units import human_bytes


def show_tree(path: Path, found: dict[str, Any]) -> None:
    """An HDF5 file as a tree: datasets with shape, dtype and size, attributes below them."""
    print_line(f"{path}  {human_bytes(found['bytes'])}")
    entries = found["objects"]
    stems = _stems([entry["depth"] for entry in entries])
    names = [f"{stem}{entry['name']}" for stem, entry in zip(stems, entries, strict=True)]
    longest = min(max(map(len, names)), max(24, width() // 2))
    for name, stem, entry in zip(names, stems, entries, strict=True):
        print_line(f"{name:<{longest}}  {_facts(entry)}".rstrip())
        if entry.get("attributes"):
            inside = stem.replace("├──", "│  ").replace("└──", "   ")
            pairs = [f"{key}={value}" for key, value in entry["attributes"].items()]
            for line in _folded(pairs, max(20, width() - len(inside) - 4)):
                print_line(f"{inside}  @ {line}")


def _stems(depths: Sequence[int]) -> list[str]:
    """The lines that lead to each entry of a tree, given how deep each lies."""
    stems: list[str] = []
    follows: set[int] = set()  # levels on which another entry comes below, seen from the end
    for depth in reversed(depths):
        lines = ["│   " if level in follows else "    " for level in range(1, depth)]
        if depth:
            lines.append("├── " if depth in follows else "└── ")
        stems.append("".join(lines))
        follows = {level for level in follows if level < depth} | {depth}
    return stems[::-1]


def _facts(entry: dict[str, Any]) -> str:
    kind = entry["kind"]
    if kind == "dataset":
        shape = "empty" if entry["shape"] is None else str(tuple(entry["shape"]))
        logical = entry.get("attributes", {}).get("dtype")
        dtype = f"{entry['dtype']} ({logical})" if logical == "bfloat16" else entry["dtype"]
        text = f"{shape:<14} {dtype:<9} {human_bytes(entry['bytes']):>10}"
        if entry["filters"]:
            text += f"  {'+'.join(entry['filters'])}"
        if entry["sources"]:
            text += f"  values in {', '.join(entry['sources'])} (not opened)"
        return text
    if kind in ("soft link", "external link"):
        return f"{kind} → {entry['target']} (not followed)"
    if kind == "type":
        return f"type {entry['dtype']}"
    if kind == "unreadable":
        return f"unreadable: {entry['why']}"
    return {"group": "", "left out": "(more is left out)"}.get(kind, f"({kind})")


def _folded(words: Sequence[str], most: int) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > most:
            lines.append("")
        lines[-1] += f"  {word}" if lines[-1] else word
    return lines


def show_tensors(path: Path, found: dict[str, Any]) -> None:
    """A safetensors file as a table."""
    rows = [
        [t["name"], str(tuple(t["shape"])), t["dtype"], human_bytes(t["bytes"])]
        for t in found["tensors"]
    ]
    print_table(
        f"{path}  {human_bytes(found['bytes'])}", ["tensor", "shape", "dtype", "size"], rows
    )
    for key, value in found["metadata"].items():
        print_line(f"  @ {key}={value}")
