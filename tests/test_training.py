"""Choosing, calibrating and comparing heads, against plain loops, scikit-learn and the known."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as LinearRidge
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from spin_cli import activations, label_metrics, metrics, probe
from spin_cli.activations import Feature
from spin_cli.choices import (
    Calibration,
    ClassWeight,
    Control,
    HeadKind,
    Metric,
    Penalty,
    Pooling,
    Site,
    Solver,
    StorageDtype,
)
from spin_cli.config import SelectConfig, TrainConfig
from spin_cli.errors import DataError, UsageError
from spin_cli.training import baselines, calibration, contest, duplicates, mlp, search, stage
from spin_cli.training.blend import blends, mean_probs, with_stacks
from spin_cli.training.calibration import Evidence
from spin_cli.training.duplicates import near_duplicates
from spin_cli.training.folds import Folds, fold_rows
from spin_cli.training.inputs import deepest_layer, leave_twins_out
from spin_cli.training.nonnegative import fit_nonnegative
from spin_cli.training.pick import Judged, Linear, Part, best_of, frontier
from spin_cli.training.ridge import fit_ridge, targets
from spin_cli.training.stack import fit_stacks
from spin_cli.training.table import Choice, Ranked, Reader
from spin_cli.training.tried import Found

CHOICE = Choice("ffn", (Pooling.MEAN,), 0.5, 3)


def sure(y, strength, rng):
    """Probabilities of two classes from noisy logits."""
    z = strength * (2 * y - 1) + rng.normal(size=len(y))
    return metrics.probabilities(z[:, None], 2)


# -- the choice ------------------------------------------------------------------------------


def judged(probs, depth, neurons=10):
    return Judged((Part(replace(CHOICE, depth=depth), 0.1),), neurons, probs)


def test_ties_go_to_the_shallowest_then_the_smallest_head():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    probs = sure(y, 1.0, rng)
    noise = rng.normal(0, 1e-4, probs.shape)
    again = (probs + noise) / (probs + noise).sum(1, keepdims=True)
    best = judged(probs, 5)
    others = [judged(again, 3, 90), judged(again, 3, 20), judged(sure(y, 0.2, rng), 1)]
    for metric in Metric:
        chosen = best_of([best, *others], y, metric)
        assert (chosen.depth, chosen.neurons) == (3, 20)
    clearly = judged(sure(y, 2.0, rng), 6)
    assert best_of([best, *others, clearly], y, Metric.ACCURACY) is clearly


@pytest.mark.parametrize("metric", [Metric.ACCURACY, Metric.LOG_LOSS])
def test_where_every_head_is_right_the_surest_is_not_better(metric):
    """Its log loss is surely the lowest, but by less than anyone would miss."""
    y = np.arange(240) % 2
    p = np.where(y == 1, 1.0, 0.0)

    def certain(error, depth):
        found = np.abs(p - error)
        return judged(np.stack([1 - found, found], 1), depth)

    heads = [certain(1e-7, 6), certain(2e-6, 3), certain(5e-5, 1), certain(2e-3, 0)]
    assert best_of(heads, y, metric).depth == 1


def test_a_head_that_beats_a_tied_one_is_tied_too():
    y = np.zeros(400, np.int64)

    def with_wrong(rows, depth, neurons=10):
        probs = np.tile([0.9, 0.1], (400, 1))
        probs[rows] = [0.1, 0.9]
        return judged(probs, depth, neurons)

    best = with_wrong(np.arange(100), 6)
    twin = with_wrong(np.arange(103), 3)  # 3 rows worse, and that is sure: 1.7 standard errors
    other = with_wrong(np.arange(15, 119), 5)  # 4 rows worse, but 34 differ: 0.7 standard errors
    assert best_of([best, twin], y, Metric.ACCURACY) is best
    assert best_of([best, other], y, Metric.ACCURACY) is other
    assert best_of([best, twin, other], y, Metric.ACCURACY) is twin


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("labels", [False, True])
def test_a_metric_is_refused_where_it_would_be_no_number(metric, labels):
    rng = np.random.default_rng(0)
    refused = 0
    for rows in (1, 2, 3, 4) * 20:
        y = rng.integers(0, 2, (rows, 2)) if labels else rng.integers(0, 3, rows)
        probs = rng.dirichlet(np.ones(2 if labels else 3), rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mean of no areas
            known = not np.isnan(metrics.score_function(metric)(y, probs))
        if known:
            metrics.check_defined(metric, y, "val")
            continue
        refused += 1
        with pytest.raises(DataError, match=f"all {rows} val rows have the same"):
            metrics.check_defined(metric, y, "val")
    assert (refused > 5) == (metric is Metric.AUROC)


def test_the_frontier_keeps_what_nothing_beats():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    items = [
        judged(sure(y, rng.uniform(0.1, 2), rng), int(rng.integers(1, 6)), int(rng.integers(1, 9)))
        for _ in range(40)
    ]

    def cost(item):
        return item.depth, item.neurons, metrics.log_loss(y, item.probs)

    expected = [
        a
        for a in items
        if not any(
            all(q <= p for q, p in zip(cost(b), cost(a), strict=True)) for b in items if b is not a
        )
    ]
    assert sorted(map(cost, frontier(items, y))) == sorted(map(cost, expected))


# -- fits ------------------------------------------------------------------------------------


def make_split(codes, train, penalty=Penalty.L2, weight=ClassWeight.NONE):
    rows = np.arange(len(codes))
    n_classes = int(codes.max()) + 1
    return search.Split(
        codes, rows[:train], rows[train:], n_classes, Metric.ACCURACY, penalty, weight
    )


@pytest.mark.parametrize("n_classes", [2, 3])
def test_many_columns_give_the_same_head_as_the_direct_way(n_classes, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 900)) * rng.uniform(0.1, 3, 900)
    z = X[:, : 10 * n_classes].reshape(150, n_classes, 10).sum(2)
    split = make_split(z.argmax(1), 100)
    monkeypatch.setattr(search, "LOOSE", 1e-6)
    short = search.walk_strengths(X, split, (1.0, 0.03), 1e-6)
    monkeypatch.setattr(search, "WIDE", 10**9)
    direct = search.walk_strengths(X, split, (1.0, 0.03), 1e-6)
    for one, other in zip(short, direct, strict=True):
        np.testing.assert_allclose(one.val_probs, other.val_probs, atol=1e-3)


@pytest.mark.parametrize(("penalty", "share"), [("l2", 0.0), ("l1", 1.0), ("elasticnet", 0.5)])
@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_penalties_and_class_weights_are_those_of_scikit_learn(penalty, share, weight):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(300, 8))
    codes = (X[:, 0] + rng.normal(size=300) > 0.8).astype(np.int64)
    split = make_split(codes, 200, Penalty(penalty), ClassWeight(weight))
    fitted = search.walk_strengths(X, split, [0.1], 1e-7)[0]
    l1, l2 = 0.1 * share * 0.1 * 200, (1 - share) * 0.1 * 200
    model = LogisticRegression(
        C=1 / (l1 + l2),
        l1_ratio=l1 / (l1 + l2),
        solver="saga",
        tol=1e-9,
        max_iter=20_000,
        class_weight="balanced" if weight == "balanced" else None,
    )
    standard = probe.standardise(X[:200])
    model.fit(standard.X.astype(np.float64), codes[:200])
    np.testing.assert_allclose(fitted.fit.coef, model.coef_, atol=1e-4)


# -- cross-validation ------------------------------------------------------------------------


def write_matrix(folder, feature, block):
    activations.create_layer(folder / feature.file, [feature], len(block), StorageDtype.FLOAT32)
    with activations.RowWriter(folder, [feature]) as writer:
        writer.write(feature, 0, block)


def noise_reader(folder, rows=300, width=600):
    """Activations of pure noise, and a ranking made with all labels in view."""
    rng = np.random.default_rng(0)
    feature = Feature("layer_01", Site.FFN, Pooling.MEAN, width)
    X = rng.normal(size=(rows, width)).astype(np.float32)
    codes = rng.integers(0, 2, rows)
    write_matrix(folder, feature, X)
    fit = probe.fit(probe.standardise(X).X, codes, 2, l1=0.06 * rows)
    values = fit.coef[0] ** 2
    order = np.argsort(-values)[: np.count_nonzero(values)].astype(np.int32)
    shares = np.cumsum(values[order]) / values.sum()
    ranked = {feature: Ranked(feature, order, shares, 1 / (0.06 * rows), 0.5)}
    layers = ("layer_00", "layer_01")
    reader = Reader(folder, ranked, layers, rows, np.arange(rows), StorageDtype.FLOAT32)
    return reader, codes


def test_cross_validation_sees_nothing_in_noise(tmp_path):
    """Selected with a fold's rows in view, the same neurons look far better than chance."""
    reader, codes = noise_reader(tmp_path)
    split = make_split(codes, len(codes))
    choice = Choice("ffn", (Pooling.MEAN,), 1.0, 1)
    (honest,) = Folds(reader, split, 5, 1, 0, selecting=SelectConfig()).judge({choice: [0.1]})
    fold = fold_rows(codes, 5, 0)
    leaky = np.empty_like(honest.probs)
    for k in range(5):
        part = replace(split, train=np.flatnonzero(fold != k), val=np.flatnonzero(fold == k))
        leaky[part.val] = search.walk_strengths(reader.gather(choice), part, [0.1])[0].val_probs
    assert metrics.auroc(codes, leaky[:, 1]) > 0.75
    assert abs(metrics.auroc(codes, honest.probs[:, 1]) - 0.5) < 0.15


