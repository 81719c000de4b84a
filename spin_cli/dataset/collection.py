"""A data set: its files, the class and split of every row, and a way to read it again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts
from spin_cli.choices import Format
from spin_cli.config import SPLITS, DataConfig
from spin_cli.dataset.arrow import hash_saved, is_saved_dataset
from spin_cli.dataset.cells import Row
from spin_cli.dataset.checks import (
    check_classes,
    check_val,
    collect_warnings,
    count_shared,
    refuse_duplicate_ids,
)
from spin_cli.dataset.folder import find_sources
from spin_cli.dataset.formats import detect_format
from spin_cli.dataset.labels import check_separator, split_labels
from spin_cli.dataset.rows import read_rows
from spin_cli.dataset.splits import pick_val, sort_labels
from spin_cli.dataset.stratification import pick_val_labels
from spin_cli.dataset.streams import hash_file
from spin_cli.errors import DataError
from spin_cli.ranges import check_ranges


@dataclass(frozen=True)
class Source:
    """One file of a data set, as it was when it was scanned."""

    split: str
    """Which split the file stands for; rows split off train for val keep ``train`` here."""
    path: Path
    format: Format
    """``AUTO`` for a folder saved by the ``datasets`` library."""
    sha256: str
    size: int
    """Bytes."""
    rows: int


@dataclass(frozen=True)
class Dataset:
    """Files whose every row was seen to be valid; texts stay on disk."""

    sources: tuple[Source, ...]
    classes: tuple[str, ...]
    """Label names, sorted; numbers by value."""
    codes: NDArray[Any]
    """(N,) int32, index into ``classes``; rows as in the files: train, val, test. With a label
    separator (N, L) uint8, 1 where a label applies."""
    splits: NDArray[np.uint8]
    """(N,) index into ``SPLITS``."""
    config: DataConfig
    warnings: tuple[str, ...]
    """What a user should know, though nothing is refused for it."""

    def __len__(self) -> int:
        """Return the number of rows of all splits."""
        return len(self.codes)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read the files again, in order.

        Parameters
        ----------
        start : int
            First row to give; earlier ones are parsed at most.

        Raises
        ------
        DataError
            If a file has no longer the rows that it had.
        """
        offset = 0
        for source in self.sources:
            skip = start - offset
            offset += source.rows
            if skip >= source.rows:
                continue
            yield from _read_again(source, self.config, max(skip, 0))

    def check_unchanged(self) -> None:
        """Hash the files again; a DataError names one that changed since the scan."""
        for source in self.sources:
            if _hash_source(source.path) != (source.sha256, source.size):
                raise _changed(source)


def scan(data: Path, config: DataConfig) -> Dataset:
    """Read a data set once: check every row, count, and settle classes and splits.

    Parameters
    ----------
    data : Path
        A file (split into train and val), or a folder with ``train.*`` and, where there are,
        ``val.*`` (``dev.*``, ``validation.*``) and ``test.*``.
    config : DataConfig
        Columns, format, and how val is split off where it has no file.

    Raises
    ------
    DataError
        For anything wrong with files, rows, labels or ids.
    UsageError
        For options that cannot work.
    """
    check_separator(config.label_separator)
    check_ranges(config)
    scans = [_scan_source(s, path, config) for s, path in find_sources(data, config.format)]
    separator = config.label_separator
    named = [(item.source.split, str(item.source.path), item.names(separator)) for item in scans]
    check_classes(named)
    classes = sort_labels(named[0][2])
    codes = np.concatenate([item.encode(classes, separator) for item in scans])
    splits = np.concatenate(
        [np.full(s.source.rows, SPLITS.index(s.source.split), np.uint8) for s in scans]
    )
    has_val = any(item.source.split == "val" for item in scans)
    if not has_val:
        pick = pick_val if separator is None else pick_val_labels
        train = codes[splits == 0]
        val = pick(train, config.val_fraction, config.seed)
        check_val(named[0][1], train, len(classes), val, config.val_fraction)
        splits[: len(val)][val] = SPLITS.index("val")
    shared = [(item.source.split, count_shared(scans[0].texts, item.texts)) for item in scans[1:]]
    ids = np.concatenate([item.ids for item in scans])
    warnings = collect_warnings(classes, codes, splits, shared, len(ids) - len(np.unique(ids)))
    codes.flags.writeable = splits.flags.writeable = False
    sources = tuple(item.source for item in scans)
    return Dataset(sources, classes, codes, splits, config, warnings)


def hash_sources(data: Path, config: DataConfig) -> list[dict[str, str]]:
    """Split, path and SHA-256 of each file of a data set; no row is read.

    Raises
    ------
    DataError
        There is no data set.
    """
    return [
        {"split": split, "path": str(path), "sha256": _hash_source(path)[0]}
        for split, path in find_sources(data, config.format)
    ]


