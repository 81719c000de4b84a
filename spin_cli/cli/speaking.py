"""``-q`` and ``-v``, before a command's name or after it; what an interrupt says."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from spin_cli.cli import terminal

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No messages, no progress.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say what was chosen by itself, and the time.")
]


def settle(quiet: bool, verbose: bool) -> None:
    """Set how much is said; without either option it stays as it was."""
    if quiet or verbose:
        terminal.set_verbosity(-1 if quiet else 1)


@contextlib.contextmanager
def stoppable(output: object) -> Iterator[None]:
    """For a stage that writes *output* in one go at its end: an interrupt says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.say(f"stopped before {output} was written: the same command begins it again")
        raise


def speaking(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options ``-q`` and ``-v``."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool, verbose: bool, **options: Any) -> None:
        settle(quiet, verbose)
        function(*args, **options)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose))
    ]
    own = inspect.signature(function, eval_str=True)
    # typer reads a command's options from both of these.
    command.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    command.__annotations__ |= {"quiet": Quiet, "verbose": Verbose}
    return command
