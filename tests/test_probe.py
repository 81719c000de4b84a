"""The solver against scikit-learn, against the optimality conditions, and on awkward data."""

from __future__ import annotations

import operator
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from spin_cli import probe
from spin_cli.errors import DataError
from spin_cli.probe import (
    ConvergenceWarning,
    Gram,
    balanced_weights,
    fit,
    lambda_max,
    predict_proba,
    standardise,
)

TIGHT = 1e-9


def make(n=300, d=25, K=2, seed=0, dtype=np.float64, noise=1.0, correlated=False):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    if correlated:  # pairs that agree to 0.99, and a common factor
        X[:, 1::2] = 0.99 * X[:, ::2][:, : d // 2] + 0.14 * X[:, 1::2]
        X += rng.normal(size=(n, 1))
        X = (X - X.mean(0)) / X.std(0)
    W = rng.normal(size=(K, d)) * (rng.random((K, d)) < 0.3)
    y = (X @ W.T + noise * rng.gumbel(size=(n, K))).argmax(1)
    return X.astype(dtype), y


def value(W, b, X, y, n_classes, l1, l2=0.0, weight=None):
    """The objective written down afresh."""
    W, X = np.asarray(W, np.float64), np.asarray(X, np.float64)
    z = X @ W.T + b
    if len(W) == 1:
        z = np.hstack([np.zeros_like(z), z])
    top = z.max(1, keepdims=True)
    log_p = z - top - np.log(np.exp(z - top).sum(1, keepdims=True))
    losses = -log_p[np.arange(len(y)), y]
    weight = np.ones(len(y)) if weight is None else weight
    return weight @ losses + l1 * np.abs(W).sum() + 0.5 * l2 * (W**2).sum()


def worst_violation(W, b, X, y, n_classes, l1, l2=0.0, weight=None):
    """The largest violation of the optimality conditions, written down afresh."""
    W, X = np.asarray(W, np.float64), np.asarray(X, np.float64)
    z = X @ W.T + b
    z = np.hstack([np.zeros_like(z), z]) if len(W) == 1 else z
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    R = (p - np.eye(n_classes)[y]) * (1.0 if weight is None else weight[:, None])
    R = R[:, 1:] if len(W) == 1 else R
    G = R.T @ X + l2 * W
    out = [np.abs(R.sum(0)).max()]
    for w, g in zip(W.ravel(), G.ravel(), strict=True):
        out.append(abs(g + l1 * np.sign(w)) if w else max(abs(g) - l1, 0.0))
    return max(out)


def null_loss(y, n_classes):
    counts = np.bincount(y, minlength=n_classes)
    counts = counts[counts > 0]
    return -(counts * np.log(counts / counts.sum())).sum()


def by_sklearn(X, y, l1, l2=0.0, weight=None):
    model = LogisticRegression(
        C=1 / (l1 + l2),
        l1_ratio=l1 / (l1 + l2),
        solver="saga" if l1 else "lbfgs",
        tol=1e-10 if l1 else 1e-12,
        max_iter=200_000,
        random_state=0,
    )
    return model.fit(X, y, sample_weight=weight)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
@pytest.mark.parametrize(
    ("l1", "l2"), [(20.0, 0.0), (1.0, 0.0), (0.2, 0.0), (2.0, 3.0), (0.0, 5.0), (0.0, 0.05)]
)
def test_agrees_with_scikit_learn(n_classes, l1, l2):
    X, y = make(K=n_classes)
    ours = fit(X, y, n_classes, l1=l1, l2=l2, tol=TIGHT)
    theirs = by_sklearn(X, y, l1, l2)
    goal = value(theirs.coef_, theirs.intercept_, X, y, n_classes, l1, l2)
    assert ours.objective == pytest.approx(goal, rel=1e-8)
    assert ours.objective == pytest.approx(
        value(ours.coef, ours.intercept, X, y, n_classes, l1, l2), rel=1e-13
    )
    assert ours.converged
    assert pytest.approx(1 / (l1 + l2)) == ours.C
    # saga leaves weights of 1e-9 where the optimum has none.
    assert ((np.abs(theirs.coef_) > 1e-6) == (np.abs(ours.coef) > 1e-6)).all()
    np.testing.assert_allclose(ours.coef, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(
        predict_proba(ours, X, n_classes), theirs.predict_proba(X), atol=1e-5
    )


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("l1", [10.0, 1.0, 0.1])
def test_float32_is_within_a_millionth_of_the_null_loss(n_classes, l1):
    X, y = make(n=2000, d=60, K=n_classes, dtype=np.float32)
    exact = fit(X.astype(np.float64), y, n_classes, l1=l1, tol=TIGHT)
    single = fit(X, y, n_classes, l1=l1)
    assert single.coef.dtype == np.float32
    assert single.converged
    assert abs(single.objective - exact.objective) < 1e-6 * null_loss(y, n_classes)
    assert single.kkt * lambda_max(X, y, n_classes) == pytest.approx(
        worst_violation(single.coef, single.intercept, X, y, n_classes, l1), rel=1e-4, abs=1e-6
    )


def outlier():
    X, y = make(n=800, d=30)
    X[5, 3] = 3000.0  # a massive activation: one value rules its column's scale
    return standardise(X).X.astype(np.float64), y


def imbalanced():
    X, y = make(n=1500, d=20, noise=0.3)
    order = np.concatenate([np.flatnonzero(y == 0)[:700], np.flatnonzero(y == 1)[:50]])
    return X[order], y[order]


def one_row_class():
    X, y = make(n=200, d=20, K=3)
    y[y == 2] = 1
    y[7] = 2
    return X, y


AWKWARD = {
    "outlier": outlier,
    "imbalanced": imbalanced,
    "one row in a class": one_row_class,
    "separable": lambda: make(n=60, d=100, noise=0.0),
    "separable, three classes": lambda: make(n=60, d=100, K=3, noise=0.0),
    "correlated": lambda: make(n=400, d=30, correlated=True),
    "correlated, three classes": lambda: make(n=400, d=30, K=3, correlated=True),
    "twins": lambda: (lambda X, y: (np.hstack([X, X[:, :5]]), y))(*make()),
    "one column": lambda: make(d=1),
    "constant columns": lambda: (lambda X, y: (np.hstack([X, np.zeros((300, 3))]), y))(*make()),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("share", [0.3, 0.02, 0.001])
def test_optimality_conditions_on_awkward_data(name, share):
    X, y = AWKWARD[name]()
    n_classes = int(y.max()) + 1
    top = lambda_max(X, y, n_classes)
    l1 = share * top
    for data, tol in ((X, 1e-8), (X.astype(np.float32), 1e-5)):
        out = fit(data, y, n_classes, l1=l1, tol=tol)
        assert out.converged
        worst = worst_violation(out.coef, out.intercept, data, y, n_classes, l1)
        assert worst <= 1.01 * tol * top
        assert out.kkt == pytest.approx(worst / top, rel=1e-3, abs=1e-12)
        assert np.count_nonzero(out.coef) > 0
        if data.dtype == np.float64:
            exact = out
    assert abs(out.objective - exact.objective) < 1e-6 * null_loss(y, n_classes)


@pytest.mark.parametrize("name", ["outlier", "imbalanced", "one row in a class", "correlated"])
def test_agrees_with_scikit_learn_on_awkward_data(name):
    X, y = AWKWARD[name]()
    n_classes = int(y.max()) + 1
    l1 = 0.1 * lambda_max(X, y, n_classes)
    ours = fit(X, y, n_classes, l1=l1, tol=TIGHT)
    theirs = by_sklearn(X, y, l1)
    goal = value(theirs.coef_, theirs.intercept_, X, y, n_classes, l1)
    assert ours.objective == pytest.approx(goal, rel=1e-8)
    assert ((np.abs(theirs.coef_) > 1e-6) == (np.abs(ours.coef) > 1e-6)).all()


@pytest.mark.parametrize(
    "name", ["one row in a class", "separable, three classes", "correlated, three classes"]
)
def test_one_versus_rest_and_weights_on_awkward_data(name):
    X, y = AWKWARD[name]()
    weight = balanced_weights(y, 3)
    tops = [lambda_max(X, (y == k).astype(int), 2, weight) for k in range(3)]
    l1 = 0.05 * min(tops)
    out = fit(X, y, 3, l1=l1, multi_class="ovr", sample_weight=weight, tol=1e-8)
    assert out.converged
    for k in range(3):
        W, b = out.coef[k : k + 1], out.intercept[k : k + 1]
        worst = worst_violation(W, b, X, (y == k).astype(int), 2, l1, weight=weight)
        assert worst <= 1.01e-8 * tops[k]
        assert W.any()


def test_all_is_zero_at_lambda_max_and_not_below():
    for n_classes in (2, 3):
        X, y = make(K=n_classes)
        top = lambda_max(X, y, n_classes)
        at = fit(X, y, n_classes, l1=1.0001 * top)
        assert not at.coef.any()
        share = np.bincount(y) / len(y)
        np.testing.assert_allclose(predict_proba(at, X[:1], n_classes)[0], share, rtol=1e-6)
        assert fit(X, y, n_classes, l1=0.99 * top).coef.any()


def alike(n_classes, n=600, groups=5, d=40, seed=0):
    """Standardised rows of a few kinds, each with as many rows of every class."""
    kinds = np.random.default_rng(seed).normal(size=(groups, d))
    X = np.repeat(kinds, n // groups, axis=0)
    X = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    return X, np.arange(n) % n_classes


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("size", [600, 60_000])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_columns_that_say_nothing_get_no_weights(n_classes, size, order):
    """What rounding leaves of a correlation is none: no path ends that goes below it."""
    X, y = alike(n_classes, size)
    X = np.asarray(X, order=order)
    assert np.abs(X.T.astype(np.float64) @ (y == 0)).max() < 1e-2  # but for X's own rounding
    assert lambda_max(X, y, n_classes) == 0.0
    for l1, l2 in ((1e-9, 0.0), (0.0, 1e-9)):
        out = fit(X, y, n_classes, l1=l1, l2=l2)
        assert not out.coef.any() and out.converged and out.kkt == 0 and out.iterations == 0
        np.testing.assert_allclose(predict_proba(out, X[:9], n_classes), 1 / n_classes)


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e7])
def test_one_row_or_one_column_that_says_something_is_heard(unit):
    X, y = alike(2)
    flipped = y.copy()
    flipped[0] = 1 - flipped[0]
    assert lambda_max(unit * X, flipped, 2) == pytest.approx(
        unit * np.abs(X.T.astype(np.float64) @ (flipped - flipped.mean())).max(), rel=1e-4
    )
    rows = np.random.default_rng(1).normal(size=(len(X), 1)).astype(np.float32)
    other = np.hstack([1e4 * X, 1e-3 * (rows + y[:, None])]).astype(np.float32) * unit
    assert lambda_max(other, y, 2) > 0


@pytest.mark.parametrize("n_classes", [2, 3])
def test_integer_weights_equal_repeated_rows(n_classes):
    X, y = make(K=n_classes)
    weight = np.random.default_rng(1).integers(0, 4, len(y))
    rows = np.repeat(np.arange(len(y)), weight)
    weighted = fit(X, y, n_classes, l1=3.0, sample_weight=weight, tol=TIGHT)
    repeated = fit(X[rows], y[rows], n_classes, l1=3.0, tol=TIGHT)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-12)
    np.testing.assert_allclose(weighted.coef, repeated.coef, atol=1e-7)


def test_balanced_weights_are_scikit_learns():
    X, y = imbalanced()
    weight = balanced_weights(y, 2)
    assert weight.sum() == pytest.approx(len(y))
    assert weight[y == 0].sum() == pytest.approx(weight[y == 1].sum())
    ours = fit(X, y, 2, l1=25.0, sample_weight=weight, tol=TIGHT)
    theirs = LogisticRegression(
        C=0.04, l1_ratio=1, solver="saga", tol=1e-10, max_iter=20_000, class_weight="balanced"
    ).fit(X, y)
    np.testing.assert_allclose(ours.coef, theirs.coef_, atol=1e-6)


def test_one_versus_rest_is_one_problem_per_class():
    X, y = make(K=3)
    joint = fit(X, y, 3, l1=4.0, multi_class="ovr", tol=TIGHT)
    for k in range(3):
        alone = fit(X, (y == k).astype(int), 2, l1=4.0, tol=TIGHT)
        np.testing.assert_array_equal(joint.coef[k], alone.coef[0])
    probs = predict_proba(joint, X, 3)
    sigmoids = 1 / (1 + np.exp(-joint.logits(X)))
    np.testing.assert_allclose(probs, sigmoids / sigmoids.sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_same_input_gives_the_same_bits(dtype, n_classes):
    X, y = make(n=500, d=80, K=n_classes, dtype=dtype)
    first, second = (fit(X, y, n_classes, l1=2.0) for _ in range(2))
    assert first.coef.tobytes() == second.coef.tobytes()
    assert first.intercept.tobytes() == second.intercept.tobytes()
    assert first.objective == second.objective


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("multi_class", ["multinomial", "ovr"])
def test_warm_start_ends_at_the_same_optimum(n_classes, multi_class):
    X, y = make(K=n_classes)
    options = {"l1": 2.0, "multi_class": multi_class, "tol": TIGHT}
    cold = fit(X, y, n_classes, **options)
    start = fit(X, y, n_classes, l1=0.2, multi_class=multi_class)
    warm = fit(X, y, n_classes, init=start, **options)
    np.testing.assert_allclose(warm.coef, cold.coef, atol=1e-7)
    again = fit(X, y, n_classes, init=cold, **options)
    assert again.iterations == 0
    np.testing.assert_array_equal(again.coef, cold.coef)


def test_classes_without_rows_are_next_to_impossible():
    X, y = make(K=3)
    y = np.where(y == 1, 3, y)  # of five classes 0, 2 and 3 occur
    out = fit(X, y, 5, l1=2.0, tol=1e-8)
    assert out.converged
    assert not out.coef[[1, 4]].any()
    probs = predict_proba(out, X, 5)
    assert probs[:, [1, 4]].max() < 1e-6
    three = fit(X, np.searchsorted([0, 2, 3], y), 3, l1=2.0, tol=1e-8)
    np.testing.assert_allclose(probs[:, [0, 2, 3]], predict_proba(three, X, 3), atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_class_only(n_classes, label):
    X, _ = make()
    out = fit(X, np.full(len(X), label), n_classes, l1=1.0)
    assert out.converged
    assert not out.coef.any()
    assert predict_proba(out, X, n_classes)[:, label].min() > 0.999999


def test_stopping_early_is_a_warning_and_is_recorded():
    X, y = make(n=300, d=50)
    with pytest.warns(ConvergenceWarning, match="tolerance"):
        out = fit(X, y, 2, l1=0.1, tol=1e-10, max_iter=1)
    assert not out.converged
    assert out.kkt > 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(X, y, 2, l1=0.1).converged


@pytest.mark.parametrize(
    ("l1", "l2", "method"),
    [
        (3.0, 0.0, "solver.fista"),
        (2.0, 1.0, "solver.fista"),
        (0.0, 2.0, "solver.minimise_smooth"),
    ],
)
def test_first_order_methods_reach_the_newton_optimum(monkeypatch, l1, l2, method):
    """They take over where the Hessian would be too large."""
    X, y = make(K=3)
    want = fit(X, y, 3, l1=l1, l2=l2, tol=TIGHT)
    calls = []
    original = operator.attrgetter(method)(probe)

    def spy(*args, **options):
        calls.append(method)
        return original(*args, **options)

    monkeypatch.setattr(f"spin_cli.probe.{method}", spy)
    monkeypatch.setattr("spin_cli.probe.solver.MAX_PAIRS", 0)
    got = fit(X, y, 3, l1=l1, l2=l2, tol=1e-7, max_iter=20_000)
    assert calls
    assert got.converged
    assert got.objective == pytest.approx(want.objective, rel=1e-10)
    np.testing.assert_allclose(got.coef, want.coef, atol=1e-5)


@pytest.mark.parametrize("multi_class", ["multinomial", "ovr"])
@pytest.mark.parametrize(
    ("n_classes", "max_pairs"), [(2, 10**6), (3, 10**6), (2, 0), (3, 0)], ids=str
)  # Newton, FISTA
def test_columns_that_are_read_in_place_lead_to_the_same_optimum(
    n_classes, max_pairs, multi_class, monkeypatch
):
    X, y = make(K=n_classes)
    weight = np.random.default_rng(1).uniform(0.5, 2.0, len(y))
    options = {"l1": 3.0, "sample_weight": weight, "multi_class": multi_class, "tol": 1e-8}
    want = fit(X, y, n_classes, **options)
    monkeypatch.setattr("spin_cli.probe.blocks.LONG", 1)
    monkeypatch.setattr("spin_cli.probe.solver.MAX_PAIRS", max_pairs)
    got = fit(np.asfortranarray(X), y, n_classes, max_iter=20_000, **options)
    assert got.converged
    assert got.objective == pytest.approx(want.objective, rel=1e-10)
    assert ((got.coef != 0) == (want.coef != 0)).all()
    np.testing.assert_allclose(got.coef, want.coef, atol=1e-6)


def test_sums_over_many_rows_that_are_sorted_by_class_stay_exact():
    """Where rounding adds up, as it does one by one in float32, the tolerance is out of reach."""
    X, y = make(n=300_000, d=4, K=3, dtype=np.float32)
    order = np.argsort(y, kind="stable")
    found = fit(np.asfortranarray(X[order]), y[order], 3, l1=2000.0, max_iter=50)
    assert found.converged


def test_a_matrix_that_lies_by_column_is_not_copied():
    X, y = make(n=40_000, d=200, dtype=np.float32)
    by_column = np.asfortranarray(X)
    peaks = []
    for layout in (X, by_column):
        tracemalloc.start()
        fit(layout, y, 2, l1=50.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > X.nbytes > 1.2 * peaks[1]


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ridge_fits_that_share_a_gram_matrix(monkeypatch, n_classes, dtype):
    X, y = make(n=1500, d=120, K=n_classes, correlated=True, dtype=dtype)
    weight = balanced_weights(y, n_classes)
    monkeypatch.setattr(probe.solver.Solver, "_without_l1", lambda *_: "gram")
    gram, init = Gram(), None
    for l2 in (500.0, 20.0, 1.0):
        options = {"l1": 0.0, "l2": l2, "sample_weight": weight}
        init = fit(X, y, n_classes, init=init, gram=gram, tol=1e-4, **options)
        assert init.converged
        assert init.iterations < 40
        z = value(init.coef, init.intercept, X, y, n_classes, 0.0, l2, weight)
        assert init.objective == pytest.approx(z, rel=1e-6)
        with monkeypatch.context() as plain:
            plain.setattr(probe.solver.Solver, "_without_l1", lambda *_: "newton")
            exact = fit(X.astype(np.float64), y, n_classes, tol=1e-9, **options)
        assert init.objective == pytest.approx(exact.objective, rel=1e-5)
    assert gram.known(weight)
    np.testing.assert_allclose(
        gram.matrix(probe.logistic.make_problem(X, y, n_classes, weight)),
        X.T.astype(float) @ (weight[:, None] * X), rtol=1e-4, atol=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("y", "weight"),
    [
        (np.zeros(5), None),
        (np.full(300, 2), None),
        (np.full(300, -1), None),
        (np.zeros(300), np.ones(3)),
        (np.zeros(300), np.full(300, -1.0)),
        (np.zeros(300), np.full(300, np.nan)),
    ],
)
def test_input_that_does_not_fit_is_refused(y, weight):
    X, _ = make()
    with pytest.raises(DataError):
        fit(X, y, 2, l1=1.0, sample_weight=weight)


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (-1.0, 2.0), (1.0, -1.0)])
def test_penalties_that_make_no_sense_are_refused(l1, l2):
    X, y = make()
    with pytest.raises(ValueError, match="penalties"):
        fit(X, y, 2, l1=l1, l2=l2)
