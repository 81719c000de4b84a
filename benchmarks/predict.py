"""What an early exit saves: time per text, loading and the first answer, as ratios in one run.

    python benchmarks/predict.py --data sst2 [--rows 1024] [--rounds 7]

Heads of a given depth are made of random neurons of every layer up to it, the deepest being FFN
neurons: how long they take does not depend on what they say. A and B are timed in turn, and ratios
of medians are shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The folder holds select.py, which must not stand for the standard library's module of that name.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import csv  # noqa: E402
import gzip  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: E402

from spin_cli import artifacts, backbone, prediction  # noqa: E402
from spin_cli.backbone import loading  # noqa: E402
from spin_cli.backbone.discovery import probe_inputs  # noqa: E402
from spin_cli.backbone.partial import shorten  # noqa: E402
from spin_cli.backbone.resolve import locate  # noqa: E402
from spin_cli.choices import Pooling, Site, StorageDtype  # noqa: E402
from spin_cli.config import ModelConfig, PredictConfig  # noqa: E402
from spin_cli.head import Head, HeadFeature, blocks_needed, save_head  # noqa: E402

DEPTHS = {"bundled:smollm2": (8, 15, 22), "bundled:minilm": (2, 3, 4)}
PER_LAYER = 12
"""Neurons read at each layer, of each site."""


def read_texts(folder: Path, rows: int) -> list[str]:
    path = next(iter(sorted(folder.glob("train.*"))))
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    picked = np.random.default_rng(0).permutation(len(texts))[:rows]
    return [texts[i] for i in picked]


def make_head(whole: backbone.Backbone, depth: int, folder: Path) -> Path:
    """A head of random neurons up to *depth*, as `spin train` would write it."""
    rng, layout = np.random.default_rng(0), whole.layout
    features = []
    for layer in layout.stacks[0].layers[: depth + 1]:
        for site in (Site.HIDDEN, Site.FFN):
            width = layout.width(layer, site)
            last = layer == layout.stacks[0].layers[depth]
            if not width or (site is Site.HIDDEN and last):
                continue
            neurons = np.sort(rng.permutation(width)[:PER_LAYER]).astype(np.int32)
            features.append(HeadFeature(layer, site, Pooling.MEAN, width, neurons))
    count = sum(len(feature.neurons) for feature in features)
    head = Head(
        classes=("no", "yes"),
        features=tuple(features),
        weight=rng.normal(size=(1, count)).astype(np.float32),
        bias=np.zeros(1),
        threshold=None,
        blocks=blocks_needed([f.layer for f in features]),
        storage_dtype=StorageDtype.FLOAT16,
        model=whole.identity,
        reading=artifacts.to_plain(whole.options),
    )
    folder.mkdir(parents=True)
    save_head(folder, head)
    artifacts.write_manifest(folder, "head", {})
    return folder


def in_turn(rounds: int, *functions) -> list[float]:
    """Median seconds of each, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for kept, function in zip(times, functions, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in times]


@torch.inference_mode()
def run_bare(model, pad_id: int, batches: list[list[list[int]]]) -> None:
    """The whole model, nothing else, on batches that are ready."""
    for batch in batches:
        width = max(map(len, batch))
        ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in batch])
        inputs = probe_inputs(model, ids)
        if min(map(len, batch)) < width:
            inputs["attention_mask"] = torch.tensor(
                [[1] * len(ids) + [0] * (width - len(ids)) for ids in batch]
            )
        model(**inputs)


@torch.inference_mode()
def run_usual(model, tokenizer, texts: list[str], weight: torch.Tensor) -> None:
    """The usual script: batches of 32 in the order of the texts, a head on the last layer."""
    for start in range(0, len(texts), 32):
        inputs = tokenizer(
            texts[start : start + 32], padding=True, truncation=True, max_length=512,
            return_tensors="pt",
        )  # fmt: skip
        inputs.pop("token_type_ids", None)
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        ((states * mask).sum(1) / mask.sum(1) @ weight).sigmoid().numpy()


def usual_load(name: str, depth: int | None = None):
    """Configuration, tokenizer and model by transformers alone."""
    location = locate(ModelConfig(name))
    config = AutoConfig.from_pretrained(location.source, **location.arguments)
    shorten(config, depth)
    tokenizer = AutoTokenizer.from_pretrained(location.source, **location.arguments)
    model = AutoModel.from_pretrained(
        location.source, config=config, dtype=torch.float32, **location.arguments
    )
    return model.eval(), tokenizer