def fold_rankings(folder, **options):
    """What three folds rank of a matrix of which one column knows the classes; `select`'s too."""
    rng = np.random.default_rng(0)
    feature = Feature("layer_01", Site.FFN, Pooling.MEAN, 200)
    codes = rng.integers(0, 2, 240)
    X = rng.normal(size=(240, 200)).astype(np.float32)
    X[:, 17] += 4 * codes
    folder.mkdir()
    write_matrix(folder, feature, X)
    rows, config = np.arange(240), SelectConfig(**options)
    made = probe.rank_neurons(
        X, codes, rows[:200], rows[200:], 2, score=metrics.score_function(Metric.LOG_LOSS),
        config=config, key=feature.number,
    )  # fmt: skip
    ranked = {feature: Ranked(feature, made.neurons, made.cumulative, made.C, made.val_score)}
    reader = Reader(
        folder, ranked, ["layer_00", "layer_01"], 240, rows, StorageDtype.FLOAT32
    )  # fmt: skip
    folds = Folds(reader, make_split(codes, 200), 3, 1, 0, selecting=config)
    choice = Choice("ffn", (Pooling.MEAN,), 1.0, 1)
    (found,) = folds.judge({choice: [0.1]})
    auroc = metrics.auroc(codes, found.probs[:, 1])
    return made, [held[feature] for held in folds.ranked], auroc


def test_folds_rank_neurons_by_the_options_of_the_selection(tmp_path):
    made, all_of_them, auroc = fold_rankings(tmp_path / "all")
    assert auroc > 0.98 and len(made.neurons) > 3
    made, fewer, _ = fold_rankings(tmp_path / "few", top_k=3)
    assert len(made.neurons) == 3
    for cut, whole in zip(fewer, all_of_them, strict=True):
        assert cut.neurons.tolist() == whole.neurons[:3].tolist()
        np.testing.assert_array_equal(cut.cumulative, whole.cumulative[:3])
    made, drawn, auroc = fold_rankings(tmp_path / "random", control=Control.RANDOM, top_k=20)
    assert 17 not in made.neurons  # else the seed is no good
    assert all(item.neurons.tolist() == made.neurons.tolist() for item in drawn)
    assert 0.35 < auroc < 0.65
    other = fold_rankings(tmp_path / "seed", control=Control.RANDOM, top_k=20, seed=1)[1]
    assert all(set(item.neurons) != set(made.neurons) for item in other)


