"""``spin inspect`` and ``spin verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import print_json, print_table, progress_bar
from spin_cli.errors import ArtifactError
from spin_cli.ranges import COUNT, SEED, SHARE


def inspect(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A stage's folder, a run, or one file.")
    ],
    rows: Annotated[
        int,
        o.number(COUNT, "rows", help="Rows of activations that numbers are taken from; 0: all."),
    ] = 2048,
    eta: Annotated[float, o.number(SHARE, "eta", help="Masks that are compared.")] = 0.8,
    every: Annotated[
        bool, typer.Option("--all", help="Every matrix, and all that train measured.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Show what an artifact is, from what it was made, and what is in it.

    Other HDF5 and safetensors files are shown too: links in them are named, not followed.

    Example: `spin inspect run/selection`
    """
    from spin_cli import inspection
    from spin_cli.cli.showing import show

    with progress_bar("inspect") as progress:
        found = inspection.describe(artifact, rows=rows, eta=eta, progress=progress)
    if json:
        print_json(found)
        return
    try:
        show(artifact, found, every)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"{artifact}: holds what spin does not write ({type(error).__name__}: {error})",
            "See it raw: spin inspect --json, or name one of its files.",
        ) from error


def verify(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A stage's folder, a run, or one file of it.")
    ],
    rows: Annotated[
        int,
        o.number(
            COUNT,
            "rows",
            help="Rows of activations to recompute through the model; 0: recompute nothing.",
        ),
    ] = 8,
    seed: Annotated[int, o.number(SEED, "seed", help="Decides which rows.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now.")
    ] = None,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    json: o.Json = False,
) -> None:
    """Check that an artifact is still what was written.

    Checksums of every byte, files missing or too many, shapes, and whether it was made from what
    is there now. Then numbers are computed again: some rows of activations by the model, some
    probes of a selection and the test scores of a head from the activations.

    Ends with 0 if all is well, with 4 if anything was changed or is missing.

    Example: `spin verify run`
    """
    from spin_cli.verification import verify as check

    checks = check(
        artifact, rows=rows, seed=seed, model=model,
        trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
    )  # fmt: skip
    failed = [item for item in checks if item.ok is False]
    if json:
        print_json({"artifact": artifact, "ok": not failed, "checks": checks})
    else:
        marks = {True: "ok", False: "FAILED", None: "skipped"}
        lines = [[item.what, marks[item.ok], item.found] for item in checks]
        print_table(f"{artifact}", ["", "", "found"], lines)
    if failed:
        raise ArtifactError(
            f"{artifact}: {len(failed)} of {len(checks)} checks failed",
            "Make it again with --force, or restore it from a copy.",
        )
