"""Raw records of Parquet files and of folders saved by the ``datasets`` library."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin_cli.dataset.formats import STDIN, import_extra, import_parquet
from spin_cli.dataset.records import Fault, Record, Wanted, refuse_duplicates, resolve_columns
from spin_cli.dataset.streams import broken_stream, display_name, hash_file, open_bytes
from spin_cli.errors import DataError

_BATCH_ROWS = 1024
_STRING_TYPES = {"string", "large_string", "string_view"}


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder is one split saved by ``datasets`` (``Dataset.save_to_disk``)."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def parquet_records(path: str | Path, wanted: Wanted) -> Iterator[Record | Fault]:
    """Parse a Parquet file batch by batch."""
    parquet = import_parquet()
    name = display_name(path)
    with open_bytes(path) as stream, tempfile.TemporaryFile() as spool:
        source: Any = stream
        if str(path) == STDIN or Path(path).suffix.lower() == ".gz":
            # Parquet is read from its end, and neither a pipe nor gzip can seek cheaply.
            try:
                shutil.copyfileobj(stream, spool)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise broken_stream(name, 0, error) from error
            spool.seek(0)
            source = spool
        try:
            file = parquet.ParquetFile(source)
            columns = _pick_columns(name, file.schema_arrow, wanted)
            batches = file.iter_batches(_BATCH_ROWS, columns=columns)
            yield from _batch_records(name, file.schema_arrow, batches, wanted)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
            raise DataError(
                f"{name}: not a whole Parquet file: {error}", "write or copy it again"
            ) from error


def saved_records(path: Path, wanted: Wanted) -> Iterator[Record | Fault]:
    """Read a folder saved by the ``datasets`` library batch by batch."""
    datasets = import_extra("datasets", f"{path}: reading a saved data set", "pip install datasets")
    try:
        table = datasets.load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # whatever that library makes of a damaged folder
        raise DataError(f"{path}: not a whole saved data set: {error}", "save it again") from error
    schema = table.features.arrow_schema
    columns = _pick_columns(str(path), schema, wanted)
    table = table if columns is None else table.select_columns(columns)
    yield from _batch_records(str(path), schema, table.iter(_BATCH_ROWS), wanted)


def hash_saved(path: Path) -> tuple[str, int]:
    """Return one SHA-256 over the files of a saved data set, and their size in bytes."""
    digest = hashlib.sha256()
    total = 0
    for file in sorted(path.iterdir()):
        if file.suffix in {".arrow", ".json"}:
            checksum, size = hash_file(file)
            digest.update(f"{file.name} {checksum}\n".encode())
            total += size
    return digest.hexdigest(), total


def _pick_columns(name: str, schema: Any, wanted: Wanted) -> list[str] | None:
    refuse_duplicates(name, schema.names)
    picked = resolve_columns(name, schema.names, wanted)
    field = str(schema.field(picked[0]).type)
    if field.removeprefix("dictionary<values=").split(",")[0] not in _STRING_TYPES:
        raise DataError(
            f"{name}: column '{picked[0]}' holds {field}, where strings were expected",
            "name another column with --text-column",
        )
    if wanted.keep_columns:
        return None
    return list(dict.fromkeys(column for column in picked if column is not None))


def _batch_records(
    name: str,
    schema: Any,
    batches: Any,
    wanted: Wanted,
) -> Iterator[Record | Fault]:
    text, label, id_ = resolve_columns(name, schema.names, wanted)
    classes = None if label is None else _class_names(schema, label)
    row = 0
    for batch in batches:
        values = {column: _to_list(batch.column(column)) for column in batch.schema.names}
        nothing = [None] * batch.num_rows
        labels = nothing if label is None else values[label]
        if classes is not None:
            labels = [_class_name(value, classes) for value in labels]
            values[str(label)] = labels
        ids = nothing if id_ is None else values[id_]
        for at, item in enumerate(zip(values[text], labels, ids, strict=True)):
            row += 1
            columns = None
            if wanted.keep_columns:
                columns = {key: column[at] for key, column in values.items()}
            yield row, *item, columns


def _to_list(array: Any) -> list[Any]:
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        # Strings that are not UTF-8 stay bytes, so that the row's check can name the row.
        return [_to_value(value) for value in array]


def _to_value(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes()


def _class_names(schema: Any, column: str) -> list[str] | None:
    """Return the label names that the ``datasets`` library keeps in a schema's metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        feature = json.loads(raw)["info"]["features"][column]
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(feature, list) and feature:  # a list of them
        feature = feature[0]
    elif isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List"):
        feature = feature.get("feature")
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return [str(item) for item in names] if isinstance(names, list) else None


def _class_name(value: object, names: list[str]) -> object:
    if isinstance(value, list):
        return [_class_name(item, names) for item in value]
    # -1 is that library's mark for "no label".
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value
