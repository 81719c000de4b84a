"""Which neurons matter: importance, and nested masks. Pure functions on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def importance(coef: NDArray[Any]) -> NDArray[np.float64]:
    """Importance (d,) of each neuron: its squared weight, summed over the classes of coef (K, d).

    Weights have to be those on standardised features, else a neuron's scale counts, not its use.
    """
    return np.asarray((coef.astype(np.float64) ** 2).sum(0))


def order(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Neurons of non-zero importance, most important first; of equals, the lower index first."""
    ranked = np.argsort(-values, kind="stable")
    return ranked[: int(np.count_nonzero(values))]


def cumulative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the total that is reached by the first 1, 2, … of *values* (in their order)."""
    total = values.sum()
    return np.cumsum(values) / total if total > 0 else np.zeros(len(values))


def count_for(shares: NDArray[np.float64], eta: float) -> int:
    """Fewest neurons whose cumulative importance reaches *eta* of the total.

    Masks of growing eta are nested, since all take from the front of one ordering.
    """
    if not len(shares) or shares[-1] <= 0:
        return 0
    # eta = 1 means all, whatever rounding made of the last sums
    if eta >= 1:
        return len(shares)
    # an ordering that was cut short may never reach eta: then all that is left of it
    return min(len(shares), int(np.searchsorted(shares, eta - 1e-12) + 1))
