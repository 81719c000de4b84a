"""Proof that leaving the model early changes nothing: the same rows through all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from spin_cli.config import PredictConfig
from spin_cli.errors import ModelError
from spin_cli.prediction.predictor import Predictor, open_predictor

SHARE = {torch.float32: 1e-4}
HALF_SHARE = 5e-2
"""Difference allowed, as a share of a feature's largest value: sums are taken in another order."""


def check_exit(
    predictor: Predictor, folder: Path, config: PredictConfig, texts: Sequence[str]
) -> float:
    """Run *texts* through the whole model too and compare every neuron of the head.

    Returns
    -------
    float
        The largest difference, as a share of the largest value at its layer, site and pooling.

    Raises
    ------
    ModelError
        A neuron differs by more than rounding, or is NaN; its layer, site and pooling are named.
    """
    if not texts:
        return 0.0
    whole = open_predictor(folder, config, whole=True)
    encoded = predictor.encode(texts)
    found, expected = predictor.gather(encoded), whole.gather(encoded)
    predictor.rounded(found)  # a model that gives NaN is refused as such
    allowed = SHARE.get(predictor.model.dtype, HALF_SHARE)
    worst = 0.0
    for (layer, site, pooling), place in predictor.places.items():
        one, two = found[:, place.columns], expected[:, place.columns]
        share = float(np.abs(one - two).max() / max(np.abs(two).max(), 1e-12))
        if not share <= allowed:  # NaN too
            raise ModelError(
                f"--check-exit: {layer} {site.value} {pooling.value} differs by {share:.1%} of its"
                f" largest value between the first blocks alone and the whole of"
                f" {predictor.model.options.model}",
                "This is an error of spin: please report the model's architecture.",
            )
        worst = max(worst, share)
    return worst
