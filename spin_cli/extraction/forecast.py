"""What a run would take, measured on a sample: disk, memory, time."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from spin_cli import activations, backbone
from spin_cli.backbone import Encoded
from spin_cli.extraction.planning import Plan, hookpoints, sample_rows
from spin_cli.extraction.windows import read_rows_into

PATIENCE = 20.0
"""Seconds that timing the whole sample may take; else a part of it is timed."""
PARTS = 8


def estimate(plan: Plan) -> dict[str, Any]:
    """What carrying out *plan* would take.

    Returns
    -------
    dict
        ``rows``; ``tokens``; ``truncated`` rows; ``disk_bytes`` (whole chunks; HDF5 adds some
        KiB); ``memory_bytes`` (peak resident size of one process); ``seconds``; ``features``;
        ``window_rows``; ``storage_dtype``; ``notes``. Tokens and times are scaled up from about
        512 rows.
    """
    rows = len(plan.dataset)
    encoded = backbone.encode(plan.model, [row.text for row in sample_rows(plan.dataset)])
    tokens = sum(item.n_tokens for item in encoded)
    scale = rows / len(encoded)
    return {
        "rows": rows,
        "tokens": round(tokens * scale),
        "truncated": round(sum(item.truncated for item in encoded) * scale),
        "disk_bytes": activations.disk_bytes(plan.features, rows, plan.storage_dtype),
        "seconds": round(seconds_per_token(plan, encoded) * tokens * scale, 1),
        "memory_bytes": peak_bytes() + plan.window_rows * plan.row_bytes,
        "features": len(plan.features),
        "hookpoints": hookpoints([(f.site.value, f.hookpoint) for f in plan.features]),
        "window_rows": plan.window_rows,
        "storage_dtype": plan.storage_dtype,
        "notes": list(plan.notes),
    }


def seconds_per_token(plan: Plan, encoded: list[Encoded]) -> float:
    """Time the sample, or a part of it that has all lengths where the whole would take too long."""
    order = sorted(range(len(encoded)), key=lambda row: -encoded[row].n_tokens)
    read_rows_into(plan.model, [encoded[order[-1]]], plan.features)  # the first call sets up
    found = _time(plan, [encoded[row] for row in order[::PARTS]])
    if found * sum(item.n_tokens for item in encoded) > PATIENCE:
        return found
    return _time(plan, encoded)  # fuller batches: nearer to what a run does


def _time(plan: Plan, part: list[Encoded]) -> float:
    """Seconds a token, in whole windows where there are any: texts are batched within one."""
    size = plan.window_rows
    windows = [part[at : at + size] for at in range(0, max(1, len(part) - size + 1), size)]
    begun = time.perf_counter()
    for window in windows:
        read_rows_into(plan.model, window, plan.features, dtype=plan.storage_dtype)
    seconds = time.perf_counter() - begun
    return seconds / sum(item.n_tokens for window in windows for item in window)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
