"""Stage 3: from masks to one head, everything about it chosen on validation data.

The order of things keeps the test split honest: the search sees a reader of train and val rows
alone; a second reader, of test rows, is made once the head and the baselines are settled.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, probe
from spin_cli.config import (
    CV_FEW_FOLDS,
    CV_FEW_ROWS,
    CV_FOLDS,
    CV_MAX_ROWS,
    CV_VAL_ROWS,
    HeadKind,
    Progress,
    Search,
    Site,
    TrainConfig,
    quiet,
)
from spin_cli.errors import UsageError
from spin_cli.head import CARD, METRICS, Head, HeadFeature, blocks_needed, save_head
from spin_cli.training.blend import blends, mean_probs
from spin_cli.training.calibration import (
    Evidence,
    Scaling,
    choose_abstention,
    choose_threshold,
    fit_scaling,
)
from spin_cli.training.card import model_card
from spin_cli.training.folds import Folds
from spin_cli.training.inputs import Inputs, make_reader, read_inputs
from spin_cli.training.mlp import fit_final_mlp
from spin_cli.training.oof import write_oof
from spin_cli.training.pick import Judged, best_of
from spin_cli.training.report import Found, measure
from spin_cli.training.search import (
    finalists,
    first_choices,
    next_choices,
    pooling_groups,
    try_all,
    walk_strengths,
)
from spin_cli.training.table import SITES, Choice, Ranked, Reader


@dataclass(frozen=True)
class Weights:
    """Of a head, before calibration, on raw columns; see `Head`."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float64]
    hidden: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None


FAST_FINALISTS = 6
FINAL_TOL = 1e-4
"""Gradient, relative to that at zero weights, to which the chosen head is solved."""


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
        No candidate is left by the options, or options that contradict each other.
    DataError
        A target that too few rows stand behind, or that no threshold meets.
    """
    started = time.time()
    selection = artifacts.read_manifest(source, "selection")
    artifacts.check_vacant(output, force=force)
    inputs = read_inputs(source, selection, config)
    reader = make_reader(source, inputs, inputs.search_rows)
    found = search(reader, inputs, progress)
    oof = out_of_fold(reader, inputs, found) if config.oof else None
    if config.head is HeadKind.MLP:
        found, weights = fit_hidden(reader, inputs, found)
    else:
        weights = fit_final(reader, inputs, found)
    notes: list[str] = []
    head, scaling = build_head(reader, inputs, found, weights, notes)
    report = measure(source, inputs, found, head, scaling, notes)
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
    if oof is not None and config.oof is not None:
        linear = config.head is HeadKind.LOGISTIC  # the scaling of another head is of no use
        write_oof(config.oof, inputs, scaling.apply(oof) if linear else oof)
    return manifest | {"metrics": report, "log": log}


def out_of_fold(reader: Reader, inputs: Inputs, found: Found) -> NDArray[np.float64]:
    """Out-of-fold probabilities of train and val rows by linear heads as the chosen one."""
    if found.evidence.what == "out-of-fold":
        return found.evidence.probs
    config = inputs.config
    folds = Folds(reader, inputs.split, CV_FOLDS, config.workers, config.seed, inputs.groups)
    wanted: dict[Choice, list[float]] = {}
    for part in found.best.parts:
        wanted.setdefault(part.choice, []).append(part.strength)
    judged = {item.main: item.probs for item in folds.judge(wanted)}
    parts = [replace(part, share=1.0) for part in found.best.parts]
    return mean_probs([judged[part] for part in parts], [part.share for part in found.best.parts])


def request_of(parent: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What decides a head: the selection and the options, not what else is written."""
    options = artifacts.to_plain(config)
    for name in ("workers", "oof"):
        options.pop(name)
    return {"parent": parent["fingerprint"], "options": options}


def search(reader: Reader, inputs: Inputs, progress: Progress) -> Found:
    """Choose what the head reads and its penalty; test rows are not within reach.

    A coarse grid is judged on val rows, then what lies around its best. Where these rows are few,
    the best of each kind are judged again by cross-validation, with the neurons of each fold
    selected anew, and what lies around the best of them.
    """
    poolings = list(dict.fromkeys(feature.pooling for feature in inputs.features))
    config = _possible(inputs.config, {feature.site for feature in inputs.features})
    split, n_layers, folds = inputs.split, len(inputs.layers), fold_count(inputs)
    first = first_choices(config, poolings, n_layers)
    done, total = 0, len(first) + 12 + 18 * folds

    def step() -> None:
        nonlocal done
        done += 1
        progress("train", min(done, total), total)

    tried: list[Judged] = []
    for group in pooling_groups(poolings):  # only the columns of one group in memory at a time
        part = [choice for choice in first if choice.poolings == group]
        tried += try_all(part, reader, split, config, step)
        reader.forget()
    if not tried:
        raise UsageError("no head is left to try: --max-layer or --max-neurons allow none")
    y_val = split.codes[split.val]
    known = {item.main.choice for item in tried}
    around = next_choices(best_of(tried, y_val, split.metric).main.choice, config, n_layers)
    fresh = [choice for choice in dict.fromkeys(around) if choice not in known]
    tried += try_all(fresh, reader, split, config, step)
    crossed: list[Judged] = []
    if folds:
        crossed = cross_validate(reader, inputs, tried, folds, step)
    y = split.codes if folds else y_val
    judged = crossed if folds else tried
    most = config.max_neurons or sys.maxsize
    judged += [item for item in blends(judged, y, reader.count) if item.neurons <= most]
    best = best_of(judged, y, split.metric)
    reader.forget()
    progress("train", total, total)
    evidence = Evidence(y, best.probs, tuple(inputs.classes), "out-of-fold" if folds else "val")
    refit = bool(folds) if config.refit is None else config.refit
    return Found(best, tried, crossed, evidence, refit)


