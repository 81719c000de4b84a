"""Standardising, the path of penalties, and the paper's recipe."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from spin_cli.errors import DataError
from spin_cli.probe import Fit, fit, fit_path, fold_back, lambda_max, predict_proba, standardise
from spin_cli.probe.reference import REFERENCE_C, fit_reference


def accuracy(y, probs):
    return float((probs.argmax(1) == y).mean())


def minus_log_loss(y, probs):
    return float(np.log(np.maximum(probs[np.arange(len(y)), y], 1e-15)).mean())


def split(n_classes=2, d=60, seed=0, n=900):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(np.float32)
    W = np.zeros((n_classes, d))
    W[:, :6] = rng.normal(size=(n_classes, 6))
    y = (X @ W.T + rng.gumbel(size=(n, n_classes))).argmax(1)
    return X[:600], y[:600], X[600:], y[600:]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_standardised_equals_plain_numpy(dtype):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(3001, 40)) * rng.uniform(0.1, 5, 40) + rng.normal(size=40)).astype(dtype)
    exact = X.astype(np.float64)
    out = standardise(X)
    np.testing.assert_allclose(out.mean, exact.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(out.scale, exact.std(0), rtol=1e-12)
    assert out.X.dtype == np.float32
    assert out.X.flags.c_contiguous
    np.testing.assert_array_equal(out.kept, np.arange(40))
    expected = ((exact - exact.mean(0)) / exact.std(0)).astype(np.float32)
    np.testing.assert_allclose(out.X, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(out.transform(X[:7]), out.X[:7])


def test_constant_columns_are_left_out():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 6)).astype(np.float32)
    X[:, 1] = 0.0
    X[:, 3] = 7.3
    X[:, 4] = 100 + 1e-5 * X[:, 4]  # noise of rounding in float32
    out = standardise(X)
    assert out.kept.tolist() == [0, 2, 5]
    assert out.scale[[1, 3, 4]].tolist() == [1.0, 1.0, 1.0]
    assert out.X.shape == (500, 3)
    np.testing.assert_allclose(out.X.std(0), 1, rtol=1e-5)
    other = X[:10].copy()
    other[:, 3] = -55.0  # a column that was constant on training rows counts for nothing
    np.testing.assert_array_equal(out.transform(other), out.X[:10])


def test_a_large_mean_does_not_eat_the_signal():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(4000, 1))
    out = standardise((1e6 + signal).astype(np.float64))
    np.testing.assert_allclose(out.X, (signal - signal.mean()) / signal.std(), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    X = np.ones((10, 3), np.float32)
    X[4, 2] = bad
    with pytest.raises(DataError, match="the first is 2"):
        standardise(X)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError):
        standardise(np.zeros((0, 3), np.float32))
    with pytest.raises(DataError):
        standardise(np.eye(3, dtype=np.float32)).transform(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_folded_back_weights_give_the_same_logits_on_raw_features(n_classes):
    rng = np.random.default_rng(3)
    X, y, _, _ = split(n_classes)
    raw = (X * rng.uniform(0.01, 50, X.shape[1]) + 20 * rng.normal(size=X.shape[1])).astype(
        np.float32
    )
    raw[:, 9] = 4.0
    out = standardise(raw)
    probe = fit(out.X, y, n_classes, l1=3.0)
    coef, intercept = fold_back(probe, out)
    assert coef.shape == (probe.coef.shape[0], raw.shape[1])
    assert coef.dtype == np.float32
    assert not coef[:, 9].any()
    logits = raw.astype(np.float64) @ coef.T.astype(np.float64) + intercept
    np.testing.assert_allclose(logits, probe.logits(out.X), atol=2e-4)


@pytest.mark.parametrize(
    ("n_classes", "multi_class"), [(2, "multinomial"), (3, "multinomial"), (3, "ovr")]
)
def test_the_chosen_fit_is_a_settled_optimum(n_classes, multi_class):
    data = split(n_classes)
    path = fit_path(*data, n_classes, score=accuracy, multi_class=multi_class)
    chosen = path.fits[path.best]
    assert chosen.converged
    assert chosen.kkt <= 1e-5
    assert path.scores[path.best] == accuracy(data[3], predict_proba(chosen, data[2], n_classes))
    assert path.scores[path.best] == max(path.scores)
    alone = fit(
        data[0].astype(np.float64),
        data[1],
        n_classes,
        l1=1 / chosen.C,
        multi_class=multi_class,
        tol=1e-9,
    )
    assert ((alone.coef != 0) == (chosen.coef != 0)).mean() > 0.99
    np.testing.assert_allclose(chosen.coef, alone.coef, atol=1e-3)


def test_the_path_falls_by_equal_ratios_below_lambda_max():
    data = split()
    path = fit_path(*data, 2, score=lambda *_: 0.0, points=8, ratio=1e-2, patience=100)
    penalties = np.array([1 / f.C for f in path.fits])
    top = lambda_max(data[0], data[1], 2)
    np.testing.assert_allclose(penalties, top * 1e-2 ** (np.arange(1, 9) / 8), rtol=1e-5)
    sizes = [np.count_nonzero(f.coef) for f in path.fits]
    assert 0 < sizes[0] < sizes[-1]
    assert path.best == 0  # all scores are equal: the sparsest


def test_every_point_is_near_its_optimum():
    data = split()
    path = fit_path(*data, 2, score=minus_log_loss, patience=100)
    for point in path.fits[::4]:
        exact = fit(data[0].astype(np.float64), data[1], 2, l1=1 / point.C, tol=1e-8)
        assert point.objective == pytest.approx(exact.objective, rel=2e-3)
        assert point.objective >= exact.objective * (1 - 1e-6)


def test_the_path_is_left_when_the_score_has_fallen():
    rising_then_falling = iter([0.5, 0.7, 0.7, 0.6, 0.7, 0.6, 0.65, 0.9, 0.9])
    path = fit_path(
        *split(), 2, score=lambda *_: next(rising_then_falling, 0.7), points=20, patience=3
    )
    # 0.7 comes back twice, which starts the count afresh; the 0.9 behind three lower ones is seen
    # only because 0.6, 0.65 are two.
    assert len(path.fits) > 8
    falling = iter([0.5, 0.7, 0.6, 0.6, 0.6, 0.9])
    path = fit_path(*split(), 2, score=lambda *_: next(falling, 0.7), points=20, patience=3)
    assert len(path.fits) == 5
    assert path.best == 1


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_ridge_and_elastic_net_paths(l1_ratio):
    data = split()
    path = fit_path(*data, 2, score=minus_log_loss, l1_ratio=l1_ratio)
    chosen = path.fits[path.best]
    assert chosen.converged
    assert accuracy(data[3], predict_proba(chosen, data[2], 2)) > 0.7
    l1, l2 = l1_ratio / chosen.C, (1 - l1_ratio) / chosen.C
    exact = fit(data[0].astype(np.float64), data[1], 2, l1=l1, l2=l2, tol=1e-9)
    assert chosen.objective == pytest.approx(exact.objective, rel=1e-6)
    if l1_ratio == 0.0:
        assert chosen.coef.all()


def test_the_path_gives_the_same_bits_again():
    data = split(3)
    first, second = (fit_path(*data, 3, score=accuracy) for _ in range(2))
    assert first.scores == second.scores
    for a, b in zip(first.fits, second.fits, strict=True):
        assert a.coef.tobytes() == b.coef.tobytes()


def test_one_class_in_training_gives_one_certain_fit():
    X, y, X_val, y_val = split()
    path = fit_path(X, np.zeros_like(y), X_val, y_val, 2, score=accuracy)
    assert len(path.fits) == 1
    assert path.scores[0] == float((y_val == 0).mean())


def test_a_class_missing_from_training_in_one_versus_rest():
    X, y, X_val, y_val = split(3)
    rows = y != 1
    path = fit_path(X[rows], y[rows], X_val, y_val, 3, score=accuracy, multi_class="ovr")
    chosen = path.fits[path.best]
    assert chosen.converged
    assert predict_proba(chosen, X_val, 3)[:, 1].max() < 1e-6


def test_the_reference_keeps_the_best_of_all_rounds():
    data = split()
    seen: list[float] = []

    def score(y, probs):
        seen.append(accuracy(y, probs))
        return seen[-1]

    path = fit_reference(*data, 2, score=score)
    assert len(seen) == 16 * len(REFERENCE_C)
    assert [f.C for f in path.fits] == pytest.approx(REFERENCE_C)
    assert path.scores[path.best] == max(seen)
    # A copy of the best round, not a reference to what went on training.
    for point, stated in zip(path.fits, path.scores, strict=True):
        assert accuracy(data[3], predict_proba(point, data[2], 2)) == stated


def test_the_path_is_no_worse_than_the_reference():
    ours, theirs = [], []
    for seed in range(3):
        data = split(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = fit_path(*data, 2, score=accuracy)
        ours.append(path.scores[path.best])
        other = fit_reference(*data, 2, score=accuracy)
        theirs.append(other.scores[other.best])
    assert np.mean(ours) >= np.mean(theirs)


def test_probabilities_do_not_overflow():
    X = np.array([[1e4], [-1e4]])
    for multi_class in ("multinomial", "ovr"):
        for K in (1, 3):
            coef = np.arange(K, dtype=np.float32)[:, None] + 1
            big = Fit(coef, np.zeros(K), 1.0, 0.0, 0.0, 0, True, multi_class)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                probs = predict_proba(big, X, max(2, K))
            assert np.isfinite(probs).all()
            np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-12)
