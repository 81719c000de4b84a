"""Stage 3: from masks to one head, everything about it chosen on validation data.

The order of things keeps the test split honest: the search sees a reader of train and val rows
alone; a second reader, of test rows, is made once the head and the baseline are settled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, metrics, probe
from spin_cli.activations import SAMPLES, Feature, features_of, read_samples
from spin_cli.config import Metric, Progress, Site, StorageDtype, TrainConfig, quiet
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.head import CARD, METRICS, Head, HeadFeature, blocks_needed, save_head
from spin_cli.training.card import model_card
from spin_cli.training.search import (
    Candidate,
    Fitted,
    Split,
    best_of,
    first_choices,
    fit_columns,
    next_choices,
    pooling_groups,
    try_all,
)
from spin_cli.training.table import MASKS, SITES, Reader, read_masks

FINAL_TOL = 1e-4
"""Gradient, relative to that at zero weights, to which the chosen head is solved."""


@dataclass(frozen=True)
class Inputs:
    """What the stages before have written, checked."""

    source: Path
    activations: dict[str, Any]
    selection: dict[str, Any]
    features: tuple[Feature, ...]
    layers: tuple[str, ...]
    codes: NDArray[np.int64]
    rows: dict[str, NDArray[np.intp]]
    dtype: StorageDtype
    metric: Metric

    @property
    def classes(self) -> list[str]:
        """Label names."""
        return list(self.activations["classes"])

    @property
    def search_rows(self) -> NDArray[np.intp]:
        """Train and val rows."""
        return np.concatenate([self.rows["train"], self.rows["val"]])

    @property
    def split(self) -> Split:
        """The division of `search_rows`."""
        n_train, n = len(self.rows["train"]), len(self.search_rows)
        codes = self.codes[self.search_rows]
        return Split(
            codes, np.arange(n_train), np.arange(n_train, n), len(self.classes), self.metric
        )


def train(
    source: Path,
    output: Path,
    config: TrainConfig,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Search for the best head on the selection folder *source* and write it to *output*.

    Returns
    -------
    dict
        The manifest; under ``metrics`` what ``metrics.json`` holds, under ``log`` the time taken.

    Raises
    ------
    ArtifactError
        *source* or the activations behind it are missing, damaged or changed, or *output* is in
        the way.
    UsageError
        No candidate is left by the options.
    """
    started = time.time()
    selection = artifacts.read_manifest(source, "selection")
    artifacts.check_vacant(output, force=force)
    inputs = read_inputs(source, selection, config)
    reader = make_reader(source, inputs, inputs.search_rows)
    best, tried, baseline = search(reader, inputs, config, progress)
    head = build_head(reader, inputs, best)
    report = measure(source, inputs, best, tried, baseline, head)
    with artifacts.building(output, force=force) as folder:
        save_head(folder, head)
        artifacts.write_json(folder / METRICS, report)
        artifacts.write_text(folder / CARD, model_card(head, report))
        content = {
            "request": request_of(selection, config),
            "parent": artifacts.parent_entry(output, source, selection),
            "classes": inputs.classes,
        }
        manifest = artifacts.write_manifest(folder, "head", content)
        log = {"seconds": round(time.time() - started, 2)}
        artifacts.write_log(folder, log)
    return manifest | {"metrics": report, "log": log}


