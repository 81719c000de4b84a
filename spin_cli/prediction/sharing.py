"""One input, several processes: each takes every n-th window, the first one joins them in order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spin_cli.config import PredictConfig
from spin_cli.dataset import BadRow, Row
from spin_cli.errors import DataError
from spin_cli.prediction.predictor import Predictor
from spin_cli.prediction.reasons import Reason, Reasons, Token
from spin_cli.prediction.stream import Prediction, answer, fixed_windows
from spin_cli.ranks import Ranks


def part_path(output: Path, rank: int) -> Path:
    """Where a process leaves its windows until they are joined."""
    return output.with_name(f".{output.name}.rank-{rank}")


def predict_shared(
    predictor: Predictor,
    items: Iterable[Row | BadRow],
    config: PredictConfig,
    output: Path,
    ranks: Ranks,
    done: Callable[[int], None] | None = None,
) -> Iterator[list[Prediction]]:
    """Classify this process's windows; in the first process yield those of all, in order.

    Windows are the same as one process would make, so the result is equal to the last digit.

    Raises
    ------
    DataError
        In the first process, for the first bad row that is not to be skipped.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with part_path(output, ranks.rank).open("w", encoding="utf-8") as file:
        total = 0
        for answers in _own_windows(predictor, items, config, ranks):
            file.write(json.dumps(answers, ensure_ascii=False) + "\n")
            total += len(answers)
            if done is not None:
                done(total)
    ranks.wait()
    if ranks.first:
        try:
            yield from _join([part_path(output, rank) for rank in range(ranks.size)])
        finally:
            for rank in range(ranks.size):
                part_path(output, rank).unlink(missing_ok=True)


def _own_windows(
    predictor: Predictor, items: Iterable[Row | BadRow], config: PredictConfig, ranks: Ranks
) -> Iterator[list[dict[str, Any]]]:
    """What this process answers as plain values; an error is the last entry of its window."""
    windows = enumerate(fixed_windows(items))
    number = 0
    while True:
        try:
            number, window = next(windows, (number, None))
        except DataError as error:  # of the file: every process meets it, at the same window
            yield [_plain_error(error)]
            return
        if window is None:
            return
        if number % ranks.size != ranks.rank:
            continue
        plain: list[dict[str, Any]] = []
        try:
            for answers in answer(predictor, window, config):
                plain += [
                    asdict(replace(found, columns=None)) | {"columns": found.columns}
                    for found in answers
                ]
        except DataError as error:
            yield [*plain, _plain_error(error)]
            return
        yield plain


def _plain_error(error: DataError) -> dict[str, Any]:
    return {"stopped": error.message, "hint": error.hint}


def _join(paths: list[Path]) -> Iterator[list[Prediction]]:
    """Windows of all parts in turn, up to the first error."""
    files = [path.open(encoding="utf-8") for path in paths]
    try:
        for number in itertools.count():
            line = files[number % len(files)].readline()
            if not line:
                return
            plain = json.loads(line)
            stopped = plain.pop() if plain and "stopped" in plain[-1] else None
            yield [_restore(found) for found in plain]
            if stopped is not None:
                raise DataError(stopped["stopped"], stopped["hint"])
    finally:
        for file in files:
            file.close()


def _restore(plain: dict[str, Any]) -> Prediction:
    why = plain.pop("why")
    if why is None:
        return Prediction(**plain)
    if isinstance(why, list):
        return Prediction(**plain, why=[(name, _reasons(each)) for name, each in why])
    return Prediction(**plain, why=_reasons(why))


def _reasons(why: dict[str, Any]) -> Reasons:
    neurons = tuple(
        Reason(**reason | {"tokens": tuple(Token(**token) for token in reason["tokens"])})
        for reason in why.pop("neurons")
    )
    return Reasons(**why, neurons=neurons)
