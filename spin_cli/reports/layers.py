"""Where in the model the task is solved: probes by layer, and the neurons that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_cli.reports.charts import MARKERS, Line, every, heat, lines
from spin_cli.reports.drawing import SERIES, Figure, Table, draw
from spin_cli.reports.sources import METRIC_NAMES, LeftOut, Run

MOST_TICKS = 14


def short(layer: str) -> str:
    """A layer's name as it stands on an axis."""
    kind, _, number = layer.partition("_")
    return number.lstrip("0") or "0" if kind == "layer" else layer.replace("coder_", "c.")


def draw_probes(run: Run, files: bool) -> Figure:
    """Probe score by layer, a line for each site."""
    best: dict[str, dict[str, float]] = {}
    for row in run.scores:
        of_site = best.setdefault(row["site"], {})
        of_site[row["layer"]] = max(float(row["val_score"]), of_site.get(row["layer"], -np.inf))
    place = {layer: at for at, layer in enumerate(run.layers)}
    series = [
        Line(site, [place[name] for name in found], list(found.values()), SERIES[at % 4],
             dashed=at % 2 == 1, marker=MARKERS[at % 4])
        for at, (site, found) in enumerate(best.items())
    ]  # fmt: skip

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        lines(axes, series)
        layer_axis(axes, run.layers)
        metric = run.selection().manifest["metric"]
        axes.set_ylabel(f"{METRIC_NAMES.get(metric, metric)} on val")

    rows = [
        [r["layer"], r["site"], r["pooling"], f"{float(r['val_score']):.4f}",
         *([r["control_score"]] if "control_score" in r else [])]
        for r in run.scores
    ]  # fmt: skip
    top = max(run.scores, key=lambda row: float(row["val_score"]))
    columns = ["layer", "site", "pooling", "score"]
    return draw(
        "probes", paint, title="Probe score by layer and site", files=files,
        table=Table([*columns, *(["shuffled labels"] if len(rows[0]) > 4 else [])], rows),
        caption="One L1 probe for each layer, site and pooling; the line is the best pooling's.",
        alt=(
            f"Probe scores by layer for {', '.join(best)}; the highest is {top['layer']}"
            f" {top['site']} {top['pooling']} with {float(top['val_score']):.3f}."
        ),
    )  # fmt: skip


def layer_axis(axes: Any, layers: Sequence[str]) -> None:
    """Make the x axis one of layers, by their position."""
    axes.set_xticks(range(len(layers)), every([short(name) for name in layers], MOST_TICKS))
    axes.set_xlim(-0.2, len(layers) - 0.8)
    axes.set_xlabel("layer")
    axes.grid(visible=False, axis="x")


def draw_salient(run: Run, files: bool) -> Figure:
    """Heat map: the share of each matrix's neurons that the chosen eta keeps."""
    eta = run.choice.eta
    kept, width = _kept_column(run, eta), {(f.layer, f.site.value): f.width for f in run.features}
    columns = list(dict.fromkeys((row["site"], row["pooling"]) for row in run.scores))
    shares = np.full((len(run.layers), len(columns)), np.nan)
    counts = np.zeros(shares.shape, int)
    for row in run.scores:
        at = run.layers.index(row["layer"]), columns.index((row["site"], row["pooling"]))
        counts[at] = int(row[kept])
        shares[at] = counts[at] / width[row["layer"], row["site"]]
    top = float(np.nanmax(shares)) or 1.0
    few = len(columns) <= 6

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        cells = [[f"{v:.0%}" if v >= 0.095 else f"{v:.1%}" for v in line] for line in shares]
        names = [f"{site}\n{pooling}" for site, pooling in columns]
        rows = [short(name) for name in run.layers]
        heat(axes, shares / top, every(rows, 32), names, cells if few else None)
        axes.xaxis.tick_top()
        axes.set_ylabel("layer")
        if not few:
            axes.tick_params(axis="x", rotation=90)

    rows = [[r["layer"], r["site"], r["pooling"], int(r[kept]), width[r["layer"], r["site"]],
             _share_read(run, r)] for r in run.scores]  # fmt: skip
    most = np.unravel_index(int(np.nanargmax(shares)), shares.shape)
    return draw(
        "salient", paint, title=f"Salient neurons over layers, eta {eta:g}", files=files,
        height=min(6.5, 0.9 + 0.27 * len(run.layers)),
        table=Table(["layer", "site", "pooling", "in the mask", "of", "in the head"], rows),
        caption=(
            f"Share of a layer's neurons that make up {eta:.0%} of its probe's importance: a pale"
            " cell has the task in few neurons."
        ),
        alt=(
            f"Heat map of the share of neurons kept; it is largest, {top:.1%}, at"
            f" {run.layers[most[0]]} {' '.join(columns[most[1]])}."
        ),
    )  # fmt: skip


def _kept_column(run: Run, eta: float) -> str:
    name = f"neurons_eta_{eta:g}"
    if name not in run.scores[0]:
        raise LeftOut(f"the selection does not list how many neurons eta {eta:g} keeps")
    return name


def _share_read(run: Run, row: dict[str, str]) -> int:
    key = row["layer"], row["site"], row["pooling"]
    return sum(len(f.neurons) for f in run.head.features
               if (f.layer, f.site.value, f.pooling.value) == key)  # fmt: skip
