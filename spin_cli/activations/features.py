"""The matrices of activations, and their numbers as they are stored."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import ArtifactError

DISK_DTYPES: dict[StorageDtype, np.dtype[Any]] = {
    StorageDtype.FLOAT16: np.dtype("<f2"),
    StorageDtype.FLOAT32: np.dtype("<f4"),
    StorageDtype.BFLOAT16: np.dtype("<u2"),
}
"""bfloat16 has no HDF5 type: its bits are stored in uint16."""


@dataclass(frozen=True)
class Feature:
    """One matrix of activations: a layer, a site and a pooling."""

    layer: str
    site: Site
    pooling: Pooling
    width: int
    hookpoint: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Layer, site and pooling as they are called in files."""
        return self.layer, self.site.value, self.pooling.value

    @property
    def dataset(self) -> str:
        """Name of the dataset in the layer's file."""
        return f"/{self.site.value}/{self.pooling.value}"

    @property
    def file(self) -> str:
        """Name of the layer's file."""
        return f"{self.layer}.h5"

    @property
    def number(self) -> int:
        """Tells it apart from others that share a seed."""
        return zlib.crc32(f"{self.layer}{self.dataset}".encode())


def features_of(manifest: dict[str, Any]) -> tuple[Feature, ...]:
    """The matrices that an activations manifest lists."""
    try:
        return tuple(
            Feature(
                str(f["layer"]),
                Site(f["site"]),
                Pooling(f["pooling"]),
                int(f["width"]),
                str(f["hookpoint"]),
            )
            for f in manifest["features"]
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"the activations' manifest lists its features wrongly: {error}"
        ) from error


def by_file(features: Sequence[Feature]) -> dict[str, list[Feature]]:
    """The matrices in each file, in their order."""
    found: dict[str, list[Feature]] = {}
    for feature in features:
        found.setdefault(feature.file, []).append(feature)
    return found


def to_disk(values: NDArray[np.float32], dtype: StorageDtype) -> NDArray[Any]:
    """Round float32 values to what is stored."""
    if dtype is StorageDtype.BFLOAT16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        return (rounded >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # overflow is counted and refused by the caller
        return values.astype(DISK_DTYPES[dtype])


def from_disk(stored: NDArray[Any], dtype: StorageDtype) -> NDArray[Any]:
    """Undo `to_disk`: float16 and float32 as they are, bfloat16 exactly, as float32."""
    if dtype is not StorageDtype.BFLOAT16:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)
