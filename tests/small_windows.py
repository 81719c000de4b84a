"""An extraction of many windows, for the processes that tests kill or start by torchrun.

It imports nothing that only tests need: these processes are many, and most of their time is spent
on imports.
"""

from __future__ import annotations

import functools
from pathlib import Path
from unittest import mock

import torch

from spin_cli import backbone, extraction
from spin_cli.config import DataConfig, ExtractConfig, ModelConfig
from spin_cli.extraction import planning

CONFIG = ExtractConfig(DataConfig(), ModelConfig("bundled:minilm"), layers="0-2")


@functools.cache
def load_once() -> backbone.Backbone:
    """The model, for many runs in this process and in those that are forked from it."""
    return backbone.load(CONFIG.model)


def run(data: Path, folder: Path) -> None:
    """Extract in windows of 64 rows."""
    with mock.patch.object(planning, "WINDOW_BYTES", 2**20):
        extraction.extract(data, folder, CONFIG)


def run_loaded(data: Path, folder: Path) -> None:
    """As `run`, with the model that is in memory already."""
    model = load_once()
    with mock.patch.object(backbone, "load", lambda _: model):
        run(data, folder)


def run_side_by_side(data: Path, folder: Path) -> None:
    """As `run_loaded`, two batches at a time with one thread each: no bit is another for it."""
    torch.set_num_threads(2)
    run_loaded(data, folder)
