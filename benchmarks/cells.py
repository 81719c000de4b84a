"""The rows of the main table: each a function of a `Work` that returns plain values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import baselines, tuning
from benchmarks.costs import SAMPLE, answering
from benchmarks.folders import derive
from benchmarks.scoring import Clock, judge, of_report
from benchmarks.sets import TASKS, Rows, read_splits, sample, write_rows
from spin_cli import artifacts, atomic, backbone, extraction, prediction, selection, training
from spin_cli.choices import Metric, Penalty, Pooling, Solver
from spin_cli.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    PredictConfig,
    SelectConfig,
    TrainConfig,
)
from spin_cli.head import load_head


@dataclass(frozen=True)
class Work:
    """One model on one data set."""

    root: Path
    """Where its artifacts and results go."""
    data: Path
    """Folder with train, val and test files."""
    name: str
    """Key of `TASKS`."""
    model: ModelConfig
    source: Path | None = None
    """Activations that hold these texts already."""
    recipe: tuning.Recipe = field(default_factory=tuning.Recipe)

    @property
    def metric(self) -> Metric:
        return TASKS[self.name].metric

    @cached_property
    def splits(self) -> dict[str, Rows]:
        return read_splits(self.data)

    @property
    def seen(self) -> int:
        """Rows of train and val."""
        return len(self.splits["train"]) + len(self.splits["val"])

    @cached_property
    def some_texts(self) -> list[str]:
        """Test texts on which costs are measured."""
        return [text for text, _ in sample(self.splits["test"], SAMPLE, 0)]

    def pieces(self, name: str) -> Path:
        """Where a cell keeps what it has found so far."""
        return self.root / "pieces" / name

    def activations(self) -> Path:
        """Made where missing: read off the model, or copied out of `source`."""
        target = self.root / "activations"
        if (target / artifacts.MANIFEST).is_file():
            return target
        if self.source is not None:
            return derive(self.source, target, self.data)
        extraction.extract(self.data, target, ExtractConfig(DataConfig(), self.model))
        return target

    def mean_activations(self) -> Path:
        """Those of mean pooling alone."""
        target = self.root / "activations-mean"
        if not (target / artifacts.MANIFEST).is_file():
            derive(self.activations(), target, self.data, [Pooling.MEAN])
        return target

    def selection(self, solver: Solver = Solver.NEWTON) -> tuple[Path, float]:
        """Made where missing; and how many seconds it took."""
        reference = solver is Solver.REFERENCE
        target = self.root / ("selection-reference" if reference else "selection")
        log = target.with_suffix(".json")
        if not (target / artifacts.MANIFEST).is_file() or not log.is_file():
            source = self.mean_activations() if reference else self.activations()
            clock = Clock()
            config = SelectConfig(metric=self.metric, solver=solver)
            selection.select(source, target, config, force=True)
            atomic.write_json(log, {"seconds": clock.seconds})
        return target, artifacts.read_json(log)["seconds"]

    def reading_seconds(self) -> float:
        """To read every layer of the train and val texts, from a sample of them."""
        found = self.root / "reading.json"
        if not found.is_file():
            rows = sample(self.splits["train"], 2 * SAMPLE, 0)
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "train.csv"
                write_rows(data, rows)
                planned = extraction.plan(data, ExtractConfig(DataConfig(), self.model))
                clock = Clock()
                extraction.run(planned, Path(folder) / "activations")
            atomic.write_json(found, {"seconds_per_text": clock.seconds / len(rows)})
        return self.seen * artifacts.read_json(found)["seconds_per_text"]


def spin(work: Work, config: TrainConfig, solver: Solver = Solver.NEWTON) -> dict[str, Any]:
    """Select where that is still to do, train, score, and measure what an answer costs."""
    selected, select_seconds = work.selection(solver)
    head = work.root / "heads" / _name(config, solver)
    clock = Clock()
    manifest = training.train(selected, head, replace(config, metric=work.metric), force=True)
    train_seconds = clock.seconds
    report = manifest["metrics"]
    predictor = prediction.open_predictor(head, PredictConfig())
    chosen = report["chosen"]
    parts = {"read": work.reading_seconds(), "select": select_seconds, "train": train_seconds}
    return (
        of_report(report)
        | {
            "train_seconds": sum(parts.values()),
            "parts": parts,
            "depth": sum(stack.depth for stack in predictor.model.layout.stacks),
            "layers": report["layers_total"],
            "neurons": chosen["neurons"],
            "parameters": _parameters(head),
            "chosen": {key: chosen[key] for key in ("site", "pooling", "eta", "strength")},
            "rows": report["rows"],
        }
        | answering(predictor.probabilities, work.some_texts)
    )


def _name(config: TrainConfig, solver: Solver) -> str:
    return "-".join([*config.sites, solver.value]) if len(config.sites) < 4 else solver.value


def _parameters(head: Path) -> int:
    loaded = load_head(head)
    hidden = sum(part.size for part in loaded.hidden) if loaded.hidden else 0
    return int(loaded.weight.size + loaded.bias.size + hidden)


def reference(work: Work) -> dict[str, Any]:
    """The paper's recipe: saga probes, an L1 head, choices on val rows alone; mean pooling."""
    config = TrainConfig(penalty=Penalty.L1, cv=0, refit=False, masks_only=True)
    return spin(work, config, Solver.REFERENCE)


