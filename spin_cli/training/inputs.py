"""What `train` reads of the stages before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, metrics
from spin_cli.activations import Feature, features_of
from spin_cli.choices import Metric, StorageDtype
from spin_cli.config import CV_VAL_ROWS, SelectConfig, TrainConfig
from spin_cli.dataset import read_texts
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.names import list_names
from spin_cli.samples import read_targets
from spin_cli.training import baselines
from spin_cli.training.duplicates import near_duplicates
from spin_cli.training.search import Split
from spin_cli.training.table import Reader, read_masks
from spin_cli.typed import from_plain

TWINS = 0.05
"""Share of val rows with a near-duplicate in train from which on something is done about them."""


@dataclass(frozen=True)
class Inputs:
    """What the stages before have written, checked."""

    source: Path
    activations: dict[str, Any]
    selection: dict[str, Any]
    features: tuple[Feature, ...]
    layers: tuple[str, ...]
    """Those that were extracted, in the model's order."""
    deepest: int
    """Position among them of the last that a head may read."""
    codes: NDArray[np.int64]
    rows: dict[str, NDArray[np.intp]]
    dtype: StorageDtype
    metric: Metric
    config: TrainConfig
    selecting: SelectConfig
    """Options of the selection."""

    @property
    def classes(self) -> list[str]:
        """Label names."""
        return list(self.activations["classes"])

    @property
    def search_rows(self) -> NDArray[np.intp]:
        """Train and val rows."""
        return np.concatenate([self.rows["train"], self.rows["val"]])

    @property
    def split(self) -> Split:
        """The division of `search_rows`."""
        n_train, n = len(self.rows["train"]), len(self.search_rows)
        codes = self.codes[self.search_rows]
        return Split(
            codes, np.arange(n_train), np.arange(n_train, n), len(self.classes), self.metric,
            self.config.penalty, self.config.class_weight,
        )  # fmt: skip

    @cached_property
    def texts(self) -> list[str] | str:
        """The text of each row; or why they cannot be had."""
        return read_texts(self.source, self.activations, baselines.MAX_ROWS)

    @cached_property
    def groups(self) -> NDArray[np.int64] | None:
        """The group of near-duplicates of each of `search_rows`; None: unknown."""
        if isinstance(self.texts, str):
            return None
        return near_duplicates([self.texts[row] for row in self.search_rows])


def read_inputs(source: Path, selection: dict[str, Any], config: TrainConfig) -> Inputs:
    """Check the artifacts before, and read what is known of each row.

    Raises
    ------
    ArtifactError
        The activations are missing, damaged or changed, or the selection's options are none.
    UsageError
        No layer is as shallow as the options want it.
    DataError
        The metric says nothing of the val rows.
    """
    folder, manifest = artifacts.read_parent(source, selection)
    samples, codes = read_targets(folder, manifest)
    metric = config.metric or Metric(selection["metric"])
    metrics.check_defined(metric, codes[samples.rows("val")], "val")
    features = features_of(manifest)
    there = {feature.layer for feature in features}
    layers = tuple(name for name in manifest["layers"] if name in there)
    return Inputs(
        source=folder,
        activations=manifest,
        selection=selection,
        features=features,
        layers=layers,
        deepest=deepest_layer(layers, manifest["layers"], config.max_layer),
        codes=codes,
        rows={name: samples.rows(name) for name in ("train", "val", "test")},
        dtype=StorageDtype(manifest["storage_dtype"]),
        metric=metric,
        config=config,
        selecting=_options_of(source, selection),
    )


def deepest_layer(there: Sequence[str], order: Sequence[str], most: int | None) -> int:
    """Position among *there* of the deepest layer whose number is at most *most*; None: the last.

    Numbers are those of ``extract --layers``: ``layer_06`` is 6; where names do not say it
    (``final``, ``decoder_03``), the place in *order*, that of all layers of the model.
    `UsageError` where no number is so small.
    """
    if most is None:
        return len(there) - 1
    numbers: dict[str, int] = {}
    last = -1
    for name in order:  # of another program, which may leave some out
        own = re.fullmatch(r"layer_(\d+)", name)
        last = numbers[name] = int(own[1]) if own else last + 1
    allowed = [at for at, name in enumerate(there) if numbers[name] <= most]
    if not allowed:
        known = [f"{name} ({numbers[name]})" for name in there]
        raise UsageError(
            f"--max-layer {most}: the layers that there are lie deeper",
            f"There are {list_names(known, quote='')}.",
        )
    return max(allowed)


def _options_of(source: Path, selection: dict[str, Any]) -> SelectConfig:
    """What a selection was made by; how the work was done is not told, and decides nothing."""
    try:
        known = artifacts.to_plain(SelectConfig()) | selection["request"]["options"]
        return from_plain(SelectConfig, known | {"metric": selection["metric"]})
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{source}: the manifest's options are wrong: {error}") from error


def without_texts(inputs: Inputs) -> list[str]:
    """What to say where the texts cannot be had, since they decide more than one baseline."""
    if not isinstance(inputs.texts, str):
        return []
    return [
        f"{inputs.texts}, so there is no TF-IDF baseline, and near-duplicates may be trained on and"
        " judged by at once: another head may be chosen than with the texts"
    ]


def leave_twins_out(inputs: Inputs) -> tuple[Inputs, list[str]]:
    """Without the val rows that are much like train rows, where enough others are left.

    By a text whose twin was trained on that head looks best which remembers best: on SST-2, whose
    phrases overlap, heads chosen by all val rows were behind on whole sentences.

    Returns
    -------
    The inputs, and what to say of them.
    """
    if inputs.groups is None:
        return inputs, []
    train, val = np.split(inputs.groups, [len(inputs.rows["train"])])
    alone = ~np.isin(val, train)
    share = float((~alone).mean())
    if share < TWINS:
        return inputs, []
    said = f"{share:.0%} of the val rows have much of their wording in common with train rows"
    if alone.sum() < CV_VAL_ROWS or len(np.unique(inputs.codes[inputs.rows["val"][alone]])) < 2:
        return inputs, [
            f"{said}, so that scores on val are too high: give a val file of other texts"
        ]
    kept = replace(inputs, rows=inputs.rows | {"val": inputs.rows["val"][alone]})
    return kept, [f"{said} and were left out: all choices were made on the other {alone.sum():,}"]


def make_reader(source: Path, inputs: Inputs, rows: NDArray[np.intp]) -> Reader:
    """A reader of some rows."""
    ranked = read_masks(source, inputs.features)
    return Reader(inputs.source, ranked, inputs.layers, len(inputs.codes), rows, inputs.dtype)
