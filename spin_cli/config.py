"""Names and defaults of every option, each in one place.

No torch here: ``spin --help`` imports this module and must answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spin_cli.choices import (
    Bits,
    Calibration,
    ClassWeight,
    Control,
    Dtype,
    Format,
    HeadKind,
    Long,
    Metric,
    OnError,
    OutputFormat,
    Penalty,
    Pooling,
    Search,
    Side,
    Site,
    Solver,
    StorageDtype,
)
from spin_cli.ranges import COUNT, ETA, POSITIVE, SEED, SHARE, Range, ranged

SPLITS = ("train", "val", "test")
"""Split names in the order in which their rows are stored."""

DEFAULT_ETAS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
DEFAULT_ETAS_TEXT = ",".join(f"{eta:g}" for eta in DEFAULT_ETAS)
"""The same as it is typed."""
DEFAULT_MAX_LENGTH = 512
MAX_OVERLAP = 0.9
"""Windows that shared more would make a long text cost ten times its length."""
CV_FOLDS, CV_FEW_ROWS, CV_FEW_FOLDS = 5, 5_000, 3
"""Folds of a cross-validated choice, and with more rows than so many."""
CV_VAL_ROWS, CV_MAX_ROWS = 1_000, 20_000
MAX_SEPARATOR = 16
MAX_WIDTH, MAX_CLASSES = 2**20, 10_000
"""Of a matrix, and of all labels: files from elsewhere that name more are refused."""
MAX_MEMORY = 10**18
"""Bytes."""
MAX_TEXT_CHARS = 2_000_000
"""A longer text is refused: it is a file in one field, most likely a broken quote."""


SPARSE = "sparse"
"""Mark of an option that came later: manifests hold it only where it is set, so that those of older
versions, and all others, stay what they are."""
UNDECISIVE = "undecisive"
"""Mark of an option of `select` or `train` that no manifest has: it changes how the work is done,
and not what comes of it."""


@dataclass(frozen=True)
class DataConfig:
    """How text files are read."""

    text_column: str = "text"
    label_column: str = "label"
    id_column: str | None = None
    format: Format = Format.AUTO
    val_fraction: float = ranged(0.1, Range(0, below=1))
    """Share of train that becomes val where no val file is given."""
    seed: int = ranged(0, SEED)
    label_separator: str | None = field(default=None, metadata={SPARSE: True})
    """Stands between the labels of a row, of which there may be any number; None: one label."""


@dataclass(frozen=True)
class ModelConfig:
    """Which frozen model is read, and how it is run."""

    model: str
    revision: str | None = None
    dtype: Dtype = Dtype.AUTO
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    max_length: int = ranged(DEFAULT_MAX_LENGTH, POSITIVE)
    """Tokens, special tokens included; never above what the model can take."""
    truncation_side: Side = Side.RIGHT
    long: Long = Long.TRUNCATE
    overlap: float = ranged(0.25, Range(0, MAX_OVERLAP), "--window-overlap")
    """Share of a window that it has in common with the next one; for ``long=window``."""
    prompt_template: str | None = None
    """Text with one ``{text}`` in it."""
    special_tokens: bool = True
    """Add the special tokens that the tokenizer puts around every text."""
    chat: bool = False
    """Read texts as user messages of the model's own chat; becomes a ``prompt_template``."""
    system_prompt: str | None = None
    """System message before them."""
    adapter: str | None = None
    """Folder of a PEFT adapter that was trained on the model."""
    bits: Bits | None = None
    """Round the weights as they are loaded (bitsandbytes)."""
    device_map: str | None = None
    """``auto``: spread over all GPUs, main memory and disk (accelerate)."""
    batch_tokens: int | None = ranged(None, POSITIVE)
    """Tokens in one batch; None: by device."""


@dataclass(frozen=True)
class ExtractConfig:
    """Options of ``spin extract``."""

    data: DataConfig
    model: ModelConfig
    sites: tuple[Site, ...] = (Site.HIDDEN, Site.FFN)
    poolings: tuple[Pooling, ...] | None = None
    """None: mean, max, last for a decoder; mean, max, first for an encoder."""
    layers: str | None = None
    """As ``0-12`` or ``0,3,6``; None: all."""
    storage_dtype: StorageDtype | None = None
    """None: float16, unless a trial on the first texts shows that it could overflow."""


