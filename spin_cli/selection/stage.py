"""The stage: fits a probe to every matrix, side by side, and writes what they found."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spin_cli import activations, artifacts, atomic, metrics, probe, ranks
from spin_cli.activations import DISK_DTYPES, Feature
from spin_cli.choices import Metric, StorageDtype
from spin_cli.config import Progress, SelectConfig, decisive, quiet
from spin_cli.errors import ArtifactError, DataError
from spin_cli.probe import Blocks, Ranking
from spin_cli.ranges import check_ranges
from spin_cli.ranks import Ranks
from spin_cli.samples import Samples, read_targets
from spin_cli.selected import read_scores
from spin_cli.selection import files, memory, parts, placing
from spin_cli.workers import pool_of

logger = logging.getLogger(__name__)

DEVICE_THREADS = 2
"""While one matrix is solved on a GPU, the next one is read."""


@dataclass(frozen=True)
class Task:
    """What every probe has to know."""

    source: Path
    dtype: StorageDtype
    samples: Samples
    codes: NDArray[np.int64]
    n_classes: int
    metric: Metric
    config: SelectConfig
    device: Any
    """A `torch.device`; None: the CPU, by numpy."""


def select(
    source: Path,
    output: Path,
    config: SelectConfig,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fit a probe to every matrix in the activations folder *source* and write the masks.

    Under PyTorch's launcher the ranks take turns over the matrices and rank 0 joins what they
    found; the result is the same to the byte.

    Returns
    -------
    dict
        The manifest; under ``scores`` the rows of ``scores.csv``, under ``log`` the time taken.

    Raises
    ------
    ArtifactError
        *source* is not a whole activations folder, or *output* is in the way.
    DataError
        There are no validation rows to choose by, or the metric says nothing of them.
    UsageError
        A number among the options is out of its range.
    """
    check_ranges(config)
    started = time.time()
    here = ranks.current()
    parent = artifacts.read_manifest(source, "activations")
    atomic.check_vacant(output, force=force)
    samples, codes = read_labels(source, parent)
    n_classes = len(parent["classes"])
    metric = config.metric or default_metric(codes[samples.rows("train")], n_classes)
    metrics.check_defined(metric, codes[samples.rows("val")], "val")
    features = activations.features_of(parent)
    dtype = StorageDtype(parent["storage_dtype"])
    device = placing.choose(config)
    task = Task(source, dtype, samples, codes, n_classes, metric, config, device)
    if here.size > 1:
        parts.prepare(output, here.rank)
    found = _probe_all(features[here.rank :: here.size], task, here, progress)
    if here.size > 1:
        parts.write_part(parts.part_path(output, here.rank), found)
        here.wait()
        if not here.first:
            here.wait()
            manifest = artifacts.read_manifest(output, "selection")
            log = {"seconds": round(time.time() - started, 2)}
            return manifest | {"scores": read_scores(output), "log": log}
        found = _gather(output, len(features), here)
    with atomic.building(output, force=force) as folder:
        rows = files.write(folder, list(zip(features, found, strict=True)), config)
        content = {
            "request": request_of(parent, config),
            "parent": artifacts.parent_entry(output, source, parent),
            "metric": metric,
            "classes": parent["classes"],
            "device": "cpu" if device is None else device.type,
            "counts": {"probes": len(found), "unconverged": sum(not p.converged for p in found)},
        }
        if codes.ndim == 2:
            content["multi_label"] = True
        manifest = artifacts.write_manifest(folder, "selection", content)
        log = {"seconds": round(time.time() - started, 2)}
        artifacts.write_log(folder, log)
    logger.info("select: %.1f s", log["seconds"])
    shutil.rmtree(parts.folder_of(output), ignore_errors=True)
    here.wait()
    return manifest | {"scores": rows, "log": log}


def request_of(parent: dict[str, Any], config: SelectConfig) -> dict[str, Any]:
    """What decides a selection: the activations and the options, but not how the work is done."""
    options = decisive(SelectConfig, artifacts.to_plain(config))
    return {"parent": parent["fingerprint"], "options": options}


