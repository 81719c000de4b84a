"""All options of a run as ``spin.toml``: written so that the same run can be made again.

Sections are those of the configurations in `config`, keys are their fields; nothing is listed here
a second time. What is not set (None) has no form in TOML: it stands there as a comment.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from spin_cli.choices import SITE_NAMES, sites_of
from spin_cli.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    SelectConfig,
    TrainConfig,
)
from spin_cli.errors import UsageError
from spin_cli.ranges import check_ranges
from spin_cli.typed import from_plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "spin.toml"
MAX_BYTES = 2**20
Sections = dict[str, dict[str, Any]]
CONFIGS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "extract": ExtractConfig,
    "select": SelectConfig,
    "train": TrainConfig,
}
DATA_PATH = "path"
"""The key of section ``data`` that is no field of `DataConfig`."""
NESTED = ("data", "model")
"""Fields of `ExtractConfig` that are sections of their own."""
TRUST = ("trust_remote_code", "allow_pickle")
"""Never believed from a file, which may come from a stranger."""
PATHS = {"data": (DATA_PATH,), "model": ("model", "adapter"), "train": ("oof",)}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run."""

    data: Path
    extracting: ExtractConfig
    selecting: SelectConfig
    training: TrainConfig


def sections_of(recipe: Recipe) -> Sections:
    """Every option by section and key."""
    parts = {
        "data": recipe.extracting.data,
        "model": recipe.extracting.model,
        "extract": recipe.extracting,
        "select": recipe.selecting,
        "train": recipe.training,
    }
    found = {name: {key: getattr(part, key) for key in keys(name)} for name, part in parts.items()}
    return {**found, "data": {DATA_PATH: recipe.data, **found["data"]}}


def keys(section: str) -> list[str]:
    """The options of a section."""
    left_out = NESTED if section == "extract" else ()
    return [field.name for field in fields(CONFIGS[section]) if field.name not in left_out]


def recipe_of(sections: Sections, where: str) -> Recipe:
    """Check options and fill in the defaults of those that are not given.

    Raises
    ------
    UsageError
        An unknown section or key (the nearest one is named), or a value that cannot be; with
        *where* it stands.
    """
    _refuse_unknown(sections, where)
    for section, key in (("data", DATA_PATH), ("model", "model")):
        if not isinstance(sections.get(section, {}).get(key), str | Path):
            raise UsageError(f"{where}: [{section}] {key} is missing", "A run needs both.")
    made: dict[str, Any] = {}
    for name in CONFIGS:
        values = defaults(name) | sections.get(name, {})
        data = values.pop(DATA_PATH, None) if name == "data" else sections["data"][DATA_PATH]
        if name == "model":
            values["model"] = _tidy(values["model"])
        elif name == "extract":
            values |= {part: made[part] for part in NESTED}
        made[name] = _checked(name, values, where)
    return Recipe(
        Path(os.path.normpath(data)), made["extract"], made["select"], made["train"]
    )  # fmt: skip


def _refuse_unknown(sections: Mapping[str, Any], where: str) -> None:
    for name, values in sections.items():
        if name not in CONFIGS:
            raise UsageError(f"{where}: no section [{name}]", _nearest(name, CONFIGS))
        if not isinstance(values, dict):
            raise UsageError(f"{where}: {name} is no section", f"Write [{name}] on its own line.")
        known = [*keys(name), DATA_PATH] if name == "data" else keys(name)
        for key in values:
            if key not in known:
                others = [other for other in CONFIGS if key in keys(other)]
                belongs = " or ".join(f"[{other}]: {other}.{key}" for other in others)
                hint = f"It belongs to {belongs}" if others else _nearest(key, known)
                raise UsageError(f"{where}: [{name}] has no option {key!r}", hint)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}"


def defaults(section: str) -> dict[str, Any]:
    """The options of a section that have a default."""
    every = fields(CONFIGS[section])
    return {field.name: field.default for field in every if field.default is not MISSING}


