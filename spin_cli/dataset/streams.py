"""Bytes and decoded lines of a file, with the position for every complaint."""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from spin_cli.artifacts import sha256_file
from spin_cli.dataset.formats import STDIN
from spin_cli.errors import DataError, UsageError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest physical line that is ever held in memory (a text of the longest allowed size, written
as JSON escapes of six bytes a character, still fits)."""

_CHUNK = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
# The first bytes of files that are no UTF-8 text at all: what they are and what to do.
_SIGNATURES = (
    (b"\xff\xfe\x00\x00", "UTF-32 text", "iconv -f utf-32 -t utf-8 FILE > FILE.utf8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f utf-16 -t utf-8 FILE > FILE.utf8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f utf-16 -t utf-8 FILE > FILE.utf8"),
    (_GZIP_MAGIC, "gzip data", "end the file's name in .gz"),
    (b"PAR1", "a Parquet file", "say --format parquet"),
    (b"PK\x03\x04", "a zip archive or an Excel sheet", "export it as CSV in UTF-8"),
)


def display_name(path: str | Path) -> str:
    """Name a source in messages."""
    return "<stdin>" if str(path) == STDIN else str(path)


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open a file or stdin for reading, unpacking gzip.

    Raises
    ------
    DataError
        For a file that is missing, a directory or unreadable.
    """
    with contextlib.ExitStack() as stack:
        if str(path) == STDIN:
            reader = _open_stdin(stack)
            # A pipe has no name that could end in .gz, so its first bytes decide.
            packed = reader.peek(2)[:2] == _GZIP_MAGIC
        else:
            try:
                reader = stack.enter_context(Path(path).open("rb"))
            except OSError as error:
                raise cannot_open(path, error) from error
            packed = Path(path).suffix.lower() == ".gz"
        if packed:
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=reader, mode="rb"))
            # GzipFile.readline is Python code; BufferedReader finds line ends in C.
            yield io.BufferedReader(cast("io.RawIOBase", unpacked), _CHUNK)
        else:
            yield reader


def _open_stdin(stack: contextlib.ExitStack) -> io.BufferedReader[Any]:
    if sys.stdin is None:
        raise UsageError("there is no stdin to read from", "give a file instead of -")
    buffer: BinaryIO = sys.stdin.buffer
    if (descriptor := _stdin_descriptor()) is not None:
        # A descriptor of our own: a thread that waits in sys.stdin holds a lock that Python needs
        # to end. Whoever reads from sys.stdin first has to read all of it.
        raw = stack.enter_context(io.FileIO(os.dup(descriptor)))
        return stack.enter_context(io.BufferedReader(raw, _CHUNK))
    if isinstance(buffer, io.BufferedReader):
        return buffer
    wrapper = io.BufferedReader(cast("io.RawIOBase", buffer))
    stack.callback(_let_go, wrapper)
    return wrapper


def _let_go(wrapper: io.BufferedReader[Any]) -> None:
    """Detach from stdin, which else would be closed with *wrapper*; it may be closed by now."""
    with contextlib.suppress(ValueError):
        wrapper.detach()


def _stdin_descriptor() -> int | None:
    """The number of the open file behind stdin; None where it is something made up."""
    try:
        return None if sys.stdin is None else sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def is_live(path: str | Path) -> bool:
    """Whether input may come bit by bit: a pipe or a terminal on stdin, or a named pipe."""
    try:
        if str(path) != STDIN:
            return stat.S_ISFIFO(Path(path).stat().st_mode)
        descriptor = _stdin_descriptor()
        return descriptor is not None and not stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def cannot_open(path: str | Path, error: OSError) -> DataError:
    """Say why a file cannot be opened."""
    path = Path(path)
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file", _similar_file(path))
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return DataError(
            f"{path}: a directory, where a file was expected", f"ls {path}   # then name one file"
        )
    reason = error.strerror or str(error)
    hint = f"chmod u+r {path}" if isinstance(error, PermissionError) else None
    return DataError(f"{path}: cannot be read: {reason}", hint)


