"""The command line: parse, call one stage, show what came of it.

Stages are imported inside the commands, so that ``spin --help`` answers without torch.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer

from spin_cli import __version__
from spin_cli.cli import (
    ablating,
    demo,
    exporting,
    extracting,
    inspecting,
    pipeline,
    predicting,
    reporting,
    selecting,
    terminal,
    training,
)
from spin_cli.cli.speaking import Quiet, Verbose, settle, speaking
from spin_cli.cli.system import plain_os_errors
from spin_cli.cli.unknown import RunCommand
from spin_cli.errors import SpinError

app = typer.Typer(
    name="spin",
    help="Strong, cheap text classifiers out of a frozen language model's internal neurons.",
    epilog="Start with: spin demo",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "extract": extracting.extract,
    "select": selecting.select,
    "train": training.train,
    "predict": predicting.predict,
    "export": exporting.export,
    "inspect": inspecting.inspect,
    "verify": inspecting.verify,
    "ablate": ablating.ablate,
    "report": reporting.report,
    "run": pipeline.run,
    "status": pipeline.status,
    "demo": demo.demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name, cls=RunCommand if _name == "run" else None)(speaking(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spin {__version__}")
        raise typer.Exit


@app.callback()
def options(
    quiet: Quiet = False,
    verbose: Verbose = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Settle what is common to all commands."""
    terminal.set_verbosity(0)
    settle(quiet, verbose)


def run() -> int:
    """Run the command line and return its exit code; see `spin_cli.errors` for what they mean."""
    # A reader that has seen enough (`| head`) ends spin quietly, as it does other filters.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with plain_os_errors():
            return _exit_code()
    except SpinError as error:
        if os.environ.get("SPIN_DEBUG"):
            traceback.print_exc()
        with suppress(OSError):  # a full disk behind stderr: the exit code remains
            terminal.print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _exit_code() -> int:
    try:
        return int(app(prog_name="spin", standalone_mode=True) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1


def _terminated(_signal: int, _frame: object) -> None:
    raise SystemExit(143)
