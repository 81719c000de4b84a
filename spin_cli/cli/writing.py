"""Predictions as JSON lines, tables and Parquet; a file has its name only once it is whole."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from spin_cli.choices import OutputFormat
from spin_cli.cli.style import Style
from spin_cli.cli.terminal import say
from spin_cli.errors import ArtifactError, SpinError, UsageError

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.prediction import Prediction

Write = Callable[[Sequence["Prediction"]], None]
PARQUET_ROWS = 10_000
"""Rows of a row group."""


def partial_path(path: Path) -> Path:
    """Where an output file is written until it is whole."""
    return path.with_name(path.name + ".partial")


@contextmanager
def writing(path: Path | None, style: Style, *, append: bool = False) -> Iterator[Write]:
    """Yield a function that writes predictions; they can be read as soon as it returns.

    A file is called ``PATH.partial`` until it is whole. What was written stays there whatever
    happens, so that it can be continued; who is stopped is told how.
    """
    kind = style.config.output_format
    if path is None:
        if kind is OutputFormat.PARQUET:
            raise UsageError("--output-format parquet needs a file: give -o")
        with _writer(sys.stdout, style) as write:
            yield write
        return
    written = append
    with (
        _becoming(path, lambda: written, resumable=style.config.resumable) as partial,
        _file_writer(partial, style, append=append) as write_window,
    ):

        def write(found: Sequence[Prediction]) -> None:
            nonlocal written
            write_window(found)
            written = True

        yield write


@contextmanager
def _becoming(path: Path, kept: Callable[[], bool], *, resumable: bool) -> Iterator[Path]:
    """Yield the name under which *path* is written; at the end it gets its own.

    What is left of a file that does not get there is removed unless it is to be *kept*.
    """
    from spin_cli.atomic import disk_errors, sync

    partial = partial_path(path)
    try:
        with disk_errors(partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException as error:
        if kept():
            _advise(error, partial, resumable)
        else:
            with suppress(OSError):
                partial.unlink()
        raise


def _advise(error: BaseException, partial: Path, resumable: bool) -> None:
    """Say how to go on with what is kept: once, so in the error's own advice if it has some."""
    from spin_cli.atomic import FULL

    cause = error.__cause__
    if isinstance(error, ArtifactError) and not isinstance(cause, OSError):
        resumable = False  # rows that do not fit into the table: nor will they the next time
    again = "the same command with --resume goes on" if resumable else "--force begins again"
    kept = f"{partial} keeps what is done: {again}"
    if not isinstance(error, SpinError):
        say(f"stopped; {kept}")
    elif isinstance(cause, OSError):  # its own advice is to begin again
        full = cause.errno in FULL
        error.hint = f"{'Make room' if full else 'Let it be written'}; {kept}."
    else:
        error.hint = f"{error.hint.rstrip('.')}. {kept}." if error.hint else f"{kept}."


