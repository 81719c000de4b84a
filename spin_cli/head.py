"""The trained head on disk: neuron indices, weights, and all that ``predict`` has to know.

A head may come from a stranger, so nothing in it is believed: names, shapes, ranges and sizes are
checked before use, and no file of it can run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spin_cli.artifacts import read_json, write_json
from spin_cli.config import Pooling, Site, StorageDtype
from spin_cli.errors import ArtifactError

CONFIG, WEIGHTS, METRICS, CARD = "config.json", "head.safetensors", "metrics.json", "README.md"
MAX_WIDTH, MAX_CLASSES, MAX_FEATURES = 2**20, 10_000, 10_000


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
        return f"neurons.{self.layer}.{self.site.value}.{self.pooling.value}"


@dataclass(frozen=True)
class Head:
    """A linear classifier on neurons of a frozen model."""

    classes: tuple[str, ...]
    features: tuple[HeadFeature, ...]
    weight: NDArray[np.float32]
    """(K, n) on raw features, in the order of ``features``; K = 1 for two classes."""
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
    """How texts are read: the model options of ``extract``."""

    @property
    def neurons(self) -> int:
        """Number of neurons read."""
        return sum(len(feature.neurons) for feature in self.features)

    def logits(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Logits (B, K) of gathered neurons (B, n).

        Summed in float64: raw features with a large mean cancel against the bias.
        """
        return np.asarray(values.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias)


def save_head(folder: Path, head: Head) -> None:
    """Write ``config.json`` and ``head.safetensors`` into *folder*."""
    write_json(
        folder / CONFIG,
        {
            "classes": head.classes,
            "features": [
                {
                    "layer": f.layer,
                    "site": f.site,
                    "pooling": f.pooling,
                    "width": f.width,
                    "neurons": len(f.neurons),
                }
                for f in head.features
            ],
            "threshold": head.threshold,
            "blocks": head.blocks,
            "storage_dtype": head.storage_dtype,
            "model": head.model,
            "reading": head.reading,
        },
    )
    tensors: dict[str, NDArray[Any]] = {f.key: f.neurons for f in head.features}
    save_file(tensors | {"weight": head.weight, "bias": head.bias}, folder / WEIGHTS)


def load_head(folder: Path) -> Head:
    """Read a head and check all of it.

    Raises
    ------
    ArtifactError
        Anything is missing, of the wrong type, shape or range, or not finite.
    """
    config = read_json(folder / CONFIG)
    try:
        entries = config["features"]
        if not isinstance(entries, list) or not 0 < len(entries) <= MAX_FEATURES:
            raise ValueError("features: expected a list of layers, sites and poolings")
        names = [
            (
                str(e["layer"]),
                Site(e["site"]),
                Pooling(e["pooling"]),
                _integer(e["width"]),
                _integer(e["neurons"]),
            )
            for e in entries
        ]
        tensors = _read_tensors(folder / WEIGHTS, {_key(*name[:3]) for name in names})
        head = Head(
            classes=tuple(_checked_classes(config["classes"])),
            features=tuple(_checked_feature(name, tensors) for name in names),
            weight=tensors["weight"],
            bias=tensors["bias"],
            threshold=_checked_threshold(config["threshold"]),
            blocks=blocks_needed([name[0] for name in names]),
            storage_dtype=StorageDtype(config["storage_dtype"]),
            model=_checked_object(config, "model"),
            reading=_checked_reading(config),
        )
        if head.blocks != config["blocks"]:
            raise ValueError(f"blocks: {config['blocks']!r}, its layers need {head.blocks}")
        _check_shapes(head)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(
            f"{folder}: not a valid head ({what})", "Make it again: spin train … --force"
        ) from error
    return head


def blocks_needed(layers: Sequence[str]) -> int | None:
    """Blocks to load for *layers*; None (all) for encoder-decoders and the final norm."""
    numbers = [re.fullmatch(r"layer_(\d{2,4})", name) for name in layers]
    if not all(numbers):
        return None
    # A model without any block is no model that transformers can build.
    return max(1, *(int(found[1]) for found in numbers if found))


def _key(layer: str, site: Site, pooling: Pooling) -> str:
    return f"neurons.{layer}.{site.value}.{pooling.value}"


def _read_tensors(path: Path, keys: set[str]) -> dict[str, NDArray[Any]]:
    expected = keys | {"weight", "bias"}
    try:
        with safe_open(path, "np") as file:
            if set(file.keys()) != expected:
                raise ValueError(f"{path.name} does not hold the tensors that {CONFIG} lists")
            return {key: file.get_tensor(key) for key in sorted(expected)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _checked_classes(value: Any) -> list[str]:
    if (
        not isinstance(value, list)
        or not 2 <= len(value) <= MAX_CLASSES
        or not all(isinstance(name, str) for name in value)
        or len(set(value)) != len(value)
    ):
        raise ValueError("classes: expected a list of two or more different names")
    return value


def _checked_object(config: Any, name: str) -> dict[str, Any]:
    if not isinstance(config[name], dict):
        raise ValueError(f"{name}: expected an object")
    return dict(config[name])


def _checked_reading(config: Any) -> dict[str, Any]:
    reading = _checked_object(config, "reading")
    length, template = reading["max_length"], reading["prompt_template"]
    if type(length) is not int or not 1 <= length <= 10**8:
        raise ValueError(f"max_length: {length!r} is not a number of tokens")
    if template is not None and (type(template) is not str or template.count("{text}") != 1):
        raise ValueError("prompt_template: expected text with one {text} in it")
    if type(reading["revision"]) not in (str, type(None)) or type(reading["model"]) is not str:
        raise ValueError("model, revision: expected text")
    return reading


def _checked_threshold(value: Any) -> float | None:
    if value is None:
        return None
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"threshold: {value} is not from 0 to 1")
    return float(value)


def _checked_feature(
    name: tuple[str, Site, Pooling, int, int], tensors: Mapping[str, NDArray[Any]]
) -> HeadFeature:
    layer, site, pooling, width, count = name
    neurons = tensors[_key(layer, site, pooling)]
    right = neurons.dtype == np.int32 and neurons.shape == (count,) and 0 < count <= width
    if not right or width > MAX_WIDTH or neurons.min() < 0 or neurons.max() >= width:
        raise ValueError(
            f"{layer} {site.value} {pooling.value}: neurons do not fit its width {width}"
        )
    return HeadFeature(layer, site, pooling, width, neurons)


def _check_shapes(head: Head) -> None:
    outputs = 1 if len(head.classes) == 2 else len(head.classes)
    if head.weight.shape != (outputs, head.neurons) or head.weight.dtype != np.float32:
        raise ValueError(f"weight: expected float32 of shape {(outputs, head.neurons)}")
    if head.bias.shape != (outputs,) or head.bias.dtype != np.float64:
        raise ValueError(f"bias: expected float64 of shape {(outputs,)}")
    if not (np.isfinite(head.weight).all() and np.isfinite(head.bias).all()):
        raise ValueError("weights are not finite")
    if head.blocks is not None:
        deepest = max(int(f.layer.removeprefix("layer_")) for f in head.features)
        if head.blocks != max(1, deepest):
            raise ValueError(f"blocks: {head.blocks} does not fit layer {deepest}")