def places(sources: Sequence[Mapping[str, Any]], folder: Path) -> list[list[Path]]:
    """Where each file that the manifest in *folder* lists may lie.

    As it was named, then as its log saw it from *folder*: a relative name depends on where spin was
    started. In the log, since the manifest of a run elsewhere is the same.
    """
    log = artifacts.read_json(folder / artifacts.LOG) if (folder / artifacts.LOG).is_file() else {}
    seen = log.get("data") if isinstance(log, dict) else None
    named = [[Path(entry["path"])] for entry in sources]
    if isinstance(seen, list) and len(seen) == len(named):
        for each, path in zip(named, seen, strict=True):
            each.append(folder / str(path))
    return named


def reread(sources: Sequence[Mapping[str, Any]], config: DataConfig, folder: Path) -> Iterator[Row]:
    """Read again, in order, the rows of the files that a manifest lists.

    Parameters
    ----------
    sources : ``split``, ``path``, ``sha256`` and ``rows`` of each file
    config : DataConfig
        How they were read.
    folder : Path
        Where the manifest lies.

    Raises
    ------
    DataError
        A file is gone, or is no longer what was read.
    """
    for entry, where in zip(sources, places(sources, folder), strict=True):
        path, size = _find(where, entry["sha256"])
        kind = Format.AUTO if is_saved_dataset(path) else detect_format(str(path), config.format)
        rows = int(entry["rows"])
        source = Source(str(entry["split"]), path, kind, entry["sha256"], size, rows)
        yield from _read_again(source, config, 0)


def _find(where: Sequence[Path], sha256: str) -> tuple[Path, int]:
    """The one of a file's `places` that still holds what was read, and its size."""
    there = [path for path in where if path.exists()]
    named = where[0]  # what is said may end up in a head's notes: no folder that was not given
    for path in there:
        found, size = _hash_source(path)
        if found == sha256:
            return path, size
    if there:
        raise DataError(
            f"{named} changed since it was read", "put it back, or extract again with --force"
        )
    raise DataError(f"{named}: gone; the texts were read from it", "put it back where it was")


@dataclass
class _Scan:
    """What one pass over a file gives."""

    source: Source
    first: dict[str, int] = field(default_factory=dict)
    """Label (the whole cell) -> line of its first row; its order numbers ``labels``."""
    labels: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    texts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Hashes; eight bytes a row, where the texts themselves might not fit into memory."""
    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def names(self, separator: str | None) -> dict[str, int]:
        """Each label's name and the line of its first row."""
        if separator is None:
            return self.first
        found: dict[str, int] = {}
        for cell, line in self.first.items():
            for name in split_labels(cell, separator):
                found.setdefault(name, line)
        return found

    def encode(self, classes: tuple[str, ...], separator: str | None) -> NDArray[Any]:
        """Return the labels as indices into the data set's classes, or as an indicator."""
        index = {name: at for at, name in enumerate(classes)}
        if separator is not None:
            cells = np.zeros((len(self.first), len(classes)), np.uint8)
            for at, cell in enumerate(self.first):
                cells[at, [index[name] for name in split_labels(cell, separator)]] = 1
            return np.asarray(cells[self.labels])
        table = np.array([index[name] for name in self.first], np.int32)
        return table[self.labels]


def _scan_source(split: str, path: Path, config: DataConfig) -> _Scan:
    kind = Format.AUTO if is_saved_dataset(path) else detect_format(str(path), config.format)
    # Hashed before it is read: a change while reading shows up in check_unchanged.
    sha256, size = _hash_source(path)
    first: dict[str, int] = {}
    order: dict[str, int] = {}
    labels, texts, ids = array("i"), array("q"), array("q")
    for row in _read_source(path, kind, split, config):
        label = row.label
        if label is None:  # read_rows refuses such rows
            continue
        code = order.get(label)
        if code is None:
            code = order[label] = len(order)
            first[label] = row.line
        labels.append(code)
        texts.append(hash(row.text))
        if config.id_column is not None:
            ids.append(hash(row.id))
    if not labels:
        raise DataError(f"{path}: no rows", "a header alone is no data; rows were expected")
    source = Source(split, path, kind, sha256, size, len(labels))
    id_hashes = np.array(ids, np.int64)
    refuse_duplicate_ids(
        str(path), config.id_column, id_hashes, lambda: _read_source(path, kind, split, config)
    )
    return _Scan(source, first, np.array(labels, np.int32), np.array(texts, np.int64), id_hashes)


def _read_source(path: Path, kind: Format, split: str, config: DataConfig) -> Iterator[Row]:
    return read_rows(
        path,
        format=kind,
        text_column=config.text_column,
        label_column=config.label_column,
        id_column=config.id_column,
        label_separator=config.label_separator,
        require_label=True,
        id_prefix=f"{split}-",
    )


def _read_again(source: Source, config: DataConfig, skip: int) -> Iterator[Row]:
    rows = _read_source(source.path, source.format, source.split, config)
    count = skip
    for row in islice(rows, skip, None):
        count += 1
        if count > source.rows:
            break
        yield row
    if count != source.rows:
        raise _changed(source)


def _hash_source(path: Path) -> tuple[str, int]:
    return hash_saved(path) if path.is_dir() else hash_file(path)


def _changed(source: Source) -> DataError:
    return DataError(
        f"{source.path}: the file changed while it was in use; it had {source.rows} rows, "
        f"{source.size} bytes and SHA-256 {source.sha256[:12]}…",
        "put the file back, or start again with --force",
    )