def time_texts(name: str, whole, texts: list[str], folder: Path, rounds: int) -> None:
    model, tokenizer = usual_load(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    weight = torch.randn(model.config.hidden_size, 1)
    blocks = whole.layout.stacks[0].depth
    print(f"\n## {name}: {len(texts)} texts, {blocks} blocks\n")
    print("| depth k | k/L | bare forward | spin / bare | allowed | usual / spin | L/k |")
    print("|---|---|---|---|---|---|---|")
    for depth in DEPTHS[name]:
        predictor = prediction.open_predictor(folder / str(depth), PredictConfig())
        encoded = predictor.encode(texts)
        plan = backbone.plan_for(whole, [len(e.ids) for e in encoded])
        batches = [[encoded[row].ids for row in batch] for batch in plan]
        bare, spin, usual, ends = in_turn(
            rounds,
            lambda batches=batches: run_bare(model, whole.pad_id, batches),
            lambda encoded=encoded, p=predictor: p.classify(p.rounded(p.gather(encoded))),
            lambda: run_usual(model, tokenizer, texts, weight),
            lambda p=predictor: p.probabilities(texts),
        )
        print(
            f"| {depth} | {depth / blocks:.3f} | {1e3 * bare / len(texts):.2f} ms/text"
            f" | {spin / bare:.3f} | {depth / blocks + 0.08:.3f} | {usual / ends:.2f}"
            f" | {blocks / depth:.2f} |",
            flush=True,
        )


def load_weights(name: str, depth: int | None) -> float:
    """Seconds to build the model of the first blocks and read its weights."""
    options = ModelConfig(name)
    location = locate(options)
    with loading._file_access(location, depth):
        config = AutoConfig.from_pretrained(location.source, **location.arguments)
        shorten(config, depth)
        started = time.perf_counter()
        loading._load_model(options, location, config, torch.float32, {})
        return time.perf_counter() - started


def time_loading(name: str, whole, rounds: int) -> None:
    """Weights at each depth, in turn; embeddings are what a line through 1 and L has at 0."""
    blocks = whole.layout.stacks[0].depth
    times: dict[int, list[float]] = {depth: [] for depth in (1, *DEPTHS[name], blocks)}
    usual: list[float] = []
    for _ in range(rounds):
        for depth, kept in times.items():
            kept.append(load_weights(name, depth))
        started = time.perf_counter()
        usual_load(name)
        usual.append(time.perf_counter() - started)
    median = {depth: statistics.median(kept) for depth, kept in times.items()}
    fixed = median[1] - (median[blocks] - median[1]) / (blocks - 1)
    print("\n| depth k | weights | of all | embeddings apart | allowed | transformers loads all |")
    print("|---|---|---|---|---|---|")
    for depth in DEPTHS[name]:
        print(
            f"| {depth} | {median[depth]:.3f} s | {median[depth] / median[blocks]:.3f}"
            f" | {(median[depth] - fixed) / (median[blocks] - fixed):.3f}"
            f" | {depth / blocks + 0.2:.3f} | {statistics.median(usual):.2f} s |",
            flush=True,
        )


BARE = """
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
arguments = {arguments!r}
config = AutoConfig.from_pretrained({source!r}, **arguments)
config.num_hidden_layers = {depth}
AutoTokenizer.from_pretrained({source!r}, **arguments)
AutoModel.from_pretrained({source!r}, config=config, dtype=torch.float32, **arguments)
"""


def time_first(name: str, folder: Path, rounds: int) -> None:
    """A one-line input, as processes of their own."""
    location = locate(ModelConfig(name))
    print("\n| depth k | bare Python loads | spin's first answer | ratio | allowed |")
    print("|---|---|---|---|---|")
    for depth in DEPTHS[name][:1]:
        code = BARE.format(
            arguments=location.arguments, source=location.source, depth=depth
        )  # fmt: skip
        spin = [sys.executable, "-m", "spin_cli", "predict", str(folder / str(depth)), "-"]
        bare, first = in_turn(
            rounds,
            lambda code=code: subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True
            ),
            lambda spin=spin: subprocess.run(
                spin, input=b"a good film\n", check=True, capture_output=True
            ),
        )
        print(f"| {depth} | {bare:.2f} s | {first:.2f} s | {first / bare:.2f} | 1.30 |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=list(DEPTHS), action="append")
    options = parser.parse_args()
    texts = read_texts(options.data, options.rows)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in options.model or DEPTHS:
        whole = backbone.load(ModelConfig(name))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for depth in DEPTHS[name]:
                make_head(whole, depth, folder / str(depth))
            few = texts if name == "bundled:minilm" else texts[: len(texts) // 4]
            time_texts(name, whole, few, folder, options.rounds)
            time_loading(name, whole, options.rounds)
            time_first(name, folder, options.rounds)


if __name__ == "__main__":
    main()
