"""Results of a head that gives a text any number of labels, each a yes or no of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli.reports.charts import heat
from spin_cli.reports.drawing import Figure, Table, draw, plain
from spin_cli.reports.results import (
    MOST_CONFUSIONS,
    MOST_ERRORS,
    MOST_NUMBERED,
    MOST_SHOWN,
    TEXT_CHARS,
    Mistake,
    class_scores,
    sure,
)
from spin_cli.reports.sources import Run

MOST_PANELS, COLUMNS = 12, 4
LEFT_OUT = [
    (
        "confusion matrix of classes",
        "a text has any number of labels, so none takes another's place; each has a table of its"
        " own, and another shows which labels are given to texts of which",
    ),
    (
        "McNemar's test",
        "with several labels a difference in F1 is tested by a paired bootstrap instead",
    ),
]


def label_table(run: Run) -> Table:
    """Threshold, scores, interval of F1 and number of texts of each label."""
    limits = np.broadcast_to(np.asarray(run.head.limits, np.float64), len(run.classes))
    return Table(
        ["label", "texts", "given from", "precision", "recall", "F1", "AUROC"],
        [[run.classes[k], c["rows"], f"{limits[k]:.2f}",
          *[sure(c, key) for key in ("precision", "recall", "f1", "auroc")]]
         for k, c in class_scores(run)],
    )  # fmt: skip


def counts(run: Run) -> NDArray[np.int64]:
    """(L, 2, 2) texts of each label: by whether it applies, and whether it is given."""
    true, given = run.answers.codes == 1, run.answers.predicted == 1
    cells = [[(~true & ~given).sum(0), (~true & given).sum(0)],
             [(true & ~given).sum(0), (true & given).sum(0)]]  # fmt: skip
    return np.array(cells, np.int64).transpose(2, 0, 1)


def draw_confusions(run: Run, files: bool) -> Figure:
    """A table of two by two for each label."""
    table, names = counts(run), run.classes
    shown = np.sort(np.argsort(-table[:, 1].sum(1), kind="stable")[:MOST_PANELS])
    rows = -(-len(shown) // COLUMNS)

    def paint(canvas: Any) -> None:
        axes = canvas.subplots(rows, COLUMNS, squeeze=False)
        for ax in axes.ravel()[len(shown) :]:
            ax.set_visible(False)
        for place, k in enumerate(shown):
            ax = axes[divmod(place, COLUMNS)]
            shares = table[k] / np.maximum(table[k].sum(1, keepdims=True), 1)
            texts = [[f"{n:,}" for n in row] for row in table[k]]
            first = place % COLUMNS == 0
            heat(ax, shares, ("no", "yes") if first else ("", ""), ("no", "yes"), texts)
            ax.set_title(plain(names[k], 14))
            if first:
                ax.set_ylabel("applies")
        canvas.supxlabel("given", fontsize=10)

    cells = [[name, *table[k].ravel()[::-1].tolist()] for k, name in enumerate(names)]
    left = f" The {len(shown)} most frequent of {len(names)}." if len(shown) < len(names) else ""
    hit = table[:, 1, 1] / np.maximum(table[:, 1].sum(1), 1)
    return draw(
        "confusion", paint, title="Confusion of each label", files=files, height=0.5 + 1.25 * rows,
        table=Table(["label", "given rightly", "missed", "given wrongly", "rightly not"], cells),
        caption=(
            f"Texts ({run.answers.split} rows) by whether the label applies (down) and is given"
            f" (across); colour: share of the line.{left}"
        ),
        alt=(
            f"Tables of two by two for {len(shown)} labels; of the texts with a label"
            f" {hit.min():.0%} to {hit.max():.0%} are given it."
        ),
    )  # fmt: skip


def strays(run: Run) -> NDArray[np.int64]:
    """(L, L) texts with label i that are wrongly given j; on the diagonal those that miss i."""
    true, given = run.answers.codes == 1, run.answers.predicted == 1
    found = true.T.astype(np.int64) @ (given & ~true).astype(np.int64)
    found[np.diag_indices(len(found))] = (true & ~given).sum(0)
    return np.asarray(found)


def draw_strays(run: Run, files: bool) -> Figure:
    """Which labels are given to texts of which others, where they do not apply."""
    table, names = strays(run), run.classes
    totals = (run.answers.codes == 1).sum(0)
    shares = table / np.maximum(totals[:, None], 1)
    size = min(len(names), MOST_SHOWN)
    kept = np.sort(np.argsort(-totals, kind="stable")[:size])
    few = size <= MOST_NUMBERED
    small = [plain(names[k], 16) for k in kept]

    def paint(canvas: Any) -> None:
        axes = canvas.subplots()
        texts = [[f"{n:,}" if n else "" for n in table[k, kept]] for k in kept] if few else None
        heat(axes, shares[np.ix_(kept, kept)], small, small, texts)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("given, though it does not apply")
        axes.set_ylabel("text has")
        axes.tick_params(axis="x", rotation=45 if few else 90)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("left" if few else "center")

    pairs = [(i, j) for i, j in np.ndindex(*table.shape) if table[i, j]]
    pairs.sort(key=lambda pair: (-table[pair], pair))
    cells = [[names[i], "none (missed)" if i == j else names[j], int(table[i, j]),
              f"{shares[i, j]:.1%}"] for i, j in pairs]  # fmt: skip
    left = f" The {size} most frequent of {len(names)}." if size < len(names) else ""
    return draw(
        "strays", paint, title="Labels given where they do not apply", files=files,
        height=max(1.7, min(4.6, 0.36 * size + 1.4)),
        table=Table(["text has", "given", "texts", "of the label's"], cells[:MOST_CONFUSIONS]),
        data=Table(["text has", "given", "texts", "of the label's"], cells),
        caption=(
            f"Texts ({run.answers.split} rows) with the label on the left that are wrongly given"
            " the one above; on the diagonal, texts that miss the label itself. Colour: share of"
            f" the texts with the label on the left.{left}"
        ),
        alt=_said(cells, len(names)),
    )  # fmt: skip


def _said(cells: list[list[Any]], labels: int) -> str:
    if not cells:
        return f"None of {labels} labels is missed, or given to a text with another label."
    has, given, texts, share = cells[0]
    return (
        f"Errors among {labels} labels; the most frequent: text has {has}, given {given},"
        f" {texts} texts ({share})."
    )


def worst_mistakes(run: Run) -> list[Mistake]:
    """Labels wrongly given or missed, those of the highest stated probability; each text once."""
    answers = run.answers
    stated = np.where(answers.predicted == 1, answers.probs, 1.0 - answers.probs)
    wrong = np.where(answers.predicted != answers.codes, stated, -1.0)
    worst = wrong.argmax(1)
    top = wrong[np.arange(len(wrong)), worst]
    ranked = [at for at in np.argsort(-top, kind="stable").tolist() if top[at] >= 0]
    return [_mistake(run, at, int(worst[at]), float(top[at])) for at in ranked[:MOST_ERRORS]]


def _mistake(run: Run, at: int, label: int, prob: float) -> Mistake:
    row = int(run.answers.rows[at])
    text, name = run.text(row), run.classes[label]
    given = run.answers.predicted[at, label] == 1
    return Mistake(
        id=plain(run.samples.ids[row], 60),
        text=None if text is None else plain(text, TEXT_CHARS),
        truth=plain(run.said(run.answers.codes[at]), 200),
        answer=name if given else f"not {name}",
        prob=prob,
    )
