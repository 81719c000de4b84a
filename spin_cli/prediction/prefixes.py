"""Watching a text token by token: the head's answer after each of them, in one forward pass.

In a causal model a token's vectors do not depend on what comes after it, so the vectors of all
prefixes of a text are there once the whole has run; only the pooling has to be taken over each
prefix: running means and maxima, the last or the first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import backbone
from spin_cli.backbone import Encoded
from spin_cli.choices import OnError, Pooling, Site
from spin_cli.config import PredictConfig
from spin_cli.dataset import BadRow, Row
from spin_cli.errors import DataError, ModelError, UsageError
from spin_cli.prediction.predictor import Predictor
from spin_cli.prediction.stream import (
    encode_rows,
    fixed_windows,
    live_windows,
    read_places,
    stopped_by,
)
from spin_cli.ranges import check_ranges

MOST_VALUES = 2**26
"""Values (tokens times neurons) that are held at a time."""
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Crossing:
    """The first token at which the watched class reached the threshold."""

    position: int
    """From 0, special tokens included."""
    token: str
    prob: float


@dataclass(frozen=True)
class Trace:
    """The watched class's probability after each token of a text."""

    id: str | None
    line: int
    watched: str
    threshold: float
    crossing: Crossing | None = None
    tokens: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    truncated: bool | None = None
    error: str | None = None


def running(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool every prefix of a text's vectors.

    Parameters
    ----------
    states : (T, n) vectors of a text's tokens
    pooling : Pooling

    Returns
    -------
    Tensor, (T, n), float32
        Row *t* is what the tokens up to and with *t* give.
    """
    x = states.float()
    if pooling is Pooling.MEAN:
        steps = torch.arange(1, len(x) + 1, device=x.device, dtype=torch.float64)
        return (x.double().cumsum(0) / steps[:, None]).float()
    if pooling is Pooling.MAX:
        return x.cummax(0).values
    return x if pooling is Pooling.LAST else x[:1].expand_as(x)


def prefix_probabilities(
    predictor: Predictor, encoded: Sequence[Encoded], places: Sequence[str] = ()
) -> list[NDArray[np.float64]]:
    """Class probabilities (T, n_classes) after each token of each text.

    *places* say where each text stands, for the message.

    Raises
    ------
    ModelError
        The model is not causal: a later token would change what came before. Or it gives NaN.
    """
    if not predictor.model.layout.causal:
        raise ModelError(
            f"--stream-tokens: {predictor.model.options.model} reads texts in both directions, so a"
            " text's vectors say nothing about its prefixes",
            "Train the head on a causal model, such as bundled:smollm2.",
        )
    room = max(1, min(predictor.model.batch_tokens, MOST_VALUES // predictor.head.neurons))
    found: list[NDArray[np.float64]] = [np.empty((0, 0))] * len(encoded)
    backbone.refuse_parts(encoded)
    for batch in backbone.plan_batches([len(e.ids) for e in encoded], room):
        values = [
            np.empty((len(encoded[row].ids), predictor.head.neurons), np.float32) for row in batch
        ]

        def take(
            layer: str, site: Site, states: torch.Tensor, values: list[NDArray[np.float32]] = values
        ) -> None:
            for pooling in predictor.wanted[layer, site]:
                place = predictor.places[layer, site, pooling]
                picked = states[..., torch.as_tensor(place.picked, device=states.device)]
                for at, kept in enumerate(values):
                    pooled = running(picked[at, : len(kept)], pooling)
                    kept[:, place.columns] = pooled.cpu().numpy()

        ids = [encoded[row].ids for row in batch]
        backbone.read_states(predictor.model, ids, predictor.wanted, take)
        for row, kept in zip(batch, values, strict=True):
            place = [places[row]] * len(kept) if places else ()
            found[row] = predictor.classify(predictor.rounded(kept, place))
    return found


def watched_class(predictor: Predictor, name: str | None) -> int:
    """The number of the class to watch: the named one, else the last."""
    classes = predictor.head.classes
    if name is None:
        return len(classes) - 1
    if name not in classes:
        raise UsageError(f"--watch {name}: the head's classes are {', '.join(classes)}")
    return classes.index(name)


def trace(
    predictor: Predictor,
    items: Iterable[Row | BadRow],
    config: PredictConfig,
    *,
    live: bool = False,
) -> Iterator[list[Trace]]:
    """Score every prefix of every text, window by window, in the input's order.

    Raises
    ------
    DataError
        For a bad row, unless it is to be skipped.
    ModelError
        The model is not causal, or gives NaN.
    UsageError
        There is no such class to watch, or a number among the options is out of its range.
    """
    check_ranges(config)
    watched = watched_class(predictor, config.watch)
    limit = config.threshold
    if limit is None:
        own = predictor.head.limit(watched)
        limit = DEFAULT_THRESHOLD if own is None else own
    for window in live_windows(items) if live else fixed_windows(items):
        encoded = encode_rows(predictor, window)
        texts = [each for each in encoded if isinstance(each, Encoded)]
        places = read_places(window, encoded)
        probs = iter(prefix_probabilities(predictor, texts, places))
        traces: list[Trace] = []
        for item, each in zip(window, encoded, strict=True):
            empty = Trace(item.id, item.line, predictor.head.classes[watched], limit)
            if isinstance(each, Encoded):
                traces.append(_trace(predictor, empty, each, next(probs)[:, watched]))
            elif config.on_error is OnError.STOP:
                yield traces
                raise stopped_by(each)
            else:
                traces.append(_replace_error(empty, each))
        yield traces


def _trace(
    predictor: Predictor, empty: Trace, encoded: Encoded, scores: NDArray[np.float64]
) -> Trace:
    tokens = tuple(predictor.model.tokenizer.decode([token]) for token in encoded.ids)
    over = np.flatnonzero(scores >= empty.threshold)
    crossing = None
    if len(over):
        at = int(over[0])
        crossing = Crossing(at, tokens[at], round(float(scores[at]), 6))
    rounded = tuple(round(float(score), 6) for score in scores)
    return Trace(
        empty.id, empty.line, empty.watched, empty.threshold, crossing, tokens, rounded,
        encoded.truncated,
    )  # fmt: skip


def _replace_error(empty: Trace, error: DataError) -> Trace:
    return Trace(empty.id, empty.line, empty.watched, empty.threshold, error=error.message)
