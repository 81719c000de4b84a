"""Validated rows of one text file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_cli.choices import Format
from spin_cli.dataset.arrow import is_saved_dataset, parquet_records, saved_records
from spin_cli.dataset.cells import Row, Rules, finish_row, id_of
from spin_cli.dataset.csv_records import csv_records
from spin_cli.dataset.formats import STDIN, detect_format, import_parquet
from spin_cli.dataset.labels import check_separator
from spin_cli.dataset.records import (
    Fault,
    Record,
    Wanted,
    json_records,
    line_records,
)
from spin_cli.dataset.streams import Lines, display_name, open_bytes
from spin_cli.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, in its place among the others."""

    id: str | None
    """As of a `Row`; None where that is what is wrong, or the row cannot be parsed."""
    line: int
    error: DataError


def read_rows(path: str | Path, **options: Any) -> Iterator[Row]:
    """Stream the rows of a file, or of stdin for ``-``.

    Parameters
    ----------
    path, options
        As in `read_items`.

    Raises
    ------
    DataError
        For a file or row that cannot be used.
    UsageError
        For a format that cannot be told.
    ModelError
        A package that the format needs is missing.
    """
    return _only_rows(read_items(path, **options))


def _only_rows(items: Iterator[Row | BadRow]) -> Iterator[Row]:
    for item in items:
        if isinstance(item, BadRow):
            raise item.error
        yield item


def read_items(
    path: str | Path,
    *,
    format: Format = Format.AUTO,  # noqa: A002 - the option's own name
    text_column: str = "text",
    label_column: str | None = "label",
    id_column: str | None = None,
    label_separator: str | None = None,
    require_label: bool = False,
    keep_columns: bool = False,
    id_prefix: str = "",
) -> Iterator[Row | BadRow]:
    """Stream the rows of a file, or of stdin for ``-``, bad ones in their place.

    Memory is bounded by the longest row. A file without any row gives none.

    Parameters
    ----------
    path : str or Path
        The file; ``.gz`` is unpacked. A folder saved by ``datasets`` (one split) works too.
    format : Format
        ``AUTO``: by extension.
    text_column, label_column, id_column : str or None
        Names of columns. A label column that is not there gives None, unless required.
    label_separator : str or None
        A row has any number of labels: names with this between, or a list of names.
    require_label : bool
        Rows without a label are bad; with a separator they are rows to which no label applies.
    keep_columns : bool
        Fill ``Row.columns``.
    id_prefix : str
        Put before row numbers that serve as ids.

    Raises
    ------
    DataError
        For what is wrong with the file as a whole.
    UsageError
        For a format that cannot be told; from the first row for stdin without a format that does
        not look like plain lines.
    ModelError
        A package that the format needs is missing.
    """
    check_separator(label_separator)
    folder = str(path) != "-" and is_saved_dataset(Path(path))
    kind = Format.PARQUET if folder else detect_format(str(path), format)
    if kind is Format.LINES and (require_label or id_column is not None):
        name, what = display_name(path), "labels" if require_label else "ids"
        raise UsageError(
            f"{name}: plain lines hold no {what}", "give CSV, TSV, JSONL or Parquet (--format)"
        )
    if kind is Format.PARQUET and not folder:
        import_parquet()  # a missing package should not wait for the first row
    wanted = Wanted(text_column, label_column, id_column, require_label, keep_columns)
    unit = "row" if kind is Format.PARQUET else "line"
    rules = Rules(display_name(path), unit, wanted, id_prefix, label_separator)
    guessed = format is Format.AUTO and str(path) == STDIN
    records = (
        saved_records(Path(path), wanted)
        if folder
        else _read_records(path, kind, wanted, guessed=guessed)
    )
    return _finish_rows(records, rules)


def _read_records(
    path: str | Path, kind: Format, wanted: Wanted, *, guessed: bool
) -> Iterator[Record | Fault]:
    if kind is Format.PARQUET:
        yield from parquet_records(path, wanted)
        return
    with open_bytes(path) as stream:
        lines = Lines(stream, display_name(path))
        if kind is Format.JSONL:
            yield from json_records(lines, wanted)
        elif kind is Format.LINES:
            yield from line_records(lines, wanted, guessed=guessed)
        else:
            yield from csv_records(lines, "\t" if kind is Format.TSV else ",", wanted)


def _finish_rows(records: Iterator[Record | Fault], rules: Rules) -> Iterator[Row | BadRow]:
    for number, record in enumerate(records):
        key = None if rules.wanted.id is not None else rules.prefix + str(number)
        if isinstance(record, Fault):
            yield BadRow(key, record.line, record.error)
            continue
        try:
            row = finish_row(record, number, rules)
        except DataError as error:
            yield BadRow(key or id_of(record, rules), record[0], error)
            continue
        yield row
