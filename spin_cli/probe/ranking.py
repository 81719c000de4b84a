"""One matrix, one probe: fitted to given rows, chosen on others, its neurons ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from spin_cli import mask
from spin_cli.choices import Control, Solver
from spin_cli.config import SelectConfig
from spin_cli.errors import DataError, UsageError
from spin_cli.probe.blocks import Remote, take_columns, take_rows
from spin_cli.probe.logistic import fit
from spin_cli.probe.path import fit_path
from spin_cli.probe.reference import fit_reference
from spin_cli.probe.results import Fit, Path, fold_back
from spin_cli.probe.standard import Standardised, standardise

Score = Callable[[NDArray[Any], NDArray[np.float64]], float]
LARGE_MATRIX = 2**25
"""Values from which a matrix is laid out column by column, so that none of it is copied."""
RESAMPLE, SHUFFLE, DRAW = 1, 2, 3
"""Tell the uses of one seed apart."""


@dataclass(frozen=True)
class Ranking:
    """What one probe scored, and its neurons in the order of their importance."""

    C: float
    val_score: float
    kkt: float
    converged: bool
    neurons: NDArray[np.int32]
    """(n,) most important first; those of zero weight are left out."""
    importance: NDArray[np.float64]
    """(n,) squared weights on standardised features, summed over classes."""
    cumulative: NDArray[np.float64]
    """(n,) share of the importance of all neurons that the first 1, 2, … reach."""
    class_importance: NDArray[np.float32]
    """(K, n) the importance for each column of logits."""
    coef: NDArray[np.float32]
    """(K, F) on raw features."""
    intercept: NDArray[np.float64]
    frequency: NDArray[np.float32] | None = None
    """(F,) share of the bootstrap resamples in which a neuron's weight is not zero."""
    control_score: float | None = None
    """Validation score of a probe that was made the same way for shuffled labels, or on as many
    neurons drawn at random."""


