"""A ranking made again on other rows, a fold's say, where C is known already."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.choices import Solver
from spin_cli.config import SelectConfig
from spin_cli.probe.logistic import fit, lambda_max
from spin_cli.probe.ranking import Ranking, Score, keep
from spin_cli.probe.reference import fit_reference
from spin_cli.probe.results import Fit
from spin_cli.probe.standard import standardise

TOL = 1e-2
"""Violation, relative to the penalty at zero weights, at which a ranking is good enough."""
FROM, STEPS = 0.7, 6
"""Where the walk to the penalty begins, as a share of the one at zero weights; its steps."""


def rank_again(
    X: NDArray[Any],
    y: NDArray[np.integer[Any]],
    train: NDArray[np.integer[Any]],
    val: NDArray[np.integer[Any]],
    n_classes: int,
    C: float,
    *,
    rows: int,
    score: Score,
    config: SelectConfig,
    key: int,
) -> Ranking:
    """Rank neurons as `rank_neurons` would that has chosen *C* for so many *rows*.

    As C is known, *val* rows are fitted to as well; but the reference recipe chooses one of its
    rounds by them.

    Parameters
    ----------
    X, y, n_classes, score, key : as for `rank_neurons`
    train, val : row numbers; *val* may be empty, then rounds are chosen by *train* rows
    config : its tolerance is not kept to, as the ranking has settled before
    """
    if config.solver is Solver.REFERENCE and len(np.unique(y[train])) > 1:
        standard, others = standardise(X[train]), val if len(val) else train
        best = fit_reference(
            standard.X, y[train], standard.transform(X[others]), y[others], n_classes, score=score,
            seed=config.seed, grid=(C * rows / len(train),),
        ).fits[0]  # fmt: skip
    else:
        both = np.sort(np.concatenate([train, val]))
        standard = standardise(X[both])
        best = _fit_from_above(standard.X, y[both], n_classes, len(both) / rows / C)
    return keep(best, standard, config, key)


def _fit_from_above(
    X: NDArray[np.float32], y: NDArray[np.integer[Any]], n_classes: int, l1: float
) -> Fit:
    """Fit a probe by way of stronger penalties: a cold start takes two to four times as long.

    A start from the probe of all rows would be shorter still, but it has seen the held out ones.
    """
    top = FROM * lambda_max(X, y, n_classes)
    found = None
    for strength in np.geomspace(top, l1, STEPS)[:-1] if l1 < top else ():
        found = fit(X, y, n_classes, l1=float(strength), init=found, tol=TOL)
    return fit(X, y, n_classes, l1=l1, init=found, tol=TOL)
