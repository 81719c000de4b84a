"""How time and memory of each stage grow: with rows, layers and width; fitted exponents.

    python benchmarks/growth.py [--stages select,train] [--rows 1000,10000] [-o OUT]

``select`` and ``train`` get random features (hidden states, one pooling), ``extract`` and
``predict`` a random Llama on texts of eight words. One size varies, the others stay at their base.
Every measurement is a process of its own: seconds are of all its cores together around the stage
alone (a GPU: wall clock), memory is what its peak lies above where the stage began. An exponent of
1 is linear growth; it is the slope of a line through the logarithms.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file lies select.py, which must not stand for the standard library's module.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from benchmarks.folders import random_activations  # noqa: E402
from benchmarks.scoring import Clock, circumstances  # noqa: E402
from benchmarks.sets import write_rows  # noqa: E402
from benchmarks.tables import markdown  # noqa: E402
from spin_cli import Classifier, artifacts, atomic, extraction, selection, training  # noqa: E402
from spin_cli.choices import Pooling, Site  # noqa: E402
from spin_cli.config import DataConfig, ExtractConfig, ModelConfig, SelectConfig, TrainConfig  # noqa: E402

BASE = {"rows": 2000, "layers": 6, "width": 384}
MODEL_BASE = {"rows": 500, "layers": 6, "width": 128}
"""Of what runs a model."""
WORDS, HEADS = 100, 4


def make_model(folder: Path, layers: int, width: int) -> Path:
    """A random Llama that knows a hundred words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    words = {
        name: number for number, name in enumerate(["[UNK]", "[PAD]", *map(str, range(WORDS))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    LlamaModel(shape).save_pretrained(folder)
    return folder


def make_texts(path: Path, rows: int) -> Path:
    """Texts of eight words, of which most belong to one label."""
    y = np.arange(rows) % 2
    words = np.random.default_rng(0).integers(0, 60, (rows, 8)) + 40 * y[:, None]
    write_rows(path, [(" ".join(map(str, row)), str(k)) for row, k in zip(words, y, strict=True)])
    return path


def setting(folder: Path, rows: int, layers: int, width: int) -> tuple[Path, ExtractConfig]:
    model = make_model(folder / "model", layers, width)
    config = ExtractConfig(
        DataConfig(), ModelConfig(str(model)), sites=(Site.HIDDEN,), poolings=(Pooling.MEAN,)
    )
    return make_texts(folder / "train.csv", rows), config


def begin_extract(folder: Path, rows: int, layers: int, width: int) -> Callable[[], Any]:
    data, config = setting(folder, rows, layers, width)
    planned = extraction.plan(data, config)
    return lambda: extraction.run(planned, folder / "activations")


def begin_select(folder: Path, rows: int, layers: int, width: int) -> Callable[[], Any]:
    source = random_activations(folder / "activations", rows, layers, width)
    return lambda: selection.select(source, folder / "selection", SelectConfig())


def begin_train(folder: Path, rows: int, layers: int, width: int) -> Callable[[], Any]:
    source = random_activations(folder / "activations", rows, layers, width)
    # Its time does not depend on how well the neurons were ranked.
    selection.select(source, folder / "selection", SelectConfig(path_points=4, tol=1e-2))
    return lambda: training.train(folder / "selection", folder / "head", TrainConfig())


def begin_predict(folder: Path, rows: int, layers: int, width: int) -> Callable[[], Any]:
    data, config = setting(folder, 200, layers, width)
    extraction.extract(data, folder / "activations", config)
    selection.select(folder / "activations", folder / "selection", SelectConfig(path_points=4))
    training.train(folder / "selection", folder / "head", TrainConfig(cv=0))
    texts = [line.split(",")[0] for line in make_texts(folder / "t.csv", rows).open()][1:]
    found = Classifier.load(folder / "head")
    return lambda: found.predict_proba(texts)


STAGES = {
    "extract": begin_extract,
    "select": begin_select,
    "train": begin_train,
    "predict": begin_predict,
}
NEEDS_MODEL = ("extract", "predict")


def measure(stage: str, sizes: dict[str, int]) -> dict[str, float]:
    """In this process: seconds, and the peak of memory above where the stage began, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        run = STAGES[stage](Path(folder), **sizes)
        before, clock = _peak(), Clock()
        run()
        return {"seconds": clock.seconds, "megabytes": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(stage: str, sizes: dict[str, int]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([stage, sizes])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of the line through the logarithms; NaN where a value is not positive."""
    if min(values) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def sweep(stage: str, axis: str, sizes: list[int], output: Path) -> list[dict[str, Any]]:
    """Measure where it is not known yet."""
    base = MODEL_BASE if stage in NEEDS_MODEL else BASE
    points = []
    for size in sizes:
        path = output / f"{stage}-{axis}-{size}.json"
        if not path.is_file():
            wanted = base | {axis: size}
            found = {"stage": stage, "axis": axis, "size": size, **wanted, **apart(stage, wanted)}
            atomic.write_json(path, found | circumstances())
        points.append(artifacts.read_json(path))
        last = points[-1]
        print(
            f"{stage} {axis} {size}: {last['seconds']:.2f} s, {last['megabytes']:.0f} MB",
            flush=True,
        )
    return points


def table(sweeps: list[list[dict[str, Any]]]) -> list[str]:
    rows = []
    for points in sweeps:
        sizes = [point["size"] for point in points]
        seconds, memory = ([point[key] for point in points] for key in ("seconds", "megabytes"))
        fixed = ", ".join(
            f"{points[0][name]:,} {name}" for name in BASE if name != points[0]["axis"]
        )
        rows.append(
            [
                points[0]["stage"],
                points[0]["axis"],
                ", ".join(f"{size:,}" for size in sizes),
                fixed,
                ", ".join(f"{value:.1f}" for value in seconds),
                f"{exponent(sizes, seconds):.2f}",
                ", ".join(f"{value:,.0f}" for value in memory),
            ]
        )
    return markdown(["stage", "grows", "sizes", "others", "seconds", "exponent", "MB"], rows)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--rows", default="1000,3000,10000,30000,100000")
    parser.add_argument("--layers", default="6,12,30")
    parser.add_argument("--width", default="384,1024,2048,4096")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/growth"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    sweeps = [
        sweep(stage, axis, numbers(getattr(args, axis)), args.output)
        for stage in args.stages.split(",")
        for axis in BASE
        if getattr(args, axis)
    ]
    text = "\n".join(table(sweeps)) + "\n"
    atomic.write_text(args.output / "growth.md", text)
    print(text)


if __name__ == "__main__":
    main()
