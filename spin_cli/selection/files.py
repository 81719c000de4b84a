"""The files of a selection folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from spin_cli import atomic, mask
from spin_cli.activations import Feature
from spin_cli.choices import Control
from spin_cli.config import SelectConfig
from spin_cli.probe import Ranking
from spin_cli.selected import MASKS, PROBES, SCORES

Found = Sequence[tuple[Feature, Ranking]]


def write(folder: Path, found: Found, config: SelectConfig) -> list[dict[str, Any]]:
    """Write masks, probes and scores; the rows of the scores."""
    _write_masks(folder / MASKS, found, config)
    _write_probes(folder / PROBES, found)
    rows = [_score_row(feature, item, config) for feature, item in found]
    atomic.write_text(folder / SCORES, _as_csv(rows))
    return rows


def _write_masks(path: Path, found: Found, config: SelectConfig) -> None:
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for feature, item in found:
            group = file.create_group(f"{feature.layer}{feature.dataset}")
            group.create_dataset("neurons", data=item.neurons)
            group.create_dataset("importance", data=item.importance)
            group.create_dataset("cumulative", data=item.cumulative)
            group.create_dataset("class_importance", data=item.class_importance)
            if item.frequency is not None:
                group.create_dataset("frequency", data=item.frequency)
                group["frequency"].attrs["resamples"] = config.bootstrap
            group.attrs["C"] = item.C
            group.attrs["val_score"] = item.val_score
            group.attrs["kkt"] = item.kkt
            group.attrs["converged"] = item.converged
            group.attrs["width"] = feature.width
            group.attrs["eta"] = np.array(config.etas)
            group.attrs["kept"] = np.array(_kept(item, config))
            group.attrs["control"] = config.control.value
            if item.control_score is not None:
                group.attrs["control_score"] = item.control_score


def _kept(item: Ranking, config: SelectConfig) -> list[int]:
    return [mask.count_for(item.cumulative, eta) for eta in config.etas]


def _write_probes(path: Path, found: Found) -> None:
    tensors: dict[str, NDArray[Any]] = {}
    for feature, item in found:
        name = f"{feature.layer}{feature.dataset}".replace("/", ".")
        tensors[f"{name}.weight"] = item.coef
        tensors[f"{name}.bias"] = item.intercept
    save_file(tensors, path)


def _score_row(feature: Feature, item: Ranking, config: SelectConfig) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": feature.layer,
        "site": feature.site.value,
        "pooling": feature.pooling.value,
        "C": f"{item.C:.6g}",
        "val_score": f"{item.val_score:.6f}",
        "width": feature.width,
        "converged": item.converged,
    }
    if config.control is not Control.NONE:
        row["control"] = config.control.value
    if item.control_score is not None:
        row["control_score"] = f"{item.control_score:.6f}"
        row["selectivity"] = f"{item.val_score - item.control_score:.6f}"
    if item.frequency is not None:
        # Of random neurons too it is what the draw got, for comparison.
        own = item.frequency[item.neurons]
        row["stability"] = f"{own.mean() if len(own) else 0.0:.4f}"
    kept = zip(config.etas, _kept(item, config), strict=True)
    return row | {f"neurons_eta_{eta:g}": count for eta, count in kept}


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
