"""``spin run`` and ``spin status``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spin_cli.choices import Dtype, Format, Pooling, Site
from spin_cli.cli import options as o
from spin_cli.cli.extracting import run_extract, say_notes, show_estimate
from spin_cli.cli.parsing import listed, read_bits, read_map, read_prompt
from spin_cli.cli.selecting import run_select, say_doubts
from spin_cli.cli.terminal import print_json, print_table, say
from spin_cli.cli.training import print_report, run_train
from spin_cli.config import DEFAULT_MAX_LENGTH
from spin_cli.errors import ArtifactError, UsageError

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.pipeline import State
    from spin_cli.recipe import Recipe

Sections = dict[str, dict[str, Any]]


def run(
    ctx: typer.Context,
    data: o.RunData,
    model: o.RunModel = None,
    output: o.RunOutput = None,
    settings: o.Settings = None,
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
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be made and why; write nothing.")
    ] = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Run extract, select and train, skipping stages that are up to date.

    What is fresh, stale, partial or corrupt is shown first. All options are kept in RUN/spin.toml,
    and `spin run RUN/spin.toml` makes the same run again; options that are given besides change it.
    A run of another data file or model is replaced with --force alone.

    Example: `spin run sample_data/requests -m bundled:minilm -o run`
    """
    prompt = read_prompt(prompt_template, chat, system_prompt)
    asked: Sections = {
        "data": {
            "text_column": text_column, "label_column": label_column, "id_column": id_column,
            "format": format, "val_fraction": val_fraction, "seed": seed,
            "label_separator": label_separator,
        },
        "model": {
            "model": model, "dtype": dtype, "device": device, "max_length": max_length,
            "adapter": None if adapter is None else str(adapter),
            "chat": prompt["chat"], "system_prompt": prompt.get("system_prompt"),
            "prompt_template": prompt.get("prompt_template"),
            "bits": read_bits(load_in_8bit, load_in_4bit), "device_map": read_map(device_map),
            "batch_tokens": batch_tokens, "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        },
        "extract": {
            "sites": listed("--site", site, Site), "layers": layers, "storage_dtype": storage_dtype,
            "poolings": None if pooling is None else listed("--pooling", pooling, Pooling),
        },
        "select": {"metric": metric, "device": device},
    }  # fmt: skip
    sections = {
        section: {key: value for key, value in values.items() if _is_given(ctx, key)}
        for section, values in asked.items()
    }
    recipe, output = settle(data, output, sections, settings or ())
    if dry_run:
        _foresee(output, recipe, json)
        return
    done = run_stages(output, recipe, force)
    if json:
        print_json({"stage": "run", "output": output, **done})
        return
    print_report(done["metrics"])
    say(f"next: spin predict {output / 'head'} texts.csv")


PARAMETERS = {
    "sites": ("site",),
    "poolings": ("pooling",),
    "bits": ("load_in_8bit", "load_in_4bit"),
}
"""Parameters of `run` behind the options of spin.toml that have another name."""


def _is_given(ctx: typer.Context, key: str) -> bool:
    """Whether an option was typed, so that it goes before what a spin.toml says."""
    sources = [ctx.get_parameter_source(name) for name in PARAMETERS.get(key, (key,))]
    return any(source is not None and source.name != "DEFAULT" for source in sources)


def settle(
    data: Path, output: Path | None, given: Sections, settings: Iterable[str]
) -> tuple[Recipe, Path]:
    """The options of a run out of a spin.toml, if *data* is one, and the command line."""
    from spin_cli.recipe import FILE, override, read_toml, recipe_of, withhold_trust

    if str(data) == "-":
        raise UsageError("-: a run reads its data more than once", "Save them to a file first.")
    file = data / FILE if (data / FILE).is_file() else data
    from_file = file.suffix == ".toml"
    sections: Sections = {}
    if from_file:
        sections = read_toml(file)
        withhold_trust(sections, given.get("model", {}), str(file))
        output = output or file.parent
    else:
        given = {**given, "data": {"path": data, **given["data"]}}
        if "model" not in given["model"]:
            raise UsageError("Missing option '--model' / '-m'.", "As in: -m bundled:minilm")
    if output is None:
        raise UsageError("Missing option '--output' / '-o'.", "As in: -o run")
    names = dict.fromkeys([*sections, *given])
    merged = {name: sections.get(name, {}) | given.get(name, {}) for name in names}
    merged = override(merged, settings)
    return recipe_of(merged, str(file) if from_file else "the command line"), output


def _foresee(output: Path, recipe: Recipe, json: bool) -> None:
    """Show what a run would make, and what making activations would take."""
    from spin_cli import extraction, pipeline

    states = pipeline.examine(output, recipe)
    estimate = None
    if states[0].standing is not pipeline.Standing.FRESH:
        estimate = extraction.estimate(extraction.plan(recipe.data, recipe.extracting))
    if json:
        print_json({"stage": "run", "output": output, "stages": states, "estimate": estimate})
        return
    show_states(output, states)
    if estimate:
        show_estimate(estimate, json)


def show_states(output: Path, states: Sequence[State]) -> None:
    """A line for each artifact of a run."""
    rows = [[s.stage, s.standing.value, "; ".join(s.why)] for s in states]
    print_table(str(output), ["stage", "state", "why"], rows, wrapped=True)


def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read every file and compare its SHA-256 too.")
    ] = False,
    trust_remote_code: o.RemoteCode = False,
    json: o.Json = False,
) -> None:
    """Show which artifacts of a run are fresh, stale, partial, corrupt or missing, and why.

    They are compared with RUN/spin.toml (without one, with their own options), with the data and
    with the model as they are now. Ends with 0 if all are fresh, else with 4.

    Example: `spin status run`
    """
    from spin_cli import pipeline
    from spin_cli.recipe import recipe_of, withhold_trust

    sections, where = pipeline.read_sections(folder)
    allowed = ("allow_pickle", *(["trust_remote_code"] if trust_remote_code else []))
    withhold_trust(sections, allowed, where)
    states = pipeline.examine(folder, recipe_of(sections, where), checksums=checksums)
    fresh = all(state.standing is pipeline.Standing.FRESH for state in states)
    if json:
        print_json({"run": folder, "fresh": fresh, "options": where, "stages": states})
    else:
        show_states(folder, states)
        if not fresh:
            corrupt = any(state.standing is pipeline.Standing.CORRUPT for state in states)
            recipe = folder / "spin.toml" if where != str(folder) else "…"
            say(f"next: spin run {recipe}{' --force' if corrupt else ''}")
    if not fresh:
        raise typer.Exit(4)