def test_folds_of_the_reference_recipe_are_what_it_finds_without_their_rows(tmp_path):
    made, found, _ = fold_rankings(tmp_path / "a", solver=Solver.REFERENCE)
    feature = Feature("layer_01", Site.FFN, Pooling.MEAN, 200)
    X = activations.read_matrix(tmp_path / "a", feature, 240, StorageDtype.FLOAT32)
    codes = np.random.default_rng(0).integers(0, 2, 240)
    fold = fold_rows(codes, 3, 0)
    for k, item in enumerate(found):
        train, val = (
            np.flatnonzero((fold != k) & here)
            for here in (np.arange(240) < 200, np.arange(240) >= 200)
        )
        scale = probe.standardise(X[train])
        C = made.C * 200 / len(train)
        model = LogisticRegression(
            C=C, l1_ratio=1, solver="saga", max_iter=4, warm_start=True, random_state=0
        )
        rounds = []
        for _ in range(16):
            with pytest.warns(ConvergenceWarning):
                model.fit(scale.X, codes[train])
            right = model.score(scale.transform(X[val]), codes[val])
            rounds.append((right, model.coef_[0].copy()))
        expected = max(rounds, key=lambda each: each[0])[1]
        order = np.argsort(-np.abs(expected), kind="stable")[: np.count_nonzero(expected)]
        np.testing.assert_array_equal(item.neurons, order)


def test_folds_deal_every_class_out_evenly():
    codes = np.random.default_rng(0).choice(3, 101, p=[0.8, 0.15, 0.05])
    fold = fold_rows(codes, 4, 0)
    for code in range(3):
        counts = np.bincount(fold[codes == code], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(fold)) <= 1
    np.testing.assert_array_equal(fold, fold_rows(codes, 4, 0))
    assert (fold != fold_rows(codes, 4, 1)).any()


