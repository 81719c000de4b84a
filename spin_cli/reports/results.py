"""How well the head does: against others, by class, by stated probability, and where it errs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from spin_cli import metrics
from spin_cli.prediction.scoring import reliability
from spin_cli.reports.charts import heat
from spin_cli.reports.drawing import COLOURS, Figure, Table, draw, plain
from spin_cli.reports.sources import METRIC_KEYS, METRIC_NAMES, LeftOut, Run

NAMES = {
    "spin": "SPIN",
    "best_layer": "best layer",
    "last_layer": "last layer",
    "tfidf": "TF-IDF",
}
COLUMNS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "auroc": "AUROC",
    "log_loss": "log loss",
    "ece": "calibration error",
}
MOST_NUMBERED, MOST_SHOWN, MOST_CONFUSIONS = 8, 24, 15
MOST_ERRORS, TEXT_CHARS = 12, 320
MOST_CLASSES = 100


def results_table(run: Run) -> Table:
    """Every classifier's scores on unseen rows, with intervals where there are some."""
    found = {
        name: scores
        for key, name in NAMES.items()
        if (scores := run.metrics.get(key, {}).get(run.unseen)) is not None
    }
    kept = [key for key in COLUMNS if any(scores.get(key) is not None for scores in found.values())]
    rows = [[name, *[sure(scores, key) for key in kept]] for name, scores in found.items()]
    return Table(["", *[column(run, key) for key in kept]], rows)


def column(run: Run, key: str) -> str:
    """A score's name; with labels a text is right when all of them are."""
    return "all labels right" if run.multi_label and key == "accuracy" else COLUMNS[key]


def sure(scores: dict[str, Any], key: str) -> str:
    """A score with its interval, where it has them."""
    if scores.get(key) is None:
        return "–"
    text = f"{scores[key]:.3f}"
    if key in scores.get("intervals", {}):
        low, high = scores["intervals"][key]
        text += f" [{low:.3f}, {high:.3f}]"
    return text


def draw_results(run: Run, files: bool) -> Figure:
    """Scores beside one another, with their intervals."""
    key = METRIC_KEYS.get(run.metric.value, "accuracy")
    there = [
        (name, run.metrics.get(rival, {}).get(run.unseen, {})) for rival, name in NAMES.items()
    ]
    found = [
        (name, scores[key], scores.get("intervals", {}).get(key))
        for name, scores in there
        if scores.get(key) is not None
    ]
    if not found:
        raise LeftOut(f"{run.unseen} rows of one class have no {column(run, key)}")
    label = column(run, key)
    sure = any(interval for _, _, interval in found)

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        for place, (name, value, interval) in enumerate(reversed(found)):
            colour = COLOURS["one" if name == "SPIN" else "muted"]
            if interval:
                axes.plot(interval, [place, place], color=colour, linewidth=2.2)
            axes.plot([value], [place], "o", color=colour, markersize=7)
            axes.annotate(
                f"{value:.3f}", (value, place), (0, 7), textcoords="offset points",
                ha="center", color=colour,
            )  # fmt: skip
        axes.set_yticks(range(len(found)), [name for name, _, _ in reversed(found)])
        axes.set_ylim(-0.5, len(found) - 0.35)
        axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{label} on {run.unseen} rows")

    rows = [[n, f"{v:.4f}", *([f"{i[0]:.4f}", f"{i[1]:.4f}"] if i else ["", ""])]
            for n, v, i in found]  # fmt: skip
    said = "; ".join(f"{n} {v:.3f}" + (f" ({i[0]:.2f} to {i[1]:.2f})" if i else "")
                     for n, v, i in found)  # fmt: skip
    return draw(
        "results", paint, title=f"{label[0].upper()}{label[1:]} against the usual ways",
        height=0.5 * len(found) + 0.8, files=files,
        table=Table(["", label, "from", "to"], rows),
        caption=(
            "Bars: 95% bootstrap intervals over the rows. " if sure else ""
        ) + "All were chosen by the same rows and fitted to the same rows.",
        alt=f"{label} on {run.unseen} rows: {said}.",
    )  # fmt: skip


