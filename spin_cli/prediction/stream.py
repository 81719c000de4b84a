"""Rows in, predictions out, in order and in bounded memory.

From a file, windows of fixed sizes are classified together, so that a run can be repeated to the
last digit. From a pipe, what has come so far is classified at once: a line that comes alone does
not wait for others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spin_cli.backbone import Encoded
from spin_cli.choices import OnError
from spin_cli.config import PredictConfig
from spin_cli.dataset import BadRow, Row, read_items
from spin_cli.errors import DataError
from spin_cli.head import Head
from spin_cli.prediction.predictor import Predictor
from spin_cli.prediction.reasons import Reasons, explain_answers
from spin_cli.ranges import check_ranges

FIRST_WINDOW, WINDOW = 16, 512
"""Texts handled together: few at first, so that the first answer comes soon."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Prediction:
    """What was found for one row, or why nothing was."""

    id: str | None
    label: str | list[str] | None = None
    """Where a text may have any number of labels, a list."""
    prob: float | None = None
    """That the label is right; of labels, that exactly these apply, taken as independent."""
    probs: dict[str, float] = field(default_factory=dict)
    """Exact, for scores are made of them; what writes a row rounds."""
    truncated: bool | None = None
    abstained: bool | None = None
    """Whether the probability is too low to be trusted; None where no limit is set."""
    why: Reasons | list[tuple[str, Reasons]] | None = None
    """With labels, for each given one, or for the likeliest where none is."""
    error: str | None = None
    truth: str | None = None
    """The input's label, where it was read."""
    place: str = ""
    """File and line of the row, for messages."""
    columns: dict[str, object] | None = None


def read_input(source: str, config: PredictConfig) -> Iterator[Row | BadRow]:
    """Rows to classify, from a file or ``-``; labels are read where they are needed.

    For a multi-label head that is evaluated ``config.label_separator`` has to be set: `settle`.
    """
    return read_items(
        source,
        format=config.format,
        text_column=config.text_column,
        label_column=config.label_column if config.evaluate else None,
        id_column=config.id_column,
        label_separator=config.label_separator if config.evaluate else None,
        require_label=config.evaluate,
        keep_columns=config.keep_columns,
    )


def predict(
    predictor: Predictor,
    items: Iterable[Row | BadRow],
    config: PredictConfig | None = None,
    *,
    live: bool = False,
    resumed: bool = False,
    done: Callable[[int], None] | None = None,
) -> Iterator[list[Prediction]]:
    """Classify rows one window at a time, in their order.

    Parameters
    ----------
    predictor : Predictor
    items : rows, bad ones among them
    config : PredictConfig
        Here: what is done about bad rows, and what is told of each row.
    live : bool
        Rows come bit by bit: answer those that are there rather than wait for more.
    resumed : bool
        There were windows before these rows.
    done : callable, optional
        Told the number of rows so far.

    Raises
    ------
    DataError
        For a bad row, unless it is to be skipped; the rows before it were handed on.
    ModelError
        The model gives NaN for a row, which is named.
    UsageError
        A number among the options is out of its range.
    """
    config = config or PredictConfig()
    check_ranges(config)
    total = 0
    first = WINDOW if resumed else FIRST_WINDOW
    for window in live_windows(items) if live else fixed_windows(items, first):
        yield from answer(predictor, window, config)
        total += len(window)
        if done is not None:
            done(total)


def fixed_windows(items: Iterable[Item], first: int = FIRST_WINDOW) -> Iterator[list[Item]]:
    """*first* items, then as many as are handled together."""
    stream, size = iter(items), first
    while window := list(islice(stream, size)):
        yield window
        size = WINDOW


def live_windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    """What has come so far, at least one item; a thread reads ahead by two windows at most."""
    waiting: queue.Queue[Any] = queue.Queue(2 * WINDOW)
    end = object()

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
            waiting.put(end)
        except BaseException as error:  # raised again where the rows are used
            waiting.put((end, error))

    # A daemon: it may wait for input for ever, which must not keep the process from ending.
    threading.Thread(target=fill, daemon=True, name="spin-read").start()
    while True:
        window = [waiting.get()]
        # Nobody else takes from the queue, so what is there stays there.
        while len(window) < WINDOW and not _ends(window[-1], end) and not waiting.empty():
            window.append(waiting.get())
        last = window.pop() if _ends(window[-1], end) else None
        if window:
            yield window
        if isinstance(last, tuple):
            raise last[1]
        if last is end:
            return