def test_near_duplicates_are_what_a_search_of_all_pairs_finds():
    """Texts cut out of others, against a plain loop over all pairs."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts = [" ".join(rng.choice(words, rng.integers(6, 30))) for _ in range(60)]
    for _ in range(40):
        source = texts[rng.integers(60)].split()
        start = rng.integers(len(source) - 5)
        texts.append(" ".join(source[start : start + rng.integers(5, 12)]).upper() + "!")
    texts += ["so be it", "So be it.", "be it so", "", "?"]
    runs = []
    for text in texts:
        w = re.findall(r"\w+", text.lower())
        runs.append({tuple(w[i : i + 5]) for i in range(max(len(w) - 4, 0))} or {tuple(w)})
    groups = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        if len(runs[i] & runs[j]) >= 0.5 * min(len(runs[i]), len(runs[j])):
            groups = [groups[i] if g == groups[j] else g for g in groups]
    found = near_duplicates(texts)
    same = np.equal.outer(np.array(groups), np.array(groups))
    np.testing.assert_array_equal(np.equal.outer(found, found), same)
    assert len(set(groups)) < 70
    assert near_duplicates(["one text of six words here", "another"]).tolist() == [0, 1]


def test_a_phrase_that_stands_in_every_text_joins_none():
    rng = np.random.default_rng(0)
    texts = [f"dear all of you out there {' '.join(rng.choice(list('abcdefg'), 3))}"
             for _ in range(duplicates.BOILERPLATE + 1)]  # fmt: skip
    assert len(set(near_duplicates(texts))) > 40


def test_a_phrase_of_a_fifth_of_few_texts_joins_none():
    """A template of all texts makes no copies; two copies among them are found."""
    texts = [f"In my opinion the film that we saw on day {i} was fine" for i in range(40)]
    assert len(set(near_duplicates(texts))) == 40
    other = "Nobody who was there has ever asked for more"
    groups = near_duplicates([other, *texts, other.upper() + ", they say"])
    assert groups[0] == groups[-1] and len(set(groups)) == 41
    assert near_duplicates(["the same again"] * 2).tolist() == [0, 0]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_fold_can_be_judged_by_a_head_that_knows_every_class(seed, labels):
    """Whatever is alike: no fold is empty, none is most of the rows, none has all of a class."""
    rng = np.random.default_rng(seed)
    rows, folds = int(rng.integers(12, 60)), int(rng.integers(2, 6))
    if labels:
        codes = np.eye(3, dtype=np.int64)[rng.integers(0, 3, rows)]
    else:
        codes = rng.choice(3, rows, p=[0.7, 0.2, 0.1])
    groups = rng.integers(0, rng.integers(1, 8), rows)
    groups = np.where(rng.random(rows) < 0.5, groups, codes.argmax(1) if labels else codes)
    fold = fold_rows(codes, folds, seed, groups)
    assert set(fold) == set(range(folds))
    assert np.bincount(fold).max() <= 2 * rows / folds + 1
    of = codes.T == 1 if labels else [codes == code for code in range(3)]
    for there in of:
        if there.sum() >= 2:
            assert len(set(fold[there])) >= 2


def test_val_rows_that_are_much_like_train_rows_are_told_and_left_out(monkeypatch):
    @dataclass(frozen=True)
    class Known:
        groups: Any
        codes: Any = field(default_factory=lambda: np.arange(100) % 2)
        rows: Any = field(
            default_factory=lambda: {"train": np.arange(60), "val": np.arange(60, 100)}
        )

    groups = np.arange(100)
    groups[60:63] = [7, 7, 8]
    known = Known(groups)
    same, (note,) = leave_twins_out(known)
    assert same is known  # 37 others are too few to choose by
    assert note.startswith("8% of the val rows") and "too high" in note
    monkeypatch.setattr("spin_cli.training.inputs.CV_VAL_ROWS", 37)
    fewer, (note,) = leave_twins_out(known)
    assert fewer.rows["val"].tolist() == list(range(63, 100))
    assert fewer.rows["train"].tolist() == list(range(60))
    assert "left out" in note and "other 37" in note
    alike = replace(known, codes=np.r_[np.arange(63) % 2, np.ones(37, int)])
    assert leave_twins_out(alike)[0] is alike  # no choice can be made by one class
    groups[60:62] = 60, 61
    assert leave_twins_out(Known(groups))[1] == leave_twins_out(Known(None))[1] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_stay_within_a_fold_and_classes_stay_even(seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(400), rng.choice([1, 1, 1, 2, 5, 12], 400))
    codes = rng.choice(3, len(groups), p=[0.6, 0.3, 0.1])
    fold = fold_rows(codes, 4, seed, groups)
    assert all(len(set(fold[groups == g])) == 1 for g in range(400))
    for code in range(3):
        counts = np.bincount(fold[codes == code], minlength=4)
        assert counts.max() - counts.min() <= 0.1 * counts.mean() + 1


def test_no_more_is_read_and_kept_than_heads_may_have(tmp_path, monkeypatch):
    reader, codes = noise_reader(tmp_path)
    split, config = make_split(codes, 240), TrainConfig(workers=1)
    small, large = (Choice("ffn", (Pooling.MEAN,), eta, 1) for eta in (0.3, 1.0))
    read, steps = [], []
    whole = reader.whole
    monkeypatch.setattr(reader, "whole", lambda f: read.append(f) or whole(f))
    none = replace(config, max_neurons=1)
    assert search.try_all([small, large], reader, split, none, lambda: steps.append(1)) == []
    assert read == [] and len(steps) == 2
    few = replace(config, max_cells=len(split.train) * reader.count(small))
    (found,) = search.try_all([small, large], reader, split, few, lambda: None)
    assert found.main.choice == small
    (kept,) = reader._kept.values()
    assert kept.shape == (len(codes), reader.count(small)) and kept.base is None
    # What is asked for later is had all the same, and in the same order.
    (item,) = reader.ranked.values()
    np.testing.assert_array_equal(reader.gather(large), whole(item.feature)[:, item.neurons])
    np.testing.assert_array_equal(reader.gather(small), reader.gather(large)[:, : found.neurons])
    assert len(read) == 2


# -- calibration and thresholds --------------------------------------------------------------


def evidence(n=3000, overconfidence=3.0, shift=0.0, positives=0.5):
    """Rows whose log odds are known, and a classifier that exaggerates them."""
    rng = np.random.default_rng(0)
    z = rng.normal(np.log(positives / (1 - positives)), 1.5, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.int64)
    return Evidence(y, metrics.probabilities((overconfidence * z + shift)[:, None], 2), ("a", "b"),
                    "val")  # fmt: skip


def test_the_temperature_undoes_overconfidence():
    given, notes = evidence(), []
    scaling = calibration.fit_scaling(given, Calibration.TEMPERATURE, notes)
    assert 1 / scaling.slope == pytest.approx(3.0, rel=0.1) and not notes
    better = scaling.apply(given.probs)
    before, after = (metrics.calibration_error(given.codes, p) for p in (given.probs, better))
    assert after < 0.03 < 0.08 < before
    np.testing.assert_allclose(scaling.undo(better), given.probs, atol=1e-9)
    np.testing.assert_array_equal(better.argmax(1), given.probs.argmax(1))


def test_per_class_calibration_undoes_a_shift_too():
    given = evidence(shift=2.0)
    scaling = calibration.fit_scaling(given, Calibration.PER_CLASS, [])
    assert scaling.shift[0] == pytest.approx(-2 / 3, abs=0.15)
    assert metrics.calibration_error(given.codes, scaling.apply(given.probs)) < 0.03


def test_too_few_rows_calibrate_nothing_and_say_so():
    notes = []
    given = evidence(calibration.MIN_ROWS - 1)
    scaling = calibration.fit_scaling(given, Calibration.TEMPERATURE, notes)
    assert scaling.slope == 1.0 and "99 val rows" in notes[0]
    assert calibration.choose_threshold(given, Metric.MACRO_F1, TrainConfig(), notes) is None
    assert "threshold left at 0.5" in notes[1]


def test_calibration_error_is_that_of_a_loop_over_bins():
    given = evidence()
    sure_of, right = given.probs.max(1), given.probs.argmax(1) == given.codes
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (sure_of >= low) & (sure_of < low + 1 / 15 + (low > 0.93))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - sure_of[inside].mean())
    assert metrics.calibration_error(given.codes, given.probs) == pytest.approx(total)


@pytest.mark.parametrize("n", [7, 40, 400])
@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_a_search_of_all(n, seed):
    """Against scikit-learn's scores and a plain loop over every threshold and its neighbours."""
    rng = np.random.default_rng(seed)
    y = np.r_[0, 1, (rng.random(n) < 0.2).astype(int)]
    p = np.clip(0.3 * y + 0.4 * rng.random(n + 2), 0, 1).round(3)
    scores = [f1_score(y, p >= k / 100, average="macro", zero_division=0) for k in range(1, 100)]
    smooth = [np.mean([scores[min(max(i + j, 0), 98)] for j in range(-3, 4)]) for i in range(99)]
    found = metrics.best_threshold(y, np.stack([1 - p, p], 1))
    at = round(100 * found) - 1
    assert smooth[at] == pytest.approx(max(smooth), abs=1e-9)
    best = [i for i in range(99) if smooth[i] > max(smooth) - 1e-9]
    room = {i: next(d for d in range(99) if {i - d - 1, i + d + 1} - set(best)) for i in best}
    assert room[at] >= max(room.values()) - 1  # in the middle of a stretch of equals


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.99), (0.02, 0.9), (0.3, 0.4)])
def test_the_threshold_of_classes_apart_lies_between_them(low, high):
    y = np.arange(200) % 2
    p = np.where(y == 1, high, low)
    found = metrics.best_threshold(y, np.stack([1 - p, p], 1))
    assert abs(found - (low + high) / 2) < 0.04
    (of_label,) = label_metrics.best_thresholds(y[:, None], p[:, None])
    assert of_label == pytest.approx(found, abs=0.02)
    given = Evidence(y, np.stack([1 - p, p], 1), ("a", "b"), "val")
    for config in (TrainConfig(target_precision=0.9), TrainConfig(target_recall=0.9)):
        target = calibration.choose_threshold(given, Metric.ACCURACY, config, [])
        assert target == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("positive", ["a", "b"])