def whole_model(work: Work) -> dict[str, Any]:
    """What an answer costs that takes all of the model, by a plain loop."""
    base = backbone.load(work.model)
    model = tuning.TextClassifier(base, 2)

    def answer(texts: list[str]) -> np.ndarray:
        return tuning.predict(model, tuning.encode(base, [(text, "") for text in texts]))

    layers = sum(stack.depth for stack in base.layout.stacks)
    return {"depth": layers, "layers": layers} | answering(answer, work.some_texts)


def last_layer(work: Work) -> dict[str, Any]:
    """Reading time is that of the whole model's forward pass: no more is needed."""
    costs = whole_model(work)
    found = baselines.last_layer(work.activations(), work.metric)
    reading = work.seen / costs["texts_per_second"]
    return costs | found | {"train_seconds": reading + found["train_seconds"]}


def tfidf(work: Work) -> dict[str, Any]:
    found, pipe = baselines.tfidf(work.data, work.metric)
    return {"depth": 0, "layers": 0} | found | answering(pipe.predict_proba, work.some_texts)


def fine_tuned(work: Work) -> dict[str, Any]:
    """Every weight trained; see `tuning`."""
    model = replace(work.model, max_length=work.recipe.max_length)
    found = tuning.fine_tune(model, work.splits, work.metric, work.recipe)
    scores = judge(work.metric, *found["test"], found["val"])
    kept = {key: found[key] for key in ("epoch", "history", "train_seconds", "parameters")}
    return whole_model(work) | scores | kept | {"chosen": artifacts.to_plain(work.recipe)}


CELLS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "last": last_layer,
    "tfidf": tfidf,
    "hidden": lambda work: spin(work, TrainConfig(sites=("hidden",))),
    "ffn": lambda work: spin(work, TrainConfig(sites=("ffn",))),
    "both": lambda work: spin(work, TrainConfig()),
    "reference": reference,
    "finetune": fine_tuned,
}
TITLES = {
    "last": "last layer (the paper's Base)",
    "tfidf": "TF-IDF + logistic regression",
    "hidden": "SPIN, hidden",
    "ffn": "SPIN, ffn",
    "both": "SPIN, both",
    "reference": "the paper's recipe, mean pooling",
    "finetune": "full fine-tuning",
}


def clean(work: Work) -> None:
    """Remove what is large and can be made again."""
    for name in ("activations", "activations-mean"):
        shutil.rmtree(work.root / name, ignore_errors=True)
