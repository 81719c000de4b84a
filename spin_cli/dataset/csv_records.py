"""Raw records of CSV and TSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain, islice

from spin_cli.config import MAX_TEXT_CHARS
from spin_cli.dataset.records import Fault, Record, Wanted, refuse_duplicates, resolve_columns
from spin_cli.dataset.streams import Lines
from spin_cli.errors import DataError


def csv_records(lines: Lines, delimiter: str, wanted: Wanted) -> Iterator[Record | Fault]:
    """Parse CSV or TSV with a header line; CSV may have semicolons in place of commas."""
    # Process-wide in the csv module; its default (131,072) refuses long documents.
    csv.field_size_limit(MAX_TEXT_CHARS)
    first = list(islice(lines, 1))
    delimiter = _settle_delimiter(first, delimiter, wanted)
    reader = csv.reader(chain(first, lines), delimiter=delimiter, strict=True)
    header = _read_header(reader, lines)
    names = resolve_columns(lines.name, header, wanted)
    text_at, label_at, id_at = (None if n is None else header.index(n) for n in names)
    assert text_at is not None
    width = len(header)
    while True:
        line = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Fault(line, lines.take_fault() or _csv_error(lines, line, error))
            continue
        if lines.fault is not None or len(fields) != width or lines.number > line:
            if fault := lines.take_fault() or _misshapen(lines, line, fields, width, delimiter):
                yield Fault(line, fault)
                continue
            if not fields:
                continue
        yield (
            line,
            fields[text_at],
            None if label_at is None else fields[label_at],
            None if id_at is None else fields[id_at],
            _name_fields(header, fields) if wanted.keep_columns else None,
        )


def _settle_delimiter(first: list[str], delimiter: str, wanted: Wanted) -> str:
    """A semicolon where only that parts the header, as spreadsheets of half of Europe write it."""
    if delimiter != "," or not first:
        return delimiter
    try:
        whole, parted = (next(csv.reader(first, delimiter=mark), []) for mark in ",;")
    except csv.Error:  # the strict reader says what is wrong
        return delimiter
    return ";" if len(whole) == 1 and len(parted) > 1 and wanted.text not in whole else ","


def _read_header(reader: Iterator[list[str]], lines: Lines) -> list[str]:
    header: list[str] = []
    while not header:
        try:
            header = next(reader)
        except StopIteration:
            raise DataError(
                f"{lines.name}: the file is empty; a header line with column names was expected",
                "write a header such as text,label, or say --format lines for plain lines",
            ) from None
        except csv.Error as error:
            raise _csv_error(lines, 1, error) from error
        if fault := lines.take_fault():
            raise fault
    refuse_duplicates(lines.name, header)
    return header


def _name_fields(header: list[str], fields: list[str]) -> dict[str, object]:
    pairs = zip(header, fields, strict=True)
    return {name or f"column_{at}": field for at, (name, field) in enumerate(pairs)}


def _misshapen(
    lines: Lines, line: int, fields: list[str], width: int, delimiter: str
) -> DataError | None:
    if not fields:  # a blank line
        return None
    if len(fields) != width:
        more = "many" if len(fields) > width else "few"
        return DataError(
            f"{lines.name}, line {line}: too {more} fields: {len(fields)}, "
            f"where the header has {width}",
            "put fields that hold a separator, a quote or a line end in double quotes",
        )
    if delimiter == "\t" and _swallowed_rows(fields):
        return DataError(
            f"{lines.name}, line {line}: a double quote opens a field here that runs on to "
            f"line {lines.number}, over what look like whole rows",
            'a quote at the start of a field must be written as """ (or use JSON lines)',
        )
    return None


def _swallowed_rows(fields: list[str]) -> bool:
    """Tell whether one stray quote made one record of several tab-separated rows.

    Many TSV files are written without any quoting. A stray quote at the start of a field then
    eats whole rows until the next one, and strict parsing does not notice.
    """
    last = len(fields) - 1
    for at, field in enumerate(fields):
        if "\n" in field and "\t" in field:
            head, tail = field.split("\n", 1)[0], field.rsplit("\n", 1)[1]
            return at + head.count("\t") == last and tail.count("\t") + last - at == last
    return False


def _csv_error(lines: Lines, line: int, error: csv.Error) -> DataError:
    what = str(error)
    where = f"{lines.name}, line {line}"
    if "unexpected end of data" in what:
        message = f"{where}: a double quote opened in this row is never closed"
        return DataError(message, 'close it; a quote inside a quoted field is written ""')
    if "field limit" in what:
        return DataError(
            f"{where}: a field of more than {MAX_TEXT_CHARS:,} characters",
            f'look for an unclosed double quote ("): sed -n {line}p {lines.name} | cut -c1-500',
        )
    if "new-line character" in what:
        return DataError(
            f"{where}: a carriage return without a line feed (old Mac line ends?)",
            f"tr '\\r' '\\n' < {lines.name} > {lines.name}.unix",
        )
    if "expected after" in what:
        at = "" if lines.number == line else f" (on line {lines.number})"
        return DataError(
            f"{where}: something follows the closing double quote of a field{at}",
            'write a quote inside a quoted field as "", and no blank after the closing quote',
        )
    return DataError(f"{where}: not valid CSV: {what}")