def test_targets_are_met_at_the_least_cost(positive):
    given = evidence(positives=0.3)
    code = given.classes.index(positive)
    true = given.codes == code
    scores = given.probs[:, code]
    for option, wanted in (("target_precision", 0.9), ("target_recall", 0.8)):
        config = TrainConfig(positive_label=positive, **{option: wanted})
        threshold = calibration.choose_threshold(given, Metric.ACCURACY, config, [])
        said = metrics.decide(given.probs, threshold) == code
        precision, recall = (said & true).sum() / said.sum(), (said & true).sum() / true.sum()
        # By brute force over every threshold there is.
        best = 0.0
        for t in np.unique(scores):
            hits, all_said = (true & (scores >= t)).sum(), (scores >= t).sum()
            if option == "target_precision" and hits / all_said >= wanted and all_said >= 30:
                best = max(best, hits / true.sum())
            if option == "target_recall" and hits / true.sum() >= wanted:
                best = max(best, t)
        if option == "target_precision":
            assert precision >= wanted and recall == pytest.approx(best)
        else:
            assert recall >= wanted and scores[said].min() == pytest.approx(best)


def test_targets_that_cannot_be_met_or_understood():
    few = evidence(150, positives=0.1)
    blind = replace(evidence(), codes=np.random.default_rng(1).integers(0, 2, 3000))
    with pytest.raises(DataError, match="the highest"):
        config = TrainConfig(target_precision=0.99)
        calibration.choose_threshold(blind, Metric.ACCURACY, config, [])
    for config, kind, word in (
        (TrainConfig(target_precision=0.5, target_recall=0.5), UsageError, "one of them"),
        (TrainConfig(positive_label="c"), UsageError, "a, b"),
    ):
        with pytest.raises(kind, match=word):
            calibration.choose_threshold(evidence(), Metric.ACCURACY, config, [])
    with pytest.raises(DataError, match="takes 50"):
        calibration.choose_threshold(few, Metric.ACCURACY, TrainConfig(target_recall=0.9), [])


def test_abstaining_reaches_the_target_accuracy_on_as_many_rows_as_can_be():
    given = evidence()
    notes: list[str] = []
    bound = calibration.choose_abstention(given, None, TrainConfig(target_accuracy=0.9), notes)
    sure_of, right = given.probs.max(1), given.probs.argmax(1) == given.codes
    answered = sure_of >= bound
    assert right[answered].mean() >= 0.9 and f"{answered.mean():.1%}" in notes[0]
    more = max((sure_of >= t).sum() for t in sure_of if right[sure_of >= t].mean() >= 0.9)
    assert answered.sum() == more
    kept = TrainConfig(abstain_below=0.7)
    assert calibration.choose_abstention(given, None, kept, []) == 0.7


# -- rivals ----------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_test_on_the_rows_that_differ():
    rng = np.random.default_rng(0)
    one, other = rng.random(200) < 0.8, rng.random(200) < 0.7
    expected = binomtest(int((one & ~other).sum()), int((one != other).sum())).pvalue
    assert metrics.mcnemar(one, other) == pytest.approx(expected)
    assert metrics.mcnemar(one, one) == 1.0


def test_tfidf_learns_words_and_knows_only_the_vocabulary_of_train():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 300)
    words = ["apple", "bread", "cheese"]
    texts = [f"{words[c]} and {words[rng.integers(3)]} {words[c]}" for c in codes]
    train, other = np.arange(200), np.arange(200, 300)
    probs = baselines.by_words(texts, codes, train, other, 3)
    assert probs.shape == (len(baselines.STRENGTHS), 100, 3)
    assert ((probs.argmax(2) == codes[other]).mean(1) > 0.95).all()
    unknown = [*texts[:200], *["zebra"] * 100]
    blank = baselines.by_words(unknown, codes, train, other, 3)
    assert np.ptp(blank, axis=1).max() == 0


# -- hidden units ----------------------------------------------------------------------------


def test_hidden_units_learn_what_no_linear_head_can_and_fold_to_raw_columns():
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(900, 4)) * [1, 5, 0.1, 1] + [3, -20, 0, 0]).astype(np.float32)
    codes = ((X[:, 0] > 3) ^ (X[:, 1] > -20)).astype(np.int64)
    split = make_split(codes, 700)
    layers, standard = mlp.fit_mlp(X, split, seed=0)
    assert metrics.accuracy(codes[700:], layers.val_probs.argmax(1)) > 0.9
    assert search.fit_columns(X, split).score < 0.7
    A, a = layers.folded(standard)
    units = np.maximum(X[700:].astype(float) @ A.T.astype(float) + a, 0.0)
    probs = metrics.probabilities(units @ layers.weight.T + layers.bias, 2)
    np.testing.assert_allclose(probs, layers.val_probs, atol=1e-4)
    again, _ = mlp.fit_mlp(X, split, seed=0)
    np.testing.assert_array_equal(again.hidden, layers.hidden)
    other, _ = mlp.fit_mlp(X, split, seed=1)
    assert (other.hidden != layers.hidden).any()


# -- blends ----------------------------------------------------------------------------------