@dataclass(frozen=True)
class SelectConfig:
    """Options of ``spin select``."""

    metric: Metric | None = None
    """None: macro-F1 where the rarest class has under half of an equal share, else accuracy."""
    etas: tuple[float, ...] = ranged(DEFAULT_ETAS, ETA, "--eta")
    path_points: int = ranged(20, Range(2, 10_000))
    """Points on the path of penalties, from all-zero downwards."""
    path_ratio: float = ranged(1e-3, Range(above=0, below=1), "-s select.path_ratio")
    """The weakest penalty as a share of the one at which all weights are zero."""
    tol: float = ranged(1e-4, Range(above=0, most=1), "-s select.tol")
    """Largest KKT violation accepted, relative to the penalty at which all weights are zero."""
    max_iter: int = ranged(50, POSITIVE, "-s select.max_iter")
    solver: Solver = Solver.NEWTON
    top_k: int | None = ranged(None, POSITIVE)
    """Most neurons kept of one matrix; None: all of non-zero weight."""
    bootstrap: int = ranged(0, Range(0, 10_000))
    """Resamples of the training rows over which selection frequencies are counted."""
    control: Control = Control.NONE
    device: str = field(default="auto", metadata={UNDECISIVE: True})
    """Where probes are solved: ``auto`` takes a CUDA device if there is one, else the CPU."""
    memory_limit: int | None = ranged(None, Range(0, MAX_MEMORY), undecisive=True)
    """Bytes that matrices may take; None: the largest and a little, or as many as ``workers`` are
    asked for; streamed only what takes over half of the free memory. Decides how many are held at
    once, and which are streamed; never what is found."""
    workers: int = ranged(0, COUNT, undecisive=True)
    """Threads; 0: one per core."""
    seed: int = ranged(0, SEED)


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``spin train``."""

    metric: Metric | None = None
    """None: the one that ``select`` used."""
    sites: tuple[str, ...] = ("hidden", "ffn", "gate", "both")
    """Sites to search, by `choices.site_name`; ``both`` puts hidden and ffn side by side."""
    etas: tuple[float, ...] = ranged(DEFAULT_ETAS, ETA, "--eta")
    max_layer: int | None = ranged(None, COUNT)
    """Deepest layer allowed, counted as ``extract --layers`` does."""
    max_neurons: int | None = ranged(None, POSITIVE)
    max_cells: int = ranged(120_000_000, POSITIVE, "-s train.max_cells")
    """Training rows times neurons of the largest head tried: bounds time and memory."""
    search: Search = Search.FAST
    masks_only: bool = False
    """Only heads on selected neurons: neither blends nor stacks."""
    cv: int | None = ranged(None, COUNT)
    """Folds of the cross-validated choice; 0: val rows alone; None: `CV_FOLDS`, or for many rows
    `CV_FEW_FOLDS`, where val has under `CV_VAL_ROWS` rows and train and val together no more than
    `CV_MAX_ROWS`."""
    head: HeadKind = HeadKind.LOGISTIC
    penalty: Penalty = Penalty.L2
    class_weight: ClassWeight = ClassWeight.NONE
    refit: bool | None = None
    """Fit the chosen head to train and val together; None: where it was chosen by folds."""
    calibration: Calibration = Calibration.TEMPERATURE
    positive_label: str | None = None
    """The class that targets are about; None: the second."""
    target_precision: float | None = ranged(None, SHARE)
    target_recall: float | None = ranged(None, SHARE)
    abstain_below: float | None = ranged(None, SHARE)
    target_accuracy: float | None = ranged(None, SHARE)
    """Accuracy wanted of the answers given; the others are abstained from."""
    oof: Path | None = field(default=None, metadata={UNDECISIVE: True})
    """Where to write out-of-fold probabilities of train and val texts."""
    workers: int = ranged(0, COUNT, undecisive=True)
    seed: int = ranged(0, SEED)


@dataclass(frozen=True)
class PredictConfig:
    """Options of ``spin predict``."""

    text_column: str = "text"
    label_column: str = "label"
    id_column: str | None = None
    format: Format = Format.AUTO
    output_format: OutputFormat = OutputFormat.JSONL
    model: str | None = None
    """Where the model lies now, if not where the head says; its hash has to agree."""
    adapter: str | None = None
    """The same for its adapter."""
    device_map: str | None = None
    """``auto``: spread over all GPUs, main memory and disk."""
    trust_remote_code: bool = False
    """Run code that the model brings; this and the next are never taken from the head."""
    allow_pickle: bool = False
    """Load pickled weights too."""
    dtype: Dtype = Dtype.AUTO
    device: str = "auto"
    batch_tokens: int | None = ranged(None, POSITIVE)
    evaluate: bool = False
    label_separator: str | None = None
    """Stands between a row's labels, in and out; None: as the head was trained."""
    output: Path | None = None
    keep_columns: bool = False
    """Carry the input's columns through."""
    on_error: OnError = OnError.STOP
    threshold: float | None = ranged(None, SHARE)
    """Abstain from answers of a lower probability; None: as the head was trained."""
    decision_thresholds: Mapping[str, float] | None = None
    """Probabilities from which classes are given, see `Head.deciding_at`; None: as trained."""
    top: int | None = ranged(None, POSITIVE)
    """Show only so many classes, the likeliest."""
    explain: int = ranged(0, COUNT)
    """Neurons named as reasons for each answer."""
    explain_tokens: bool = False
    watch: str | None = None
    """Class whose probability is followed token by token; None: the last."""

    @property
    def gzipped(self) -> bool:
        """Whether the output is packed, as its name says."""
        return self.output is not None and self.output.suffix.lower() == ".gz"

    @property
    def resumable(self) -> bool:
        """Whether an interrupted output can be continued."""
        whole = (OutputFormat.PARQUET, OutputFormat.TABLE)
        return self.output_format not in whole and not self.gzipped


