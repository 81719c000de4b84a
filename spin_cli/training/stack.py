"""All neurons of all matrices in one head, by way of one output for each matrix.

A ridge regression on every (layer, site, pooling) gives out-of-fold outputs, and a logistic
regression on these outputs weighs the matrices (stacked generalisation, Wolpert 1992). Both are
linear, so that the whole is one linear head; and as the outputs of a matrix do not depend on the
other layers, heads of every depth come from the same regressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics, probe
from spin_cli.activations import Feature
from spin_cli.choices import ClassWeight, site_name
from spin_cli.training.folds import fold_rows
from spin_cli.training.nonnegative import fit_nonnegative, logit_losses
from spin_cli.training.pick import Judged, Linear, Part
from spin_cli.training.ridge import Ridge, fit_ridge, targets
from spin_cli.training.search import Split
from spin_cli.training.table import Choice, Reader
from spin_cli.workers import side_by_side

FOLDS = 5
WIDEST = 4096
"""Matrices of more columns are left to the masks: the cost grows with the square."""
DEPTHS = 8
STRENGTHS = (0.1, 0.01, 1e-3, 1e-4)
"""Penalties on the matrices' standardised outputs, as shares of the rows."""
EVEN = 1.0
"""A strength that stands for one weight: all matrices count alike. Its own penalty is the least."""
CONFIDENCE = 2.0
"""Logit where the matrices' mean output is exactly the target's larger value, if nothing better is
known."""
F64 = NDArray[np.float64]


def fit_stacks(
    reader: Reader,
    features: Sequence[Feature],
    split: Split,
    groups: NDArray[np.int64] | None,
    *,
    judge: NDArray[np.intp] | None,
    depths: Sequence[int],
    seed: int,
    workers: int,
    step: Callable[[], None] = lambda: None,
) -> list[Judged]:
    """Fit a stack of each of *depths* to train rows.

    Parameters
    ----------
    features : matrices to use
    split : its train rows are fitted
    groups : (N,) near-duplicates, kept within a fold; as rows in ``split.codes``
    judge : rows to judge by, not among the train rows; None: the train rows, out of fold
    depths : positions of the last layers

    Returns
    -------
    Heads, each with its weights.
    """
    rows = split.train
    codes = split.codes[rows]
    weight = np.ones(len(rows))
    if split.class_weight is ClassWeight.BALANCED:
        weight = probe.balanced_weights(codes, split.n_classes)
    fold = fold_rows(codes, FOLDS, seed, None if groups is None else groups[rows])
    Y = targets(codes, split.n_classes)
    even = np.ones(len(rows)) if weight.ndim == 2 else weight  # labels are weighed one by one later

    def one(feature: Feature) -> tuple[Feature, Ridge, F64] | None:
        values = reader.whole(feature)
        fit = fit_ridge(values[rows], Y, even, fold)
        step()
        if fit is None:
            return None
        others = values[:0] if judge is None else values[judge]
        return feature, fit, others.astype(np.float64) @ fit.weight.T + fit.bias

    fitted = side_by_side(one, features, workers, lambda feature: feature.width)
    levels = [found for found in fitted if found is not None]
    place = {name: at for at, name in enumerate(reader.layers)}
    within = [[lv for lv in levels if place[lv[0].layer] <= depth] for depth in depths]
    jobs = [(d, lv) for d, lv in zip(depths, within, strict=True) if lv]
    return side_by_side(
        lambda job: _join(*job, split, Y, weight, fold, judge), jobs, workers, lambda job: job[0]
    )


