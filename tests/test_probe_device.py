"""The solver for GPUs, on torch's CPU device, against the CPU's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spin_cli import metrics, probe
from spin_cli.choices import Metric
from spin_cli.config import SelectConfig
from spin_cli.probe.device import DeviceRows, standardise_on, transform_on
from tests.test_probe import AWKWARD, alike, make, null_loss, worst_violation

CPU = torch.device("cpu")
SCORE = metrics.score_function(Metric.LOG_LOSS)


def task(n_classes, seed=0, n=900, d=50):
    """Raw features whose columns differ in scale, as float16: train and val rows."""
    X, y = make(n=n, d=d, K=n_classes, seed=seed)
    rng = np.random.default_rng(seed)
    X = (X * rng.uniform(0.1, 5, d) + 3 * rng.normal(size=d)).astype(np.float16)
    X[:, 7] = 0.5
    return X[:600], y[:600], X[600:], y[600:]


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_on_a_device_are_the_standardised_ones(monkeypatch, hold, dtype):
    monkeypatch.setattr("spin_cli.probe.device.BLOCK_BYTES", 2**14)
    X, _, other, _ = task(2)
    X, other = X.astype(dtype), other.astype(dtype)
    here = probe.standardise(X)
    asked = []
    lazy = probe.Blocks(lambda rows: (asked.append(rows), X[rows])[1], X.shape, X.dtype)
    there = standardise_on(lazy, CPU, hold)
    assert len(asked) > 3
    assert max(rows.stop - rows.start for rows in asked) * 50 * 4 <= 2**14
    np.testing.assert_array_equal(there.kept, here.kept)
    np.testing.assert_allclose(there.scale, here.scale, rtol=1e-12)
    V, R = np.random.default_rng(0).normal(size=(49, 3)), np.ones((600, 2))
    np.testing.assert_allclose(there.X @ V, here.X @ V, atol=1e-4)
    exact = there.X.transposed_times(R, exact=True)
    shift = ((here.mean - there.mean) / here.scale)[here.kept]
    np.testing.assert_allclose(exact, here.X.T @ R + 600 * shift[:, None], atol=1e-3)
    np.testing.assert_allclose(transform_on(other, there) @ V, here.transform(other) @ V, atol=1e-4)
    assert (len(asked) == len(there.X.parts)) == hold


@pytest.mark.parametrize(
    ("n_classes", "multi_class"), [(2, "multinomial"), (3, "multinomial"), (3, "ovr")]
)
def test_the_path_is_that_of_the_other_solver(n_classes, multi_class):
    X, y, X_val, y_val = task(n_classes)
    weight = np.random.default_rng(1).uniform(0.5, 2, 600)
    options = {
        "sample_weight": weight,
        "multi_class": multi_class,
        "tol": 1e-5,
        "points": 5,
        "ratio": 0.05,
    }
    here, there = probe.standardise(X), standardise_on(X, CPU)
    wanted = probe.fit_path(
        here.X, y, here.transform(X_val), y_val, n_classes, score=SCORE, **options
    )
    found = probe.fit_path(
        there.X, y, transform_on(X_val, there), y_val, n_classes, score=SCORE, **options
    )
    assert found.best == wanted.best
    np.testing.assert_allclose(found.scores, wanted.scores[: len(found.scores)], atol=0.02)
    best = found.fits[found.best]
    exact = probe.fit(
        here.X.astype(np.float64), y, n_classes, l1=1 / best.C, sample_weight=weight,
        multi_class=multi_class, tol=1e-10,
    )  # fmt: skip
    assert best.converged
    assert best.coef.dtype == np.float32
    assert abs(best.objective - exact.objective) < 1e-6 * null_loss(y, n_classes)
    assert ((best.coef != 0) == (exact.coef != 0)).mean() > 0.99
    np.testing.assert_allclose(best.coef, exact.coef, atol=2e-3)
    again = probe.fit_path(
        there.X, y, transform_on(X_val, there), y_val, n_classes, score=SCORE, **options
    )
    assert again.fits[again.best].coef.tobytes() == best.coef.tobytes()


@pytest.mark.parametrize(
    "name", ["outlier", "imbalanced", "one row in a class", "separable", "correlated", "twins"]
)
def test_optimality_conditions_on_awkward_data(name):
    X, y = AWKWARD[name]()
    n_classes = int(y.max()) + 1
    X = X.astype(np.float32)
    there = standardise_on(X, CPU)
    path = probe.fit_path(
        there.X, y, there.X, y, n_classes, score=SCORE, points=3, ratio=0.1, tol=1e-4
    )
    rows = np.concatenate([block.numpy() for _, block in there.X])
    top = probe.lambda_max(rows, y, n_classes)
    best = path.fits[path.best]
    worst = worst_violation(best.coef, best.intercept, rows, y, n_classes, 1 / best.C)
    assert best.converged
    assert worst <= 1.01e-4 * top
    assert best.kkt == pytest.approx(worst / top, rel=1e-2, abs=1e-9)


def test_columns_that_say_nothing_give_one_fit_without_weights():
    X, y = alike(2)
    there = standardise_on(X, CPU)
    path = probe.fit_path(there.X, y, there.X, y, 2, score=SCORE)
    assert len(path.fits) == 1 and not path.fits[0].coef.any() and path.fits[0].converged
    Y = np.stack([y, np.arange(600) < 200], 1)  # the second label can be told from the rows
    path = probe.fit_path(there.X, Y, there.X, Y, 2, score=lambda *_: 0.0, points=3, ratio=0.1)
    assert path.fits[0].converged and path.fits[0].coef.any(1).tolist() == [False, True]


def test_a_class_without_rows_in_one_versus_rest():
    X, y, X_val, y_val = task(3)
    y = np.where(y == 1, 0, y)
    there = standardise_on(X, CPU)
    path = probe.fit_path(
        there.X, y, transform_on(X_val, there), y_val, 3, score=SCORE, multi_class="ovr", tol=1e-4
    )
    best = path.fits[path.best]
    assert best.converged
    assert not best.coef[1].any()
    assert probe.predict_proba(best, there.X, 3)[:, 1].max() < 1e-6


@pytest.mark.parametrize("n_classes", [2, 3])
def test_neurons_and_frequencies_are_those_of_the_other_solver(n_classes):
    X, y, X_val, y_val = task(n_classes)
    rows = np.arange(600), np.arange(600, 900)
    both = np.concatenate([X, X_val]), np.concatenate([y, y_val])
    config = SelectConfig(bootstrap=5, tol=1e-5, max_iter=500, path_points=5, path_ratio=0.05)
    options = {"score": SCORE, "config": config}
    here = probe.rank_neurons(*both, *rows, n_classes, **options)
    there = probe.rank_neurons(*both, *rows, n_classes, device=CPU, **options)
    assert there.converged
    assert pytest.approx(here.val_score, abs=1e-4) == there.val_score
    assert pytest.approx(here.C, rel=1e-6) == there.C
    strong = here.importance > 1e-3 * here.importance.max()
    np.testing.assert_array_equal(there.neurons[: strong.sum()], here.neurons[strong])
    np.testing.assert_allclose(there.coef, here.coef, atol=1e-3)
    assert np.abs(there.frequency - here.frequency).max() <= 0.2 + 1e-6
    assert np.abs(there.frequency - here.frequency).mean() < 0.02


def test_labels_are_problems_of_their_own():
    X, y, X_val, y_val = task(3)
    Y, Y_val = np.eye(3, dtype=int)[y], np.eye(3, dtype=int)[y_val]
    Y[:, 1] = Y[:, 0] | (X[:, 3] > 0)
    Y[:, 2] = 0  # a label of no row
    rows = np.arange(600), np.arange(600, 900)
    both = np.concatenate([X, X_val]), np.concatenate([Y, Y_val])
    config = SelectConfig(bootstrap=2, tol=1e-5, max_iter=500, path_points=5, path_ratio=0.05)
    options = {"score": lambda y, probs: -float(((y - probs) ** 2).mean()), "config": config}
    here = probe.rank_neurons(*both, *rows, 3, **options)
    there = probe.rank_neurons(*both, *rows, 3, device=CPU, **options)
    assert there.converged
    assert pytest.approx(here.C, rel=1e-6) == there.C
    np.testing.assert_allclose(there.coef, here.coef, atol=1e-3)
    assert not there.coef[2].any()
    assert np.abs(there.frequency - here.frequency).mean() < 0.05


def test_stopping_early_is_recorded(monkeypatch):
    monkeypatch.setattr("spin_cli.probe.walk_device.MAX_STEPS", 10)
    X, y, X_val, y_val = task(2)
    there = standardise_on(X, CPU)
    assert isinstance(there.X, DeviceRows)
    with pytest.warns(probe.ConvergenceWarning, match="tolerance"):
        path = probe.fit_path(
            there.X, y, transform_on(X_val, there), y_val, 2, score=SCORE, tol=1e-6
        )
    assert not path.fits[path.best].converged