def verdict(run: Run) -> str | None:
    """One sentence on whether the difference to the best rival is more than luck."""
    found = run.metrics.get("comparison")
    if found is None:
        return None
    key = "macro_f1" if run.metrics["metric"] == "macro-f1" else "accuracy"
    # With labels a difference is tested by a paired bootstrap of the very score.
    p = found["mcnemar_p"] if not run.multi_label else found["difference"][key]["p"]
    test = "paired bootstrap" if run.multi_label else "McNemar"
    value, (low, high) = found["difference"][key]["value"], found["difference"][key]["interval"]
    rival = NAMES.get(found["against"], found["against"])
    if low > 0:
        says = f"SPIN's head is better than the {rival}"
    elif high < 0:
        says = f"SPIN's head is worse than the {rival}"
    else:
        says = f"SPIN's head and the {rival} cannot be told apart on so many rows"
    return (
        (
            f"{says}: {column(run, key)} {value:+.3f} (95% interval {low:+.3f} to {high:+.3f},"
            f" {test}'s p {p:.2g}). The {rival} was the best of the others on"
            " val."
        )
        .replace("the TF-IDF", "TF-IDF")
        .replace("The TF-IDF", "TF-IDF")
    )


def class_table(run: Run) -> Table:
    """Precision, recall and F1 of each class, or of the most frequent."""
    keys = ("precision", "recall", "f1")
    return Table(
        ["class", "precision", "recall", "F1", "rows"],
        [
            [run.classes[k], *[f"{c[key]:.3f}" for key in keys], c["rows"]]
            for k, c in class_scores(run)
        ],
    )