def _join(
    depth: int,
    levels: Sequence[tuple[Feature, Ridge, F64]],
    split: Split,
    Y: NDArray[np.float32],
    weight: F64,
    fold: NDArray[np.int64],
    judge: NDArray[np.intp] | None,
) -> Judged:
    """Weigh the matrices, output by output."""
    inside: NDArray[np.float32] = np.stack([fit.out_of_fold for _, fit, _ in levels], 2)
    outside: F64 = np.stack([others for _, _, others in levels], 2)
    joined = [
        _weigh(inside[:, k], Y[:, k], of_output, fold)
        for k, of_output in enumerate(weight.T if weight.ndim == 2 else [weight] * Y.shape[1])
    ]
    shares = np.stack([share for share, *_ in joined])
    bias = np.array([own for _, own, *_ in joined])
    total = [
        share[:, None] * fit.weight for share, (_, fit, _) in zip(shares.T, levels, strict=True)
    ]
    z = np.stack([out for *_, out, _ in joined], 1)
    if judge is not None:
        z = np.einsum("nkm,km->nk", outside, shares) + bias
    features = tuple(feature for feature, _, _ in levels)
    head = np.hstack(total).astype(np.float32)
    bias += sum(s * fit.bias for s, (_, fit, _) in zip(shares.T, levels, strict=True))
    part = Part(_choice(features, depth), joined[0][3], whole=True)
    probs = metrics.probabilities(z, split.n_classes, split.kind)
    return Judged((part,), head.shape[1], probs, Linear(features, head, bias))


def _choice(features: Sequence[Feature], depth: int) -> Choice:
    """What some matrices are, in words."""
    poolings = tuple(dict.fromkeys(feature.pooling for feature in features))
    return Choice(site_name({feature.site for feature in features}), poolings, 1.0, depth)


def _weigh(
    Z: NDArray[np.float32], target: NDArray[np.float32], weight: F64, fold: NDArray[np.int64]
) -> tuple[F64, float, F64, float]:
    """Logistic regression on the outputs of the matrices, without negative weights.

    Parameters
    ----------
    Z : (N, m), what ridge regressions on *target* (N,), above zero for yes, say of rows left out

    Returns
    -------
    Weights (m,) and intercept on Z as it is, fitted to all rows; logits (N,) out of fold; the
    strength.

    Notes
    -----
    A matrix that knows nothing says of a row that it has not seen rather the opposite of its label,
    which is missing from the others' mean. With weights of either sign, a few rows would be judged
    almost perfectly by turning such matrices round (Breiman 1996 asks for the same constraint).
    The mean of all matrices, which has next to nothing to fit, is taken where its loss is within
    one standard error of the lowest: on a few rows it is the better guess.
    """
    standard, y = probe.standardise(Z), (target > 0).astype(np.int64)
    X = standard.X.astype(np.float64)

    even = _out_of_fold(X, y, weight, fold, EVEN)
    best = np.inf, even, EVEN
    for strength in STRENGTHS:
        out = _out_of_fold(X, y, weight, fold, strength)
        loss = float(weight @ logit_losses(out, y))
        if loss > best[0]:
            break
        best = loss, out, strength
    gained = weight * (logit_losses(even, y) - logit_losses(best[1], y))
    if gained.sum() <= gained.std() * len(y) ** 0.5:
        best = best[0], even, EVEN
    share, bias = _logistic(X, y, weight, best[2])
    low, high = float(target.min()), float(target.max())
    if not share.any() and low < high:
        # Wrong on rows left out, as with too few texts, but still the best guess: as they are.
        m, slope = Z.shape[1], 2.0 * CONFIDENCE / (high - low)
        bias = -0.5 * slope * (high + low)
        return np.full(m, slope / m), bias, slope * Z.mean(1, dtype=np.float64) + bias, EVEN
    found = np.zeros(Z.shape[1])
    found[standard.kept] = share / standard.scale[standard.kept]
    return found, bias - float(found @ standard.mean), best[1], best[2]


def _out_of_fold(
    X: F64, y: NDArray[np.int64], weight: F64, fold: NDArray[np.int64], strength: float
) -> F64:
    """Logits (N,) of each row by a fit to the other folds."""
    out = np.empty(len(y))
    for k in range(int(fold.max()) + 1):
        inside, outside = fold != k, fold == k
        share, bias = _logistic(X[inside], y[inside], weight[inside], strength)
        out[outside] = X[outside] @ share + bias
    return out


def _logistic(X: F64, y: NDArray[np.int64], weight: F64, strength: float) -> tuple[F64, float]:
    total = float(weight.sum())
    if strength != EVEN:
        return fit_nonnegative(X, y, weight, strength * total)
    # Where a label is the same for all rows no output is left, and the intercept says it all.
    mean = X.mean(1, keepdims=True) if X.shape[1] else X
    share, bias = fit_nonnegative(mean, y, weight, STRENGTHS[-1] * total)
    return np.full(X.shape[1], share.sum() / max(1, X.shape[1])), bias