def _similar_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"the folder {path.parent} does not exist either: check the path"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def broken_stream(name: str, line: int, error: Exception) -> DataError:
    """Say why reading stopped in the middle of a file."""
    if isinstance(error, EOFError):
        return DataError(
            f"{name}: the gzip data ends too early, after line {line}: the file is truncated",
            "copy or download it again; `gzip -t FILE` tells whether it is whole",
        )
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        hint = "copy or download it again; if it is plain text, take .gz off its name"
        return DataError(f"{name}: broken or no gzip data after line {line}: {error}", hint)
    return DataError(f"{name}: reading failed after line {line}: {error}")


class Lines:
    r"""Decoded physical lines of a byte stream, as an iterator that knows where it is.

    Only ``\n`` ends a line; line ends are kept. A line that cannot be used (not UTF-8, a NUL, over
    ``MAX_LINE_BYTES``) is handed out mended all the same, and the reason is put into ``fault``:
    so a bad line inside a quoted CSV field does not break the record's structure, and the
    reader of records can skip that record and go on.

    Attributes
    ----------
    number : int
        1-based number of the line handed out last.
    offset : int
        Bytes read so far.
    fault : DataError or None
        What is wrong with a line since the last ``take_fault``.
    """

    __slots__ = ("_stream", "fault", "name", "number", "offset")

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream = stream
        self.name = name
        self.number = 0
        self.offset = 0
        self.fault: DataError | None = None

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        try:
            raw = self._stream.readline(MAX_LINE_BYTES)
        except (EOFError, zlib.error, OSError) as error:
            raise broken_stream(self.name, self.number, error) from error
        if not raw:
            raise StopIteration
        self.number += 1
        start = self.offset
        self.offset += len(raw)
        if self.number == 1:
            raw = self._check_start(raw)
        if len(raw) >= MAX_LINE_BYTES and not raw.endswith(b"\n"):
            self._skip_line()
            return ""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self._note_encoding(raw, start, error)
            text = raw.decode(errors="replace")
        if "\0" in text:
            self._note_nul(start + raw.find(b"\0"))
            text = text.replace("\0", "\ufffd")
        return text

    def take_fault(self) -> DataError | None:
        """Return what was wrong with the lines since the last call, and forget it."""
        fault, self.fault = self.fault, None
        return fault

    def _check_start(self, raw: bytes) -> bytes:
        for magic, what, hint in _SIGNATURES:
            if raw.startswith(magic):
                message = f"{self.name}, line 1: this is {what}, where UTF-8 text was expected"
                raise DataError(message, hint.replace("FILE", self.name))
        return raw.removeprefix(_BOM)

    def _skip_line(self) -> None:
        while rest := self._stream.readline(_CHUNK):
            self.offset += len(rest)
            if rest.endswith(b"\n"):
                break
        self._note(
            f"longer than {MAX_LINE_BYTES // 2**20} MB",
            "one line has to be one row: look for missing line ends or an unclosed quote",
        )

    def _note_encoding(self, raw: bytes, start: int, error: UnicodeDecodeError) -> None:
        bad = raw[error.start]
        offset = start + error.start
        self._note(
            f"byte 0x{bad:02x} at byte offset {offset} of the file is not UTF-8 ({error.reason})",
            f"if the file is Latin-1: iconv -f latin1 -t utf-8 {self.name} > {self.name}.utf8",
        )

    def _note_nul(self, offset: int) -> None:
        self._note(
            f"a NUL character at byte offset {offset} of the file",
            f"remove it: tr -d '\\000' < {self.name} > {self.name}.clean "
            "(if every second byte is NUL, the file is UTF-16: iconv -f utf-16le -t utf-8)",
        )

    def _note(self, what: str, hint: str) -> None:
        if self.fault is None:  # the first fault of a record is the one to mend first
            self.fault = DataError(f"{self.name}, line {self.number}: {what}", hint)


def hash_file(path: Path) -> tuple[str, int]:
    """Return the SHA-256 (hex) and the size in bytes of a file as it lies on disk."""
    try:
        return sha256_file(path), path.stat().st_size
    except OSError as error:
        raise cannot_open(path, error) from error
