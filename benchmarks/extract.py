"""How long reading activations takes, as ratios taken in turn in one run.

``forward``  `spin extract` (every layer, both sites, three poolings, written and synced) against
             the bare forward pass of the same model on the same batches
``loop``     `spin extract` against the loop that people write: batches of 32 in input order,
             ``output_hidden_states=True`` and a hook on every FFN, pooled on the CPU, one file at
             the end
``bfloat16`` `spin extract --dtype bfloat16` against float32
``memory``   peak memory at 5,000 and at 50,000 rows, and against the model's size
``gpu``      (only where asked for, on a CUDA device) a random model of Llama-3-8B's shape in
             bfloat16, 256-token texts, both sites, two poolings, against its bare forward pass
``dry-run``  what ``--dry-run`` foretells against what is measured

    python benchmarks/extract.py --data FOLDER [--only forward,loop] [--model bundled:minilm]
"""

from __future__ import annotations

import sys
from pathlib import Path

# A neighbour of this file is named as a module of the standard library, which it must not shadow.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import csv  # noqa: E402
import gzip  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from spin_cli import backbone, extraction  # noqa: E402
from spin_cli.backbone.discovery import probe_inputs  # noqa: E402
from spin_cli.choices import Dtype, Pooling, Site  # noqa: E402
from spin_cli.config import DataConfig, ExtractConfig, ModelConfig  # noqa: E402

Timed = Callable[[], object]


def take_rows(source: Path, rows: int, target: Path) -> Path:
    """Copy the first *rows* rows of a gzip-compressed CSV file."""
    with (
        gzip.open(source, "rt", newline="", encoding="utf-8") as lines,
        target.open("w", newline="", encoding="utf-8") as copy,
    ):
        writer = csv.writer(copy)
        for index, row in enumerate(csv.reader(lines)):
            if index > rows:
                break
            writer.writerow(row[:2])
    return target


