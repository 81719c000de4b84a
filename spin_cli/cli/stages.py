"""``spin extract``, ``spin select`` and ``spin train``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import (
    human_bytes,
    human_seconds,
    print_json,
    print_table,
    progress_bar,
    say,
)
from spin_cli.config import (
    DEFAULT_ETAS_TEXT,
    DEFAULT_MAX_LENGTH,
    Bits,
    Calibration,
    ClassWeight,
    Control,
    DataConfig,
    Dtype,
    ExtractConfig,
    Format,
    HeadKind,
    Long,
    ModelConfig,
    Penalty,
    Pooling,
    Search,
    SelectConfig,
    Side,
    Site,
    Solver,
    TrainConfig,
)
from spin_cli.errors import UsageError

Choice = TypeVar("Choice", bound=Enum)


def listed(option: str, text: str, kind: type[Choice]) -> tuple[Choice, ...]:
    """Members of *kind* from a comma-separated list."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    allowed = [member.value for member in kind]
    for name in names:
        if name not in allowed:
            raise UsageError(f"{option} {text}: {name!r} is none of {', '.join(allowed)}")
    if not names:
        raise UsageError(f"{option}: expected one or more of {', '.join(allowed)}")
    return tuple(kind(name) for name in dict.fromkeys(names))


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers in (0, 1] from a comma-separated list, in growing order."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"{option} {text}: expected numbers with commas between") from error
    if not values or values[0] <= 0 or values[-1] > 1:
        raise UsageError(f"{option} {text}: expected numbers above 0 and up to 1")
    return tuple(values)


def read_template(path: Path | None) -> str | None:
    """A prompt template from its file."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-template {path}: cannot be read ({error})") from error
    if text.count("{text}") != 1:
        raise UsageError(
            f"--prompt-template {path}: expected {{text}} once, found {text.count('{text}')}"
        )
    return text


def read_prompt(template: Path | None, chat: bool, system: Path | None) -> dict[str, Any]:
    """What `ModelConfig` says of the words around a text."""
    if chat and template is not None:
        raise UsageError("--chat and --prompt-template exclude each other")
    if system is None:
        return {"prompt_template": read_template(template), "chat": chat}
    if not chat:
        raise UsageError("--system-prompt belongs to --chat")
    try:
        return {"chat": True, "system_prompt": system.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--system-prompt {system}: cannot be read ({error})") from error


def read_bits(eight: bool, four: bool) -> Bits | None:
    """What ``--load-in-8bit`` and ``--load-in-4bit`` mean."""
    if eight and four:
        raise UsageError("--load-in-8bit and --load-in-4bit exclude each other")
    if eight:
        return Bits.EIGHT
    return Bits.FOUR if four else None


def read_map(name: str | None) -> str | None:
    """The value of ``--device-map``, checked."""
    if name not in (None, "auto"):
        raise UsageError(f"--device-map {name}: expected auto")
    return name


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
        data=DataConfig(text_column, label_column, id_column, format, val_fraction, seed),
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
    from spin_cli import extraction
    from spin_cli.dataset import spooled

    with spooled(data, output, format) as source:
        if dry_run:
            show_estimate(extraction.estimate(extraction.plan(source, config)), json)
            return
        show_extracted(run_extract(source, output, config, force), output, json)


def run_extract(data: Path, output: Path, config: ExtractConfig, force: bool) -> dict[str, Any]:
    """Run the stage under a progress bar; a Ctrl-C says how to go on."""
    from spin_cli import extraction

    say(f"extract: {config.model.model} reads {data}")
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
    for warning in manifest["warnings"]:
        say(f"note: {warning}")
    if counts["truncated"]:
        say(f"note: {counts['truncated']:,} of {counts['rows']:,} texts were cut to the limit")
    if counts["overflowed"]:
        say(
            f"note: {counts['overflowed']:,} values were too large for float16 and stored as its"
            " largest number; `spin inspect` shows where, --storage-dtype float32 keeps them"
        )
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


def select(
    source: Annotated[
        Path, typer.Argument(metavar="ACTIVATIONS", help="Folder of `spin extract`.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: beside it].")
    ] = None,
    metric: o.ChooseBy = None,
    eta: Annotated[
        str, typer.Option("--eta", help="Shares of the importance to list masks for.")
    ] = DEFAULT_ETAS_TEXT,
    path_points: Annotated[
        int, typer.Option("--path-points", min=2, help="Penalties tried per probe.")
    ] = SelectConfig.path_points,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Most neurons kept of a matrix.")
    ] = None,
    solver: Annotated[
        Solver, typer.Option("--solver", help="newton, or the paper's recipe for comparison.")
    ] = SelectConfig.solver,
    bootstrap: Annotated[
        int,
        typer.Option(
            "--bootstrap", min=0, help="Resamples over which each neuron's selection is counted."
        ),
    ] = SelectConfig.bootstrap,
    control: Annotated[
        Control,
        typer.Option("--control", help="Random neurons instead; or shuffled labels beside."),
    ] = SelectConfig.control,
    memory_limit: Annotated[
        float | None,
        typer.Option(
            "--memory-limit",
            min=0.0,
            help="GB that matrices may take; larger ones are streamed. Default: half of the free.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed.")] = 0,
    workers: o.Workers = 0,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Fit a probe per layer, site and pooling, and rank its neurons.

    Example: `spin select run/activations`
    """
    config = SelectConfig(
        metric=metric,
        etas=numbers("--eta", eta),
        path_points=path_points,
        solver=solver,
        top_k=top_k,
        bootstrap=bootstrap,
        control=control,
        memory_limit=None if memory_limit is None else int(memory_limit * 1e9),
        workers=workers,
        seed=seed,
    )
    output = output or source.parent / "selection"
    show_selected(run_select(source, output, config, force), output, json)


