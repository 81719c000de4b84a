"""Every speed in one table of ratios, on small settings: ``make bench DATA=FOLDER``.

FOLDER holds ``sst2``. MiniLM; A and B do the same work in one process, one after the other; seconds
are of all cores together (with a GPU: of the wall clock), so that others on the machine matter
little. A ratio above 1 says that spin takes less.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file lies select.py, which must not stand for the standard library's module.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import baselines, peers, tuning  # noqa: E402
from benchmarks.cells import Work  # noqa: E402
from benchmarks.extract import bare_forward, plan_for, usual_loop  # noqa: E402
from benchmarks.folders import derive  # noqa: E402
from benchmarks.predict import run_usual, usual_load  # noqa: E402
from benchmarks.scoring import Clock, circumstances, fastest  # noqa: E402
from benchmarks.sets import prepare  # noqa: E402
from benchmarks.tables import markdown  # noqa: E402
from spin_cli import activations, artifacts, atomic, extraction, prediction, selection, training  # noqa: E402
from spin_cli.choices import Pooling, Solver  # noqa: E402
from spin_cli.config import ModelConfig, PredictConfig, SelectConfig, TrainConfig  # noqa: E402
from spin_cli.probe import standardise  # noqa: E402
from spin_cli.samples import read_samples  # noqa: E402

MODEL = "bundled:minilm"
EPOCHS = 3


@dataclass
class Rows:
    """The table as it grows."""

    rows: list[list[str]]

    def add(self, what: str, against: str, spin: float, other: float) -> None:
        self.rows.append([what, against, f"{other / spin:.3g}"])
        print(f"{what} | {against}: {other:.1f} s / {spin:.1f} s = {other / spin:.3g}", flush=True)


def timed(call: Callable[[], Any]) -> float:
    clock = Clock()
    call()
    return clock.seconds


def bench_extract(table: Rows, work: Work, folder: Path, repeats: int) -> float:
    """Reading every layer, and the ways to do without spin; returns its seconds."""
    plan = plan_for(work.data, MODEL)

    def spin() -> None:
        extraction.run(plan, work.root / "activations", force=True)

    spin_seconds = fastest(spin, repeats)
    table.add("extract", "bare forward pass", spin_seconds, fastest(bare_forward(plan), repeats))
    table.add("extract", "the usual loop", spin_seconds, fastest(usual_loop(plan, folder), repeats))
    if (seconds := peers.neurox_reading(work.model, work.data / "val.csv", folder)) is not None:
        share = len(work.splits["val"]) / sum(map(len, work.splits.values()))
        table.add("extract", "NeuroX, hidden states alone", spin_seconds * share, seconds)
    return spin_seconds


def bench_select(table: Rows, work: Work, folder: Path) -> float:
    """The probes of every layer and site, mean pooling; returns its seconds."""
    source = derive(work.activations(), folder / "mean", work.data, [Pooling.MEAN])
    config = SelectConfig(metric=work.metric)
    found: dict[str, Any] = {}

    def spin() -> None:
        found["scores"] = selection.select(source, folder / "selection", config, force=True)

    spin_seconds = timed(spin)
    recipe = replace(config, solver=Solver.REFERENCE)
    table.add(
        "select", "the paper's recipe (saga)", spin_seconds,
        timed(lambda: selection.select(source, folder / "reference", recipe)),
    )  # fmt: skip
    slow = liblinear(source, found["scores"]["scores"])
    table.add("select, all penalties", "liblinear, the chosen penalty alone", spin_seconds, slow)
    feature, X, y = list(train_matrices(source))[-1]
    if (seconds := peers.neurox_probe(X, y)) is not None:
        widths = [f.width for f, _, _ in train_matrices(source)]
        share = feature.width / sum(widths)
        table.add(
            "select, all penalties", "NeuroX's probe, one penalty", spin_seconds * share, seconds
        )
    return spin_seconds


def train_matrices(source: Path) -> Iterator[tuple[activations.Feature, np.ndarray, np.ndarray]]:
    """Every feature with its standardised train rows, and their codes."""
    manifest = artifacts.read_manifest(source, "activations")
    samples = read_samples(source)
    rows = samples.rows("train")
    y = np.array([manifest["classes"].index(label) for label in samples.labels[rows]])
    for feature in activations.features_of(manifest):
        yield feature, standardise(baselines.read(source, manifest, feature)[rows]).X, y


def liblinear(source: Path, scores: list[dict[str, Any]]) -> float:
    """Seconds of liblinear for each matrix at the penalty that was chosen, one point of a path."""
    from sklearn.linear_model import LogisticRegression

    seconds = 0.0
    for feature, X, y in train_matrices(source):
        row = next(r for r in scores if (r["layer"], r["site"]) == (feature.layer, feature.site))
        if not float(row["C"]):
            continue
        model = LogisticRegression(
            C=float(row["C"]), l1_ratio=1, solver="liblinear", intercept_scaling=100
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds += timed(lambda model=model, X=X, y=y: model.fit(X, y))
    return seconds


def bench_train(table: Rows, work: Work, spent: float) -> None:
    """All stages together against training every weight on the same rows."""
    selected, select_seconds = work.selection()
    seconds = timed(lambda: training.train(selected, work.root / "head", TrainConfig()))
    tuned = tuning.fine_tune(work.model, work.splits, work.metric, tuning.Recipe(epochs=EPOCHS))
    table.add(
        "extract + select + train", f"full fine-tuning, {EPOCHS} epochs",
        spent + select_seconds + seconds, tuned["train_seconds"],
    )  # fmt: skip


def bench_predict(table: Rows, work: Work, repeats: int) -> None:
    texts = work.some_texts
    predictor = prediction.open_predictor(work.root / "head", PredictConfig())
    model, tokenizer = usual_load(MODEL)
    weight = torch.randn(model.config.hidden_size, 1)
    spin = fastest(lambda: predictor.probabilities(texts), repeats)
    usual = fastest(lambda: run_usual(model, tokenizer, texts, weight), repeats)
    depth = sum(stack.depth for stack in predictor.model.layout.stacks)
    what = f"predict, {depth} of {model.config.num_hidden_layers} layers"
    table.add(what, "the usual script on the last layer", spin, usual)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2")
    parser.add_argument("--rows", type=int, default=1500, help="train and val rows")
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    table = Rows([])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(args.data, "sst2", folder / "data", args.rows, args.test_rows, 0)
        work = Work(folder / "work", data, "sst2", ModelConfig(MODEL))
        work.root.mkdir()
        spent = bench_extract(table, work, folder, args.repeats)
        bench_select(table, work, folder)
        bench_train(table, work, spent)
        bench_predict(table, work, args.repeats)
    text = "\n".join(markdown(["spin", "against", "its time / spin's"], table.rows)) + "\n"
    about = circumstances()
    sizes = {key: args.__dict__[key] for key in ("rows", "test_rows", "repeats")}
    atomic.write_json(args.output / "bench.json", {"ratios": table.rows, **sizes, **about})
    atomic.write_text(args.output / "bench.md", text)
    print(f"\n{text}\n{about['machine']}, {about['date']}")


if __name__ == "__main__":
    main()
