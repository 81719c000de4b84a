"""What JSON and TOML say, as the types of a configuration's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from spin_cli.config import SPARSE

Config = TypeVar("Config")


def from_plain(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A flat configuration, such as `DataConfig`, out of what JSON or TOML says of it.

    Raises
    ------
    KeyError, ValueError, TypeError
        A field is missing, or its value is not of the field's type.
    """
    hints = get_type_hints(kind)
    made = {}
    for each in fields(kind):  # type: ignore[arg-type]
        name = each.name
        value = values.get(name, each.default) if SPARSE in each.metadata else values[name]
        made[name] = _typed(name, value, hints[name])
    return kind(**made)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """*value* as the type that *hint* asks for; a list becomes a tuple, text an enum or a path."""
    for kind in get_args(hint) if _is_union(hint) else (hint,):
        if get_origin(kind) is tuple:
            if isinstance(value, list | tuple):
                return tuple(_typed(name, item, get_args(kind)[0]) for item in value)
        elif issubclass(kind, Enum):
            if isinstance(value, str) and value in [member.value for member in kind]:
                return kind(value)
        elif kind is float and type(value) in (int, float):
            return float(value)
        elif kind is Path and isinstance(value, str | Path):
            return Path(value)
        elif type(value) is kind:
            return value
    raise TypeError(f"{name}: {value!r} is not {_wanted(hint)}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _wanted(hint: Any) -> str:
    """What a type is called in an error."""
    if _is_union(hint):
        return " or ".join(_wanted(kind) for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is tuple:
        return f"a list, each item {_wanted(get_args(hint)[0])}"
    if issubclass(hint, Enum):
        return f"one of {', '.join(member.value for member in hint)}"
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(hint, "text")
