"""Going on where an interrupted run stopped: what it wrote is checked against the input."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from spin_cli.choices import OnError, OutputFormat
from spin_cli.config import PredictConfig
from spin_cli.dataset import BadRow, Row, split_labels
from spin_cli.errors import ArtifactError, DataError, UsageError
from spin_cli.prediction.predictor import Predictor
from spin_cli.prediction.stream import FIRST_WINDOW, WINDOW, Prediction, answer
from spin_cli.prediction.telling import changed_options, other_decision

Item = Row | BadRow
COMPARED, TOLERANCE = 8, 0.05
"""Rows that are classified again, and the difference in a probability that another batch may
make; more means another head or text."""
SEPARATORS = {OutputFormat.CSV: ",", OutputFormat.TSV: "\t"}


def check_resumable(config: PredictConfig) -> None:
    """Raise `UsageError` for outputs that cannot be continued."""
    if not config.resumable:
        kind = "gzip" if config.gzipped else config.output_format.value
        raise UsageError(f"--resume: {kind} files cannot be continued; jsonl, csv, tsv can")


def go_on(
    path: Path,
    items: Iterator[Item],
    predictor: Predictor,
    config: PredictConfig,
    names: Callable[[Sequence[str]], list[str]],
    count: Callable[[list[Prediction]], None],
) -> tuple[int, int, Iterator[Item]]:
    """Read what an interrupted run wrote along with its input, up to its last whole window.

    Windows begin at the same rows in every run over a file, so that what is appended there is what
    an uninterrupted run would have written, to the last digit.

    Parameters
    ----------
    path : Path
        Its rows have to have the ids of the first *items*.
    items : rows of the input
    predictor : Predictor
        Has to be the one that wrote the file.
    config : PredictConfig
        What a row shows of it has to be as it was.
    names : callable
        The columns of a table, for the input's columns that it carries through.
    count : callable
        Given the rows that stay, window by window. Where they are to be scored they are classified
        again: what is written of a probability is too little for that.

    Returns
    -------
    int
        Rows that stay.
    int
        Bytes that stay: those of these rows.
    iterator
        The items that are left to do.

    Raises
    ------
    ArtifactError
        The file was not made from this input, not with this head, or with other options.
    """
    kept, end = 0, 0
    header: list[str] = []
    decided, at = list[str](), 0
    since: list[tuple[Item, Prediction]] = []
    latest: deque[tuple[Row, Prediction]] = deque(maxlen=COMPARED)
    for number, (record, offset) in enumerate(_records(path, config.output_format), 1):
        item = _matching(path, number, record, items)
        found = _restore(path, number, record, item, predictor, config.top)
        since.append((item, found))
        if isinstance(item, Row) and found.error is None:
            # As in `writing`, the first row that brings the input's columns settles the table's.
            header = header or names(list(item.columns or ()))
            _check_options(path, number, record, header, config, predictor)
            if not decided:
                decided, at = other_decision(found.label or "", found.probs, predictor.head), number
            latest.append((item, found))
        if number >= FIRST_WINDOW and (number - FIRST_WINDOW) % WINDOW == 0:
            rows, answers = zip(*since, strict=True)
            count(_again(rows, predictor, config) if config.evaluate else list(answers))
            kept, end = number, offset
            since.clear()
    _check_same_answers(path, latest, predictor)
    _refuse_options(path, at, decided)  # only now: of another head they say nothing
    return kept, end, chain([item for item, _ in since], items)


def _again(rows: Sequence[Item], predictor: Predictor, config: PredictConfig) -> list[Prediction]:
    """Classify a window of rows that are kept."""
    plain = replace(config, explain=0, on_error=OnError.SKIP)
    return [found for answers in answer(predictor, rows, plain) for found in answers]


def _matching(path: Path, number: int, record: dict[str, Any], items: Iterator[Item]) -> Item:
    """The next item of the input, which has to be the one that *record* is about."""
    item = next(items, None)
    if item is None or record.get("id", "") not in (item.id, item.id or ""):
        there = "has ended" if item is None else f"has {item.id!r}"
        raise ArtifactError(
            f"{path}: row {number} is {record.get('id')!r}, where the input {there}",
            "It was made from another input: name another file with -o.",
        )
    return item


def _check_same_answers(
    path: Path, latest: Collection[tuple[Row, Prediction]], predictor: Predictor
) -> None:
    """Classify the last rows again: another head answers otherwise, and this one to other texts."""
    if not latest:
        return
    probs = predictor.probabilities([row.text for row, _ in latest])
    for (row, found), again in zip(latest, probs, strict=True):
        now = dict(zip(predictor.head.classes, again.tolist(), strict=True))
        if any(abs(now[name] - p) > TOLERANCE for name, p in found.probs.items()):
            raise ArtifactError(
                f"{path}: row {row.id!r} was not classified by this head from {row.place}",
                "The input, the head or its model is another than it was made with: name another"
                " file with -o.",
            )


def _check_options(
    path: Path,
    number: int,
    record: dict[str, Any],
    names: list[str],
    config: PredictConfig,
    predictor: Predictor,
) -> None:
    with _predictions_only(path, number):
        changed = changed_options(record, names, config, predictor.head)
    _refuse_options(path, number, changed)


def _refuse_options(path: Path, number: int, changed: list[str]) -> None:
    if changed:
        raise ArtifactError(
            f"{path}: row {number} was made with other options: {'; '.join(changed)}",
            "Give the options that it was made with, or name another file with -o.",
        )


@contextmanager
def _predictions_only(path: Path, number: int) -> Iterator[None]:
    """Refuse a record that has not what a prediction has."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: row {number} is not a prediction of this head ({error})",
            "Name another file with -o, or give --force to begin again.",
        ) from error