def in_turn(one: Timed, other: Timed, repeats: int, folder: Path) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios *other* / *one*, taken in turn.

    What a run leaves as ``activations`` in *folder* is removed before the next one, untimed; the
    first run of each is not counted, and each is the first of every other pair.
    """

    def seconds_of(run: Timed) -> float:
        begun = time.perf_counter()
        run()
        seconds = time.perf_counter() - begun
        shutil.rmtree(folder / "activations", ignore_errors=True)
        return seconds

    pairs = []
    for turn in range(1 + repeats):
        order = (one, other) if turn % 2 else (other, one)
        found = {run: seconds_of(run) for run in order}
        pairs.append((found[one], found[other]))
    del pairs[0]
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[1] / pair[0] for pair in pairs),
    )


def plan_for(data: Path, model: str, dtype: Dtype = Dtype.FLOAT32) -> extraction.Plan:
    config = ExtractConfig(DataConfig(val_fraction=0.1), ModelConfig(model, dtype=dtype))
    return extraction.plan(data, config)


def bare_forward(plan: extraction.Plan, batch_tokens: int | None = None) -> Timed:
    """The forward pass alone, one batch after the other on all cores.

    Batches are those that the extraction runs, or, out of the same windows, of so many tokens.
    """
    model = plan.model if batch_tokens is None else replace(plan.model, batch_tokens=batch_tokens)
    rows = list(plan.dataset.rows())
    batches = []
    for window in plan.windows:
        texts = [row.text for row in rows[window.start : window.stop]]
        ids = [item.ids for item in backbone.encode(plan.model, texts)]
        for batch in backbone.plan_for(model, [len(i) for i in ids]):
            batches.append(padded([ids[row] for row in batch], plan.model))

    @torch.inference_mode()
    def run() -> None:
        for ids, mask in batches:
            inputs = probe_inputs(plan.model.model, ids)
            if mask is not None:
                inputs["attention_mask"] = mask
            plan.model.model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def padded(
    batch: list[list[int]], model: backbone.Backbone
) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = max(map(len, batch))
    ids = torch.tensor([ids + [model.pad_id] * (width - len(ids)) for ids in batch])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in batch])
    ids, mask = ids.to(model.device), mask.to(model.device)
    return ids, None if bool(mask.all()) else mask


def whole_extraction(plan: extraction.Plan, folder: Path) -> Timed:
    return lambda: extraction.run(plan, folder / "activations")


def usual_loop(plan: extraction.Plan, folder: Path) -> Timed:
    """What people write for the same vectors."""
    model, tokenizer = plan.model.model, plan.model.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [row.text for row in plan.dataset.rows()]
    hooks = [hook for stack in plan.model.layout.stacks for hook in stack.sites[Site.FFN]]
    ffns = [hook.path for hook in hooks if not isinstance(hook, str)]

    def pooled(states: torch.Tensor, mask: torch.Tensor) -> list[np.ndarray]:
        kept = mask[:, :, None]
        mean = (states * kept).sum(1) / kept.sum(1)
        largest = states.masked_fill(kept == 0, -torch.inf).amax(1)
        last = states[torch.arange(len(states)), mask.sum(1) - 1]
        return [part.cpu().numpy().astype(np.float16) for part in (mean, largest, last)]

    @torch.inference_mode()
    def run() -> None:
        seen: list[torch.Tensor] = []
        handles = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args: seen.append(args[0].detach().cpu())
            )
            for path in ffns
        ]
        kept: dict[str, list[np.ndarray]] = {}
        tokenizer.padding_side = "right"
        for start in range(0, len(texts), 32):
            inputs = tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=512,
                return_tensors="pt",
            ).to(plan.model.device)  # fmt: skip
            seen.clear()
            output = model(**inputs, output_hidden_states=True)
            mask = inputs["attention_mask"].cpu()
            for name, states in [
                *((f"hidden {i}", s.cpu()) for i, s in enumerate(output.hidden_states)),
                *((f"ffn {i}", s) for i, s in enumerate(seen)),
            ]:
                for pooling, vectors in zip(
                    ("mean", "max", "last"), pooled(states, mask), strict=True
                ):
                    kept.setdefault(f"{name} {pooling}", []).append(vectors)
        for handle in handles:
            handle.remove()
        np.savez(folder / "loop.npz", **{name: np.vstack(parts) for name, parts in kept.items()})

    return run


def measure_forward(args: argparse.Namespace, folder: Path) -> None:
    for model, rows in ((args.model, args.rows),) if args.model else (
        ("bundled:minilm", 6000), ("bundled:smollm2", 600),
    ):  # fmt: skip
        data = take_rows(args.data / "sst2" / "train.csv.gz", rows, folder / "train.csv")
        plan = plan_for(data, model)
        bare, whole, ratio = in_turn(
            bare_forward(plan, args.bare_tokens), whole_extraction(plan, folder), args.repeats,
            folder,
        )  # fmt: skip
        show("forward", model, f"SST-2, {rows} rows", bare, whole, ratio)


def measure_loop(args: argparse.Namespace, folder: Path) -> None:
    for name, rows in (("sst2", 1500), ("edos", 1500), ("imdb", 200)):
        data = take_rows(args.data / name / "train.csv.gz", rows, folder / "train.csv")
        plan = plan_for(data, args.model or "bundled:minilm")
        whole, loop, ratio = in_turn(
            whole_extraction(plan, folder), usual_loop(plan, folder), args.repeats, folder
        )
        show("loop", args.model or "bundled:minilm", f"{name}, {rows} rows", whole, loop, ratio)


def measure_bfloat16(args: argparse.Namespace, folder: Path) -> None:
    model = args.model or "bundled:smollm2"
    data = take_rows(args.data / "sst2" / "train.csv.gz", args.rows or 1200, folder / "train.csv")
    half, full = plan_for(data, model, Dtype.BFLOAT16), plan_for(data, model)
    fast, slow, ratio = in_turn(
        whole_extraction(half, folder), whole_extraction(full, folder), args.repeats, folder
    )
    show("bfloat16", model, "SST-2", fast, slow, ratio)


def child_peak(data: Path, model: str, output: Path) -> float:
    """Peak resident MB of ``spin extract`` in a process of its own."""
    code = (
        "import resource, sys; from spin_cli.cli import run; sys.argv[1:] = sys.argv[1:]; run();"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    command = ["extract", str(data), "-m", model, "-o", str(output), "--force"]
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", *command], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def measure_memory(args: argparse.Namespace, folder: Path) -> None:
    for model, sizes in (("bundled:minilm", (5000, 50000)), ("bundled:smollm2", (360,))):
        if args.model not in (None, model):
            continue
        peaks = {}
        for rows in sizes:
            data = take_rows(args.data / "sst2" / "train.csv.gz", rows, folder / "train.csv")
            peaks[rows] = child_peak(data, model, folder / "activations")
        loaded = backbone.load(ModelConfig(model)).model
        size = sum(p.numel() * p.element_size() for p in loaded.parameters()) / 2**20
        record(
            what="memory", model=model, model_mb=round(size),
            peak_mb={rows: round(peak) for rows, peak in peaks.items()},
            above_model_mb=round(max(peaks.values()) - size),
            growth=round(peaks[sizes[-1]] / peaks[sizes[0]], 3),
        )  # fmt: skip


def measure_dry_run(args: argparse.Namespace, folder: Path) -> None:
    for model, rows in (("bundled:minilm", 6000), ("bundled:smollm2", 600)):
        if args.model not in (None, model):
            continue
        data = take_rows(args.data / "sst2" / "train.csv.gz", rows, folder / "train.csv")
        foretold = extraction.estimate(plan_for(data, model))
        plan = plan_for(data, model)
        begun = time.perf_counter()
        manifest = extraction.run(plan, folder / "activations", force=True)
        seconds = time.perf_counter() - begun
        disk = sum(entry["bytes"] for entry in manifest["files"].values())
        peak = child_peak(data, model, folder / "activations") * 2**20
        record(
            what="dry-run", model=model, rows=rows,
            disk=round(foretold["disk_bytes"] / disk, 3),
            tokens=round(foretold["tokens"] / manifest["counts"]["tokens"], 3),
            seconds=round(foretold["seconds"] / seconds, 3),
            memory=round(foretold["memory_bytes"] / peak, 3),
        )  # fmt: skip


def make_large(folder: Path, layers: int) -> Path:
    """A random model of Llama-3-8B's shape in bfloat16; no time depends on its weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from spin_cli.backbone.resolve import locate

    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    small = locate(ModelConfig("bundled:minilm"))  # its tokenizer does as well as any
    AutoTokenizer.from_pretrained(small.source, **small.arguments).save_pretrained(folder / "8b")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        LlamaModel(shape).save_pretrained(folder / "8b")
        torch.set_default_dtype(torch.float32)
    torch.cuda.empty_cache()
    return folder / "8b"


