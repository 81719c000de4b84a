"""What each part of the method is worth, one part changed at a time."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import baselines, peers
from benchmarks.cells import Work
from benchmarks.folders import derive, relabel
from benchmarks.scoring import of_report, score
from benchmarks.sets import Rows, per_class, write_rows
from spin_cli import activations, artifacts, atomic, selection, training
from spin_cli.choices import Control, Pooling, Site
from spin_cli.config import DEFAULT_ETAS, SelectConfig, TrainConfig
from spin_cli.metrics import score_function
from spin_cli.probe import standardise
from spin_cli.probe.reference import fit_reference
from spin_cli.samples import read_samples

PLAIN = TrainConfig(cv=0, masks_only=True)
"""Choices on val rows alone: many heads are trained, and only they are compared. What is asked is
what masks do."""
SHOTS, SEEDS = (8, 32, 128, 512), (0, 1, 2)
FEW_NEURONS = (100, 1000)
Points = list[dict[str, Any]]


def head_of(work: Work, selected: Path, config: TrainConfig) -> dict[str, Any]:
    """Test score of a head that is thrown away."""
    with tempfile.TemporaryDirectory(dir=work.root) as folder:
        trained = training.train(
            selected, Path(folder) / "head", replace(config, metric=work.metric)
        )
    report = trained["metrics"]
    chosen = report["chosen"]
    kept = {key: chosen[key] for key in ("site", "pooling", "eta", "depth", "neurons")}
    return of_report(report) | kept


def eta_curve(work: Work) -> Points:
    selected, _ = work.selection()
    return [
        {"what": f"{eta:g}"} | head_of(work, selected, replace(PLAIN, etas=(eta,)))
        for eta in DEFAULT_ETAS
    ]


def depth_curve(work: Work) -> Points:
    """At most so many layers."""
    selected, _ = work.selection()
    manifest = artifacts.read_manifest(work.activations(), "activations")
    deepest = len(manifest["layers"]) - 1
    depths = sorted({round(deepest * k / 6) for k in range(1, 7)})
    return [
        {"what": f"{depth} of {deepest}"} | head_of(work, selected, replace(PLAIN, max_layer=depth))
        for depth in depths
    ]


def poolings(work: Work) -> Points:
    """One pooling alone, selected and trained anew."""
    manifest = artifacts.read_manifest(work.activations(), "activations")
    points = []
    for pooling in dict.fromkeys(f.pooling for f in activations.features_of(manifest)):
        with tempfile.TemporaryDirectory(dir=work.root) as folder:
            source = derive(work.activations(), Path(folder) / "activations", work.data, [pooling])
            selected = select(work, source, Path(folder) / "selection")
            points.append({"what": pooling.value} | head_of(work, selected, PLAIN))
    return points


def sites(work: Work) -> Points:
    selected, _ = work.selection()
    return [
        {"what": site} | head_of(work, selected, replace(PLAIN, sites=(site,)))
        for site in ("hidden", "ffn", "both")
    ]


def select(work: Work, source: Path, target: Path, **options: Any) -> Path:
    selection.select(source, target, SelectConfig(metric=work.metric, **options), force=True)
    return target


def random_neurons(work: Work) -> Points:
    """Neurons by importance against as many of each matrix drawn at random."""
    selected, _ = work.selection()
    chance = select(
        work, work.activations(), work.root / "selection-random", control=Control.RANDOM
    )
    points = []
    for most in (*FEW_NEURONS, None):
        for what, folder in (("by probe", selected), ("random", chance)):
            found = head_of(work, folder, replace(PLAIN, max_neurons=most))
            points.append({"what": f"{what}, {most or 'any number'}"} | found)
    return points


def shuffled_labels(work: Work) -> Points:
    """Everything as ever, but train and val labels shuffled: test has to be at chance."""
    rng = np.random.default_rng(0)

    def shuffle(split: str, rows: Rows) -> Rows:
        if split == "test":
            return rows
        labels = rng.permutation([label for _, label in rows])
        return [(text, str(label)) for (text, _), label in zip(rows, labels, strict=True)]

    with tempfile.TemporaryDirectory(dir=work.root) as folder:
        data = relabel(work.data, Path(folder) / "data", shuffle)
        source = derive(work.activations(), Path(folder) / "activations", data, [Pooling.MEAN])
        selected = select(work, source, Path(folder) / "selection")
        found = {"what": "shuffled labels"} | head_of(work, selected, PLAIN)
    y = [label for _, label in work.splits["test"]]
    return [found, {"what": "always the commonest class"} | _majority(work, y)]


def _majority(work: Work, y: list[str]) -> dict[str, Any]:
    names, codes = np.unique(y, return_inverse=True)
    commonest = np.full(len(codes), np.bincount(codes).argmax())
    assert len(names) > 1
    return {"metric": work.metric.value, "score": score(work.metric, codes, commonest)}


def standardisation(work: Work) -> Points:
    """The paper's recipe on raw and on standardised columns: hidden states, mean pooling."""
    manifest = artifacts.read_manifest(work.activations(), "activations")
    samples = read_samples(work.activations())
    y = np.array([manifest["classes"].index(label) for label in samples.labels])
    train, val, test = (samples.rows(split) for split in ("train", "val", "test"))
    features = [
        f
        for f in activations.features_of(manifest)
        if f.site is Site.HIDDEN and f.pooling is Pooling.MEAN
    ]
    wanted = [features[round(k * (len(features) - 1) / 3)] for k in range(1, 4)]
    warnings.filterwarnings("ignore", module="sklearn")  # the recipe stops short, as it has to
    judge = score_function(work.metric)
    points = []
    for feature in wanted:
        X = baselines.read(work.activations(), manifest, feature)
        scaled = standardise(X[train])
        for what, parts in (
            ("raw", [X[rows] for rows in (train, val, test)]),
            ("standardised", [scaled.X, scaled.transform(X[val]), scaled.transform(X[test])]),
        ):
            found = fit_reference(
                parts[0], y[train], parts[1], y[val], len(manifest["classes"]), score=judge
            )
            fit = found.fits[found.best]
            said = (parts[2].astype(np.float64) @ fit.coef.T + fit.intercept).ravel() > 0
            points.append(
                {
                    "what": f"{feature.layer}, {what}",
                    "metric": work.metric.value,
                    "score": score(work.metric, y[test], said.astype(int)),
                    "neurons": int(np.count_nonzero(np.any(fit.coef, axis=0))),
                }
            )
    return points


