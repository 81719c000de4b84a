"""``spin train``, and what it found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.choices import SITE_NAMES, Calibration, ClassWeight, HeadKind, Penalty, Search
from spin_cli.cli import options as o
from spin_cli.cli.parsing import numbers, site_names
from spin_cli.cli.speaking import stoppable
from spin_cli.cli.terminal import (
    print_json,
    print_table,
    progress_bar,
    say,
)
from spin_cli.config import DEFAULT_ETAS_TEXT, TrainConfig


def train(
    source: Annotated[Path, typer.Argument(metavar="SELECTION", help="Folder of `spin select`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: beside it].")
    ] = None,
    metric: o.ChooseBy = None,
    site: Annotated[
        str, typer.Option("--site", help=f"Sites to search: {SITE_NAMES}.")
    ] = "hidden,ffn,gate,both",
    eta: Annotated[str, typer.Option("--eta", help="Shares to search.")] = DEFAULT_ETAS_TEXT,
    max_layer: Annotated[
        int | None,
        o.number(
            TrainConfig, "max_layer", help="Deepest layer allowed: 6 is layer_06, as in extract."
        ),
    ] = None,
    max_neurons: Annotated[
        int | None, o.number(TrainConfig, "max_neurons", help="Most neurons allowed.")
    ] = None,
    search: o.SearchBudget = Search.FAST,
    masks_only: o.MasksOnly = False,
    cv: o.Folds = None,
    head: o.KindOfHead = HeadKind.LOGISTIC,
    penalty: o.HeadPenalty = Penalty.L2,
    class_weight: o.ClassWeights = ClassWeight.NONE,
    refit: o.Refit = None,
    calibration: o.Calibrate = Calibration.TEMPERATURE,
    positive_label: o.PositiveLabel = None,
    target_precision: o.TargetPrecision = None,
    target_recall: o.TargetRecall = None,
    abstain_below: o.AbstainBelow = None,
    target_accuracy: o.TargetAccuracy = None,
    oof: o.OutOfFold = None,
    seed: Annotated[int, o.number(TrainConfig, "seed", help="Deals rows out over folds.")] = 0,
    workers: o.Workers = 0,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Search for the best head on the masked neurons, on validation data.

    Few validation rows? Then train and val rows together are cross-validated, with the neurons of
    each fold selected anew and near-duplicate texts in the same fold. Blends (the mean logits of
    several heads), stacks (ridge regressions on all neurons of each matrix, weighed) and means of
    the two are tried too. Of heads whose scores tie, the one of the lowest log loss is taken; where
    that ties too, the shallowest. The test split is read once, after the choice.

    Example: `spin train run/selection`
    """
    config = TrainConfig(
        metric=metric, sites=site_names(site), etas=numbers("--eta", eta), max_layer=max_layer,
        max_neurons=max_neurons, search=search, masks_only=masks_only, cv=cv, head=head,
        penalty=penalty, class_weight=class_weight, refit=refit, calibration=calibration,
        positive_label=positive_label, target_precision=target_precision,
        target_recall=target_recall, abstain_below=abstain_below,
        target_accuracy=target_accuracy, oof=oof, workers=workers, seed=seed,
    )  # fmt: skip
    output = output or source.parent / "head"
    show_trained(run_train(source, output, config, force), output, json)


def run_train(source: Path, output: Path, config: TrainConfig, force: bool) -> dict[str, Any]:
    """Run the stage under a progress bar."""
    from spin_cli import artifacts, atomic

    artifacts.read_manifest(source, "selection")  # torch takes seconds to come
    atomic.check_vacant(output, force=force)
    say(f"train: searching for a head on {source}")
    from spin_cli import training

    with stoppable(output), progress_bar("train") as progress:
        return training.train(source, output, config, force=force, progress=progress)


def show_trained(manifest: dict[str, Any], output: Path, json: bool) -> None:
    """Print the head beside the last-layer baseline, and the next command."""
    report = manifest["metrics"]
    if json:
        summary = {key: value for key, value in report.items() if key != "candidates"}
        print_json({"stage": "train", "output": output, "metrics": summary, "log": manifest["log"]})
        return
    print_report(report)
    if manifest["reads_text"]:
        say(f"next: spin predict {output} texts.csv")
    else:
        say(f"next: spin ablate {output.parent}   # no model is known, so it cannot predict")


def layers_run(report: dict[str, Any]) -> str:
    """How much of the model a head needs; heads made by an older spin only know its depth."""
    return f"{report.get('layers_run', report['chosen']['depth'])} of {report['layers_total']}"


