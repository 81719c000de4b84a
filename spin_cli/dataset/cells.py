"""What the cells of a row have to look like: texts, labels and ids out of raw records."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from spin_cli.config import MAX_TEXT_CHARS
from spin_cli.dataset.labels import LabelError, parse_labels
from spin_cli.dataset.records import Record, Wanted
from spin_cli.errors import DataError

_LARGEST_EXACT = 2**53


@dataclass(frozen=True, slots=True)
class Row:
    """One text with what belongs to it."""

    id: str
    """From the id column, else the 0-based row number (in a data set as ``train-12``)."""
    text: str
    """Verbatim: nothing is stripped."""
    label: str | None
    """Without surrounding white space. With a separator any number of names: `split_labels`."""
    line: int
    """1-based line on which the row starts; for Parquet the 1-based row."""
    columns: dict[str, object] | None
    """All input columns, if they were asked for: values of JSON, text where the format has that
    alone."""
    place: str = field(default="", compare=False)
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a row has to look like, and how to call its place."""

    name: str
    unit: str
    wanted: Wanted
    prefix: str
    separator: str | None

    def place(self, line: int) -> str:
        """File and line, for messages."""
        return f"{self.name}, {self.unit} {line}"

    def refuse(self, line: int, column: str | None, what: str, hint: str | None) -> DataError:
        """The error for a row, or for one of its columns."""
        where = self.place(line)
        if column is not None:
            where += f", column '{column}'"
        return DataError(f"{where}: {what}", hint)


def finish_row(record: Record, number: int, rules: Rules) -> Row:
    """Make a row of the record of a *number*; `DataError` for one that cannot be used."""
    line, text, label, id_, columns = record
    wanted = rules.wanted
    if not isinstance(text, str):
        raise rules.refuse(line, wanted.text, *_not_a_string(text))
    if fault := text_fault(text):
        raise rules.refuse(line, wanted.text, *fault)
    name = None if wanted.label is None else _finish_label(label, line, wanted.label, rules)
    key = rules.prefix + str(number) if wanted.id is None else _to_id(id_, line, rules)
    if columns is not None:
        columns = {name: _keep(value, line, name, rules) for name, value in columns.items()}
    return Row(key, text, name, line, columns, rules.place(line))


def column_text(value: object) -> str:
    """A value of `Row.columns` as a cell of a table: null is empty, a list or object is JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _keep(value: object, line: int, column: str, rules: Rules) -> object:
    try:
        return _to_column(value, line, column, rules)
    except RecursionError:
        raise rules.refuse(line, column, "nested too deeply", "flatten it") from None


def _to_column(value: object, line: int, column: str, rules: Rules) -> object:
    """A value as `Row.columns` holds it: NaN and infinity as null, dates and bytes as text."""
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, line, column, rules)
        return value
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_to_column(each, line, column, rules) for each in value]
    if isinstance(value, dict):
        for key in value:
            _check_text(str(key), line, column, rules)
        return {str(key): _to_column(each, line, column, rules) for key, each in value.items()}
    return str(value)


def _finish_label(value: object, line: int, column: str, rules: Rules) -> str | None:
    if rules.separator is not None:
        return _finish_labels(value, line, column, rules)
    name = value.strip() if isinstance(value, str) else _to_label(value, line, rules)
    if not name:
        if rules.wanted.require_label:
            raise rules.refuse(line, column, "no label", "label the row, or remove it")
        return None
    if not name.isascii() or "\0" in name:
        _check_text(name, line, column, rules)
    return name


def _finish_labels(value: object, line: int, column: str, rules: Rules) -> str | None:
    if value is None and not rules.wanted.require_label:
        return None
    try:
        cell = value if isinstance(value, (list, tuple)) else _to_string(value)
        name = parse_labels(cell, str(rules.separator))
    except LabelError as error:
        raise rules.refuse(line, column, *error.args) from None
    except TypeError:
        what = f"{_kind(value)}, where labels were expected"
        raise rules.refuse(line, column, what, "write them as a list of strings") from None
    _check_text(name, line, column, rules)
    return name


def text_fault(text: str) -> tuple[str, str] | None:
    """What is wrong with a text, and how to mend it; None: nothing."""
    if not text.isascii() or "\0" in text or len(text) > MAX_TEXT_CHARS:
        fault = _fault(text)
        if fault is not None:
            return fault
    if not text or text.isspace():
        return "an empty text", "fill it in, or remove the row"
    return None


def _check_text(value: str, line: int, column: str, rules: Rules) -> None:
    if fault := _fault(value):
        raise rules.refuse(line, column, *fault)


def _fault(value: str) -> tuple[str, str] | None:
    if len(value) > MAX_TEXT_CHARS:
        return (
            f"a text of {len(value):,} characters; at most {MAX_TEXT_CHARS:,} are accepted",
            "look for an unclosed quote or missing line ends; else cut the text into parts",
        )
    if "\0" in value:
        return "a NUL character", "remove it from the text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        return (
            f"the escape \\u{code:04x} (character {error.start + 1}) is half of a surrogate pair "
            "and no character by itself",
            "write the whole pair, or the character itself in UTF-8",
        )
    return None


def _not_a_string(value: object) -> tuple[str, str]:
    if value is None:
        return "no text (null)", "fill it in, or remove the row"
    if isinstance(value, bytes):
        return "bytes that are not UTF-8", "write the column as UTF-8 strings"
    return f"{_kind(value)}, where a string was expected", "quote the value, or remove the row"


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _to_string(value: object) -> str | None:
    """Write a scalar as text; None for nothing, and for a list or the like a TypeError."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None  # how pandas writes a missing value
        # One missing value turns a whole column of integers into floats; '1' has to stay '1'.
        exact = value.is_integer() and abs(value) < _LARGEST_EXACT
        return str(int(value)) if exact else repr(value)
    if isinstance(value, (bytes, list, dict, tuple)):
        raise TypeError
    return str(value)


def _to_label(value: object, line: int, rules: Rules) -> str | None:
    try:
        name = _to_string(value)
    except TypeError:
        if not rules.wanted.require_label:
            return None
        what = f"{_kind(value)}, where one label was expected"
        hint = "write it as a string or a number"
        if isinstance(value, list):
            hint += "; rows with any number of labels are read with --label-separator '|'"
        raise rules.refuse(line, rules.wanted.label, what, hint) from None
    return None if name is None else name.strip()


def id_of(record: Record, rules: Rules) -> str | None:
    """The id of a record that cannot be used otherwise; None where that is what is wrong."""
    try:
        return _to_id(record[3], record[0], rules)
    except DataError:
        return None


def _to_id(value: object, line: int, rules: Rules) -> str:
    column = rules.wanted.id
    try:
        name = _to_string(value)
    except TypeError:
        what = f"{_kind(value)}, where one id was expected"
        raise rules.refuse(line, column, what, "write it as a string or a number") from None
    if not name or name.isspace():
        raise rules.refuse(line, column, "no id", "fill it in, or leave --id-column away")
    if not name.isascii() or "\0" in name:
        _check_text(name, line, str(column), rules)
    return name
