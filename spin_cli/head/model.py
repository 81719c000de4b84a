"""The trained head: neurons, weights, and how its numbers become probabilities and answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import metrics
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import UsageError
from spin_cli.ranges import SHARE

CELLS = 10_000_000
"""Values of which logits are computed at once: each is held in float64."""


@dataclass(frozen=True)
class HeadFeature:
    """The neurons that a head reads at one layer, site and pooling."""

    layer: str
    site: Site
    pooling: Pooling
    width: int
    neurons: NDArray[np.int32]
    """(n,) indices into the layer's vector."""

    @property
    def key(self) -> str:
        """Name of the tensor that holds the indices."""
        return tensor_key(self.layer, self.site, self.pooling)


@dataclass(frozen=True)
class Head:
    """A classifier on neurons of a frozen model: linear, or with one layer of hidden units.

    How its numbers become probabilities and labels is decided here. `prediction.program` says it
    again as tensors, for other programs; `spin export` compares what it writes with what is said
    here. Calibration needs no field of its own: a temperature is folded into the last layer's
    weights.
    """

    classes: tuple[str, ...]
    features: tuple[HeadFeature, ...]
    weight: NDArray[np.float32]
    """(K, n) on raw features, in the order of ``features``; K = 1 for two classes, else one for
    each class or label. With hidden units (K, m) on these."""
    bias: NDArray[np.float64]
    """(K,)"""
    threshold: float | None
    """Two classes: probability of the second from which it is predicted; None: the likelier."""
    blocks: int | None
    """Blocks of the model that are needed; None: all."""
    storage_dtype: StorageDtype
    """Features are rounded to this before use, as those were that the head was trained on."""
    model: Mapping[str, Any]
    """Identity of the model, as in the activations' manifest."""
    reading: Mapping[str, Any]
    """How texts are read: the model options of ``extract``. Empty: nobody knows, for another
    program wrote the activations."""
    hidden: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None
    """Weights (m, n) on raw features and biases (m,) of rectified hidden units; None: linear."""
    abstain_below: float | None = None
    """Probability of the answer (`certainty`) under which none is given; None: always answer."""
    thresholds: NDArray[np.float64] | None = None
    """(L,) probability from which each label is given, where a text may have any number of them;
    None: one of the classes."""
    first_threshold: float | None = None
    """Two classes: probability of the first from which it is predicted, in place of ``threshold``;
    not stored."""
    label_separator: str | None = None
    """What stood between the labels of a text it was trained on."""

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of the classes."""
        return self.thresholds is not None

    @property
    def limits(self) -> metrics.Threshold:
        """The threshold of two classes, those of labels, or none, as trained."""
        return self.threshold if self.thresholds is None else self.thresholds

    @property
    def rule(self) -> metrics.Threshold | metrics.OfFirst:
        """What `decide` decides by."""
        return (
            self.limits if self.first_threshold is None else metrics.OfFirst(self.first_threshold)
        )

    def limit(self, code: int) -> float | None:
        """Probability from which a class or label is given; None: where it is the likeliest."""
        if self.thresholds is not None:
            return float(self.thresholds[code])
        if self.first_threshold is not None:
            return self.first_threshold if code == 0 else 1.0 - self.first_threshold
        if self.threshold is None:
            return None
        return self.threshold if code == 1 else 1.0 - self.threshold

    def deciding_at(self, limits: Mapping[str, float]) -> Head:
        """The same head with other decision thresholds; no probability changes.

        Parameters
        ----------
        limits : mapping
            Probabilities, from 0 to 1, from which a class is given: of one of two classes, or of
            any labels; the other labels keep theirs.

        Raises
        ------
        UsageError
            There is no such class, no such number, or the likeliest of more than two is given.
        """
        if not isinstance(limits, Mapping):
            raise UsageError(f"decision thresholds {limits!r}: expected a probability by class")
        for name, limit in limits.items():
            if name not in self.classes:
                raise UsageError(
                    f"decision threshold of {name!r}: the head's classes are"
                    f" {', '.join(self.classes)}"
                )
            if not isinstance(limit, (int, float)):
                raise UsageError(f"decision threshold {name} = {limit!r}: expected a number")
            SHARE.check(f"decision threshold {name} =", limit)
        codes = [self.classes.index(name) for name in limits]
        if self.thresholds is not None:
            changed = self.thresholds.copy()
            changed[codes] = list(limits.values())
            return replace(self, thresholds=changed)
        if len(self.classes) != 2:
            raise UsageError(
                f"a decision threshold is for two classes, or for labels: of {len(self.classes)}"
                " classes the likeliest is given"
            )
        if len(codes) != 1:
            raise UsageError(
                "a decision threshold for each of two classes: give it for one, the other class has"
                " the rest"
            )
        limit = float(next(iter(limits.values())))
        if codes == [0]:
            return replace(self, first_threshold=limit)
        return replace(self, threshold=limit, first_threshold=None)

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return 1 if len(self.classes) == 2 and not self.multi_label else len(self.classes)

    @property
    def neurons(self) -> int:
        """Number of neurons read."""
        return sum(len(feature.neurons) for feature in self.features)

    @property
    def reads_text(self) -> bool:
        """Whether it is known how a text becomes the neurons it reads."""
        return bool(self.reading)

    def logits(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (B, K) of gathered neurons (B, n).

        Summed in float64: raw features with a large mean cancel against the bias.
        """
        x = values.astype(np.float64)
        if self.hidden is not None:
            x = np.maximum(x @ self.hidden[0].T.astype(np.float64) + self.hidden[1], 0.0)
        return np.asarray(x @ self.weight.T.astype(np.float64) + self.bias)

    def probabilities(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Class probabilities (B, n_classes) of gathered neurons (B, n).

        Those of labels are independent of one another. Computed a block of rows at a time, so that
        there need not be room for all values in float64.
        """
        kind = "labels" if self.multi_label else "multinomial"
        blocks = np.array_split(values, 1 + values.size // CELLS)
        return np.vstack(
            [metrics.probabilities(self.logits(b), len(self.classes), kind) for b in blocks]
        )

    def decide(self, probs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Predicted class codes (B,) for `probabilities`; labels: (B, L), 1 where one is given."""
        return np.asarray(metrics.decide(probs, self.rule), np.int64)

    def names(self, given: NDArray[np.int64]) -> list[str]:
        """The labels of one row (L,) of `decide`."""
        return [name for name, there in zip(self.classes, given, strict=True) if there]

    def certainty(self, probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability (B,) that the answer is right: that of the chosen class.

        With labels, that exactly the given ones apply, taken as independent.
        """
        return metrics.certainty(probs, self.decide(probs))

    def abstains(self, probs: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Rows (B,) of `probabilities` for which the chosen label is too uncertain to be given."""
        return np.asarray(self.certainty(probs) < (self.abstain_below or 0.0))

    def answered(self, y: NDArray[np.int64], probs: NDArray[np.float64]) -> dict[str, float]:
        """Share of rows that get an answer, and the accuracy of these answers (NaN of none).

        *y*: true class codes (B,), or (B, L), 1 where a label applies; *probs*: `probabilities`.
        """
        given = ~self.abstains(probs)
        right = metrics.right(y, self.decide(probs))
        return {
            "share": float(given.mean()),
            "accuracy": float(right[given].mean()) if given.any() else float("nan"),
        }


def tensor_key(layer: str, site: Site, pooling: Pooling) -> str:
    """Name of the tensor that holds the neurons' indices."""
    return f"neurons.{layer}.{site.value}.{pooling.value}"


def blocks_needed(layers: Sequence[str]) -> int | None:
    """Blocks to load for *layers*; None (all) for encoder-decoders and the final norm."""
    numbers = [re.fullmatch(r"layer_(\d{2,4})", name) for name in layers]
    if not all(numbers):
        return None
    # A model without any block is no model that transformers can build.
    return max(1, *(int(found[1]) for found in numbers if found))
