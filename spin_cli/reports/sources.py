"""What a report is made from: a head, and what is left of the stages before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import activations, artifacts
from spin_cli.activations import Feature
from spin_cli.choices import Metric, StorageDtype
from spin_cli.dataset import read_texts
from spin_cli.errors import ArtifactError
from spin_cli.head import METRICS, Head, HeadFeature, load_head
from spin_cli.reports.drawing import plain
from spin_cli.samples import Samples, read_samples, read_targets
from spin_cli.selected import read_scores
from spin_cli.training.card import told_split
from spin_cli.training.table import Choice, together
from spin_cli.training.tried import choices_of

METRIC_KEYS = {"accuracy": "accuracy", "macro-f1": "macro_f1", "auroc": "auroc"}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro-f1": "macro-F1",
    "auroc": "AUROC",
    "log-loss": "negative log loss",
}
MAX_TEXTS = 1_000_000
"""More rows than this are not searched for their texts."""


class LeftOut(Exception):  # noqa: N818 - no error: the page says why a part is not on it
    """A part of the report cannot be made; the message says why."""


@dataclass(frozen=True)
class Artifact:
    """A stage's folder, checked."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    @property
    def log(self) -> dict[str, Any]:
        """Times; empty where there are none."""
        path = self.folder / artifacts.LOG
        found = artifacts.read_json(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Answers:
    """What the head says of rows that it has not seen."""

    split: str
    rows: NDArray[np.intp]
    codes: NDArray[np.int64]
    """(n,) class of each row; with labels (n, L), 1 where one applies. ``predicted`` likewise."""
    probs: NDArray[np.float64]
    predicted: NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """A head with the artifacts that it was made from, as far as they are still there."""

    trained: Artifact
    head: Head
    metrics: dict[str, Any]
    selected: Artifact | None
    extracted: Artifact | None

    @property
    def classes(self) -> list[str]:
        """Class names, fit to be shown."""
        return [plain(name, 60) for name in self.head.classes]

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of the classes."""
        return self.head.multi_label

    @property
    def metric(self) -> Metric:
        """What everything was chosen by."""
        return Metric(self.metrics["metric"])

    @property
    def unseen(self) -> str:
        """The split whose scores say most."""
        return told_split(self.metrics)

    @property
    def choice(self) -> Choice:
        """What the head reads; of several parts, what they read together."""
        return together(choices_of(self.metrics["chosen"]))

    @property
    def joined(self) -> str:
        """What the head is where it is a stack, a blend, or the mean of both; else nothing."""
        chosen = self.metrics["chosen"]
        parts = len(chosen.get("parts", ()))
        if "matrices" not in chosen:
            return f"a blend of {parts} heads on masked neurons" if parts else ""
        others = parts - 1
        with_masks = f" and {others} on masked neurons" if others > 0 else ""
        return f"a stack of {int(chosen['matrices'])} matrices{with_masks}"

    def selection(self) -> Artifact:
        """The selection, or `LeftOut`."""
        if self.selected is None:
            raise LeftOut("the selection that the head was made from is gone")
        return self.selected

    def activations(self) -> Artifact:
        """The activations, or `LeftOut`."""
        if self.extracted is None:
            raise LeftOut("the activations that the head was made from are gone")
        return self.extracted

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """All matrices."""
        return activations.features_of(self.activations().manifest)

    @cached_property
    def layers(self) -> list[str]:
        """Layers that were read, in the model's order."""
        there = {feature.layer for feature in self.features}
        return [name for name in self.activations().manifest["layers"] if name in there]

    @cached_property
    def samples(self) -> Samples:
        """What is known of each row."""
        return read_samples(self.activations().folder)

    @cached_property
    def codes(self) -> NDArray[np.int64]:
        """(N,) class of each row; with labels (N, L), 1 where one applies."""
        source = self.activations()
        if list(self.head.classes) != source.manifest["classes"]:
            raise ArtifactError(f"{source.folder}: its classes are not those of the head")
        _, codes = read_targets(source.folder, source.manifest)
        if (codes.ndim == 2) != self.multi_label:
            raise ArtifactError(f"{source.folder}: of one label a text, or the head is not")
        return codes

    def of_class(self, code: int) -> NDArray[np.bool_]:
        """(N,) rows of a class, or with a label."""
        return np.asarray(self.codes[:, code] == 1 if self.multi_label else self.codes == code)

    def said(self, codes: NDArray[np.int64]) -> str:
        """A row's class or labels, of `codes` or of an answer, for people."""
        if not self.multi_label:
            return self.classes[int(codes)]
        return ", ".join(self.head.names(codes)) or "no label"

    def matrix(self, feature: Feature | HeadFeature) -> NDArray[Any]:
        """All rows (N, F) of one matrix."""
        source = self.activations()
        whole = Feature(feature.layer, feature.site, feature.pooling, feature.width)
        dtype = StorageDtype(source.manifest["storage_dtype"])
        return activations.read_matrix(
            source.folder, whole, source.manifest["counts"]["rows"], dtype
        )

    def unseen_rows(self) -> tuple[str, NDArray[np.intp]]:
        """Rows that the final head was not fitted to, and their split."""
        for split in ("test", "val"):
            rows = self.samples.rows(split)
            if len(rows) and not (split == "val" and self.metrics["chosen"]["refit"]):
                return split, rows
        raise LeftOut(
            "there is no test split, and the head was fitted to train and val together, so no row"
            " is left that it has not seen (`spin train --oof FILE` writes out-of-fold answers)"
        )

    @cached_property
    def answers(self) -> Answers:
        """The head's answers to unseen rows, from the stored activations."""
        split, rows = self.unseen_rows()
        parts = [self.matrix(feature)[rows][:, feature.neurons] for feature in self.head.features]
        probs = self.head.probabilities(np.hstack(parts))
        return Answers(split, rows, self.codes[rows], probs, self.head.decide(probs))

    @cached_property
    def scores(self) -> list[dict[str, str]]:
        """The rows of the selection's ``scores.csv``."""
        return read_scores(self.selection().folder)

    @cached_property
    def texts(self) -> list[str] | str:
        """The text of each row; or why they cannot be had."""
        source = self.activations()
        found = read_texts(source.folder, source.manifest, MAX_TEXTS)
        return plain(found, 300) if isinstance(found, str) else found

    def text(self, row: int) -> str | None:
        """A row's text, where it is still there."""
        return None if isinstance(self.texts, str) else self.texts[row]


def read_run(path: Path) -> Run:
    """Read a run folder, or a head with the artifacts behind it.

    Raises
    ------
    ArtifactError
        There is no head, it is damaged, or what it was made from has changed since.
    """
    folder = path if (path / artifacts.MANIFEST).is_file() else path / "head"
    if not path.exists():
        raise ArtifactError(f"{path}: no such folder", "Make it: spin run DATA -m MODEL -o RUN")
    trained = Artifact(folder, artifacts.read_manifest(folder, "head"))
    chain = list(_parents(trained))
    run = Run(
        trained,
        load_head(folder),
        artifacts.read_json(folder / METRICS),
        chain[0] if chain else None,
        chain[1] if len(chain) > 1 else None,
    )
    try:
        scores, _ = run.metrics["spin"][run.unseen], (run.metric, run.choice)
        if set(scores["per_class"]) != set(run.head.classes):
            raise ValueError("its scores are not those of the head's classes")
        if not run.multi_label and np.shape(scores["confusion"]) != (len(run.classes),) * 2:
            raise ValueError("its confusion matrix is not one of the head's classes")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{folder / METRICS}: not what `spin train` writes ({error})",
            "Make the head again: spin train … --force",
        ) from error
    return run


def _parents(child: Artifact) -> Iterator[Artifact]:
    """The artifacts before one, until one is gone; `ArtifactError` for one that changed."""
    while "parent" in child.manifest:
        place = (child.folder / child.manifest["parent"]["path"]).resolve()
        if not place.exists():
            return
        child = Artifact(*artifacts.read_parent(child.folder, child.manifest))
        yield child
