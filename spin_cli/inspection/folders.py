"""What a folder or file is, as plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from spin_cli import artifacts
from spin_cli.config import Progress, quiet
from spin_cli.errors import ArtifactError
from spin_cli.head import CONFIG, LABELS, METRICS, load_head
from spin_cli.inspection.overlap import overlaps
from spin_cli.inspection.statistics import MASSIVE, RATIO, summarise_all
from spin_cli.inspection.tree import hdf5_tree, tensors
from spin_cli.ranges import COUNT, SHARE
from spin_cli.samples import separator_of
from spin_cli.selected import SCORES, read_scores

SAMPLE_ROWS = 2048
OVERLAP_ETA = 0.8
RECIPE = "spin.toml"


def describe(
    path: Path, *, rows: int = SAMPLE_ROWS, eta: float = OVERLAP_ETA, progress: Progress = quiet
) -> dict[str, Any]:
    """Describe a run, an artifact folder, or an HDF5, safetensors, JSON, CSV or TOML file.

    Parameters
    ----------
    rows : of activations that are looked at for statistics, evenly sampled; 0: all
    eta : of the masks that are compared

    Returns
    -------
    dict
        ``kind`` and what belongs to it.

    Raises
    ------
    ArtifactError
        Nothing is there, it is none of these, or it is damaged.
    UsageError
        *rows* is below 0, or *eta* no share.
    """
    COUNT.check("--rows", rows)
    SHARE.check("--eta", eta)
    if path.is_dir():
        return _describe_folder(path, rows, eta, progress)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        return {"kind": "json", "content": artifacts.read_json(path)}
    if path.suffix == ".safetensors":
        return {"kind": "safetensors", "bytes": path.stat().st_size, **tensors(path)}
    if h5py.is_hdf5(path):
        return {"kind": "hdf5", "bytes": path.stat().st_size, "objects": hdf5_tree(path)}
    if path.name == SCORES and (path.parent / artifacts.MANIFEST).exists():
        return {"kind": "scores", "scores": read_scores(path.parent)}
    if path.name == RECIPE:
        return {"kind": "text", "text": _read_text(path)}
    raise ArtifactError(
        f"{path}: neither an artifact folder nor a readable HDF5, safetensors or JSON file"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[: 2**20]
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def _describe_folder(path: Path, rows: int, eta: float, progress: Progress) -> dict[str, Any]:
    if not (path / artifacts.MANIFEST).exists():
        inside = [name for name in artifacts.STAGE_OF if (path / name).is_dir()]
        if inside:
            parts = {
                name: describe(path / name, rows=rows, eta=eta, progress=progress)
                for name in inside
            }
            return {"kind": "run", "artifacts": parts}
    manifest = artifacts.read_manifest(path)
    try:
        found = _summary(path, manifest)
        if found["kind"] == "activations":
            found |= _activations(path, manifest, rows, progress)
        elif found["kind"] == "selection":
            found |= _selection(path, manifest, eta)
        elif found["kind"] == "head":
            found |= _head(path)
        elif found["kind"] == "export":
            found |= _export(path, manifest)
        else:
            raise ArtifactError(f"{path}: an artifact of unknown kind {found['kind']!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{path}: not as spin writes it ({what})") from error
    return found


def _summary(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    named = artifacts.read_json(path / LABELS) if manifest["kind"] == "export" else manifest
    found = {
        "kind": manifest["kind"],
        "spin": manifest["versions"].get("spin"),
        "fingerprint": manifest["fingerprint"],
        "classes": list(named["classes"]),
        "bytes": sum(int(entry["bytes"]) for entry in manifest["files"].values()),
        "files": {name: int(entry["bytes"]) for name, entry in manifest["files"].items()},
    }
    for key in ("counts", "parent", "metric", "storage_dtype", "layers", "warnings", "multi_label"):
        if key in manifest:
            found[key] = manifest[key]
    if (path / artifacts.LOG).exists():
        found["log"] = artifacts.read_json(path / artifacts.LOG)
    return found


def _activations(
    path: Path, manifest: dict[str, Any], rows: int, progress: Progress
) -> dict[str, Any]:
    statistics = summarise_all(path, manifest, rows, progress)
    return {
        "multi_label": separator_of(manifest) is not None,
        "model": manifest["request"]["model"],
        "data": manifest["request"]["data"],
        "features": manifest["features"],
        "statistics": {
            "rows": statistics[0].rows if statistics else 0,
            "rows_all": int(manifest["counts"]["rows"]),
            "massive": {"above": MASSIVE, "times_median": RATIO, "source": "arXiv:2402.17762"},
            "matrices": statistics,
        },
    }


def _selection(path: Path, manifest: dict[str, Any], eta: float) -> dict[str, Any]:
    return {
        "options": manifest["request"]["options"],
        "scores": read_scores(path),
        "overlap": overlaps(path, eta, list(manifest["classes"])),
    }


def _head(path: Path) -> dict[str, Any]:
    head = load_head(path)
    config = artifacts.read_json(path / CONFIG)
    return {
        "needs": {
            "model": config["model"],
            "blocks": head.blocks,
            "reading": dict(head.reading),
            "storage_dtype": head.storage_dtype.value,
        },
        "neurons": [
            {"layer": f.layer, "site": f.site.value, "pooling": f.pooling.value,
             "neurons": len(f.neurons), "width": f.width}
            for f in head.features
        ],
        "hidden_units": 0 if head.hidden is None else len(head.hidden[1]),
        "threshold": head.threshold,
        **({"thresholds": config["thresholds"]} if head.multi_label else {}),
        "abstain_below": head.abstain_below,
        "metrics": artifacts.read_json(path / METRICS),
    }  # fmt: skip


def _export(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    labels, sizes = artifacts.read_json(path / LABELS), manifest["files"]
    return {
        "model": manifest["head"],
        "neurons": manifest.get("neurons"),
        "formats": {
            program: {
                # Large tensors of ONNX are a file of their own, whose name goes on.
                "bytes": sum(sizes[name]["bytes"] for name in sizes if name.startswith(program)),
                "difference": float(difference),
            }
            for program, difference in manifest["checks"].items()
        },
        "multi_label": labels.get("multi_label", False),
        "threshold": labels["threshold"],
        "thresholds": labels.get("thresholds"),
        "abstain_below": labels["abstain_below"],
        "max_length": labels["max_length"],
    }