def test_a_blend_is_the_mean_of_logits_and_better_than_its_parts():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 2000)
    items = [judged(sure(y, 0.8, rng), depth) for depth in (2, 3, 5)]
    useless = judged(sure(1 - y, 0.8, rng), 4)
    found = blends([*items, useless], y, lambda *choices: 10 * len(choices))
    assert [item.depth for item in found] == [3, 5]
    best = found[-1]
    assert {part.choice.depth for part in best.parts} == {2, 3, 5}
    logits = sum(
        part.share * np.log(item.probs[:, 1] / item.probs[:, 0])
        for part in best.parts
        for item in items
        if item.main.choice == part.choice
    )
    np.testing.assert_allclose(best.probs[:, 1], 1 / (1 + np.exp(-logits)), atol=1e-9)
    assert sum(part.share for part in best.parts) == pytest.approx(1.0)
    assert metrics.log_loss(y, best.probs) < min(metrics.log_loss(y, i.probs) for i in items)
    assert best_of([*items, *found], y, Metric.ACCURACY) is best


def test_a_blend_becomes_one_linear_head_on_the_union_of_neurons(tmp_path):
    reader, codes = noise_reader(tmp_path)
    split = make_split(codes, 240)
    inputs = SimpleNamespace(split=split)
    small, large = (Choice("ffn", (Pooling.MEAN,), eta, 1) for eta in (0.3, 1.0))
    parts = (Part(small, 0.1, 0.75), Part(large, 0.3, 0.25))
    count = reader.count(small, large)
    assert count == reader.count(large) > reader.count(small)
    found = Found(Judged(parts, count, np.empty(0)), [], [], None, False)
    _, weights = stage.fit_final(reader, inputs, found)
    z = reader.gather(small, large).astype(np.float64) @ weights.weight.T + weights.bias
    expected = 0.0
    for part in parts:
        (one,) = search.walk_strengths(reader.gather(part.choice), split, [part.strength], 1e-6)
        X = one.standard.transform(reader.gather(part.choice))
        expected = expected + part.share * one.fit.logits(X)
    np.testing.assert_allclose(z, expected, atol=1e-3)


def test_a_stack_and_masks_become_one_linear_head(tmp_path):
    """Also where a matrix is too wide for the stack; the ranks are not the order of neurons."""
    reader, codes = noise_reader(tmp_path)
    split = make_split(codes, 240)
    inputs = SimpleNamespace(split=split)
    choice = Choice("ffn", (Pooling.MEAN,), 0.6, 1)
    (masked,) = (item for item, _ in reader.union([choice]))
    count, rng = reader.count(choice), np.random.default_rng(0)
    assert (np.diff(masked.neurons[:count]) < 0).any()
    for whole in (True, False):
        other = masked.feature if whole else replace(masked.feature, layer="layer_07")
        if not whole:
            write_matrix(tmp_path, other, rng.normal(size=(300, other.width)).astype(np.float32))
        linear = Linear(
            (other,), rng.normal(size=(1, other.width)).astype(np.float32), np.array([0.3])
        )
        of_stack = Part(replace(choice, eta=1.0), 0.01, whole=True)
        stacked = Judged((of_stack,), other.width, sure(codes, 0.7, rng), linear)
        alone = Judged((Part(choice, 0.1),), count, sure(codes, 0.7, rng))
        (mixed,) = with_stacks([alone], [stacked], codes, lambda item: item.size(reader))
        assert mixed.neurons == other.width + (0 if whole else count)
        np.testing.assert_allclose(
            mixed.probs, mean_probs([stacked.probs, alone.probs], [0.5, 0.5]), atol=1e-12
        )
        evidence = SimpleNamespace(what="out-of-fold")
        _, weights = stage.fit_final(reader, inputs, Found(mixed, [], [], evidence, True))
        z = mixed.gather(reader).astype(np.float64) @ weights.weight.T + weights.bias
        everything = replace(split, train=np.arange(len(codes)))
        (one,) = search.walk_strengths(reader.gather(choice), everything, [0.1], 1e-6)
        expected = one.fit.logits(one.standard.transform(reader.gather(choice)))
        expected += reader.whole(other).astype(np.float64) @ linear.weight.T + linear.bias
        np.testing.assert_allclose(z, expected / 2, atol=1e-3)


def test_a_stack_is_joined_by_heads_that_are_no_deeper():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 500)
    items = [judged(sure(y, share, rng), depth) for depth, share in ((2, 0.7), (3, 0.6), (5, 0.9))]
    stacked = [judged(sure(y, 0.8, rng), depth) for depth in (1, 3, 6)]
    found = with_stacks(items, stacked, y, lambda item: len(item.parts))
    assert [item.depth for item in found] == [3, 6]
    assert [item.parts[1].choice.depth for item in found] == [2, 5]
    assert all(part.share == 0.5 for item in found for part in item.parts)


# -- stacks ----------------------------------------------------------------------------------


def test_ridge_leaves_the_last_bits_of_a_neuron_that_is_off_alone():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 8)).astype(np.float32)
    y = (X[:, 0] + X[:, 1] + rng.normal(size=120) > 0).astype(np.int64)
    X[:, 7] = 1e-7 * (2 * y - 1 + rng.normal(size=120))  # tells the class, by rounding alone
    fit = fit_ridge(X, targets(y, 2), np.ones(120), np.arange(120) % 5)
    moved = X.copy()
    moved[:, 7] += 3e-7
    assert np.abs((moved - X) @ fit.weight.T).max() < 1e-4
    others = fit_ridge(X[:, :7], targets(y, 2), np.ones(120), np.arange(120) % 5)
    np.testing.assert_allclose(fit.weight[:, :7], others.weight, atol=1e-5)