def run_select(source: Path, output: Path, config: SelectConfig, force: bool) -> dict[str, Any]:
    """Run the stage under a progress bar."""
    from spin_cli import selection

    say(f"select: probes on {source}")
    with progress_bar("select") as progress:
        return selection.select(source, output, config, force=force, progress=progress)


def show_selected(manifest: dict[str, Any], output: Path, json: bool) -> None:
    """Print the best probes and the next command."""
    if json:
        print_json(
            {
                "stage": "select",
                "output": output,
                "scores": manifest["scores"],
                "log": manifest["log"],
            }
        )
        return
    best = sorted(manifest["scores"], key=lambda row: -float(row["val_score"]))[:8]
    last = list(best[0])[-1]
    extra = [n for n in ("control", "control_score", "selectivity", "stability") if n in best[0]]
    print_table(
        f"Best of {len(manifest['scores'])} probes, by {manifest['metric']} on val",
        ["layer", "site", "pooling", manifest["metric"], *extra, "C", "neurons", "of"],
        [
            [
                row["layer"], row["site"], row["pooling"], f"{float(row['val_score']):.4f}",
                *[str(row[name]) for name in extra],
                f"{float(row['C']):.3g}", str(row[last]), str(row["width"]),
            ]
            for row in best
        ],
    )  # fmt: skip
    if unconverged := manifest["counts"]["unconverged"]:
        names = [
            f"{row['layer']} {row['site']} {row['pooling']}"
            for row in manifest["scores"]
            if str(row["converged"]) == "False"
        ]
        listed_names = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        say(f"note: {unconverged} probes stopped short of the tolerance: {listed_names}")
    say(f"next: spin train {output}")


