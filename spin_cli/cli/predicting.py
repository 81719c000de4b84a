"""``spin predict``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import print_json, print_table, progress_bar, say
from spin_cli.cli.writing import Style, partial_path, trace_record, writing, writing_lines
from spin_cli.config import Dtype, Format, OnError, OutputFormat, PredictConfig
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.ranks import Ranks, current

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.dataset import BadRow, Row
    from spin_cli.prediction import Prediction

OUTPUT, REASONS, CHECKS = "Output", "Reasons", "Checks"


def predict(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Folder of `spin train`.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A file, or - for stdin (lines).")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write [default: stdout].", rich_help_panel=OUTPUT
        ),
    ] = None,
    output_format: Annotated[
        OutputFormat,
        typer.Option("--output-format", help="Format of the predictions.", rich_help_panel=OUTPUT),
    ] = OutputFormat.JSONL,
    keep_columns: Annotated[
        bool,
        typer.Option(
            "--keep-columns", help="Carry the input's columns through.", rich_help_panel=OUTPUT
        ),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            "--top", min=1, help="Show the likeliest classes alone.", rich_help_panel=OUTPUT
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0.0,
            max=1.0,
            rich_help_panel=OUTPUT,
            help="Mark answers of a lower probability as abstained [default: as trained].",
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
        typer.Option(
            "--explain",
            min=0,
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
            help="Score every prefix of each text and tell where --threshold is first reached"
            " (causal models; JSON lines).",
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
        typer.Option(
            "--check-exit",
            min=0,
            rich_help_panel=CHECKS,
            help="Run so many rows through the whole model too, and compare.",
        ),
    ] = 0,
    text_column: o.TextColumn = "text",
    label_column: o.LabelColumn = "label",
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
    dtype: o.ComputeDtype = Dtype.AUTO,
    device: o.Device = "auto",
    batch_tokens: o.BatchTokens = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Classify texts with a head; one line per text, in the input's order, as soon as it is known.

    An interrupted output file goes on with `--resume`. Several processes share the work under
    `torchrun --nproc-per-node 2 -m spin_cli predict …`.

    Example: `echo "not half bad" | spin predict run/head -`
    """  # fmt: skip
    config = PredictConfig(
        text_column=text_column, label_column=label_column, id_column=id_column, format=format,
        output_format=output_format, model=model, dtype=dtype, device=device,
        batch_tokens=batch_tokens, evaluate=evaluate, output=output, keep_columns=keep_columns,
        on_error=on_error, threshold=threshold, top=top,
        explain=explain or (5 if explain_tokens else 0), explain_tokens=explain_tokens, watch=watch,
    )  # fmt: skip
    ranks = current()
    if stream_tokens:
        _check_trace(config, ranks, resume=resume)
    _check_output(source, config, ranks, resume=resume, force=force, json=json)
    run = _Run(head, source, config, ranks, resume=resume and output is not None)
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
        show_scores(scores, to_stderr=output is None)
    if run.errors:
        say(f"note: {run.errors:,} bad rows were skipped, first {run.first_error}")
    if output is not None:
        say(f"{count:,} predictions in {output}")