def plan_large(args: argparse.Namespace, folder: Path, rows: int) -> extraction.Plan:
    data = take_rows(args.data / "imdb" / "train.csv.gz", rows, folder / "long.csv")
    config = ExtractConfig(
        DataConfig(),
        ModelConfig(str(make_large(folder, args.gpu_layers)), dtype=Dtype.BFLOAT16, max_length=256),
        poolings=(Pooling.MEAN, Pooling.LAST),
    )
    return extraction.plan(data, config)


def measure_gpu(args: argparse.Namespace, folder: Path) -> None:
    rows = args.rows or 3072
    plan = plan_large(args, folder, rows)
    bare, whole, ratio = in_turn(
        bare_forward(plan), whole_extraction(plan, folder), args.repeats, folder
    )
    model = f"Llama-3-8B's shape, random, {args.gpu_layers} layers"
    show("gpu", model, f"IMDb, {rows} rows cut at 256 tokens", bare, whole, ratio)


def show(what: str, model: str, data: str, one: float, other: float, ratio: float) -> None:
    record(
        what=what, model=model, data=data, seconds=[round(one, 2), round(other, 2)],
        ratio=round(ratio, 3),
    )  # fmt: skip


def record(**found: object) -> None:
    print(json.dumps(found), flush=True)


MEASURES = {
    "forward": measure_forward,
    "loop": measure_loop,
    "bfloat16": measure_bfloat16,
    "dry-run": measure_dry_run,
    "memory": measure_memory,
    "gpu": measure_gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2, edos, imdb")
    parser.add_argument(
        "--only",
        default=",".join(name for name in MEASURES if name != "gpu"),
        help="which measurements",
    )
    parser.add_argument("--model", help="default: the bundled models")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--bare-tokens", type=int,
        help="tokens in a batch of the bare pass in ``forward`` [default: as in extract]",
    )  # fmt: skip
    parser.add_argument("--gpu-layers", type=int, default=32, help="of the model in ``gpu``")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    record(device=device, threads=torch.get_num_threads(), torch=torch.__version__)
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            MEASURES[name](args, Path(folder))
    record(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()
