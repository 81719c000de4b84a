"""Sets of neurons that `ablation` scores: the selected, all others, and as many random ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import mask, probe
from spin_cli.config import AblateConfig
from spin_cli.workers import side_by_side

Columns = NDArray[np.intp]
Score = Callable[[Columns], float]


@dataclass(frozen=True)
class Point:
    """Scores at one eta."""

    eta: float
    neurons: int
    kept: float
    """With the selected neurons alone."""
    removed: float
    """With all but these."""
    random_kept: float
    random_kept_sd: float
    random_removed: float
    random_removed_sd: float
    sufficiency: float
    """Score of all neurons less ``kept``; small is good."""
    comprehensiveness: float
    """Score of all neurons less ``removed``; large is good."""


@dataclass(frozen=True)
class Groups:
    """Columns of a table, by the matrix that each stands in, most important first."""

    ordered: tuple[Columns, ...]
    """Columns with an importance, for each matrix."""
    shares: tuple[NDArray[np.float64], ...]
    """Cumulative share of the importance that they reach."""
    every: tuple[Columns, ...]
    """All columns of each matrix."""

    def top(self, eta: float) -> list[Columns]:
        """The mask of each matrix at *eta*."""
        pairs = zip(self.ordered, self.shares, strict=True)
        return [columns[: mask.count_for(shares, eta)] for columns, shares in pairs]

    def drawn(self, counts: Sequence[int], rng: np.random.Generator) -> list[Columns]:
        """As many random columns of each matrix."""
        pairs = zip(self.every, counts, strict=True)
        return [rng.permutation(columns)[:count] for columns, count in pairs]

    def others(self, columns: Sequence[Columns]) -> Columns:
        """All columns but these."""
        return np.setdiff1d(np.concatenate(self.every), np.concatenate(columns))


def measure(
    groups: Groups, score: Score, config: AblateConfig, step: Callable[[], None]
) -> list[Point]:
    """The score of every set of columns; random ones come from the seed, eta by eta."""
    sets: list[Columns] = [np.concatenate(groups.every)]
    for place, eta in enumerate(config.etas):
        top = groups.top(eta)
        sets += [np.concatenate(top), groups.others(top)]
        rng = np.random.default_rng([config.seed, place])
        for _ in range(config.draws):
            drawn = groups.drawn([len(columns) for columns in top], rng)
            sets += [np.concatenate(drawn), groups.others(drawn)]

    def one(columns: Columns) -> float:
        found = score(columns)
        step()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probe.ConvergenceWarning)  # as loose as in the search
        scores = side_by_side(one, sets, config.workers, len)
    whole, each = scores[0], 2 + 2 * config.draws
    points = []
    for place, eta in enumerate(config.etas):
        kept, removed, *random = scores[1 + place * each : 1 + (place + 1) * each]
        apart = np.array(random).reshape(-1, 2)
        mean, sd = apart.mean(0), apart.std(0, ddof=1 if len(apart) > 1 else 0)
        points.append(
            Point(
                eta=eta, neurons=len(sets[1 + place * each]), kept=kept, removed=removed,
                random_kept=float(mean[0]), random_kept_sd=float(sd[0]),
                random_removed=float(mean[1]), random_removed_sd=float(sd[1]),
                sufficiency=whole - kept, comprehensiveness=whole - removed,
            )
        )  # fmt: skip
    return points


def report(points: Sequence[Point], neurons: int, whole: float, none: float) -> dict[str, Any]:
    """What is said of one way: the score of all neurons and of none, and each point."""
    return {"neurons": neurons, "all": whole, "none": none, "points": [asdict(p) for p in points]}