def read_labels(source: Path, manifest: dict[str, Any]) -> tuple[Samples, NDArray[np.int64]]:
    """The samples of an activations folder, and each row's class code.

    Raises
    ------
    ArtifactError
        A label that the manifest does not list, or another number of rows.
    DataError
        No validation rows.
    """
    samples, codes = read_targets(source, manifest)
    if not len(samples.rows("val")):
        raise DataError(
            f"{source}: no validation rows, and every choice is made on them",
            "Extract again with a val file, or with --val-fraction above 0 and two or more rows of"
            " each class.",
        )
    return samples, codes


def default_metric(codes: NDArray[np.int64], n_classes: int) -> Metric:
    """Macro-F1 where the rarest class has less than half of an equal share, else accuracy.

    Macro-F1 for rows with any number of labels too, most of which do not apply to most rows.
    """
    if codes.ndim == 2:
        return Metric.MACRO_F1
    counts = np.bincount(codes, minlength=n_classes)
    return Metric.MACRO_F1 if counts.min() < 0.5 * counts.mean() else Metric.ACCURACY


def _gather(output: Path, count: int, here: Ranks) -> list[Ranking]:
    """All ranks' parts, in the order of the features."""
    found: list[Ranking | None] = [None] * count
    for rank in range(here.size):
        part = parts.read_part(parts.part_path(output, rank))
        if len(part) != len(range(rank, count, here.size)):
            raise ArtifactError(f"{parts.part_path(output, rank)}: not all of the rank's probes")
        found[rank :: here.size] = part
    return [item for item in found if item is not None]


def _probe_all(
    features: Sequence[Feature], task: Task, here: Ranks, progress: Progress
) -> list[Ranking]:
    """Fit the probes side by side, each on one core (so results do not depend on how many)."""
    if task.device is None:
        threads, streamed = memory.plan(features, len(task.codes), task.config, here.local_size)
    else:  # rows go to the device as they are read; the next matrix is read meanwhile
        threads, streamed = DEVICE_THREADS, frozenset(features)
    logger.info(
        "probes: %d matrices by %s on %s, %d side by side, %d streamed from the disk",
        len(features), task.metric.value, task.device or "cpu", threads, len(streamed),
    )  # fmt: skip
    ended = threading.Event()

    def between() -> None:
        if ended.is_set():  # else an interrupt would wait for a long bootstrap
            raise CancelledError

    def one(feature: Feature) -> Ranking:
        return _probe_one(feature, task, feature in streamed, between)

    done: list[Ranking] = []
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", probe.ConvergenceWarning)  # counted in the manifest
        warnings.filterwarnings("ignore", module="sklearn")  # the reference recipe stops short
        with pool_of(threads) as pool:
            try:
                for result in pool.map(one, features):
                    done.append(result)
                    progress("select", len(done), len(features))
            except BaseException:
                ended.set()
                raise
    return done


def _probe_one(feature: Feature, task: Task, stream: bool, between: Callable[[], None]) -> Ranking:
    return probe.rank_neurons(
        # Not held here as well: it is let go once it is standardised.
        _on_disk(feature, task) if stream else _read(feature, task),
        task.codes,
        task.samples.rows("train"),
        task.samples.rows("val"),
        task.n_classes,
        score=metrics.score_function(task.metric),
        config=task.config,
        stream=stream,
        device=task.device,
        key=feature.number,
        between=between,
    )


def _read(feature: Feature, task: Task) -> NDArray[Any]:
    return activations.read_matrix(task.source, feature, len(task.codes), task.dtype)


def _on_disk(feature: Feature, task: Task) -> Blocks:
    def read(rows: slice) -> NDArray[Any]:
        count = rows.stop - rows.start
        return activations.read_matrix(task.source, feature, count, task.dtype, rows.start)

    dtype = np.float16 if DISK_DTYPES[task.dtype] == np.float16 else np.float32
    return Blocks(read, (len(task.codes), feature.width), np.dtype(dtype))
