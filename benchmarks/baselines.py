"""The usual ways, by scikit-learn alone: last layer and TF-IDF, each with logistic regression."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.scoring import Clock, judge
from benchmarks.sets import read_splits
from spin_cli import activations, artifacts
from spin_cli.activations import Feature
from spin_cli.choices import Metric, Site, StorageDtype
from spin_cli.samples import Samples, read_samples

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C on standardised features."""
TFIDF_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
FEW_ROWS, FOLDS = 200, 5
"""With fewer val rows than so many, choices are made by cross-validation instead."""
SCORERS = {Metric.ACCURACY: "accuracy", Metric.MACRO_F1: "f1_macro"}


def choose(
    pipe: Pipeline,
    grid: dict[str, Any],
    X: Any,
    y: np.ndarray,
    n_train: int,
    metric: Metric,
) -> tuple[float, Pipeline]:
    """Val score and the best setting, not fitted; rows after the first *n_train* are val."""
    n_val = len(y) - n_train
    if n_val < FEW_ROWS:
        smallest = int(np.bincount(y).min())
        folds: Any = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=0)
    else:
        folds = PredefinedSplit(np.repeat([-1, 0], [n_train, n_val]))
    search = GridSearchCV(pipe, grid, cv=folds, scoring=SCORERS[metric], refit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weak penalties, which stop short of the optimum
        search.fit(X, y)
    return float(search.best_score_), clone(pipe).set_params(**search.best_params_)


def finish(
    pipe: Pipeline,
    X: Any,
    y: np.ndarray,
    n_train: int,
    test: tuple[Any, np.ndarray],
    metric: Metric,
) -> dict[str, Any]:
    """Threshold by val rows where one is wanted, then fit to train and val and judge on test."""
    val = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if metric is Metric.MACRO_F1:
            pipe.fit(X[:n_train], y[:n_train])
            val = y[n_train:], pipe.predict_proba(X[n_train:])
        pipe.fit(X, y)
    return judge(metric, test[1], pipe.predict_proba(test[0]), val)


def last_features(manifest: dict[str, Any]) -> list[Feature]:
    """The last layer's hidden states, raw and after the final norm where there is one."""
    hidden = [f for f in activations.features_of(manifest) if f.site is Site.HIDDEN]
    layers = list(dict.fromkeys(f.layer for f in hidden))
    last = layers[-2:] if layers[-1].endswith("final") else layers[-1:]
    return [f for f in hidden if f.layer in last]


def last_layer(source: Path, metric: Metric) -> dict[str, Any]:
    """The paper's *Base*: logistic regression on the last layer, its best pooling."""
    manifest = artifacts.read_manifest(source, "activations")
    samples = read_samples(source)
    clock, found = Clock(), []
    y, n_train, seen, test = arranged(samples, manifest["classes"])
    pipe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    for feature in last_features(manifest):
        X = read(source, manifest, feature)
        chosen = choose(
            pipe, {"logisticregression__C": STRENGTHS}, X[seen], y[seen], n_train, metric
        )
        found.append((*chosen, feature))
    _, best, feature = max(found, key=lambda item: item[0])
    X = read(source, manifest, feature)
    result = finish(best, X[seen], y[seen], n_train, (X[test], y[test]), metric)
    weights = best[-1].coef_.size + best[-1].intercept_.size
    return result | {
        "train_seconds": clock.seconds,
        "parameters": int(weights),
        "neurons": feature.width,
        "chosen": {"layer": feature.layer, "pooling": feature.pooling.value, "C": best[-1].C},
    }


def arranged(
    samples: Samples, classes: list[str]
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Codes of all rows, number of train rows, rows of train then val, rows of test."""
    y = np.array([classes.index(label) for label in samples.labels])
    train, val, test = (samples.rows(split) for split in ("train", "val", "test"))
    return y, len(train), np.concatenate([train, val]), test


def read(source: Path, manifest: dict[str, Any], feature: Feature) -> np.ndarray:
    dtype = StorageDtype(manifest["storage_dtype"])
    return activations.read_matrix(source, feature, manifest["counts"]["rows"], dtype).astype(
        np.float32
    )


def tfidf(data: Path, metric: Metric) -> tuple[dict[str, Any], Pipeline]:
    """Logistic regression on word 1- and 2-grams; also the fitted pipeline."""
    splits = read_splits(data)
    classes = sorted({label for _, label in splits["train"]})
    rows = splits["train"] + splits["val"]
    X = np.array([text for text, _ in rows], object)
    y = np.array([classes.index(label) for _, label in rows])
    test = np.array([text for text, _ in splits["test"]], object)
    y_test = np.array([classes.index(label) for _, label in splits["test"]])
    clock = Clock()
    pipe = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    grid = {
        "logisticregression__C": TFIDF_STRENGTHS,
        "logisticregression__class_weight": [None, "balanced"],
    }
    _, best = choose(pipe, grid, X, y, len(splits["train"]), metric)
    result = finish(best, X, y, len(splits["train"]), (test, y_test), metric)
    weights = best[-1].coef_.size + best[-1].intercept_.size
    settings = {"C": best[-1].C, "class_weight": best[-1].class_weight}
    return result | {
        "train_seconds": clock.seconds,
        "parameters": int(weights),
        "neurons": best[-1].coef_.shape[1],
        "chosen": settings,
    }, best