def rank_neurons(
    X: Any,
    y: NDArray[np.integer[Any]],
    train: NDArray[np.integer[Any]],
    val: NDArray[np.integer[Any]],
    n_classes: int,
    *,
    score: Score,
    config: SelectConfig,
    stream: bool = False,
    device: Any = None,
    key: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Ranking:
    """Fit a probe to the *train* rows, choose its C on the *val* rows, and rank its neurons.

    Parameters
    ----------
    X : (N, F), an array or `Blocks`, raw features
    y : (N,), integers from 0 to n_classes - 1; or (N, n_classes), 1 where a label applies
    train, val : row numbers; a fold's rows will do
    score : of ``(y, probabilities (M, n_classes))``; higher is better
    stream : never hold the standardised training rows whole; the neurons are the same
    device : a `torch.device` to solve on; None: the CPU, by numpy
    key : tells matrices apart that share ``config.seed``, for ``--control random``
    between : called between the fits of the bootstrap; what it raises ends them

    Warns
    -----
    ConvergenceWarning
        Where a tolerance was not reached; `Ranking.converged` is False if it was the probe's own.
    """
    standard, transform = _standardised(take_rows(X, train), stream, device)
    nothing = partial(_nothing, X.shape[1], y[train], y[val], n_classes, score, config)
    if not len(standard.kept):  # layer 0's first token, say, is the same in every text
        return nothing()
    X_val = transform(take_rows(X, val))
    if config.control is not Control.RANDOM:
        X = None  # not needed again: what the solver takes beside the standardised rows is less
    path = _path(standard, y[train], X_val, y[val], n_classes, score, config)
    best = path.fits[path.best]
    if not best.coef.any():  # columns that say nothing about the classes
        return nothing()
    found = replace(keep(best, standard, config, key), val_score=path.scores[path.best])
    if config.bootstrap:
        frequency = _frequency(best, standard, y[train], n_classes, config, between)
        found = replace(found, frequency=frequency)
    if config.control is Control.RANDOM:
        del standard, X_val  # one matrix at a time
        alone = rank_neurons(
            take_columns(X, np.sort(found.neurons)), y, train, val, n_classes, score=score,
            config=replace(config, control=Control.NONE, bootstrap=0), stream=stream, device=device,
        )  # fmt: skip
        return replace(found, control_score=alone.val_score)
    if config.control is Control.LABELS:
        rng = np.random.default_rng([config.seed, SHUFFLE])
        shuffled = rng.permutation(y[train]), rng.permutation(y[val])
        other = _path(standard, shuffled[0], X_val, shuffled[1], n_classes, score, config)
        found = replace(found, control_score=other.scores[other.best])
    return found


def _standardised(
    X: Any, stream: bool, device: Any
) -> tuple[Standardised, Callable[[Any], NDArray[np.float32]]]:
    """Training rows, and what puts other rows on the same footing and the same device."""
    if device is None:
        large = X.shape[0] * X.shape[1] >= LARGE_MATRIX
        standard = standardise(X, stream=stream, by_column=large)
        return standard, standard.transform
    from spin_cli.probe.device import standardise_on, transform_on

    standard = standardise_on(X, device)
    return standard, cast(Any, partial(transform_on, like=standard))


def _path(
    standard: Standardised,
    y: NDArray[Any],
    X_val: NDArray[np.float32],
    y_val: NDArray[Any],
    n_classes: int,
    score: Score,
    config: SelectConfig,
) -> Path:
    if config.solver is Solver.REFERENCE:
        if y.ndim == 2:
            raise UsageError("--solver reference: the recipe is for one label a row")
        if len(np.unique(y)) < n_classes:
            raise DataError(
                "the reference recipe needs training rows of every class",
                "Leave --solver reference out, or bring rows of every class.",
            )
        return fit_reference(
            np.asarray(standard.X[0 : len(standard.X)]), y, X_val, y_val, n_classes, score=score,
            seed=config.seed,
        )  # fmt: skip
    return fit_path(
        standard.X, y, X_val, y_val, n_classes, score=score, points=config.path_points,
        ratio=config.path_ratio, tol=config.tol, max_iter=config.max_iter,
    )  # fmt: skip


def keep(best: Fit, standard: Standardised, config: SelectConfig, key: int) -> Ranking:
    """What a selection keeps of a probe: ``top_k`` neurons, or as many drawn at random.

    Its validation score is left open.

    Parameters
    ----------
    best : fitted to ``standard.X``
    key : see `rank_neurons`
    """
    values = mask.importance(best.coef)
    order = mask.order(values)
    shares = mask.cumulative(values[order])
    order, shares = order[: config.top_k], shares[: config.top_k]
    neurons = standard.kept[order].astype(np.int32)
    if config.control is Control.RANDOM:
        rng = np.random.default_rng([config.seed, DRAW, key])
        neurons = rng.permutation(standard.kept)[: len(order)].astype(np.int32)
    coef, intercept = fold_back(best, standard)
    return Ranking(
        C=best.C,
        val_score=float("nan"),
        kkt=best.kkt,
        converged=best.converged,
        neurons=neurons,
        importance=values[order],
        cumulative=shares,
        class_importance=(best.coef[:, order] ** 2).astype(np.float32),
        coef=coef,
        intercept=intercept,
    )


def _frequency(
    best: Fit,
    standard: Standardised,
    y: NDArray[Any],
    n_classes: int,
    config: SelectConfig,
    between: Callable[[], None],
) -> NDArray[np.float32]:
    """How often each neuron is selected at the chosen C, over resamples of the training rows.

    A resample is a count per row, given to the solver as weights: no row is copied, and the fit to
    all rows is where each starts. The same resamples serve every matrix.
    """
    counts = np.zeros(len(standard.mean))
    rngs = [np.random.default_rng([config.seed, RESAMPLE, b]) for b in range(config.bootstrap)]
    drawn = (np.bincount(r.integers(0, len(y), len(y)), minlength=len(y)) for r in rngs)
    rows: Any = standard.X
    if isinstance(rows, Remote):
        from spin_cli.probe.walk_device import count_selected

        weights = np.stack(list(drawn))
        found = count_selected(rows, y, n_classes, best, weights, config.tol, between)
        counts[standard.kept] = found
        return (counts / config.bootstrap).astype(np.float32)
    for weight in drawn:
        between()
        # That a neuron is in or out is settled long before the last digits are: no warning.
        again = fit(
            standard.X, y, n_classes, l1=1.0 / best.C, sample_weight=weight, init=best,
            tol=config.tol, max_iter=config.max_iter, warn=False,
        )  # fmt: skip
        counts[standard.kept] += again.coef.any(0)
    return (counts / config.bootstrap).astype(np.float32)


def class_shares(y: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """Share of the rows (n_classes,) that each class, or each label, has."""
    if y.ndim == 2:
        return np.asarray(y.mean(0), np.float64)
    return np.asarray(np.bincount(y, minlength=n_classes) / len(y))


def _nothing(
    width: int,
    y: NDArray[Any],
    y_val: NDArray[Any],
    n_classes: int,
    score: Score,
    config: SelectConfig,
) -> Ranking:
    """The probe of a matrix that says nothing about the classes: their shares, without a weight."""
    shares = class_shares(y, n_classes)
    outputs = 1 if n_classes == 2 and y.ndim == 1 else n_classes
    odds = np.log(np.maximum(shares, 1e-12))
    if y.ndim == 2:
        odds -= np.log(np.maximum(1.0 - shares, 1e-12))
    val_score = score(y_val, np.tile(shares, (len(y_val), 1)))
    return Ranking(
        C=0.0,
        val_score=val_score,
        kkt=0.0,
        converged=True,
        neurons=np.zeros(0, np.int32),
        importance=np.zeros(0),
        cumulative=np.zeros(0),
        class_importance=np.zeros((outputs, 0), np.float32),
        coef=np.zeros((outputs, width), np.float32),
        intercept=odds[1:] - odds[:1] if outputs == 1 else odds,
        frequency=np.zeros(width, np.float32) if config.bootstrap else None,
        control_score=None if config.control is Control.NONE else val_score,
    )
