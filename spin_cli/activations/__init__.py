"""Activations in HDF5: one file per layer, one dataset per site and pooling."""

from spin_cli.activations.features import (
    DISK_DTYPES,
    Feature,
    by_file,
    features_of,
    from_disk,
    to_disk,
)
from spin_cli.activations.files import RowWriter, create_layer, disk_bytes, read_matrix
from spin_cli.activations.hashing import hash_block, hash_layer, join_hashes

__all__ = [
    "DISK_DTYPES",
    "Feature",
    "RowWriter",
    "by_file",
    "create_layer",
    "disk_bytes",
    "features_of",
    "from_disk",
    "hash_block",
    "hash_layer",
    "join_hashes",
    "read_matrix",
    "to_disk",
]