def train(
    source: Annotated[Path, typer.Argument(metavar="SELECTION", help="Folder of `spin select`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: beside it].")
    ] = None,
    metric: o.ChooseBy = None,
    site: Annotated[
        str, typer.Option("--site", help="Sites to search: hidden, ffn, gate, both.")
    ] = "hidden,ffn,gate,both",
    eta: Annotated[str, typer.Option("--eta", help="Shares to search.")] = DEFAULT_ETAS_TEXT,
    max_layer: Annotated[
        int | None, typer.Option("--max-layer", min=0, help="Deepest layer allowed.")
    ] = None,
    max_neurons: Annotated[
        int | None, typer.Option("--max-neurons", min=1, help="Most neurons allowed.")
    ] = None,
    search: o.SearchBudget = Search.FAST,
    cv: o.Folds = None,
    head: o.KindOfHead = HeadKind.LOGISTIC,
    penalty: o.HeadPenalty = Penalty.L2,
    class_weight: o.ClassWeights = ClassWeight.NONE,
    refit: o.Refit = None,
    calibration: o.Calibrate = Calibration.TEMPERATURE,
    positive_label: o.PositiveLabel = None,
    target_precision: o.TargetPrecision = None,
    target_recall: o.TargetRecall = None,
    abstain_below: o.AbstainBelow = None,
    target_accuracy: o.TargetAccuracy = None,
    oof: o.OutOfFold = None,
    seed: Annotated[int, typer.Option("--seed", help="Deals rows out over folds.")] = 0,
    workers: o.Workers = 0,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Search for the best head on the masked neurons, on validation data.

    Few validation rows? Then train and val rows together are cross-validated, with the neurons of
    each fold selected anew. Ties go to the shallowest head. The test split is read once, after the
    choice.

    Example: `spin train run/selection`
    """
    names = tuple(part.strip() for part in site.split(","))
    if not names or set(names) - {"hidden", "ffn", "gate", "both"}:
        raise UsageError(f"--site {site}: expected some of hidden, ffn, gate, both")
    config = TrainConfig(
        metric=metric, sites=names, etas=numbers("--eta", eta), max_layer=max_layer,
        max_neurons=max_neurons, search=search, cv=cv, head=head, penalty=penalty,
        class_weight=class_weight, refit=refit, calibration=calibration,
        positive_label=positive_label, target_precision=target_precision,
        target_recall=target_recall, abstain_below=abstain_below,
        target_accuracy=target_accuracy, oof=oof, workers=workers, seed=seed,
    )  # fmt: skip
    output = output or source.parent / "head"
    show_trained(run_train(source, output, config, force), output, json)


def run_train(source: Path, output: Path, config: TrainConfig, force: bool) -> dict[str, Any]:
    """Run the stage under a progress bar."""
    from spin_cli import training

    say(f"train: searching for a head on {source}")
    with progress_bar("train") as progress:
        return training.train(source, output, config, force=force, progress=progress)


def show_trained(manifest: dict[str, Any], output: Path, json: bool) -> None:
    """Print the head beside the last-layer baseline, and the next command."""
    report = manifest["metrics"]
    if json:
        summary = {key: value for key, value in report.items() if key != "candidates"}
        print_json({"stage": "train", "output": output, "metrics": summary, "log": manifest["log"]})
        return
    print_report(report)
    say(f"next: spin predict {output} texts.csv")


def print_report(report: dict[str, Any]) -> None:
    """The tables that end `train` and `demo`."""
    for note in report["notes"]:
        say(f"note: {note}")
    print_candidates(report)
    rows = []
    for key, name in RIVALS.items():
        for split in ("val", "test"):
            if split in report.get(key, {}):
                rows.append([name, split, *score_cells(report[key][split])])
    chosen = report["chosen"]
    print_table(
        f"The chosen head ({chosen['depth']} of {report['layers_total']} layers,"
        f" {chosen['neurons']:,} neurons) and the others; 95% intervals",
        ["head", "split", "acc", "macro-F1", "AUROC", "log loss", "ECE"],
        rows,
    )
    if "comparison" in report:
        found = report["comparison"]
        name = "macro_f1" if report["metric"] == "macro-f1" else "accuracy"
        low, high = found["difference"][name]["interval"]
        say(
            f"against {RIVALS[found['against']]} on test: {name.replace('_', '-')}"
            f" {found['difference'][name]['value']:+.4f} ({low:+.4f} to {high:+.4f}),"
            f" McNemar's p {found['mcnemar_p']:.2g}"
        )
    for name, found in report.get("answered", {}).items():
        say(f"answers {found['share']:.1%} of {name} texts, {found['accuracy']:.4f} of them right")


RIVALS = {
    "last_layer": "last layer",
    "best_layer": "best layer",
    "tfidf": "TF-IDF",
    "spin": "SPIN",
}


def score_cells(scores: dict[str, Any]) -> list[str]:
    """Cells of one row of the report, with intervals where there are some."""
    cells = []
    for name in ("accuracy", "macro_f1", "auroc", "log_loss", "ece"):
        cell = f"{scores[name]:.4f}" if name in scores else "–"
        if name in scores.get("intervals", {}):
            low, high = scores["intervals"][name]
            cell += f" ({low:.3f}–{high:.3f})"
        cells.append(cell)
    return cells


def print_candidates(report: dict[str, Any]) -> None:
    """The best configurations, and what is had for less depth and fewer neurons."""
    judged = report["judged_on"]
    columns = ["site", "pooling", "eta", "depth", "neurons", "penalty", report["metric"]]

    def cells(entry: dict[str, Any]) -> list[str]:
        return [
            entry["site"], entry["pooling"], f"{entry['eta']:g}", str(entry["depth"]),
            f"{entry['neurons']:,}", f"{entry['strength']:.2g}", f"{entry['score']:.4f}",
            f"{entry['log_loss']:.4f}",
        ]  # fmt: skip

    best = [e for e in report["candidates"] if e["judged_on"] == judged["what"]]
    print_table(
        f"Best heads on {judged['rows']} {judged['what']} texts",
        [*columns, "log loss"],
        [cells(entry) for entry in best[:6]],
    )
    print_table(
        "The lowest log loss for a depth and a number of neurons",
        [*columns, "log loss"],
        [cells(entry) for entry in thinned(report["frontier"], 8)],
    )


def thinned(entries: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many of them, evenly chosen, the last one kept."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]
