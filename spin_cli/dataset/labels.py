"""Cells that hold any number of labels.

Within spin such a cell travels as text: its names in their order with the separator between, the
empty text for none. A name never holds the separator, so nothing is lost.
"""

from __future__ import annotations

import json
import re

from spin_cli.config import MAX_SEPARATOR
from spin_cli.errors import UsageError

_BRACKETS = re.compile(r"\[\s*(['\"].*)?\]", re.DOTALL)


class LabelError(ValueError):
    """What is wrong with a cell, and how to mend it: ``args`` of length two."""


def check_separator(separator: str | None) -> None:
    """Refuse separators that cannot work with a `UsageError`."""
    if separator is None:
        return
    if not 0 < len(separator) <= MAX_SEPARATOR or not separator.isprintable():
        raise UsageError(
            f"--label-separator {json.dumps(separator)}: 1 to {MAX_SEPARATOR} printable characters"
            " were expected, such as '|'"
        )


def split_labels(text: str, separator: str) -> list[str]:
    """The names in the text of a cell."""
    return text.split(separator) if text else []


def parse_labels(cell: object, separator: str) -> str:
    """The text of a cell: a string with separators, a list of names, or nothing.

    Raises
    ------
    LabelError
        An empty name, one that is there twice, one that holds the separator, or no names at all.
    """
    if isinstance(cell, (list, tuple)):
        names = [_name(item, separator) for item in cell]
    else:
        names = _split_cell("" if cell is None else str(cell), separator)
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise LabelError(f"the label '{twice}' twice", "give each label of a row once")
    return separator.join(names)


def _split_cell(cell: str, separator: str) -> list[str]:
    if _BRACKETS.fullmatch(cell.strip()):
        raise LabelError(
            f"a list in one cell ({cell.strip()[:40]})",
            f"write its names with '{separator}' between, or the rows as JSON lines",
        )
    if not cell.strip():
        return []
    names = [part.strip() for part in cell.split(separator)]
    if separator.isspace():
        return [name for name in names if name]
    if "" in names:
        raise LabelError(
            f"an empty name among the labels '{cell.strip()[:60]}'",
            f"put '{separator}' between names alone; an empty cell is a row without a label",
        )
    return names


def _name(item: object, separator: str) -> str:
    if isinstance(item, bool) or not isinstance(item, (str, int)):
        kind = type(item).__name__
        raise LabelError(f"a list with a {kind} in it", "give a list of strings")
    name = str(item).strip()
    if not name:
        raise LabelError("an empty name in the list of labels", "leave it out of the list")
    if separator in name:
        raise LabelError(
            f"the label '{name[:60]}' holds the separator '{separator}'",
            "give a --label-separator that no name holds",
        )
    return name
