"""What the classifier costs beside a linear probe of the last layer and full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spin_cli.reports.charts import bars
from spin_cli.reports.drawing import Figure, Table, draw
from spin_cli.reports.model import Sizes
from spin_cli.reports.sources import Run

EPOCHS = 3
"""Of full fine-tuning; a usual number for BERT and its kin (Devlin et al. 2019)."""
PASSES = 300
"""Passes over each matrix that the probes' path and the search for a head are counted as."""
FORWARD, TRAINING = 2, 6
"""Floating-point operations per parameter and token (Kaplan et al. 2020)."""
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
ROWS = ("last layer", "SPIN", "full fine-tuning")
COLOURS = ("muted", "one", "two")


@dataclass(frozen=True)
class Costs:
    """Figures 2 and 5 of the paper, for this run."""

    training: tuple[float, ...]
    """FLOPs of each of `ROWS`."""
    per_text: tuple[float, ...]
    trainable: tuple[int, ...]
    tokens: int
    """Of training and validation texts."""
    mean_tokens: float
    """Of a text."""


def flops(value: float) -> str:
    """A number of floating-point operations for people."""
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} FLOP"


def count(value: float) -> str:
    """A number of parameters for people."""
    for unit, name in ((1e9, " B"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}"


def find_costs(run: Run, sizes: Sizes) -> Costs:
    """Count operations and parameters."""
    samples, chosen = run.samples, run.metrics["chosen"]
    tokens = {name: int(samples.n_tokens[samples.rows(name)].sum()) for name in ("train", "val")}
    both, mean = sum(tokens.values()), float(samples.n_tokens.mean())
    rows = len(samples.rows("train"))
    everything = sizes.used
    needed = sizes.up_to(run.activations().manifest["layers"], _position(run, chosen["layer"]))
    fitting = 4 * rows * sum(feature.width for feature in run.features) * PASSES
    head = run.head
    own = head.weight.size + head.bias.size
    if head.hidden is not None:
        own += head.hidden[0].size + head.hidden[1].size
    linear = head.outputs * (_last_width(run) + 1)
    return Costs(
        training=(
            FORWARD * everything * both,
            FORWARD * everything * both + fitting,
            TRAINING * everything * tokens["train"] * EPOCHS,
        ),
        per_text=tuple(FORWARD * n * mean for n in (everything, needed, everything)),
        trainable=(linear, own, sizes.total + linear),
        tokens=both,
        mean_tokens=mean,
    )


def _last_width(run: Run) -> int:
    """Neurons that the baseline on the last layer reads."""
    read = run.metrics["last_layer"]
    return next(
        f.width for f in run.features if (f.layer, f.site.value) == (read["layer"], read["site"])
    )


def _position(run: Run, layer: str) -> int:
    return int(run.activations().manifest["layers"].index(layer))


def draw_costs(costs: Costs, files: bool) -> Figure:
    """Figure 2: operations to train, and to classify a text."""

    def paint(canvas: Any) -> None:
        upper, lower = canvas.subplots(2, 1)
        bars(upper, ROWS, costs.training, [flops(v) for v in costs.training], COLOURS)
        upper.set_title("To train")
        bars(lower, ROWS, costs.per_text, [flops(v) for v in costs.per_text], COLOURS, log=False)
        lower.set_title(f"To classify a text of {costs.mean_tokens:.0f} tokens")

    table = Table(
        ["", "to train, FLOP", "per text, FLOP"],
        [[name, f"{a:.4g}", f"{b:.4g}"]
         for name, a, b in zip(ROWS, costs.training, costs.per_text, strict=True)],
    )  # fmt: skip
    return draw(
        "compute", paint, title="Compute cost", height=3.5, files=files, table=table,
        caption=(
            f"{FORWARD}·parameters·tokens for a forward pass, {TRAINING}·parameters·tokens and"
            f" {EPOCHS} epochs for full fine-tuning (assumed; not run here); parameters are those"
            f" of the blocks that a token runs through. Training and validation texts have"
            f" {costs.tokens:,} tokens. SPIN's probes and its search for a head are counted as"
            f" {PASSES} passes of 4·rows·neurons over every matrix. Attention scores and embeddings"
            " are left out. The upper scale is logarithmic."
        ),
        alt=_alt("FLOPs to train and per text", costs.training, costs.per_text, flops),
    )  # fmt: skip


def draw_trainable(costs: Costs, files: bool) -> Figure:
    """Figure 5: parameters that are trained."""

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        bars(axes, ROWS, costs.trainable, [count(v) for v in costs.trainable], COLOURS)

    rows = [[n, f"{v:,}"] for n, v in zip(ROWS, costs.trainable, strict=True)]
    return draw(
        "parameters", paint, title="Trainable parameters", height=1.9, files=files,
        table=Table(["", "parameters"], rows),
        caption=(
            "Weights and biases of each classifier; full fine-tuning trains the model's own as"
            " well, embeddings included. The scale is logarithmic."
        ),
        alt=_alt("Trainable parameters", costs.trainable, None, count),
    )  # fmt: skip


def _alt(what: str, first: Sequence[float], second: Sequence[float] | None, show: Any) -> str:
    parts = []
    for at, name in enumerate(ROWS):
        values = show(first[at]) + ("" if second is None else f" and {show(second[at])}")
        parts.append(f"{name} {values}")
    return f"{what}: {'; '.join(parts)}."
