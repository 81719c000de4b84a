"""What is settled before the first batch is run: data, model, matrices, number format, windows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from spin_cli import activations, artifacts, backbone, heap
from spin_cli.activations import Feature
from spin_cli.backbone import FLOAT16_MAX, Backbone
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import ExtractConfig, ModelConfig
from spin_cli.dataset import Dataset, Row, hash_sources, scan
from spin_cli.errors import ModelError, UsageError
from spin_cli.extraction.windows import read_rows_into
from spin_cli.ranges import check_ranges

logger = logging.getLogger(__name__)

WINDOW_BYTES = 64 * 2**20
"""The larger a window, the more alike in length are the texts of a batch: a deep model, of which
few texts fit, takes a seventh less time than with half of this."""
GPU_WINDOWS = 8
"""A GPU's windows may be so many times larger: its batches are, and main memory is not short. Of a
model with 2.4 MB a text they hold three batches, of 128 MiB they held less than one."""
MAX_WINDOW_ROWS = 8192
SAMPLE_ROWS = 512
TRIAL_TOKENS = 512
"""Tokens of real text that are read before the run, to see how large the activations are."""
HEADROOM = 2.0
"""Activations in the trial may reach this part of float16's largest number, no more."""


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first batch is run."""

    config: ExtractConfig
    dataset: Dataset
    model: Backbone
    features: tuple[Feature, ...]
    storage_dtype: StorageDtype
    window_rows: int
    request: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What a user should know about the plan."""

    @property
    def row_bytes(self) -> int:
        """Bytes that one text takes on the disk."""
        item = activations.DISK_DTYPES[self.storage_dtype].itemsize
        return sum(feature.width for feature in self.features) * item

    @cached_property  # asked for with every matrix that is written
    def windows(self) -> list[range]:
        """Row numbers of each window; they depend on the number of rows and the options alone."""
        rows = len(self.dataset)
        return [
            range(start, min(start + self.window_rows, rows))
            for start in range(0, rows, self.window_rows)
        ]


