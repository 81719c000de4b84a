"""Stage 1: from texts to the activations of every layer, in HDF5.

Rows are worked through in *windows*: runs of consecutive rows, small enough for their vectors to
wait in memory. Within a window, texts are batched by length; a finished window is written as one
block per matrix, synced, and noted. So memory does not depend on the number of rows, the files
keep the input's order, and a run that was killed goes on at the last noted window. Which rows make
a window and a batch depends on nothing but the input and the options, so the bytes do not either.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import activations, artifacts, backbone
from spin_cli.activations import Feature
from spin_cli.backbone import Backbone
from spin_cli.config import ExtractConfig, Pooling, Progress, Site, quiet
from spin_cli.dataset import Dataset, Row, scan
from spin_cli.errors import ArtifactError, ModelError, UsageError

WINDOW_BYTES = 64 * 2**20
MAX_WINDOW_ROWS = 8192
REQUEST, PROGRESS, LENGTHS = "request.json", "progress.json", "lengths.bin"


@dataclass(frozen=True)
class Plan:
    """Everything that is settled before the first batch is run."""

    config: ExtractConfig
    dataset: Dataset
    model: Backbone
    features: tuple[Feature, ...]
    window_rows: int
    request: dict[str, Any]

    @property
    def row_bytes(self) -> int:
        """Bytes that one text takes on the disk."""
        item = activations.DISK_DTYPES[self.config.storage_dtype].itemsize
        return sum(feature.width for feature in self.features) * item


def plan(data: Path, config: ExtractConfig) -> Plan:
    """Scan the data, load the model, and settle what will be read.

    Raises
    ------
    SpinError
        `DataError` for the data, `ModelError` for the model, `UsageError` for options.
    """
    dataset = scan(data, config.data)
    model = backbone.load(config.model)
    if config.poolings is None:
        ends = Pooling.LAST if model.layout.causal else Pooling.FIRST
        config = replace(config, poolings=(Pooling.MEAN, Pooling.MAX, ends))
    features = choose_features(model, config)
    item = activations.DISK_DTYPES[config.storage_dtype].itemsize
    row_bytes = item * sum(feature.width for feature in features)
    window = max(64, min(MAX_WINDOW_ROWS, WINDOW_BYTES // row_bytes, len(dataset)))
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
        "versions": artifacts.versions(),
    }
    return Plan(config, dataset, model, features, window, request)


def choose_features(model: Backbone, config: ExtractConfig) -> tuple[Feature, ...]:
    """Every (layer, site, pooling) that *config* asks for and the model has."""
    layout = model.layout
    layers = parse_layers(config.layers, layout.layers)
    if Site.FFN in config.sites and not any(layout.width(name, Site.FFN) for name in layout.layers):
        raise ModelError(
            f"{config.model.model}: no feed-forward layer that can be read was found in its blocks",
            "Give --site hidden.",
        )
    return tuple(
        Feature(layer, site, pooling, layout.width(layer, site), layout.hookpoint(layer, site))
        for layer in layers
        for site in config.sites
        if layout.width(layer, site)
        for pooling in config.poolings or ()
    )


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


def extract(
    data: Path,
    output: Path,
    config: ExtractConfig,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write the activations of every text in *data* to the folder *output*.

    A run that was interrupted is taken up where it was; one that was made with other options,
    data, model or library versions is refused by name.

    Returns
    -------
    dict
        The manifest, and under ``log`` the time taken.

    Raises
    ------
    SpinError
        See `plan`; `ArtifactError` where *output* is in the way or the disk is full.
    """
    artifacts.check_vacant(output, force=force)
    planned = plan(data, config)
    return run(planned, output, force=force, progress=progress)