@dataclass(frozen=True)
class AblateConfig:
    """Options of ``spin ablate``."""

    site: str | None = None
    """Sites by `choices.site_name`; None: the head's, else all there are."""
    poolings: tuple[Pooling, ...] | None = None
    """None: the head's, else all."""
    max_layer: int | None = ranged(None, COUNT)
    """Last layer, counted as ``extract --layers`` does; None: the head's, else all."""
    etas: tuple[float, ...] = ranged(DEFAULT_ETAS, ETA, "--eta")
    draws: int = ranged(3, Range(1, 10_000))
    """Random sets of neurons for each eta."""
    rows: int = ranged(2_000, Range(10))
    """Most training rows."""
    metric: Metric | None = None
    """None: the one that `select` used."""
    seed: int = ranged(0, SEED)
    workers: int = ranged(0, COUNT)


@dataclass(frozen=True)
class ReportConfig:
    """Options of ``spin report``."""

    figures: Path | None = None
    """Folder for PNG, SVG and CSV of each figure; None: the page alone."""
    use_model: bool = True
    """Load the model: for the tokens behind a neuron, for its size and its speed."""
    model: str | None = None
    """Where the model lies now, if not where the manifest says; its hash has to agree."""
    device: str = "auto"
    trust_remote_code: bool = False
    """As in `PredictConfig`."""
    allow_pickle: bool = False


@dataclass(frozen=True)
class VerifyConfig:
    """Options of ``spin verify``."""

    rows: int = ranged(8, COUNT)
    """Random rows of activations to recompute through the model; 0: nothing is recomputed, and no
    model is loaded."""
    seed: int = ranged(0, SEED)
    model: str | None = None
    """Where the model lies now, if not where the manifest says."""
    trust_remote_code: bool = False
    """As in `PredictConfig`."""
    allow_pickle: bool = False


def decisive(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those *options* of a configuration that decide what comes of it."""
    left_out = {each.name for each in fields(kind) if UNDECISIVE in each.metadata}
    return {name: value for name, value in options.items() if name not in left_out}


Progress = Callable[[str, int, int], None]
"""Takes what is being done, how much is done, and how much there is."""


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""
