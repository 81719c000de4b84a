"""The model card that goes with a head."""

from __future__ import annotations

from typing import Any

from spin_cli.head import Head

NAMES = {
    "spin": "SPIN",
    "best_layer": "best single layer",
    "last_layer": "last layer",
    "tfidf": "TF-IDF, words and pairs",
}


def told_split(report: dict[str, Any]) -> str:
    """The rows whose scores say most: test, else those that the head was chosen on."""
    return "test" if "test" in report["spin"] else str(report["judged_on"]["what"])


def model_card(head: Head, report: dict[str, Any]) -> str:
    """Markdown that says what the head is, what it needs and how well it does."""
    chosen, judged = report["chosen"], report["judged_on"]
    several = head.multi_label
    rows = report["rows"]["train"] + (report["rows"]["val"] if chosen["refit"] else 0)
    lines = [
        "# Text classifier (SPIN head)",
        "",
        *_classes(head),
        "",
        f"Reads {head.neurons} neurons ({_read(chosen)}) up to"
        f" {chosen['layer']} of the frozen model `{head.model['id']}`"
        f" ({head.model['architecture']}); trained on {rows} texts.",
        "",
        f"Chosen on {judged['rows']} {judged['what']} texts by {report['metric']}:"
        f" {_how(chosen)}, {_decisions(head, report)}.",
        "",
        f"| split | classifier | {'all labels right' if several else 'accuracy'} | macro-F1"
        f"{' | micro-F1' if several else ''} | log loss | calibration error |",
        "|---|---|---|---|---|---|" + "---|" * several,
    ]
    for key, name in NAMES.items():
        for split in dict.fromkeys((judged["what"], told_split(report))):
            if split in report.get(key, {}):
                s = report[key][split]
                lines.append(
                    f"| {split} | {name} | {_sure(s, 'accuracy')} | {_sure(s, 'macro_f1')}"
                    f"{' | ' + _sure(s, 'micro_f1') if several else ''}"
                    f" | {s['log_loss']:.4f} | {s['ece']:.4f} |"
                )
    if several:
        lines += _labels(report)
    if "operating_points" in report:
        lines += _points(report)
    if decided := decision_lines(report):
        lines += ["", *(f"- {line}" for line in decided)]
    lines += ["", *_comparison(report), *(f"Note: {note}." for note in report["notes"])]
    lines += [
        "",
        f"The head was chosen on the {judged['what']} rows, so their scores are a little too good;",
        "test rows are read once, after the choice. Brackets: 95% bootstrap intervals.",
        "",
        "Use: `spin predict THIS_FOLDER texts.csv`",
        "",
    ]
    return "\n".join(lines)


def decision_lines(report: dict[str, Any]) -> list[str]:
    """What a target or a bound came to, on the rows that it was chosen by and on test."""
    lines = []
    if "target" in report:
        found = report["target"]
        reached = "; ".join(
            f"precision {scores['precision']:.3f}, recall {scores['recall']:.3f} on {name} texts"
            for name, scores in found["reached"].items()
        )
        lines.append(f"threshold {found['threshold']:.4g} for {found['label']!r}: {reached}")
    bound = report["chosen"].get("abstain_below")
    for name, found in report.get("answered", {}).items():
        right = found["accuracy"]
        more = "" if right is None else f", {right:.4f} of them right"
        lines.append(f"answers {found['share']:.1%} of {name} texts (from {bound:.4g} on){more}")
    return lines


def _what(part: dict[str, Any]) -> str:
    return f"{part['site']}, {part['pooling']}-pooled"


def _read(chosen: dict[str, Any]) -> str:
    return "; ".join(dict.fromkeys(_what(part) for part in chosen.get("parts", [chosen])))


def _how(chosen: dict[str, Any]) -> str:
    parts = chosen.get("parts", [chosen])
    each = [
        f"ridge regressions on {p['matrices']} whole matrices, stacked"
        if "matrices" in p
        else f"eta {p['eta']}, penalty {p['strength']:.3g} per text"
        for p in parts
    ]
    if len(parts) == 1:
        return each[0]
    blended = (
        f"{part['share']:.0%} {_what(part)}, up to {part['layer']}, {how}"
        for part, how in zip(parts, each, strict=True)
    )
    return f"the mean of {len(parts)} heads' logits ({'; '.join(blended)})"


def _classes(head: Head) -> list[str]:
    if not head.multi_label:
        return [f"Classes: {', '.join(head.classes)}"]
    return [
        f"Labels, of which a text may have any number: {', '.join(head.classes)}",
        "",
        "Multi-label: every label has a probability and a threshold of its own (one-versus-rest).",
    ]


def _decisions(head: Head, report: dict[str, Any]) -> str:
    temperature, below = report["calibration"]["temperature"], head.abstain_below
    last = "" if below is None else f", no answer below {below:.4g}"
    if head.multi_label:
        low, high = min(temperature), max(temperature)
        return f"temperatures {low:.3g} to {high:.3g}, a threshold for each label{last}"
    how = "the likeliest class"
    if head.threshold is not None:
        how = f"{head.classes[1]!r} from a probability of {head.threshold:.4g} on"
    return f"temperature {temperature:.3g}, the answer {how}{last}"


def _labels(report: dict[str, Any]) -> list[str]:
    split = told_split(report)
    lines = [
        "",
        f"| label | threshold | precision | recall | F1 | AUROC | {split} texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in report["spin"][split]["per_class"].items():
        area = "–" if s.get("auroc") is None else f"{s['auroc']:.4f}"
        lines.append(
            f"| {name} | {report['chosen']['threshold'][name]:.2f} | {_sure(s, 'precision')}"
            f" | {_sure(s, 'recall')} | {_sure(s, 'f1')} | {area} | {s['rows']} |"
        )
    return lines


def _points(report: dict[str, Any]) -> list[str]:
    return [
        "",
        f"Decision thresholds by false positive rate, on {report['judged_on']['what']} texts:",
        "",
        "| class | false positives | at most | threshold | recall | precision |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {p['false_positive_rate']:.2%} | {p['max_false_positive_rate']:.1%}"
            f" | {p['threshold']} | {p['recall']:.4f}"
            f" | {'–' if p['precision'] is None else format(p['precision'], '.4f')} |"
            for name, points in report["operating_points"].items()
            for p in points
        ),
    ]


def _sure(scores: dict[str, Any], metric: str) -> str:
    value = f"{scores[metric]:.4f}"
    if metric not in scores.get("intervals", {}):
        return value
    low, high = scores["intervals"][metric]
    return f"{value} [{low:.3f}, {high:.3f}]"


def _comparison(report: dict[str, Any]) -> list[str]:
    if "comparison" not in report:
        return []
    found = report["comparison"]
    name = "macro_f1" if report["metric"] == "macro-f1" else "accuracy"
    difference = found["difference"][name]
    test, p = "McNemar's", found.get("mcnemar_p")
    if p is None:
        test, p = "paired bootstrap's", difference["p"]
    low, high = difference["interval"]
    return [
        f"Against the best of the others on {report['judged_on']['what']} rows"
        f" ({NAMES[found['against']]}), on test: {name.replace('_', '-')}"
        f" {difference['value']:+.4f} [{low:+.4f}, {high:+.4f}], {test} p = {p:.2g}.",
        "",
    ]
