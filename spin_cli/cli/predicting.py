"""``spin predict``."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.atomic import check_free
from spin_cli.choices import Dtype, Format, OnError, OutputFormat
from spin_cli.cli import options as o
from spin_cli.cli.parsing import decision_thresholds, read_map
from spin_cli.cli.running import Run, show_scores
from spin_cli.cli.terminal import print_json, say
from spin_cli.cli.writing import partial_path
from spin_cli.config import PredictConfig
from spin_cli.errors import ArtifactError, DataError, UsageError
from spin_cli.ranges import Range
from spin_cli.ranks import Ranks, current

OUTPUT, REASONS, CHECKS = "Output", "Reasons", "Checks"
STDOUT = ("-", "/dev/stdout")
"""Names of stdout, where no file could take their place."""


def predict(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Folder of `spin train`.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A file, or - for stdin (lines, or as --format says)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, packed if called .gz [default: stdout].",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output_format: Annotated[
        OutputFormat | None,
        typer.Option(
            "--output-format",
            help="Format of the predictions [default: as the file's name says, else jsonl].",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep_columns: Annotated[
        bool,
        typer.Option(
            "--keep-columns", help="Carry the input's columns through.", rich_help_panel=OUTPUT
        ),
    ] = False,
    top: Annotated[
        int | None,
        o.number(
            PredictConfig, "top", help="Show the likeliest classes alone.", rich_help_panel=OUTPUT
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        o.number(
            PredictConfig,
            "threshold",
            rich_help_panel=OUTPUT,
            help="Mark answers of a lower probability as abstained [default: as trained].",
        ),
    ] = None,
    decision_threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--decision-threshold",
            metavar="CLASS=PROB",
            rich_help_panel=OUTPUT,
            help="Answer CLASS from this probability on: one of two classes, or any labels"
            " (repeatable) [default: as trained].",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted output.", rich_help_panel=OUTPUT),
    ] = False,
    on_error: Annotated[
        OnError,
        typer.Option(
            "--on-error",
            rich_help_panel=o.INPUT,
            help="At a bad row stop with its line, or write an error row and go on.",
        ),
    ] = OnError.STOP,
    explain: Annotated[
        int,
        o.number(
            PredictConfig,
            "explain",
            rich_help_panel=REASONS,
            help="Name so many neurons that speak for the answer.",
        ),
    ] = 0,
    explain_tokens: Annotated[
        bool,
        typer.Option(
            "--explain-tokens",
            rich_help_panel=REASONS,
            help="Name the tokens behind these neurons too (5 neurons, if --explain is not given).",
        ),
    ] = False,
    stream_tokens: Annotated[
        bool,
        typer.Option(
            "--stream-tokens",
            rich_help_panel=REASONS,
            help="Score every prefix of each text and tell where --threshold (else that of the"
            " decision) is first reached (causal models; JSON lines).",
        ),
    ] = False,
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch",
            help="Class that --stream-tokens follows [default: the last].",
            rich_help_panel=REASONS,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            rich_help_panel=CHECKS,
            help="The input has labels: print metrics at the end.",
        ),
    ] = False,
    check_exit: Annotated[
        int,
        o.number(
            Range(0, 1_000_000),
            "check_exit",
            rich_help_panel=CHECKS,
            help="Run so many rows through the whole model too, and compare.",
        ),
    ] = 0,
    text_column: o.TextColumn = "text",
    label_column: o.LabelColumn = "label",
    label_separator: Annotated[
        str | None,
        typer.Option(
            "--label-separator",
            metavar="TEXT",
            help="Between several labels, in and out [default: as trained].",
            rich_help_panel=o.INPUT,
        ),
    ] = None,
    id_column: o.IdColumn = None,
    format: o.FileFormat = Format.AUTO,  # noqa: A002 - the option's own name
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Where the model lies now, if elsewhere.",
            rich_help_panel=o.MODEL,
        ),
    ] = None,
    adapter: o.Adapter = None,
    dtype: o.ComputeDtype = Dtype.AUTO,
    device: o.Device = "auto",
    device_map: o.DeviceMap = None,
    batch_tokens: o.BatchTokens = None,
    trust_remote_code: o.RemoteCode = False,
    allow_pickle: o.AllowPickle = False,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Classify texts with a head; one line per text, in the input's order, as soon as it is known.

    An interrupted output file goes on with `--resume`. Several processes share the work under
    `torchrun --nproc-per-node 2 -m spin_cli predict …`.

    Example: `echo "not half bad" | spin predict run/head -`
    """  # fmt: skip
    from spin_cli.dataset.formats import output_format as named_format

    output = None if str(output) in STDOUT else output
    wanted = output_format or (OutputFormat.JSONL if stream_tokens else None)
    config = PredictConfig(
        text_column=text_column, label_column=label_column, id_column=id_column, format=format,
        output_format=named_format(output, wanted), model=model, dtype=dtype, device=device,
        adapter=None if adapter is None else str(adapter), device_map=read_map(device_map),
        trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        batch_tokens=batch_tokens, evaluate=evaluate, label_separator=label_separator,
        output=output, keep_columns=keep_columns,
        on_error=on_error, threshold=threshold, top=top,
        decision_thresholds=decision_thresholds(decision_threshold or ()),
        explain=explain or (5 if explain_tokens else 0), explain_tokens=explain_tokens, watch=watch,
    )  # fmt: skip
    ranks = current()
    _check_input(head, source)
    if watch is not None and not stream_tokens:
        raise UsageError("--watch says what --stream-tokens follows: give that too")
    if stream_tokens:
        _check_trace(config, ranks, resume=resume)
    resumable = config.resumable and not stream_tokens
    _check_output(source, config, ranks, resume=resume, resumable=resumable, force=force, json=json)
    run = Run(head, source, config, ranks, resume=resume and output is not None)
    if stream_tokens:
        run.trace(json)
        return
    count, scores = run.all(check_exit)
    if not ranks.first:
        return
    if json:
        print_json(
            {"stage": "predict", "output": output, "rows": count, "errors": run.errors,
             "metrics": scores}
        )  # fmt: skip
    elif scores is not None:
        _tell_scores(head, source, scores, to_stderr=output is None)
    if run.errors:
        rows = "1 bad row was" if run.errors == 1 else f"{run.errors:,} bad rows were"
        say(f"note: {rows} skipped, first {run.first_error}")
    if output is not None:
        say(f"{count:,} predictions in {output}")


