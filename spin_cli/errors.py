"""Every error that spin raises on purpose, with the exit code of the command line.

::

    SpinError             (base; never raised itself)
    ├── UsageError        2   an option or argument that cannot work
    ├── DataError         3   bad input rows, labels or text files
    ├── ArtifactError     4   an artifact missing, stale, corrupt or in the way
    └── ModelError        5   a model, tokenizer or device that cannot be used

Anything else that escapes is a bug (exit code 1, with its traceback); an interrupt is 130, SIGTERM
143.
"""

from __future__ import annotations


class SpinError(Exception):
    """What went wrong and how to mend it.

    Parameters
    ----------
    message : str
        What is wrong, where (file, row, column, layer) and what was expected.
    hint : str, optional
        The next thing to do, best as a command that can be typed.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SpinError):
    """An option or argument that cannot work."""

    exit_code = 2


class DataError(SpinError):
    """Input rows, labels or files that cannot be used."""

    exit_code = 3


class ArtifactError(SpinError):
    """An artifact that is missing, stale, corrupt or in the way."""

    exit_code = 4


class ModelError(SpinError):
    """A model, tokenizer, package or device that cannot be used."""

    exit_code = 5
