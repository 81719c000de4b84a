"""Stage 3: from masks to one head, everything about it chosen on validation data.

The order of things keeps the test split honest: the search sees a reader of train and val rows
alone; a second reader, of test rows, is made once the head and the baselines are settled.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, atomic, probe
from spin_cli.activations import Feature
from spin_cli.choices import HeadKind
from spin_cli.config import CV_FOLDS, Progress, TrainConfig, decisive, quiet
from spin_cli.head import CARD, METRICS, Head, HeadFeature, blocks_needed, save_head
from spin_cli.ranges import check_ranges
from spin_cli.samples import separator_of
from spin_cli.training.blend import mean_probs
from spin_cli.training.calibration import (
    OUT_OF_FOLD,
    Evidence,
    Scaling,
    choose_abstention,
    choose_threshold,
    fit_scaling,
)
from spin_cli.training.card import model_card
from spin_cli.training.contest import fold_count, parted_groups, search, stacks, without_folds
from spin_cli.training.folds import Folds
from spin_cli.training.inputs import (
    Inputs,
    leave_twins_out,
    make_reader,
    read_inputs,
    without_texts,
)
from spin_cli.training.mlp import fit_final_mlp
from spin_cli.training.oof import write_oof
from spin_cli.training.pick import Judged
from spin_cli.training.report import measure
from spin_cli.training.search import (
    walk_strengths,
)
from spin_cli.training.table import Choice, Reader
from spin_cli.training.tried import Found
from spin_cli.workers import worker_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Of a head, before calibration, on raw columns; see `Head`."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float64]
    hidden: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None


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
        The manifest; under ``metrics`` what ``metrics.json`` holds, under ``log`` the time taken,
        under ``reads_text`` whether the head can predict from texts.

    Raises
    ------
    ArtifactError
        *source* or the activations behind it are missing, damaged or changed, or *output* or the
        file for out-of-fold probabilities is in the way.
    UsageError
        No candidate is left by the options, options that contradict each other, or a number out of
        its range.
    DataError
        A target that too few rows stand behind, or that no threshold meets; a metric that says
        nothing of the val rows.
    """
    check_ranges(config)
    started = time.time()
    selection = artifacts.read_manifest(source, "selection")
    atomic.check_vacant(output, force=force)
    if config.oof is not None:
        atomic.check_free(config.oof, force=force)
    inputs = read_inputs(source, selection, config)
    for name in ("id", "architecture"):  # of the model card: better missed now than after a search
        inputs.activations["request"]["model"][name]
    notes = [*without_texts(inputs), *without_folds(inputs)]
    folds = fold_count(inputs)
    logger.info(
        "search: by %s on %s, %d side by side", inputs.metric.value,
        f"{folds} folds of train and val rows" if folds else "val rows",
        worker_count(config.workers),
    )  # fmt: skip
    if not folds:
        inputs, more = leave_twins_out(inputs)
        notes += more
    notes += parted_groups(inputs)
    reader = make_reader(source, inputs, inputs.search_rows)
    found = search(reader, inputs, progress)
    oof = out_of_fold(reader, inputs, found) if config.oof else None
    if config.head is HeadKind.MLP:
        found, weights = fit_hidden(reader, inputs, found)
    else:
        found, weights = fit_final(reader, inputs, found)
    head, scaling = build_head(reader, inputs, found, weights, notes)
    report = artifacts.to_plain(measure(source, inputs, found, head, scaling, notes))
    with atomic.building(output, force=force) as folder:
        save_head(folder, head)
        atomic.write_json(folder / METRICS, report)
        atomic.write_text(folder / CARD, model_card(head, report))
        content: dict[str, Any] = {
            "request": request_of(selection, config),
            "parent": artifacts.parent_entry(output, source, selection),
            "classes": inputs.classes,
            "data": [
                {name: entry.get(name) for name in ("split", "sha256")}
                for entry in inputs.activations["request"]["data"]
            ],
        }
        if head.multi_label:
            content["multi_label"] = True
        manifest = artifacts.write_manifest(folder, "head", content)
        log = {"seconds": round(time.time() - started, 2)}
        artifacts.write_log(folder, log)
    logger.info("train: %.1f s", log["seconds"])
    if oof is not None and config.oof is not None:
        linear = config.head is HeadKind.LOGISTIC  # the scaling of another head is of no use
        write_oof(config.oof, inputs, scaling.apply(oof) if linear else oof)
    return manifest | {"metrics": report, "log": log, "reads_text": head.reads_text}


