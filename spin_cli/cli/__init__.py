"""The command line: parse, call one stage, show what came of it.

Stages are imported inside the commands, so that ``spin --help`` answers without torch.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from spin_cli import __version__
from spin_cli.cli import (
    exporting,
    extracting,
    inspecting,
    pipeline,
    predicting,
    selecting,
    terminal,
    training,
)
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
app.command("extract")(extracting.extract)
app.command("select")(selecting.select)
app.command("train")(training.train)
app.command("predict")(predicting.predict)
app.command("export")(exporting.export)
app.command("inspect")(inspecting.inspect)
app.command("verify")(inspecting.verify)
app.command("run")(pipeline.run)
app.command("demo")(pipeline.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spin {__version__}")
        raise typer.Exit


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Settle what is common to all commands."""
    terminal.verbosity = -1 if quiet else int(verbose)


def run() -> int:
    """Run the command line and return its exit code; see `spin_cli.errors` for what they mean."""
    # A reader that has seen enough (`| head`) ends spin quietly, as it does other filters.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return int(app(standalone_mode=True) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except SpinError as error:
        if os.environ.get("SPIN_DEBUG"):
            traceback.print_exc()
        terminal.print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _terminated(_signal: int, _frame: object) -> None:
    raise SystemExit(143)
