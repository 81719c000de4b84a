"""What ``metrics.json`` holds: the head, its rivals, and how sure the difference is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.head import Head
from spin_cli.operating import operating_points
from spin_cli.training.calibration import Scaling
from spin_cli.training.card import told_split
from spin_cli.training.inputs import Inputs, make_reader
from spin_cli.training.label_report import compare_labels, percentiles
from spin_cli.training.pick import score
from spin_cli.training.rivals import Probs, Rival, find_rivals, plain, rival_scores, threshold_of
from spin_cli.training.tried import Found, describe, list_candidates, list_frontier

RESAMPLES = 1000
LEVEL = 0.95
MIN_RESAMPLED = 10
"""Fewest rows whose resamples say something: those of one row are alike, as if it were sure."""


def measure(
    source: Path,
    inputs: Inputs,
    found: Found,
    head: Head,
    scaling: Scaling,
    notes: list[str],
) -> dict[str, Any]:
    """Score the head and its rivals on val and, once, on test, and compare them there."""
    reader = make_reader(source, inputs, inputs.search_rows)
    tester = make_reader(source, inputs, inputs.rows["test"])
    y = {name: inputs.codes[rows] for name, rows in inputs.rows.items() if len(rows)}
    spin = {found.evidence.what: scaling.apply(found.evidence.probs)}
    if "val" not in spin:  # out-of-fold rows are train rows, then val rows
        spin["val"] = spin[found.evidence.what][len(inputs.rows["train"]) :]
    if "test" in y:
        spin["test"] = head.probabilities(found.best.gather(tester))
    y[found.evidence.what] = found.evidence.codes
    rivals = find_rivals(reader, tester, inputs, found, notes)
    limits = {"spin": head.limits} | {name: threshold_of(r, inputs) for name, r in rivals.items()}
    scores = {
        name: metrics.evaluate(y[name], probs, inputs.classes, head.limits)
        for name, probs in spin.items()
    }
    if "test" not in y:
        notes.append(
            f"no test rows: scores are of {found.evidence.what} rows ({len(found.evidence.codes)}),"
            " on which choices were made too, and a little too good"
        )
    if {inputs.config.target_precision, inputs.config.target_recall} != {None}:
        notes.append(
            "SPIN's scores are at the threshold that reaches the target, the others' at those that"
            f" are best for {inputs.metric.value}"
        )
    report = {
        **({"multi_label": True} if head.multi_label else {}),
        "metric": inputs.metric.value,
        "head": inputs.config.head.value,
        "penalty": inputs.config.penalty.value,
        "chosen": describe(found.best, inputs, found.evidence.codes)
        | {"threshold": plain(head.limits, inputs)}
        | {"abstain_below": head.abstain_below, "refit": found.refit},
        "judged_on": {"what": found.evidence.what, "rows": len(found.evidence.codes)},
        **_layers_run(inputs, inputs.layers[found.best.depth]),
        "neurons_total": sum(
            f.width
            for f in inputs.features
            if any(f.pooling in choice.poolings for choice in found.best.choices)
        ),
        "rows": {name: len(index) for name, index in inputs.rows.items()},
        "spin": scores,
        "calibration": _calibration(found, spin, y, scaling, inputs),
        **{name: rival_scores(rival, limits[name], inputs, y) for name, rival in rivals.items()},
        "candidates": list_candidates(found, inputs),
        "frontier": list_frontier(found, inputs),
        "notes": notes,
    }
    if head.abstain_below is not None:
        report["answered"] = {name: head.answered(y[name], probs) for name, probs in spin.items()}
    judged = found.evidence.what
    if points := operating_points(y[judged], spin[judged], inputs.classes):
        report["operating_points"] = points
    if target := _target(report, head, inputs):
        report["target"] = target
    _compare(report, spin, rivals, y, inputs, limits, found.evidence.what)
    return report


def _layers_run(inputs: Inputs, deepest: str) -> dict[str, int]:
    """How many of the model's blocks a head needs; embeddings and the final norm are none."""
    order = list(inputs.activations["layers"])
    blocks = [not name.endswith(("_00", "final")) for name in order]
    return {"layers_run": sum(blocks[: order.index(deepest) + 1]), "layers_total": sum(blocks)}


