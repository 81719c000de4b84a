"""Are the selected neurons the ones that matter? Scores with some of them taken away or alone.

From stored activations, without the model. The two questions are those of DeYoung et al. (2020,
"ERASER", arXiv:1911.03429), asked of neurons instead of words: *sufficiency*, what the score loses
when only the selected neurons are kept, and *comprehensiveness*, what it loses when they are
removed. As many neurons of each matrix, drawn at random, tell what any neurons would do.

Two ways: *refit*, where a new ridge head is fitted to what is left, so that a loss means that the
others do not hold the information; and for a trained head *mean ablation*, where neurons are set
to their mean over train rows and nothing is fitted again: a loss means that the head used them.

Where answers depend on a threshold, it is the head's own, or of a new head the best on val rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import activations, artifacts, mask, metrics
from spin_cli.activations import Feature
from spin_cli.choices import Pooling, site_name
from spin_cli.config import AblateConfig, Progress, TrainConfig, quiet
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.head import METRICS, Head, load_head
from spin_cli.ranges import check_ranges
from spin_cli.training.inputs import Inputs, read_inputs
from spin_cli.training.neuron_sets import Columns, Groups, measure, report
from spin_cli.training.search import Split, fit_columns
from spin_cli.training.table import Choice, Ranked, read_masks
from spin_cli.training.tried import choices_of

MAX_CELLS = 60_000_000
"""Rows times neurons that are held: about half a GB with the standardised copy."""
EVAL_ROWS = 4_000


def ablate(
    source: Path, head: Path | None, config: AblateConfig, *, progress: Progress = quiet
) -> dict[str, Any]:
    """Score the neurons of the selection *source* and, if given, of a trained *head*.

    Returns
    -------
    dict
        ``what`` was looked at, ``metric``, ``scored_on`` (test, or val where there is none) and
        ``rows``; under ``refit`` and ``head`` (or None) the score of ``all`` neurons, of ``none``
        and a list of `Point` as ``points``, of the trained head whether it was ``fitted_to`` the
        rows; ``notes``.

    Raises
    ------
    ArtifactError
        An artifact is missing, damaged, or not made from the others.
    UsageError
        No matrix is left by the options, or a number among them is out of its range.
    DataError
        The metric says nothing of the val rows, or of those that are scored.
    """
    check_ranges(config)
    selection = artifacts.read_manifest(source, "selection")
    wanted = TrainConfig(metric=config.metric, max_layer=config.max_layer)
    inputs = read_inputs(source, selection, wanted)
    notes: list[str] = []
    chosen = _chosen(head)
    items = _matching(source, inputs, config, chosen)
    rows = _rows(inputs, config, sum(item.feature.width for item in items), notes)
    scored_on = "test" if len(rows["test"]) else "val"
    metrics.check_defined(inputs.metric, inputs.codes[rows[scored_on]], scored_on)
    if scored_on == "val":
        notes.append("no test rows: scored on val rows, by which the penalties are chosen too")
    fitted_to = scored_on == "val" and chosen.get("refit") is True
    if fitted_to:
        notes.append(
            "the trained head was fitted to these val rows too: its scores say what it uses on"
            " texts that it has learned, not how good it is on new ones (train --no-refit leaves"
            " val out)"
        )
    fits = len(config.etas) * (2 + 2 * config.draws) + 1
    step = _counter(progress, fits)
    what = {
        "layers": list(dict.fromkeys(item.feature.layer for item in items)),
        "sites": list(dict.fromkeys(item.feature.site.value for item in items)),
        "poolings": list(dict.fromkeys(item.feature.pooling.value for item in items)),
        "matrices": len(items),
        "neurons": sum(item.feature.width for item in items),
    }
    refit = _refit(inputs, items, rows, config, step)
    trained = None
    if head is not None:
        trained = _mean_ablation(head, source, inputs, rows, config) | {"fitted_to": fitted_to}
    return {
        "what": what, "metric": inputs.metric.value, "scored_on": scored_on,
        "rows": {name: len(index) for name, index in rows.items()}, "draws": config.draws,
        "refit": refit, "head": trained, "notes": notes,
    }  # fmt: skip


def _chosen(head: Path | None) -> Mapping[str, Any]:
    if head is None:
        return {}
    artifacts.read_manifest(head, "head")
    known = artifacts.read_json(head / METRICS)
    try:
        chosen = dict(known["chosen"])
        choices_of(chosen)
        return chosen
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{head / METRICS}: not what spin train writes") from error


def _matching(
    source: Path, inputs: Inputs, config: AblateConfig, chosen: Mapping[str, Any]
) -> list[Ranked]:
    """The matrices that are looked at, in the model's order of layers."""
    everything = Choice(
        site_name({feature.site for feature in inputs.features}), tuple(Pooling), 1.0,
        len(inputs.layers) - 1,
    )  # fmt: skip
    parts = [
        replace(
            part,
            site=config.site or part.site,
            poolings=config.poolings or part.poolings,
            depth=part.depth if config.max_layer is None else inputs.deepest,
        )
        for part in (choices_of(chosen) if chosen else [everything])
    ]
    found = [
        item
        for feature, item in read_masks(source, inputs.features).items()
        if any(part.reads(feature, inputs.layers.index(feature.layer)) for part in parts)
    ]
    if not any(len(item.neurons) for item in found):
        raise UsageError("no selected neuron is left by --site, --pooling and --max-layer")
    return found