def _check_output(
    source: str, config: PredictConfig, ranks: Ranks, *, resume: bool, force: bool, json: bool
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
    if resume or force or not ranks.first:
        return
    if output.exists():
        raise ArtifactError(f"{output}: exists", "Give --force to replace it.")
    if partial_path(output).exists():
        raise ArtifactError(
            f"{partial_path(output)}: an interrupted run left it",
            "Give --resume to go on from there, or --force to begin again.",
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


class _Run:
    """One run of the command: what it reads, what it has written so far."""

    def __init__(
        self, head: Path, source: str, config: PredictConfig, ranks: Ranks, *, resume: bool
    ) -> None:
        from spin_cli import prediction
        from spin_cli.prediction import resuming

        if resume:
            resuming.check_resumable(config.output_format, config)
        self.head, self.source, self.config, self.ranks = head, source, config, ranks
        self.count, self.errors, self.first_error = 0, 0, ""
        self.resume, self.kept = resume, 0
        self.items: Iterator[Row | BadRow] = prediction.read_input(source, config)
        if ranks.size > 1 and config.device == "auto":
            config = replace(config, device=_device_of(ranks))
        self.predictor = prediction.open_predictor(head, config)
        self.tally = prediction.Evaluation(self.predictor.head)

    def all(self, check_exit: int = 0) -> tuple[int, dict[str, Any] | None]:
        """Classify everything; the number of rows, and the metrics if they are wanted."""
        if check_exit:
            self._check_exit(check_exit)
        output = self.config.output
        try:
            if self.resume:
                self._go_on()
            self._write()
        except BaseException:
            if output is not None and partial_path(output).exists() and self.ranks.first:
                say(f"stopped; {partial_path(output)} keeps what is done: go on with --resume")
            raise
        scored = self.config.evaluate and self.ranks.first
        return self.count, self.tally.result() if scored else None

    def trace(self, json: bool) -> None:
        """Write the score of every prefix of each text."""
        from spin_cli.dataset import is_live
        from spin_cli.prediction import prefixes

        crossed = 0
        with writing_lines(self.config.output) as write:
            live = is_live(self.source)
            for window in prefixes.trace(self.predictor, self.items, self.config, live=live):
                write([trace_record(found) for found in window])
                self.count += len(window)
                self.errors += sum(found.error is not None for found in window)
                crossed += sum(found.crossing is not None for found in window)
        if json:
            print_json(
                {"stage": "predict", "output": self.config.output, "rows": self.count,
                 "errors": self.errors, "crossed": crossed}
            )  # fmt: skip
        elif self.config.output is not None:
            say(f"{crossed:,} of {self.count:,} texts reach the threshold: {self.config.output}")

    def _write(self) -> None:
        config = self.config
        with progress_bar("predict") as progress:
            # A bar would run through the lines where these go to the terminal.
            step = None if config.output is None else lambda n: progress("predict", n, None)
            windows = self._windows(step)
            if not self.ranks.first:
                for _ in windows:
                    pass
                return
            head = self.predictor.head
            style = Style(head.classes, config, head.abstain_below is not None)
            with writing(config.output, style, append=self.kept > 0) as write:
                for window in windows:
                    self._count(window)  # before they are written: a wrong label stops the run
                    write(window)

    def _windows(self, step: Any) -> Iterator[list[Prediction]]:
        from spin_cli import prediction
        from spin_cli.dataset import is_live
        from spin_cli.prediction import sharing

        if self.ranks.size > 1:
            assert self.config.output is not None
            return sharing.predict_shared(
                self.predictor, self.items, self.config, self.config.output, self.ranks, step
            )
        return prediction.predict(
            self.predictor, self.items, self.config,
            live=is_live(self.source), resumed=self.kept > 0, done=step,
        )  # fmt: skip

    def _count(self, window: list[Prediction]) -> None:
        for found in window:
            self.count += 1
            if found.error is not None:
                self.errors += 1
                self.first_error = self.first_error or found.error
            elif self.config.evaluate:
                self.tally.add(found)

    def _go_on(self) -> None:
        """Keep what an interrupted run left, be it under the final name."""
        from spin_cli.prediction import resuming

        output, kind = self.config.output, self.config.output_format
        assert output is not None
        partial = partial_path(output)
        if not partial.exists():
            if not output.exists():
                return
            output.replace(partial)
        self.kept, self.items = resuming.go_on(
            partial, kind, self.items, self.predictor, self._count
        )
        say(f"resume: {self.kept:,} rows are kept")

    def _check_exit(self, rows: int) -> None:
        from spin_cli import prediction
        from spin_cli.dataset import Row

        first = list(islice(self.items, rows))
        texts = [item.text for item in first if isinstance(item, Row)]
        worst = prediction.check_exit(self.predictor, self.head, self.config, texts)
        say(f"check-exit: {len(texts)} rows agree with the whole model (to {worst:.1e})")
        self.items = chain(first, self.items)


def _device_of(ranks: Ranks) -> str:
    """The GPU of one process, where there are any."""
    import torch

    return f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else "auto"


def show_scores(scores: dict[str, Any], *, to_stderr: bool) -> None:
    """Metrics of ``--evaluate``; on stderr where predictions take stdout."""
    named = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "auroc": "AUROC",
        "log_loss": "log loss",
    }
    parts = []
    for key, name in named.items():
        if key in scores:
            low, high = scores["intervals"].get(key, (float("nan"),) * 2)
            parts.append(f"{name} {scores[key]:.4f} [{low:.4f}, {high:.4f}]")
    line = f"{scores['rows']:,} rows: {', '.join(parts)} (95% bootstrap)"
    if to_stderr:
        say(line)
        return
    names = list(scores["per_class"])
    print_table(
        line,
        ["class", "precision", "recall", "F1", "rows"],
        [
            [name, *[f"{c[key]:.4f}" for key in ("precision", "recall", "f1")], str(c["rows"])]
            for name, c in scores["per_class"].items()
        ],
    )
    print_table(
        "Confusion matrix",
        ["true \\ answer", *names],
        [
            [name, *[f"{n:,}" for n in row]]
            for name, row in zip(names, scores["confusion"], strict=True)
        ],
    )
    print_table(
        f"Reliability (expected calibration error {scores['reliability']['ece']:.4f})",
        ["probability", "rows", "stated", "right"],
        [
            [f"{b['from']:.1f} to {b['to']:.1f}", f"{b['rows']:,}", f"{b['stated']:.3f}",
             f"{b['accuracy']:.3f}"]
            for b in scores["reliability"]["bins"]
        ],
    )  # fmt: skip