def _checked(section: str, values: dict[str, Any], where: str) -> Any:
    try:
        made = from_plain(CONFIGS[section], values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: [{section}] {error}") from error
    check_ranges(made, f"{where}: [{section}] ")
    for key in keys(section):
        value = getattr(made, key)
        if problem := _problem(section, key, value):
            raise UsageError(f"{where}: [{section}] {key} = {value}: expected {problem}")
    if section == "model":
        if made.chat and made.prompt_template is not None:
            raise UsageError(f"{where}: [model] chat and prompt_template exclude each other")
        if made.system_prompt is not None and not made.chat:
            raise UsageError(f"{where}: [model] system_prompt belongs to chat = true")
    if section in ("select", "train"):
        return replace(made, etas=tuple(sorted(set(made.etas))))
    return made


def _problem(section: str, key: str, value: Any) -> str | None:
    """What a value of the right type should be and is not."""
    if value is None:
        return None
    if isinstance(value, tuple) and not value:
        return "at least one"
    if (section, key) == ("train", "sites") and not all(map(_names_sites, value)):
        return f"some of {SITE_NAMES}"
    if key == "device_map" and value != "auto":
        return "auto"
    if key == "prompt_template" and value.count("{text}") != 1:
        return "text with one {text} in it"
    return None


def _names_sites(name: str) -> bool:
    try:
        return bool(sites_of(name))
    except ValueError:
        return False


# -- TOML ------------------------------------------------------------------------------------


def to_toml(recipe: Recipe, folder: Path, version: str) -> str:
    """The text of ``spin.toml`` in *folder*; relative paths are written as seen from there."""
    lines = [
        f"# All options of this run, written by spin {version}. The same run again:",
        "#     spin run THIS_FILE",
        "# Relative paths count from this file's folder. A key behind # is not set.",
    ]
    for name, values in sections_of(recipe).items():
        lines += ["", f"[{name}]"]
        for key, value in values.items():
            if _is_local(name, key, value):
                value = os.path.relpath(value, folder)
                if key == "model" and not value.startswith("."):
                    value = f"./{value}"  # else it could be the name of a hub's model
            lines.append(f"# {key} =" if value is None else f"{key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _is_local(section: str, key: str, value: Any, folder: Path = Path()) -> bool:
    """Whether an option is a path that counts from *folder*; a model's name may be one or not."""
    if key not in PATHS.get(section, ()) or not isinstance(value, str | Path):
        return False
    text = str(value)
    if Path(text).is_absolute() or text.startswith(("~", "bundled:")):
        return False
    if key != "model":
        return True
    return text.startswith(("./", "../")) or text.endswith(".gguf") or (folder / text).exists()


def _tidy(model: str) -> str:
    """A model's path as it reads after it was written to a file and read again.

    One that leads nowhere stays recognisable as a path, for the error.
    """
    if not _is_local("model", "model", model):
        return model
    path = os.path.normpath(model)
    return path if Path(path).exists() or path.startswith(("/", ".")) else f"./{path}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return _toml(value.value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    # JSON's escapes are TOML's, but for one character that JSON lets through.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path) -> Sections:
    """The sections of a ``spin.toml``; paths in it as seen from here.

    Raises
    ------
    UsageError
        No such file, or not TOML; or it asks for what only the command line may allow.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES:,} bytes, not a file of options")
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read ({reason})") from error
    _refuse_unknown(sections, str(path))
    for name, values in sections.items():
        for key, value in values.items():
            if _is_local(name, key, value, path.parent):
                values[key] = os.path.normpath(path.parent / value)
    return sections


def withhold_trust(sections: Sections, allowed: Iterable[str], where: str) -> None:
    """Raise `UsageError` if the file asks for foreign code or pickles, unless it is *allowed*."""
    for key in TRUST:
        if sections.get("model", {}).get(key) is True and key not in allowed:
            option = f"--{key.replace('_', '-')}"
            raise UsageError(
                f"{where}: [model] {key} = true is not taken from a file",
                f"Give {option} as well, if you trust this model.",
            )


def override(sections: Sections, assignments: Iterable[str]) -> Sections:
    """*sections* with ``SECTION.KEY=VALUE`` put over them; a value is TOML, or plain text."""
    changed = {name: dict(values) for name, values in sections.items()}
    for text in assignments:
        place, equals, value = text.partition("=")
        section, dot, key = place.strip().partition(".")
        if not equals or not dot:
            raise UsageError(f"--set {text}: expected SECTION.KEY=VALUE, as train.head=mlp")
        _refuse_unknown({section: {key: None}}, f"--set {text}")
        changed.setdefault(section, {})[key] = _value(value.strip(), defaults(section).get(key))
    return changed


def _value(text: str, default: Any) -> Any:
    if isinstance(default, tuple) and not text.startswith("["):
        return [_value(part.strip(), None) for part in text.split(",")]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
