"""How every classifier of the tables is judged: the same rows, threshold, and intervals."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score

from spin_cli import artifacts, metrics
from spin_cli.choices import Metric

RESAMPLES = 1000


def judge(
    metric: Metric,
    y: np.ndarray,
    probs: np.ndarray,
    val: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Test score with a 95% bootstrap interval.

    Parameters
    ----------
    y, probs : codes (N,) and class probabilities (N, K) of the test rows
    val : the same of the rows by which a decision threshold may be chosen; it is chosen where two
        classes are judged by macro-F1
    """
    threshold = None
    if metric is Metric.MACRO_F1 and probs.shape[1] == 2 and val is not None:
        threshold = metrics.best_threshold(*val)
    said = metrics.decide(probs, threshold)
    place = 0 if metric is Metric.ACCURACY else 1
    drawn = [
        metrics.scores_of(metrics.confusion(y[rows], said[rows], probs.shape[1]))[place]
        for rows in metrics.resamples(len(y), RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "metric": metric.value,
        "score": score(metric, y, said),
        "interval": [float(low), float(high)],
        "threshold": threshold,
    }


def score(metric: Metric, y: np.ndarray, said: np.ndarray) -> float:
    if metric is Metric.ACCURACY:
        return float(accuracy_score(y, said))
    return float(f1_score(y, said, average="macro", zero_division=0))


def of_report(report: dict[str, Any]) -> dict[str, Any]:
    """The same out of the ``metrics.json`` of a head."""
    name = report["metric"].replace("-", "_")
    test = report["spin"]["test"]
    return {
        "metric": report["metric"],
        "score": test[name],
        "interval": test["intervals"][name],
        "threshold": report["chosen"]["threshold"],
    }


class Clock:
    """Seconds of computing: of all cores together on a CPU, of the wall clock with a GPU.

    On a CPU that others use too, the wall clock tells more of them than of us.
    """

    def __init__(self) -> None:
        self.time = time.perf_counter if torch.cuda.is_available() else time.process_time
        self.begun = self.time()

    @property
    def seconds(self) -> float:
        return self.time() - self.begun


def fastest(call: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        clock = Clock()
        call()
        seconds.append(clock.seconds)
    return min(seconds)


def circumstances() -> dict[str, Any]:
    """Machine, versions and date."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": artifacts.versions(),
    }


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names) or '?'} × {names[0] if names else platform.processor()}"
