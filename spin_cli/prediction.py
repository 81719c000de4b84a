"""Stage 4: new texts to labels, as a stream.

Only the blocks of the model that the head reads are loaded, and the forward pass is broken off
behind the last neuron that it needs. Texts are read, classified and handed on window by window, so
input of any length takes the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import artifacts, backbone, metrics
from spin_cli.activations import from_disk, to_disk
from spin_cli.backbone import Backbone
from spin_cli.config import Dtype, Long, ModelConfig, Pooling, PredictConfig, Side, Site
from spin_cli.dataset import Row, read_rows
from spin_cli.errors import ArtifactError, DataError
from spin_cli.head import Head, load_head
from spin_cli.probe.results import probabilities

FIRST_WINDOW, WINDOW = 16, 512
"""Texts handled together: few at first, so that the first answer comes soon."""


@dataclass(frozen=True)
class Prediction:
    """What was found for one text."""

    id: str
    label: str
    prob: float
    probs: dict[str, float]
    truncated: bool


@dataclass(frozen=True)
class Predictor:
    """A head with its model."""

    head: Head
    model: Backbone

    def features(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The head's neurons (n, neurons) for each text, and which texts were cut."""
        encoded = backbone.encode(self.model, texts)
        values = np.empty((len(texts), self.head.neurons), np.float32)
        places: dict[tuple[str, Site, Pooling], tuple[slice, NDArray[np.int32]]] = {}
        wanted: dict[tuple[str, Site], list[Pooling]] = {}
        start = 0
        for feature in self.head.features:
            stop = start + len(feature.neurons)
            places[feature.layer, feature.site, feature.pooling] = (
                slice(start, stop),
                feature.neurons,
            )
            wanted.setdefault((feature.layer, feature.site), []).append(feature.pooling)
            start = stop
        dtype = self.head.storage_dtype
        for batch in backbone.plan_batches([len(e.ids) for e in encoded], self.model.batch_tokens):

            def sink(
                layer: str,
                site: Site,
                pooling: Pooling,
                vectors: torch.Tensor,
                at: list[int] = batch,
            ) -> None:
                columns, neurons = places[layer, site, pooling]
                picked = vectors.cpu().numpy()[:, neurons]
                values[at, columns] = from_disk(to_disk(picked, dtype), dtype)

            backbone.read(self.model, [encoded[row].ids for row in batch], wanted, sink)
        return values, np.array([e.truncated for e in encoded])

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes) of *texts*."""
        return self.classify(self.features(texts)[0])

    def classify(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes) of gathered neurons (n, neurons)."""
        return probabilities(self.head.logits(values), len(self.head.classes), "multinomial")


def open_predictor(folder: Path, config: PredictConfig) -> Predictor:
    """Load a head and the part of its model that it needs.

    Raises
    ------
    ArtifactError
        The head is damaged, or was made for another model or tokenizer (which is named).
    ModelError
        The model cannot be loaded.
    """
    artifacts.read_manifest(folder, "head")
    head = load_head(folder)
    options = _model_options(folder, head, config)
    model = backbone.load(options, depth=head.blocks)
    _check_model(folder, head, model)
    return Predictor(head, model)


def _model_options(folder: Path, head: Head, config: PredictConfig) -> ModelConfig:
    """How the model has to be read: as it was for the head, but for place, device and number type.

    What loads foreign code or pickle is never taken from a head.
    """
    reading = head.reading
    try:
        options = ModelConfig(
            model=str(config.model or reading["model"]),
            revision=reading["revision"],
            max_length=int(reading["max_length"]),
            truncation_side=Side(reading["truncation_side"]),
            long=Long(reading["long"]),
            prompt_template=reading["prompt_template"],
            dtype=Dtype(reading["dtype"]),
        )
        if options.max_length < 1:
            raise ValueError(f"max_length {options.max_length}")
        if not isinstance(options.revision, str | None):
            raise TypeError(f"revision {options.revision!r}")
        template = options.prompt_template
        if template is not None and template.count("{text}") != 1:
            raise ValueError(f"prompt_template {template!r} does not hold {{text}} once")
    except (KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
        raise ArtifactError(f"{folder}: not a valid head (reading: {error})") from error
    if config.dtype is not Dtype.AUTO:
        options = replace(options, dtype=config.dtype)
    return replace(options, device=config.device, batch_tokens=config.batch_tokens)


def _check_model(folder: Path, head: Head, model: Backbone) -> None:
    for field, what in (
        ("config_sha256", "model configuration"),
        ("tokenizer_sha256", "tokenizer"),
        ("weights", "weights"),
    ):
        if head.model.get(field) != model.identity[field]:
            raise ArtifactError(
                f"{folder}: made for another {what} than {model.options.model} has",
                f"It needs {head.model.get('id')}; give its place with --model, or train again.",
            )
    layout = model.layout
    for f in head.features:
        if f.layer not in layout.layers or layout.width(f.layer, f.site) != f.width:
            raise ArtifactError(
                f"{folder}: {f.layer} {f.site.value}: the model has no {f.width} such neurons"
            )


def predict(
    predictor: Predictor, rows: Iterable[Row], done: Callable[[int], None] | None = None
) -> Iterator[tuple[Row, Prediction]]:
    """Classify rows one window at a time, in their order.

    Raises
    ------
    DataError
        A text of no tokens, or too long where the head was made with ``--long error``.
    """
    stream, size, total = iter(rows), FIRST_WINDOW, 0
    while window := list(islice(stream, size)):
        values, truncated = predictor.features([row.text for row in window])
        probs = predictor.classify(values)
        labels = metrics.decide(probs, predictor.head.threshold)
        for row, p, label, cut in zip(window, probs, labels, truncated, strict=True):
            yield row, _prediction(predictor.head, row.id, p, int(label), bool(cut))
        total += len(window)
        if done is not None:
            done(total)
        size = WINDOW


def _prediction(
    head: Head, row_id: str, probs: NDArray[np.float64], label: int, truncated: bool
) -> Prediction:
    rounded = [round(float(p), 6) for p in probs]
    named = dict(zip(head.classes, rounded, strict=True))
    return Prediction(row_id, head.classes[label], rounded[label], named, truncated)


def read_input(source: str, config: PredictConfig) -> Iterator[Row]:
    """Rows to classify, from a file or ``-``; labels are read where they are needed."""
    return read_rows(
        source,
        format=config.format,
        text_column=config.text_column,
        label_column=config.label_column if config.evaluate else None,
        id_column=config.id_column,
        require_label=config.evaluate,
    )


class Evaluation:
    """Collects true labels and probabilities of a stream, and scores them at its end."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._codes: list[int] = []
        self._probs: list[list[float]] = []

    def add(self, row: Row, prediction: Prediction) -> None:
        """Take in one row; `DataError` where its label is none of the head's."""
        if row.label not in prediction.probs:
            raise DataError(
                f"line {row.line}: label {row.label!r} is none of the head's classes"
                f" ({', '.join(self._head.classes)})"
            )
        self._codes.append(self._head.classes.index(row.label))
        self._probs.append(list(prediction.probs.values()))

    def result(self) -> dict[str, Any]:
        """The metrics, as in ``metrics.json``."""
        if not self._codes:
            raise DataError("no rows to evaluate")
        codes, probs = np.array(self._codes), np.array(self._probs)
        return metrics.evaluate(codes, probs, self._head.classes, self._head.threshold)
