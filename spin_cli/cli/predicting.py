"""``spin predict``."""

from __future__ import annotations

import csv
import json as jsonlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import print_json, print_table, progress_bar, say
from spin_cli.config import Dtype, Format, OutputFormat, PredictConfig
from spin_cli.errors import ArtifactError, UsageError

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.dataset import Row
    from spin_cli.prediction import Predictor

Write = Callable[[dict[str, Any]], None]


def predict(
    head: Annotated[Path, typer.Argument(metavar="HEAD", help="Folder of `spin train`.")],
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A file, or - for stdin (lines).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [default: stdout].")
    ] = None,
    output_format: Annotated[
        OutputFormat, typer.Option("--output-format", help="Format of the predictions.")
    ] = OutputFormat.JSONL,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="The input has labels: print metrics at the end.")
    ] = False,
    text_column: o.TextColumn = "text",
    label_column: o.LabelColumn = "label",
    id_column: o.IdColumn = None,
    format: o.FileFormat = Format.AUTO,  # noqa: A002 - the option's own name
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now, if elsewhere.")
    ] = None,
    dtype: o.ComputeDtype = Dtype.AUTO,
    device: o.Device = "auto",
    batch_tokens: o.BatchTokens = None,
    force: o.Force = False,
    json: o.Json = False,
) -> None:
    """Classify texts with a head; one line per text, in the input's order, as soon as it is known.

    Example: `echo "not half bad" | spin predict run/head -`
    """
    from spin_cli import prediction

    config = PredictConfig(
        text_column=text_column, label_column=label_column, id_column=id_column, format=format,
        output_format=output_format, model=model, dtype=dtype, device=device,
        batch_tokens=batch_tokens, evaluate=evaluate, output=output,
    )  # fmt: skip
    _check_output(source, output, force=force, json=json)
    rows = prediction.read_input(source, config)
    predictor = prediction.open_predictor(head, config)
    count, scores = _stream(predictor, rows, config)
    if json:
        print_json({"stage": "predict", "output": output, "rows": count, "metrics": scores})
    elif scores is not None:
        _show_scores(scores, to_stderr=output is None)
    if output is not None:
        say(f"{count:,} predictions in {output}")


def _check_output(source: str, output: Path | None, *, force: bool, json: bool) -> None:
    """Refuse what would mix outputs or write over something."""
    if output is None:
        if json:
            raise UsageError(
                "--json prints a summary on stdout: send predictions to a file with -o"
            )
        return
    if source != "-" and output.resolve() == Path(source).resolve():
        raise UsageError(f"{output}: is the input; name another file with -o")
    if output.exists() and not force:
        raise ArtifactError(f"{output}: exists", "Give --force to replace it.")


def _stream(
    predictor: Predictor, rows: Iterator[Row], config: PredictConfig
) -> tuple[int, dict[str, Any] | None]:
    """Write each prediction as it comes; how many there were, and the metrics if asked for."""
    from spin_cli import prediction

    tally, count = prediction.Evaluation(predictor.head), 0
    with (
        writing(config.output, config.output_format, predictor.head.classes) as write,
        progress_bar("predict") as progress,
    ):
        # A bar would run through the lines where these go to the terminal.
        step = None if config.output is None else lambda n: progress("predict", n, None)
        for row, found in prediction.predict(predictor, rows, step):
            write(asdict(found))
            count += 1
            if config.evaluate:
                tally.add(row, found)
    return count, tally.result() if config.evaluate else None


@contextmanager
def writing(path: Path | None, kind: OutputFormat, classes: tuple[str, ...]) -> Iterator[Write]:
    """Yield a function that writes one prediction; a file appears only when it is whole."""
    if path is None:
        if kind is OutputFormat.PARQUET:
            raise UsageError("--output-format parquet needs a file: give -o")
        yield _writer(sys.stdout, kind, classes)
        return
    from spin_cli.artifacts import disk_errors

    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if kind is OutputFormat.PARQUET:
                with _parquet_writer(temporary, classes) as write:
                    yield write
            else:
                with temporary.open("w", encoding="utf-8", newline="") as file:
                    yield _writer(file, kind, classes)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """A prediction as one row of a table: a column for each class."""
    rest = {key: value for key, value in found.items() if key != "probs"}
    return rest | {f"prob_{name}": p for name, p in found["probs"].items()}


def _writer(file: Any, kind: OutputFormat, classes: tuple[str, ...]) -> Write:
    if kind is OutputFormat.JSONL:

        def write_line(found: dict[str, Any]) -> None:
            file.write(jsonlib.dumps(found, ensure_ascii=False) + "\n")
            file.flush()

        return write_line
    names = ["id", "label", "prob", "truncated", *[f"prob_{name}" for name in classes]]
    table = csv.DictWriter(
        file, names, delimiter="\t" if kind is OutputFormat.TSV else ",", lineterminator="\n"
    )
    table.writeheader()

    def write_row(found: dict[str, Any]) -> None:
        table.writerow(_flat(found))
        file.flush()

    return write_row


@contextmanager
def _parquet_writer(path: Path, classes: tuple[str, ...]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(
            "--output-format parquet: pyarrow is not installed", "pip install 'spin-cli[parquet]'"
        ) from error
    schema = pa.schema(
        [("id", pa.string()), ("label", pa.string()), ("prob", pa.float64()),
         ("truncated", pa.bool_()), *[(f"prob_{name}", pa.float64()) for name in classes]]
    )  # fmt: skip
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:

        def write(found: dict[str, Any]) -> None:
            waiting.append(_flat(found))
            if len(waiting) >= 10_000:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(waiting, schema))


def _show_scores(scores: dict[str, Any], *, to_stderr: bool) -> None:
    """Metrics of ``--evaluate``; on stderr where predictions take stdout."""
    if to_stderr:
        auroc = f", AUROC {scores['auroc']:.4f}" if "auroc" in scores else ""
        say(
            f"{scores['rows']:,} rows: accuracy {scores['accuracy']:.4f}, macro-F1"
            f" {scores['macro_f1']:.4f}{auroc}, log loss {scores['log_loss']:.4f}"
        )
        return
    print_table(
        f"accuracy {scores['accuracy']:.4f}, macro-F1 {scores['macro_f1']:.4f}",
        ["class", "precision", "recall", "F1", "rows"],
        [
            [name, *[f"{c[key]:.4f}" for key in ("precision", "recall", "f1")], str(c["rows"])]
            for name, c in scores["per_class"].items()
        ],
    )
