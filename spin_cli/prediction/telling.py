"""What a written row tells of the options that made it, so that no file mixes two kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spin_cli.choices import OnError
from spin_cli.config import PredictConfig
from spin_cli.head import Head

ROUNDING = 1e-6
"""Of a written probability."""
NO, YES = "not given", "given"


def changed_options(
    record: dict[str, Any], names: Sequence[str], config: PredictConfig, head: Head
) -> list[str]:
    """Which options were others when *record* was written, and what they were, in words.

    Parameters
    ----------
    record : dict
        A JSON object, or a row of a table with its columns in their order.
    names : sequence of str
        The columns of such a table with the options of now.
    config : PredictConfig
        The options of now.
    head : Head

    Raises
    ------
    KeyError, TypeError, ValueError, AttributeError
        It is no prediction.
    """
    now = _options(config, head)
    if "probs" in record:
        now["--on-error"] = NO  # a row without an error is the same with both
        had = _of_object(record, now, head)
    elif list(record) == list(names):  # else an input's column might be taken for one of ours
        had = now | (_of_reasons(record["why"], head) if config.explain else {})
    else:
        had = _of_table(record, head)
    changed = [f"{name} was {had[name]}, and is {now[name]} now" for name in now
               if had[name] != now[name]]  # fmt: skip
    if changed or "probs" in record or list(record) == list(names):
        return changed or _other_threshold(record, head)
    return [f"its columns are {', '.join(record)}, where they are {', '.join(names)} now"]


def _options(config: PredictConfig, head: Head) -> dict[str, str]:
    return {
        "--top": _number(config.top or 0, len(head.classes)),
        "--threshold": _given(head.abstain_below is not None),
        "--explain": _number(min(config.explain, head.neurons)),
        "--explain-tokens": _given(config.explain_tokens),
        "--keep-columns": _given(config.keep_columns),
        "--on-error": "skip" if config.on_error is OnError.SKIP else NO,
    }


def _number(count: int, most: int | None = None) -> str:
    return NO if not count or (most is not None and count >= most) else str(count)


def _given(given: bool) -> str:
    return YES if given else NO


def _of_object(record: dict[str, Any], now: dict[str, str], head: Head) -> dict[str, str]:
    return now | {
        "--top": _number(len(record["probs"]), len(head.classes)),
        "--threshold": _given("abstained" in record),
        "--keep-columns": _given("columns" in record),
        **_of_reasons(record.get("why"), head),
    }


def _of_reasons(why: Any, head: Head) -> dict[str, str]:
    if isinstance(why, str):
        why = json.loads(why)
    each = list(why.values()) if why and head.multi_label else [why]
    neurons = each[0]["neurons"] if why else []
    return {
        "--explain": _number(len(neurons)),
        "--explain-tokens": _given(any("tokens" in neuron for neuron in neurons)),
    }


def _of_table(record: dict[str, Any], head: Head) -> dict[str, str]:
    """The same of a table, whose columns stand in a fixed order, the input's at the end."""
    left = [name for name in record if name not in ("id", "label", "prob", "truncated")]

    def take(name: str) -> bool:
        found = left[:1] == [name]
        del left[: int(found)]
        return found

    abstains, top = take("abstained"), 0
    while take(f"label_{top + 1}"):
        top += 1
        take(f"prob_{top}")
    for name in head.classes if not top else ():
        take(f"prob_{name}")
    why = record["why"] if take("why") else None
    return {
        "--top": _number(top, len(head.classes)),
        "--threshold": _given(abstains),
        **_of_reasons(why, head),
        "--on-error": "skip" if take("error") else NO,
        "--keep-columns": _given(bool(left)),
    }


def _other_threshold(record: dict[str, Any], head: Head) -> list[str]:
    limit = head.abstain_below
    if limit is None:
        return []
    prob, marked = float(record["prob"]), str(record["abstained"]) == "True"
    if marked == (prob < limit) or abs(prob - limit) <= ROUNDING:
        return []
    what = "is" if marked else "is not"
    return [f"--threshold was another: {prob} {what} abstained from, and the limit is {limit} now"]


def other_decision(label: str | Sequence[str], probs: Mapping[str, float], head: Head) -> list[str]:
    """The same of the thresholds by which *label* was decided from the written *probs*."""
    given = [label] if isinstance(label, str) else label
    codes = list(range(len(head.classes)))
    if len(codes) == 2 and head.first_threshold is None:
        codes.reverse()  # the threshold is of the second
    for code in codes:
        name = head.classes[code]
        limit = head.limit(code)
        if limit is None and len(head.classes) == 2:
            limit = 0.5
        if limit is None or name not in probs or abs(probs[name] - limit) <= ROUNDING:
            continue
        if (name in given) != (probs[name] >= limit):
            what = "is" if name in given else "is not"
            return [
                f"--decision-threshold was another: {name} {what} given at {probs[name]}, and the"
                f" limit is {limit:.6g} now"
            ]
    return []