def _rows(
    inputs: Inputs, config: AblateConfig, width: int, notes: list[str]
) -> dict[str, NDArray[np.intp]]:
    """Rows of each split, thinned evenly where there are too many for memory and time."""
    limits = {"train": config.rows, "val": EVAL_ROWS // 2, "test": EVAL_ROWS}
    counts = {name: min(len(rows), limits[name]) for name, rows in inputs.rows.items()}
    share = min(1.0, MAX_CELLS / max(1, width * sum(counts.values())))
    rng = np.random.default_rng(config.seed)
    found = {}
    for name, rows in inputs.rows.items():
        count = min(counts[name], max(100, int(counts[name] * share)))
        found[name] = np.sort(rng.permutation(rows)[:count]) if count < len(rows) else rows
        if count < len(rows):
            notes.append(f"{count:,} of {len(rows):,} {name} rows, to bound memory and time")
    return found


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("ablate", done, total)

    return step


def _read(inputs: Inputs, feature: Feature, rows: NDArray[np.intp]) -> NDArray[Any]:
    whole = activations.read_matrix(inputs.source, feature, len(inputs.codes), inputs.dtype)
    return whole[rows]


def _refit(
    inputs: Inputs,
    items: Sequence[Ranked],
    rows: Mapping[str, NDArray[np.intp]],
    config: AblateConfig,
    step: Callable[[], None],
) -> dict[str, Any]:
    """Fit a ridge head, its strength chosen on val rows, to each set of neurons."""
    n_train, n_val = len(rows["train"]), len(rows["val"])
    index = np.concatenate([rows["train"], rows["val"], rows["test"]])
    X = np.hstack([_read(inputs, item.feature, index) for item in items])
    starts = np.cumsum([0, *(item.feature.width for item in items)])
    pairs = list(zip(items, starts[:-1], strict=True))
    groups = Groups(
        ordered=tuple(item.neurons.astype(np.intp) + start for item, start in pairs),
        shares=tuple(item.cumulative for item in items),
        every=tuple(np.arange(item.feature.width) + start for item, start in pairs),
    )
    codes = inputs.codes[index]
    searched = codes[: n_train + n_val]
    split = Split(
        searched, np.arange(n_train), np.arange(n_train, len(searched)), len(inputs.classes),
        inputs.metric,
    )  # fmt: skip
    measured = codes[n_train + n_val :] if len(rows["test"]) else codes[n_train:]
    each = np.eye(len(inputs.classes))[searched] if searched.ndim == 1 else searched
    shares = each[:n_train].mean(0)

    def by(val: NDArray[np.float64], probs: NDArray[np.float64]) -> float:
        threshold = metrics.tuned_threshold(inputs.metric, searched[n_train:], val)
        return metrics.score_at(inputs.metric, measured, probs, threshold)

    none = by(np.tile(shares, (n_val, 1)), np.tile(shares, (len(measured), 1)))

    def score(columns: Columns) -> float:
        if not len(columns):
            return none
        values = X[:, np.sort(columns)]
        fitted = fit_columns(values[: len(searched)], split)
        if not len(rows["test"]):
            return by(fitted.val_probs, fitted.val_probs)
        return by(fitted.val_probs, fitted.probabilities(values[len(searched) :]))

    points = measure(groups, score, config, step)
    whole = points[0].kept + points[0].sufficiency
    return report(points, X.shape[1], whole, none)


def _mean_ablation(
    folder: Path,
    source: Path,
    inputs: Inputs,
    rows: Mapping[str, NDArray[np.intp]],
    config: AblateConfig,
) -> dict[str, Any]:
    """Set neurons of a trained head to their mean over train rows; nothing is fitted."""
    head = load_head(folder)
    path, _ = artifacts.read_parent(folder, artifacts.read_manifest(folder, "head"))
    if path != source.resolve():
        raise ArtifactError(
            f"{folder}: made from {path}, not from {source}", "Name its own run or selection."
        )
    by_key = {(f.layer, f.site, f.pooling): f for f in inputs.features}
    measured = rows["test"] if len(rows["test"]) else rows["val"]
    index = np.concatenate([rows["train"], measured])
    parts = []
    for feature in head.features:
        found = by_key.get((feature.layer, feature.site, feature.pooling))
        if found is None or found.width != feature.width:
            raise ArtifactError(f"{folder}: reads {feature.key}, which the activations lack")
        parts.append(_read(inputs, found, index)[:, feature.neurons])
    values = np.hstack(parts).astype(np.float32)
    n_train = len(rows["train"])
    mean = values[:n_train].mean(0, dtype=np.float64).astype(np.float32)
    groups = _head_groups(head, values[:n_train].std(0, dtype=np.float64))
    test, y = values[n_train:], inputs.codes[measured]

    def score(columns: Columns) -> float:
        ablated = np.tile(mean, (len(test), 1))
        ablated[:, columns] = test[:, columns]
        return metrics.score_at(inputs.metric, y, head.probabilities(ablated), head.limits)

    points = measure(groups, score, config, lambda: None)
    whole = points[0].kept + points[0].sufficiency
    return report(points, head.neurons, whole, score(np.zeros(0, np.intp)))


def _head_groups(head: Head, sd: NDArray[np.float64]) -> Groups:
    """A head's columns as one group, ordered by the squared weight on standardised neurons."""
    outer = (head.weight.astype(np.float64) ** 2).sum(0)
    if head.hidden is None:
        importance = outer * sd**2
    else:  # what a hidden unit counts for, handed down to the neurons
        importance = outer @ (head.hidden[0].astype(np.float64) * sd) ** 2
    order = mask.order(importance)
    return Groups((order,), (mask.cumulative(importance[order]),), (np.arange(len(importance)),))
