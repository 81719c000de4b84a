"""Probabilities that mean what they say, and thresholds on them.

All of it is fitted to evidence: probabilities of rows by fits that had not seen them, be they
validation rows or out-of-fold ones. Entirely new these rows are not: the head was chosen by them,
with hidden units the val rows also say when training ends, and for stacks see `oof.write_oof`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from spin_cli import metrics
from spin_cli.choices import Calibration, Metric
from spin_cli.config import TrainConfig
from spin_cli.errors import DataError, UsageError
from spin_cli.training import label_decisions
from spin_cli.training.label_decisions import MIN_CLASS_ROWS, MIN_ROWS, SMOOTHING

OUT_OF_FOLD = "out-of-fold"
"""What evidence is where heads were cross-validated; else it is ``val``."""
MIN_ANSWERS = 30


@dataclass(frozen=True)
class Evidence:
    """What can be known of a head without the test split."""

    codes: NDArray[np.int64]
    """(N,), or (N, L) where rows have any number of labels."""
    probs: NDArray[np.float64]
    """(N, n_classes), as the head gives them before calibration."""
    classes: tuple[str, ...]
    what: str
    """``val`` or ``out-of-fold``."""

    @property
    def several(self) -> bool:
        """Whether rows have any number of labels."""
        return self.codes.ndim == 2


@dataclass(frozen=True)
class Scaling:
    """Logits z become ``slope * z + shift``."""

    slope: float | NDArray[np.float64]
    """(L,) for labels."""
    shift: NDArray[np.float64]
    """(K,); K = 1 for two classes."""
    several: bool = False
    """Whether probabilities are those of labels, independent of one another."""

    def apply(self, probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Calibrated probabilities."""
        return self._probabilities(self._logits(probs) * self.slope + self.shift, probs)

    def undo(self, probs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities as they were before."""
        return self._probabilities((self._logits(probs) - self.shift) / self.slope, probs)

    def _logits(self, probs: NDArray[np.float64]) -> NDArray[np.float64]:
        return metrics.logits(probs, "labels") if self.several else _logits(probs)

    def _probabilities(
        self, z: NDArray[np.float64], probs: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        kind = "labels" if self.several else "multinomial"
        return metrics.probabilities(z, probs.shape[1], kind)


def _logits(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    z = metrics.logits(probs)
    return z[:, 1:] - z[:, :1] if z.shape[1] == 2 else z


def fit_scaling(evidence: Evidence, kind: Calibration, notes: list[str]) -> Scaling:
    """The scaling with the lowest log loss on the evidence (Guo et al. 2017).

    The shifts carry a small ridge penalty. With too few rows nothing is scaled, and a note says so.
    """
    if evidence.several:
        known = evidence.codes, evidence.probs, evidence.classes
        fitted = label_decisions.fit_labels(*known, kind, evidence.what, notes)
        return Scaling(*fitted, several=True)
    outputs = 1 if evidence.probs.shape[1] == 2 else evidence.probs.shape[1]
    identity = Scaling(1.0, np.zeros(outputs))
    if kind is Calibration.NONE:
        return identity
    rows, counts = len(evidence.codes), np.bincount(evidence.codes, minlength=outputs)
    if rows < MIN_ROWS:
        notes.append(
            f"not calibrated: {rows} {evidence.what} rows, and it takes {MIN_ROWS} or more"
        )
        return identity
    if kind is Calibration.PER_CLASS and counts.min() < MIN_CLASS_ROWS:
        notes.append(
            f"calibrated by temperature alone: a class has {counts.min()} {evidence.what} rows,"
            f" and a shift of its own takes {MIN_CLASS_ROWS}"
        )
        kind = Calibration.TEMPERATURE
    z = _logits(evidence.probs)
    free = outputs if kind is Calibration.PER_CLASS else 0

    def scaled(u: NDArray[np.float64]) -> Scaling:
        shift = np.zeros(outputs)
        shift[:free] = u[1:]
        return Scaling(float(np.exp(u[0])), shift)

    def loss(u: NDArray[np.float64]) -> float:
        at = scaled(u)
        probs = metrics.probabilities(z * at.slope + at.shift, evidence.probs.shape[1])
        return metrics.log_loss(evidence.codes, probs) + SMOOTHING * float(u[1:] @ u[1:]) / rows

    bounds = [(-4.0, 4.0)] + [(-5.0, 5.0)] * free
    found = minimize(loss, np.zeros(1 + free), method="L-BFGS-B", bounds=bounds)
    return scaled(found.x) if found.fun < loss(np.zeros(1 + free)) else identity


def choose_threshold(
    evidence: Evidence, metric: Metric, config: TrainConfig, notes: list[str]
) -> metrics.Threshold:
    """Probability of the second class from which it is predicted; None: the likelier class.

    With any number of labels, the probability (L,) from which each is given.

    Parameters
    ----------
    evidence : calibrated

    Raises
    ------
    UsageError
        A target for more than two classes, or two targets.
    DataError
        Too few rows for the target, or no threshold that meets it.
    """
    targets = (config.target_precision, config.target_recall)
    if config.positive_label is not None and config.positive_label not in evidence.classes:
        raise UsageError(
            f"--positive-label {config.positive_label}: the classes are"
            f" {', '.join(evidence.classes)}"
        )
    if evidence.several:
        return _label_thresholds(evidence, metric, config, notes)
    if targets != (None, None):
        if len(evidence.classes) != 2 or None not in targets:
            raise UsageError(
                "--target-precision, --target-recall: one of them, and for two classes only"
            )
        return _for_target(evidence, config)
    if metric is not Metric.MACRO_F1 or len(evidence.classes) != 2:
        return None
    if len(evidence.codes) < MIN_ROWS:
        notes.append(
            f"threshold left at 0.5: {len(evidence.codes)} {evidence.what} rows, and tuning it"
            f" takes {MIN_ROWS} or more"
        )
        return None
    return metrics.best_threshold(evidence.codes, evidence.probs)


def _label_thresholds(
    evidence: Evidence, metric: Metric, config: TrainConfig, notes: list[str]
) -> NDArray[np.float64]:
    targets = {config.target_precision, config.target_recall} - {None}
    if targets and (config.positive_label is None or len(targets) == 2):
        raise UsageError(
            "--target-precision, --target-recall: one of them, for the label that --positive-label"
            " names"
        )
    thresholds = label_decisions.choose_thresholds(
        evidence.codes, evidence.probs, evidence.classes, metric, evidence.what, notes
    )
    if targets:
        at = evidence.classes.index(str(config.positive_label))
        thresholds[at] = _for_target(evidence, config)
    return thresholds


def _for_target(evidence: Evidence, config: TrainConfig) -> float:
    positive = evidence.classes.index(config.positive_label or evidence.classes[1])
    p = evidence.probs[:, positive]
    true = evidence.codes[:, positive] == 1 if evidence.several else evidence.codes == positive
    if true.sum() < MIN_CLASS_ROWS:
        raise DataError(
            f"{int(true.sum())} {evidence.what} rows of {evidence.classes[positive]!r}; a target"
            f" takes {MIN_CLASS_ROWS} or more",
            "Extract again with a larger --val-fraction, or cross-validate: --cv 5",
        )
    # A threshold at each probability that occurs: what is said from there on, and what is right.
    order = np.argsort(-p, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    hits = np.cumsum(true[order])[ends]
    precision, recall = hits / (ends + 1), hits / true.sum()
    if config.target_recall is not None:
        at = int(np.argmax(recall >= config.target_recall))
    else:
        fine = np.flatnonzero((precision >= config.target_precision) & (ends + 1 >= MIN_ANSWERS))
        if not len(fine):
            best = _highest(precision, ends)
            raise DataError(
                f"--target-precision {config.target_precision}: the highest on {evidence.what}"
                f" rows is {precision[best]:.3f}",
                f"Give --target-precision {_down(precision[best])} or less: there the recall is"
                f" {recall[best]:.3f}.",
            )
        at = int(fine[-1])
    low = p[order[ends[at] + 1]] if ends[at] + 1 < len(p) else 0.0
    between = 0.5 * (p[order[ends[at]]] + low)
    return float(between if positive == 1 or evidence.several else 1.0 - between)


def _highest(reached: NDArray[np.float64], ends: NDArray[np.intp]) -> int:
    """Where what is reached by `MIN_ANSWERS` answers or more is highest; of equals the last."""
    enough = np.where(ends + 1 >= MIN_ANSWERS, reached, -1.0)
    return int(np.flatnonzero(enough == enough.max())[-1])


def _down(share: float) -> str:
    """A share cut after three digits, so that it can be reached."""
    return f"{np.floor(share * 1000) / 1000:.3f}"


def choose_abstention(
    evidence: Evidence, threshold: metrics.Threshold, config: TrainConfig, notes: list[str]
) -> float | None:
    """Probability of the chosen label under which no answer is given; None: always answer.

    For a target accuracy the lowest that meets it on the evidence.

    Raises
    ------
    UsageError
        Both a bound and a target.
    DataError
        Too few rows, or no bound that meets the target.
    """
    if config.abstain_below is not None and config.target_accuracy is not None:
        raise UsageError("--abstain-below, --target-accuracy: one of them")
    if config.target_accuracy is None:
        return config.abstain_below
    predicted = metrics.decide(evidence.probs, threshold)
    sure = metrics.certainty(evidence.probs, predicted)
    if len(sure) < MIN_ROWS:
        raise DataError(f"{len(sure)} {evidence.what} rows; --target-accuracy takes {MIN_ROWS}")
    order = np.argsort(-sure, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(sure[order])), len(sure) - 1)
    share = np.cumsum(metrics.right(evidence.codes, predicted)[order])[ends] / (ends + 1)
    fine = np.flatnonzero((share >= config.target_accuracy) & (ends + 1 >= MIN_ANSWERS))
    if not len(fine):
        best = _highest(share, ends)
        raise DataError(
            f"--target-accuracy {config.target_accuracy}: the highest on {evidence.what} rows is"
            f" {share[best]:.3f}",
            f"Give --target-accuracy {_down(share[best])} or less: there"
            f" {(ends[best] + 1) / len(sure):.1%} of them get an answer.",
        )
    at = ends[int(fine[-1])]
    if at + 1 == len(sure):
        notes.append("the target accuracy is met without abstaining")
        return None
    notes.append(f"answers {(at + 1) / len(sure):.1%} of the {evidence.what} rows")
    return float(0.5 * (sure[order[at]] + sure[order[at + 1]]))
