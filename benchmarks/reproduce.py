"""The paper's experiment: one table per data set and model, and what each part is worth.

    python benchmarks/reproduce.py --data FOLDER --set sst2 --model bundled:minilm --rows 8000

FOLDER holds ``sst2``, ``imdb`` and ``edos``, each with ``train.csv.gz`` (and ``val``, ``test``).
Every row of a table is a *cell*, kept as a JSON file under ``--output`` as soon as it is known: the
same command goes on where it was stopped, ``--again`` does some anew. Seconds are of all cores
together on a CPU (others may use it too), of the wall clock with a GPU. ``--source`` takes the
activations out of a folder that ``spin extract`` wrote for these texts, or more. Without ``--data``
the tables are written of what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file lies select.py, which must not stand for the standard library's module.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks import tables  # noqa: E402
from benchmarks.ablations import ABLATIONS  # noqa: E402
from benchmarks.cells import CELLS, Work, clean  # noqa: E402
from benchmarks.scoring import circumstances  # noqa: E402
from benchmarks.sets import TASKS, prepare  # noqa: E402
from benchmarks.tuning import Recipe  # noqa: E402
from spin_cli import atomic  # noqa: E402
from spin_cli.config import ModelConfig  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with sst2, imdb and edos")
    add("--set", default=",".join(TASKS), help="which of them")
    add("--model", action="append", help="as for spin extract -m; may be given several times")
    add("--rows", type=int, help="train and val rows, drawn at random; default all")
    add("--test-rows", type=int, help="test rows; default all")
    add("--seed", type=int, default=0, help="of the draw")
    add("--cells", default=",".join(CELLS), help="rows of the table; '' for none")
    add("--ablations", default="", help=f"some of {','.join(ABLATIONS)}, or all")
    add("--source", type=Path, help="activations folder that holds the texts")
    add("--max-length", type=int, default=512, help="tokens of a text")
    add("--device", default="auto")
    add("--epochs", type=int, default=Recipe.epochs, help="of fine-tuning")
    add("--rate", type=float, default=Recipe.rate, help="learning rate of fine-tuning")
    add("--tune-length", type=int, default=Recipe.max_length, help="tokens, for fine-tuning")
    add("--again", action="store_true", help="do cells anew that are there")
    add("--clean", action="store_true", help="remove activations at the end")
    add("-o", "--output", type=Path, default=Path("build/reproduce"))
    return parser


def works(args: argparse.Namespace) -> list[Work]:
    """Every data set with every model."""
    found = []
    for name in filter(None, args.set.split(",")):
        if name not in TASKS:
            raise SystemExit(f"--set {name}: there are {', '.join(TASKS)}")
        size = f"{args.rows}-s{args.seed}" if args.rows else "all"
        place = args.output / f"{name}-{size}"
        data = prepare(
            args.data, name, place / "data", args.rows, args.test_rows, args.seed
        )  # fmt: skip
        for model in args.model or ["bundled:minilm"]:
            options = ModelConfig(model, device=args.device, max_length=args.max_length)
            recipe = Recipe(args.epochs, args.rate, max_length=args.tune_length, seed=args.seed)
            root = place / model.replace(":", "-").strip("/").replace("/", "--")
            found.append(Work(root, data, name, options, args.source, recipe))
    return found


def run(work: Work, kind: str, names: list[str], again: bool) -> None:
    """Fill in the cells of one work that are missing; a failure does not stop the others."""
    known: dict[str, Any] = {"cells": CELLS, "ablations": ABLATIONS}[kind]
    for name in names:
        path = work.root / kind / f"{name}.json"
        if path.is_file() and not again:
            continue
        if again:
            path.unlink(missing_ok=True)
            shutil.rmtree(work.pieces(name), ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        label = f"{work.data.parent.name} {work.model.model} {name}"
        print(label, flush=True)
        load = os.getloadavg()[0]
        found = known[name](work)
        atomic.write_json(
            path,
            {
                "set": work.name,
                "data": work.data.parent.name,
                "rows": {split: len(rows) for split, rows in work.splits.items()},
                "model": work.model.model,
                "max_length": work.model.max_length,
                "name": name,
                "found": found,
                "load": round(load, 1),
                **circumstances(),
            },
        )
        if isinstance(found, dict):
            print(f"  {found['metric']} {found['score']:.4f}", flush=True)


def listed(text: str, known: dict[str, Any]) -> list[str]:
    names = list(known) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise SystemExit(f"{name}: there are {', '.join(known)}")
    return names


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    cells, ablations = listed(args.cells, CELLS), listed(args.ablations, ABLATIONS)
    if args.data is not None:
        for work in works(args):
            run(work, "cells", cells, args.again)
            run(work, "ablations", ablations, args.again)
            if args.clean:
                clean(work)
    found = tables.collect(args.output)
    atomic.write_json(args.output / "results.json", found)
    atomic.write_text(args.output / "results.md", tables.render(found))
    print(args.output / "results.md")


if __name__ == "__main__":
    main()
