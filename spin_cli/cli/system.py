"""What the operating system refuses where no stage foresaw it: a full disk behind stdout, say."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spin_cli import atomic
from spin_cli.errors import ArtifactError

FULL = (*atomic.FULL, errno.EFBIG)
OF_STDOUT = (*FULL, errno.EIO, errno.EBADF)
"""What writing to stdout ends with; such an error names no file."""


@contextmanager
def plain_os_errors() -> Iterator[None]:
    """Raise `ArtifactError` for an error of the system; stdout is written to its end in here.

    Errors without a number are a library's own, and remain as they are.
    """
    _replace_closed()
    try:
        yield
        _flush()
    except OSError as error:
        place = error.filename2 or error.filename
        if place is None and error.errno not in OF_STDOUT:
            raise
        hint = "Name a place that is there and can be used; SPIN_DEBUG=1 shows what was done there."
        if error.errno in FULL:
            hint = "Make room, or write to another disk, and run the same command again."
        raise ArtifactError(f"{place or 'stdout'}: {error.strerror}", hint) from error
    finally:
        _let_go_of_stdout()


def _replace_closed() -> None:
    """With `>&-` Python has no stdout; and what is meant for a stderr that is none goes there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _flush() -> None:
    if not sys.stdout.closed:
        sys.stdout.flush()


def _let_go_of_stdout() -> None:
    """Python writes what is left when it ends, and complains where that fails once more."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