def plan(data: Path, config: ExtractConfig) -> Plan:
    """Scan the data, load the model, and settle what will be read.

    Raises
    ------
    SpinError
        `DataError` for the data, `ModelError` for the model, `UsageError` for options.
    """
    check_ranges(config.model)
    heap.settle()
    dataset = scan(data, config.data)
    model = backbone.load(config.model)
    config = _settled(config, model.options, model.layout.causal)
    features = choose_features(model, config)
    dtype, notes = choose_storage(dataset, model, features, config.storage_dtype)
    row_bytes = activations.DISK_DTYPES[dtype].itemsize * sum(f.width for f in features)
    room = WINDOW_BYTES * (1 if model.device.type == "cpu" else GPU_WINDOWS)
    window = max(64, min(MAX_WINDOW_ROWS, room // row_bytes, len(dataset)))
    request = {
        "model": model.identity,
        "data": [
            {"split": s.split, "path": str(s.path), "sha256": s.sha256, "rows": s.rows}
            for s in dataset.sources
        ],
        "options": artifacts.to_plain(config),
        "batching": {"window_rows": window, "batch_tokens": model.batch_tokens},
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "storage_dtype": dtype,
        "versions": artifacts.versions(),
    }
    logger.info(
        "activations: %d matrices as %s, written %d rows at a time",
        len(features), dtype.value, window,
    )  # fmt: skip
    return Plan(config, dataset, model, features, dtype, window, request, notes)


def foretell(data: Path, config: ExtractConfig, causal: bool) -> dict[str, Any]:
    """The part of `Plan.request` that is had without reading a row or loading a weight.

    It is enough to tell whether activations are still what *config* asks for. Where the model
    lies is left out if its hashes are known, and where the data lie.

    Parameters
    ----------
    causal : whether the model is a decoder, as the activations' manifest says
    """
    options, identity = backbone.identify(config.model)
    request = {
        "model": identity,
        "data": hash_sources(data, config.data),
        "options": artifacts.to_plain(_settled(config, options, causal)),
        "versions": artifacts.versions(),
    }
    return comparable(request)


def comparable(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request is compared with `foretell`."""
    model, options = dict(request["model"]), dict(request["options"])
    options["model"] = dict(options["model"])
    if model["weights"]:  # known by their hashes, wherever they lie
        for name in ("model", "adapter", "revision"):
            options["model"].pop(name)
        for name in ("id", "revision", "commit"):
            model.pop(name)
    data = {entry["split"]: entry["sha256"] for entry in request["data"]}
    return {
        "model": model, "data": data, "options": options, "versions": request["versions"]
    }  # fmt: skip


def _settled(config: ExtractConfig, model: ModelConfig, causal: bool) -> ExtractConfig:
    """With what the model says about its prompt, and with the poolings that fit it."""
    config = replace(config, model=model)
    if config.poolings is None:
        ends = Pooling.LAST if causal else Pooling.FIRST
        config = replace(config, poolings=(Pooling.MEAN, Pooling.MAX, ends))
    return config


def choose_features(model: Backbone, config: ExtractConfig) -> tuple[Feature, ...]:
    """Every (layer, site, pooling) that *config* asks for and the model has."""
    layout = model.layout
    layers = parse_layers(config.layers, layout.layers)
    for site in config.sites:
        for layer in layers:
            if problem := layout.problem(layer, site):
                raise ModelError(
                    f"{config.model.model}: {layer} {site.value}: {problem}",
                    "Give --site hidden, or --layers without this one.",
                )
    sites = list(config.sites)
    if Site.FFN in sites and Site.ROUTER not in sites:
        sites.append(Site.ROUTER)  # only the layers that have experts have it
    return tuple(
        Feature(layer, site, pooling, layout.width(layer, site), layout.hookpoint(layer, site))
        for layer in layers
        for site in sites
        if layout.width(layer, site)
        for pooling in ((Pooling.MEAN,) if site is Site.ROUTER else config.poolings or ())
    )


def hookpoints(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Where each site is read, alike module paths written as one, from (site, hookpoint) pairs."""
    by_site: dict[str, dict[str, None]] = {}
    for site, point in found:
        by_site.setdefault(site, {})[point] = None
    return {site: ", ".join(backbone.summarise(list(points))) for site, points in by_site.items()}


def parse_layers(text: str | None, names: Sequence[str]) -> list[str]:
    """Layer names for ``0-12``, ``0,3,6``, ``layer_03,final``; positions count from 0.

    Raises
    ------
    UsageError
        A number or name that the model does not have.
    """
    if text is None:
        return list(names)
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if part in names:
            chosen.add(names.index(part))
        elif (
            first.isdecimal()
            and (last or first).isdecimal()
            and int(first) <= int(last or first) < len(names)
        ):
            chosen.update(range(int(first), int(last or first) + 1))
        else:
            raise UsageError(
                f"--layers {text}: {part!r} is not a layer; the model has 0 to {len(names) - 1}"
                f" ({names[0]} … {names[-1]})"
            )
    return [names[index] for index in sorted(chosen)]


def sample_rows(dataset: Dataset) -> list[Row]:
    """About `SAMPLE_ROWS` rows, spread over the data set."""
    step = max(1, len(dataset) // SAMPLE_ROWS)
    return list(islice(dataset.rows(), 0, step * SAMPLE_ROWS, step))


def choose_storage(
    dataset: Dataset, model: Backbone, features: Sequence[Feature], wanted: StorageDtype | None
) -> tuple[StorageDtype, tuple[str, ...]]:
    """Settle the number format on the disk by a trial on a few texts.

    Where none is *wanted*, it is float16 if the largest activation of the trial
    leaves some room; else bfloat16 if the model computes in it (nothing is lost then), else
    float32.

    Raises
    ------
    ModelError
        float16 was asked for and the trial overflows it, or the trial gives NaN.
    """
    if wanted in (StorageDtype.FLOAT32, StorageDtype.BFLOAT16):
        return wanted, ()
    feature, largest = _largest(dataset, model, features)
    if largest * HEADROOM < FLOAT16_MAX:
        return StorageDtype.FLOAT16, ()
    found = f"{feature.layer} {feature.site.value} reaches {largest:,.0f} in a trial"
    if wanted is StorageDtype.FLOAT16:
        if largest < FLOAT16_MAX:
            return wanted, (f"{found}, near float16's limit of {FLOAT16_MAX:,.0f}",)
        raise ModelError(
            f"{found}; float16 ends at {FLOAT16_MAX:,.0f}",
            "Leave --storage-dtype out, or give bfloat16 or float32.",
        )
    lossless = str(model.dtype) == "torch.bfloat16"
    chosen = StorageDtype.BFLOAT16 if lossless else StorageDtype.FLOAT32
    return chosen, (f"{found}: stored as {chosen.value}, since float16 could overflow",)


def _largest(
    dataset: Dataset, model: Backbone, features: Sequence[Feature]
) -> tuple[Feature, float]:
    """The feature with the largest absolute value in a trial on real texts, and that value."""
    encoded = backbone.encode(model, [row.text for row in islice(dataset.rows(), 32)])
    count, tokens = 0, 0
    while count < len(encoded) and (not count or tokens < TRIAL_TOKENS):
        tokens += encoded[count].n_tokens
        count += 1
    blocks = read_rows_into(model, encoded[:count], features)
    peaks = {feature: float(np.abs(block).max()) for feature, block in blocks.items()}
    for feature, peak in peaks.items():
        if not np.isfinite(peak):
            raise ModelError(
                f"{feature.layer} {feature.site.value}: {peak} in a trial on the first {count}"
                f" texts, computed in {str(model.dtype).removeprefix('torch.')}",
                "Try --dtype float32; a model that gives NaN in float32 is damaged.",
            )
    worst = max(peaks, key=lambda feature: peaks[feature])
    return worst, peaks[worst]