def _restore(
    path: Path,
    number: int,
    record: dict[str, Any],
    item: Item,
    predictor: Predictor,
    top: int | None,
) -> Prediction:
    """A written row as a prediction, as far as it tells whether this head wrote it."""
    if record.get("error") and not record.get("prob"):  # a kept column may have this name too
        return Prediction(item.id, error=str(record["error"]))
    with _predictions_only(path, number):
        named = record.get("probs")
        if named is None:  # a table, with a column for each class
            named = _of_columns(record, predictor.head.classes, top)
        probs = {str(name): float(p) for name, p in named.items()}
        label = _label(record["label"], predictor)
        given = label if isinstance(label, list) else [label]
        if not {*given, *probs} <= set(predictor.head.classes):
            also = ", or another --label-separator" if predictor.head.multi_label else ""
            raise ValueError(f"other classes than the head's{also}")
    return Prediction(item.id, label=label, probs=probs)


def _of_columns(record: dict[str, Any], classes: Sequence[str], top: int | None) -> dict[str, str]:
    """The probabilities of a table's row, by class; with ``--top`` of some of them.

    Without it a column of the input, carried through, may be called as those of ``--top`` are.
    """
    if top is None:
        return {name: record[f"prob_{name}"] for name in classes if f"prob_{name}" in record}
    ranks = range(1, min(top, len(classes)) + 1)
    return {record[f"label_{k}"]: record[f"prob_{k}"] for k in ranks if f"label_{k}" in record}


def _label(written: Any, predictor: Predictor) -> str | list[str]:
    if not predictor.head.multi_label:
        return str(written)
    if isinstance(written, list):
        return [str(name) for name in written]
    return split_labels(written, str(predictor.head.label_separator))


def _records(path: Path, kind: OutputFormat) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole records of a file, each with the byte offset behind it; a cut one at the end is left.

    The header of a table counts to its first row.
    """
    with path.open("rb") as file:
        try:
            if kind is OutputFormat.JSONL:
                yield from _json_records(file)
            else:
                yield from _table_records(file, SEPARATORS[kind])
        except (DataError, ValueError, csv.Error) as error:
            raise ArtifactError(
                f"{path}: cannot be continued: {error}",
                "Name another file with -o, or give --force to begin again.",
            ) from error


def _json_records(file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            return
        record = json.loads(line)
        if not isinstance(record, dict) or "id" not in record:
            raise DataError(f"byte {end}: not a prediction")
        end += len(line)
        yield record, end


def _table_records(file: BinaryIO, separator: str) -> Iterator[tuple[dict[str, Any], int]]:
    end, whole = 0, True

    def lines() -> Iterator[str]:
        nonlocal end, whole
        for line in file:
            end += len(line)
            whole = line.endswith(b"\n")
            yield line.decode()

    rows = csv.reader(lines(), delimiter=separator, strict=True)
    try:
        header = next(rows, None)
        if header is not None and whole and header[:2] != ["id", "label"]:
            raise DataError("its header is not that of predictions")
        for fields in rows:
            if not whole or header is None:
                return
            if len(fields) != len(header):
                raise DataError(f"byte {end}: {len(fields)} fields, the header has {len(header)}")
            yield dict(zip(header, fields, strict=True)), end
    except csv.Error as error:
        if "end of data" not in str(error):  # the last row, cut within quotes
            raise
