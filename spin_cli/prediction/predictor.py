"""A head with the part of its model that it reads: texts to neurons to class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import artifacts, backbone, heap
from spin_cli.backbone import Backbone, Encoded
from spin_cli.backbone.partial import depth_for, narrow
from spin_cli.choices import Dtype, Pooling, Site
from spin_cli.config import ModelConfig, PredictConfig
from spin_cli.errors import ArtifactError, ModelError, UsageError
from spin_cli.head import Head, HeadFeature, load_head
from spin_cli.ranges import check_ranges
from spin_cli.typed import from_plain


@dataclass(frozen=True)
class Place:
    """Where a feature's neurons come from and go to."""

    columns: slice
    """Their columns among all neurons of the head."""
    picked: NDArray[np.int64]
    """Their indices in the vector that the model gives; a narrowed one is shorter than the
    feature's width."""


@dataclass(frozen=True)
class Predictor:
    """A head with its model."""

    head: Head
    model: Backbone
    narrowed: NDArray[np.int32] | None = None
    """The neurons that the last block's FFN was narrowed to; None: it gives all."""

    @cached_property
    def tidy(self) -> Callable[[int], None]:
        """Hands free memory back; of `heap` this alone sets nothing in the process."""
        return heap.watch()

    @cached_property
    def places(self) -> dict[tuple[str, Site, Pooling], Place]:
        """Where the neurons of each layer, site and pooling belong."""
        places, start = {}, 0
        for feature in self.head.features:
            stop = start + len(feature.neurons)
            picked = feature.neurons.astype(np.int64)
            if self.narrowed is not None and _is_last_ffn(feature, self.model):
                picked = np.searchsorted(self.narrowed, feature.neurons)
            place = Place(slice(start, stop), picked)
            places[feature.layer, feature.site, feature.pooling] = place
            start = stop
        return places

    @cached_property
    def wanted(self) -> dict[tuple[str, Site], list[Pooling]]:
        """Which poolings to read of each layer and site."""
        wanted: dict[tuple[str, Site], list[Pooling]] = {}
        for feature in self.head.features:
            wanted.setdefault((feature.layer, feature.site), []).append(feature.pooling)
        return wanted

    def encode(self, texts: Sequence[str], places: Sequence[str] = ()) -> list[Encoded]:
        """Texts as token ids; `DataError` for one of no tokens, or too long if that is refused.

        *places* say where each text stands, for the message.
        """
        return backbone.encode(self.model, texts, places=places)

    def gather(self, encoded: Sequence[Encoded]) -> NDArray[np.float32]:
        """The head's neurons (n, neurons) for each encoded text, as the model gives them."""
        values = np.empty((len(encoded), self.head.neurons), np.float32)

        def store(
            layer: str,
            site: Site,
            pooling: Pooling,
            rows: Sequence[int],
            vectors: NDArray[np.float32],
        ) -> None:
            place = self.places[layer, site, pooling]
            values[rows, place.columns] = vectors[:, place.picked]

        backbone.gather(self.model, encoded, self.wanted, store)
        self.tidy(sum(each.n_tokens for each in encoded))
        return values

    def rounded(
        self, values: NDArray[np.float32], places: Sequence[str] = ()
    ) -> NDArray[np.float32]:
        """Neurons (n, neurons) rounded as those were that the head was trained on.

        *places* say where each text stands, for the message.

        Raises
        ------
        ModelError
            NaN, or an infinity that the number format on the disk is not to blame for: no answer
            could be made of it.
        """
        stored = backbone.as_stored(torch.from_numpy(values), self.head.storage_dtype)
        found = np.asarray(stored.float().numpy())
        sound = np.isfinite(values if self.model.dtype is torch.float16 else found)
        if not sound.all():
            row, column = np.argwhere(~sound)[0].tolist()
            raise self._flaw(column, values[row, column], places[row] if places else None)
        return found

    def _flaw(self, column: int, value: np.float32, place: str | None) -> ModelError:
        feature, neuron = [(f, j) for f in self.head.features for j in f.neurons][column]
        where = "" if place is None else f"{place}: "
        compute = str(self.model.dtype).removeprefix("torch.")
        return ModelError(
            f"{where}{feature.layer} {feature.site.value} {feature.pooling.value} neuron {neuron}"
            f" is {value}, computed in {compute}",
            "Try --dtype float32 or bfloat16; a model that gives NaN in float32 is damaged.",
        )

    def features(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The head's rounded neurons (n, neurons) for each text, and which texts were cut."""
        encoded = self.encode(texts)
        return self.rounded(self.gather(encoded)), np.array([e.truncated for e in encoded], bool)

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes) of *texts*."""
        return self.classify(self.features(texts)[0])

    def classify(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes) of gathered neurons (n, neurons)."""
        return self.head.probabilities(values)

    def decide(self, probs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Class numbers (n,), or labels (n, n_classes), for probabilities (n, n_classes)."""
        return self.head.decide(probs)


def _is_last_ffn(feature: HeadFeature, model: Backbone) -> bool:
    stack = model.layout.stacks[-1]
    return feature.site is Site.FFN and feature.layer == stack.layers[stack.depth]


def open_predictor(folder: Path, config: PredictConfig, *, whole: bool = False) -> Predictor:
    """Load a head and the part of its model that it needs.

    Parameters
    ----------
    folder : Path
        Written by ``spin train``.
    config : PredictConfig
    whole : bool
        Load all of the model all the same, to compare with.

    Raises
    ------
    ArtifactError
        The head is damaged, or was made for another model or tokenizer (which is named).
    ModelError
        The model cannot be loaded.
    UsageError
        A number among the options is out of its range, or the head cannot do what they ask for.
    """
    check_ranges(config)
    artifacts.read_manifest(folder, "head")
    head = load_head(folder)
    head = _with_separator(head, config.label_separator)
    if config.decision_thresholds:
        head = head.deciding_at(config.decision_thresholds)
    if config.threshold is not None:
        head = replace(head, abstain_below=config.threshold)
    options = _model_options(folder, head, config)
    depth = None if whole else depth_for([feature.layer for feature in head.features])
    try:
        model = backbone.load(options, depth=depth)
    except ArtifactError as error:  # it has fewer blocks than the head reads
        raise ArtifactError(
            f"{folder}: made for another model than {options.model}: {error.message}",
            _needs(head, "model"),
        ) from error
    _check_model(folder, head, model)
    return Predictor(head, model, None if whole else _narrow(head, model))


def _with_separator(head: Head, separator: str | None) -> Head:
    """A multi-label head that splits and joins labels by another separator."""
    if separator is None:
        return head
    if not head.multi_label:
        raise UsageError("--label-separator: the head gives one label to a text")
    if any(separator in name for name in head.classes):
        raise UsageError(f"--label-separator {separator}: a label's name holds it")
    return replace(head, label_separator=separator)


def settle(folder: Path, config: PredictConfig) -> PredictConfig:
    """*config* with the label separator of the head, which is needed to read labels by."""
    if not config.evaluate or config.label_separator is not None:
        return config
    artifacts.read_manifest(folder, "head")
    return replace(config, label_separator=load_head(folder).label_separator)


def _narrow(head: Head, model: Backbone) -> NDArray[np.int32] | None:
    """Let the last block compute no more than the head reads of it, where that is possible."""
    stack = model.layout.stacks[-1]
    last = [f for f in head.features if f.layer in stack.layers[stack.depth :]]
    if not last or any(feature.site is not Site.FFN for feature in last):
        return None
    neurons = np.unique(np.concatenate([feature.neurons for feature in last]))
    return neurons if narrow(model.model, stack, neurons) else None


def _model_options(folder: Path, head: Head, config: PredictConfig) -> ModelConfig:
    """How the model has to be read: as it was for the head, but for place, device and number type.

    Whether foreign code or pickle may be loaded is never taken from a head.
    """
    if not head.reads_text:
        raise ArtifactError(
            f"{folder}: knows no model: another program wrote the activations it was trained on",
            "It cannot read texts; `spin ablate`, `spin inspect` and `spin report` need no model.",
        )
    try:
        options = from_plain(ModelConfig, head.reading)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ArtifactError(f"{folder}: not a valid head (reading: {error})") from error
    if config.model is not None:
        options = replace(options, model=str(config.model))
    if config.adapter is not None:
        options = replace(options, adapter=config.adapter)
    if config.dtype is not Dtype.AUTO:
        options = replace(options, dtype=config.dtype)
    return replace(
        options,
        device=config.device,
        device_map=config.device_map,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        batch_tokens=config.batch_tokens,
    )


def _needs(head: Head, option: str) -> str:
    return f"It needs {head.model.get('id')}; give its place with --{option}, or train again."


def _check_model(folder: Path, head: Head, model: Backbone) -> None:
    for field, what in (
        ("config_sha256", "model configuration"),
        ("tokenizer_sha256", "tokenizer"),
        ("commit", "revision of the model"),
        ("adapter", "adapter"),
        ("weights", "weights"),
    ):
        if head.model.get(field) != model.identity.get(field):
            option = "adapter" if field == "adapter" else "model"
            raise ArtifactError(
                f"{folder}: made for another {what} than {model.options.model} has",
                _needs(head, option),
            )
    layout = model.layout
    for f in head.features:
        if f.layer not in layout.layers or layout.width(f.layer, f.site) != f.width:
            raise ArtifactError(
                f"{folder}: {f.layer} {f.site.value}: the model has no {f.width} such neurons"
            )
