"""Looking at artifacts: what a folder or file is, and from what it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
from safetensors import SafetensorError, safe_open

from spin_cli import activations, artifacts
from spin_cli.errors import ArtifactError


def describe(path: Path) -> dict[str, Any]:
    """Describe an artifact folder, an HDF5 file, a safetensors file or a JSON file.

    Raises
    ------
    ArtifactError
        Nothing is there, or it is none of these.
    """
    if path.is_dir():
        return _describe_folder(path)
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        return {"kind": "json", "content": artifacts.read_json(path)}
    if h5py.is_hdf5(path):
        return {"kind": "hdf5", "datasets": _hdf5_datasets(path)}
    if path.suffix == ".safetensors":
        return {"kind": "safetensors", "tensors": _tensors(path)}
    raise ArtifactError(
        f"{path}: neither an artifact folder nor a readable HDF5, safetensors or JSON file"
    )


def _describe_folder(path: Path) -> dict[str, Any]:
    if not (path / artifacts.MANIFEST).exists():
        inside = [name for name in artifacts.STAGE_OF if (path / name).is_dir()]
        if inside:
            return {"kind": "run", "artifacts": {name: describe(path / name) for name in inside}}
    manifest = artifacts.read_manifest(path)
    found = {
        "kind": manifest["kind"],
        "spin": manifest["versions"]["spin"],
        "fingerprint": manifest["fingerprint"],
        "classes": manifest.get("classes"),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
    }
    for key in ("counts", "parent", "metric", "storage_dtype", "layers", "multi_label"):
        if key in manifest:
            found[key] = manifest[key]
    if manifest["kind"] == "activations":
        if activations.separator_of(manifest) is not None:
            found["multi_label"] = True
        found["model"] = manifest["request"]["model"]
        found["data"] = manifest["request"]["data"]
        found["features"] = manifest["features"]
    if manifest["kind"] == "selection":
        found["scores"] = read_scores(path)
    if manifest["kind"] == "head":
        found["metrics"] = artifacts.read_json(path / "metrics.json")
    if (path / artifacts.LOG).exists():
        found["log"] = artifacts.read_json(path / artifacts.LOG)
    return found


def read_scores(folder: Path) -> list[dict[str, str]]:
    """The rows of a selection's ``scores.csv``."""
    import csv

    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _hdf5_datasets(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(
                {
                    "name": f"/{name}",
                    "shape": list(item.shape),
                    "dtype": str(item.dtype),
                    "chunks": list(item.chunks) if item.chunks else None,
                    "bytes": int(item.id.get_storage_size()),
                    "attributes": {key: str(value) for key, value in item.attrs.items()},
                }
            )

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    return found


def _tensors(path: Path) -> list[dict[str, Any]]:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return [
                {"name": name, "shape": list(s.get_shape()), "dtype": s.get_dtype()}
                for name, s in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