def _tell_scores(head: Path, source: str, scores: dict[str, Any], *, to_stderr: bool) -> None:
    from spin_cli.prediction import seen_split

    show_scores(scores, to_stderr=to_stderr)
    if found := scores.get("answered"):
        right = "" if found["accuracy"] is None else f", {found['accuracy']:.4f} of them right"
        say(f"answers {found['share']:.1%} of {scores['rows']:,} texts{right}")
    if seen := seen_split(head, source):
        say(f"note: {source} is the head's own {seen} data: scores of it are too good")


def _check_input(head: Path, source: str) -> None:
    """Refuse a text in place of a file; a file's name that ends as one is left to its reader."""
    from spin_cli.dataset.formats import EXTENSIONS, split_name

    # A text may be too long for a path: `Path.exists` would fail.
    if source == "-" or os.path.exists(source) or split_name(source)[1] in EXTENSIONS:  # noqa: PTH110
        return
    raise DataError(
        f"{textwrap.shorten(source, 80, placeholder=' …')}: no such file",
        f"Check the path; to classify a text: echo '…' | spin predict {head} -",
    )


def _check_output(
    source: str,
    config: PredictConfig,
    ranks: Ranks,
    *,
    resume: bool,
    resumable: bool,
    force: bool,
    json: bool,
) -> None:
    """Refuse what would mix outputs or write over something."""
    output = config.output
    if output is None:
        if json:
            raise UsageError(
                "--json prints a summary on stdout: send predictions to a file with -o"
            )
        if resume:
            raise UsageError("--resume continues a file: give -o")
        if ranks.size > 1:
            raise UsageError("several processes write to a file: give -o")
        return
    if ranks.size > 1 and (source == "-" or resume):
        raise UsageError("several processes read a file, and cannot --resume")
    if source != "-" and output.resolve() == Path(source).resolve():
        raise UsageError(f"{output}: is the input; name another file with -o")
    free = resume or force or not ranks.first
    check_free(output, force=free)
    if not free and partial_path(output).exists():
        go_on = "--resume to go on from there, or " if resumable else ""
        raise ArtifactError(
            f"{partial_path(output)}: an interrupted run left it",
            f"Give {go_on}--force to begin again.",
        )


def _check_trace(config: PredictConfig, ranks: Ranks, *, resume: bool) -> None:
    """Refuse what says nothing about prefixes."""
    clash = {
        "--evaluate": config.evaluate, "--explain": bool(config.explain), "--resume": resume,
        "--top": config.top is not None, "--keep-columns": config.keep_columns,
        "--output-format": config.output_format is not OutputFormat.JSONL,
        "torchrun": ranks.size > 1,
    }  # fmt: skip
    for option, given in clash.items():
        if given:
            raise UsageError(f"--stream-tokens and {option} do not go together")