@pytest.mark.parametrize("columns", [30, 300])  # fewer than rows, and more
@pytest.mark.parametrize("n_classes", [2, 3])
def test_ridge_is_that_of_scikit_learn_in_every_fold(n_classes, columns):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, columns)) * rng.uniform(0.1, 9, columns)
    X += rng.normal(size=columns)
    X = np.hstack([X, np.ones((200, 1))]).astype(np.float32)  # the last column is constant
    codes = (X[:, :n_classes] / X[:, :n_classes].std(0)).argmax(1)
    weight, fold = rng.uniform(0.5, 2, 200), fold_rows(codes, 4, 0)
    Y = targets(codes, n_classes)
    found = fit_ridge(X, Y, weight, fold)
    standard = StandardScaler().fit_transform(X.astype(np.float64))

    def model(rows):
        ridge = LinearRidge(alpha=found.penalty * weight[rows].sum(), tol=1e-10)
        return ridge.fit(standard[rows], Y[rows], sample_weight=weight[rows])

    for k in range(4):
        expected = model(fold != k).predict(standard[fold == k]).reshape(-1, Y.shape[1])
        np.testing.assert_allclose(found.out_of_fold[fold == k], expected, atol=1e-4)
    whole = model(np.full(200, True)).predict(standard).reshape(-1, Y.shape[1])
    np.testing.assert_allclose(X @ found.weight.T + found.bias, whole, atol=1e-4)
    assert (found.weight[:, -1] == 0).all()