def request_of(parent: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What decides a head: the selection and the options, but not the number of workers."""
    options = artifacts.to_plain(config)
    options.pop("workers")
    return {"parent": parent["fingerprint"], "options": options}


def read_inputs(source: Path, selection: dict[str, Any], config: TrainConfig) -> Inputs:
    """Check the artifacts before, and read what is known of each row."""
    folder, manifest = artifacts.read_parent(source, selection)
    try:
        codes_of = {name: code for code, name in enumerate(manifest["classes"])}
        samples = read_samples(folder)
        codes = np.array([codes_of[label] for label in samples.labels], np.int64)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{folder / SAMPLES}: does not agree with the manifest") from error
    features = features_of(manifest)
    there = {feature.layer for feature in features}
    return Inputs(
        source=folder,
        activations=manifest,
        selection=selection,
        features=features,
        layers=tuple(name for name in manifest["layers"] if name in there),
        codes=codes,
        rows={name: samples.rows(name) for name in ("train", "val", "test")},
        dtype=StorageDtype(manifest["storage_dtype"]),
        metric=config.metric or Metric(selection["metric"]),
    )


def make_reader(source: Path, inputs: Inputs, rows: NDArray[np.intp]) -> Reader:
    """A reader of some rows."""
    ranked = read_masks(source / MASKS, inputs.features)
    return Reader(inputs.source, ranked, inputs.layers, len(inputs.codes), rows, inputs.dtype)


def search(
    reader: Reader, inputs: Inputs, config: TrainConfig, progress: Progress
) -> tuple[Candidate, list[Candidate], tuple[Feature, Fitted]]:
    """Choose the head and the baseline on train and val rows; test rows are not within reach."""
    poolings = list(dict.fromkeys(feature.pooling for feature in inputs.features))
    sites = {feature.site for feature in inputs.features}
    config = _possible(config, sites)
    first = first_choices(config, poolings, len(inputs.layers))
    done, total, n_val = 0, len(first) + 12, len(inputs.rows["val"])

    def step() -> None:
        nonlocal done
        done += 1
        progress("train", min(done, total), total)

    tried: list[Candidate] = []
    for group in pooling_groups(poolings):  # only the columns of one group in memory at a time
        part = [choice for choice in first if choice.poolings == group]
        tried += try_all(part, reader, inputs.split, config, step)
        reader.forget()
    if not tried:
        raise UsageError("no head is left to try: --max-layer or --max-neurons allow none")
    known = {candidate.choice for candidate in tried}
    around = next_choices(best_of(tried, n_val).choice, config, len(inputs.layers))
    fresh = [choice for choice in dict.fromkeys(around) if choice not in known]
    total = done + len(fresh)
    tried += try_all(fresh, reader, inputs.split, config, step)
    best = best_of(tried, n_val)
    baseline = last_layer(reader, inputs)
    tight = fit_columns(reader.gather(best.choice), inputs.split, [best.fitted.strength], FINAL_TOL)
    progress("train", total, total)
    return Candidate(best.choice, best.neurons, tight), tried, baseline


def _possible(config: TrainConfig, sites: set[Site]) -> TrainConfig:
    kept = tuple(name for name in config.sites if set(SITES[name]) <= sites)
    if not kept:
        raise UsageError(f"--site {','.join(config.sites)}: the activations have no such site")
    return replace(config, sites=kept)


def last_layer(reader: Reader, inputs: Inputs) -> tuple[Feature, Fitted]:
    """The usual way, to compare with: all neurons of the model's last layer, its best pooling.

    Both the raw output of the last block and the one after the final norm are tried.
    """
    hidden = [feature for feature in inputs.features if feature.site is Site.HIDDEN]
    if not hidden:
        hidden = list(inputs.features)
    last = inputs.layers[-2:] if inputs.layers[-1].endswith("final") else inputs.layers[-1:]
    found = [
        (feature, fit_columns(reader.whole(feature), inputs.split))
        for feature in hidden
        if feature.layer in last
    ]
    if not found:
        deepest = hidden[-1].layer
        found = [
            (feature, fit_columns(reader.whole(feature), inputs.split))
            for feature in hidden
            if feature.layer == deepest
        ]
    return max(found, key=lambda pair: pair[1].rank)


def build_head(reader: Reader, inputs: Inputs, best: Candidate) -> Head:
    """Fold the scale into the weights and gather what ``predict`` needs."""
    fitted = best.fitted
    weight, bias = probe.fold_back(fitted.fit, fitted.standard)
    features = tuple(
        HeadFeature(f.layer, f.site, f.pooling, f.width, neurons)
        for f, neurons in (
            (i.feature, i.top(best.choice.eta)) for i in reader.matching(best.choice)
        )
    )
    manifest = inputs.activations
    return Head(
        classes=tuple(inputs.classes),
        features=features,
        weight=weight,
        bias=bias,
        threshold=choose_threshold(inputs, fitted),
        blocks=blocks_needed([f.layer for f in features]),
        storage_dtype=inputs.dtype,
        model=manifest["request"]["model"],
        reading=manifest["request"]["options"]["model"],
    )


def choose_threshold(inputs: Inputs, fitted: Fitted) -> float | None:
    """For macro-F1 of two classes the threshold that is best on validation rows, else None."""
    if inputs.metric is not Metric.MACRO_F1 or len(inputs.classes) != 2:
        return None
    return metrics.best_threshold(inputs.codes[inputs.rows["val"]], fitted.val_probs)


def measure(
    source: Path,
    inputs: Inputs,
    best: Candidate,
    tried: Sequence[Candidate],
    baseline: tuple[Feature, Fitted],
    head: Head,
) -> dict[str, Any]:
    """Scores on val and, once, on test; the baseline's beside them; the best candidates."""
    val = inputs.codes[inputs.rows["val"]]
    feature, fitted = baseline
    threshold = choose_threshold(inputs, fitted)
    spin = {"val": metrics.evaluate(val, best.fitted.val_probs, inputs.classes, head.threshold)}
    base = {"val": metrics.evaluate(val, fitted.val_probs, inputs.classes, threshold)}
    rows = inputs.rows["test"]
    if len(rows):
        reader = make_reader(source, inputs, rows)
        probs = best.fitted.probabilities(reader.gather(best.choice))
        spin["test"] = metrics.evaluate(inputs.codes[rows], probs, inputs.classes, head.threshold)
        probs = fitted.probabilities(reader.whole(feature))
        base["test"] = metrics.evaluate(inputs.codes[rows], probs, inputs.classes, threshold)
    ranked = sorted(tried, key=lambda c: c.fitted.rank, reverse=True)
    return {
        "metric": inputs.metric.value,
        "chosen": describe(best, inputs) | {"threshold": head.threshold},
        "layers_total": len(inputs.activations["layers"]) - 1,
        "neurons_total": sum(f.width for f in inputs.features if f.pooling in best.choice.poolings),
        "rows": {name: len(index) for name, index in inputs.rows.items()},
        "spin": spin,
        "last_layer": {
            "layer": feature.layer,
            "pooling": feature.pooling.value,
            "l2_share": fitted.strength,
            "threshold": threshold,
            **base,
        },
        "candidates": [describe(candidate, inputs) for candidate in ranked],
    }


def describe(candidate: Candidate, inputs: Inputs) -> dict[str, Any]:
    """A candidate as plain values."""
    choice, fitted = candidate.choice, candidate.fitted
    return {
        "site": choice.site,
        "pooling": "+".join(pooling.value for pooling in choice.poolings),
        "eta": choice.eta,
        "depth": choice.depth,
        "layer": inputs.layers[choice.depth],
        "neurons": candidate.neurons,
        "l2_share": fitted.strength,
        "val_score": round(fitted.score, 6),
        "val_log_loss": round(fitted.log_loss, 6),
    }
