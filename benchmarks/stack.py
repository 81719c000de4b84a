"""Stacks on stored activations, without `select` and the search: every depth, and the choice.

    python benchmarks/stack.py RUN/activations

Prints JSON lines: one for the last layer's ridge head, one for each depth; ``chosen`` is what
`spin train` would take of the stacks. With val rows of their own (1,000 or more) stacks are fitted
to train rows and judged by these, else train and val rows are judged out of fold, as in `train`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file lies select.py, which must not stand for the standard library's module.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from spin_cli import artifacts, metrics  # noqa: E402
from spin_cli.activations import features_of  # noqa: E402
from spin_cli.choices import Metric, StorageDtype  # noqa: E402
from spin_cli.config import CV_VAL_ROWS  # noqa: E402
from spin_cli.dataset import read_texts  # noqa: E402
from spin_cli.samples import read_samples  # noqa: E402
from spin_cli.training import baselines  # noqa: E402
from spin_cli.training.duplicates import near_duplicates  # noqa: E402
from spin_cli.training.pick import Judged, best_of  # noqa: E402
from spin_cli.training.search import Split, fit_columns  # noqa: E402
from spin_cli.training.stack import WIDEST, fit_stacks  # noqa: E402
from spin_cli.training.table import Reader  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--metric", type=Metric, default=Metric.ACCURACY)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    manifest = artifacts.read_manifest(args.activations, "activations")
    samples, classes = read_samples(args.activations), list(manifest["classes"])
    codes = np.array([classes.index(label) for label in samples.labels], np.int64)
    rows = {name: samples.rows(name) for name in ("train", "val", "test")}
    known = np.concatenate([rows["train"], rows["val"]])
    features = [f for f in features_of(manifest) if f.width <= WIDEST]
    there = {feature.layer for feature in features}
    layers = [name for name in manifest["layers"] if name in there]

    def reader(wanted: Any) -> Reader:
        dtype = StorageDtype(manifest["storage_dtype"])
        return Reader(args.activations, {}, layers, len(codes), wanted, dtype)

    texts = read_texts(args.activations, manifest, baselines.MAX_ROWS)
    groups = None if isinstance(texts, str) else near_duplicates([texts[row] for row in known])
    n_train, n = len(rows["train"]), len(known)
    split = Split(
        codes[known], np.arange(n_train), np.arange(n_train, n), len(classes), args.metric
    )
    y = {"val": codes[rows["val"]], "out-of-fold": codes[known], "test": codes[rows["test"]]}
    searched, tested = reader(known), reader(rows["test"])

    fits = [
        (f, fit_columns(searched.whole(f), split)) for f in features if f.layer == layers[-1]
        and f.site.value == "hidden"
    ]  # fmt: skip
    feature, last = max(fits, key=lambda pair: pair[1].rank)
    probs = {"val": last.val_probs, "test": last.probabilities(tested.whole(feature))}
    report("last layer", probs, y, classes, args.metric, pooling=feature.pooling.value)

    judge = split.val if len(split.val) >= CV_VAL_ROWS else None
    what = "out-of-fold" if judge is None else "val"
    whole = Split(split.codes, np.arange(n), split.val, split.n_classes, args.metric)
    heads = fit_stacks(
        searched, features, whole if judge is None else split, groups,
        judge=judge, depths=range(len(layers)), seed=0, workers=args.workers,
    )  # fmt: skip
    best = best_of(heads, y[what], args.metric)
    for head in heads:
        probs = {what: head.probs, "test": test_probs(head, tested, len(classes))}
        report(
            "stack", probs, y, classes, args.metric,
            layer=layers[head.depth], neurons=head.neurons, chosen=head is best,
        )  # fmt: skip
    print(json.dumps({"seconds": round(time.time() - started, 1)}))


def test_probs(head: Judged, reader: Reader, n_classes: int) -> Any:
    """By one matrix after the other, as all of them are large in float64."""
    assert head.linear is not None
    ends = np.cumsum([feature.width for feature in head.linear.features])
    z = head.linear.bias
    for feature, end in zip(head.linear.features, ends, strict=True):
        weight = head.linear.weight[:, end - feature.width : end]
        z = z + reader.whole(feature).astype(np.float64) @ weight.T.astype(np.float64)
    return metrics.probabilities(z, n_classes)


def report(
    name: str, probs: dict[str, Any], y: dict[str, Any], classes: list[str], metric: Metric,
    **more: Any,
) -> None:  # fmt: skip
    known = next(iter(probs))
    threshold = None
    if metric is Metric.MACRO_F1 and len(classes) == 2:
        threshold = metrics.best_threshold(y[known], probs[known])
    entry: dict[str, Any] = {"head": name} | more
    for split, values in probs.items():
        scores = metrics.evaluate(y[split], values, classes, threshold)
        entry[split] = {key: round(scores[key], 4) for key in ("accuracy", "macro_f1", "log_loss")}
    print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
