"""Heads of every depth and eta, fitted to the stored activations: what the choice was among.

They are made for the curves alone, the way the chosen head was (its site, poolings and penalty),
and nothing is chosen by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.choices import ClassWeight, Penalty
from spin_cli.config import TrainConfig
from spin_cli.reports.sources import Run
from spin_cli.training.inputs import Inputs, make_reader, read_inputs
from spin_cli.training.search import STRENGTHS, Fitted, fit_columns
from spin_cli.training.table import Choice, Reader
from spin_cli.workers import side_by_side

MOST_DEPTHS = 12
MOST_CELLS = 24_000_000
"""Training rows times weights of the largest head: of more rows a part is taken."""
FEWEST_ROWS = 1_000
Step = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """One head of a curve."""

    choice: Choice
    layer: str
    neurons: int
    val: float
    """The metric on val rows; the penalty was chosen on them."""
    test: float | None
    codes: NDArray[np.int64]
    """(n,), or (n, L), of test rows, or of val rows where there are none."""
    probs: NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """Two cuts through the space of heads, both through the chosen one."""

    by_depth: list[Point]
    by_eta: list[Point]
    rows: int
    """Training rows used."""
    rows_there: int
    split: str
    """Of each point's codes and probabilities."""


def fit_curves(run: Run, step: Step = lambda: None) -> Curves:
    """Fit a head to every depth and eta around the chosen one.

    Raises
    ------
    LeftOut
        Activations or selection are gone.
    """
    selection, _ = run.selection(), run.activations()
    report = run.metrics
    config = TrainConfig(
        metric=run.metric, penalty=Penalty(report["penalty"]),
        class_weight=ClassWeight(_option(run, "class_weight", "none")),
    )  # fmt: skip
    inputs = read_inputs(selection.folder, selection.manifest, config)
    chosen, etas = run.choice, _etas(run)
    depths = _depths(len(inputs.layers), chosen.depth)
    ranking = make_reader(selection.folder, inputs, inputs.search_rows)
    choices = [replace(chosen, depth=depth) for depth in depths]
    choices += [replace(chosen, eta=eta) for eta in etas]
    choices = [choice for choice in dict.fromkeys(choices) if ranking.count(choice)]
    there = len(inputs.rows["train"])
    inputs = _fewer_rows(inputs, max(map(ranking.count, choices)))
    points = _fit_all(run, inputs, choices, step)
    return Curves(
        [points[c] for c in choices if c.eta == chosen.eta],
        sorted(
            (points[c] for c in choices if c.depth == chosen.depth),
            key=lambda point: point.choice.eta,
        ),
        len(inputs.rows["train"]),
        there,
        "test" if len(inputs.rows["test"]) else "val",
    )


def _fit_all(
    run: Run, inputs: Inputs, choices: Sequence[Choice], step: Step
) -> dict[Choice, Point]:
    folder = run.selection().folder
    reader = make_reader(folder, inputs, inputs.search_rows)
    tester = make_reader(folder, inputs, inputs.rows["test"])
    strengths: Sequence[float] = STRENGTHS
    if not run.joined:  # else its strength is that of a part, or of another kind
        chosen = float(run.metrics["chosen"]["strength"])
        strengths = (3 * chosen, chosen, chosen / 3)

    def one(choice: Choice) -> Point:
        columns = reader.gather(choice)
        fitted = fit_columns(columns, inputs.split, strengths)
        point = _judge(choice, fitted, columns.shape[1], inputs, tester)
        step()
        return point

    reader.prepare(choices)
    if len(inputs.rows["test"]):
        tester.prepare(choices)
    return dict(zip(choices, side_by_side(one, choices, 0, reader.count), strict=True))


def _judge(choice: Choice, fitted: Fitted, neurons: int, inputs: Inputs, tester: Reader) -> Point:
    codes, probs = inputs.codes[inputs.rows["val"]], fitted.val_probs
    test = None
    if len(inputs.rows["test"]):
        threshold = metrics.tuned_threshold(inputs.metric, codes, probs)
        codes = inputs.codes[inputs.rows["test"]]
        probs = fitted.probabilities(tester.gather(choice))
        test = metrics.score_at(inputs.metric, codes, probs, threshold)
    layer = inputs.layers[choice.depth]
    return Point(choice, layer, neurons, fitted.score, test, codes, probs)


def _option(run: Run, name: str, default: Any) -> Any:
    return run.trained.manifest["request"]["options"].get(name, default)


def _etas(run: Run) -> list[float]:
    return sorted({float(eta) for eta in _option(run, "etas", ())} | {run.choice.eta})


def _depths(layers: int, chosen: int) -> list[int]:
    count = min(layers, MOST_DEPTHS)
    spread = np.linspace(0, layers - 1, count).round().astype(int)
    return sorted({*spread.tolist(), chosen})


def _fewer_rows(inputs: Inputs, neurons: int) -> Inputs:
    """A part of the training rows, every class in proportion, where all of them would take long."""
    rows = inputs.rows["train"]
    wanted = max(FEWEST_ROWS, MOST_CELLS // max(1, neurons * inputs.split.outputs))
    if len(rows) <= wanted:
        return inputs
    rng = np.random.default_rng(0)
    if inputs.codes.ndim == 2:
        rows = np.sort(rng.permutation(rows)[:wanted])
        return replace(inputs, rows=inputs.rows | {"train": rows})
    kept: list[NDArray[np.intp]] = []
    for code in np.unique(inputs.codes[rows]):
        of_class = rows[inputs.codes[rows] == code]
        count = max(1, round(wanted * len(of_class) / len(rows)))
        kept.append(rng.choice(of_class, min(count, len(of_class)), replace=False))
    return replace(inputs, rows=inputs.rows | {"train": np.sort(np.concatenate(kept))})
