"""Stage 2: from activations to the neurons that matter, one probe per layer, site and pooling."""

from __future__ import annotations

import csv
import io
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from spin_cli import activations, artifacts, mask, metrics, probe
from spin_cli.activations import Feature, Samples
from spin_cli.config import Metric, Progress, SelectConfig, StorageDtype, quiet, worker_count
from spin_cli.errors import ArtifactError, DataError

MASKS, PROBES, SCORES = "masks.h5", "probes.safetensors", "scores.csv"


@dataclass(frozen=True)
class Probed:
    """One probe: what it scored, and its neurons in the order of their importance."""

    feature: Feature
    C: float
    val_score: float
    kkt: float
    converged: bool
    neurons: NDArray[np.int32]
    """(n,) most important first; those of zero weight are left out."""
    importance: NDArray[np.float64]
    """(n,) squared weights on standardised features, summed over classes."""
    class_importance: NDArray[np.float32]
    """(K, n) the same for each column of logits."""
    coef: NDArray[np.float32]
    """(K, F) on raw features."""
    intercept: NDArray[np.float64]


def select(
    source: Path,
    output: Path,
    config: SelectConfig,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Fit a probe to every matrix in the activations folder *source* and write the masks.

    Returns
    -------
    dict
        The manifest; under ``scores`` the rows of ``scores.csv``, under ``log`` the time taken.

    Raises
    ------
    ArtifactError
        *source* is not a whole activations folder, or *output* is in the way.
    DataError
        There are no validation rows to choose by.
    """
    started = time.time()
    parent = artifacts.read_manifest(source, "activations")
    artifacts.check_vacant(output, force=force)
    samples, codes = read_labels(source, parent)
    metric = config.metric or default_metric(codes[samples.rows("train")], len(parent["classes"]))
    features = activations.features_of(parent)
    dtype = StorageDtype(parent["storage_dtype"])
    probed = _probe_all(source, features, dtype, samples, codes, config, metric, progress)
    with artifacts.building(output, force=force) as folder:
        _write_masks(folder / MASKS, probed, config)
        _write_probes(folder / PROBES, probed)
        rows = _score_rows(probed, config)
        artifacts.write_text(folder / SCORES, _as_csv(rows))
        content = {
            "request": request_of(parent, config),
            "parent": artifacts.parent_entry(output, source, parent),
            "metric": metric,
            "classes": parent["classes"],
            "counts": {"probes": len(probed), "unconverged": sum(not p.converged for p in probed)},
        }
        manifest = artifacts.write_manifest(folder, "selection", content)
        log = {"seconds": round(time.time() - started, 2)}
        artifacts.write_log(folder, log)
    return manifest | {"scores": rows, "log": log}


def request_of(parent: dict[str, Any], config: SelectConfig) -> dict[str, Any]:
    """What decides a selection: the activations and the options, but not the number of workers."""
    options = artifacts.to_plain(config)
    options.pop("workers")
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
    samples = activations.read_samples(source)
    codes_of = {name: code for code, name in enumerate(manifest["classes"])}
    unknown = set(samples.labels) - set(codes_of)
    if unknown or len(samples.labels) != manifest["counts"]["rows"]:
        raise ArtifactError(f"{source / activations.SAMPLES}: does not agree with the manifest")
    if not len(samples.rows("val")):
        raise DataError(
            f"{source}: no validation rows, and every choice is made on them",
            "Extract again with a val file, or with --val-fraction above 0.",
        )
    return samples, np.array([codes_of[label] for label in samples.labels], np.int64)


def default_metric(codes: NDArray[np.int64], n_classes: int) -> Metric:
    """Macro-F1 where the rarest class has less than half of an equal share, else accuracy."""
    counts = np.bincount(codes, minlength=n_classes)
    return Metric.MACRO_F1 if counts.min() < 0.5 * counts.mean() else Metric.ACCURACY


def _probe_all(
    source: Path,
    features: tuple[Feature, ...],
    dtype: StorageDtype,
    samples: Samples,
    codes: NDArray[np.int64],
    config: SelectConfig,
    metric: Metric,
    progress: Progress,
) -> list[Probed]:
    """Fit the probes side by side, each on one core (so results do not depend on how many)."""

    def one(feature: Feature) -> Probed:
        matrix = activations.read_matrix(source, feature, len(codes), dtype)
        return probe_matrix(matrix, feature, samples, codes, config, metric)

    done: list[Probed] = []
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", probe.ConvergenceWarning)  # counted in the manifest
        with ThreadPoolExecutor(worker_count(config.workers)) as pool:
            try:
                for result in pool.map(one, features):
                    done.append(result)
                    progress("select", len(done), len(features))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return done


def probe_matrix(
    matrix: NDArray[Any],
    feature: Feature,
    samples: Samples,
    codes: NDArray[np.int64],
    config: SelectConfig,
    metric: Metric,
) -> Probed:
    """Fit one probe on train rows, its C chosen on val rows, and rank its neurons."""
    train, val = samples.rows("train"), samples.rows("val")
    n_classes = int(codes.max()) + 1
    standard = probe.standardise(matrix[train])
    if not len(standard.kept):  # layer 0's first token, say, is the same in every text
        return _nothing(feature, codes[train], codes[val], n_classes, metric)
    path = probe.fit_path(
        standard.X,
        codes[train],
        standard.transform(matrix[val]),
        codes[val],
        n_classes,
        score=metrics.score_function(metric),
        points=config.path_points,
        ratio=config.path_ratio,
        tol=config.tol,
        max_iter=config.max_iter,
    )
    best = path.fits[path.best]
    ranked = mask.order(mask.importance(best.coef))
    coef, intercept = probe.fold_back(best, standard)
    return Probed(
        feature=feature,
        C=best.C,
        val_score=path.scores[path.best],
        kkt=best.kkt,
        converged=best.converged,
        neurons=standard.kept[ranked].astype(np.int32),
        importance=mask.importance(best.coef)[ranked],
        class_importance=(best.coef[:, ranked] ** 2).astype(np.float32),
        coef=coef,
        intercept=intercept,
    )


def _nothing(
    feature: Feature,
    y: NDArray[np.int64],
    y_val: NDArray[np.int64],
    n_classes: int,
    metric: Metric,
) -> Probed:
    """The probe of a matrix whose every column is constant: the classes' shares."""
    shares = np.bincount(y, minlength=n_classes) / len(y)
    outputs = 1 if n_classes == 2 else n_classes
    odds = np.log(np.maximum(shares, 1e-12))
    return Probed(
        feature=feature,
        C=0.0,
        val_score=metrics.score_function(metric)(y_val, np.tile(shares, (len(y_val), 1))),
        kkt=0.0,
        converged=True,
        neurons=np.zeros(0, np.int32),
        importance=np.zeros(0),
        class_importance=np.zeros((outputs, 0), np.float32),
        coef=np.zeros((outputs, feature.width), np.float32),
        intercept=odds[1:] - odds[:1] if n_classes == 2 else odds,
    )


def _write_masks(path: Path, probed: Iterable[Probed], config: SelectConfig) -> None:
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for item in probed:
            group = file.create_group(f"{item.feature.layer}{item.feature.dataset}")
            group.create_dataset("neurons", data=item.neurons)
            group.create_dataset("importance", data=item.importance)
            group.create_dataset("cumulative", data=mask.cumulative(item.importance))
            group.create_dataset("class_importance", data=item.class_importance)
            group.attrs["C"] = item.C
            group.attrs["val_score"] = item.val_score
            group.attrs["kkt"] = item.kkt
            group.attrs["converged"] = item.converged
            group.attrs["width"] = item.feature.width
            group.attrs["eta"] = np.array(config.etas)
            group.attrs["kept"] = np.array(_kept(item, config))


def _kept(item: Probed, config: SelectConfig) -> list[int]:
    shares = mask.cumulative(item.importance)
    return [mask.count_for(shares, eta) for eta in config.etas]


def _write_probes(path: Path, probed: Iterable[Probed]) -> None:
    tensors: dict[str, NDArray[Any]] = {}
    for item in probed:
        name = f"{item.feature.layer}{item.feature.dataset}".replace("/", ".")
        tensors[f"{name}.weight"] = item.coef
        tensors[f"{name}.bias"] = item.intercept
    save_file(tensors, path)


def _score_rows(probed: Iterable[Probed], config: SelectConfig) -> list[dict[str, Any]]:
    rows = []
    for item in probed:
        rows.append(
            {
                "layer": item.feature.layer,
                "site": item.feature.site.value,
                "pooling": item.feature.pooling.value,
                "C": f"{item.C:.6g}",
                "val_score": f"{item.val_score:.6f}",
                "width": item.feature.width,
                "converged": item.converged,
                **{
                    f"neurons_eta_{eta:g}": n
                    for eta, n in zip(config.etas, _kept(item, config), strict=True)
                },
            }
        )
    return rows


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
