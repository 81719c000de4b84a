"""``spin demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spin_cli.cli import options as o
from spin_cli.cli.pipeline import Sections, run_stages, settle
from spin_cli.cli.style import Style
from spin_cli.cli.terminal import print_json, print_table, say
from spin_cli.cli.training import layers_run, print_report
from spin_cli.config import PredictConfig
from spin_cli.errors import DataError


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "run"
    ),
    data: Annotated[Path, typer.Option("--data", help="A file or folder of data.")] = Path(
        "sample_data/reviews"
    ),
    model: o.Model = "bundled:minilm",
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Do the whole of it on sample data: texts to a classifier to predictions.

    Example: `spin demo`
    """
    if not data.exists():
        raise DataError(
            f"{data}: no such file or folder",
            "Run the demo in spin's source folder, or name data with --data.",
        )
    given: Sections = {"data": {"path": data}, "model": {"model": model}}
    recipe, output = settle(data, output, given, ())
    done = run_stages(output, recipe, force)
    predictions, speed = _predict_test(output, data)
    if json:
        print_json({"stage": "demo", "output": output, "predictions": predictions, **done})
        return
    print_report(done["metrics"])
    print_table(
        "Where things are",
        ["", ""],
        [
            ["activations (HDF5)", str(output / "activations")],
            ["neuron masks", str(output / "selection")],
            ["head", str(output / "head")],
            ["predictions", str(predictions)],
            ["speed", f"{speed:.0f} texts/s, {layers_run(done['metrics'])} layers run"],
        ],
    )
    say(f"next: echo 'not half bad' | spin predict {output / 'head'} -")
    say(f"      spin inspect {output / 'selection'}")
    say(f"      spin report {output} -o report.html")


def _predict_test(output: Path, data: Path) -> tuple[Path, float]:
    """Classify the demo's test texts, else those of train; the file written, texts per second."""
    import json as jsonlib
    import time

    from spin_cli import atomic, prediction
    from spin_cli.dataset import find_sources

    config = PredictConfig()
    predictor = prediction.open_predictor(output / "head", config)
    sources = dict(find_sources(data, config.format))
    source = sources.get("test", sources["train"])
    started = time.perf_counter()
    rows = prediction.read_input(str(source), config)
    found = [p for window in prediction.predict(predictor, rows, config) for p in window]
    speed = len(found) / (time.perf_counter() - started)
    style = Style(predictor.head.classes, config)
    lines = [jsonlib.dumps(style.record(p), ensure_ascii=False) for p in found]
    path = output / "predictions.jsonl"
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path, speed
