"""How far the masks of a selection agree: between poolings, and between classes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import mask, selected

Sets = dict[tuple[str, str, str], tuple[set[int], int]]
"""By layer, site and pooling: the neurons of a mask, and the width of the matrix."""


def jaccard(one: set[int], other: set[int]) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets."""
    union = len(one | other)
    return len(one & other) / union if union else 0.0


def by_chance(one: int, other: int, width: int) -> float:
    """About what `jaccard` is for two random sets of these sizes out of *width* neurons."""
    both = one * other / width
    union = one + other - both
    return both / union if union else 0.0


def overlaps(folder: Path, eta: float, classes: list[str]) -> dict[str, Any]:
    """Mean Jaccard index of masks at *eta*, between poolings and between classes.

    A class's mask is what reaches *eta* of that class's own importance.

    Returns
    -------
    dict
        ``eta``; ``poolings``: for each site and pair of poolings, over layers; ``classes``: for
        each pair of classes, over all matrices (none for two classes, which share one weight).
        Each has ``jaccard`` and ``chance``, what random masks of the same sizes would give.

    Raises
    ------
    ArtifactError
        ``masks.h5`` is not what `spin select` writes.
    """
    found: Sets = {}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with selected.open_masks(folder) as file:
        for key in selected.matrices(file):
            one = selected.read_mask(file, key)
            count = mask.count_for(one.cumulative, eta)
            found[key] = ({int(n) for n in one.neurons[:count]}, one.width)
            if len(classes) > 2:
                importance = selected.read_class_importance(file, key, one, len(classes))
                if importance is not None:
                    _add_classes(pairs, importance, one.neurons, classes, eta, one.width)
    return {
        "eta": eta,
        "poolings": _between_poolings(found),
        "classes": [{"classes": list(pair), **_mean(each)} for pair, each in pairs.items()],
    }


def _add_classes(
    pairs: dict[tuple[str, str], list[tuple[float, float]]],
    importance: NDArray[Any],
    neurons: NDArray[Any],
    classes: list[str],
    eta: float,
    width: int,
) -> None:
    sets = []
    for row in importance:
        order = mask.order(row)
        count = mask.count_for(mask.cumulative(row[order]), eta)
        sets.append({int(n) for n in neurons[order[:count]]})
    named = list(zip(classes, sets, strict=True))
    for (one, a), (other, b) in combinations(named, 2):
        if a or b:
            pair = jaccard(a, b), by_chance(len(a), len(b), width)
            pairs.setdefault((one, other), []).append(pair)


def _between_poolings(found: Sets) -> list[dict[str, Any]]:
    places: dict[tuple[str, str], dict[str, tuple[set[int], int]]] = {}
    for (layer, site, pooling), entry in found.items():
        places.setdefault((layer, site), {})[pooling] = entry
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for (_layer, site), masks in places.items():
        for one, other in combinations(sorted(masks), 2):
            (a, width), (b, _) = masks[one], masks[other]
            if a or b:
                pair = jaccard(a, b), by_chance(len(a), len(b), width)
                pairs.setdefault((site, one, other), []).append(pair)
    return [
        {"site": site, "poolings": [one, other], **_mean(each)}
        for (site, one, other), each in pairs.items()
    ]


def _mean(pairs: list[tuple[float, float]]) -> Mapping[str, Any]:
    values = np.array(pairs)
    return {"jaccard": float(values[:, 0].mean()), "chance": float(values[:, 1].mean())}
