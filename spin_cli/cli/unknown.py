"""Options that `spin run` does not have: those of a stage are reached with ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from spin_cli.errors import UsageError

OTHER_NAMES = {"eta": "etas", "window_overlap": "overlap"}
"""Keys of spin.toml that are not called as their option is."""


class RunCommand(TyperCommand):
    """`spin run`; says of an option that only a stage has how to give it here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command does, but for the words of an error."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's own kinds are private to typer
            name = getattr(error, "option_name", "")
            if type(error).__name__ != "NoSuchOption" or not (
                settings := settings_for(name, given)
            ):
                raise
            raise UsageError(
                f"{name}: an option of {' and '.join(settings)}, not of run itself",
                f"Give {' '.join(f'-s {text}' for text in settings.values())}",
            ) from error


def settings_for(option: str, given: Sequence[str]) -> dict[str, str]:
    """By section, what to give to ``--set`` for *option*, its value as it was *given*."""
    from spin_cli.recipe import CONFIGS, keys

    key = option.lstrip("-").replace("-", "_")
    value = _value(option, given)
    if key.startswith("no_"):
        key, value = key.removeprefix("no_"), "false"
    key = OTHER_NAMES.get(key, key)
    return {name: f"{name}.{key}={value}" for name in CONFIGS if key in keys(name)}


def _value(option: str, given: Sequence[str]) -> str:
    for at, word in enumerate(given):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option:
            after = given[at + 1 : at + 2]
            return after[0] if after and not after[0].startswith("-") else "true"
    return "VALUE"