def _calibration(
    found: Found,
    spin: dict[str, Probs],
    y: dict[str, NDArray[np.int64]],
    scaling: Scaling,
    inputs: Inputs,
) -> dict[str, Any]:
    before = metrics.calibration_error(found.evidence.codes, found.evidence.probs)
    entry: dict[str, Any] = {
        "kind": inputs.config.calibration.value,
        "temperature": np.asarray(1.0 / scaling.slope).tolist(),
        "shift": scaling.shift.tolist(),
        "ece_before": {found.evidence.what: before},
        "ece": {name: metrics.calibration_error(y[name], p) for name, p in spin.items()},
    }
    if "test" in spin:
        raw = scaling.undo(spin["test"])
        entry["ece_before"]["test"] = metrics.calibration_error(y["test"], raw)
    return entry


def _target(report: dict[str, Any], head: Head, inputs: Inputs) -> dict[str, Any] | None:
    """What came of a target precision or recall, on the rows it was chosen by and on test."""
    config = inputs.config
    wanted = {"precision": config.target_precision, "recall": config.target_recall}
    asked = {name: value for name, value in wanted.items() if value is not None}
    if not asked:
        return None
    label = config.positive_label or inputs.classes[1]
    threshold = head.limit(inputs.classes.index(label))
    return {
        "label": label,
        **asked,
        "threshold": 0.5 if threshold is None else threshold,
        "reached": {
            name: {key: report["spin"][name]["per_class"][label][key] for key in wanted}
            for name in (report["judged_on"]["what"], "test")
            if name in report["spin"]
        },
    }


def _compare(
    report: dict[str, Any],
    spin: dict[str, Probs],
    rivals: dict[str, Rival],
    y: dict[str, NDArray[np.int64]],
    inputs: Inputs,
    limits: dict[str, metrics.Threshold],
    chosen_by: str,
) -> None:
    """Add intervals to every test score, and the tests against the best rival.

    The best is that on the rows that all were chosen by.
    Without test rows intervals to the scores of these, and no tests: the head was chosen there. Of
    fewer than `MIN_RESAMPLED` rows neither.
    """
    split = told_split(report)
    true, n_classes = y[split], len(inputs.classes)
    if len(true) < MIN_RESAMPLED:
        return
    rows = metrics.resamples(len(true), RESAMPLES)
    probs = {"spin": spin[split]} | {name: rival.probs[split] for name, rival in rivals.items()}
    said = {name: metrics.decide(found, limits[name]) for name, found in probs.items()}
    known = {
        name: score(inputs.metric, y[chosen_by], r.probs[chosen_by]) for name, r in rivals.items()
    }
    best = max(known, key=known.__getitem__)
    if true.ndim == 2:
        compare_labels(report, split, true, said, best, rows, LEVEL)
        return
    drawn = {name: _resampled(true, codes, rows, n_classes) for name, codes in said.items()}
    for name, samples in drawn.items():
        report[name][split]["intervals"] = {
            metric: percentiles(values, LEVEL) for metric, values in samples.items()
        }
    if split != "test":
        return
    report["comparison"] = {
        "against": best,
        "level": LEVEL,
        "difference": {
            metric: {
                "value": report["spin"]["test"][metric] - report[best]["test"][metric],
                "interval": percentiles(drawn["spin"][metric] - drawn[best][metric], LEVEL),
            }
            for metric in ("accuracy", "macro_f1")
        },
        "mcnemar_p": metrics.mcnemar(said["spin"] == true, said[best] == true),
    }


def _resampled(
    y: NDArray[np.int64], said: NDArray[np.int64], rows: list[NDArray[np.intp]], n_classes: int
) -> dict[str, NDArray[np.float64]]:
    """Accuracy and macro-F1 on every resample, from the counts of each."""
    cells = y * n_classes + said
    size = n_classes**2
    scores = []
    for sample in rows:
        table = np.bincount(cells[sample], minlength=size).reshape(n_classes, n_classes)
        scores.append(metrics.scores_of(table))
    accuracy, macro_f1 = np.array(scores).T
    return {"accuracy": accuracy, "macro_f1": macro_f1}
