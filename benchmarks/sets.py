"""The paper's data sets, divided as it divides them.

The validation rows are drawn as ``datasets.Dataset.train_test_split(seed=42)`` draws them: the
first ``ceil(share * n)`` rows of ``default_rng(42).permutation(n)``.
"""

from __future__ import annotations

import csv
import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spin_cli.choices import Metric
from spin_cli.config import SPLITS

VAL_SEED = 42
Rows = list[tuple[str, str]]
"""Texts and labels."""


@dataclass(frozen=True)
class Task:
    """What the paper does with a data set."""

    metric: Metric
    val: float | None
    """Share of train that becomes val; None: there is a file."""


TASKS = {
    "sst2": Task(Metric.ACCURACY, 0.03),
    "imdb": Task(Metric.ACCURACY, 0.20),
    "edos": Task(Metric.MACRO_F1, None),
}


def read_rows(path: Path) -> Rows:
    """Texts and labels of a CSV file, gzip-compressed or not."""
    csv.field_size_limit(2**31 - 1)
    with (gzip.open if path.suffix == ".gz" else open)(
        path, "rt", newline="", encoding="utf-8"
    ) as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def find_file(folder: Path, split: str) -> Path:
    for name in (f"{split}.csv.gz", f"{split}.csv"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no {split}.csv.gz or {split}.csv")


def sample(rows: Rows, count: int | None, seed: int) -> Rows:
    """So many rows drawn at random, in the file's order; None: all."""
    if count is None or count >= len(rows):
        return rows
    picked = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(picked)]


def per_class(rows: Rows, count: int, seed: int) -> Rows:
    """So many rows of each class, drawn at random, in the file's order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    picked: list[int] = []
    for label in sorted({label for _, label in rows}):
        picked += [int(i) for i in order if rows[i][1] == label][:count]
    return [rows[i] for i in sorted(picked)]


def split_val(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Train and val rows, both in the file's order."""
    order = np.random.default_rng(VAL_SEED).permutation(len(rows))
    count = math.ceil(share * len(rows))
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def prepare(
    source: Path, name: str, folder: Path, rows: int | None, test_rows: int | None, seed: int
) -> Path:
    """Write ``train.csv``, ``val.csv`` and ``test.csv`` of a data set to *folder*.

    *rows* (train and val together) are drawn with *seed*, *test_rows* always with 0.
    """
    if (folder / "test.csv").is_file():  # it is written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    share = TASKS[name].val
    train = sample(read_rows(find_file(source / name, "train")), rows, seed)
    if share is None:
        val = sample(read_rows(find_file(source / name, "val")), rows and rows // 7, seed)
    else:
        train, val = split_val(train, share)
    test = sample(read_rows(find_file(source / name, "test")), test_rows, 0)
    for split, part in zip(SPLITS, (train, val, test), strict=True):
        write_rows(folder / f"{split}.csv", part)
    return folder


def read_splits(folder: Path) -> dict[str, Rows]:
    """What `prepare` wrote; a split without a file is left out."""
    files = {split: folder / f"{split}.csv" for split in SPLITS}
    return {split: read_rows(path) for split, path in files.items() if path.is_file()}
