"""Options that several commands share, as types."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.choices import (
    Calibration,
    ClassWeight,
    Dtype,
    Format,
    HeadKind,
    Long,
    Metric,
    Penalty,
    Pooling,
    Search,
    Side,
    Site,
    StorageDtype,
)
from spin_cli.config import DataConfig, ModelConfig, SelectConfig, TrainConfig
from spin_cli.ranges import Range, flag_of, range_of

DECISIONS = "Decisions"
INPUT = "Input"
MODEL = "Model"
DEVICES = ("auto", "cpu", "cuda", "mps")


def offer(*names: str) -> Callable[[str], list[str]]:
    """Completion of one of *names* in the shell; other values are possible."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def offer_list(*members: Enum) -> Callable[[str], list[str]]:
    """Completion of a list with commas between."""

    def offered(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        left = [str(member.value) for member in members if member.value not in given]
        return [f"{before}{comma}{name}" for name in left if name.startswith(last)]

    return offered


def number(of: type[Any] | Range, name: str, help: str, **options: Any) -> Any:  # noqa: A002
    """An option that is a number: its range stands in ``--help`` and is checked as it is read.

    Parameters
    ----------
    of : the configuration that has a field *name*, or the range itself
    """
    span, flag = (of, flag_of(name)) if isinstance(of, Range) else range_of(of, name)

    def checked(value: Any) -> Any:
        span.check(flag, value)
        return value

    return typer.Option(flag, help=f"{help} [{span}]", callback=checked, **options)


Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help="A file, or a folder with train.* [val.*|dev.*|validation.*] [test.*]."
    ),
]
MODEL_OPTION = typer.Option(
    "--model",
    "-m",
    autocompletion=offer("bundled:minilm", "bundled:smollm2", "bundled:gemma3"),
    help="Local folder, hub id, .gguf file, bundled:minilm, bundled:smollm2 or bundled:gemma3.",
)
Model = Annotated[str, MODEL_OPTION]
RunData = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="A data file or folder; or a run's spin.toml."),
]
RunModel = Annotated[str | None, MODEL_OPTION]
RunOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the run [default: that of spin.toml]."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="SECTION.KEY=VALUE",
        help="Any other option of a stage, named as in spin.toml: -s train.head=mlp.",
    ),
]  # fmt: skip
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing artifact.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[int, number(DataConfig, "seed", help="Decides what is split off for val.")]
Workers = Annotated[
    int, number(SelectConfig, "workers", help="Fits done side by side; 0: one for each core.")
]
TextColumn = Annotated[
    str, typer.Option("--text-column", help="Column of the text.", rich_help_panel=INPUT)
]
LabelColumn = Annotated[
    str, typer.Option("--label-column", help="Column of the label.", rich_help_panel=INPUT)
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        "--label-separator",
        metavar="TEXT",
        help="A text has any number of labels, with this between, as '|'; JSON and Parquet may hold"
        " lists.",
        rich_help_panel=INPUT,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        "--id-column", help="Column of ids; else rows are numbered.", rich_help_panel=INPUT
    ),
]
FileFormat = Annotated[
    Format, typer.Option("--format", help="Format of the input.", rich_help_panel=INPUT)
]
ValFraction = Annotated[
    float,
    number(
        DataConfig, "val_fraction", help="Share of train that becomes val without a val file.",
        rich_help_panel=INPUT,
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, typer.Option("--revision", help="Revision of a hub model.", rich_help_panel=MODEL)
]
ComputeDtype = Annotated[
    Dtype, typer.Option("--dtype", help="Number type to compute in.", rich_help_panel=MODEL)
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:1, mps …", rich_help_panel=MODEL,
        autocompletion=offer(*DEVICES),
    ),
]  # fmt: skip
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that the model brings.", rich_help_panel=MODEL
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pickled weights too.", rich_help_panel=MODEL),
]
MaxLength = Annotated[
    int,
    number(ModelConfig, "max_length", help="Most tokens of a text.", rich_help_panel=MODEL),
]
TruncationSide = Annotated[
    Side, typer.Option("--truncation-side", help="Which end is cut.", rich_help_panel=MODEL)
]
LongTexts = Annotated[
    Long,
    typer.Option(
        "--long",
        help="What to do with longer texts; window: read all of it.",
        rich_help_panel=MODEL,
    ),
]
WindowOverlap = Annotated[
    float,
    number(
        ModelConfig,
        "overlap",
        help="Share of a window that the next one repeats, for --long window.",
        rich_help_panel=MODEL,
    ),
]
PromptTemplate = Annotated[
    Path | None,
    typer.Option("--prompt-template", help="File with one {text} in it.", rich_help_panel=MODEL),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="Folder of a PEFT adapter of the model.", rich_help_panel=MODEL),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Read each text as a user message in the model's own chat template.",
        rich_help_panel=MODEL,
    ),
]
SystemPrompt = Annotated[
    Path | None,
    typer.Option(
        "--system-prompt", help="File with --chat's system message.", rich_help_panel=MODEL
    ),
]
EightBit = Annotated[
    bool,
    typer.Option(
        "--load-in-8bit", help="Round weights to 8 bits (bitsandbytes).", rich_help_panel=MODEL
    ),
]
FourBit = Annotated[
    bool,
    typer.Option(
        "--load-in-4bit", help="Round weights to 4 bits (bitsandbytes).", rich_help_panel=MODEL
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="auto: over all GPUs, main memory and disk (accelerate).",
        rich_help_panel=MODEL,
    ),
]
BatchTokens = Annotated[
    int | None,
    number(
        ModelConfig,
        "batch_tokens",
        help="Most tokens in a batch, padding included.",
        rich_help_panel=MODEL,
    ),
]
Storage = Annotated[
    StorageDtype | None,
    typer.Option(
        "--storage-dtype", help="Number type on the disk; default float16 where a trial fits."
    ),
]
Sites = Annotated[
    str,
    typer.Option(
        "--site", help="Where to read: hidden, ffn, gate, router.", autocompletion=offer_list(*Site)
    ),
]
Poolings = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        help="mean, max, last, first; default mean,max,last (encoders: first instead of last).",
        autocompletion=offer_list(*Pooling),
    ),
]
Layers = Annotated[str | None, typer.Option("--layers", help="As 0-12 or 0,3,6; default all.")]
ChooseBy = Annotated[
    Metric | None,
    typer.Option(
        "--metric",
        help="What is chosen by; default accuracy, macro-f1 for labels, and where a class has under"
        " half of an equal share of the rows.",
    ),
]
SearchBudget = Annotated[
    Search, typer.Option("--search", help="How many heads are cross-validated.")
]
Folds = Annotated[
    int | None,
    number(
        TrainConfig, "cv",
        help="Folds of select and train together; 0: none; default 5 where val has few rows.",
    ),
]  # fmt: skip
HeadPenalty = Annotated[Penalty, typer.Option("--penalty", help="On the head's weights.")]
ClassWeights = Annotated[
    ClassWeight, typer.Option("--class-weight", help="balanced: every class counts the same.")
]
MasksOnly = Annotated[
    bool,
    typer.Option(
        "--masks-only", help="Only heads on the neurons of `select`: no blends, no stacks."
    ),
]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        help="Fit the chosen head to train and val together; default with --cv.",
    ),
]
Calibrate = Annotated[
    Calibration,
    typer.Option("--calibration", help="What is fitted to the logits.", rich_help_panel=DECISIONS),
]
PositiveLabel = Annotated[
    str | None,
    typer.Option(
        "--positive-label", help="The class that targets are about; default the second.",
        rich_help_panel=DECISIONS,
    ),
]  # fmt: skip
TargetPrecision = Annotated[
    float | None,
    number(
        TrainConfig, "target_precision", help="Lowest threshold of this precision.",
        rich_help_panel=DECISIONS,
    ),
]  # fmt: skip
TargetRecall = Annotated[
    float | None,
    number(
        TrainConfig, "target_recall", help="Highest threshold of this recall.",
        rich_help_panel=DECISIONS,
    ),
]  # fmt: skip
AbstainBelow = Annotated[
    float | None,
    number(
        TrainConfig, "abstain_below", help="No answer below this probability.",
        rich_help_panel=DECISIONS,
    ),
]  # fmt: skip
TargetAccuracy = Annotated[
    float | None,
    number(
        TrainConfig, "target_accuracy", help="Abstain from as few texts as this takes.",
        rich_help_panel=DECISIONS,
    ),
]  # fmt: skip
KindOfHead = Annotated[
    HeadKind,
    typer.Option("--head", help="mlp: one layer of hidden units, on the neurons chosen linearly."),
]
OutOfFold = Annotated[
    Path | None,
    typer.Option(
        "--oof", metavar="FILE",
        help="Write out-of-fold probabilities of the training texts (CSV), to find wrong labels.",
    ),
]  # fmt: skip
