"""The page itself: one file, nothing from elsewhere, no script, everything foreign escaped."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from spin_cli.names import list_names
from spin_cli.reports import labels, results
from spin_cli.reports.drawing import Figure, Table, plain
from spin_cli.reports.neurons import Example, Neuron
from spin_cli.reports.sources import METRIC_KEYS, Artifact, Run
from spin_cli.units import human_bytes

MOST_CLASSES = 30


@dataclass(frozen=True)
class Content:
    """Everything that a page shows."""

    run: Run
    figures: dict[str, Figure]
    examples: list[tuple[Neuron, list[Example]]]
    mistakes: list[results.Mistake] | None
    left_out: list[tuple[str, str]]
    notes: list[str]


def render(content: Content) -> str:
    """The page as HTML.

    Everything goes through the template's own escaping but the figures' SVG, which comes from an
    XML tree and so is escaped as well. The policy in the page's head forbids scripts, connections
    and any style but the page's own, which it names by its hash.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("spin_cli.reports")
    style = (folder / "page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    run = content.run
    return template.render(
        style=Markup(style),
        style_hash=digest,
        svg={name: Markup(figure.svg) for name, figure in content.figures.items()},
        figures=content.figures,
        title=_title(run),
        headline=_headline(run),
        verdict=results.verdict(run),
        results=results.results_table(run),
        per_class=labels.label_table(run) if run.multi_label else results.class_table(run),
        one="label" if run.multi_label else "class",
        facts=_facts(run),
        stages=_stages(run),
        options=_options(run),
        classes=run.classes,
        examples=content.examples,
        marked=any(
            mark.level for _, found in content.examples for item in found for mark in item.marks
        ),
        mistakes=content.mistakes,
        left_out=content.left_out,
        notes=[*content.notes, *(_sentence(note) for note in run.metrics["notes"])],
        unseen=run.unseen,
    )


def _sentence(text: str) -> str:
    text = plain(text, 400).rstrip(".")
    return text[:1].upper() + text[1:] + "."


def _title(run: Run) -> str:
    model = plain(run.head.model.get("id", "a model"), 80)
    return f"{_data_name(run)} on {_last(model)}"


def _last(path: str) -> str:
    """The last part of a path: where it lies is nobody's business."""
    return path.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or path


def _data_name(run: Run) -> str:
    files = [] if run.extracted is None else run.extracted.manifest["request"]["data"]
    if not files:
        return "a run"
    path = plain(files[0]["path"], 300).replace("\\", "/")
    parts = [part for part in path.split("/") if part]
    folder = len(parts) > 1 and parts[-1].startswith("train.")
    return parts[-2] if folder else parts[-1] if parts else "a run"


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """Value, what it is, and more about it."""
    key = METRIC_KEYS.get(run.metric.value, "accuracy")
    scores, chosen = run.metrics["spin"][run.unseen], run.metrics["chosen"]
    sure = scores.get("intervals", {}).get(key)
    rows = f"{scores['rows']:,} {run.unseen} rows"
    return [
        (
            "–" if scores.get(key) is None else f"{scores[key]:.3f}",
            f"{results.column(run, key)} on {run.unseen}",
            f"95% interval {sure[0]:.3f} to {sure[1]:.3f}, {rows}" if sure else rows,
        ),
        (
            f"{run.head.neurons:,}",
            "neurons read",
            f"of {run.metrics['neurons_total']:,}: {run.choice.site},"
            f" {'+'.join(p.value for p in run.choice.poolings)}-pooled,"
            f" {run.joined or f'eta {run.choice.eta:g}'}",
        ),
        (
            f"{run.metrics.get('layers_run', chosen['depth'])} of {run.metrics['layers_total']}",
            "layers run",
            f"up to {plain(chosen['layer'])}",
        ),
    ]


def _facts(run: Run) -> Table:
    """What was run on what."""
    model = run.head.model
    rows: list[list[Any]] = [
        [
            "model",
            f"{_last(plain(model.get('id')))} ({plain(model.get('architecture'), 60)}), frozen",
        ],
    ]
    if model.get("revision") or model.get("commit"):
        rows.append(["revision", plain(model.get("commit") or model.get("revision"), 60)])
    if model.get("adapter"):
        rows.append(["adapter", "yes (PEFT)"])
    names = run.classes
    kind = "labels" if run.multi_label else "classes"
    rows.append([f"{len(names)} {kind}", list_names(names, MOST_CLASSES, "")])
    if run.multi_label and run.extracted is not None:
        each = run.codes.sum(1)
        rows.append(["labels a text", f"{each.mean():.2f} on average, {int((each == 0).sum()):,}"
                     f" texts without, at most {int(each.max())}"])  # fmt: skip
    rows += _decisions(run)
    for split, count in run.metrics["rows"].items():
        rows.append([f"{split} rows", f"{count:,}"])
    if run.extracted is not None:
        counts = run.extracted.manifest["counts"]
        mean = counts["tokens"] / max(1, counts["rows"])
        rows.append(["tokens", f"{counts['tokens']:,}, {mean:.1f} a text"])
        rows.append(["texts cut", f"{counts['truncated']:,}"])
        rows += [
            [f"file, {plain(entry['split'])}",
             f"{plain(_last(entry['path']), 80)}, SHA-256 {plain(entry['sha256'])[:12]}…"]
            for entry in run.extracted.manifest["request"]["data"]
        ]  # fmt: skip
    versions = run.trained.manifest["versions"]
    rows.append(["versions", ", ".join(f"{k} {plain(v, 30)}" for k, v in versions.items())])
    return Table(["", ""], rows)


def _decisions(run: Run) -> list[list[Any]]:
    """From which probability on an answer is given; those of labels are in their own table."""
    head, rows = run.head, []
    if head.threshold is not None:
        from_here = f"{run.classes[1]} from a probability of {head.threshold:.3f} on"
        rows.append(["threshold", from_here])
    if head.abstain_below is not None:
        text = f"below a probability of {head.abstain_below:.3f}"
        found = run.metrics.get("answered", {}).get(run.unseen)
        if found is not None:
            text += f": answers {found['share']:.1%} of the {run.unseen} rows"
            if found["accuracy"] is not None:
                text += f", {found['accuracy']:.3f} of them right"
        rows.append(["abstains", text])
    return rows


def _stages(run: Run) -> Table:
    """Time and size of each stage, as far as it is still there."""
    found: list[tuple[str, Artifact | None]] = [
        ("extract", run.extracted), ("select", run.selected), ("train", run.trained)
    ]  # fmt: skip
    rows = []
    for name, artifact in found:
        if artifact is not None:
            seconds = artifact.log.get("seconds")
            when = str(artifact.manifest["fingerprint"])[:12]
            rows.append([name, "–" if seconds is None else f"{seconds:,.1f} s",
                         human_bytes(artifact.size), when])  # fmt: skip
    return Table(["stage", "time", "size", "fingerprint"], rows)


def _options(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The options of each stage, as its manifest has them."""
    found = []
    for name, artifact in (
        ("extract", run.extracted), ("select", run.selected), ("train", run.trained)
    ):  # fmt: skip
        if artifact is not None:
            options = artifact.manifest["request"]["options"]
            found.append((name, [(key, _shown(key, value)) for key, value in _flat(options)]))
    return found


def _flat(options: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in options.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{plain(key)}.")
        elif value is not None:
            rows.append((prefix + plain(key, 60), value))
    return rows


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(plain(item, 60) for item in value)
    text = plain(value, 200)
    return _last(text) if key.endswith(("model", "adapter")) else text
