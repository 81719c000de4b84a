"""Data from stdin, kept in a file while they are in use: a data set is read several times."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from spin_cli import ranks
from spin_cli.choices import Format
from spin_cli.dataset.formats import STDIN
from spin_cli.dataset.streams import open_bytes
from spin_cli.errors import DataError, UsageError


@contextlib.contextmanager
def spooled(data: Path, output: Path, format: Format) -> Iterator[Path]:  # noqa: A002
    """Yield a path that can be read again: *data* itself, or a copy of stdin for ``-``.

    The copy lies beside *output* under a name that does not change from run to run, so that a run
    which was interrupted can be resumed with the same input. It is removed at the end.

    Raises
    ------
    UsageError
        Stdin without a format, or with several processes.
    DataError
        Stdin was empty.
    """
    if str(data) != STDIN:
        yield data
        return
    if format in (Format.AUTO, Format.LINES):
        raise UsageError("-: the format of stdin is not known", "Give --format csv, tsv or jsonl.")
    if ranks.current().size > 1:
        raise UsageError("-: several processes cannot share stdin", "Save the data to a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.stdin.{format.value}")
    try:
        with open_bytes(STDIN) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**20)
            copy.flush()
            os.fsync(copy.fileno())
        if not path.stat().st_size:
            raise DataError("<stdin>: no data came", "Pipe a table with a header into it.")
        yield path
    finally:
        path.unlink(missing_ok=True)
