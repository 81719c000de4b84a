"""Options that need more than typer to be understood."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from spin_cli.choices import SITE_NAMES, Bits, sites_of
from spin_cli.errors import UsageError
from spin_cli.ranges import ETA, SHARE

Choice = TypeVar("Choice", bound=Enum)


def listed(option: str, text: str, kind: type[Choice]) -> tuple[Choice, ...]:
    """Members of *kind* from a comma-separated list."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    allowed = [member.value for member in kind]
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} {text}: {name!r} is none of {', '.join(allowed)}")
    if not names:
        raise UsageError(f"{option}: expected one or more of {', '.join(allowed)}")
    return tuple(kind(name) for name in dict.fromkeys(names))


def site_names(text: str) -> tuple[str, ...]:
    """Names of sites that are read side by side, from a comma-separated list."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    try:
        for name in names:
            sites_of(name)
    except ValueError as error:
        raise UsageError(f"--site {text}: expected some of {SITE_NAMES}") from error
    return names


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Values of eta from a comma-separated list, in growing order."""
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise UsageError(f"{option} {text}: expected numbers with commas between") from error
    ETA.check(option, values)
    return values


def decision_thresholds(texts: Sequence[str]) -> dict[str, float]:
    """Probabilities by class, from some ``CLASS=PROBABILITY``."""
    found: dict[str, float] = {}
    for text in texts:
        name, number = (part.strip() for part in text.rpartition("=")[::2])
        try:
            limit = float(number)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(
                f"--decision-threshold {text}: expected a class and a probability, as spam=0.9"
            )
        SHARE.check(f"--decision-threshold {name} =", limit)
        if name in found:
            raise UsageError(f"--decision-threshold {name}: given twice")
        found[name] = limit
    return found


def read_template(path: Path | None) -> str | None:
    """A prompt template from its file."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-template {path}: cannot be read ({error})") from error
    if text.count("{text}") != 1:
        raise UsageError(
            f"--prompt-template {path}: expected {{text}} once, found {text.count('{text}')}"
        )
    return text


def read_prompt(template: Path | None, chat: bool, system: Path | None) -> dict[str, Any]:
    """What `ModelConfig` says of the words around a text."""
    if chat and template is not None:
        raise UsageError("--chat and --prompt-template exclude each other")
    if system is None:
        return {"prompt_template": read_template(template), "chat": chat}
    if not chat:
        raise UsageError("--system-prompt belongs to --chat")
    try:
        return {"chat": True, "system_prompt": system.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--system-prompt {system}: cannot be read ({error})") from error


def read_bits(eight: bool, four: bool) -> Bits | None:
    """What ``--load-in-8bit`` and ``--load-in-4bit`` mean."""
    if eight and four:
        raise UsageError("--load-in-8bit and --load-in-4bit exclude each other")
    if eight:
        return Bits.EIGHT
    return Bits.FOUR if four else None


def read_map(name: str | None) -> str | None:
    """The value of ``--device-map``, checked."""
    if name not in (None, "auto"):
        raise UsageError(f"--device-map {name}: expected auto")
    return name
