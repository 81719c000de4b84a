"""Tools that do the same, where they are installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scoring import Clock, score
from benchmarks.sets import Rows, read_rows
from spin_cli.backbone.resolve import locate
from spin_cli.choices import Metric
from spin_cli.config import ModelConfig

MAX_STEPS = 300
"""SetFit's contrastive steps, batches of 16 pairs: its own default takes hours on two cores."""


@cache
def has(module: str) -> bool:
    """Whether it can be imported; what an installed one lacks is said."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            print(f"left out: {module} cannot be imported ({error})", file=sys.stderr)
        return False
    return True


def setfit(
    options: ModelConfig, rows: Rows, test: Rows, metric: Metric, shots: int
) -> float | None:
    """Test score of SetFit on the same backbone; None where it is not installed or has no use.

    Its own defaults (one epoch over pairs, a logistic regression on the embeddings), but for at
    most `MAX_STEPS` steps, and only up to 128 rows per class.
    """
    location = locate(options)
    if location.gguf or shots > 128 or not has("setfit"):
        return None
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    classes = sorted({label for _, label in rows})
    table = Dataset.from_dict(
        {"text": [t for t, _ in rows], "label": [classes.index(label) for _, label in rows]}
    )
    model: Any = SetFitModel.from_pretrained(location.source)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=MAX_STEPS, batch_size=16, num_epochs=1, report_to="none",
            save_strategy="no", show_progress_bar=False,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=table).train()
    said = np.asarray(model.predict([text for text, _ in test]))
    return score(metric, np.array([classes.index(label) for _, label in test]), said)


def neurox_reading(options: ModelConfig, data: Path, folder: Path) -> float | None:
    """Seconds NeuroX takes to write the hidden states of every layer; None: not installed."""
    if not has("neurox.data.extraction.transformers_extractor"):
        return None
    from neurox.data.extraction.transformers_extractor import extract_representations

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(text.split()) for text, _ in read_rows(data)) + "\n")
    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()):
        extract_representations(
            locate(options).source, str(corpus), str(folder / "neurox.json"), device="cpu"
        )
    return clock.seconds


def neurox_probe(X: np.ndarray, y: np.ndarray) -> float | None:
    """Seconds of NeuroX's elastic-net probe, its defaults; None: not installed."""
    if not has("neurox.interpretation.linear_probe"):
        return None
    from neurox.interpretation.linear_probe import train_logistic_regression_probe

    clock = Clock()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_logistic_regression_probe(X, y, lambda_l1=1e-5, lambda_l2=1e-5)
    return clock.seconds
