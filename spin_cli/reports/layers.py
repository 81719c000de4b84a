"""Where in the model the task is solved: probes, salient neurons, heads of every depth and eta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_cli import metrics
from spin_cli.reports.charts import MARKERS, Line, every, heat, lines, outer, two_densities
from spin_cli.reports.costs import FORWARD, flops
from spin_cli.reports.curves import Curves, Point
from spin_cli.reports.drawing import COLOURS, SERIES, Figure, Table, draw
from spin_cli.reports.model import Sizes, Speed
from spin_cli.reports.results import metric_name
from spin_cli.reports.sources import LeftOut, Run

MOST_TICKS = 14
MOST_DEPTHS = 6


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
        _layer_axis(axes, run.layers)
        axes.set_ylabel(f"{run.selection().manifest['metric']} on val")

    rows = [[r["layer"], r["site"], r["pooling"], f"{float(r['val_score']):.4f}",
             *([r["control_score"]] if "control_score" in r else [])] for r in run.scores]  # fmt: skip
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


def _layer_axis(axes: Any, layers: Sequence[str]) -> None:
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


def _series(x: Sequence[float], points: Sequence[Point]) -> list[Line]:
    found = [Line("val", x, [p.val for p in points], "muted", dashed=True, marker="s")]
    if points[0].test is not None:
        found.append(Line("test", x, [p.test for p in points if p.test is not None], "one"))
    return found


def _point_rows(points: Sequence[Point]) -> list[list[Any]]:
    return [
        [p.layer, f"{p.choice.eta:g}", p.neurons, f"{p.val:.4f}",
         "" if p.test is None else f"{p.test:.4f}"]
        for p in points
    ]  # fmt: skip


POINT_COLUMNS = ("up to layer", "eta", "neurons", "val", "test")


def _how(curves: Curves) -> str:
    if curves.rows == curves.rows_there:
        return "A linear head was fitted for each point."
    return (
        f"A linear head was fitted for each point, on {curves.rows:,} of {curves.rows_there:,}"
        " training rows to save time."
    )


def draw_depth(run: Run, curves: Curves, files: bool) -> Figure:
    """Score of the integrated classifier by depth, beside the best probe of each layer."""
    points, name = curves.by_depth, metric_name(run)
    place = {layer: at for at, layer in enumerate(run.layers)}

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        lines(axes, _series([place[p.layer] for p in points], points))
        axes.axvline(place[run.layers[run.choice.depth]], color=COLOURS["two"], linewidth=1)
        axes.set_title("chosen depth", color=COLOURS["two"], fontsize=9, loc="right")
        _layer_axis(axes, run.layers)
        axes.set_xlabel("layers 0 to …")
        axes.set_ylabel(name)

    return draw(
        "depth", paint, title=f"{name} against depth", files=files,
        table=Table(POINT_COLUMNS, _point_rows(points)),
        caption=(
            f"Heads on the masked neurons of layers 0 to k, all else as chosen. {_how(curves)} The"
            " test rows are shown, not chosen by."
        ),
        alt=_ends("by depth", points),
    )  # fmt: skip


def _ends(what: str, points: Sequence[Point]) -> str:
    best = max(points, key=lambda p: p.val)
    return (
        f"Score {what}: val from {points[0].val:.3f} to {points[-1].val:.3f}, highest"
        f" {best.val:.3f} at {best.layer}, eta {best.choice.eta:g}."
    )


def draw_latency(
    run: Run, curves: Curves, sizes: Sizes, speed: Speed | None, files: bool
) -> Figure:
    """Score against the time, or the operations, until the head's last layer is known."""
    points, name = curves.by_depth, metric_name(run)
    order = run.activations().manifest["layers"]
    mean = float(run.samples.n_tokens.mean())
    work = [FORWARD * mean * sizes.up_to(order, order.index(p.layer)) for p in points]
    if speed is None:
        x, label = [w / 1e9 for w in work], f"GFLOP for a text of {mean:.0f} tokens"
    else:
        x, label = [speed.milliseconds[p.layer] for p in points], "milliseconds per text"

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        lines(axes, _series(x, points))
        for at, point in enumerate(points):
            chosen = point.choice.depth == run.choice.depth
            if chosen:
                axes.axvline(x[at], color=COLOURS["two"], linewidth=1)
        axes.set_title("chosen depth", color=COLOURS["two"], fontsize=9, loc="right")
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.set_ylabel(name)

    measured = (
        f"Measured on {speed.device} while this page was made: the median of passes over"
        f" {speed.texts} texts in batches, until each layer's hidden state is known."
        if speed else "Not measured, since no model was run: operations of the blocks up to there."
    )  # fmt: skip
    rows = [
        [p.layer, f"{w:.4g}", "" if speed is None else f"{speed.milliseconds[p.layer]:.4f}",
         f"{p.val:.4f}", "" if p.test is None else f"{p.test:.4f}"]
        for p, w in zip(points, work, strict=True)
    ]  # fmt: skip
    return draw(
        "latency", paint, title=f"{name} against latency", files=files,
        table=Table(["up to layer", "FLOP per text", "ms per text", "val", "test"], rows),
        caption=f"The heads of the figure before. {measured}",
        alt=f"{_ends('against latency', points)} A text takes up to {x[-1]:.2g} {label.split()[0]}"
            f" ({flops(work[-1])}).",
    )  # fmt: skip


