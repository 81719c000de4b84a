"""Choosing a head on validation data: what it reads, and how strongly it is penalised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from spin_cli import metrics, probe
from spin_cli.choices import ClassWeight, Metric, Penalty, Pooling
from spin_cli.config import TrainConfig
from spin_cli.training.pick import Judged, Part, score
from spin_cli.training.table import Choice, Reader
from spin_cli.workers import side_by_side

STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Penalties tried, as shares of the number of training rows."""
L1_SHARES = {Penalty.L2: 0.0, Penalty.ELASTICNET: 0.5, Penalty.L1: 1.0}
L1_UNIT = 0.1
"""l1 for l2 = 1: at most half of the rows' number leaves no weight of standardised columns."""
PATIENCE = 2
LOOSE = 3e-3
"""Gradient, relative to that at zero weights, at which a candidate's val score has settled."""
WIDE, JITTER = 2, 1e-5
FIRST_ETAS = (0.4, 0.9)
FIRST_DEPTHS = 3


@dataclass(frozen=True)
class Split:
    """Rows of one matrix of columns, divided."""

    codes: NDArray[np.int64]
    """(N,), or (N, n_classes), 1 where a label applies."""
    train: NDArray[np.intp]
    val: NDArray[np.intp]
    n_classes: int
    metric: Metric
    penalty: Penalty = Penalty.L2
    class_weight: ClassWeight = ClassWeight.NONE

    @property
    def kind(self) -> str:
        """How probabilities come from logits, as `metrics.probabilities` calls it."""
        return "labels" if self.codes.ndim == 2 else "multinomial"

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return 1 if self.n_classes == 2 and self.codes.ndim == 1 else self.n_classes

    def fit(
        self,
        X: NDArray[np.float32],
        strength: float,
        init: probe.Fit | None,
        tol: float,
        gram: probe.Gram | None = None,
    ) -> probe.Fit:
        """Fit logistic regression to standardised train rows, penalised by *strength* a row."""
        y = self.codes[self.train]
        share = L1_SHARES[self.penalty]
        weight = None
        if self.class_weight is ClassWeight.BALANCED:
            weight = probe.balanced_weights(y, self.n_classes)
        return probe.fit(
            X, y, self.n_classes,
            l1=L1_UNIT * share * strength * len(y), l2=(1.0 - share) * strength * len(y),
            sample_weight=weight, init=init, gram=gram, tol=tol,
        )  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A classifier on standardised columns, and how it did on validation rows."""

    fit: probe.Fit
    standard: probe.Standardised
    strength: float
    """Penalty as a share of the training rows."""
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


def fit_columns(
    values: NDArray[Any], split: Split, strengths: Iterable[float] = STRENGTHS, tol: float = LOOSE
) -> Fitted:
    """Fit logistic regressions of falling strength and keep one by validation rows.

    Strengths are left when the log loss on validation rows has risen `PATIENCE` times in a row. The
    strongest wins whose log loss is within one standard error of the lowest (Breiman et al. 1984):
    new texts differ from the validation rows more than these do from train. Log loss picks the
    strength whatever the metric: it is smooth where accuracy on a few hundred rows is a staircase.

    Parameters
    ----------
    values : (N, n) columns; rows as in ``split.codes``
    """
    found = walk_strengths(values, split, strengths, tol, PATIENCE)
    y_val = split.codes[split.val]
    return found[strongest([metrics.row_losses(y_val, item.val_probs) for item in found])]


def strongest(losses: Sequence[NDArray[np.float64]]) -> int:
    """The first of some candidates whose loss is within one standard error of the lowest.

    Parameters
    ----------
    losses : of each candidate, from strong to weak; each (N,), of the same rows
    """
    lowest = min(losses, key=lambda rows: float(rows.mean()))
    near = [float((r - lowest).mean()) <= float((r - lowest).std()) / len(r) ** 0.5 for r in losses]
    return near.index(True)


def walk_strengths(
    values: NDArray[Any],
    split: Split,
    strengths: Iterable[float],
    tol: float = LOOSE,
    patience: int | None = None,
) -> list[Fitted]:
    """Fit logistic regressions from strong to weak, each from where the last one ended."""
    standard = probe.standardise(values[split.train])
    X_val = standard.transform(values[split.val])
    solve = _Short(standard.X, tol) if _is_wide(standard.X, split, tol) else None
    y_val = split.codes[split.val]
    found: list[Fitted] = []
    fit, worse, gram = None, 0, probe.Gram()
    for strength in strengths:
        if solve is None:
            fit = split.fit(standard.X, strength, fit, tol, gram)
        else:
            fit = solve.fit(split, strength)
        probs = probe.predict_proba(fit, X_val, split.n_classes)
        result = score(split.metric, y_val, probs), metrics.log_loss(y_val, probs)
        worse = worse + 1 if found and result[1] > min(f.log_loss for f in found) else 0
        found.append(Fitted(fit, standard, strength, probs, *result))
        if worse == patience:
            break
    return found


def _is_wide(X: NDArray[np.float32], split: Split, tol: float) -> bool:
    """Whether there are so many columns that it pays to trade them for rows."""
    return split.penalty is Penalty.L2 and X.shape[1] > WIDE * X.shape[0] and tol >= LOOSE


class _Short:
    """Ridge on many columns as ridge on as many columns as there are rows.

    With a ridge penalty the weights are sums of rows, ``w = Xᵀa``, and only ``K = XXᵀ`` matters
    (Kimeldorf & Wahba 1971). With ``K = LLᵀ`` the problem in L has the same optimum, and weights v
    there are ``w = XᵀL⁻ᵀv`` here.
    """

    def __init__(self, X: NDArray[np.float32], tol: float) -> None:
        self.X, self.tol = X, tol
        gram = X @ X.T
        # Centred columns leave K without full rank.
        gram[np.diag_indices(len(gram))] += np.float32(JITTER * np.trace(gram) / len(gram))
        factor = cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        self.L = np.ascontiguousarray(factor, np.float32)
        self.last: probe.Fit | None = None

    def fit(self, split: Split, strength: float) -> probe.Fit:
        """As `Split.fit`, for weights on X."""
        self.last = split.fit(self.L, strength, self.last, self.tol)
        a = solve_triangular(self.L, self.last.coef.T, lower=True, trans="T", check_finite=False)
        return replace(self.last, coef=np.ascontiguousarray((self.X.T @ a).T, np.float32))


def pooling_groups(poolings: Sequence[Pooling]) -> list[tuple[Pooling, ...]]:
    """Each pooling alone, and all of them side by side."""
    alone: list[tuple[Pooling, ...]] = [(pooling,) for pooling in poolings]
    return [*alone, tuple(poolings)] if len(poolings) > 1 else alone


def first_choices(
    config: TrainConfig, groups: Sequence[tuple[Pooling, ...]], deepest: int
) -> list[Choice]:
    """A coarse grid over everything, up to the layer at position *deepest*."""
    depths = np.unique(
        np.linspace(deepest / FIRST_DEPTHS, deepest, FIRST_DEPTHS).round().astype(int)
    )
    etas = [eta for eta in FIRST_ETAS if eta in config.etas] or list(config.etas)[-2:]
    return [
        Choice(site, group, eta, int(depth))
        for group in groups
        for site in config.sites
        for eta in etas
        for depth in (depths if deepest else [0])
    ]


def next_choices(
    best: Choice, config: TrainConfig, deepest: int, etas: int | None = None
) -> list[Choice]:
    """What lies around *best*: etas at its depth, depths nearby, up to *deepest*, at its eta.

    *etas*: only so many to either side.
    """
    reach = max(1, -(-deepest // FIRST_DEPTHS))
    step = max(1, reach // 3)
    depths = range(max(0, best.depth - reach), min(deepest, best.depth + reach) + 1, step)
    place = config.etas.index(best.eta)
    beside = slice(None) if etas is None else slice(max(0, place - etas), place + etas + 1)
    around = [replace(best, eta=eta) for eta in config.etas[beside]]
    return around + [replace(best, depth=depth) for depth in depths]


def finalists(
    tried: Sequence[Judged], split: Split, most: int | None
) -> dict[Choice, tuple[float, ...]]:
    """The choice of the lowest log loss for each site and pooling, with strengths around its own.

    One of each kind, since on few rows the order of kinds is uncertain. *most*: only so many.
    """
    y = split.codes[split.val]
    ranked = sorted(tried, key=lambda item: metrics.log_loss(y, item.probs))
    kinds: dict[tuple[str, tuple[Pooling, ...]], Part] = {}
    for part in (item.main for item in ranked):
        kinds.setdefault((part.choice.site, part.choice.poolings), part)
    return {
        part.choice: (3 * part.strength, part.strength, part.strength / 3)
        for part in list(kinds.values())[:most]
    }


def try_all(
    choices: Iterable[Choice],
    reader: Reader,
    split: Split,
    config: TrainConfig,
    step: Callable[[], None],
) -> list[Judged]:
    """Fit a head to every choice, side by side, each on one core.

    Choices that read nothing, or more than ``max_neurons`` or ``max_cells`` allow, are passed over
    before any of their columns is read.
    """

    def one(choice: Choice) -> Judged:
        fitted = fit_columns(reader.gather(choice), split)
        step()
        return Judged((Part(choice, fitted.strength),), reader.count(choice), fitted.val_probs)

    listed = list(choices)
    allowed = [choice for choice in listed if is_allowed(reader.count(choice), split, config)]
    for _ in range(len(listed) - len(allowed)):
        step()
    reader.prepare(allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probe.ConvergenceWarning)  # candidates may be loose
        return side_by_side(one, allowed, config.workers, reader.count)


def is_allowed(neurons: int, split: Split, config: TrainConfig) -> bool:
    """Whether so many neurons, at least one, are within ``max_neurons`` and ``max_cells``."""
    most = max(config.max_cells // len(split.train), 1)
    if config.max_neurons is not None:
        most = min(most, config.max_neurons)
    return 0 < neurons <= most