def out_of_fold(reader: Reader, inputs: Inputs, found: Found) -> NDArray[np.float64]:
    """Out-of-fold probabilities of train and val rows by linear heads as the chosen one."""
    if found.evidence.what == OUT_OF_FOLD:
        return found.evidence.probs
    config = inputs.config
    folds = Folds(
        reader, inputs.split, CV_FOLDS, config.workers, config.seed, inputs.groups,
        selecting=inputs.selecting,
    )  # fmt: skip
    wanted: dict[Choice, list[float]] = {}
    for part in found.best.parts:
        if not part.whole:
            wanted.setdefault(part.choice, []).append(part.strength)
    judged = {item.main: item.probs for item in folds.judge(wanted)}
    probs = [
        stacks(reader, inputs, whole=True, depths=[part.choice.depth])[0].probs
        if part.whole
        else judged[replace(part, share=1.0)]
        for part in found.best.parts
    ]
    return mean_probs(probs, [part.share for part in found.best.parts], inputs.split.kind)


def request_of(parent: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What decides a head: the selection and the options, not what else is written."""
    options = decisive(TrainConfig, artifacts.to_plain(config))
    return {"parent": parent["fingerprint"], "options": options}


def fit_final(reader: Reader, inputs: Inputs, found: Found) -> tuple[Found, Weights]:
    """The chosen head, solved to `FINAL_TOL`, on raw columns."""
    split = inputs.split
    if found.refit:
        split = replace(split, train=np.arange(len(split.codes)))
    found = replace(found, best=_stack_again(reader, inputs, found))
    places = _places(found.best.columns(reader))
    total = np.zeros((split.outputs, sum(place.count for place in places.values())))
    bias = np.zeros(split.outputs)
    for part in found.best.parts:
        if (stack := found.best.linear) is not None and part.whole:
            columns = [(f, np.arange(f.width, dtype=np.int32)) for f in stack.features]
            weight, intercept = stack.weight, stack.bias
        else:
            fitted = walk_strengths(reader.gather(part.choice), split, [part.strength], FINAL_TOL)
            weight, intercept = probe.fold_back(fitted[0].fit, fitted[0].standard)
            columns = [(i.feature, i.neurons[:n]) for i, n in reader.union([part.choice])]
        at = np.concatenate([places[feature].of(neurons) for feature, neurons in columns])
        total[:, at] += part.share * weight
        bias += part.share * intercept
    return found, Weights(total.astype(np.float32), bias)


@dataclass(frozen=True)
class _Place:
    """Where a matrix's neurons are among a head's columns."""

    start: int
    neurons: NDArray[np.int32]

    @property
    def count(self) -> int:
        return len(self.neurons)

    def of(self, wanted: NDArray[Any]) -> NDArray[np.intp]:
        """The columns of neurons that are among them."""
        order = np.argsort(self.neurons)
        return self.start + order[np.searchsorted(self.neurons, wanted, sorter=order)]


def _places(columns: list[tuple[Feature, NDArray[np.int32]]]) -> dict[Feature, _Place]:
    starts = np.cumsum([0, *(len(neurons) for _, neurons in columns)]).tolist()
    return {f: _Place(start, neurons) for start, (f, neurons) in zip(starts, columns, strict=False)}


def _stack_again(reader: Reader, inputs: Inputs, found: Found) -> Judged:
    """The best head, its stack fitted to the rows that the head is fitted to."""
    best = found.best
    if best.linear is None or found.refit == (found.evidence.what == OUT_OF_FOLD):  # it was
        return best
    depths = [part.choice.depth for part in best.parts if part.whole]
    again = stacks(reader, inputs, whole=found.refit, depths=depths)[0]
    best = replace(best, linear=again.linear)  # a matrix may be constant on fewer rows alone
    return replace(best, neurons=best.size(reader))


def fit_hidden(reader: Reader, inputs: Inputs, found: Found) -> tuple[Found, Weights]:
    """Hidden units on the neurons that were chosen; they are judged by val rows alone."""
    columns = found.best.gather(reader)
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
    tuned = threshold if isinstance(threshold, np.ndarray) else None
    features = tuple(
        HeadFeature(f.layer, f.site, f.pooling, f.width, neurons)
        for f, neurons in found.best.columns(reader)
    )
    manifest = inputs.activations
    head = Head(
        classes=tuple(inputs.classes),
        features=features,
        weight=(weights.weight * np.float32(scaling.slope).reshape(-1, 1)).astype(np.float32),
        bias=weights.bias * scaling.slope + scaling.shift,
        threshold=None if isinstance(threshold, np.ndarray) else threshold,
        blocks=blocks_needed([f.layer for f in features]),
        storage_dtype=inputs.dtype,
        model=manifest["request"]["model"],
        reading=manifest["request"]["options"]["model"],
        hidden=weights.hidden,
        abstain_below=choose_abstention(evidence, threshold, config, notes),
        thresholds=tuned,
        label_separator=separator_of(manifest),
    )
    return head, scaling
