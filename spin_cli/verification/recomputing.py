"""Numbers of a selection or a head, computed again from the activations behind them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from spin_cli import activations, artifacts, metrics, probe, selected
from spin_cli.activations import Feature
from spin_cli.choices import Control, Metric, StorageDtype
from spin_cli.errors import ArtifactError
from spin_cli.head import METRICS, load_head
from spin_cli.samples import Samples, read_targets

PROBES = 3
"""Probes of a selection that are looked at."""
IMPORTANCE_TOL = 1e-3
"""Of an importance, relative to the largest of its probe: weights are stored in float32."""
SCORE_TOL = 1e-6
"""Of a head's test scores; sums in another order may differ in the last digits."""
COMPARED = ("accuracy", "micro_f1", "macro_f1", "log_loss")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool | None
    """None: it could not be looked at."""
    found: str


@dataclass(frozen=True)
class Source:
    """The activations behind an artifact."""

    folder: Path
    features: tuple[Feature, ...]
    dtype: StorageDtype
    classes: list[str]
    samples: Samples
    codes: NDArray[np.int64]
    """(N,), or (N, L), 1 where a label applies."""

    def read(self, feature: Feature) -> NDArray[Any]:
        """A whole matrix."""
        return activations.read_matrix(self.folder, feature, len(self.codes), self.dtype)


def recompute(folder: Path, manifest: dict[str, Any], seed: int) -> Check:
    """Compute some numbers of a selection or a head again; skipped where the parents are gone."""
    kind = manifest["kind"]
    what = "recomputed probes" if kind == "selection" else "recomputed test scores"
    try:
        path, parent = artifacts.read_parent(folder, manifest)
        if kind == "head":
            path, parent = artifacts.read_parent(path, parent)
        source = _source(path, parent)
    except (ArtifactError, OSError, KeyError, TypeError, ValueError) as error:
        return Check(what, None, f"the activations cannot be read: {error}")
    try:
        look = (
            _probes(folder, manifest, source, seed)
            if kind == "selection"
            else _head(folder, source)
        )
    except (KeyError, TypeError, ValueError, IndexError, OSError, SafetensorError) as error:
        return Check(what, False, f"not as spin writes it: {error}")
    except ArtifactError as error:
        return Check(what, False, error.message)
    return Check(what, *look)


def _source(folder: Path, manifest: dict[str, Any]) -> Source:
    samples, codes = read_targets(folder, manifest)
    classes = list(manifest["classes"])
    dtype = StorageDtype(manifest["storage_dtype"])
    return Source(folder, activations.features_of(manifest), dtype, classes, samples, codes)


def _probes(folder: Path, manifest: dict[str, Any], source: Source, seed: int) -> tuple[bool, str]:
    """Importance and validation score of some probes, from their stored weights."""
    rows = selected.read_scores(folder)
    scores = {(row["layer"], row["site"], row["pooling"]): row for row in rows}
    options = manifest["request"]["options"]
    chosen = random.Random(seed).sample(source.features, min(PROBES, len(source.features)))
    for feature in chosen:
        key, name = feature.key, " ".join(feature.key)
        coef, intercept = _weights(folder, ".".join(key))
        X = source.read(feature)
        standard = probe.standardise(X[source.samples.rows("train")])
        scaled = np.zeros(feature.width)
        kept = standard.kept
        scaled[kept] = ((coef[:, kept].astype(np.float64) * standard.scale[kept]) ** 2).sum(0)
        if not _same_importance(folder, feature, scaled, options["control"]):
            return False, f"{name}: the importance is not that of its weights"
        val = source.samples.rows("val")
        z = X[val].astype(np.float64) @ coef.T.astype(np.float64) + intercept
        way = "labels" if source.codes.ndim == 2 else "multinomial"
        probs = metrics.probabilities(z, len(source.classes), way)
        score = metrics.score_function(Metric(manifest["metric"]))(source.codes[val], probs)
        stored = float(scores[key]["val_score"])
        if abs(score - stored) > 2.0 / len(val) + 1e-4:  # a row on the border may change sides
            return False, f"{name}: scores {score:.4f} on val, {stored:.4f} is stored"
    return True, f"{len(chosen)} probes: importance and val score agree"


def _weights(folder: Path, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    with safe_open(folder / selected.PROBES, "np") as file:
        return file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.bias")


def _same_importance(
    folder: Path, feature: Feature, scaled: NDArray[np.float64], control: str
) -> bool:
    with selected.open_masks(folder) as file:
        found = selected.read_mask(file, feature.key, feature.width)
        stored = selected.read_importance(file, feature.key, found)
    if control == Control.RANDOM.value:  # other neurons, with the importance of the ranked ones
        expected = np.sort(scaled)[::-1][: len(stored)]
    else:
        expected = scaled[found.neurons]
    limit = IMPORTANCE_TOL * max(float(scaled.max(initial=0.0)), 1e-12)
    return len(stored) == len(expected) and bool(np.all(np.abs(stored - expected) <= limit))


def _head(folder: Path, source: Source) -> tuple[bool | None, str]:
    """Test scores, from the head's weights."""
    report = artifacts.read_json(folder / METRICS)
    rows = source.samples.rows("test")
    if not len(rows) or "test" not in report["spin"]:
        return None, "there are no test rows"
    head = load_head(folder)
    by_key = {(f.layer, f.site, f.pooling): f for f in source.features}
    parts = [
        source.read(by_key[f.layer, f.site, f.pooling])[rows][:, f.neurons] for f in head.features
    ]
    probs = head.probabilities(np.hstack(parts))
    found = metrics.evaluate(source.codes[rows], probs, source.classes, head.limits)
    names = [name for name in COMPARED if name in found]
    for name in names:
        stored = float(report["spin"]["test"][name])
        if abs(found[name] - stored) > SCORE_TOL * max(1.0, abs(stored)):
            return False, f"{name} is {found[name]:.6f}, {METRICS} says {stored:.6f}"
    return True, f"{len(rows):,} rows: {', '.join(names)} agree"
