"""Heads of every depth and eta: what they score, what they take, how far they part the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spin_cli import metrics
from spin_cli.reports.charts import Line, lines, outer, two_densities
from spin_cli.reports.costs import FORWARD, flops
from spin_cli.reports.curves import Curves, Point
from spin_cli.reports.drawing import COLOURS, Figure, Table, draw
from spin_cli.reports.layers import layer_axis, short
from spin_cli.reports.model import Sizes, Speed
from spin_cli.reports.results import metric_name
from spin_cli.reports.sources import Run

MOST_DEPTHS = 6


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


def _how(run: Run, curves: Curves) -> str:
    few = curves.rows < curves.rows_there
    part = f", on {curves.rows:,} of {curves.rows_there:,} training rows to save time,"
    part += " so these heads score lower than the chosen one can"
    text = f"A linear head on masked neurons was fitted for each point{part if few else ''}."
    if run.joined:
        text += f" The chosen head is none of these: it is {run.joined}."
    return text


def draw_depth(run: Run, curves: Curves, files: bool) -> Figure:
    """Score of the integrated classifier by depth, beside the best probe of each layer."""
    points, name = curves.by_depth, metric_name(run)
    place = {layer: at for at, layer in enumerate(run.layers)}

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        lines(axes, _series([place[p.layer] for p in points], points))
        axes.axvline(place[run.layers[run.choice.depth]], color=COLOURS["two"], linewidth=1)
        axes.set_title("chosen depth", color=COLOURS["two"], fontsize=9, loc="right")
        layer_axis(axes, run.layers)
        axes.set_xlabel("layers 0 to …")
        axes.set_ylabel(name)

    return draw(
        "depth", paint, title=f"{name} against depth", files=files,
        table=Table(POINT_COLUMNS, _point_rows(points)),
        caption=(
            f"Heads on the masked neurons of layers 0 to k, all else as chosen. {_how(run, curves)}"
            " The test rows are shown, not chosen by."
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
        shares = [100 * p.neurons / offered for p in points]
        lines(lower, [Line("neurons", x, shares, "three")], low=0)
        lower.set_ylabel("kept, %")
        lower.set_xlabel("eta")
        for axes in (upper, lower):
            axes.axvline(run.choice.eta, color=COLOURS["two"], linewidth=1)
        upper.set_title("chosen eta", color=COLOURS["two"], fontsize=9, loc="right")

    return draw(
        "eta", paint, title=f"{name} and share of neurons against eta", height=4.2, files=files,
        table=Table(POINT_COLUMNS, _point_rows(points)),
        caption=(
            f"Heads of the chosen depth. The largest reads {everything:,} of {offered:,} neurons;"
            f" the others have a weight of zero in their layer's probe. {_how(run, curves)}"
        ),
        alt=_ends("by eta", points),
    )  # fmt: skip


def _offered(run: Run) -> int:
    """Neurons that a head of the chosen site, poolings and depth could read."""
    return sum(f.width for f in run.features if run.choice.reads(f, run.layers.index(f.layer)))


def draw_margins(run: Run, curves: Curves, files: bool) -> Figure:
    """Figure 3, second half: what the integrated classifier says of each class at each depth."""
    points, several = curves.by_depth, run.multi_label
    if len(points) > MOST_DEPTHS:
        picked = np.linspace(0, len(points) - 1, MOST_DEPTHS).round().astype(int)
        points = [points[at] for at in picked]
    binary = several or len(run.classes) == 2
    names = ("does not", "applies") if several else tuple(run.classes)
    values = [_margin(p, binary) for p in points]
    span = outer(values)
    columns = 2
    height = -(-len(points) // columns)

    def paint(canvas: Any) -> None:
        axes = canvas.subplots(height, columns, sharex=True, squeeze=False).ravel()
        for ax in axes[len(points) :]:
            ax.set_visible(False)
        for ax, point, value in zip(axes, points, values, strict=False):
            codes = point.codes.ravel()
            groups = [value[codes == k] for k in (0, 1)] if binary else [value]
            two_densities(ax, groups, names if binary and ax is axes[0] else (), span)
            ax.axvline(0, color=COLOURS["muted"], linewidth=0.8)
            right = (value > 0) == (codes == 1) if binary else value > 0
            ax.set_title(f"0 to {short(point.layer)}: {right.mean():.1%} right")
        canvas.supxlabel(
            f"log odds of {'a label' if several else names[1]}"
            if binary else "logit of the true class, less the next",
            fontsize=10, color=COLOURS["muted"],
        )  # fmt: skip

    rows = [[p.layer, f"{_apart(p, v, binary):.4f}", f"{np.median(v):.3f}"]
            for p, v in zip(points, values, strict=True)]  # fmt: skip
    what = (
        "Every pair of text and label; blue: the label does not apply; vermilion: it does. "
        if several else f"Blue: rows of {names[0]}; vermilion: rows of {names[1]}. "
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
    if point.codes.ndim == 2:
        return metrics.logits(point.probs, "labels").ravel()
    log_p = np.log(np.clip(point.probs, 1e-12, 1))
    if binary:
        return log_p[:, 1] - log_p[:, 0]
    own = log_p[np.arange(len(log_p)), point.codes]
    others = log_p.copy()
    others[np.arange(len(log_p)), point.codes] = -np.inf
    return own - others.max(1)


def _apart(point: Point, value: Any, binary: bool) -> float:
    return metrics.auroc(point.codes.ravel(), value) if binary else float((value > 0).mean())