def run(
    planned: Plan, output: Path, *, force: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Carry out a plan: see `extract`."""
    started = time.time()
    partial = artifacts.partial_folder(output)
    with artifacts.disk_errors(output):
        first_row = prepare(planned, partial, force=force)
        with activations.RowWriter(partial, planned.features) as writer:
            tokens = _run_windows(planned, partial, writer, first_row, progress)
        planned.dataset.check_unchanged()
        manifest = _finish(planned, partial)
        seconds = time.time() - started
        log = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(seconds, 2),
            "rows_per_second": round((len(planned.dataset) - first_row) / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "resumed_at_row": first_row,
        }
        artifacts.write_json(partial / artifacts.LOG, log)
        artifacts.publish(partial, output)
    return manifest | {"log": log}


def prepare(planned: Plan, partial: Path, *, force: bool) -> int:
    """Make the files, or find those of an interrupted run; the first row that is still to do."""
    request = artifacts.to_plain(planned.request)
    if (partial / REQUEST).exists() and not force:
        old = artifacts.read_json(partial / REQUEST)
        if differing := artifacts.differing_fields(old, request):
            raise ArtifactError(
                f"{partial}: begun with another {', '.join(differing[:5])}",
                "Give the options of that run to resume it, or --force to start again.",
            )
        return int(artifacts.read_json(partial / PROGRESS)["rows"])
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = len(planned.dataset)
    for layer in dict.fromkeys(feature.layer for feature in planned.features):
        mine = [feature for feature in planned.features if feature.layer == layer]
        activations.create_layer(partial / mine[0].file, mine, rows, planned.config.storage_dtype)
    np.zeros(rows, np.int32).tofile(partial / LENGTHS)
    artifacts.write_json(partial / PROGRESS, {"rows": 0})
    artifacts.write_json(partial / REQUEST, request)  # last: its presence means all is in place
    return 0


def _run_windows(
    planned: Plan,
    partial: Path,
    writer: activations.RowWriter,
    first_row: int,
    progress: Progress,
) -> int:
    """Compute window after window while the one before is being written; returns tokens read."""
    total, tokens = len(planned.dataset), 0
    texts = planned.dataset.rows(first_row)
    with ThreadPoolExecutor(1) as pool:
        pending: Future[None] | None = None
        for start in range(first_row, total, planned.window_rows):
            rows = list(islice(texts, planned.window_rows))
            if len(rows) != min(planned.window_rows, total - start):
                planned.dataset.check_unchanged()
                raise ArtifactError(f"{partial}: the data ended early, at row {start + len(rows)}")
            progress("extract", start, total)
            step = _count_up(progress, start, total)
            blocks, lengths = compute_window(planned, rows, start, step)
            tokens += int(np.abs(lengths).sum())
            if pending is not None:
                pending.result()
            pending = pool.submit(_store, planned, partial, writer, start, blocks, lengths)
        if pending is not None:
            pending.result()
    progress("extract", total, total)
    return tokens


def _count_up(progress: Progress, start: int, total: int) -> Callable[[int], None]:
    return lambda done: progress("extract", start + done, total)


def compute_window(
    planned: Plan, rows: Sequence[Row], first_row: int, step: Callable[[int], None]
) -> tuple[dict[Feature, NDArray[Any]], NDArray[np.int32]]:
    """Read all features of consecutive rows.

    Returns
    -------
    blocks : dict of arrays (n, F), in their disk dtype, rows in input order
    lengths : (n,) int32
        Tokens of each text; negative where it was cut.
    """
    model, dtype = planned.model, planned.config.storage_dtype
    encoded = backbone.encode(model, [row.text for row in rows], first_row=first_row)
    lengths = np.array([len(e.ids) * (-1 if e.truncated else 1) for e in encoded], np.int32)
    blocks = {
        feature: np.empty((len(rows), feature.width), activations.DISK_DTYPES[dtype])
        for feature in planned.features
    }
    by_key = {(f.layer, f.site, f.pooling): f for f in planned.features}
    wanted: dict[tuple[str, Site], list[Pooling]] = {}
    for feature in planned.features:
        wanted.setdefault((feature.layer, feature.site), []).append(feature.pooling)
    done = 0
    for batch in backbone.plan_batches(np.abs(lengths).tolist(), model.batch_tokens):

        def sink(
            layer: str, site: Site, pooling: Pooling, vectors: torch.Tensor, at: list[int] = batch
        ) -> None:
            feature = by_key[layer, site, pooling]
            blocks[feature][at] = activations.to_disk(vectors.cpu().numpy(), dtype)

        backbone.read(model, [encoded[row].ids for row in batch], wanted, sink)
        done += len(batch)
        step(done)
    return blocks, lengths


def _store(
    planned: Plan,
    partial: Path,
    writer: activations.RowWriter,
    start: int,
    blocks: dict[Feature, NDArray[Any]],
    lengths: NDArray[np.int32],
) -> None:
    """Write one window, sync it, and only then note that it is there."""
    for feature, block in blocks.items():
        _check_finite(feature, block, start, planned)
        writer.write(feature, start, block)
    with (partial / LENGTHS).open("r+b") as file:
        file.seek(start * lengths.itemsize)
        file.write(lengths.tobytes())
        file.flush()
        os.fsync(file.fileno())
    writer.sync()
    artifacts.write_json(partial / PROGRESS, {"rows": start + len(lengths)})


def _check_finite(feature: Feature, block: NDArray[Any], start: int, planned: Plan) -> None:
    values = activations.from_disk(block, planned.config.storage_dtype)
    flawed = ~np.isfinite(values)
    if not flawed.any():
        return
    row, column = np.argwhere(flawed)[0]
    hint = "Give --storage-dtype bfloat16 or float32, with --force to start again."
    if np.isnan(values[row, column]):
        hint = "Try --dtype float32; a model that gives NaN in float32 is damaged."
    raise ModelError(
        f"row {start + row}: {feature.layer} {feature.dataset} neuron {column} is"
        f" {values[row, column]} in {planned.config.storage_dtype.value}"
        f" ({int(flawed.sum())} such values in this block)",
        hint,
    )


def _finish(planned: Plan, partial: Path) -> dict[str, Any]:
    """Write the samples and the manifest, and remove what only the run itself needed."""
    dataset = planned.dataset
    lengths = np.fromfile(partial / LENGTHS, np.int32)
    activations.write_samples(
        partial / activations.SAMPLES,
        ids=[row.id for row in dataset.rows()],
        labels=dataset.codes,
        classes=dataset.classes,
        splits=dataset.splits,
        n_tokens=np.abs(lengths),
        truncated=lengths < 0,
    )
    for name in (LENGTHS, REQUEST, PROGRESS):
        (partial / name).unlink()
    for path in partial.glob(".*.tmp"):  # left by a kill in the middle of a note
        path.unlink()
    content = {
        "request": planned.request,
        "classes": dataset.classes,
        "counts": {
            "rows": len(dataset),
            **_split_counts(dataset),
            "tokens": int(np.abs(lengths).sum()),
            "truncated": int((lengths < 0).sum()),
        },
        "layers": planned.model.layout.layers,
        "causal": planned.model.layout.causal,
        "features": [
            {
                "layer": f.layer,
                "site": f.site,
                "pooling": f.pooling,
                "width": f.width,
                "hookpoint": f.hookpoint,
            }
            for f in planned.features
        ],
        "storage_dtype": planned.config.storage_dtype,
        "warnings": dataset.warnings,
    }
    return artifacts.write_manifest(partial, "activations", content)


def _split_counts(dataset: Dataset) -> dict[str, int]:
    names = ("train", "val", "test")
    return {name: int((dataset.splits == index).sum()) for index, name in enumerate(names)}


def estimate(planned: Plan) -> dict[str, Any]:
    """What `run` would take: rows, tokens (from a sample), bytes on the disk."""
    sample = list(islice(_every(planned.dataset), 512))
    encoded = backbone.encode(planned.model, [row.text for row in sample])
    mean = float(np.mean([len(item.ids) for item in encoded]))
    rows = len(planned.dataset)
    return {
        "rows": rows,
        "tokens": round(mean * rows),
        "disk_bytes": planned.row_bytes * rows,
        "window_rows": planned.window_rows,
        "features": len(planned.features),
    }


def _every(dataset: Dataset) -> Iterator[Row]:
    """About 512 rows, spread over the data set."""
    return islice(dataset.rows(), 0, None, max(1, len(dataset) // 512))
