"""Cells as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import ABLATION_TITLES
from benchmarks.cells import TITLES
from spin_cli import artifacts

SETS = {"sst2": "SST-2", "imdb": "IMDb", "edos": "EDOS"}
METRICS = {"accuracy": "accuracy", "macro-f1": "macro-F1"}


def collect(folder: Path) -> list[dict[str, Any]]:
    """All cells under *folder*, by data set and model, in the order of the rows."""
    order = [*TITLES, *ABLATION_TITLES]
    found = []
    for kind in ("cells", "ablations"):
        for path in folder.glob(f"*/*/{kind}/*.json"):
            found.append({"kind": kind} | artifacts.read_json(path))
    return sorted(found, key=lambda cell: (cell["data"], cell["model"], order.index(cell["name"])))


def render(cells: Sequence[dict[str, Any]]) -> str:
    """A section for each data set and model."""
    sections: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        sections.setdefault((cell["data"], cell["model"]), []).append(cell)
    return "\n".join(_section(part) for part in sections.values())


def _section(cells: list[dict[str, Any]]) -> str:
    first = cells[0]
    rows = first["rows"]
    sizes = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    lines = [f"### {SETS[first['set']]}, {first['model']}: {sizes} rows", ""]
    main = [cell for cell in cells if cell["kind"] == "cells"]
    if main:
        lines += [*main_table(main), ""]
    for cell in cells:
        if cell["kind"] == "ablations":
            lines += [f"{ABLATION_TITLES[cell['name']]}:", "", *points_table(cell["found"]), ""]
    dates = sorted(cell["date"] for cell in cells)
    lines += [f"{first['machine']}, {dates[0]} to {dates[-1]}.", ""]
    return "\n".join(lines)


def main_table(cells: Sequence[dict[str, Any]]) -> list[str]:
    metric = METRICS[cells[0]["found"]["metric"]]
    rows = [
        [
            TITLES[cell["name"]],
            score_text(cell["found"]),
            f"{cell['found']['depth']} of {cell['found']['layers']}" if cell["found"]["layers"]
            else "–",
            f"{cell['found']['neurons']:,}" if "neurons" in cell["found"] else "all",
            f"{cell['found']['parameters']:,}",
            f"{cell['found']['train_seconds']:,.0f}",
            f"{cell['found']['texts_per_second']:,.0f}",
            f"{cell['found']['gflops_per_text']:.3f}",
        ]
        for cell in cells
    ]  # fmt: skip
    return markdown(
        [
            "",
            f"test {metric}",
            "layers",
            "neurons",
            "trainable",
            "train s",
            "texts/s",
            "GFLOP/text",
        ],
        rows,
    )


def points_table(points: Sequence[dict[str, Any]]) -> list[str]:
    """Of an ablation: only the columns that some point has."""
    metric = METRICS[points[0]["metric"]]
    columns = [name for name in ("site", "pooling", "eta", "depth", "neurons") if name in points[0]]
    rows = [
        [point["what"], score_text(point), *[_value(point.get(name)) for name in columns]]
        for point in points
    ]
    return markdown(["", f"test {metric}", *columns], rows)


def score_text(found: dict[str, Any]) -> str:
    """In percent, with its interval, or its deviation over runs."""
    text = f"{100 * found['score']:.1f}"
    if found.get("interval"):
        low, high = found["interval"]
        return f"{text} ({100 * low:.1f}–{100 * high:.1f})"
    if found.get("deviation") is not None:
        return f"{text} ± {100 * found['deviation']:.1f}"
    return text


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *["| " + " | ".join(row) + " |" for row in rows],
    ]
