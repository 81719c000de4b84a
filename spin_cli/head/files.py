"""The trained head on disk, as ``config.json`` and ``head.safetensors``.

A head may come from a stranger, so nothing in it is believed: names, shapes, ranges and sizes are
checked before use, and no file of it can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spin_cli.artifacts import read_json
from spin_cli.atomic import write_json
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import MAX_CLASSES, MAX_OVERLAP, MAX_SEPARATOR, MAX_WIDTH
from spin_cli.errors import ArtifactError
from spin_cli.head.model import Head, HeadFeature, blocks_needed, tensor_key

CONFIG, WEIGHTS, METRICS, CARD = "config.json", "head.safetensors", "metrics.json", "README.md"
LABELS = "labels.json"
"""Of an exported head: its classes, and how its probabilities become answers."""
HIDDEN = ("hidden.weight", "hidden.bias")
"""Names of the hidden units' tensors."""
MAX_FEATURES, MAX_HIDDEN = 10_000, 2**16


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
            "hidden": 0 if head.hidden is None else len(head.hidden[1]),
            "threshold": head.threshold,
            "abstain_below": head.abstain_below,
            "blocks": head.blocks,
            "storage_dtype": head.storage_dtype,
            "model": head.model,
            "reading": head.reading,
        }
        | _labels_entry(head),
    )
    tensors: dict[str, NDArray[Any]] = {f.key: f.neurons for f in head.features}
    if head.hidden is not None:
        tensors |= dict(zip(HIDDEN, head.hidden, strict=True))
    save_file(tensors | {"weight": head.weight, "bias": head.bias}, folder / WEIGHTS)


def _labels_entry(head: Head) -> dict[str, Any]:
    if head.thresholds is None:
        return {}
    return {
        "multi_label": True,
        "thresholds": dict(zip(head.classes, head.thresholds.tolist(), strict=True)),
        "label_separator": head.label_separator,
    }


def load_head(folder: Path) -> Head:
    """Read a head and check all of it.

    Raises
    ------
    ArtifactError
        Anything is missing, of the wrong type, shape or range, or not finite.
    """
    config = read_json(folder / CONFIG, strict=True)
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
        units = _integer(config["hidden"])
        if not 0 <= units <= MAX_HIDDEN:
            raise ValueError(f"hidden: {units} is not from 0 to {MAX_HIDDEN}")
        keys = {tensor_key(*name[:3]) for name in names} | set(HIDDEN if units else ())
        tensors = _read_tensors(folder / WEIGHTS, keys)
        head = Head(
            classes=tuple(_checked_classes(config["classes"])),
            features=tuple(_checked_feature(name, tensors) for name in names),
            weight=tensors["weight"],
            bias=tensors["bias"],
            hidden=(tensors[HIDDEN[0]], tensors[HIDDEN[1]]) if units else None,
            threshold=_checked_share(config, "threshold"),
            abstain_below=_checked_share(config, "abstain_below"),
            blocks=blocks_needed([name[0] for name in names]),
            storage_dtype=StorageDtype(config["storage_dtype"]),
            model=_checked_object(config, "model"),
            reading=_checked_reading(config),
            **_checked_labels(config),
        )
        if head.blocks != config["blocks"]:
            raise ValueError(f"blocks: {config['blocks']!r}, its layers need {head.blocks}")
        _check_shapes(head, units)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(
            f"{folder}: not a valid head ({what})", "Make it again: spin train … --force"
        ) from error
    return head


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


def _checked_labels(config: Any) -> dict[str, Any]:
    """What a multi-label head says besides; nothing for the others."""
    kind = config.get("multi_label", False)
    if type(kind) is not bool:
        raise ValueError("multi_label: expected true or false")
    if not kind:
        if "thresholds" in config or "label_separator" in config:
            raise ValueError("thresholds, label_separator: of multi-label heads only")
        return {}
    classes, given, separator = config["classes"], config["thresholds"], config["label_separator"]
    if not isinstance(given, dict) or list(given) != list(classes):
        raise ValueError("thresholds: expected one for each class, in their order")
    values = [_checked_share(given, name) for name in classes]
    if None in values or config["threshold"] is not None:
        raise ValueError("thresholds: expected numbers, and no single threshold beside them")
    if type(separator) is not str or not 0 < len(separator) <= MAX_SEPARATOR:
        raise ValueError(f"label_separator: expected 1 to {MAX_SEPARATOR} characters")
    if any(separator in name for name in classes):
        raise ValueError("label_separator: a class's name holds it")
    return {"thresholds": np.array(values, np.float64), "label_separator": separator}


def _checked_object(config: Any, name: str) -> dict[str, Any]:
    if not isinstance(config[name], dict):
        raise ValueError(f"{name}: expected an object")
    return dict(config[name])


def _checked_reading(config: Any) -> dict[str, Any]:
    reading = _checked_object(config, "reading")
    if not reading:
        return reading
    length, template = reading["max_length"], reading["prompt_template"]
    if type(length) is not int or not 1 <= length <= 10**8:
        raise ValueError(f"max_length: {length!r} is not a number of tokens")
    if template is not None and (type(template) is not str or template.count("{text}") != 1):
        raise ValueError("prompt_template: expected text with one {text} in it")
    overlap = reading["overlap"]
    if type(overlap) is not float or not 0.0 <= overlap <= MAX_OVERLAP:
        raise ValueError(f"overlap: {overlap!r} is not a share from 0 to {MAX_OVERLAP}")
    for name in ("chat", "special_tokens"):
        if type(reading[name]) is not bool:
            raise ValueError(f"{name}: expected true or false")
    if type(reading["adapter"]) not in (str, type(None)):
        raise ValueError("adapter: expected a path")
    if type(reading["revision"]) not in (str, type(None)) or type(reading["model"]) is not str:
        raise ValueError("model, revision: expected text")
    return reading


def _checked_share(config: Any, name: str) -> float | None:
    value = config[name]
    if value is None:
        return None
    if type(value) not in (int, float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: {value!r} is not from 0 to 1")
    return float(value)


def _checked_feature(
    name: tuple[str, Site, Pooling, int, int], tensors: Mapping[str, NDArray[Any]]
) -> HeadFeature:
    layer, site, pooling, width, count = name
    neurons = tensors[tensor_key(layer, site, pooling)]
    right = neurons.dtype == np.int32 and neurons.shape == (count,) and 0 < count <= width
    if not right or width > MAX_WIDTH or neurons.min() < 0 or neurons.max() >= width:
        raise ValueError(
            f"{layer} {site.value} {pooling.value}: neurons do not fit its width {width}"
        )
    return HeadFeature(layer, site, pooling, width, neurons)


def _check_shapes(head: Head, units: int) -> None:
    outputs = head.outputs
    if head.hidden is not None:
        _check_tensor(HIDDEN[0], head.hidden[0], np.float32, (units, head.neurons))
        _check_tensor(HIDDEN[1], head.hidden[1], np.float64, (units,))
    _check_tensor("weight", head.weight, np.float32, (outputs, units or head.neurons))
    _check_tensor("bias", head.bias, np.float64, (outputs,))


def _check_tensor(name: str, tensor: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name}: expected {np.dtype(dtype).name} of shape {shape}")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name}: weights are not finite")