def run_stages(output: Path, recipe: Recipe, force: bool) -> dict[str, Any]:
    """Make what is not fresh, and say what the stages' own commands would note of it.

    What was made by the same request is left alone; activations of another data set or model are
    replaced with *force* alone.
    """
    from spin_cli import artifacts, extraction, pipeline, ranks

    states = pipeline.examine(output, recipe)
    for state in states:
        if state.standing is pipeline.Standing.FOREIGN:
            raise ArtifactError(state.why[0], "Name another folder with -o.")
        say(f"{state.stage + ':':<13}{state.standing.value:<9}{'; '.join(state.why)}".rstrip())
    if states[0].standing is not pipeline.Standing.FRESH:
        # Where there are no data or no model, it is said now.
        wanted = extraction.foretell(recipe.data, recipe.extracting, False)
        if not force:
            pipeline.refuse_others(output, recipe, wanted)
    if ranks.current().first:
        pipeline.write_recipe(output, recipe)
    make: dict[str, Callable[[bool], Any]] = {
        "activations": lambda again: say_notes(
            run_extract(recipe.data, output / "activations", recipe.extracting, again)
        ),
        "selection": lambda again: say_doubts(
            run_select(output / "activations", output / "selection", recipe.selecting, again)
        ),
        "head": lambda again: run_train(
            output / "selection", output / "head", recipe.training, again
        ),
    }
    for stage in pipeline.STAGES:
        # What stands above may have changed, or turned out to be the same again.
        state = pipeline.state_of(stage, output, recipe)
        if force or state.standing is not pipeline.Standing.FRESH:
            make[stage](force or (output / stage).exists())
    return {
        "stages": {s.stage: {"was": s.standing, "why": s.why} for s in states},
        "metrics": artifacts.read_json(output / "head" / "metrics.json"),
    }
