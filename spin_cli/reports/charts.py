"""Kinds of plots that several figures share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.reports.drawing import COLOURS, SERIES, plain

MARKERS = ("o", "s", "^", "D")
BINS = 28
HEADROOM = 1.45
"""Height of a panel that has names in its corner, in heights of what is drawn."""
DARK = 0.7
"""Share of full colour from which letters on it have the paper's colour."""


@dataclass(frozen=True)
class Line:
    """One line of a plot, with its name at its end."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    """Name of one of `COLOURS`."""
    dashed: bool = False
    marker: str = "o"


def bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    colours: Sequence[str],
    *,
    log: bool = True,
) -> None:
    """Horizontal bars with their values written beside them."""
    places = np.arange(len(names))[::-1]
    axes.barh(places, values, height=0.62, color=[COLOURS[name] for name in colours])
    axes.set_yticks(places, list(names))
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(visible=False)
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([])
    if log:
        low, high = np.log10(max(1e-9, min(values))), np.log10(max(values))
        axes.set_xscale("log")
        axes.set_xlim(10 ** (low - 0.35 * max(1.0, high - low)), max(values))
        axes.set_xticks([], minor=True)
        axes.set_xticks([])
    for place, value, label in zip(places, values, labels, strict=True):
        axes.annotate(
            label, (value, place), (4, 0), textcoords="offset points", va="center",
            annotation_clip=False,
        )  # fmt: skip


def lines(axes: Any, series: Sequence[Line], *, low: float | None = None) -> None:
    """Lines whose names stand at their ends, moved apart where they would touch."""
    for line in series:
        axes.plot(
            line.x, line.y, color=COLOURS[line.colour], marker=line.marker,
            linestyle=(0, (4, 2)) if line.dashed else "-", clip_on=False,
        )  # fmt: skip
    values = [v for line in series for v in line.y]
    bottom, top = min(values) if low is None else low, max(values)
    margin = 0.06 * max(top - bottom, 1e-6)
    axes.set_ylim(bottom - margin, top + margin)
    name_ends(axes, [(line.name, line.y[-1], line.colour) for line in series])


def name_ends(axes: Any, ends: Sequence[tuple[str, float, str]], gap: float = 0.1) -> None:
    """Names to the right of a plot, at the heights where lines end, *gap* of its height apart."""
    bottom, top = axes.get_ylim()
    ranked = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, value, _ in ranked:
        place = (value - bottom) / (top - bottom)
        places.append(max(place, places[-1] + gap) if places else place)
    if places:
        over = max(0.0, places[-1] - 1.0)
        places = [place - over for place in places]
    for (name, _, colour), place in zip(ranked, places, strict=True):
        axes.annotate(
            plain(name, 22), (1.0, place), (6, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", color=COLOURS[colour], annotation_clip=False,
        )  # fmt: skip


def two_densities(
    axes: Any,
    groups: Sequence[NDArray[Any]],
    names: Sequence[str] = (),
    span: tuple[float, float] | None = None,
) -> None:
    """Histograms of the same area over one another, their names in the upper right corner."""
    low, high = span or outer([np.concatenate(list(groups))])
    edges = np.linspace(low, high, BINS + 1)
    for group, colour in zip(groups, SERIES, strict=False):
        inside = np.clip(group.astype(np.float64), low, high)  # in float16 it may be below `low`
        heights, _ = np.histogram(inside, edges, density=len(group) > 0)
        axes.stairs(heights, edges, fill=True, color=COLOURS[colour], alpha=0.25, linewidth=0)
        axes.stairs(heights, edges, color=COLOURS[colour], linewidth=1.3)
    for place, (name, colour) in enumerate(
        zip(reversed(names), reversed(SERIES[: len(names)]), strict=True)
    ):
        axes.annotate(
            plain(name, 14),
            (1, 1),
            (0, -9 - 11 * place),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            color=COLOURS[colour],
            fontsize=9,
        )
    axes.set_xlim(low, high)
    axes.set_ylim(0, HEADROOM * axes.get_ylim()[1] if names else None)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def outer(groups: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """A span that holds all but the farthest half percent at either end."""
    low, high = np.percentile(np.concatenate(list(groups)).astype(np.float64), [0.5, 99.5])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def heat(
    axes: Any,
    shares: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """A table of cells whose colour grows stronger with *shares* (0 to 1); NaN stays empty."""
    from matplotlib.patches import Rectangle

    for i, j in np.ndindex(*shares.shape):
        if np.isnan(shares[i, j]):
            continue
        axes.add_patch(
            Rectangle((j, i), 0.96, 0.96, facecolor=COLOURS["one"], linewidth=0,
                      alpha=float(0.04 + 0.96 * shares[i, j]))
        )  # fmt: skip
        if texts is not None:
            colour = COLOURS["paper" if shares[i, j] > DARK else "ink"]
            axes.text(j + 0.48, i + 0.5, texts[i][j], ha="center", va="center", color=colour,
                      fontsize=8.5)  # fmt: skip
    axes.set_xlim(0, shares.shape[1])
    axes.set_ylim(shares.shape[0], 0)
    axes.set_xticks(np.arange(len(columns)) + 0.48, list(columns))
    axes.set_yticks(np.arange(len(rows)) + 0.48, list(rows))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def every(names: Sequence[str], most: int) -> list[str]:
    """The names with all but about *most* of them blanked, for crowded axes."""
    step = -(-len(names) // most)
    return [name if at % step == 0 else "" for at, name in enumerate(names)]
