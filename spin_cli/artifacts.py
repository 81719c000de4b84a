"""Artifacts on disk: folder layouts, manifests and fingerprints.

Every stage writes one folder, whole or not at all (`atomic`). ``manifest.json`` says what it
is and from what it was made; its *fingerprint* is a SHA-256 over all of it but paths, so that two
runs on the same input agree. Times and speeds stand in ``log.json`` alone, which no fingerprint
or checksum covers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from spin_cli import atomic
from spin_cli.errors import ArtifactError
from spin_cli.fields import MANIFEST as MANIFEST
from spin_cli.fields import check_kinds
from spin_cli.fields import read_json as read_json
from spin_cli.fields import to_plain as to_plain
from spin_cli.workers import side_by_side

SCHEMA = 1
"""Version of the folder layouts; raised when an older spin could no longer read them."""

LOG = "log.json"
MAX_NAME = 120
"""Characters of a file's name that any file system takes."""
EXTRACT_AGAIN = "Make the activations again: spin extract … --force"
STAGE_OF = {"activations": "extract", "selection": "select", "head": "train"}
LIBRARIES = ("torch", "transformers", "numpy", "h5py", "safetensors", "tokenizers")
OPTIONS = {"poolings": "--pooling", "sites": "--site", "model.overlap": "--window-overlap"}
"""Fields of a request whose option has another name."""
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


def write_manifest(
    folder: Path,
    kind: str,
    content: Mapping[str, Any],
    *,
    leave_out: Collection[str] = (),
    hashed: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write ``manifest.json``: *content*, versions, size and SHA-256 of every file, fingerprint.

    Files named in *leave_out* are none of the artifact's; those in *hashed* have the hash that is
    given there, under a name of its own.
    """
    others, given = (MANIFEST, LOG, *leave_out), hashed or {}
    paths = [path for path in sorted(folder.iterdir()) if path.name not in others]

    def entry(path: Path) -> dict[str, Any]:
        found = given[path.name] if path.name in given else {"sha256": sha256_file(path)}
        return {"bytes": path.stat().st_size, **found}

    entries = side_by_side(entry, paths, 0, size=lambda path: path.stat().st_size)
    files = {path.name: found for path, found in zip(paths, entries, strict=True)}
    manifest = {
        "kind": kind,
        "schema": SCHEMA,
        "versions": versions(),
        **to_plain(content),
        "files": files,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    manifest["checksum"] = checksum(manifest)
    atomic.write_json(folder / MANIFEST, manifest)
    return manifest


def write_log(folder: Path, log: Mapping[str, Any]) -> None:
    """Write ``log.json``: what is no part of the result, such as times, with its own checksum."""
    atomic.write_json(folder / LOG, {**log, "checksum": checksum(log)})


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check a folder's manifest.

    Raises
    ------
    ArtifactError
        No such folder (the stage to run is named, or the folder that is meant), another kind, a
        newer schema, a manifest that was edited, or a file that is missing or of another size.
    """
    command = _advice(folder, kind) if kind else None
    if not folder.exists():
        if atomic.partial_folder(folder).exists():
            raise ArtifactError(
                f"{folder}: not finished (only {atomic.partial_folder(folder).name} is there)",
                hint=f"Run the same `spin {STAGE_OF.get(kind or '', 'extract')}` again to resume.",
            )
        raise ArtifactError(f"{folder}: no such folder", hint=command)
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST} in it, so not an artifact of spin", command)
    manifest = read_listing(folder)
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


def read_listing(folder: Path) -> dict[str, Any]:
    """A manifest that lists files, whatever else may be wrong; `ArtifactError` where it is none."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of spin")
    return manifest


def _advice(folder: Path, kind: str) -> str:
    """Where the artifact that is wanted lies, or how it is made.

    In a run, and beside its other artifacts, it has the name of its kind.
    """
    for there in (folder / kind, folder.parent / kind):
        if there != folder and (there / MANIFEST).is_file():
            return f"Give {there}, which is there."
    return f"Run `spin {STAGE_OF[kind]}` first."


def check_size(folder: Path, name: str, entry: Any) -> None:
    """Raise `ArtifactError` unless the file *name* is in *folder* with the size in *entry*."""
    if Path(name).name != name or len(name) > MAX_NAME or not isinstance(entry, dict):
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


def seen_from(folder: Path, path: Path) -> str:
    """*path* relative to *folder*, where both lie now; a link keeps its name."""
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def parent_entry(child: Path, parent: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How a manifest names the artifact it was made from; the path is relative to the child."""
    return {
        "path": os.path.relpath(parent.resolve(), child.resolve()),
        "kind": manifest["kind"],
        "sha256": manifest["fingerprint"],
        "digests": _digests(manifest),
    }


def _digests(manifest: Mapping[str, Any], *inside: str) -> dict[str, Any]:
    """A short hash of each field, and of each of a request and its options.

    By them a child can tell later what of its parent changed, without a copy of its manifest.
    """
    found: dict[str, Any] = {}
    for name, value in to_plain(manifest).items():
        if (*inside, name) in (("request",), ("request", "options")):
            found[name] = _digests(value, *inside, name)
        elif name not in UNFINGERPRINTED:
            found[name] = fingerprint(value)[:12]
    return found


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
        named = differing_fields(entry["digests"], _digests(parent)) if "digests" in entry else []
        # What was asked for is why the rest is another.
        named = [name for name in named if name.startswith("request.")] or named
        what = f" in {', '.join(named[:5])}" if named else ""
        raise ArtifactError(
            f"{folder}: made from an earlier state of {path}, which changed since{what}",
            hint=f"Run `spin {_remake(folder, path, manifest['kind'])} --force` to make it again.",
        )
    return path, parent


def _remake(folder: Path, parent: Path, kind: str) -> str:
    return f"{STAGE_OF[kind]} {parent}" if kind in STAGE_OF else f"{kind} {parent} {folder}"


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two manifests (or parts of them) differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names: list[str] = []
        for key in sorted(set(old) | set(new)):
            if key not in UNFINGERPRINTED:
                names += differing_fields(old.get(key), new.get(key), f"{prefix}{key}.")
        return names
    return [] if old == new else [prefix.rstrip(".")]


@dataclass(frozen=True)
class Change:
    """A field that is not what it was."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """As ``field: old → new``, or ``field`` alone where the values say nothing."""
        if self.field.endswith("sha256") or self.field.startswith(("data", "model.weights")):
            return f"{self.field} changed"
        option = self.field.removeprefix("options.")
        named = f" ({OPTIONS[option]})" if option in OPTIONS else ""
        return f"{self.field}{named}: {_short(self.old)} → {_short(self.new)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 30 else f"{text[:29]}…"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """The fields in which two requests differ, with their values."""
    return tuple(
        Change(name, _field(old, name), _field(new, name)) for name in differing_fields(old, new)
    )


def _field(value: Any, name: str) -> Any:
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