def fold_count(inputs: Inputs) -> int:
    """Folds of the cross-validation; 0: none."""
    config, n_val = inputs.config, len(inputs.rows["val"])
    smallest = int(np.bincount(inputs.codes[inputs.search_rows]).min())
    if config.cv is not None:
        if config.cv == 1 or config.cv > smallest:
            raise UsageError(
                f"--cv {config.cv}: from 2 to {smallest} (rows of the rarest class), or 0 for none"
            )
        return config.cv
    rows = len(inputs.search_rows)
    if n_val >= CV_VAL_ROWS or rows > CV_MAX_ROWS or smallest < CV_FOLDS:
        return 0
    return CV_FOLDS if rows <= CV_FEW_ROWS else CV_FEW_FOLDS


def cross_validate(
    reader: Reader, inputs: Inputs, tried: list[Judged], folds: int, step: Any
) -> list[Judged]:
    """Judge the best of each kind out of fold, then what lies around the best of these."""
    split, config = inputs.split, inputs.config
    crossing = Folds(reader, split, folds, config.workers, config.seed, inputs.groups)
    full = config.search is Search.FULL
    some = finalists(tried, split, None if full else FAST_FINALISTS)
    crossed = crossing.judge(some, step)
    best = best_of(crossed, split.codes, split.metric).main
    most = max(config.max_cells // len(split.train), 1)
    if config.max_neurons is not None:
        most = min(most, config.max_neurons)
    near = {
        choice: some[best.choice] if full else (best.strength,)
        for choice in next_choices(best.choice, config, len(inputs.layers), None if full else 2)
        if choice not in some and 0 < reader.count([choice]) <= most
    }
    return crossed + crossing.judge(near, step)


def _possible(config: TrainConfig, sites: set[Site]) -> TrainConfig:
    kept = tuple(name for name in config.sites if set(SITES[name]) <= sites)
    if not kept:
        raise UsageError(f"--site {','.join(config.sites)}: the activations have no such site")
    return replace(config, sites=kept)


def fit_final(reader: Reader, inputs: Inputs, found: Found) -> Weights:
    """The chosen head, solved to `FINAL_TOL`, on raw columns."""
    split = inputs.split
    if found.refit:
        split = replace(split, train=np.arange(len(split.codes)))
    union = reader.union(found.best.choices)
    starts = dict(zip((item.feature for item, _ in union), _starts(union), strict=True))
    outputs = 1 if split.n_classes == 2 else split.n_classes
    total = np.zeros((outputs, sum(count for _, count in union)))
    bias = np.zeros(outputs)
    for part in found.best.parts:
        columns = reader.gather(part.choice)
        fitted = walk_strengths(columns, split, [part.strength], FINAL_TOL)[0]
        weight, intercept = probe.fold_back(fitted.fit, fitted.standard)
        place = [
            np.arange(starts[item.feature], starts[item.feature] + count)
            for item, count in reader.union([part.choice])
        ]
        total[:, np.concatenate(place)] += part.share * weight
        bias += part.share * intercept
    return Weights(total.astype(np.float32), bias)


def _starts(union: list[tuple[Ranked, int]]) -> list[int]:
    """The first column of each matrix's neurons."""
    return [0, *np.cumsum([count for _, count in union]).tolist()][:-1]


def fit_hidden(reader: Reader, inputs: Inputs, found: Found) -> tuple[Found, Weights]:
    """Hidden units on the neurons that were chosen; they are judged by val rows alone."""
    columns = reader.gather(*found.best.choices)
    layers, standard = fit_final_mlp(columns, inputs.split, inputs.config.seed, found.refit)
    best = replace(found.best, probs=layers.val_probs)
    val = inputs.codes[inputs.rows["val"]]
    evidence = Evidence(val, layers.val_probs, tuple(inputs.classes), "val")
    found = replace(found, best=best, evidence=evidence)
    return found, Weights(layers.weight, layers.bias, layers.folded(standard))


def build_head(
    reader: Reader, inputs: Inputs, found: Found, weights: Weights, notes: list[str]
) -> tuple[Head, Scaling]:
    """Calibrate, settle the thresholds, and fold the calibration into the last weights."""
    config, evidence = inputs.config, found.evidence
    scaling = fit_scaling(evidence, config.calibration, notes)
    evidence = replace(evidence, probs=scaling.apply(evidence.probs))
    threshold = choose_threshold(evidence, inputs.metric, config, notes)
    features = tuple(
        HeadFeature(f.layer, f.site, f.pooling, f.width, neurons)
        for f, neurons in (
            (item.feature, item.neurons[:count]) for item, count in reader.union(found.best.choices)
        )
    )
    manifest = inputs.activations
    head = Head(
        classes=tuple(inputs.classes),
        features=features,
        weight=(weights.weight * np.float32(scaling.slope)).astype(np.float32),
        bias=weights.bias * scaling.slope + scaling.shift,
        threshold=threshold,
        blocks=blocks_needed([f.layer for f in features]),
        storage_dtype=inputs.dtype,
        model=manifest["request"]["model"],
        reading=manifest["request"]["options"]["model"],
        hidden=weights.hidden,
        abstain_below=choose_abstention(evidence, threshold, config, notes),
    )
    return head, scaling
