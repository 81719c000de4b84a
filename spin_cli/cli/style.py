"""What a row of the output holds, as a JSON object and as cells of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from spin_cli.choices import OutputFormat
from spin_cli.config import PredictConfig

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.prediction import Prediction
    from spin_cli.prediction.prefixes import Trace

DIGITS = 6
"""Of a written number, behind the point."""
MARK = "input_"
"""Before the name of an input's column that would be taken for one of ours."""


@dataclass(frozen=True)
class Style:
    """What a row of the output holds."""

    classes: tuple[str, ...]
    config: PredictConfig
    abstains: bool = False
    """Whether each row says if it is too uncertain to be given."""
    separator: str | None = None
    """Between the labels in a cell of a table, where a text may have any number of them."""

    def names(self, inputs: Sequence[str]) -> list[str]:
        """Columns of a table; *inputs* are those that are carried through."""
        config = self.config
        names = ["id", "label", "prob", "truncated"]
        if self.abstains:
            names.append("abstained")
        if config.top is None:
            names += [f"prob_{name}" for name in self.classes]
        else:
            for place in range(1, min(config.top, len(self.classes)) + 1):
                names += [f"label_{place}", f"prob_{place}"]
        if config.explain:
            names.append("why")
        if config.on_error.value == "skip":
            names.append("error")
        return names + [_input_name(name, names) for name in inputs]

    def record(self, found: Prediction) -> dict[str, Any]:
        """A prediction as one JSON object."""
        if found.error is not None:
            return {"id": found.id, "label": None, "error": found.error}
        record: dict[str, Any] = {
            "id": found.id,
            "label": found.label,
            "prob": _rounded(found.prob),
            "probs": {name: _rounded(p) for name, p in self.shown(found)},
            "truncated": found.truncated,
        }
        if found.abstained is not None:
            record["abstained"] = found.abstained
        if isinstance(found.why, list):
            record["why"] = {name: _reasons(why) for name, why in found.why}
        elif found.why is not None:
            record["why"] = _reasons(found.why)
        if found.columns is not None:
            record["columns"] = found.columns
        return record

    def row(self, found: Prediction) -> dict[str, Any]:
        """A prediction as one row of a table."""
        from spin_cli.dataset import column_text

        record = self.record(found)
        if isinstance(found.label, list) and self.config.output_format is not OutputFormat.PARQUET:
            record["label"] = str(self.separator).join(found.label)
        columns, probs = record.pop("columns", {}), record.pop("probs", {})
        if self.config.top is None:
            record |= {f"prob_{name}": p for name, p in probs.items()}
        else:
            for place, (name, p) in enumerate(probs.items(), 1):
                record |= {f"label_{place}": name, f"prob_{place}": p}
        if "why" in record:
            record["why"] = json.dumps(record["why"], ensure_ascii=False)
        names = self.names([])
        return record | {
            _input_name(name, names): column_text(value) for name, value in columns.items()
        }

    def shown(self, found: Prediction) -> list[tuple[str, float]]:
        """The ``top`` likeliest classes, the likeliest first; or all, in their order."""
        if self.config.top is None:
            return list(found.probs.items())
        ranked = sorted(found.probs.items(), key=lambda pair: -pair[1])
        return ranked[: self.config.top]


def _rounded(prob: float | None) -> float | None:
    return None if prob is None else round(prob, DIGITS)


def _input_name(name: str, taken: Sequence[str]) -> str:
    """What an input's column is called beside our own: all differ, whichever columns a row has."""
    base = name
    while base.startswith(MARK):
        base = base.removeprefix(MARK)
    return MARK + name if base in taken else name


def _reasons(why: Any) -> dict[str, Any]:
    plain = {
        key: round(value, DIGITS) if key != "neurons" else value
        for key, value in asdict(why).items()
    }
    for reason in plain["neurons"]:
        reason["value"], reason["contribution"] = (
            round(reason[key], DIGITS) for key in ("value", "contribution")
        )
        if reason["tokens"]:
            reason["tokens"] = [
                token | {"value": round(token["value"], DIGITS)} for token in reason["tokens"]
            ]
        else:
            del reason["tokens"]
    return plain


def trace_record(found: Trace) -> dict[str, Any]:
    """The scores of a text's prefixes as one JSON object."""
    record = asdict(found)
    del record["line"]
    if found.error is not None:
        return {"id": found.id, "error": found.error}
    del record["error"]
    return record
