"""``spin report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import print_json, progress_bar, say
from spin_cli.config import ReportConfig
from spin_cli.units import human_bytes


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a head within one.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", metavar="FOLDER",
            help="Write PNG and SVG of each figure, and the numbers behind it as CSV.",
        ),
    ] = None,
    use_model: Annotated[
        bool,
        typer.Option(
            "--with-model/--no-model",
            help="Load the model, for the tokens behind a neuron, for its size and its speed.",
        ),
    ] = True,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now, if elsewhere.")
    ] = None,
    device: o.Device = "auto",
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Write one page about a run: scores, cost, layers, neurons and errors, with figures.

    The page needs no network and no script. What cannot be shown is named on it with the reason.

    Example: `spin report run -o report.html`
    """
    from spin_cli import reports

    say(f"report: {run}")
    config = ReportConfig(figures, use_model, model, device, trust_remote_code, allow_pickle)
    with progress_bar("report") as progress:
        done = reports.report(run, output, config, force=force, progress=progress)
    if json:
        print_json({"stage": "report", "output": output, **done})
        return
    for item in done["left_out"]:
        say(f"left out, {item['what']}: {item['why']}")
    say(
        f"{output}: {human_bytes(done['bytes'])}, {len(done['figures'])} figures,"
        f" {done['seconds']:.0f} s"
    )
    if figures is not None:
        say(f"{figures}: {len(done['files'])} files")
