"""JSON files of artifacts, which may come from a stranger: what is missing or wrong is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spin_cli.choices import Metric, Pooling, Site, StorageDtype
from spin_cli.config import MAX_WIDTH, SPARSE
from spin_cli.errors import ArtifactError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20
MAX_COUNT = 2**48
Check = tuple[str, Callable[[Any], bool]]
OBJECT: Check = ("an object", lambda value: isinstance(value, dict))
LIST: Check = ("a list", lambda value: isinstance(value, list))
TEXT: Check = ("text", lambda value: isinstance(value, str))
COUNT: Check = (
    f"a whole number up to {MAX_COUNT}",
    lambda value: type(value) is int and 0 <= value <= MAX_COUNT,
)
WIDTH: Check = (
    f"a whole number from 1 to {MAX_WIDTH}",
    lambda value: type(value) is int and 1 <= value <= MAX_WIDTH,
)
NAME: Check = (
    "a name that files can have",
    lambda value: TEXT[1](value) and value != "" and value.isprintable() and "/" not in value,
)
NAMES: Check = ("a list of names", lambda value: LIST[1](value) and all(map(TEXT[1], value)))


def _one_of(kind: type[Enum]) -> Check:
    values = [member.value for member in kind]
    return "one of " + ", ".join(values), lambda value: TEXT[1](value) and value in values


KINDS: Mapping[str, Check] = {
    "versions": OBJECT,
    "parent": OBJECT, "parent.path": TEXT, "parent.kind": TEXT, "parent.sha256": TEXT,
    "parent.digests": OBJECT,
    "request": OBJECT, "request.model": OBJECT, "request.data": LIST,
    "request.options": OBJECT, "request.options.data": OBJECT,
    "classes": NAMES, "layers": NAMES, "features": LIST, "counts": OBJECT, "counts.rows": COUNT,
    "storage_dtype": _one_of(StorageDtype), "metric": _one_of(Metric),
}  # fmt: skip
"""What a manifest's fields hold, where they are there; those above before those within them."""
FEATURE: Mapping[str, Check] = {
    "layer": NAME, "site": _one_of(Site), "pooling": _one_of(Pooling), "width": WIDTH,
    "hookpoint": TEXT, "overflowed": COUNT,
}  # fmt: skip
"""The same of each of its ``features``."""


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as what JSON can hold; NaN and infinity as null."""
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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Fields(dict[str, Any]):
    """A JSON object of a file: to ask for a field that is not there is an `ArtifactError`."""

    def __init__(self, values: Mapping[str, Any], path: Path, place: str) -> None:
        super().__init__(values)
        self.path, self.place = path, place

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(
            f"{self.path}: the field '{self.place}{key}' is missing",
            "Make the artifact again with --force; docs/formats.md says what each file holds.",
        )


def _fields(value: Any, path: Path, place: str = "") -> Any:
    if isinstance(value, dict):
        inside = {key: _fields(item, path, f"{place}{key}.") for key, item in value.items()}
        return Fields(inside, path, place)
    if isinstance(value, list):
        return [
            _fields(item, path, f"{place.removesuffix('.')}[{at}].")
            for at, item in enumerate(value)
        ]
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _none(_: str) -> None:
    """What a number that is none is read as."""


def read_json(path: Path, *, strict: bool = False) -> Any:
    """Read a JSON file of bounded size; `ArtifactError` where that fails.

    Its objects are `Fields`: whoever reads them need not look first whether a field is there. NaN
    and infinity, which are no JSON but which Python writes, are None; refused where *strict*.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not written by spin")
        constant = _refuse if strict else _none
        return _fields(json.loads(path.read_text(encoding="utf-8"), parse_constant=constant), path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error})") from error


def check_kinds(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` where a field of `KINDS` or `FEATURE`, or a count, is wrong."""
    for place, check in KINDS.items():
        *above, name = place.split(".")
        inside = manifest
        for step in above:
            inside = inside.get(step, {})
        if name in inside:
            _check(path, place, inside[name], check)
    for name, count in manifest.get("counts", {}).items():
        _check(path, f"counts.{name}", count, COUNT)
    for at, feature in enumerate(manifest.get("features", [])):
        _check(path, f"features[{at}]", feature, OBJECT)
        for name, check in FEATURE.items():
            if name in feature:
                _check(path, f"features[{at}].{name}", feature[name], check)


def _check(path: Path, place: str, value: Any, check: Check) -> None:
    expected, is_right = check
    if not is_right(value):
        found = json.dumps(value)[:60]
        raise ArtifactError(f"{path}: the field '{place}' is {found}, expected {expected}")
