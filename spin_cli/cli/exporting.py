"""``spin export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spin_cli.choices import ExportFormat
from spin_cli.cli import options as o
from spin_cli.cli.parsing import listed
from spin_cli.cli.terminal import print_json, print_table, say
from spin_cli.config import PredictConfig
from spin_cli.units import human_bytes


def export(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Folder of `spin train`.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    format: Annotated[  # noqa: A002 - the option's own name
        str | None,
        typer.Option(
            "--format", help="pt2, onnx [default: both, onnx where its packages are installed]."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="Texts to compare with `predict` on, one a line."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now, if elsewhere.")
    ] = None,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Write a head and its part of the model as one program that needs no spin.

    The folder gets a `torch.export` program of any batch and length, the same as ONNX, the
    tokenizer and the label names. Both are compared with `predict` before they count as written.

    Example: `spin export run/head exported`
    """
    from spin_cli.dataset import read_rows
    from spin_cli.prediction import export as exports

    formats = None if format is None else listed("--format", format, ExportFormat)
    texts = list(exports.SAMPLES)
    if check is not None:
        texts = [row.text for row in read_rows(check)]
    say(f"export: {head}")
    config = PredictConfig(
        model=model,
        device="cpu",
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    found = exports.export(head, output, config, formats=formats, texts=texts, force=force)
    if json:
        print_json({"stage": "export", "output": output, "files": found})
        return
    print_table(
        f"Exported to {output}",
        ["file", "size", "differs from predict by"],
        [
            [name, human_bytes(entry["bytes"]), f"{entry['difference']:.1e}"]
            for name, entry in found.items()
        ],
    )
    if formats is None and exports.ONNX not in found:
        say(f"note: no ONNX file; for one: {exports.INSTALL_ONNX}")
