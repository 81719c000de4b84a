"""What a head is compared with is chosen and fitted as the head is, against scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spin_cli import metrics
from spin_cli.choices import Metric, StorageDtype
from spin_cli.config import SelectConfig, TrainConfig
from spin_cli.training import rivals
from spin_cli.training.calibration import OUT_OF_FOLD
from spin_cli.training.folds import fold_rows
from spin_cli.training.inputs import Inputs
from spin_cli.training.label_decisions import choose_thresholds
from spin_cli.training.table import Ranked, Reader
from tests.test_training import layered_reader

TRAIN, KNOWN, ROWS = 150, 200, 300
FOLDS = 4


@pytest.fixture
def inputs(tmp_path):
    """Three layers of 300 rows, and texts of which only val rows have the words of one topic."""
    _, features, codes = layered_reader(tmp_path, 2, ROWS)
    rng = np.random.default_rng(0)
    words = np.array([["bad", "poor", "vile"], ["good", "fine", "kind"]])
    drawn = words[codes, rng.integers(3, size=ROWS)]
    texts = [f"{word} {rng.integers(10, 50)}" for word in drawn]
    for row in range(TRAIN, KNOWN):
        texts[row] += " zebra" * int(codes[row])
    texts[KNOWN:] = ["zebra"] * (ROWS - KNOWN)
    places = np.split(np.arange(ROWS), [TRAIN, KNOWN])
    made = Inputs(
        source=tmp_path, activations={"classes": ["no", "yes"]}, selection={},
        features=tuple(features), layers=("layer_01", "layer_02", "layer_03"), codes=codes,
        rows=dict(zip(("train", "val", "test"), places, strict=True)), dtype=StorageDtype.FLOAT32,
        metric=Metric.MACRO_F1, config=TrainConfig(cv=FOLDS), selecting=SelectConfig(),
        deepest=2,
    )  # fmt: skip
    vars(made).update(texts=texts, groups=None)
    return made


def compared(inputs, what, refit):
    """The rivals of a head that was chosen on some rows."""
    known = inputs.codes[inputs.search_rows if what == OUT_OF_FOLD else inputs.rows["val"]]
    found = SimpleNamespace(evidence=SimpleNamespace(what=what, codes=known), refit=refit)
    none = np.zeros(0, np.int32)
    ranked = {f: Ranked(f, none, np.zeros(0), 1.0, 0.5) for f in inputs.features}
    place = inputs.source, ranked, inputs.layers, ROWS
    reader, tester = (
        Reader(*place, rows, inputs.dtype) for rows in (inputs.search_rows, inputs.rows["test"])
    )
    return rivals.find_rivals(reader, tester, inputs, found, [])


def layer_model(rival, inputs, rows):
    strength = rival.what["strength"]
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * len(rows))))


def columns(rival, inputs):
    (feature,) = (f for f in inputs.features if f.layer == rival.what["layer"])
    place = inputs.source, {}, inputs.layers, ROWS
    return Reader(*place, np.arange(ROWS), inputs.dtype).whole(feature)


def out_of_fold(make, X, y):
    fold, probs = fold_rows(y, FOLDS, 0), np.empty((len(y), 2))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        probs[outside] = make(inside).fit(X[inside], y[inside]).predict_proba(X[outside])
    return probs


@pytest.mark.parametrize("refit", [True, False])
def test_of_a_head_chosen_out_of_fold_the_rivals_are_too(inputs, refit):
    found = compared(inputs, OUT_OF_FOLD, refit)
    y, fitted = inputs.codes[:KNOWN], np.arange(KNOWN if refit else TRAIN)
    for name in ("last_layer", "best_layer"):
        rival, X = found[name], columns(found[name], inputs)
        make = lambda rows, rival=rival: layer_model(rival, inputs, rows)  # noqa: E731
        expected = out_of_fold(make, X[:KNOWN], y)
        np.testing.assert_allclose(rival.probs[OUT_OF_FOLD], expected, atol=5e-3)
        model = make(fitted).fit(X[fitted], y[fitted])
        np.testing.assert_allclose(rival.probs["test"], model.predict_proba(X[KNOWN:]), atol=5e-3)
    probs = [found[name].probs[OUT_OF_FOLD] for name in ("best_layer", "last_layer")]
    assert metrics.accuracy(y, probs[0].argmax(1)) > metrics.accuracy(y, probs[1].argmax(1))
    texts = np.array(inputs.texts)

    def words(rows, C):
        return make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=C)
        )

    by_C = {
        C: out_of_fold(lambda rows, C=C: words(rows, C), texts[:KNOWN], y) for C in (1, 3, 10, 30)
    }
    best = min(by_C, key=lambda C: metrics.log_loss(y, by_C[C]))
    np.testing.assert_allclose(found["tfidf"].probs[OUT_OF_FOLD], by_C[best], atol=1e-3)
    model = words(fitted, best).fit(texts[fitted], y[fitted])
    np.testing.assert_allclose(
        found["tfidf"].probs["test"], model.predict_proba(texts[KNOWN:]), atol=1e-3
    )
    knows_zebras = found["tfidf"].probs["test"][:, 1].min() > y[:TRAIN].mean() + 0.1
    assert knows_zebras == refit
    for rival in found.values():
        np.testing.assert_array_equal(rival.probs["val"], rival.probs[OUT_OF_FOLD][TRAIN:])
        tuned = metrics.best_threshold(y, rival.probs[OUT_OF_FOLD])
        assert rivals.threshold_of(rival, inputs) == tuned  # 50 val rows alone would be too few


def test_of_a_head_chosen_by_val_rows_the_rivals_are_too(inputs):
    plain, again = compared(inputs, "val", False), compared(inputs, "val", True)
    y = inputs.codes
    for name, rival in plain.items():
        assert set(rival.probs) == {"val", "test"}
        assert rivals.threshold_of(rival, inputs) is None
        np.testing.assert_array_equal(rival.probs["val"], again[name].probs["val"])
        assert (rival.probs["test"] != again[name].probs["test"]).any()
        if name == "tfidf":
            continue
        X = columns(rival, inputs)
        for found, rows in ((rival, np.arange(TRAIN)), (again[name], np.arange(KNOWN))):
            model = layer_model(found, inputs, rows).fit(X[rows], y[rows])
            expected = model.predict_proba(X[KNOWN:])
            np.testing.assert_allclose(found.probs["test"], expected, atol=5e-3)


@pytest.mark.parametrize("what", ["val", OUT_OF_FOLD])
def test_thresholds_of_labels_come_from_where_the_heads_do(inputs, what):
    """Also with hidden units, whose evidence is val rows though their neurons were crossed."""
    labels = np.stack([inputs.codes, np.arange(ROWS) % 3 == 0], 1).astype(np.int64)
    several = replace(inputs, codes=labels)
    vars(several).update(texts="no texts", groups=None)
    for rival in compared(several, what, True).values():
        assert (OUT_OF_FOLD in rival.probs) == (what == OUT_OF_FOLD)
        known = labels[:KNOWN] if what == OUT_OF_FOLD else labels[TRAIN:KNOWN]
        assert rival.probs[what].shape == known.shape
        tuned = choose_thresholds(known, rival.probs[what], "ab", Metric.MACRO_F1, what, [])
        np.testing.assert_array_equal(rivals.threshold_of(rival, several), tuned)
