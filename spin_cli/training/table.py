"""Masked neurons of many layers as one table, of which every candidate head reads a subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import activations, hdf5, mask, selected
from spin_cli.activations import Feature
from spin_cli.choices import Pooling, StorageDtype, site_name, sites_of


@dataclass(frozen=True)
class Choice:
    """One candidate head: what it reads."""

    site: str
    """One, or several side by side, as `site_name` calls them."""
    poolings: tuple[Pooling, ...]
    """One, or several side by side."""
    eta: float
    depth: int
    """Position of the last layer read, in the model's order of layers."""

    def reads(self, feature: Feature, position: int) -> bool:
        """Whether a matrix of the layer at *position* is among what it reads."""
        return (
            feature.site in sites_of(self.site)
            and feature.pooling in self.poolings
            and position <= self.depth
        )


def together(choices: Sequence[Choice]) -> Choice:
    """The least choice that reads all that some do."""
    return Choice(
        site_name({site for choice in choices for site in sites_of(choice.site)}),
        tuple(dict.fromkeys(pooling for choice in choices for pooling in choice.poolings)),
        max(choice.eta for choice in choices),
        max(choice.depth for choice in choices),
    )


@dataclass(frozen=True)
class Ranked:
    """A matrix's neurons by importance, as ``select`` stored them."""

    feature: Feature
    neurons: NDArray[np.int32]
    cumulative: NDArray[np.float64]
    C: float
    """Of the probe; 0 where no column says anything about the classes."""
    val_score: float

    def top(self, eta: float) -> NDArray[np.int32]:
        """The mask at *eta*, most important first."""
        return self.neurons[: mask.count_for(self.cumulative, eta)]


def read_masks(source: Path, features: Sequence[Feature]) -> dict[Feature, Ranked]:
    """Read every mask of a selection; `ArtifactError` where one is missing or out of range."""
    ranked = {}
    with selected.open_masks(source) as file:
        for feature in features:
            found = selected.read_mask(file, feature.key, feature.width)
            values = [hdf5.number(file, "/".join(feature.key), name) for name in ("C", "val_score")]
            ranked[feature] = Ranked(feature, found.neurons, found.cumulative, *values)
    return ranked


class Reader:
    """Gathers columns of the activations of some rows, and keeps what it has read.

    Holding the rows here is what keeps the test split out of reach until a choice is made: the
    search is given a reader of train and val rows alone.
    """

    def __init__(
        self,
        source: Path,
        ranked: Mapping[Feature, Ranked],
        layers: Sequence[str],
        n_rows: int,
        rows: NDArray[np.intp],
        dtype: StorageDtype,
    ) -> None:
        self.ranked, self.layers = ranked, layers
        self._source, self._n_rows, self._rows, self._dtype = source, n_rows, rows, dtype
        self._kept: dict[Feature, NDArray[Any]] = {}

    def matching(self, choice: Choice) -> list[Ranked]:
        """The matrices that *choice* reads, in the model's order of layers."""
        position = {name: index for index, name in enumerate(self.layers)}
        found = [
            item
            for feature, item in self.ranked.items()
            if choice.reads(feature, position[feature.layer])
        ]
        return [item for item in found if len(item.top(choice.eta))]

    def union(self, choices: Sequence[Choice]) -> list[tuple[Ranked, int]]:
        """The matrices that *choices* read together, and how many neurons of each.

        Masks are nested, so that of several the widest holds the others.
        """
        widest: dict[Feature, int] = {}
        for choice in choices:
            for item in self.matching(choice):
                count = len(item.top(choice.eta))
                widest[item.feature] = max(count, widest.get(item.feature, 0))
        return [(self.ranked[f], widest[f]) for f in self.ranked if f in widest]

    def count(self, *choices: Choice) -> int:
        """How many columns *choices* read together."""
        return sum(count for _, count in self.union(choices))

    def whole(self, feature: Feature) -> NDArray[Any]:
        """All columns of one matrix, (rows, F)."""
        return activations.read_matrix(self._source, feature, self._n_rows, self._dtype)[self._rows]

    def ranked_columns(self, item: Ranked, count: int) -> NDArray[Any]:
        """The columns of an item's *count* most important neurons, in this order."""
        kept = self._kept.get(item.feature)
        if kept is None or kept.shape[1] < count:
            # Row by row in memory, unlike `values[:, neurons]`, and in a third of its time.
            kept = np.take(self.whole(item.feature), item.neurons[:count], axis=1)
            self._kept[item.feature] = kept
        return kept[:, :count]

    def prepare(self, choices: Sequence[Choice]) -> None:
        """Read what *choices* need, once: threads that gather it then only share it."""
        for item, count in self.union(choices):
            self.ranked_columns(item, count)

    def gather(self, *choices: Choice) -> NDArray[Any]:
        """The columns that *choices* read together, (rows, n), in the order of `union`."""
        parts = [self.ranked_columns(item, count) for item, count in self.union(choices)]
        return np.hstack(parts) if parts else np.empty((len(self._rows), 0), np.float32)

    def with_ranking(self, ranked: Mapping[Feature, Ranked]) -> Reader:
        """A reader of the same rows that goes by another ranking."""
        return Reader(self._source, ranked, self.layers, self._n_rows, self._rows, self._dtype)

    def forget(self) -> None:
        """Drop the columns that were kept."""
        self._kept.clear()
