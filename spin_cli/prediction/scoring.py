"""How well predictions fit the input's labels, with the uncertainty of a sample of this size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, metrics
from spin_cli.dataset import split_labels
from spin_cli.dataset.streams import hash_file
from spin_cli.errors import DataError
from spin_cli.fields import to_plain
from spin_cli.head import Head
from spin_cli.label_metrics import macro_f1, micro_f1
from spin_cli.operating import operating_points
from spin_cli.prediction.stream import Prediction

CONFIDENCE, BINS = 0.95, 10
RESAMPLES, MOST_DRAWN = 1000, 10_000_000
"""Bootstrap samples, and rows in all of them: of many rows fewer samples are drawn."""


class Evaluation:
    """Collects true labels and probabilities of a stream, and scores them at its end.

    Intervals and AUROC need all of them: memory grows by 8 bytes for each row and class.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._number = {name: code for code, name in enumerate(head.classes)}
        self._codes: list[Any] = []
        self._probs: list[NDArray[np.float64]] = []
        self._predicted: list[Any] = []

    def add(self, found: Prediction) -> None:
        """Take in one row; `DataError` where its label is none of the head's."""
        if found.error is not None or found.label is None:
            return
        self._codes.append(self._code(found, found.truth))
        self._probs.append(np.array(list(found.probs.values()), np.float64))
        self._predicted.append(self._code(found, found.label))

    def _code(self, found: Prediction, label: str | list[str] | None) -> Any:
        """The class's number; of labels an indicator (L,)."""
        several = self._head.multi_label
        names = [str(label)] if not several else label
        if several and not isinstance(label, list):
            names = split_labels(label or "", str(self._head.label_separator))
        for name in names or ():
            if name not in self._number:
                raise DataError(
                    f"{found.place}: label {name!r} is none of the head's classes"
                    f" ({', '.join(self._head.classes)})",
                    "Correct or remove the row, name another --label-column, or leave --evaluate"
                    " away.",
                )
        codes = [self._number[name] for name in names or ()]
        if not several:
            return codes[0]
        given = np.zeros(len(self._number), np.int64)
        given[codes] = 1
        return given

    def result(self) -> dict[str, Any]:
        """The metrics, as in ``metrics.json`` (None: undefined), with intervals and reliability.

        Of a head that abstains also what is ``answered``; the rest counts every answer. Of two
        classes, and of labels, `operating_points` as well.
        """
        if not self._codes:
            raise DataError("no rows to evaluate")
        codes, probs = np.array(self._codes), np.stack(self._probs)
        predicted = np.array(self._predicted)
        scores = metrics.evaluate(codes, probs, self._head.classes, self._head.rule)
        scores["intervals"] = intervals(codes, probs, predicted)
        bins = reliability(metrics.right(codes, predicted), metrics.certainty(probs, predicted))
        scores["reliability"] = {"bins": bins}
        if points := operating_points(codes, probs, self._head.classes):
            scores["operating_points"] = points
        if self._head.abstain_below is not None:
            scores["answered"] = self._head.answered(codes, probs)
        return dict(to_plain(scores))


def seen_split(folder: Path, source: str) -> str | None:
    """Whether the file *source* is the train or val data of the head in *folder*, and which."""
    path = Path(source)
    if source == "-" or not path.is_file():
        return None
    known = artifacts.read_manifest(folder, "head").get("data", [])
    splits = {entry["sha256"]: entry["split"] for entry in known}
    found = splits.get(hash_file(path)[0])
    return None if found == "test" else found


def intervals(
    codes: NDArray[Any], probs: NDArray[np.float64], predicted: NDArray[Any], seed: int = 0
) -> dict[str, list[float]]:
    """Percentile bootstrap intervals of the scores over rows (Efron 1979), at 95%.

    Parameters
    ----------
    codes : (n,) true class numbers, or (n, n_classes), 1 where a label applies
    probs : (n, n_classes)
    predicted : as *codes*, what was answered
    seed : int

    Returns
    -------
    dict
        ``[low, high]`` of accuracy, macro-F1, log loss and, for two classes, AUROC; with labels
        of micro-F1 too.
    """
    n, n_classes = probs.shape
    losses, right = metrics.row_losses(codes, probs), metrics.right(codes, predicted).astype(float)
    functions: dict[str, Callable[[NDArray[Any]], float]] = {
        "accuracy": lambda at: float(right[at].mean()),
        "macro_f1": lambda at: metrics.macro_f1(codes[at], predicted[at], n_classes),
        "log_loss": lambda at: float(losses[at].mean()),
    }
    if codes.ndim == 2:
        functions["micro_f1"] = lambda at: micro_f1(codes[at], predicted[at])
        functions["macro_f1"] = lambda at: macro_f1(codes[at], predicted[at])
    elif n_classes == 2:
        functions["auroc"] = lambda at: metrics.auroc(codes[at], probs[at, 1])
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(200, min(RESAMPLES, MOST_DRAWN // n))):
        at = np.asarray(rng.integers(0, n, n))
        for name, function in functions.items():
            drawn[name].append(function(at))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    found = {}
    for name, values in drawn.items():
        known = np.array(values)[~np.isnan(values)]  # a sample of one class has no AUROC
        if len(known):
            found[name] = [float(value) for value in np.quantile(known, tails)]
    return found


def reliability(right: NDArray[np.bool_], prob: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Stated against actual share of right answers, in bins of the stated probability.

    Parameters
    ----------
    right : (n,) whether each answer is right
    prob : (n,) its stated probability

    Returns
    -------
    list of dict
        Of each bin that has rows: from, to, rows, mean stated probability and accuracy.
    """
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.digitize(prob, edges[1:-1], right=True), 0, BINS - 1)
    bins = []
    for k in range(BINS):
        here = place == k
        if here.any():
            bins.append(
                {
                    "from": round(float(edges[k]), 6), "to": round(float(edges[k + 1]), 6),
                    "rows": int(here.sum()), "stated": float(prob[here].mean()),
                    "accuracy": float(right[here].mean()),
                }
            )  # fmt: skip
    return bins
