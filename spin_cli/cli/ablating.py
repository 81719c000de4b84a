"""``spin ablate``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.choices import SITE_NAMES, Pooling, Site
from spin_cli.cli import options as o
from spin_cli.cli.parsing import listed, numbers, site_names
from spin_cli.cli.terminal import print_json, print_line, print_table, progress_bar, say
from spin_cli.config import DEFAULT_ETAS_TEXT, AblateConfig
from spin_cli.errors import UsageError


def ablate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|SELECTION", help="A run, or a folder of `spin select`.")
    ],
    head: Annotated[
        Path | None, typer.Option("--head", help="A trained head [default: that of the run].")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            "--site",
            help=f"{SITE_NAMES}; default as the head.",
            autocompletion=o.offer(*(s.value for s in Site), "both"),
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="As mean,max; default as the head.",
            autocompletion=o.offer_list(*Pooling),
        ),
    ] = None,
    max_layer: Annotated[
        int | None,
        o.number(AblateConfig, "max_layer", help="Last layer: 6 is layer_06; default as the head."),
    ] = None,
    eta: Annotated[
        str, typer.Option("--eta", help="Shares of the importance.")
    ] = DEFAULT_ETAS_TEXT,
    draws: Annotated[
        int, o.number(AblateConfig, "draws", help="Random sets of neurons for each eta.")
    ] = 3,
    rows: Annotated[
        int,
        o.number(
            AblateConfig,
            "rows",
            help="Most training rows; fewer where memory would not hold more.",
        ),
    ] = 2000,
    metric: o.ChooseBy = None,
    seed: Annotated[int, o.number(AblateConfig, "seed", help="Seed of rows and random sets.")] = 0,
    workers: o.Workers = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="CSV file to write the numbers to.")
    ] = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Score with the selected neurons alone, removed, and with random ones in their place.

    No model is needed. With a new ridge head for each set of neurons (refit); and for a trained
    head, with its neurons set to their mean (no refit). What is lost by keeping the selected ones
    alone is their sufficiency, what is lost by removing them their comprehensiveness (DeYoung et
    al. 2020).

    Example: `spin ablate run`
    """
    from spin_cli import atomic
    from spin_cli.training.ablation import ablate as measure

    if site is not None and len(site_names(site)) > 1:
        raise UsageError(f"--site {site}: expected one of {SITE_NAMES}")
    if output is not None:
        atomic.check_free(output, force=force)
    selection = source / "selection" if (source / "selection").is_dir() else source
    if head is None and selection != source and (source / "head").is_dir():
        head = source / "head"
    config = AblateConfig(
        site=site,
        poolings=None if pooling is None else listed("--pooling", pooling, Pooling),
        max_layer=max_layer, etas=numbers("--eta", eta), draws=draws, rows=rows, metric=metric,
        seed=seed, workers=workers,
    )  # fmt: skip
    with progress_bar("ablate") as progress:
        found = measure(selection, head, config, progress=progress)
    if output is not None:
        _write(output, found)
    if json:
        print_json({"stage": "ablate", "output": output, **found})
        return
    _show(found)
    if output is not None:
        say(f"numbers: {output}")


def _show(found: dict[str, Any]) -> None:
    for note in found["notes"]:
        say(f"note: {note}")
    what = found["what"]
    layers = (
        f"{what['layers'][0]} … {what['layers'][-1]}"
        if len(what["layers"]) > 1
        else "".join(what["layers"])
    )
    rows = found["rows"][found["scored_on"]]
    print_line(f"{'+'.join(what['sites'])} {'+'.join(what['poolings'])}, {layers}: "
               f"{found['metric']} on {rows:,} {found['scored_on']} rows")  # fmt: skip
    titles = {
        "refit": "A new head for each set of neurons",
        "head": "The trained head, the other neurons at their mean",
    }
    for name, title in titles.items():
        if found[name] is not None:
            seen = " (rows that it was fitted to)" if found[name].get("fitted_to") else ""
            _table(title + seen, found[name])
    print_line("kept: the selected neurons alone. removed: all but these. random: as many of")
    print_line(f"each matrix, mean and sd of {found['draws']} draws.")


def _table(title: str, found: dict[str, Any]) -> None:
    print_table(
        f"{title}: all {found['neurons']:,} give {found['all']:.4f}, none {found['none']:.4f}",
        ["eta", "neurons", "kept", "random", "removed", "random"],
        [
            [
                f"{p['eta']:g}", f"{p['neurons']:,}", f"{p['kept']:.4f}",
                f"{p['random_kept']:.4f} ± {p['random_kept_sd']:.4f}", f"{p['removed']:.4f}",
                f"{p['random_removed']:.4f} ± {p['random_removed_sd']:.4f}",
            ]
            for p in found["points"]
        ],
    )  # fmt: skip


def _write(path: Path, found: dict[str, Any]) -> None:
    from spin_cli import atomic

    lines: Sequence[dict[str, Any]] = [
        {"way": name, "metric": found["metric"], "scored_on": found["scored_on"],
         "all": found[name]["all"], "none": found[name]["none"], **point}
        for name in ("refit", "head")
        if found[name] is not None
        for point in found[name]["points"]
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    atomic.write_named(path, text.getvalue())
