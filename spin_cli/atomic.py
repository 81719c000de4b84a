"""Files and folders that are whole under their final name, or not there.

A folder is built beside its final name (``NAME.partial``), synced and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from spin_cli.errors import ArtifactError
from spin_cli.fields import MANIFEST, to_plain

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one folder are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that say that there is no room left."""
WITH_O = "with -o"
"""How most commands are told the folder to write."""


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write *value* as indented JSON, whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """How `write_json` writes *value*."""
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def disk_errors(folder: Path, how: str = WITH_O) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a plain `ArtifactError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = _number_of(error)
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "writing is not permitted",
            errno.EPERM: "writing is not permitted",
            errno.EMFILE: "more files than this process may open (`ulimit -n`) are needed",
        }
        if number not in reasons:
            raise
        raise ArtifactError(
            f"{folder}: {reasons[number]}; nothing half-written is left under the final name",
            hint=(
                f"Make room (or name another folder {how}) and run the same command again."
                if number in FULL
                else "Raise it with `ulimit -n 4096`."
                if number == errno.EMFILE
                else f"Name a folder that can be written {how}."
            ),
        ) from error


def _number_of(error: OSError | RuntimeError) -> int | None:
    """The error's ``errno``, which HDF5 may have put into words alone."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"errno = (\d+)", str(error))):
        number = int(found[1])
    return number


def claim(file: BinaryIO, size: int) -> None:
    """Have the disk keep *size* bytes for an open file, where the system knows how to.

    Raises
    ------
    OSError
        Among others ``ENOSPC``.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def write_named(path: Path, text: str) -> None:
    """Write a file that the user named: its folder is made, and a name in ``.gz`` packs it."""
    data = text.encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, gzip.compress(data, mtime=0) if path.suffix.lower() == ".gz" else data)


def partial_folder(folder: Path) -> Path:
    """The folder beside *folder* in which it is built."""
    return folder.with_name(folder.name + ".partial")


def check_vacant(folder: Path, *, force: bool, how: str = WITH_O) -> None:
    """Refuse to overwrite an existing artifact unless *force* is set; *how* another is named."""
    if not folder.exists() or force:
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{folder}: already holds a complete artifact",
            hint=f"Give --force to replace it, or another folder {how}.",
        )
    raise ArtifactError(
        f"{folder}: exists and is not an artifact of spin", hint=f"Choose another folder {how}."
    )


def check_free(path: Path, *, force: bool) -> None:
    """Refuse to write a file over another unless *force* is set, over aught else at all."""
    if _is_device(path) or (path.exists() and not path.is_file()):
        what = "folder" if path.is_dir() else "device or a pipe"
        raise ArtifactError(f"{path}: is a {what}, where a file was expected", "Name a file.")
    if path.exists() and not force:
        raise ArtifactError(f"{path}: exists already", "Give --force to replace it.")


def _is_device(path: Path) -> bool:
    """Whether it is a name of one, or of an open file: what that leads to may be a plain file."""
    folder = path.absolute().parent.resolve()
    return folder == Path("/dev") or folder.parts[1:2] == ("proc",)


def clear(folder: Path) -> None:
    """Remove all that is in *folder*."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path, wanted: bool = True, how: str = WITH_O) -> Iterator[None]:
    """Keep other processes from building *folder*, which need not be there yet.

    The lock is the kernel's: it ends with the process, however that ends, and what a killed one
    leaves of it keeps nobody out. Its file lies beside the folder: within, it would be renamed with
    it, or would have to go before that, and leave a moment in which two processes write.

    Raises
    ------
    ArtifactError
        Another process is at work there.
    """
    if not wanted or fcntl is None:
        yield
        return
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(folder, path, how)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still held: whoever waits for it sees that it is gone
        os.close(descriptor)


def _lock(folder: Path, path: Path, how: str) -> int:
    """The open lock file, held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ArtifactError(
                        f"{folder}: another process is writing it",
                        hint=f"Wait until it has ended, or name another folder {how}.",
                    ) from error
            if _same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one that held it has ended since, and removed it


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def building(folder: Path, *, force: bool, how: str = WITH_O) -> Iterator[Path]:
    """Yield an empty folder beside *folder*; on success it takes *folder*'s place.

    On any failure it is removed and what stood under the final name is untouched.
    """
    partial = partial_folder(folder)
    with disk_errors(folder, how), locked(partial, how=how):
        check_vacant(folder, force=force, how=how)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            clear(partial)
            yield partial
            publish(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial: Path, folder: Path) -> None:
    """Sync *partial* and rename it to *folder*; what is there gives way, or stays on failure."""
    for path in sorted(partial.iterdir()):
        sync(path)
    sync(partial)
    old = folder.with_name(folder.name + ".old")
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