def few_shots(work: Work) -> Points:
    """So many rows per class: SPIN, last layer, and SetFit where it is installed.

    Each draw is kept in a file of its own, since all of them together take an hour.
    """
    points = []
    pool = work.splits["train"] + work.splits["val"]
    for shots in SHOTS:
        if min(np.unique([label for _, label in pool], return_counts=True)[1]) < shots:
            continue
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            # A draw without SetFit is none of a run with it.
            rivals = "-setfit" if peers.has("setfit") else ""
            kept = work.pieces("few-shot") / f"{shots}-{seed}{rivals}.json"
            if not kept.is_file():
                kept.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_json(kept, _few(work, per_class(pool, shots, seed), shots))
            for what, value in artifacts.read_json(kept).items():
                found.setdefault(what, []).append(value)
        for what, values in found.items():
            points.append(
                {
                    "what": f"{shots} per class, {what}",
                    "metric": work.metric.value,
                    "score": float(np.mean(values)),
                    "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    "runs": len(values),
                }
            )
    return points


def _few(work: Work, rows: Rows, shots: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work.root) as name:
        folder = Path(name)
        data = folder / "data"
        data.mkdir()
        write_rows(data / "train.csv", rows)
        shutil.copy(work.data / "test.csv", data)
        source = derive(work.activations(), folder / "activations", data)
        selected = select(work, source, folder / "selection")
        found = {
            "SPIN": head_of(work, selected, TrainConfig())["score"],
            "last layer": baselines.last_layer(source, work.metric)["score"],
        }
        setfit = peers.setfit(work.model, rows, work.splits["test"], work.metric, shots)
        return found if setfit is None else found | {"SetFit": setfit}


ABLATIONS: dict[str, Callable[[Work], Points]] = {
    "eta": eta_curve,
    "depth": depth_curve,
    "pooling": poolings,
    "site": sites,
    "standardisation": standardisation,
    "random": random_neurons,
    "shuffled": shuffled_labels,
    "few-shot": few_shots,
}
ABLATION_TITLES = {
    "eta": "Share of importance kept (eta)",
    "depth": "Layers that may be read",
    "pooling": "One pooling alone",
    "site": "Site",
    "standardisation": "The paper's probe, with and without standardised columns",
    "random": "Neurons chosen by probes or at random",
    "shuffled": "Shuffled labels",
    "few-shot": "Few labels",
}
