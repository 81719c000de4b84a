"""Stage 1: from texts to the activations of every layer, in HDF5."""

from spin_cli.extraction.forecast import estimate
from spin_cli.extraction.partial import progress_of
from spin_cli.extraction.planning import (
    Plan,
    choose_features,
    comparable,
    foretell,
    hookpoints,
    parse_layers,
    plan,
)
from spin_cli.extraction.stage import extract, run
from spin_cli.extraction.windows import compute_window

__all__ = [
    "Plan",
    "choose_features",
    "comparable",
    "compute_window",
    "estimate",
    "extract",
    "foretell",
    "hookpoints",
    "parse_layers",
    "plan",
    "progress_of",
    "run",
]