def print_report(report: dict[str, Any]) -> None:
    """The tables that end `train` and `demo`."""
    from spin_cli.training.card import decision_lines, told_split

    for note in report["notes"]:
        say(f"note: {note}")
    print_candidates(report)
    split = told_split(report)
    scores = LABEL_SCORES if report.get("multi_label") else SCORES
    rows = [
        [name, *score_cells(report[key][split], scores)]
        for key, name in RIVALS.items()
        if split in report.get(key, {})
    ]
    count = report["spin"][split]["rows"]
    print_table(
        f"On {count:,} {split} text{'' if count == 1 else 's'}: the chosen head ({kind_of(report)},"
        f" {layers_run(report)} layers, {report['chosen']['neurons']:,} neurons) and others",
        ["head", *scores.values()],
        rows,
    )
    if report.get("multi_label"):
        print_labels(report, split)
    if "comparison" in report:
        found = report["comparison"]
        name = "macro_f1" if report["metric"] == "macro-f1" else "accuracy"
        difference = found["difference"][name]
        low, high = difference["interval"]
        test, p = "McNemar's", found.get("mcnemar_p")
        if p is None:
            test, p = "paired bootstrap's", difference["p"]
        say(
            f"against {RIVALS[found['against']]} on test: {name.replace('_', '-')}"
            f" {difference['value']:+.4f} ({low:+.4f} to {high:+.4f}), {test} p {p:.2g}"
        )
    for line in decision_lines(report):
        say(line)


RIVALS = {
    "last_layer": "last layer",
    "best_layer": "best layer",
    "tfidf": "TF-IDF",
    "spin": "SPIN",
}


SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "log_loss": "log loss",
}
LABEL_SCORES = {
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "accuracy": "all right",
}
"""Three, with their intervals, fit into 80 columns."""


def print_labels(report: dict[str, Any], split: str) -> None:
    """How well each label is told."""
    thresholds = report["chosen"]["threshold"]
    rows = []
    for name, found in report["spin"][split]["per_class"].items():
        rows.append(
            [
                name, str(found["rows"]), f"{thresholds[name]:.2f}", f"{found['precision']:.3f}",
                f"{found['recall']:.3f}", f"{found['f1']:.3f}",
                "–" if found.get("auroc") is None else f"{found['auroc']:.3f}",
            ]
        )  # fmt: skip
    columns = ["label", "texts", "from", "precision", "recall", "F1", "AUROC"]
    print_table(f"Labels on {split}, given from a probability of `from` on", columns, rows)


def score_cells(scores: dict[str, Any], names: Iterable[str] = SCORES) -> list[str]:
    """Cells of one row of the report, with 95% intervals where there are some."""
    cells = []
    for name in names:
        value = scores.get(name)
        cell = "–" if value is None else f"{value:.4f}"
        if name in scores.get("intervals", {}):
            low, high = scores["intervals"][name]
            cell += f" ({low:.2f}–{high:.2f})"
        cells.append(cell)
    return cells


def kind_of(report: dict[str, Any]) -> str:
    """What the chosen head is, in the words of the tables."""
    kind, pooling, eta = _kind(report["chosen"])
    words = [kind, pooling, f"eta {eta}" if eta.replace(".", "").isdecimal() else ""]
    units = "hidden units on " if report["head"] == "mlp" else ""
    return units + " ".join(word for word in words if word)


def _kind(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Cells that say what a head is: kind (of one on masked neurons the site), pooling, eta."""
    many, whole = len(entry.get("parts", ())), entry.get("matrices", 0)
    if whole:
        return f"stack of {whole}", "+ masks" if many else "", "" if many else "all"
    if many:
        return f"blend of {many}", "", ""
    return entry["site"], entry["pooling"], f"{entry['eta']:g}"


def _layer(name: str) -> str:
    """As `--max-layer` calls it, where the name says it."""
    number = name.removeprefix("layer_")
    return str(int(number)) if number.isdecimal() else name


def print_candidates(report: dict[str, Any]) -> None:
    """The best configurations, and what is had for less depth and fewer neurons.

    Both on the rows that the choice was made on; hidden units are judged on others afterwards.
    """
    what = report["candidates"][0]["judged_on"]  # those out of fold stand before the others
    rows = report["rows"]["val"] + (report["rows"]["train"] if what != "val" else 0)
    columns = ["kind", "pooling", "eta", "layer", "neurons", "λ", report["metric"], "log loss"]

    def cells(entry: dict[str, Any]) -> list[str]:
        kind, *more = _kind(entry)
        single = not entry.get("parts") and not entry.get("matrices")
        return [
            f"{'→' if entry.get('chosen') else ' '}{kind}", *more, _layer(entry["layer"]),
            f"{entry['neurons']:,}", f"{entry['strength']:.2g}" if single else "",
            f"{entry['score']:.4f}", f"{entry['log_loss']:.4f}",
        ]  # fmt: skip

    best = [e for e in report["candidates"] if e["judged_on"] == what]
    shown = best[:6] + [e for e in best[6:] if e.get("chosen")]
    heads = "linear heads" if report["head"] == "mlp" else "heads"
    mark = " (→ the chosen one)" if any(e.get("chosen") for e in shown) else ""
    print_table(f"Best {heads} on {rows:,} {what} texts{mark}", columns, [*map(cells, shown)])
    few = thinned(report["frontier"], 8)
    shown = [e for e in report["frontier"] if e in few or e.get("chosen")]
    title = "The lowest log loss for a depth and a number of neurons, on the same"
    print_table(title, columns, [*map(cells, shown)])


def thinned(entries: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of them, evenly chosen, the last one kept."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]
