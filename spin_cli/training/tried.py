"""How a search ended, and every head that it tried as ``metrics.json`` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.choices import Pooling, site_name, sites_of
from spin_cli.training.calibration import OUT_OF_FOLD, Evidence
from spin_cli.training.inputs import Inputs
from spin_cli.training.pick import Judged, Part, frontier, score
from spin_cli.training.table import Choice


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    best: Judged
    tried: list[Judged]
    """Judged on val rows."""
    crossed: list[Judged]
    """Judged on out-of-fold rows; empty without cross-validation."""
    evidence: Evidence
    refit: bool


def list_candidates(found: Found, inputs: Inputs) -> list[dict[str, Any]]:
    """Every head that was tried, best first; those judged out of fold before the others."""
    listed = []
    val = inputs.codes[inputs.rows["val"]]
    for items, y, what in (
        (found.crossed, inputs.codes[inputs.search_rows], OUT_OF_FOLD),
        (found.tried, val, "val"),
    ):
        chosen = items is (found.crossed or found.tried)
        entries = [_listed(item, found, inputs, y, chosen) | {"judged_on": what} for item in items]
        listed += sorted(entries, key=lambda e: (-e["score"], e["log_loss"]))
    return listed


def list_frontier(found: Found, inputs: Inputs) -> list[dict[str, Any]]:
    """What is had for less depth and fewer neurons, on the rows that the choice was made on."""
    y = inputs.codes[inputs.search_rows if found.crossed else inputs.rows["val"]]
    items = frontier(found.crossed or found.tried, y)
    return [_listed(item, found, inputs, y) for item in items]


def _listed(
    item: Judged, found: Found, inputs: Inputs, y: NDArray[np.int64], here: bool = True
) -> dict[str, Any]:
    """A candidate as plain values, marked if the choice was made *here* and it is the chosen one.

    Known by its parts, since fitting it to all rows may have left fewer neurons.
    """
    mark = {"chosen": True} if here and item.parts == found.best.parts else {}
    return describe(item, inputs, y) | mark


def describe(item: Judged, inputs: Inputs, y: NDArray[np.int64]) -> dict[str, Any]:
    """A candidate as plain values."""
    entry = _describe_part(item.main, inputs) | {
        "depth": item.depth,
        "layer": inputs.layers[item.depth],
        "neurons": item.neurons,
        "score": round(score(inputs.metric, y, item.probs), 6),
        "log_loss": round(metrics.log_loss(y, item.probs), 6),
    }
    if item.linear is not None:
        entry["matrices"] = len(item.linear.features)
    if len(item.parts) > 1:
        entry["parts"] = [
            _describe_part(p, inputs) | {"share": round(p.share, 6)} for p in item.parts
        ]
        for part, described in zip(item.parts, entry["parts"], strict=True):
            if part.whole and item.linear is not None:
                described["matrices"] = len(item.linear.features)
    return entry


def _describe_part(part: Part, inputs: Inputs) -> dict[str, Any]:
    choice = part.choice
    return {
        "site": choice.site,
        "pooling": "+".join(pooling.value for pooling in choice.poolings),
        "eta": choice.eta,
        "depth": choice.depth,
        "layer": inputs.layers[choice.depth],
        "strength": part.strength,
    }


def choices_of(entry: Mapping[str, Any]) -> list[Choice]:
    """What each part of a head reads that `describe` told of.

    `KeyError`, `TypeError` or `ValueError` where it told of none.
    """
    return [
        Choice(
            site_name(sites_of(part["site"])),
            tuple(Pooling(name) for name in part["pooling"].split("+")),
            float(part["eta"]),
            int(part["depth"]),
        )
        for part in entry.get("parts", [entry])
    ]
