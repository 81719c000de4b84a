"""Activations folders that no model was run for: rows of another folder, or given matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sets import Rows, read_rows, read_splits, write_rows
from spin_cli import activations, artifacts, atomic
from spin_cli.activations import Feature
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import SPLITS, DataConfig, ModelConfig
from spin_cli.dataset.splits import pick_val, sort_labels
from spin_cli.samples import SAMPLES, write_samples


def source_texts(manifest: dict[str, Any]) -> list[str]:
    """The texts behind an activations folder, in its order."""
    texts: list[str] = []
    for entry in manifest["request"]["data"]:
        rows = read_rows(Path(entry["path"]))
        if (
            len(rows) != entry["rows"]
            or artifacts.sha256_file(Path(entry["path"])) != entry["sha256"]
        ):
            raise ValueError(f"{entry['path']}: changed since its activations were read")
        texts += [text for text, _ in rows]
    return texts


def derive(
    source: Path, target: Path, data: Path, poolings: Iterable[Pooling] | None = None
) -> Path:
    """An activations folder for the texts in *data*, out of one that holds all of them.

    A text's activations do not depend on the others, so this is what ``spin extract`` would have
    written for *data*, but for rounding in other batches.

    Raises
    ------
    KeyError
        A text that *source* does not hold.
    """
    manifest = artifacts.read_manifest(source, "activations")
    splits = read_splits(data)
    place = {text: row for row, text in enumerate(source_texts(manifest))}
    rows = [row for part in splits.values() for row in part]
    picked = np.array([place[text] for text, _ in rows])
    features = activations.features_of(manifest)
    if poolings is not None:
        features = tuple(f for f in features if f.pooling in set(poolings))
    count, dtype = manifest["counts"]["rows"], StorageDtype(manifest["storage_dtype"])
    request = manifest["request"] | {
        "data": [
            {
                "split": split,
                "path": str((data / f"{split}.csv").resolve()),
                "sha256": artifacts.sha256_file(data / f"{split}.csv"),
                "rows": len(part),
            }
            for split, part in splits.items()
        ],
    }
    return write_activations(
        target,
        features,
        lambda feature: activations.read_matrix(source, feature, count, dtype)[picked],
        [label for _, label in rows],
        np.repeat([SPLITS.index(split) for split in splits], [len(p) for p in splits.values()]),
        {key: manifest[key] for key in ("layers", "causal", "storage_dtype")}
        | {"request": request},
    )


def relabel(data: Path, target: Path, labels: Callable[[str, Rows], Rows]) -> Path:
    """A copy of a data folder in which *labels* has changed the rows of each split."""
    target.mkdir(parents=True, exist_ok=True)
    for split, rows in read_splits(data).items():
        write_rows(target / f"{split}.csv", labels(split, rows))
    return target


def request_for(data: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest says of where its matrices come from, where that is no model."""
    options = {"data": DataConfig(), "model": ModelConfig("none")}
    return {
        "model": {"id": "none", "architecture": "none"},
        "data": data,
        "options": artifacts.to_plain(options),
    }


def write_activations(
    target: Path,
    features: tuple[Feature, ...],
    matrix: Callable[[Feature], np.ndarray],
    labels: list[str],
    splits: np.ndarray,
    content: dict[str, Any],
) -> Path:
    """Write a folder as ``spin extract`` does; a val split is drawn where there is none.

    Parameters
    ----------
    matrix : the rows of a feature, (N, F)
    splits : (N,) positions in `SPLITS`
    content : ``layers``, ``causal``, ``storage_dtype`` and ``request`` of the manifest
    """
    classes = list(sort_labels(set(labels)))
    codes = np.array([classes.index(label) for label in labels], np.int32)
    splits = splits.astype(np.uint8)
    train = np.flatnonzero(splits == SPLITS.index("train"))
    if not (splits == SPLITS.index("val")).any():
        splits[train[pick_val(codes[train], DataConfig.val_fraction, 0)]] = SPLITS.index("val")
    dtype, rows = StorageDtype(content["storage_dtype"]), len(labels)
    with atomic.building(target, force=True) as folder:
        for name in dict.fromkeys(f.file for f in features):
            there = [f for f in features if f.file == name]
            activations.create_layer(folder / name, there, rows, dtype)
        with activations.RowWriter(folder, features) as writer:
            for feature in features:
                values = matrix(feature).astype(np.float32, copy=False)
                writer.write(feature, 0, activations.to_disk(values, dtype))
            writer.sync()
        write_samples(
            folder / SAMPLES,
            ids=map(str, range(rows)),
            labels=codes,
            classes=classes,
            splits=splits,
            n_tokens=np.ones(rows, np.int32),
            truncated=np.zeros(rows, np.bool_),
        )
        counts = {name: int((splits == k).sum()) for k, name in enumerate(SPLITS)}
        listed = [artifacts.to_plain(f) | {"overflowed": 0} for f in features]
        artifacts.write_manifest(
            folder,
            "activations",
            content
            | {
                "classes": classes,
                "counts": {"rows": rows, **counts, "tokens": rows, "truncated": 0, "overflowed": 0},
                "features": listed,
                "warnings": [],
            },
        )
        artifacts.write_log(folder, {"seconds": 0.0, "rows_per_second": 0.0})
    return target


def random_activations(target: Path, rows: int, layers: int, width: int, seed: int = 0) -> Path:
    """Gaussian features of two classes, of which a tenth of each matrix's columns tell a little."""
    features = tuple(
        Feature(f"layer_{k:02d}", Site.HIDDEN, Pooling.MEAN, width, "random")
        for k in range(1, layers + 1)
    )
    y = np.random.default_rng(seed).integers(0, 2, rows)
    shift = 0.5 * (2 * y - 1).astype(np.float32)

    def matrix(feature: Feature) -> np.ndarray:
        rng = np.random.default_rng([seed, int(feature.layer[-2:])])
        values = rng.standard_normal((rows, width), np.float32)
        values[:, : max(width // 10, 1)] += shift[:, None] * np.float32(2.0 / width**0.5)
        return values

    splits = np.zeros(rows, np.uint8)
    splits[rows * 8 // 10 :], splits[rows * 9 // 10 :] = 1, 2
    content = {
        "layers": [f.layer for f in features],
        "causal": True,
        "storage_dtype": "float16",
        "request": request_for([]),
    }
    return write_activations(target, features, matrix, [str(v) for v in y], splits, content)
