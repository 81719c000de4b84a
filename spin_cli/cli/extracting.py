"""``spin extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli import atomic
from spin_cli.choices import Dtype, Format, Long, Pooling, Side, Site
from spin_cli.cli import options as o
from spin_cli.cli.parsing import listed, read_bits, read_map, read_prompt
from spin_cli.cli.terminal import (
    print_json,
    print_table,
    progress_bar,
    say,
)
from spin_cli.config import DEFAULT_MAX_LENGTH, DataConfig, ExtractConfig, ModelConfig
from spin_cli.units import human_bytes, human_seconds


def extract(
    data: o.Data,
    model: o.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    site: o.Sites = "hidden,ffn",
    pooling: o.Poolings = None,
    layers: o.Layers = None,
    storage_dtype: o.Storage = None,
    text_column: o.TextColumn = "text",
    label_column: o.LabelColumn = "label",
    label_separator: o.LabelSeparator = None,
    id_column: o.IdColumn = None,
    format: o.FileFormat = Format.AUTO,  # noqa: A002 - the option's own name
    val_fraction: o.ValFraction = 0.1,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    dtype: o.ComputeDtype = Dtype.AUTO,
    device: o.Device = "auto",
    max_length: o.MaxLength = DEFAULT_MAX_LENGTH,
    truncation_side: o.TruncationSide = Side.RIGHT,
    long: o.LongTexts = Long.TRUNCATE,
    window_overlap: o.WindowOverlap = ModelConfig.overlap,
    adapter: o.Adapter = None,
    chat: o.Chat = False,
    system_prompt: o.SystemPrompt = None,
    prompt_template: o.PromptTemplate = None,
    load_in_8bit: o.EightBit = False,
    load_in_4bit: o.FourBit = False,
    device_map: o.DeviceMap = None,
    batch_tokens: o.BatchTokens = None,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all and print an estimate; write nothing.")
    ] = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Write the activations of every layer to HDF5, one file per layer.

    Interrupted? The same command goes on where it was.

    Example: `spin extract sample_data/reviews -m bundled:minilm -o run/activations`
    """
    config = ExtractConfig(
        data=DataConfig(
            text_column, label_column, id_column, format, val_fraction, seed, label_separator
        ),
        model=ModelConfig(
            model=model, revision=revision, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, max_length=max_length,
            truncation_side=truncation_side, long=long, overlap=window_overlap,
            batch_tokens=batch_tokens, adapter=None if adapter is None else str(adapter),
            bits=read_bits(load_in_8bit, load_in_4bit), device_map=read_map(device_map),
            **read_prompt(prompt_template, chat, system_prompt),
        ),
        sites=listed("--site", site, Site),
        poolings=None if pooling is None else listed("--pooling", pooling, Pooling),
        layers=layers,
        storage_dtype=storage_dtype,
    )  # fmt: skip
    from spin_cli.dataset import spooled

    if not dry_run:
        atomic.check_vacant(output, force=force)  # torch takes seconds to come
    with spooled(data, output, format) as source:
        if dry_run:
            from spin_cli import extraction

            show_estimate(extraction.estimate(extraction.plan(source, config)), json)
            return
        name = "stdin" if source != data else str(data)
        show_extracted(run_extract(source, output, config, force, name), output, json)


def run_extract(
    data: Path, output: Path, config: ExtractConfig, force: bool, name: str | None = None
) -> dict[str, Any]:
    """Run the stage under a progress bar; a Ctrl-C says how to go on.

    *name*: what to call the data, where they lie in a file that nobody knows of.
    """
    say(f"extract: {config.model.model} reads {name or data}")
    from spin_cli import extraction

    begun = None if force else extraction.progress_of(atomic.partial_folder(output))
    if begun is not None:
        _, done, windows = begun
        say(f"resume: {done:,} of {windows:,} windows of rows are done")
    try:
        with progress_bar("extract") as progress:
            return extraction.extract(data, output, config, force=force, progress=progress)
    except KeyboardInterrupt:
        say(f"stopped; {output}.partial keeps what is done: the same command goes on from there")
        raise


def show_estimate(found: dict[str, Any], json: bool) -> None:
    """Print what a dry run found."""
    if json:
        print_json(found)
        return
    for note in found["notes"]:
        say(f"note: {note}")
    print_table(
        "Dry run: nothing was written",
        ["", "estimate"],
        [
            ["texts", f"{found['rows']:,}"],
            ["tokens", f"about {found['tokens']:,}"],
            ["texts that are cut", f"about {found['truncated']:,}"],
            ["matrices", f"{found['features']:,} of {found['storage_dtype'].value}"],
            ["disk", human_bytes(found["disk_bytes"])],
            ["memory", f"about {human_bytes(found['memory_bytes'])}"],
            ["time", f"about {human_seconds(found['seconds'])}"],
            *[[site, points] for site, points in found["hookpoints"].items()],
        ],
    )


def say_notes(manifest: dict[str, Any]) -> None:
    """What a user should know of activations."""
    counts = manifest["counts"]
    for warning in manifest["warnings"]:
        say(f"note: {warning}")
    if counts["truncated"]:
        say(f"note: {counts['truncated']:,} of {counts['rows']:,} texts were cut to the limit")
    if counts["overflowed"]:
        say(
            f"note: {counts['overflowed']:,} values were too large for float16 and stored as its"
            " largest number; `spin inspect` shows where, --storage-dtype float32 keeps them"
        )


def show_extracted(manifest: dict[str, Any], output: Path, json: bool) -> None:
    """Print what was extracted and the next command."""
    counts, log = manifest["counts"], manifest["log"]
    if json:
        print_json({"stage": "extract", "output": output, "counts": counts, "log": log})
        return
    from spin_cli.extraction import hookpoints

    pairs = [(feature["site"], feature["hookpoint"]) for feature in manifest["features"]]
    for name, points in hookpoints(pairs).items():
        say(f"{name} read at {points}")
    say_notes(manifest)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print_table(
        f"Activations in {output}",
        ["texts", "train", "val", "test", "tokens", "layers", "size", "texts/s"],
        [
            [
                *[f"{counts[name]:,}" for name in ("rows", "train", "val", "test", "tokens")],
                str(len({feature["layer"] for feature in manifest["features"]})),
                human_bytes(size),
                f"{log['rows_per_second']:.0f}",
            ]
        ],
    )
    say(f"next: spin select {output}")
