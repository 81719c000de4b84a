"""The values of options that are one of a few."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum


class Site(str, Enum):
    """Where in a block a vector is read (the field also says *hookpoint*)."""

    HIDDEN = "hidden"
    """The residual stream after the block."""
    FFN = "ffn"
    """The vector that enters the FFN's down projection (gated: ``act(gate) * up``).

    With a mixture of experts: the sum of these vectors over a token's routed experts, weighted by
    the router; shared experts are left out."""
    GATE = "gate"
    """The output of the FFN's activation function alone; without a gate the same as ``ffn``."""
    ROUTER = "router"
    """Each expert's routing weight, 0 where it was not chosen; its mean is the expert's load."""


SITE_NAMES = "hidden, ffn, gate, router, both (hidden+ffn), or others with + between"


def site_name(sites: Collection[Site]) -> str:
    """What sites that are read side by side are called: as ``hidden+gate``; ``both`` is a word."""
    name = "+".join(site.value for site in Site if site in sites)
    return "both" if name == "hidden+ffn" else name


def sites_of(name: str) -> tuple[Site, ...]:
    """The sites that `site_name` calls *name*; `ValueError` where there are none of that name."""
    parts = ("hidden+ffn" if name == "both" else name).split("+")
    return tuple(dict.fromkeys(Site(part) for part in parts))


class Pooling(str, Enum):
    """How the vectors of a text's real tokens become one."""

    MEAN = "mean"
    MAX = "max"
    LAST = "last"
    FIRST = "first"


class Dtype(str, Enum):
    """Number formats for computing."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class StorageDtype(str, Enum):
    """Number formats for stored activations."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Long(str, Enum):
    """What to do with a text of more tokens than the limit."""

    TRUNCATE = "truncate"
    WINDOW = "window"
    """Overlapping windows, pooled as one text."""
    ERROR = "error"


class Side(str, Enum):
    """Which end of a long text is cut."""

    RIGHT = "right"
    LEFT = "left"


class Bits(str, Enum):
    """Few-bit numbers that weights are rounded to when they are loaded."""

    EIGHT = "8bit"
    FOUR = "4bit"


class Metric(str, Enum):
    """Scores that a choice can be made by; higher is better for each (log loss is negated)."""

    ACCURACY = "accuracy"
    MACRO_F1 = "macro-f1"
    AUROC = "auroc"
    LOG_LOSS = "log-loss"


class Solver(str, Enum):
    """How ``select`` fits its probes."""

    NEWTON = "newton"
    """A path of penalties, each solved to its optimum (proximal Newton)."""
    REFERENCE = "reference"
    """The paper's recipe: saga, five values of C, 16 warm rounds of 4 epochs each."""


class Control(str, Enum):
    """What ``select`` is to be compared with."""

    NONE = "none"
    RANDOM = "random"
    """As many neurons of each matrix, drawn at random, go on to ``train``; a probe of these alone
    gives the control score."""
    LABELS = "labels"
    """A second probe of each matrix, for a control task (Hewitt & Liang 2019).

    They give each word type a random label. Here the input is a whole text and hardly any occurs
    twice, so each text is a type of its own: the labels are shuffled over train rows and over val
    rows. What that probe scores on val is what choosing among penalties gains by luck.
    """


class Search(str, Enum):
    """How much is tried."""

    FAST = "fast"
    FULL = "full"


class Penalty(str, Enum):
    """What keeps a head's weights small."""

    L2 = "l2"
    L1 = "l1"
    ELASTICNET = "elasticnet"
    """Half of each."""


class ClassWeight(str, Enum):
    """How much a row counts."""

    NONE = "none"
    BALANCED = "balanced"
    """Every class the same in total."""


class HeadKind(str, Enum):
    """Kinds of classifier."""

    LOGISTIC = "logistic"
    MLP = "mlp"
    """One layer of hidden units."""


class Calibration(str, Enum):
    """What is fitted to the logits on rows that the head was not trained on."""

    NONE = "none"
    TEMPERATURE = "temperature"
    """One factor."""
    PER_CLASS = "per-class"
    """One factor, and a shift for each class."""


class Format(str, Enum):
    """Text file formats."""

    AUTO = "auto"
    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    LINES = "lines"


class OutputFormat(str, Enum):
    """Formats of predictions."""

    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TABLE = "table"


class ExportFormat(str, Enum):
    """What `export` writes."""

    PT2 = "pt2"
    ONNX = "onnx"


class OnError(str, Enum):
    """What `predict` does about a row that cannot be read."""

    STOP = "stop"
    SKIP = "skip"