def layered_reader(folder, n_classes, rows=900, width=40):
    """Two layers of which each holds a part of the label's evidence, and one of noise."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, n_classes, rows)
    names = ["layer_01", "layer_02", "layer_03"]
    features = [Feature(name, Site.HIDDEN, Pooling.MEAN, width) for name in names]
    directions = rng.normal(size=(2, n_classes, width)) * 0.25
    for at, feature in enumerate(features):
        X = rng.normal(size=(rows, width))
        X += directions[at][codes] if at < 2 else 0.0
        write_matrix(folder, feature, (X * 3 + 1).astype(np.float32))
    reader = Reader(folder, {}, ["layer_00", *names], rows, np.arange(rows), StorageDtype.FLOAT32)
    return reader, features, codes


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_stack_joins_layers_and_is_the_linear_head_that_was_judged(tmp_path, n_classes):
    reader, features, codes = layered_reader(tmp_path, n_classes)
    split = make_split(codes, 600)
    shallow, middle, deep = fit_stacks(
        reader, features, split, None, judge=split.val, depths=[1, 2, 3], seed=0, workers=1
    )
    assert [item.depth for item in (shallow, middle, deep)] == [1, 2, 3]
    assert [item.neurons for item in (shallow, middle, deep)] == [40, 80, 120]
    y = codes[split.val]
    losses = [metrics.log_loss(y, item.probs) for item in (shallow, middle, deep)]
    assert losses[1] < losses[0] - 0.03 and losses[2] < losses[0] - 0.03
    for item in (shallow, middle, deep):
        values = item.gather(reader)[split.val].astype(np.float64)
        z = values @ item.linear.weight.T + item.linear.bias
        np.testing.assert_allclose(metrics.probabilities(z, n_classes), item.probs, atol=1e-4)


def test_a_stack_sees_nothing_in_noise(tmp_path):
    reader, codes = noise_reader(tmp_path)
    split = make_split(codes, len(codes))
    (found,) = fit_stacks(
        reader, list(reader.ranked), split, None, judge=None, depths=[1], seed=0, workers=1
    )
    assert abs(metrics.auroc(codes, found.probs[:, 1]) - 0.5) < 0.15


def test_few_rows_of_noise_are_not_judged_well(tmp_path):
    """Out of fold, ridge on noise says the opposite of a label: a stack must not turn it round."""
    rows, found = 16, []
    for seed in range(12):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rng = np.random.default_rng(seed)
        names = [f"layer_{k:02d}" for k in range(1, 13)]
        features = [Feature(name, Site.HIDDEN, Pooling.MEAN, 200) for name in names]
        for feature in features:
            write_matrix(folder, feature, rng.normal(size=(rows, 200)).astype(np.float32))
        codes = np.arange(rows) % 2
        layers = ["layer_00", *names]
        reader = Reader(folder, {}, layers, rows, np.arange(rows), StorageDtype.FLOAT32)
        (item,) = fit_stacks(
            reader, features, make_split(codes, rows), None, judge=None, depths=[12], seed=0,
            workers=1,
        )  # fmt: skip
        found.append(metrics.log_loss(codes, item.probs))
    assert np.mean(found) > 0.66  # that of a coin is 0.693


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("rows", "columns"), [(40, 38), (2000, 20), (64, 90)])
def test_weights_that_may_not_be_negative_are_those_of_scipy(rows, columns, strength):
    rng = np.random.default_rng(rows)
    y = rng.integers(0, 2, rows)
    X = np.outer(2 * y - 1, rng.uniform(-0.3, 0.5, columns)) + rng.normal(size=(rows, columns))
    weight = rng.uniform(0.5, 2.0, rows)
    l2 = strength * weight.sum()
    share, bias = fit_nonnegative(X, y, weight, l2, tol=1e-9)

    def value(v):
        z = X @ v[:-1] + v[-1]
        losses = np.logaddexp(0.0, np.where(y == 1, -z, z))
        return weight @ losses + 0.5 * l2 * v[:-1] @ v[:-1]

    def gradient(v):
        residual = weight * (1 / (1 + np.exp(-(X @ v[:-1] + v[-1]))) - y)
        return np.append(residual @ X + l2 * v[:-1], residual.sum())

    bounds = [(0, None)] * columns + [(None, None)]
    theirs = minimize(
        value, np.zeros(columns + 1), jac=gradient, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-9},
    )  # fmt: skip
    ours = np.append(share, bias)
    assert value(ours) <= theirs.fun * (1 + 1e-9)
    slope = gradient(ours)[:-1] / weight.sum()
    assert (share >= 0).all() and 0 < (share > 0).sum() < columns
    assert np.abs(slope[share > 0]).max() < 1e-7 and slope[share == 0].min() > -1e-7


def test_a_label_that_all_rows_have_is_the_intercept(tmp_path):
    """Its outputs are the same for all rows, so that none is left to weigh."""
    reader, codes = noise_reader(tmp_path)
    labels = np.stack([codes, np.ones_like(codes)], 1)
    split = search.Split(
        labels, np.arange(len(codes)), np.arange(0), 2, Metric.MACRO_F1, Penalty.L2,
        ClassWeight.NONE,
    )  # fmt: skip
    (found,) = fit_stacks(
        reader, list(reader.ranked), split, None, judge=None, depths=[1], seed=0, workers=1
    )
    assert (found.probs[:, 1] > 0.99).all()
    assert np.isfinite(found.probs).all() and (found.linear.weight[1] == 0).all()
    share, bias = fit_nonnegative(np.zeros((4, 0)), np.array([0, 0, 0, 1]), np.ones(4), 1.0)
    assert len(share) == 0 and bias == pytest.approx(-np.log(3), abs=1e-4)


def test_few_rows_get_the_stack_of_all_layers(tmp_path, monkeypatch):
    """And one more row gets what is best out of fold."""
    seen = []
    monkeypatch.setattr(contest, "best_of", lambda judged, *_: seen.append(judged) or judged[0])
    for few in (True, False):
        reader, features, codes = layered_reader(tmp_path, 2, rows=60)
        monkeypatch.setattr(contest, "FEW_ROWS", 61 if few else 60)
        neurons, shares = np.arange(40, dtype=np.int32), np.linspace(0.025, 1, 40)
        reader.ranked = {f: Ranked(f, neurons, shares, 1.0, 0.7) for f in features}
        inputs = SimpleNamespace(
            features=tuple(features), layers=reader.layers, config=TrainConfig(cv=0),
            split=make_split(codes, 40), rows={"val": np.arange(40, 60)}, groups=None,
            classes=["a", "b"], codes=codes, search_rows=np.arange(60),
            deepest=len(reader.layers) - 1,
        )  # fmt: skip
        found = contest.search(reader, inputs, lambda *_: None)
        last = seen[-1]
        assert found.best in found.tried and any(item.linear is not None for item in found.tried)
        assert any(item.linear is None for item in last) != few
        assert [item.depth for item in last] == [3] if few else len(last) > 3


def test_stacks_read_what_the_options_allow():
    layers = ("layer_00", "layer_01", "layer_02")
    features = tuple(
        Feature(layer, site, Pooling.MEAN, 9000 if layer == "layer_02" and site is Site.FFN else 10)
        for layer in layers
        for site in (Site.HIDDEN, Site.FFN)
    )

    def read(**options):
        config = TrainConfig(**options)
        inputs = SimpleNamespace(
            features=features, layers=layers, config=config,
            deepest=deepest_layer(layers, layers, config.max_layer),
        )  # fmt: skip
        found = [(f.layer[-1], f.site.value[0]) for f in contest.stack_features(inputs)]
        return [a + b for a, b in found], contest.stack_depths(inputs)

    assert read() == (["0h", "0f", "1h", "1f", "2h"], [0, 1, 2])  # 9,000 columns are too many
    assert read(sites=("hidden",), max_layer=1) == (["0h", "1h"], [0, 1])
    assert read(max_neurons=50)[0] == read()[0] and read(max_neurons=49) == ([], [])
    for other in ({"masks_only": True}, {"penalty": Penalty.L1}, {"head": HeadKind.MLP}):
        assert read(**other) == ([], [])


def known(counts, n_val=20, **options):
    """What `fold_count` reads of inputs: so many rows of each class."""
    codes = np.repeat(np.arange(len(counts)), counts)
    return SimpleNamespace(
        config=TrainConfig(**options), codes=codes, search_rows=np.arange(len(codes)),
        rows={"val": np.arange(n_val)}, classes=[f"c{k}" for k in range(len(counts))],
    )  # fmt: skip


def test_a_class_of_one_row_is_told_to_stand_in_the_way_of_folds():
    rare = known([100, 99, 1])
    assert contest.fold_count(rare) == 0
    (note,) = contest.without_folds(rare)
    assert "'c2'" in note and "20 val rows" in note and "200" in note
    with pytest.raises(UsageError, match="'c2' has a single row"):
        contest.fold_count(known([100, 99, 1], cv=3))
    assert contest.fold_count(known([100, 98, 2])) == contest.CV_FOLDS
    assert contest.fold_count(known([100, 98, 2], cv=7)) == 7
    for other in ([100, 98, 2], 20), ([2000, 99, 1], 1000):
        assert contest.without_folds(known(*other)) == []
    assert contest.without_folds(known([100, 99, 1], cv=0)) == []


def test_a_target_that_cannot_be_met_is_answered_with_one_that_can():
    given = evidence(n=400, positives=0.2)
    p, true = given.probs[:, 1], given.codes == 1
    order = np.argsort(-p)
    hits = np.cumsum(true[order])
    said = np.arange(1, len(p) + 1)
    precision = np.where(said >= calibration.MIN_ANSWERS, hits / said, 0)
    at = np.flatnonzero(precision == precision.max())[-1]
    assert precision[at] < 1
    with pytest.raises(DataError) as caught:
        config = TrainConfig(target_precision=1.0)
        calibration.choose_threshold(given, Metric.ACCURACY, config, [])
    wanted = re.search(
        r"--target-precision (0\.\d+) or less.* recall is (\d\.\d+)", caught.value.hint
    )
    assert float(wanted[2]) == pytest.approx(hits[at] / true.sum(), abs=5e-4)
    config = TrainConfig(target_precision=float(wanted[1]))
    threshold = calibration.choose_threshold(given, Metric.ACCURACY, config, [])
    assert true[p >= threshold].mean() >= float(wanted[1])
    given = replace(given, codes=np.where(np.arange(400) % 5, given.codes, 1 - given.codes))
    with pytest.raises(DataError) as caught:
        calibration.choose_abstention(given, None, TrainConfig(target_accuracy=1.0), [])
    wanted = re.search(r"--target-accuracy (0\.\d+) or less.* (\d.*)% of them", caught.value.hint)
    config = TrainConfig(target_accuracy=float(wanted[1]))
    bound = calibration.choose_abstention(given, None, config, [])
    answered = given.probs.max(1) >= bound
    assert 100 * answered.mean() >= float(wanted[2]) - 0.05