def draw_eta(run: Run, curves: Curves, files: bool) -> Figure:
    """Figure 4: score, and the share of neurons kept, against eta."""
    points, name = curves.by_eta, metric_name(run)
    x = [p.choice.eta for p in points]
    everything = max(p.neurons for p in points)
    offered = _offered(run)

    def paint(canvas: Any) -> None:
        upper, lower = canvas.subplots(2, 1, sharex=True)
        lines(upper, _series(x, points))
        upper.set_ylabel(name)
        lines(lower, [Line("neurons", x, [p.neurons / offered for p in points], "three")], low=0)
        lower.set_ylabel("share kept")
        lower.set_xlabel("eta")
        for axes in (upper, lower):
            axes.axvline(run.choice.eta, color=COLOURS["two"], linewidth=1)
        upper.set_title("chosen eta", color=COLOURS["two"], fontsize=9, loc="right")

    return draw(
        "eta", paint, title=f"{name} and share of neurons against eta", height=4.2, files=files,
        table=Table(POINT_COLUMNS, _point_rows(points)),
        caption=(
            f"Heads of the chosen depth. The largest reads {everything:,} of {offered:,} neurons;"
            f" the others have a weight of zero in their layer's probe. {_how(curves)}"
        ),
        alt=_ends("by eta", points),
    )  # fmt: skip


def _offered(run: Run) -> int:
    """Neurons that a head of the chosen site, poolings and depth could read."""
    from spin_cli.training.table import SITES

    choice, below = run.choice, set(run.layers[: run.choice.depth + 1])
    return sum(
        f.width for f in run.features
        if f.layer in below and f.pooling in choice.poolings and f.site in SITES[choice.site]
    )  # fmt: skip


def draw_margins(run: Run, curves: Curves, files: bool) -> Figure:
    """Figure 3, second half: what the integrated classifier says of each class at each depth."""
    points = curves.by_depth
    if len(points) > MOST_DEPTHS:
        picked = np.linspace(0, len(points) - 1, MOST_DEPTHS).round().astype(int)
        points = [points[at] for at in picked]
    binary = len(run.classes) == 2
    values = [_margin(p, binary) for p in points]
    span = outer(values)
    columns = 2
    height = -(-len(points) // columns)

    def paint(canvas: Any) -> None:
        axes = canvas.subplots(height, columns, sharex=True, squeeze=False).ravel()
        for ax in axes[len(points) :]:
            ax.set_visible(False)
        for ax, point, value in zip(axes, points, values, strict=False):
            groups = [value[point.codes == k] for k in (0, 1)] if binary else [value]
            two_densities(ax, groups, span)
            ax.axvline(0, color=COLOURS["muted"], linewidth=0.8)
            right = (value > 0) == (point.codes == 1) if binary else value > 0
            ax.set_title(f"0 to {short(point.layer)}: {right.mean():.1%} right")
        canvas.supxlabel(
            f"log odds of {run.classes[1]}" if binary else "logit of the true class, less the next",
            fontsize=10, color=COLOURS["muted"],
        )  # fmt: skip

    rows = [[p.layer, f"{_apart(p, v, binary):.4f}", f"{np.median(v):.3f}"]
            for p, v in zip(points, values, strict=True)]  # fmt: skip
    what = (
        f"Blue: rows of {run.classes[0]}; vermilion with it: rows of {run.classes[1]}. "
        if binary else "What lies right of 0 is answered rightly. "
    )  # fmt: skip
    return draw(
        "margins", paint, title="The integrated classifier at each depth", files=files,
        height=0.6 + 1.15 * height,
        table=Table(["up to layer", "AUROC" if binary else "share right", "median"], rows),
        caption=f"{what}Distributions over {curves.split} rows for heads of layers 0 to k.",
        alt=(
            "Distributions of the classifier's "
            + ("log odds by class" if binary else "margin of the true class")
            + f" at {len(points)} depths; from {rows[0][1]} to {rows[-1][1]}"
            + (" AUROC." if binary else " right.")
        ),
    )  # fmt: skip


def _margin(point: Point, binary: bool) -> Any:
    log_p = np.log(np.clip(point.probs, 1e-12, 1))
    if binary:
        return log_p[:, 1] - log_p[:, 0]
    own = log_p[np.arange(len(log_p)), point.codes]
    others = log_p.copy()
    others[np.arange(len(log_p)), point.codes] = -np.inf
    return own - others.max(1)


def _apart(point: Point, value: Any, binary: bool) -> float:
    return metrics.auroc(point.codes, value) if binary else float((value > 0).mean())