def class_scores(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Number and scores of each class or label; of many only the most frequent."""
    scores = run.metrics["spin"][run.unseen]["per_class"]
    listed = [(code, scores[name]) for code, name in enumerate(run.head.classes)]
    if len(listed) > MOST_CLASSES:
        listed = sorted(listed, key=lambda pair: -pair[1]["rows"])[:MOST_CLASSES]
    return listed


def draw_confusion(run: Run, files: bool) -> Figure:
    """Which classes are taken for which."""
    counts = np.array(run.metrics["spin"][run.unseen]["confusion"], np.int64)
    names = run.classes
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(len(names), MOST_SHOWN)
    kept = np.sort(np.argsort(-counts.sum(1), kind="stable")[:size])
    few = size <= MOST_NUMBERED
    small = [plain(names[k], 16) for k in kept]

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        texts = [[f"{n:,}" for n in counts[k, kept]] for k in kept] if few else None
        heat(axes, shares[np.ix_(kept, kept)], small, small, texts)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("answer")
        axes.set_ylabel("true class")
        if size > 3:
            axes.tick_params(axis="x", rotation=45 if few else 90)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("left" if few else "center")

    columns = ["true class", "answer", "rows", "of the class"]
    pairs = [(i, j) for i, j in np.ndindex(*counts.shape) if counts[i, j]]
    pairs.sort(key=lambda pair: (-counts[pair], pair))
    cells = [[names[i], names[j], int(counts[i, j]), f"{shares[i, j]:.1%}"] for i, j in pairs]
    wrong = [cell for cell, (i, j) in zip(cells, pairs, strict=True) if i != j]
    right = np.diag(shares)[counts.sum(1) > 0]
    left = f" The {size} most frequent of {len(names)} classes." if size < len(names) else ""
    return draw(
        "confusion", paint, title="Confusion matrix", files=files,
        height=max(1.7, min(4.6, 0.36 * size + (0.7 if size <= 3 else 1.4))),
        table=Table(columns, wrong[:MOST_CONFUSIONS]), data=Table(columns, cells),
        caption=(
            f"Rows of each class by answer ({run.unseen}); colour: share of the true class.{left}"
            " Below it the most frequent confusions."
        ),
        alt=(
            f"Confusion matrix of {len(names)} classes; {right.min():.0%} to {right.max():.0%} of a"
            " class's rows are answered rightly."
        ),
    )  # fmt: skip


def draw_reliability(run: Run, files: bool) -> Figure:
    """Stated against actual share of right answers; with labels, of those that apply."""
    answers = run.answers
    if run.multi_label:
        right, stated = answers.codes.ravel() == 1, answers.probs.ravel()
        actual, of = "share that applies", "of a label"
    else:
        right = answers.predicted == answers.codes
        stated = answers.probs[np.arange(len(answers.rows)), answers.predicted]
        actual, of = "share right", "of the answer"
    bins = reliability(right, stated)
    error = metrics.calibration_error(answers.codes, answers.probs)
    x, y = [b["stated"] for b in bins], [b["accuracy"] for b in bins]

    def paint(canvas: Any) -> None:
        upper, lower = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
        upper.plot([0, 1], [0, 1], color=COLOURS["muted"], linestyle=(0, (3, 3)), linewidth=1)
        for b in bins:
            sure = binomtest(round(b["accuracy"] * b["rows"]), b["rows"]).proportion_ci()
            upper.plot([b["stated"]] * 2, [sure.low, sure.high], color=COLOURS["one"],
                       linewidth=1.2, alpha=0.6)  # fmt: skip
        upper.plot(x, y, "o-", color=COLOURS["one"])
        low = max(0.0, min([*x, *y]) - 0.1)
        upper.set(xlim=(low, 1.01), ylim=(max(0.0, min(y) - 0.2), 1.02))
        upper.set_ylabel(actual)
        lower.bar(x, [b["rows"] for b in bins], width=0.035, color=COLOURS["muted"])
        lower.set_ylabel("pairs" if run.multi_label else "rows")
        lower.set_xlabel(f"stated probability {of}")

    rows = [[f"{b['from']:.1f} to {b['to']:.1f}", b["rows"], f"{b['stated']:.3f}",
             f"{b['accuracy']:.3f}"] for b in bins]  # fmt: skip
    return draw(
        "reliability", paint, title="Reliability of stated probabilities", height=3.6, files=files,
        table=Table(["probability", "rows", "stated", "right"], rows),
        caption=(
            f"On the dashed line probabilities are what they say ({answers.split} rows, bars:"
            f" exact 95% intervals). Expected calibration error {error:.3f}"
            + (", the mean of the labels'. Every pair of text and label counts once."
               if run.multi_label else ".")
        ),
        alt=(
            f"Reliability diagram: stated probabilities {of} from {min(x):.2f} to {max(x):.2f},"
            f" {actual} from {min(y):.2f} to {max(y):.2f}; calibration error"
            f" {error:.3f}."
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """A wrong answer."""

    id: str
    text: str | None
    truth: str
    answer: str
    prob: float


def worst_mistakes(run: Run) -> list[Mistake]:
    """The wrong answers of the highest stated probability."""
    answers = run.answers
    stated = answers.probs[np.arange(len(answers.rows)), answers.predicted]
    wrong = np.flatnonzero(answers.predicted != answers.codes)
    ranked = wrong[np.argsort(-stated[wrong], kind="stable")][:MOST_ERRORS]
    found = []
    for at in ranked.tolist():
        row = int(answers.rows[at])
        text = run.text(row)
        found.append(
            Mistake(
                plain(run.samples.ids[row], 60), None if text is None else plain(text, TEXT_CHARS),
                run.classes[answers.codes[at]], run.classes[answers.predicted[at]],
                float(stated[at]),
            )
        )  # fmt: skip
    return found


def check_answers(run: Run) -> None:
    """Raise `LeftOut` unless the answers' accuracy is the one that `train` measured."""
    answers = run.answers
    known = run.metrics["spin"].get(answers.split)
    ours = metrics.accuracy(answers.codes, answers.predicted)
    if known is not None and abs(known["accuracy"] - ours) > 0.02:
        raise LeftOut(
            f"the head's {answers.split} accuracy on the stored activations is {ours:.3f}, its"
            f" metrics say {known['accuracy']:.3f}"
        )


def metric_name(run: Run) -> str:
    """The metric that everything was chosen by, for an axis."""
    return METRIC_NAMES[run.metric.value]
