"""Which files of a path are train, val and test."""

from __future__ import annotations

import json
from pathlib import Path

from spin_cli.choices import Format
from spin_cli.config import SPLITS
from spin_cli.dataset.arrow import is_saved_dataset
from spin_cli.dataset.formats import EXTENSIONS, split_name
from spin_cli.dataset.streams import cannot_open
from spin_cli.errors import DataError
from spin_cli.names import list_names

_STEMS = {"train": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}
_EXPECTED = "train.*, and where you have them val.* (or dev.*, validation.*) and test.*"


def find_sources(data: Path, format: Format) -> list[tuple[str, Path]]:  # noqa: A002
    """Find the files of a data set.

    Parameters
    ----------
    data : Path
        One file (all of it is train), a folder with one file a split, or a folder saved by the
        ``datasets`` library.
    format : Format
        ``AUTO`` passes over files whose extension is unknown.

    Returns
    -------
    list of (split, path)
        In the order of ``SPLITS``; train is always there.

    Raises
    ------
    DataError
        If nothing is there, no train file is there, or a split has two files.
    """
    if data.is_dir():
        return _find_in_folder(data, format)
    if str(data) == "-":
        raise DataError(
            "a data set is read more than once, which stdin cannot be",
            "write it to a file first: cat > data.csv",
        )
    try:
        data.stat()
    except OSError as error:
        raise cannot_open(data, error) from error
    if not data.is_file():
        raise DataError(
            f"{data}: a pipe or a device, where a file was expected",
            "a data set is read more than once: write it to a file first",
        )
    return [("train", data)]


def _find_in_folder(folder: Path, format: Format) -> list[tuple[str, Path]]:  # noqa: A002
    if is_saved_dataset(folder):
        return [("train", folder)]
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise cannot_open(folder, error) from error
    saved = _read_split_names(folder / "dataset_dict.json")
    found: dict[str, list[Path]] = {}
    for entry in entries:
        stem, extension = split_name(entry.name)
        if saved is not None:
            usable = entry.name in saved and entry.is_dir()
        else:
            known = format is not Format.AUTO or extension in EXTENSIONS
            usable = known and entry.is_file()
        if usable and stem in _STEMS:
            found.setdefault(_STEMS[stem], []).append(entry)
    for split, paths in found.items():
        if len(paths) > 1:
            names = list_names([path.name for path in paths])
            raise DataError(
                f"{folder}: more than one file for {split}: {names}",
                "keep one of them in the folder, or give one file instead of the folder",
            )
    if "train" not in found:
        listed = list_names([entry.name for entry in entries]) if entries else "nothing"
        raise DataError(
            f"{folder}: no train file; found {listed}; expected {_EXPECTED}",
            f"known extensions: {', '.join(EXTENSIONS)}, each also .gz; --format accepts others",
        )
    return [(split, found[split][0]) for split in SPLITS if split in found]


def _read_split_names(path: Path) -> list[str] | None:
    """Return the split folders that ``datasets`` lists, or None where it saved nothing here."""
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text("utf-8"))["splits"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a list of splits ({error})", "save it again") from error
