"""Choosing a head on validation data: what it reads, and how strongly it is penalised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spin_cli import metrics, probe
from spin_cli.config import Metric, Pooling, TrainConfig, worker_count
from spin_cli.training.table import Choice, Reader

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""l2 penalties tried, as shares of the number of training rows."""
PATIENCE = 2
LOOSE = 3e-3
"""Gradient, relative to that at zero weights, at which a candidate's val score has settled."""
FIRST_ETAS = (0.4, 0.9)
FIRST_DEPTHS = 3


@dataclass(frozen=True)
class Split:
    """Rows of one matrix of columns, divided."""

    codes: NDArray[np.int64]
    train: NDArray[np.intp]
    val: NDArray[np.intp]
    n_classes: int
    metric: Metric


@dataclass(frozen=True)
class Fitted:
    """A classifier on standardised columns, and how it did on validation rows."""

    fit: probe.Fit
    standard: probe.Standardised
    strength: float
    """l2 as a share of the training rows."""
    val_probs: NDArray[np.float64]
    """(n_val, n_classes)"""
    score: float
    """The metric on validation rows."""
    log_loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return self.score, -self.log_loss

    def probabilities(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes) of other rows of the same columns."""
        X = self.standard.transform(values)
        return probe.predict_proba(self.fit, X, self.val_probs.shape[1])


@dataclass(frozen=True)
class Candidate:
    """A choice with the head that was fitted to it."""

    choice: Choice
    neurons: int
    fitted: Fitted


def fit_columns(
    values: NDArray[Any], split: Split, strengths: Iterable[float] = STRENGTHS, tol: float = LOOSE
) -> Fitted:
    """Fit ridge logistic regressions of falling strength and keep one by validation rows.

    Strengths are walked from strong to weak with warm starts, and left when the log loss on
    validation rows has risen `PATIENCE` times in a row. The strongest wins whose log loss is
    within one standard error of the lowest (Breiman et al. 1984): new texts differ from the
    validation rows more than these do from train. Log loss picks the strength whatever the metric:
    it is smooth where accuracy on a few hundred rows is a staircase.

    Parameters
    ----------
    values : (N, n) columns; rows as in ``split.codes``
    """
    standard = probe.standardise(values[split.train])
    X_val = standard.transform(values[split.val])
    y, y_val = split.codes[split.train], split.codes[split.val]
    found: list[Fitted] = []
    fit, worse = None, 0
    for strength in strengths:
        fit = probe.fit(
            standard.X, y, split.n_classes, l1=0.0, l2=strength * len(y), init=fit, tol=tol
        )
        probs = probe.predict_proba(fit, X_val, split.n_classes)
        result = score(split.metric, y_val, probs), metrics.log_loss(y_val, probs)
        worse = worse + 1 if found and result[1] > min(f.log_loss for f in found) else 0
        found.append(Fitted(fit, standard, strength, probs, *result))
        if worse >= PATIENCE:
            break
    losses = [metrics.row_losses(y_val, candidate.val_probs) for candidate in found]
    lowest = min(losses, key=lambda rows: float(rows.mean()))
    near = [float((r - lowest).mean()) <= float((r - lowest).std()) / len(r) ** 0.5 for r in losses]
    return found[near.index(True)]


def score(metric: Metric, y: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """*metric* on some rows; macro-F1 of two classes at its best threshold on them."""
    if metric is Metric.MACRO_F1 and probs.shape[1] == 2:
        return metrics.macro_f1(y, metrics.decide(probs, metrics.best_threshold(y, probs)), 2)
    return metrics.score_function(metric)(y, probs)


def pooling_groups(poolings: Sequence[Pooling]) -> list[tuple[Pooling, ...]]:
    """Each pooling alone, and all of them side by side."""
    alone: list[tuple[Pooling, ...]] = [(pooling,) for pooling in poolings]
    return [*alone, tuple(poolings)] if len(poolings) > 1 else alone


def first_choices(config: TrainConfig, poolings: Sequence[Pooling], n_layers: int) -> list[Choice]:
    """A coarse grid over everything."""
    deepest = n_layers - 1 if config.max_layer is None else min(config.max_layer, n_layers - 1)
    depths = np.unique(
        np.linspace(deepest / FIRST_DEPTHS, deepest, FIRST_DEPTHS).round().astype(int)
    )
    etas = [eta for eta in FIRST_ETAS if eta in config.etas] or list(config.etas)[-2:]
    return [
        Choice(site, group, eta, int(depth))
        for group in pooling_groups(poolings)
        for site in config.sites
        for eta in etas
        for depth in (depths if deepest else [0])
    ]


def next_choices(best: Choice, config: TrainConfig, n_layers: int) -> list[Choice]:
    """What lies around *best*: every eta at its depth, depths nearby at its eta."""
    deepest = n_layers - 1 if config.max_layer is None else min(config.max_layer, n_layers - 1)
    reach = max(1, -(-deepest // FIRST_DEPTHS))
    step = max(1, reach // 3)
    depths = range(max(0, best.depth - reach), min(deepest, best.depth + reach) + 1, step)
    around = [replace(best, eta=eta) for eta in config.etas]
    return around + [replace(best, depth=depth) for depth in depths]


def try_all(
    choices: Iterable[Choice],
    reader: Reader,
    split: Split,
    config: TrainConfig,
    step: Callable[[], None],
) -> list[Candidate]:
    """Fit a head to every choice, side by side, each on one core.

    Choices that read nothing, or more than ``max_neurons`` or ``max_cells`` allow, are passed over.
    """
    most = max(config.max_cells // len(split.train), 1)
    if config.max_neurons is not None:
        most = min(most, config.max_neurons)

    def one(choice: Choice) -> Candidate | None:
        count = reader.count(choice)
        found = None
        if 0 < count <= most:
            found = Candidate(choice, count, fit_columns(reader.gather(choice), split))
        step()
        return found

    listed = list(choices)
    for choice in listed:  # read once, here: the workers then only share it
        for item in reader.matching(choice):
            reader.ranked_columns(item)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", probe.ConvergenceWarning)  # candidates may be loose
        with ThreadPoolExecutor(worker_count(config.workers)) as pool:
            try:
                return [found for found in pool.map(one, listed) if found is not None]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def best_of(candidates: Sequence[Candidate], n_val: int) -> Candidate:
    """The best on validation rows.

    Scores within one standard error of the highest are ties: on a few hundred rows, the highest of
    a hundred candidates is mostly lucky. Of tied candidates the one with the lowest log loss wins,
    which is far less noisy; of equal ones the shallower, then the smaller.
    """
    top = max(candidate.fitted.score for candidate in candidates)
    share = min(max(abs(top), 0.0), 1.0)
    error = (share * (1.0 - share) / n_val) ** 0.5  # of a share of n_val rows; near enough for F1
    tied = [candidate for candidate in candidates if candidate.fitted.score >= top - error]
    return min(tied, key=lambda c: (c.fitted.log_loss, c.choice.depth, c.neurons))
