"""Artifacts on disk: folder layouts, manifests, fingerprints and atomic writes.

Every stage writes one folder. It is built beside its final name (``NAME.partial``), synced and
renamed, so a folder under its final name is always whole. ``manifest.json`` says what the folder
is and from what it was made; its *fingerprint* is a SHA-256 over all of it but paths, so that two
runs on the same input agree. Times and speeds stand in ``log.json`` alone, which no fingerprint
or checksum covers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from spin_cli.config import SPARSE
from spin_cli.errors import ArtifactError
from spin_cli.fields import check_kinds
from spin_cli.fields import read_json as read_json

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs into one folder are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
"""Version of the folder layouts; raised when an older spin could no longer read them."""

MANIFEST = "manifest.json"
LOG = "log.json"
LOCK = ".lock"
STAGE_OF = {"activations": "extract", "selection": "select", "head": "train"}
LIBRARIES = ("torch", "transformers", "numpy", "h5py", "safetensors", "tokenizers")
UNFINGERPRINTED = frozenset({"path", "fingerprint", "checksum"})


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(field, getattr(value, field.name)) for field in fields(value)]
        return {
            field.name: to_plain(item)
            for field, item in pairs
            if item is not None or SPARSE not in field.metadata
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def fingerprint(value: Any) -> str:
    """SHA-256 of *value* as canonical JSON, without paths, ``fingerprint`` and ``checksum``."""
    return _hash_json(_stripped(to_plain(value)))


def checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of *value* as canonical JSON, paths included, without its own ``checksum``."""
    return _hash_json({key: item for key, item in to_plain(value).items() if key != "checksum"})


def _hash_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stripped(v) for k, v in value.items() if k not in UNFINGERPRINTED}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Versions of spin and of the libraries that can change what it computes."""
    found = {"spin": metadata.version("spin-cli"), "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# -- atomic writes ---------------------------------------------------------------------------


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
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a plain `ArtifactError`."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "writing is not permitted",
            errno.EPERM: "writing is not permitted",
        }
        if error.errno not in reasons:
            raise
        raise ArtifactError(
            f"{folder}: {reasons[error.errno]}; nothing was left under its final name",
            hint=(
                "Make room (or name another folder with -o) and run the same command again."
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else "Name a folder that can be written with -o."
            ),
        ) from error


def partial_folder(folder: Path) -> Path:
    """The folder beside *folder* in which it is built."""
    return folder.with_name(folder.name + ".partial")


def check_vacant(folder: Path, *, force: bool) -> None:
    """Refuse to overwrite an existing artifact unless *force* is set."""
    if not folder.exists() or force:
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{folder}: already holds a complete artifact",
            hint="Give --force to replace it, or another folder with -o.",
        )
    raise ArtifactError(
        f"{folder}: exists and is not an artifact of spin", hint="Choose another folder with -o."
    )


def clear(folder: Path) -> None:
    """Remove all that is in *folder* but its lock."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Keep other processes out of *folder*, which is made where it is missing.

    The lock is the kernel's: it ends with the process, however that ends.

    Raises
    ------
    ArtifactError
        Another process is at work there.
    """
    if not wanted or fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass  # a file system without locks
        # One that just finished has renamed the folder, and the lock that we hold with it.
        if taken or not _same_file(descriptor, folder / LOCK):
            raise ArtifactError(
                f"{folder}: another process is writing it",
                hint="Wait until it has ended, or name another folder with -o.",
            )
        yield
    finally:
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def building(folder: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside *folder*; on success it takes *folder*'s place.

    On any failure it is removed and what stood under the final name is untouched.
    """
    check_vacant(folder, force=force)
    partial = partial_folder(folder)
    with disk_errors(folder), locked(partial):
        try:
            clear(partial)
            yield partial
            publish(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def publish(partial: Path, folder: Path) -> None:
    """Sync *partial* and rename it to *folder*, replacing what is there."""
    (partial / LOCK).unlink(missing_ok=True)
    for path in sorted(partial.iterdir()):
        sync(path)
    sync(partial)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# -- manifests -------------------------------------------------------------------------------


def write_manifest(
    folder: Path, kind: str, content: Mapping[str, Any], *, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """Write ``manifest.json``: *content*, versions, size and SHA-256 of every file, fingerprint.

    Files named in *leave_out* are none of the artifact's.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, LOG, LOCK, *leave_out)
    }
    manifest = {
        "kind": kind,
        "schema": SCHEMA,
        "versions": versions(),
        **to_plain(content),
        "files": files,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["checksum"] = checksum(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def write_log(folder: Path, log: Mapping[str, Any]) -> None:
    """Write ``log.json``: what is no part of the result, such as times, with its own checksum."""
    write_json(folder / LOG, {**log, "checksum": checksum(log)})


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check a folder's manifest.

    Raises
    ------
    ArtifactError
        No such folder (the stage to run is named), another kind, a newer schema, a manifest that
        was edited, or a file that is missing or of another size.
    """
    command = f"Run `spin {STAGE_OF[kind]}` first." if kind else None
    if not folder.exists():
        if partial_folder(folder).exists():
            raise ArtifactError(
                f"{folder}: not finished (only {partial_folder(folder).name} is there)",
                hint=f"Run the same `spin {STAGE_OF.get(kind or '', 'extract')}` again to resume.",
            )
        raise ArtifactError(f"{folder}: no such folder", hint=command)
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST} in it, so not an artifact of spin", command)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of spin")
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder}: written in format {manifest.get('schema')!r}, this spin reads {SCHEMA}",
            hint="Use the spin version that wrote it, or make it again.",
        )
    if kind is not None and manifest.get("kind") != kind:
        raise ArtifactError(f"{folder}: holds {manifest.get('kind')!r}, expected {kind!r}", command)
    if checksum(manifest) != manifest.get("checksum"):
        raise ArtifactError(f"{folder / MANIFEST}: changed after it was written")
    check_kinds(folder / MANIFEST, manifest)
    for name, entry in manifest["files"].items():
        check_size(folder, name, entry)
    return manifest


