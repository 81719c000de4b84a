"""What a head is measured against: the last layer, the best layer, and TF-IDF."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.activations import Feature
from spin_cli.choices import Site
from spin_cli.training import baselines
from spin_cli.training.calibration import MIN_ROWS, OUT_OF_FOLD
from spin_cli.training.inputs import Inputs
from spin_cli.training.label_decisions import choose_thresholds
from spin_cli.training.label_report import cross_fit
from spin_cli.training.search import Fitted, fit_columns, walk_strengths
from spin_cli.training.table import Reader
from spin_cli.workers import side_by_side

Probs = NDArray[np.float64]


@dataclass(frozen=True)
class Rival:
    """A classifier of the usual kind, on the same splits."""

    what: dict[str, Any]
    """What it is, for the report."""
    probs: dict[str, Probs]
    """By split: val, and test where there is one; with labels out-of-fold, where the head's own
    thresholds were tuned so."""


def find_rivals(
    reader: Reader, tester: Reader, inputs: Inputs, notes: list[str], crossed: bool = False
) -> dict[str, Rival]:
    """The last layer, the best single layer, and TF-IDF where the texts are still there."""
    last, best = last_layers(inputs), best_layers(reader)
    by_words: list[Rival | str] = []
    fitted: dict[Feature, Fitted] = {}

    def one(feature: Feature | None) -> None:
        if feature is None:
            by_words.append(words(inputs, crossed))
        else:
            fitted[feature] = fit_columns(reader.whole(feature), inputs.split)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # TF-IDF a little short of its optimum
        side_by_side(one, [None, *dict.fromkeys([*best, *last])], inputs.config.workers)
    found = {
        name: whole_layer(reader, tester, inputs, [(f, fitted[f]) for f in features], crossed)
        for name, features in (("last_layer", last), ("best_layer", best))
    }
    (tfidf,) = by_words
    if isinstance(tfidf, str):
        if tfidf == inputs.texts:  # said already, with all else that hangs on it
            return found
        notes.append(f"no TF-IDF baseline: {tfidf}")
        return found
    return found | {"tfidf": tfidf}


def words(inputs: Inputs, crossed: bool) -> Rival | str:
    """TF-IDF with logistic regression; or why it cannot be had."""
    rows, texts = inputs.search_rows, inputs.texts
    if isinstance(texts, str):
        return texts
    try:
        probs = baselines.tfidf(texts, inputs.codes, inputs.rows, len(inputs.classes))
        if crossed:

            def held_out(inside: NDArray[np.intp], outside: NDArray[np.intp]) -> Probs:
                part = {"train": rows[inside], "val": rows[outside], "test": rows[:0]}
                return baselines.tfidf(texts, inputs.codes, part, len(inputs.classes))["val"]

            probs[OUT_OF_FOLD] = cross_fit(inputs, held_out)
    except ValueError as error:  # no text has a word
        return str(error)
    return Rival({}, probs)


def last_layers(inputs: Inputs) -> list[Feature]:
    """The usual choice: the last layer's output, raw and after the final norm."""
    features = [f for f in inputs.features if f.site is Site.HIDDEN] or list(inputs.features)
    last = inputs.layers[-2:] if inputs.layers[-1].endswith("final") else inputs.layers[-1:]
    found = [f for f in features if f.layer in last]
    return found or [f for f in features if f.layer == features[-1].layer]


def best_layers(reader: Reader) -> list[Feature]:
    """The matrices of the three best probes."""
    ranked = sorted(reader.ranked.values(), key=lambda item: -item.val_score)
    return [item.feature for item in ranked[:3]]


def whole_layer(
    reader: Reader,
    tester: Reader,
    inputs: Inputs,
    fits: Sequence[tuple[Feature, Fitted]],
    crossed: bool,
) -> Rival:
    """Ridge logistic regression on all neurons of one matrix, the best of *fits* on val."""
    feature, fitted = max(fits, key=lambda pair: pair[1].rank)
    probs = {"val": fitted.val_probs}
    if len(inputs.rows["test"]):
        probs["test"] = fitted.probabilities(tester.whole(feature))
    if crossed:
        values, split = reader.whole(feature), inputs.split

        def held_out(inside: NDArray[np.intp], outside: NDArray[np.intp]) -> Probs:
            part = replace(split, train=inside, val=outside)
            return walk_strengths(values, part, [fitted.strength])[0].val_probs

        probs[OUT_OF_FOLD] = cross_fit(inputs, held_out)
    what = {
        "layer": feature.layer,
        "site": feature.site.value,
        "pooling": feature.pooling.value,
        "strength": fitted.strength,
    }
    return Rival(what, probs)


def plain(threshold: metrics.Threshold, inputs: Inputs) -> Any:
    """A threshold as plain values, those of labels with their names."""
    if not isinstance(threshold, np.ndarray):
        return threshold
    return dict(zip(inputs.classes, threshold.tolist(), strict=True))


def threshold_of(rival: Rival, inputs: Inputs) -> metrics.Threshold:
    """A rival's threshold is tuned where the head's is, so that neither has an advantage."""
    val = inputs.codes[inputs.rows["val"]]
    if val.ndim == 2:
        what = OUT_OF_FOLD if OUT_OF_FOLD in rival.probs else "val"
        rows = inputs.rows["val"] if what == "val" else inputs.search_rows
        known = inputs.codes[rows], rival.probs[what], inputs.classes
        return choose_thresholds(*known, inputs.metric, what, [])
    enough = len(val) >= MIN_ROWS
    return metrics.tuned_threshold(inputs.metric, val, rival.probs["val"]) if enough else None


def rival_scores(rival: Rival, inputs: Inputs, y: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
    """What ``metrics.json`` says of a rival: what it is, its threshold, and scores by split."""
    threshold = threshold_of(rival, inputs)
    scores = {
        name: metrics.evaluate(y[name], probs, inputs.classes, threshold)
        for name, probs in rival.probs.items()
        if name != OUT_OF_FOLD
    }
    return rival.what | {"threshold": plain(threshold, inputs)} | scores
