"""Cross-validating select and train together.

Neurons that were selected with a row's label in view flatter every head that is then tried on that
row (Ambroise & McLachlan 2002). So in every fold the probes are fitted again, on the fold's
training rows alone, and rank their neurons anew, by the options that `select` had; only C is taken
over from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics, probe
from spin_cli.activations import Feature
from spin_cli.config import SelectConfig
from spin_cli.dataset.stratification import deal_out
from spin_cli.training.pick import Judged, Part
from spin_cli.training.search import Split, walk_strengths
from spin_cli.training.table import Choice, Ranked, Reader
from spin_cli.workers import side_by_side


def fold_rows(
    codes: NDArray[np.int64], folds: int, seed: int, groups: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The fold (N,) of each row; every class, or label, is dealt out evenly over the folds.

    *groups* (N,): rows of one group stay together, unless it is `too_large`, or the training rows
    of a fold would lack a class that has two rows or more.
    """
    groups = np.arange(len(codes)) if groups is None else groups
    groups = _parted(groups, too_large(groups, folds))
    while True:  # to the end where no two rows are of one group
        deal = _fold_labels if codes.ndim == 2 else _fold_classes
        fold = deal(codes, folds, seed, groups)
        together = _sizes(groups) > 1
        if not together.any() or not (torn := together & _of_one_fold(codes, fold)).any():
            return fold
        groups = _parted(groups, np.isin(groups, groups[torn]))


def too_large(groups: NDArray[np.int64], folds: int) -> NDArray[np.bool_]:
    """Rows (N,) of groups that no fold has room for: of more than an equal share of the rows.

    Without these no fold is left without a group.
    """
    sizes = _sizes(groups)
    return np.asarray((sizes > 1) & (sizes * folds > len(groups)))


def _sizes(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows the group of each row has."""
    _, unit, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(counts[unit])


def _parted(groups: NDArray[np.int64], rows: NDArray[np.bool_]) -> NDArray[np.int64]:
    """*groups*, with each of *rows* (N,) in a group of its own."""
    fresh = groups.max(initial=0) + 1 + np.arange(len(groups))
    return np.asarray(np.where(rows, fresh, groups))


def _of_one_fold(codes: NDArray[np.int64], fold: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows (N,) of classes, or with labels, that no other fold has; those of a single row are not.

    A class of which one fold has all rows is none that its head could be trained on.
    """
    has = codes > 0 if codes.ndim == 2 else codes[:, None] == np.arange(codes.max() + 1)
    found = np.zeros(len(codes), bool)
    for rows in has.T:
        if rows.sum() > 1 and len(np.unique(fold[rows])) == 1:
            found |= rows
    return found


def _fold_classes(
    codes: NDArray[np.int64], folds: int, seed: int, groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The largest groups first, each to the fold with the fewest rows of its classes so far."""
    order = np.random.default_rng(seed).permutation(len(codes))
    members: dict[int, list[int]] = {}
    for row in order[np.argsort(codes[order], kind="stable")]:
        members.setdefault(int(groups[row]), []).append(int(row))
    fold = np.empty(len(codes), np.int64)
    held = [[0] * (int(codes.max()) + 1) for _ in range(folds)]
    sizes = [0] * folds
    for rows in sorted(members.values(), key=len, reverse=True):
        classes = [int(code) for code in codes[rows]]
        fewest = [(sum(held[k][code] for code in classes), sizes[k], k) for k in range(folds)]
        k = min(fewest)[2]
        fold[rows] = k
        sizes[k] += len(rows)
        for code in classes:
            held[k][code] += 1
    return fold


def _fold_labels(
    labels: NDArray[np.int64], folds: int, seed: int, groups: NDArray[np.int64]
) -> NDArray[np.int64]:
    """A group counts as one row that has all of its rows' labels."""
    names, unit = np.unique(groups, return_inverse=True)
    together = np.zeros((len(names), labels.shape[1]), np.int64)
    np.maximum.at(together, unit, labels)
    return np.asarray(deal_out(together, (1.0 / folds,) * folds, seed)[unit])


class Folds:
    """Out-of-fold probabilities of trials; each fold's rankings are made once and kept."""

    def __init__(
        self,
        reader: Reader,
        split: Split,
        folds: int,
        workers: int,
        seed: int,
        groups: NDArray[np.int64] | None = None,
        *,
        selecting: SelectConfig,
    ) -> None:
        self.reader, self.split, self.workers = reader, split, workers
        self.selecting = selecting
        self.fold = fold_rows(split.codes, folds, seed, groups)
        self.ranked: list[dict[Feature, Ranked]] = [{} for _ in range(folds)]

    def judge(
        self,
        strengths: Mapping[Choice, Sequence[float]],
        step: Callable[[], None] = lambda: None,
    ) -> list[Judged]:
        """Out-of-fold class probabilities (N, n_classes) of choices at given strengths."""
        shape = (len(self.split.codes), self.split.n_classes)
        probs = {(c, s): np.empty(shape) for c, listed in strengths.items() for s in listed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", probe.ConvergenceWarning)  # loose on purpose
            warnings.filterwarnings("ignore", module="sklearn")  # the reference recipe stops short
            for k in range(len(self.ranked)):
                self._rank(k, strengths)
                self._fit(k, strengths, probs, step)
        count = self.reader.count
        return [Judged((Part(c, s),), count(c), found) for (c, s), found in probs.items()]

    def _fit(
        self,
        k: int,
        strengths: Mapping[Choice, Sequence[float]],
        probs: dict[tuple[Choice, float], NDArray[np.float64]],
        step: Callable[[], None],
    ) -> None:
        """Fit every head of one fold and fill in the rows that it holds out."""
        inside, outside = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)
        part = replace(self.split, train=inside, val=outside)
        # In the model's order, not in that in which threads were done: sums depend on it.
        ranked = {f: self.ranked[k][f] for f in self.reader.ranked if f in self.ranked[k]}
        reader = self.reader.with_ranking(ranked)
        reader.prepare(list(strengths))

        def one(choice: Choice) -> None:
            values = reader.gather(choice)
            if values.shape[1] == 0:  # nothing was worth a weight in this fold
                shares = probe.class_shares(part.codes[inside], part.n_classes)
                for strength in strengths[choice]:
                    probs[choice, strength][outside] = shares
            else:
                for fitted in walk_strengths(values, part, strengths[choice]):
                    probs[choice, fitted.strength][outside] = fitted.val_probs
            step()

        side_by_side(one, list(strengths), self.workers, reader.count)

    def _rank(self, k: int, choices: Iterable[Choice]) -> None:
        """Fit the probes of one fold that *choices* read and that are not there yet."""
        wanted = {item.feature: item for choice in choices for item in self.reader.matching(choice)}
        split, config = self.split, self.selecting
        train, val = (rows[self.fold[rows] != k] for rows in (split.train, split.val))

        def one(item: Ranked) -> None:
            found = probe.rank_again(
                self.reader.whole(item.feature), split.codes, train, val, split.n_classes, item.C,
                rows=len(split.train), score=metrics.score_function(config.metric or split.metric),
                config=config, key=item.feature.number,
            )  # fmt: skip
            kept = replace(item, neurons=found.neurons, cumulative=found.cumulative)
            self.ranked[k][item.feature] = kept

        todo = [item for feature, item in wanted.items() if feature not in self.ranked[k]]
        side_by_side(one, todo, self.workers, lambda item: item.feature.width)
