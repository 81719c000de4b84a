"""Which format a file is in, and the optional packages that some formats need."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
from pathlib import Path, PurePath
from typing import Any

from spin_cli.choices import Format, OutputFormat
from spin_cli.errors import ModelError, UsageError

STDIN = "-"

EXTENSIONS = {
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".tab": Format.TSV,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".txt": Format.LINES,
}


def split_name(path: str) -> tuple[str, str]:
    """Cut a file name into stem and lower-case extension, leaving out a final ``.gz``."""
    pure = PurePath(path)
    if pure.suffix.lower() == ".gz":
        pure = pure.with_suffix("")
    return pure.stem, pure.suffix.lower()


def detect_format(path: str, format: Format) -> Format:  # noqa: A002 - the option's own name
    """Tell the format of a file by its extension.

    Parameters
    ----------
    path : str
        A path, or ``-`` for stdin. ``.gz`` at its end is left out of account.
    format : Format
        What the user asked for; anything but ``AUTO`` wins.

    Returns
    -------
    Format
        Never ``AUTO``. Stdin without a format is plain lines.

    Raises
    ------
    UsageError
        For an extension that says nothing.
    """
    if format is not Format.AUTO:
        return format
    if path == STDIN:
        return Format.LINES
    extension = split_name(path)[1]
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    known = ", ".join(EXTENSIONS)
    choices = ", ".join(item.value for item in Format if item is not Format.AUTO)
    what = f"the extension '{extension}'" if extension else "no extension"
    raise UsageError(
        f"{path}: cannot tell the format of a file with {what} (known: {known}, each also .gz)",
        f"say it with --format, one of: {choices}",
    )


def output_format(path: Path | None, wanted: OutputFormat | None) -> OutputFormat:
    """Tell the format of a file to be written: as its name says, JSON lines where that says none.

    Parameters
    ----------
    path : Path or None
        None is stdout. ``.gz`` at its end is left out of account.
    wanted : OutputFormat or None
        What the user asked for.

    Raises
    ------
    UsageError
        The name says another format than is wanted, or is that of a packed Parquet file.
    """
    stem, extension = split_name("" if path is None else str(path))
    kind = EXTENSIONS.get(extension, Format.LINES)
    if path is None or kind is Format.LINES:
        return wanted or OutputFormat.JSONL
    named = OutputFormat(kind.value)
    if wanted is not None and wanted is not named:
        better = f"{stem}.{'txt' if wanted is OutputFormat.TABLE else wanted.value}"
        raise UsageError(
            f"{path}: the name says {named.value}, where {wanted.value} is to be written",
            f"Give the file another name, such as {better}, or another --output-format.",
        )
    if named is OutputFormat.PARQUET and path.suffix.lower() == ".gz":
        raise UsageError(f"{path}: Parquet packs its columns itself", "Take .gz off the name.")
    return named


def refuse_structure(line: str, name: str, column: str) -> None:
    """Raise `UsageError` where the first of what are taken for plain lines looks like a table's.

    Else its header would get an answer, and every row one to its label too. *column*: the text's.
    """
    found = _structure(line.rstrip("\r\n"), column)
    if found is not None:
        kind, what = found
        raise UsageError(
            f"{name}, line 1: {what} '{column}', where plain lines of text were expected",
            f"Give --format {kind.value}, or --format lines if this is a text as it is.",
        )


def _structure(line: str, column: str) -> tuple[Format, str] | None:
    if line.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return (Format.JSONL, "a JSON object with") if column in json.loads(line) else None
    for mark, kind in ((",", Format.CSV), ("\t", Format.TSV), (";", Format.CSV)):
        with contextlib.suppress(csv.Error):  # as of a very long text
            fields = next(csv.reader([line], delimiter=mark), [])
            # After a mark within a sentence there is a blank, in a header there is none.
            if column in fields and all(field == field.strip() for field in fields):
                return kind, "the header of a table with the column"
    return None


def import_extra(package: str, purpose: str, install: str) -> Any:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        raise ModelError(
            f"{purpose} needs the package '{top}', which is not installed here ({error})", install
        ) from error


def import_parquet(doing: str = "reading") -> Any:
    """Import ``pyarrow.parquet``."""
    return import_extra("pyarrow.parquet", f"{doing} Parquet", "pip install 'spin-cli[parquet]'")
