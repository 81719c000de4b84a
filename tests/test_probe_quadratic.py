"""The inner problem: an l1-penalised quadratic, against coordinate descent of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso

from spin_cli.probe import quadratic
from spin_cli.probe.interior import solve_interior
from spin_cli.probe.quadratic import solve_quadratic


def alike(m=120, n=400, seed=0):
    """H, g and a penalty of columns that agree to 0.999: signs are hard to find here."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 6))
    X = common @ rng.normal(size=(6, m)) + 0.05 * rng.normal(size=(n, m))
    X = (X - X.mean(0)) / X.std(0)
    y = X[:, :5].sum(1) + rng.normal(size=n)
    return X, y


def violation(H, g, penalty, start, u):
    slope = H @ (u - start) + g
    at_zero = np.maximum(np.abs(slope) - penalty, 0)
    return np.where(u != 0, np.abs(slope + penalty * np.sign(u)), at_zero).max()


@pytest.mark.parametrize("share", [0.3, 0.01, 0.001])
def test_finds_the_lasso_of_columns_that_are_much_alike(share):
    X, y = alike()
    H, g = X.T @ X, -X.T @ y
    penalty = np.full(len(g), share * np.abs(g).max())
    found = solve_quadratic(H, g, penalty, np.zeros(len(g)), 1e-8 * np.abs(g).max())
    assert violation(H, g, penalty, 0 * g, found) <= 1e-8 * np.abs(g).max()
    lasso = Lasso(penalty[0] / len(y), fit_intercept=False, tol=1e-12, max_iter=1_000_000)
    expected = lasso.fit(X, y).coef_

    def value(u):
        return 0.5 * u @ H @ u + g @ u + penalty @ np.abs(u)

    assert value(found) <= value(expected) + 1e-9 * abs(value(expected))
    if share > 0.001:  # below, scikit-learn's support is not settled at any tolerance
        assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))


def test_the_interior_point_method_does_it_in_a_few_systems(monkeypatch):
    X, y = alike(seed=1)
    H, g = X.T @ X, -X.T @ y
    penalty = np.full(len(g), 0.01 * np.abs(g).max())
    penalty[0] = 0.0  # an intercept
    rng = np.random.default_rng(2)
    start = rng.normal(size=len(g)) * (rng.random(len(g)) < 0.3)
    monkeypatch.setattr("spin_cli.probe.interior.MAX_STEPS", 15)
    found = solve_interior(H, g, penalty, start, 1e-3)
    u, slope, _ = quadratic._polish(H, g, penalty, start, found)
    assert quadratic._violation(u, slope, penalty).max() <= 1e-3
    assert 0 < np.count_nonzero(found[1:]) < len(g) - 1


def test_a_matrix_that_is_not_positive_semi_definite_is_reported():
    H = np.diag([1.0, -1e9, 1.0])
    assert solve_interior(H, np.ones(3), np.full(3, 0.1), np.zeros(3), 1e-6) is None
