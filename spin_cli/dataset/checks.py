"""What has to hold, or is worth a warning, over all rows of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.config import SPLITS
from spin_cli.dataset.cells import Row
from spin_cli.errors import DataError
from spin_cli.names import list_names

_MAX_NAMED = 8
_MANY_CLASSES = 20


def check_classes(scans: Sequence[tuple[str, str, Mapping[str, int]]]) -> None:
    """Refuse a single class, and labels of val or test that train lacks.

    Parameters
    ----------
    scans : sequence of (split, file name, {label: line of its first row})
        Train first.
    """
    _, train_name, train = scans[0]
    known = list(train)
    for split, name, labels in scans[1:]:
        for label, line in labels.items():
            if label not in train:
                raise DataError(
                    f"{name}, line {line}: the label '{label}' of {split} is not in train; "
                    f"train has {list_names(known, _MAX_NAMED)}",
                    f"correct it, or add rows with this label to {train_name}",
                )
    if not known:
        raise DataError(
            f"{train_name}: no row has a label",
            "add rows with labels, or name another column with --label-column",
        )
    if len(known) < 2:
        raise DataError(
            f"{train_name}: all rows have the label '{known[0]}'; at least two classes are needed",
            "add rows of another class, or name another column with --label-column",
        )


def check_val(
    name: str, codes: NDArray[Any], classes: int, val: NDArray[np.bool_], fraction: float
) -> None:
    """Refuse rows of train that are too few to split val off, unless none was asked for.

    Parameters
    ----------
    name : str
        Of the train file.
    codes : (N,), or (N, L), 1 where a label applies
    classes : number of classes
    val : (N,), True where a row goes to val
    fraction : share of train that was to become val
    """
    if val.any() or not fraction:
        return
    rows = len(codes)
    least = max(int(0.5 / fraction) + 1, classes + 1)
    raise DataError(
        f"{name}: {rows} rows of {classes} classes leave none for val, on which every choice is"
        f" made: each class keeps a row in train, and --val-fraction is {fraction:g}",
        f"give {least} rows or more, two or more of a class (better ten of each), a larger"
        " --val-fraction or a val file; if these are no classes, name another --label-column",
    )


def refuse_duplicate_ids(
    name: str,
    column: str | None,
    hashes: NDArray[np.int64],
    read: Callable[[], Iterator[Row]],
) -> None:
    """Raise a DataError for two rows of a file with the same id.

    Only hashes are kept while scanning; where two agree, the file is read once more for the
    truth (two ids may share a hash) and for the lines.
    """
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: dict[str, int] = {}
    for row in read():
        if hash(row.id) not in suspects:
            continue
        if row.id in seen:
            raise DataError(
                f"{name}, line {row.line}: the id '{row.id}' of column '{column}' is already on "
                f"line {seen[row.id]}; ids have to be unique within a file",
                "make them unique, or leave --id-column away to number the rows",
            )
        seen[row.id] = row.line


def count_shared(train: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Count the rows of ``other`` whose text hash is in ``train`` too."""
    return int(np.isin(other, train).sum())


def _label_warnings(
    classes: Sequence[str], codes: NDArray[Any], splits: NDArray[np.uint8]
) -> list[str]:
    """What rows with any number of labels may have besides."""
    found = []
    if codes.sum(1).max() < 2:
        found.append(
            "no row has more than one label: is it the right --label-separator, and is one needed?"
        )
    train = codes[splits == SPLITS.index("train")]
    always = [classes[i] for i in np.flatnonzero(train.all(0)).tolist()]
    if always:
        found.append(f"every row of train has the label {list_names(always, _MAX_NAMED)}")
    return found


def collect_warnings(
    classes: Sequence[str],
    codes: NDArray[Any],
    splits: NDArray[np.uint8],
    shared: Sequence[tuple[str, int]],
    shared_ids: int,
) -> tuple[str, ...]:
    """Say what a user should know before hours of work.

    Parameters
    ----------
    classes, codes, splits
        As in :class:`~spin_cli.dataset.Dataset`.
    shared : sequence of (split, count)
        Rows of a split whose text is in the train file too.
    shared_ids : int
        Ids that occur in more than one file.
    """
    several = codes.ndim == 2
    found = _label_warnings(classes, codes, splits) if several else []
    if len(classes) > max(_MANY_CLASSES, len(codes) // 2):
        found.append(
            f"{len(classes)} classes in {len(codes)} rows: is --label-column the right column?"
        )
    present = set(splits.tolist())
    if SPLITS.index("val") not in present:
        found.append("val is empty: there is no data to choose settings by")
    for at in sorted(present):
        here = codes[splits == at]
        counts = here.sum(0) if several else np.bincount(here, minlength=len(classes))
        absent = [classes[i] for i in np.flatnonzero(counts == 0).tolist()]
        if absent:
            what = "the class" if len(absent) == 1 else "the classes"
            found.append(f"{SPLITS[at]} has no row of {what} {list_names(absent, _MAX_NAMED)}")
        single = [classes[i] for i in np.flatnonzero(counts == 1).tolist()]
        if SPLITS[at] == "train" and single:
            listed = list_names(single, _MAX_NAMED)
            each = "the class" if len(single) == 1 else "each of the classes"
            found.append(f"train has a single row of {each} {listed}")
    for split, count in shared:
        if count:
            found.append(
                f"{count} of the texts of {split} are in the train file too: scores on {split} "
                "will be too good"
            )
    if shared_ids:
        found.append(f"{shared_ids} ids occur in more than one file; the split tells them apart")
    return tuple(found)
