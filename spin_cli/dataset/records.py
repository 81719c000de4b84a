"""Raw records of JSON lines and plain lines; those of CSV and TSV are in `csv_records`.

A record is ``(line, text, label, id, columns)`` with values as the format gives them; what they
have to look like is checked in :mod:`spin_cli.dataset.cells`. A row that cannot be parsed is a
:class:`Fault`, so that the caller decides whether to stop; what is wrong with the whole file is
raised.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from spin_cli.dataset.formats import refuse_structure
from spin_cli.dataset.streams import Lines
from spin_cli.errors import DataError
from spin_cli.names import list_names

Record = tuple[int, object, object, object, "dict[str, object] | None"]

ALIKE = 0.7
"""How much a name has to be like another to be a slip of it: 'intent' is none of 'text' (0.6)."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be parsed."""

    line: int
    error: DataError


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which columns to read."""

    text: str
    label: str | None
    id: str | None
    require_label: bool
    keep_columns: bool


def resolve_columns(
    name: str, found: Sequence[str], wanted: Wanted, line: int | None = None
) -> tuple[str, str | None, str | None]:
    """Return the names of the text, label and id column to read.

    The label column is None where it is not there and not required.

    Raises
    ------
    DataError
        If a needed column is missing.
    """
    where = name if line is None else f"{name}, line {line}"
    label = wanted.label
    needed = [("--text-column", wanted.text)]
    if label is not None and wanted.require_label:
        needed.append(("--label-column", label))
    if wanted.id is not None:
        needed.append(("--id-column", wanted.id))
    for option, column in needed:
        if column not in found:
            listed = list_names(found) if found else "none at all"
            message = f"{where}: no column '{column}'; the columns are {listed}"
            others = {named for _, named in needed} | {label}
            free = [candidate for candidate in found if candidate not in others]
            raise DataError(message, _suggest_column(option, column, found, free))
    return wanted.text, (label if label in found else None), wanted.id


def _suggest_column(option: str, column: str, found: Sequence[str], free: Sequence[str]) -> str:
    """How to name the column: one of *free* by its name where that is much like what was asked."""
    if len(found) == 1:
        for separator, advice in (
            ("\t", "the header looks tab-separated: --format tsv"),
            (",", "the header looks comma-separated: --format csv"),
        ):
            if separator in found[0]:
                return advice
    folded = {candidate.strip().lower(): candidate for candidate in free}
    close = get_close_matches(column.strip().lower(), list(folded), n=1, cutoff=ALIKE)
    return f"{option} {shlex.quote(folded[close[0]])}" if close else f"name the column: {option} X"


def refuse_duplicates(name: str, names: Sequence[str]) -> None:
    """Raise a DataError if a column name occurs twice."""
    # Spreadsheets leave several columns without a name: harmless.
    if twice := [item for item, count in Counter(names).items() if item and count > 1]:
        raise DataError(
            f"{name}, line 1: the header has {list_names(twice)} more than once",
            "rename columns so that each name is there once",
        )


def json_records(lines: Lines, wanted: Wanted) -> Iterator[Record | Fault]:
    """Parse JSON lines: one object a line; blank lines are passed over."""
    first = True
    text, label, id_ = wanted.text, wanted.label, wanted.id
    for line in lines:
        number = lines.number
        if lines.fault is None and (not line or line.isspace()):
            continue
        item = lines.take_fault() or _parse_object(line, lines.name, number)
        if isinstance(item, DataError):
            yield Fault(number, item)
            continue
        if text not in item or (id_ is not None and id_ not in item):
            try:
                resolve_columns(lines.name, list(item), wanted, number)
            except DataError as error:
                if first:  # the column's name is wrong, rather than one row
                    raise
                yield Fault(number, error)
                continue
        if first and wanted.require_label:
            resolve_columns(lines.name, list(item), wanted, number)
        first = False
        columns = item if wanted.keep_columns else None
        label_value = None if label is None else item.get(label)
        yield number, item[text], label_value, (None if id_ is None else item[id_]), columns


def _parse_object(line: str, name: str, number: int) -> dict[str, object] | DataError:
    where = f"{name}, line {number}"
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        hint = 'every line has to be one object such as {"text": "...", "label": "..."}'
        if number == 1 and line.strip() in {"[", "{"}:
            hint = f"the file looks like pretty-printed JSON: jq -c '.[]' {name} > rows.jsonl"
        what = error.msg.removesuffix(" at")  # the place is said before it
        return DataError(f"{where}, character {error.colno}: not JSON: {what}", hint)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: JSON that cannot be read: {error}")
    if isinstance(item, dict):
        return item
    hint = 'write rows as {"text": "...", "label": "..."}'
    if isinstance(item, list) and number == 1:
        hint = f"the file looks like one JSON array: jq -c '.[]' {name} > rows.jsonl"
    kind = type(item).__name__
    return DataError(f"{where}: a JSON {kind}, where an object was expected", hint)


def line_records(lines: Lines, wanted: Wanted, *, guessed: bool) -> Iterator[Record | Fault]:
    """Take every line as one text without label.

    *guessed*: nobody said that they are plain lines, so the first one must not look as if they
    were something else: a header would get an answer, and so would the rows with their labels.
    """
    for line in lines:
        if guessed and lines.number == 1:
            refuse_structure(line, lines.name, wanted.text)
        if fault := lines.take_fault():
            yield Fault(lines.number, fault)
            continue
        text = line.removesuffix("\n").removesuffix("\r")
        columns: dict[str, object] | None = {wanted.text: text} if wanted.keep_columns else None
        yield lines.number, text, None, None, columns
