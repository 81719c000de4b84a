"""``spin run`` and ``spin demo``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.cli import options as o
from spin_cli.cli.extracting import run_extract
from spin_cli.cli.parsing import listed, read_bits, read_map, read_prompt
from spin_cli.cli.selecting import run_select
from spin_cli.cli.style import Style
from spin_cli.cli.terminal import print_json, print_table, say
from spin_cli.cli.training import print_report, run_train
from spin_cli.config import (
    DEFAULT_MAX_LENGTH,
    DataConfig,
    Dtype,
    ExtractConfig,
    Format,
    ModelConfig,
    Pooling,
    PredictConfig,
    SelectConfig,
    Site,
    TrainConfig,
)
from spin_cli.errors import ArtifactError, DataError


def run(
    data: o.Data,
    model: o.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    site: o.Sites = "hidden,ffn",
    pooling: o.Poolings = None,
    layers: o.Layers = None,
    storage_dtype: o.Storage = None,
    metric: o.ChooseBy = None,
    text_column: o.TextColumn = "text",
    label_column: o.LabelColumn = "label",
    label_separator: o.LabelSeparator = None,
    id_column: o.IdColumn = None,
    format: o.FileFormat = Format.AUTO,  # noqa: A002 - the option's own name
    val_fraction: o.ValFraction = 0.1,
    seed: o.Seed = 0,
    dtype: o.ComputeDtype = Dtype.AUTO,
    device: o.Device = "auto",
    max_length: o.MaxLength = DEFAULT_MAX_LENGTH,
    adapter: o.Adapter = None,
    chat: o.Chat = False,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    load_in_8bit: o.EightBit = False,
    load_in_4bit: o.FourBit = False,
    device_map: o.DeviceMap = None,
    batch_tokens: o.BatchTokens = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Run extract, select and train, skipping stages that are up to date.

    Example: `spin run sample_data/requests -m bundled:minilm -o run`
    """
    config = ExtractConfig(
        data=DataConfig(
            text_column, label_column, id_column, format, val_fraction, seed, label_separator
        ),
        model=ModelConfig(
            model=model,
            dtype=dtype,
            device=device,
            max_length=max_length,
            batch_tokens=batch_tokens,
            adapter=None if adapter is None else str(adapter),
            bits=read_bits(load_in_8bit, load_in_4bit),
            device_map=read_map(device_map),
            **read_prompt(prompt_template, chat, system_prompt),
        ),
        sites=listed("--site", site, Site),
        poolings=None if pooling is None else listed("--pooling", pooling, Pooling),
        layers=layers,
        storage_dtype=storage_dtype,
    )
    done = run_stages(data, output, config, SelectConfig(metric=metric), TrainConfig(), force)
    if json:
        print_json({"stage": "run", "output": output, **done})
        return
    print_report(done["metrics"])
    say(f"next: spin predict {output / 'head'} texts.csv")


def run_stages(
    data: Path,
    output: Path,
    extracting: ExtractConfig,
    selecting: SelectConfig,
    training_config: TrainConfig,
    force: bool,
) -> dict[str, Any]:
    """Make what is missing or stale; what was made by the same request is left alone."""
    from spin_cli import artifacts, extraction, selection, training

    folders = {name: output / name for name in ("activations", "selection", "head")}
    ran: dict[str, str] = {}

    def stage(
        name: str, request: Callable[[], dict[str, Any]], make: Callable[[bool], Any]
    ) -> None:
        reason = _stale(folders[name], name, artifacts.to_plain(request()), force)
        ran[name] = reason or "up to date"
        say(f"{name}: {ran[name]}")
        if reason is not None:
            make(force or folders[name].exists())

    planned = extraction.plan(data, extracting)
    stage(
        "activations",
        lambda: planned.request,
        lambda again: run_extract(data, folders["activations"], extracting, again),
    )
    stage(
        "selection",
        lambda: selection.request_of(artifacts.read_manifest(folders["activations"]), selecting),
        lambda again: run_select(folders["activations"], folders["selection"], selecting, again),
    )
    stage(
        "head",
        lambda: training.request_of(artifacts.read_manifest(folders["selection"]), training_config),
        lambda again: run_train(folders["selection"], folders["head"], training_config, again),
    )
    return {"stages": ran, "metrics": artifacts.read_json(folders["head"] / "metrics.json")}


def _stale(folder: Path, kind: str, request: dict[str, Any], force: bool) -> str | None:
    """Why a stage has to run, or None."""
    from spin_cli import artifacts

    if force:
        return "made again (--force)"
    if not folder.exists():
        return "resumed" if artifacts.partial_folder(folder).exists() else "missing"
    try:
        manifest = artifacts.read_manifest(folder, kind)
    except ArtifactError as error:
        if not (folder / artifacts.MANIFEST).exists():
            raise  # something of the user's stands there: it is not ours to replace
        return f"damaged ({error.message})"
    changed = artifacts.differing_fields(manifest["request"], request)
    return f"stale: {', '.join(changed[:3])} changed" if changed else None


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "run"
    ),
    data: Annotated[Path, typer.Option("--data", help="The sample data to use.")] = Path(
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
            f"{data}: no such folder",
            "Run the demo in spin's source folder, or name a data folder with --data.",
        )
    config = ExtractConfig(DataConfig(), ModelConfig(model))
    done = run_stages(data, output, config, SelectConfig(), TrainConfig(), force)
    predictions, speed = _predict_test(output, data)
    if json:
        print_json({"stage": "demo", "output": output, "predictions": predictions, **done})
        return
    print_report(done["metrics"])
    total, depth = done["metrics"]["layers_total"], done["metrics"]["chosen"]["depth"]
    print_table(
        "Where things are",
        ["", ""],
        [
            ["activations (HDF5)", str(output / "activations")],
            ["neuron masks", str(output / "selection")],
            ["head", str(output / "head")],
            ["predictions", str(predictions)],
            ["speed", f"{speed:.0f} texts/s, {depth} of {total} layers run"],
        ],
    )
    say(f"next: echo 'not half bad' | spin predict {output / 'head'} -")
    say(f"      spin inspect {output / 'selection'}")
    say(f"      spin report {output} -o report.html")


def _predict_test(output: Path, data: Path) -> tuple[Path, float]:
    """Classify the demo's test texts; the file written and texts per second."""
    import json as jsonlib
    import time

    from spin_cli import artifacts, prediction

    config = PredictConfig()
    predictor = prediction.open_predictor(output / "head", config)
    source = next(iter(sorted(data.glob("test.*"))), None) or next(
        iter(sorted(data.glob("train.*")))
    )
    started = time.perf_counter()
    rows = prediction.read_input(str(source), config)
    found = [p for window in prediction.predict(predictor, rows, config) for p in window]
    speed = len(found) / (time.perf_counter() - started)
    style = Style(predictor.head.classes, config)
    lines = [jsonlib.dumps(style.record(p), ensure_ascii=False) for p in found]
    path = output / "predictions.jsonl"
    artifacts.write_text(path, "\n".join(lines) + "\n")
    return path, speed