@contextmanager
def writing_lines(path: Path | None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that writes records as JSON lines."""

    def write_to(file: Any) -> Callable[[list[dict[str, Any]]], None]:
        def write(records: list[dict[str, Any]]) -> None:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()

        return write

    if path is None:
        yield write_to(sys.stdout)
        return
    partial = partial_path(path)
    with (
        _becoming(path, lambda: partial.is_file() and partial.stat().st_size > 0, resumable=False),
        _open_text(partial) as file,
    ):
        yield write_to(file)


@contextmanager
def _open_text(partial: Path, *, append: bool = False) -> Iterator[TextIO]:
    """Open an unfinished file for text, packed where the name that it is to have ends in ``.gz``.

    No time or name goes into a packed file: the same predictions are the same bytes.
    """
    if Path(partial.stem).suffix.lower() != ".gz":
        with partial.open("a" if append else "w", encoding="utf-8", newline="") as file:
            yield file
        return
    with (
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        yield file


@contextmanager
def _file_writer(partial: Path, style: Style, *, append: bool) -> Iterator[Write]:
    if style.config.output_format is OutputFormat.PARQUET:
        with _parquet_writer(partial, style) as write:
            yield write
        return
    with (
        _open_text(partial, append=append) as file,
        _writer(file, style, append=append) as write,
    ):
        yield write


@contextmanager
def _writer(file: Any, style: Style, *, append: bool = False) -> Iterator[Write]:
    kind = style.config.output_format
    if kind is OutputFormat.JSONL:

        def write_lines(found: Sequence[Prediction]) -> None:
            for each in found:
                file.write(json.dumps(style.record(each), ensure_ascii=False) + "\n")
            file.flush()

        yield write_lines
    elif kind is OutputFormat.TABLE:
        with _with_columns(style, lambda names: _aligned(file, style, names)) as write:
            yield write
    else:
        mark = "\t" if kind is OutputFormat.TSV else ","
        with _with_columns(style, lambda names: _separated(file, mark, names, append)) as write:
            yield write


@contextmanager
def _with_columns(
    style: Style, begin: Callable[[list[str]], Callable[[list[dict[str, Any]]], None]]
) -> Iterator[Write]:
    """Begin a table once its columns are known: with the first row that brings the input's."""
    waiting: list[Prediction] = []
    rows: Callable[[list[dict[str, Any]]], None] | None = None

    def write(found: Sequence[Prediction]) -> None:
        nonlocal rows
        if rows is None:
            waiting.extend(found)
            first = next((each.columns for each in waiting if each.columns is not None), None)
            if first is None and style.config.keep_columns:
                return
            rows = begin(style.names(list(first or ())))
            found = list(waiting)
            waiting.clear()
        rows([style.row(each) for each in found])

    if not style.config.keep_columns:
        write([])
    yield write
    if rows is None:
        begin(style.names([]))([style.row(each) for each in waiting])


def _separated(
    file: Any, mark: str, names: list[str], append: bool
) -> Callable[[list[dict[str, Any]]], None]:
    table = csv.DictWriter(file, names, delimiter=mark, lineterminator="\n")
    if not append:
        table.writeheader()

    def write(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            _check_columns(row, names)
            table.writerow(row)
        file.flush()

    return write


def _check_columns(row: dict[str, Any], names: list[str]) -> None:
    extra = [name for name in row if name not in names]
    if extra:
        raise ArtifactError(
            f"row {row['id']!r} has the column {extra[0]!r}, which the first row lacks",
            "Write JSON lines: --output-format jsonl",
        )


def _aligned(file: Any, style: Style, names: list[str]) -> Callable[[list[dict[str, Any]]], None]:
    """Columns of a fixed width, so that rows can be shown as they come; what is longer is cut."""
    longest = max(len(name) for name in style.classes)
    widths = [
        min(max(longest, len(name)), 24) if name.startswith("label") else max(len(name), 8)
        for name in names
    ]

    def line(cells: list[str]) -> str:
        fitted = [
            cell[: width - 1] + "…" if len(cell) > width else cell.ljust(width)
            for cell, width in zip(cells[:-1], widths, strict=False)
        ]
        return "  ".join([*fitted, cells[-1]]).rstrip() + "\n"

    file.write(line(names))

    def write(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            file.write(line([_cell(row.get(name)) for name in names]))
        file.flush()

    return write


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value).replace("\n", " ")


@contextmanager
def _parquet_writer(path: Path, style: Style) -> Iterator[Write]:
    from spin_cli.dataset.formats import import_parquet

    pq = import_parquet("writing")
    import pyarrow as pa

    waiting: list[dict[str, Any]] = []
    writer: Any = None

    def begin(names: list[str]) -> Callable[[list[dict[str, Any]]], None]:
        nonlocal writer
        numbers = {name for name in style.names([]) if name.startswith("prob")}
        flags = {"truncated", "abstained"}
        schema = pa.schema(
            [
                (
                    name,
                    pa.float64() if name in numbers else pa.bool_() if name in flags
                    else pa.list_(pa.string()) if name == "label" and style.separator
                    else pa.string(),
                )
                for name in names
            ]
        )  # fmt: skip
        writer = pq.ParquetWriter(path, schema)

        def write(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                _check_columns(row, names)
            waiting.extend(rows)
            if len(waiting) >= PARQUET_ROWS:
                flush()

        return write

    def flush() -> None:
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, writer.schema))
            waiting.clear()

    try:
        with _with_columns(style, begin) as write:
            yield write
    finally:  # the rows before an interrupt too
        if writer is not None:
            flush()
            writer.close()
