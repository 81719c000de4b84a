"""The head's most salient neurons: what they tell apart, and the texts that activate them most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.backbone import Backbone
from spin_cli.choices import Pooling, Site
from spin_cli.errors import SpinError
from spin_cli.head import Head
from spin_cli.reports.charts import two_densities
from spin_cli.reports.drawing import Figure, Table, draw, plain
from spin_cli.reports.layers import short
from spin_cli.reports.model import Piece, token_values
from spin_cli.reports.sources import LeftOut, Run

SHOWN, TEXTS = 6, 5
CHARS = 260
TOKENS_AROUND = 24
"""Tokens shown to either side of the strongest."""
LEVELS = 4


@dataclass(frozen=True)
class Neuron:
    """One neuron of the head, over all texts."""

    layer: str
    site: Site
    pooling: Pooling
    index: int
    effect: float
    """What one standard deviation of it moves the logits by (their norm, for several classes)."""
    values: NDArray[np.float32]
    """(N,) over all rows."""
    code: int
    """The class that it tells from the others best by being higher."""
    auroc: float
    """Of the neuron alone, for that class."""

    @property
    def name(self) -> str:
        """For people."""
        return f"layer {short(self.layer)} {self.site.value} {self.pooling.value} #{self.index}"


def effects(head: Head) -> NDArray[np.float64]:
    """Norm (n,) over the logits of each neuron's weights, on raw features.

    With hidden units: the largest that a neuron can move a logit by, all units being on.
    """
    weight = head.weight.astype(np.float64)
    if head.hidden is not None:
        weight = np.abs(weight) @ np.abs(head.hidden[0].astype(np.float64))
    return np.asarray(np.linalg.norm(weight, axis=0))


def top_neurons(run: Run, most: int = SHOWN) -> list[Neuron]:
    """The neurons of the largest effect, the largest first; deviations are those of train rows."""
    train = run.samples.rows("train")
    raw, start = effects(run.head), 0
    found: list[tuple[float, int, int]] = []
    for at, feature in enumerate(run.head.features):
        columns = run.matrix(feature)[train][:, feature.neurons].astype(np.float32)
        here = raw[start : start + len(feature.neurons)] * columns.std(axis=0, dtype=np.float64)
        start += len(feature.neurons)
        found += [(float(effect), at, place) for place, effect in enumerate(here)]
    ranked = sorted(found, key=lambda item: (-item[0], item[1], item[2]))[:most]
    return [_neuron(run, *item) for item in ranked]


def _neuron(run: Run, effect: float, at: int, place: int) -> Neuron:
    feature = run.head.features[at]
    index = int(feature.neurons[place])
    values = run.matrix(feature)[:, index].astype(np.float32)
    alone = [metrics.auroc(run.of_class(k).astype(int), values) for k in range(len(run.classes))]
    code = int(np.nanargmax(alone))
    return Neuron(
        feature.layer, feature.site, feature.pooling, index, effect, values, code, alone[code]
    )


def draw_neurons(run: Run, neurons: Sequence[Neuron], files: bool) -> Figure:
    """Figure 3, first half: class-conditional distributions."""
    height, one = -(-len(neurons) // 2), "label" if run.multi_label else "class"

    def paint(canvas: Any) -> None:
        axes = canvas.subplots(height, 2, squeeze=False).ravel()
        for ax in axes[len(neurons) :]:
            ax.set_visible(False)
        for ax, neuron in zip(axes, neurons, strict=False):
            own = run.of_class(neuron.code)
            two_densities(
                ax, [neuron.values[~own], neuron.values[own]], ["others", run.classes[neuron.code]]
            )
            ax.set_title(f"{neuron.name}\nAUROC {neuron.auroc:.2f}", fontsize=9)

    rows = [
        [n.name, run.classes[n.code], f"{n.auroc:.4f}", f"{n.effect:.4f}",
         *_moments(n.values[run.of_class(n.code)]), *_moments(n.values[~run.of_class(n.code)])]
        for n in neurons
    ]  # fmt: skip
    said = "; ".join(f"{n.name} for {run.classes[n.code]}, AUROC {n.auroc:.2f}" for n in neurons)
    return draw(
        "neurons", paint, title=f"The most salient neurons, by {one}", files=files,
        height=0.2 + 1.45 * height,
        table=Table(
            ["neuron", "higher for", "AUROC", "effect of 1 sd", "mean there", "sd there",
             "mean else", "sd else"], rows,
        ),
        caption=(
            f"Distributions over all texts: vermilion, the {one} for which the neuron is higher;"
            " blue, all others. Salient: a standard deviation of it moves the head's logits most."
        ),
        alt=f"Distributions of {len(neurons)} neurons by {one}: {said}.",
    )  # fmt: skip


def _moments(values: NDArray[np.float32]) -> list[str]:
    return [f"{values.mean(dtype=np.float64):.4f}", f"{values.std(dtype=np.float64):.4f}"]


@dataclass(frozen=True)
class Mark:
    """A stretch of a text and how strongly it is marked, 0 (not at all) to `LEVELS`."""

    text: str
    level: int = 0
    value: float | None = None


@dataclass(frozen=True)
class Example:
    """A text that activates a neuron."""

    id: str
    label: str
    value: float
    marks: tuple[Mark, ...]


def find_examples(
    run: Run, neurons: Sequence[Neuron], model: Backbone | None
) -> list[tuple[Neuron, list[Example]]]:
    """The `TEXTS` different texts that activate each neuron most.

    Raises
    ------
    LeftOut
        The texts are gone.
    """
    if isinstance(run.texts, str):
        raise LeftOut(run.texts)
    return [(neuron, _examples_of(run, neuron, run.texts, model)) for neuron in neurons]


def _examples_of(
    run: Run, neuron: Neuron, texts: Sequence[str], model: Backbone | None
) -> list[Example]:
    rows: dict[str, int] = {}
    for row in np.argsort(-neuron.values, kind="stable").tolist():
        rows.setdefault(texts[row], row)
        if len(rows) == TEXTS:
            break
    marked: list[list[Piece] | None] = [None] * len(rows)
    if model is not None:
        try:
            marked = token_values(model, list(rows), neuron.layer, neuron.site, neuron.index)
        except SpinError:  # such a text has no tokens to tell apart
            marked = [None] * len(rows)
    top = max((p.value for pieces in marked if pieces for p in pieces), default=0.0)
    return [
        Example(
            plain(run.samples.ids[row], 60), plain(run.said(run.codes[row]), 120),
            float(neuron.values[row]), _marks(text, pieces, top),
        )
        for (text, row), pieces in zip(rows.items(), marked, strict=True)
    ]  # fmt: skip


def _marks(text: str, pieces: list[Piece] | None, top: float) -> tuple[Mark, ...]:
    """The strongest token with what stands around it, each token marked by its value."""
    if not pieces:
        return (Mark(plain(text, CHARS)),)
    shown = [at for at, piece in enumerate(pieces) if piece.text] or [0]
    strongest = max(shown, key=lambda at: pieces[at].value)
    first = max(0, strongest - TOKENS_AROUND)
    last = min(len(pieces), strongest + TOKENS_AROUND + 1)
    marks = [Mark("… ")] if first > shown[0] else []
    for piece in pieces[first:last]:
        strength = piece.value / top if top > 0 else 0.0
        level = int(np.clip((LEVELS + 1) * strength, 0, LEVELS))
        text = plain(piece.text, CHARS)
        space = text[: len(text) - len(text.lstrip())]
        marks += [Mark(space), Mark(text.lstrip(), level, round(piece.value, 4))]
    return (*marks, Mark(" …")) if last <= shown[-1] else tuple(marks)
