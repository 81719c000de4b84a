"""The model card that goes with a head."""

from __future__ import annotations

from typing import Any

from spin_cli.head import Head


def model_card(head: Head, report: dict[str, Any]) -> str:
    """Markdown that says what the head is, what it needs and how well it does."""
    chosen, base = report["chosen"], report["last_layer"]
    lines = [
        "# Text classifier (SPIN head)",
        "",
        f"Classes: {', '.join(head.classes)}",
        "",
        f"Reads {head.neurons} neurons ({chosen['site']}, {chosen['pooling']}-pooled) up to"
        f" {chosen['layer']} of the frozen model `{head.model['id']}`"
        f" ({head.model['architecture']}); trained on {report['rows']['train']} texts.",
        "",
        f"Chosen on {report['rows']['val']} validation texts by {report['metric']}:"
        f" eta {chosen['eta']}, l2 {chosen['l2_share']} per text, threshold {head.threshold}.",
        "",
        "| split | head | accuracy | macro-F1 | log loss |",
        "|---|---|---|---|---|",
    ]
    names = {"spin": "SPIN", "last_layer": f"last layer ({base['layer']}, {base['pooling']})"}
    for key, name in names.items():
        for split in ("val", "test"):
            if split in report[key]:
                s = report[key][split]
                lines.append(
                    f"| {split} | {name} | {s['accuracy']:.4f} | {s['macro_f1']:.4f}"
                    f" | {s['log_loss']:.4f} |"
                )
    lines += [
        "",
        "The head was chosen on the validation rows, so their scores are a little too good; the",
        "test rows were read once, after the choice.",
        "",
        "Use: `spin predict THIS_FOLDER texts.csv`",
        "",
    ]
    return "\n".join(lines)