def _ends(item: Any, end: object) -> bool:
    return item is end or (isinstance(item, tuple) and bool(item) and item[0] is end)


def answer(
    predictor: Predictor, window: Sequence[Row | BadRow], config: PredictConfig
) -> Iterator[list[Prediction]]:
    """Classify one window; where a bad row stops the run, what is before it is handed on first."""
    encoded = encode_rows(predictor, window)
    stop = len(window)
    if config.on_error is OnError.STOP:
        bad = (at for at, item in enumerate(encoded) if isinstance(item, DataError))
        stop = next(bad, stop)
    if stop:
        yield classify_rows(predictor, window[:stop], encoded[:stop], config)
    if stop < len(window):
        error = encoded[stop]
        assert isinstance(error, DataError)
        raise stopped_by(error)


def stopped_by(error: DataError) -> DataError:
    """A bad row's error, with the way to go on without the row."""
    hint = f"{error.hint}; or go" if error.hint else "Go"
    return DataError(error.message, f"{hint} on behind such rows with --on-error skip")


def encode_rows(predictor: Predictor, window: Sequence[Row | BadRow]) -> list[Encoded | DataError]:
    """Token ids of each row, or what is wrong with it."""
    rows = [item for item in window if isinstance(item, Row)]
    try:
        good: list[Encoded | DataError] = (
            list(predictor.encode([row.text for row in rows])) if rows else []
        )
    except DataError:
        good = [_encode_one(predictor, row) for row in rows]
    found = iter(good)
    return [next(found) if isinstance(item, Row) else item.error for item in window]


def read_places(
    window: Sequence[Row | BadRow], encoded: Sequence[Encoded | DataError]
) -> list[str]:
    """Where each row stands that `encode_rows` found nothing wrong with."""
    pairs = zip(window, encoded, strict=True)
    return [item.place for item, ids in pairs if isinstance(item, Row) and isinstance(ids, Encoded)]


def _encode_one(predictor: Predictor, row: Row) -> Encoded | DataError:
    try:
        return predictor.encode([row.text], [row.place])[0]
    except DataError as error:
        return error


def classify_rows(
    predictor: Predictor,
    window: Sequence[Row | BadRow],
    encoded: Sequence[Encoded | DataError],
    config: PredictConfig,
) -> list[Prediction]:
    """What is found for each row of a window, given its token ids, or what is wrong with it.

    Raises
    ------
    ModelError
        The model gives NaN for a row, which is named.
    """
    texts = [item for item in encoded if isinstance(item, Encoded)]
    values = predictor.rounded(predictor.gather(texts), read_places(window, encoded))
    probs = predictor.classify(values)
    labels = predictor.decide(probs)
    sure = predictor.head.certainty(probs)
    unsure = None
    if predictor.head.abstain_below is not None:
        unsure = predictor.head.abstains(probs)
    whys = explain_answers(predictor, texts, values, probs, config) if config.explain else None
    answers, at = [], 0
    for item, ids in zip(window, encoded, strict=True):
        if isinstance(ids, DataError):
            answers.append(Prediction(item.id, error=ids.message))
            continue
        assert isinstance(item, Row)
        why = None if whys is None else whys[at]
        abstained = None if unsure is None else bool(unsure[at])
        answers.append(
            _prediction(
                predictor.head, item, ids, probs[at], labels[at], float(sure[at]), abstained, why
            )
        )
        at += 1
    return answers


def _prediction(
    head: Head,
    row: Row,
    encoded: Encoded,
    probs: NDArray[np.float64],
    label: Any,
    sure: float,
    abstained: bool | None,
    why: Reasons | list[tuple[str, Reasons]] | None,
) -> Prediction:
    return Prediction(
        id=row.id,
        label=head.names(label) if head.multi_label else head.classes[label],
        prob=sure,
        probs=dict(zip(head.classes, probs.tolist(), strict=True)),
        truncated=encoded.truncated,
        abstained=abstained,
        why=why,
        truth=row.label,
        place=row.place,
        columns=row.columns,
    )
