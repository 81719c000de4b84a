"""What one of several processes found, on its way to the one that writes the result."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from spin_cli import atomic
from spin_cli.errors import ArtifactError
from spin_cli.probe import Ranking

PLAIN = ("C", "val_score", "kkt", "converged", "control_score")


def folder_of(output: Path) -> Path:
    """Where parts lie, beside the final folder."""
    return output.with_name(output.name + ".ranks")


def part_path(output: Path, rank: int) -> Path:
    """One rank's part."""
    return folder_of(output) / f"rank_{rank}.npz"


def prepare(output: Path, rank: int) -> None:
    """Make the folder, and remove what a run that was killed has left of this rank's."""
    with atomic.disk_errors(folder_of(output)):
        folder_of(output).mkdir(parents=True, exist_ok=True)
        part_path(output, rank).unlink(missing_ok=True)


def write_part(path: Path, found: Sequence[Ranking]) -> None:
    """Write a part whole or not at all."""
    arrays: dict[str, Any] = {}
    plain = [{name: getattr(ranking, name) for name in PLAIN} for ranking in found]
    for index, ranking in enumerate(found):
        for field in fields(ranking):
            value = getattr(ranking, field.name)
            if isinstance(value, np.ndarray):
                arrays[f"{index}.{field.name}"] = value
    # As JSON numbers keep all their digits.
    arrays["plain"] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
    temporary = path.with_suffix(".tmp")
    with atomic.disk_errors(path.parent):
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def read_part(path: Path) -> list[Ranking]:
    """Read what `write_part` wrote; `ArtifactError` where that fails."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            plain = json.loads(arrays["plain"].tobytes())
            names = [field.name for field in fields(Ranking) if field.name not in PLAIN]
            return [
                Ranking(
                    **values,
                    **{n: arrays[f"{i}.{n}"] for n in names if f"{i}.{n}" in arrays},
                )
                for i, values in enumerate(plain)
            ]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"{path}: another process's part cannot be read ({error})",
            "All processes have to see the same folder; run the same command again.",
        ) from error
