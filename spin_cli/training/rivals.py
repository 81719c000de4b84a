"""What a head is measured against: the last layer, the best layer, and TF-IDF.

They are chosen by the rows that the head was chosen by, out of fold by the folds of its masks or by
val, get their threshold there, and are fitted to the rows that the head is fitted to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.activations import Feature
from spin_cli.choices import Site
from spin_cli.training import baselines
from spin_cli.training.calibration import OUT_OF_FOLD
from spin_cli.training.contest import fold_count
from spin_cli.training.folds import fold_rows
from spin_cli.training.inputs import Inputs
from spin_cli.training.label_decisions import MIN_ROWS, choose_thresholds
from spin_cli.training.pick import score
from spin_cli.training.search import PATIENCE, STRENGTHS, fit_columns, strongest, walk_strengths
from spin_cli.training.table import Reader
from spin_cli.training.tried import Found
from spin_cli.workers import side_by_side

Probs = NDArray[np.float64]
Rows = NDArray[np.intp]
Held = Sequence[Rows]
"""The rows of each fold, as places among `Inputs.search_rows`; none: val rows are judged by."""
Judged = tuple[int, Probs]
"""The place of the strength chosen, and the probabilities of the rows that it was chosen by."""


@dataclass(frozen=True)
class Rival:
    """A classifier of the usual kind, on the same splits."""

    what: dict[str, Any]
    """What it is, for the report."""
    probs: dict[str, Probs]
    """Of val, by fits that had not seen them; of the out-of-fold rows, where the head was chosen by
    these; and of test, where there is one."""


def find_rivals(
    reader: Reader, tester: Reader, inputs: Inputs, found: Found, notes: list[str]
) -> dict[str, Rival]:
    """The last layer, the best single layer, and TF-IDF where the texts are still there.

    Parameters
    ----------
    found : the head, by whose rows they are chosen and fitted
    """
    last, best = last_layers(inputs), best_layers(reader)
    held: Held = []
    if found.evidence.what == OUT_OF_FOLD:
        folds, split = fold_count(inputs), inputs.split
        fold = fold_rows(split.codes, folds, inputs.config.seed, inputs.groups)
        held = [rows for k in range(folds) if len(rows := np.flatnonzero(fold == k))]
    by_words: list[Rival | str] = []
    judged: dict[Feature, Judged] = {}

    def one(feature: Feature | None) -> None:
        if feature is None:
            by_words.append(words(inputs, held, found.refit))
        else:
            judged[feature] = judge_layer(reader.whole(feature), inputs, held)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # TF-IDF a little short of its optimum
        side_by_side(one, [None, *dict.fromkeys([*best, *last])], inputs.config.workers)
    rivals = {
        name: whole_layer(reader, tester, inputs, found, {f: judged[f] for f in features})
        for name, features in (("last_layer", last), ("best_layer", best))
    }
    (tfidf,) = by_words
    if isinstance(tfidf, str):
        if tfidf == inputs.texts:  # said already, with all else that hangs on it
            return rivals
        notes.append(f"no TF-IDF baseline: {tfidf}")
        return rivals
    return rivals | {"tfidf": tfidf}


def cross_fit(held: Held, fit: Callable[[Rows, Rows], Sequence[Probs]]) -> list[Probs]:
    """Out-of-fold probabilities (N, n_classes) of train and val rows, for each strength.

    Parameters
    ----------
    fit : of the rows to fit to and those held out; the probabilities of the latter by falling
        strengths, of which the last may be left out
    """
    every = np.concatenate(held)
    back = np.argsort(every)
    fits = [fit(np.setdiff1d(every, rows), rows) for rows in held]
    return [np.concatenate(parts)[back] for parts in zip(*fits, strict=False)]


def by_rows(probs: Probs, inputs: Inputs, crossed: bool) -> dict[str, Probs]:
    """Probabilities of the rows that were chosen by; out-of-fold ones are train rows, then val."""
    return (
        {OUT_OF_FOLD: probs, "val": probs[len(inputs.rows["train"]) :]}
        if crossed
        else {"val": probs}
    )


def rows_to_fit(inputs: Inputs, refit: bool) -> Rows:
    """The train rows, or *refit* train and val, as places among `Inputs.search_rows`."""
    split = inputs.split
    return np.arange(len(split.codes)) if refit else split.train


def words(inputs: Inputs, held: Held, refit: bool) -> Rival | str:
    """TF-IDF with logistic regression; or why it cannot be had."""
    texts, codes, n_classes = inputs.texts, inputs.codes, len(inputs.classes)
    if isinstance(texts, str):
        return texts
    rows, split = inputs.search_rows, inputs.split

    def fit(inside: Rows, outside: Rows) -> Sequence[Probs]:
        return list(baselines.by_words(texts, codes, rows[inside], rows[outside], n_classes))

    try:
        tried = cross_fit(held, fit) if held else fit(split.train, split.val)
        y = split.codes if held else split.codes[split.val]
        at = int(np.argmin([metrics.log_loss(y, each) for each in tried]))
        probs = by_rows(tried[at], inputs, bool(held))
        if len(test := inputs.rows["test"]):
            fitted = rows[rows_to_fit(inputs, refit)]
            strength = baselines.STRENGTHS[at : at + 1]
            probs["test"] = baselines.by_words(texts, codes, fitted, test, n_classes, strength)[0]
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


def judge_layer(values: NDArray[Any], inputs: Inputs, held: Held) -> Judged:
    """Choose the strength of ridge logistic regression on all neurons of one matrix."""
    split = inputs.split
    if not held:
        fitted = fit_columns(values, split)
        return STRENGTHS.index(fitted.strength), fitted.val_probs

    def fit(inside: Rows, outside: Rows) -> Sequence[Probs]:
        part = replace(split, train=inside, val=outside)
        walked = walk_strengths(values, part, STRENGTHS, patience=PATIENCE)
        return [fitted.val_probs for fitted in walked]

    tried = cross_fit(held, fit)
    at = strongest([metrics.row_losses(split.codes, each) for each in tried])
    return at, tried[at]


def whole_layer(
    reader: Reader, tester: Reader, inputs: Inputs, found: Found, judged: dict[Feature, Judged]
) -> Rival:
    """The best of some matrices, each with all its neurons, fitted as the head is."""
    y = found.evidence.codes

    def rank(feature: Feature) -> tuple[float, float]:
        probs = judged[feature][1]
        return score(inputs.metric, y, probs), -metrics.log_loss(y, probs)

    feature = max(judged, key=rank)
    at, chosen = judged[feature]
    probs = by_rows(chosen, inputs, found.evidence.what == OUT_OF_FOLD)
    if len(inputs.rows["test"]):
        split = replace(inputs.split, train=rows_to_fit(inputs, found.refit))
        fitted = walk_strengths(reader.whole(feature), split, STRENGTHS[: at + 1])[-1]
        probs["test"] = fitted.probabilities(tester.whole(feature))
    what = {
        "layer": feature.layer,
        "site": feature.site.value,
        "pooling": feature.pooling.value,
        "strength": STRENGTHS[at],
    }
    return Rival(what, probs)


def plain(threshold: metrics.Threshold, inputs: Inputs) -> Any:
    """A threshold as plain values, those of labels with their names."""
    if not isinstance(threshold, np.ndarray):
        return threshold
    return dict(zip(inputs.classes, threshold.tolist(), strict=True))


def threshold_of(rival: Rival, inputs: Inputs) -> metrics.Threshold:
    """A rival's threshold is tuned where the head's is, so that neither has an advantage."""
    what = OUT_OF_FOLD if OUT_OF_FOLD in rival.probs else "val"
    y = inputs.codes[inputs.rows["val"] if what == "val" else inputs.search_rows]
    probs = rival.probs[what]
    if y.ndim == 2:
        return choose_thresholds(y, probs, inputs.classes, inputs.metric, what, [])
    return metrics.tuned_threshold(inputs.metric, y, probs) if len(y) >= MIN_ROWS else None


def rival_scores(
    rival: Rival, threshold: metrics.Threshold, inputs: Inputs, y: dict[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """What ``metrics.json`` says of a rival: what it is, its threshold, and scores by split."""
    scores = {
        name: metrics.evaluate(y[name], probs, inputs.classes, threshold)
        for name, probs in rival.probs.items()
    }
    return rival.what | {"threshold": plain(threshold, inputs)} | scores
