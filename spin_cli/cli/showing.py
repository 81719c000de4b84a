"""What `spin inspect` shows of an artifact; `inspection` says what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_cli.atomic import json_text
from spin_cli.cli.showing_files import show_tensors, show_tree
from spin_cli.cli.terminal import bar, print_json, print_line, print_table, width
from spin_cli.units import human_bytes

if TYPE_CHECKING:
    from spin_cli.inspection.statistics import Statistics

MANY = 80
"""Matrices that are shown one by one; of more, those of the first pooling."""
MAX_PAIRS = 12
NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "auroc": "AUROC", "log_loss": "log loss",
         "ece": "ECE"}  # fmt: skip


def show(path: Path, found: dict[str, Any], every: bool) -> None:
    """Print what `inspection.describe` found."""
    kind = found["kind"]
    if kind == "run":
        for name, part in found["artifacts"].items():
            show(path / name, part, every)
    elif kind == "json":
        for line in json_text(found["content"]).splitlines():
            print_line(line)
    elif kind == "text":
        for line in found["text"].splitlines():
            print_line(line)
    elif kind == "hdf5":
        show_tree(path, found)
    elif kind == "safetensors":
        show_tensors(path, found)
    elif kind == "scores":
        show_scores(found["scores"], "score")
    else:
        show_summary(path, found)
        shows = {
            "activations": show_activations, "selection": show_selection, "head": show_head,
            "export": show_export,
        }  # fmt: skip
        shows[kind](found, every)


def show_summary(path: Path, found: dict[str, Any]) -> None:
    """From what an artifact was made, and how large it is."""
    rows = [["size", human_bytes(found["bytes"])], ["fingerprint", found["fingerprint"][:16]]]
    what = "labels, any number a text" if found.get("multi_label") else "classes"
    rows.append([what, ", ".join(found["classes"])])
    if "parent" in found:
        rows.append(["made from", found["parent"]["path"]])
    if "model" in found:
        rows.append(["model", f"{found['model']['id']} ({found['model']['architecture']})"])
    rows += [
        [f"data, {source['split']}", f"{source['path']} ({source['rows']:,} rows)"]
        for source in found.get("data", [])
    ]
    rows += [[name, f"{count:,}"] for name, count in found.get("counts", {}).items()]
    if "storage_dtype" in found:
        rows.append(["on the disk", found["storage_dtype"]])
    if found["spin"] is None:
        rows.append(["written by", "another program"])
    if "seconds" in found.get("log", {}):
        rows.append(["took", f"{found['log']['seconds']:,.0f} s, spin {found['spin']}"])
    rows += [["note", text] for text in found.get("warnings", [])]
    print_table(f"{found['kind']}: {path}", ["", ""], rows)


def show_activations(found: dict[str, Any], every: bool) -> None:
    """A row of numbers for each matrix, site by site."""
    points: dict[str, list[str]] = {}
    for feature in found["features"]:
        points.setdefault(feature["site"], []).append(feature["hookpoint"])
    statistics = found["statistics"]
    matrices: list[Statistics] = statistics["matrices"]
    poolings = list(dict.fromkeys(item.pooling for item in matrices))
    some = every or len(matrices) <= MANY
    lost = any(item.overflowed for item in matrices)
    for site, where in points.items():
        rows, last = [], ""
        mine = [item for item in matrices if item.site == site]
        for item in mine:
            if some or item.pooling == poolings[0]:
                name = "" if item.layer == last else item.layer
                same = [m for m in mine if m is item or (not some and m.layer == item.layer)]
                massive = {neuron for m in same for neuron in m.massive}
                rows.append([name, item.pooling, *_cells(item, len(massive), lost)])
                last = item.layer
        columns = ["layer", "pooling", "mean", "sd", "zeros", "largest", "dead", "massive"]
        print_table(
            f"{site}, {mine[0].width:,} neurons: {where[0]} … {where[-1]}",
            [*columns, "over"] if lost else columns,
            rows,
        )
    _explain_statistics(statistics, matrices)
    if not some:
        print_line(
            f"Of {len(matrices)} matrices, those of {poolings[0]}, but massive neurons of all"
        )
        print_line("poolings; --all shows the others.")


def _cells(item: Statistics, massive: int, lost: bool) -> list[str]:
    cells = [
        _short(item.mean), _short(item.sd), f"{item.zeros:.1%}" if item.zeros else "–",
        _short(item.largest), str(item.dead + item.constant or "–"),
        str(massive or "–"),
    ]  # fmt: skip
    return [*cells, f"{item.overflowed or '–'}"] if lost else cells


def _short(value: float) -> str:
    return (
        f"{value:.3f}"
        if abs(value) < 10
        else f"{value:,.1f}"
        if abs(value) < 1e4
        else f"{value:.1e}"
    )


def _explain_statistics(statistics: dict[str, Any], matrices: Sequence[Statistics]) -> None:
    seen, there = statistics["rows"], statistics["rows_all"]
    which = f"{seen:,} of {there:,} rows, evenly sampled" if seen < there else f"all {there:,} rows"
    print_line(f"From {which}.")
    print_line("dead: neurons with one value in all of them")
    print_line("massive: neurons with a magnitude above 100 and 1,000 times the median of their")
    print_line("         vector (Sun et al. 2024, arXiv:2402.17762), in one row or more")
    if any(item.overflowed for item in matrices):
        print_line("over: values too large for float16, in all rows")
    massive: dict[tuple[str, int], list[str]] = {}
    for item in matrices:
        for neuron in item.massive:
            massive.setdefault((item.site, neuron), []).append(item.layer)
    if massive:
        ranked = sorted(massive.items(), key=lambda pair: -len(pair[1]))[:8]
        print_table(
            "Massive neurons",
            ["site", "neuron", "matrices", "layers"],
            [[s, str(n), str(len(at)), f"{at[0]} … {at[-1]}" if len(set(at)) > 1 else at[0]]
             for (s, n), at in ranked],
        )  # fmt: skip


def show_selection(found: dict[str, Any], every: bool) -> None:
    """Scores as bars, neurons kept, and overlap of masks."""
    del every
    show_scores(found["scores"], f"{found['metric']} on val")
    show_kept(found["scores"])
    overlap = found["overlap"]
    rows = [
        [f"{e['site']} {' / '.join(e['poolings'])}", f"{e['jaccard']:.3f}", f"{e['chance']:.3f}"]
        for e in overlap["poolings"]
    ]
    heading = ["Jaccard", "by chance"]
    title = f"Overlap of masks at eta {overlap['eta']:g}, mean over layers"
    if rows:
        print_table(title, ["poolings", *heading], rows)
    pairs = sorted(overlap["classes"], key=lambda e: -e["jaccard"])
    if pairs:
        ends = [*pairs[: MAX_PAIRS // 2], *pairs[-MAX_PAIRS // 2 :]]
        shown = pairs if len(pairs) <= MAX_PAIRS else ends
        rows = [[" / ".join(e["classes"]), f"{e['jaccard']:.3f}", f"{e['chance']:.3f}"]
                for e in shown]  # fmt: skip
        more = f", {MAX_PAIRS} of {len(pairs)} pairs" if len(pairs) > MAX_PAIRS else ""
        print_table(f"Overlap between classes{more}", ["classes", *heading], rows)


def show_scores(scores: Sequence[dict[str, str]], metric: str) -> None:
    """The probes' scores: a table for each site, a row for each layer, bars by pooling."""
    values = [float(row["val_score"]) for row in scores]
    low, top = min(values), max(values)
    best = scores[values.index(top)]
    for site in dict.fromkeys(row["site"] for row in scores):
        mine = {(r["layer"], r["pooling"]): float(r["val_score"])
                for r in scores if r["site"] == site}  # fmt: skip
        poolings = list(dict.fromkeys(pooling for _, pooling in mine))
        length = max(4, min(24, (width() - 14) // len(poolings) - 11))
        rows = [
            [layer, *[_score_cell(mine.get((layer, p)), low, top, length) for p in poolings]]
            for layer in dict.fromkeys(layer for layer, _ in mine)
        ]
        print_table(f"{site}: {metric}", ["layer", *poolings], rows, wrapped=True)
    print_line(f"Best: {best['layer']} {best['site']} {best['pooling']}, {top:.4f}. Bars: "
               f"{low:.3f} to {top:.3f}.")  # fmt: skip


def _score_cell(value: float | None, low: float, top: float, length: int) -> str:
    if value is None:
        return "–"
    share = (value - low) / max(top - low, 1e-9)
    return f"{value:.4f} {bar(0.02 + 0.98 * share, length)}"


def show_kept(scores: Sequence[dict[str, str]]) -> None:
    """Neurons that each eta keeps, all layers together."""
    etas = [name for name in scores[0] if name.startswith("neurons_eta_")]
    rows = []
    for site, pooling in dict.fromkeys((row["site"], row["pooling"]) for row in scores):
        mine = [r for r in scores if (r["site"], r["pooling"]) == (site, pooling)]
        total = sum(int(r["width"]) for r in mine)
        counts = [f"{sum(int(r[name]) for r in mine):,}" for name in etas]
        rows.append([f"{site} {pooling}", f"{total:,}", *counts])
    names = [name.removeprefix("neurons_eta_") for name in etas]
    print_table("Neurons kept at each eta, all layers", ["", "of", *names], rows)


def show_head(found: dict[str, Any], every: bool) -> None:
    """What a head needs, what it reads, and how good it is."""
    from spin_cli.cli.training import kind_of, print_report

    needs, report = found["needs"], found["metrics"]
    reading = needs["reading"]
    depth = "all" if needs["blocks"] is None else f"the first {needs['blocks']}"
    rows = [
        ["model", f"{needs['model']['id']} ({needs['model']['architecture']})"],
        ["blocks", f"{depth} of {report['layers_total']}"],
    ]
    if reading:
        rows += [
            ["adapter", reading["adapter"] or "none"],
            ["computed in", f"{reading['dtype']}, neurons rounded to {needs['storage_dtype']}"],
            ["tokens", f"up to {reading['max_length']}, longer texts: {reading['long']}"],
        ]
    else:
        rows.append(["reads texts", "no: another program wrote the activations"])
    rows += [
        ["kind", kind_of(report)],
        ["hidden units", str(found["hidden_units"] or "none (linear)")],
        ["threshold", _threshold(found)],
        ["abstains", f"below {found['abstain_below']}" if found["abstain_below"] else "never"],
    ]
    print_table("What it needs", ["", ""], rows)
    show_neurons(found["neurons"])
    print_report(report)
    if "calibration" in report:
        _show_calibration(report["calibration"])
    if every:
        print_json(report)


def show_export(found: dict[str, Any], _every: bool) -> None:
    """The programs of an exported head, and how their probabilities become answers."""
    rows = [
        [name, human_bytes(entry["bytes"]), f"{entry['difference']:.1e}"]
        for name, entry in found["formats"].items()
    ]
    print_table("Programs", ["file", "size", "differs from predict by"], rows)
    rows = [
        ["neurons it reads", "unknown" if found["neurons"] is None else f"{found['neurons']:,}"],
        ["longest text", f"{found['max_length']:,} tokens"],
        ["threshold", _threshold(found)],
        ["abstains", f"below {found['abstain_below']}" if found["abstain_below"] else "never"],
    ]
    print_table("How it answers", ["", ""], rows)


def _threshold(found: dict[str, Any]) -> str:
    each = found.get("thresholds")
    if each is None:
        alone = found["threshold"]
        return "the likeliest class" if alone is None else f"{alone:.6g}"
    return f"each label has its own, {min(each.values()):.2f} to {max(each.values()):.2f}"


def show_neurons(features: Sequence[dict[str, Any]]) -> None:
    """How many neurons a head reads of each layer."""
    layers: dict[str, dict[str, int]] = {}
    for f in features:
        name = f"{f['site']} {f['pooling']}"
        layers.setdefault(f["layer"], {})[name] = f["neurons"]
    names = list(dict.fromkeys(f"{f['site']} {f['pooling']}" for f in features))
    totals = {layer: sum(counts.values()) for layer, counts in layers.items()}
    most = max(totals.values())
    fits = 10 + sum(len(name) + 3 for name in names) + 10 < width()
    shown = names if fits else []
    rows = [
        [layer, *[str(counts.get(name, "–")) for name in shown], f"{totals[layer]:,}",
         bar(totals[layer] / most, 16)]
        for layer, counts in layers.items()
    ]  # fmt: skip
    print_table(
        f"Neurons it reads: {sum(totals.values()):,}", ["layer", *shown, "neurons", ""], rows
    )


def _show_calibration(found: dict[str, Any]) -> None:
    rows = [
        [name, _or_dash(found["ece_before"].get(name)), _or_dash(value)]
        for name, value in found["ece"].items()
    ]
    each = found["temperature"]  # of one label a number, of several a list
    low, high = (min(each), max(each)) if isinstance(each, list) else (each, each)
    shown = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    title = f"Expected calibration error ({found['kind']}, T = {shown})"
    print_table(title, ["rows", "before", "after"], rows)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