def check_size(folder: Path, name: str, entry: Any) -> None:
    """Raise `ArtifactError` unless the file *name* is in *folder* with the size in *entry*."""
    if Path(name).name != name or not isinstance(entry, dict):
        raise ArtifactError(f"{folder / MANIFEST}: file entry {name!r} is not valid")
    path = folder / name
    if not path.is_file():
        raise ArtifactError(f"{path}: missing (the manifest lists it)")
    if path.stat().st_size != entry.get("bytes"):
        raise ArtifactError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry.get('bytes')};"
            " truncated or changed",
            hint="Make the artifact again with --force.",
        )


def parent_entry(child: Path, parent: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How a manifest names the artifact it was made from; the path is relative to the child."""
    relative = os.path.relpath(parent.resolve(), child.resolve())
    return {"path": relative, "kind": manifest["kind"], "sha256": manifest["fingerprint"]}


def read_parent(folder: Path, manifest: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Find and check the artifact that *folder* was made from.

    Raises
    ------
    ArtifactError
        It is gone, damaged, or no longer the one that was read; the fields that differ are named.
    """
    entry = manifest["parent"]
    path = (folder / entry["path"]).resolve()
    parent = read_manifest(path, entry["kind"])
    if parent["fingerprint"] != entry["sha256"]:
        raise ArtifactError(
            f"{folder}: made from an earlier state of {path}, which changed since",
            hint=f"Run `spin {STAGE_OF[manifest['kind']]} {path} --force` to make it again.",
        )
    return path, parent


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two manifests (or parts of them) differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names: list[str] = []
        for key in sorted(set(old) | set(new)):
            if key not in UNFINGERPRINTED:
                names += differing_fields(old.get(key), new.get(key), f"{prefix}{key}.")
        return names
    return [] if old == new else [prefix.rstrip(".")]
