"""``spin select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.choices import Control, Metric, Solver
from spin_cli.cli import options as o
from spin_cli.cli.parsing import numbers
from spin_cli.cli.speaking import stoppable
from spin_cli.cli.terminal import (
    print_json,
    print_table,
    progress_bar,
    say,
)
from spin_cli.config import DEFAULT_ETAS_TEXT, MAX_MEMORY, SelectConfig
from spin_cli.names import list_names
from spin_cli.ranges import Range

GB = 10**9


def select(
    source: Annotated[
        Path, typer.Argument(metavar="ACTIVATIONS", help="Folder of `spin extract`.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: beside it].")
    ] = None,
    metric: o.ChooseBy = None,
    eta: Annotated[
        str, typer.Option("--eta", help="Shares of the importance to list masks for.")
    ] = DEFAULT_ETAS_TEXT,
    path_points: Annotated[
        int, o.number(SelectConfig, "path_points", help="Penalties tried per probe.")
    ] = SelectConfig.path_points,
    top_k: Annotated[
        int | None, o.number(SelectConfig, "top_k", help="Most neurons kept of a matrix.")
    ] = None,
    solver: Annotated[
        Solver, typer.Option("--solver", help="newton, or the paper's recipe for comparison.")
    ] = SelectConfig.solver,
    bootstrap: Annotated[
        int,
        o.number(
            SelectConfig,
            "bootstrap",
            help="Resamples over which each neuron's selection is counted.",
        ),
    ] = SelectConfig.bootstrap,
    control: Annotated[
        Control,
        typer.Option("--control", help="Random neurons instead; or shuffled labels beside."),
    ] = SelectConfig.control,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto (CUDA where there is a GPU, else the CPU), cpu, cuda, cuda:1, mps.",
            autocompletion=o.offer(*o.DEVICES),
        ),
    ] = SelectConfig.device,
    memory_limit: Annotated[
        float | None,
        o.number(
            Range(0, MAX_MEMORY // GB),
            "memory_limit",
            help="GB for matrices; larger ones are streamed. Default: the largest and 0.35.",
        ),
    ] = None,
    seed: Annotated[int, o.number(SelectConfig, "seed", help="Seed.")] = 0,
    workers: o.Workers = 0,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Fit a probe per layer, site and pooling, and rank its neurons.

    Example: `spin select run/activations`
    """
    config = SelectConfig(
        metric=metric,
        etas=numbers("--eta", eta),
        path_points=path_points,
        solver=solver,
        top_k=top_k,
        bootstrap=bootstrap,
        control=control,
        device=device,
        memory_limit=None if memory_limit is None else int(memory_limit * GB),
        workers=workers,
        seed=seed,
    )
    output = output or source.parent / "selection"
    show_selected(run_select(source, output, config, force), output, json)


def run_select(source: Path, output: Path, config: SelectConfig, force: bool) -> dict[str, Any]:
    """Run the stage under a progress bar."""
    from spin_cli import artifacts, atomic

    artifacts.read_manifest(source, "activations")  # torch takes seconds to come
    atomic.check_vacant(output, force=force)
    say(f"select: probes on {source}")
    from spin_cli import selection

    with stoppable(output), progress_bar("select") as progress:
        return selection.select(source, output, config, force=force, progress=progress)


EXTRA = {"control_score": "control", "selectivity": "selectivity", "stability": "stability"}
"""Columns of ``scores.csv`` that only some selections have, and their headings."""


def show_selected(manifest: dict[str, Any], output: Path, json: bool) -> None:
    """Print the best probes and the next command."""
    if json:
        print_json(
            {
                "stage": "select",
                "output": output,
                "scores": manifest["scores"],
                "log": manifest["log"],
            }
        )
        return
    best = sorted(manifest["scores"], key=lambda row: -float(row["val_score"]))[:8]
    last = list(best[0])[-1]
    extra = {key: name for key, name in EXTRA.items() if key in best[0]}
    beside = f", control: {best[0]['control']}" if "control" in best[0] else ""
    print_table(
        f"Best of {len(manifest['scores'])} probes, by {_metric(manifest)} on val{beside}",
        ["layer", "site", "pooling", manifest["metric"], *extra.values(), "C", "neurons", "of"],
        [
            [
                row["layer"], row["site"], row["pooling"], f"{float(row['val_score']):.4f}",
                *[f"{float(row[key]):.4f}" for key in extra],
                f"{float(row['C']):.3g}", str(row[last]), str(row["width"]),
            ]
            for row in best
        ],
        spare=["C", "of"],
    )  # fmt: skip
    say_doubts(manifest)
    say(f"next: spin train {output}")


def _metric(manifest: dict[str, Any]) -> str:
    """What was chosen by, and why where the user did not say it."""
    metric = str(manifest["metric"])
    if manifest["request"]["options"]["metric"] is not None:
        return metric
    why = "labels" if manifest.get("multi_label") else "a class is rare"
    return f"{metric} ({why})" if metric == Metric.MACRO_F1.value else metric


def say_doubts(manifest: dict[str, Any]) -> None:
    """Which probes are not as exact as the others, and that none found a neuron."""
    if not any(int(list(row.values())[-1]) for row in manifest["scores"]):
        say("note: no neuron says anything about the classes of the train rows")
    if unconverged := manifest["counts"]["unconverged"]:
        names = [
            f"{row['layer']} {row['site']} {row['pooling']}"
            for row in manifest["scores"]
            if str(row["converged"]) == "False"
        ]
        listed = list_names(names, 5, "")
        say(f"note: {unconverged} probes stopped short of the tolerance: {listed}")
