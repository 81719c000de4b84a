"""What tests of the command line share: small data, and spin in this process or one of its own."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

import spin_cli.cli
from spin_cli.cli import terminal

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "100"}
SPIN = [sys.executable, "-m", "spin_cli"]
MODEL = "bundled:minilm"
PATIENCE = 300
"""Seconds after which a process hangs; on a busy machine a start alone may take one minute."""
GOOD = ("great", "lovely", "superb", "delightful", "wonderful")
BAD = ("awful", "dreadful", "boring", "terrible", "horrid")
THINGS = ("film", "meal", "book", "song", "hotel", "trip")


@dataclass(frozen=True)
class Result:
    """What came of a call of spin."""

    code: int
    out: str
    err: str


Spin = Callable[..., Result]


def sentences() -> list[tuple[str, str]]:
    """60 different sentences with their labels, 30 of each class, shuffled."""
    rows = [
        (f"The {thing} was {word} today.", label)
        for thing in THINGS
        for words, label in ((GOOD, "good"), (BAD, "bad"))
        for word in words
    ]
    random.Random(1).shuffle(rows)
    return rows


def write_csv(path: Path, rows, header=("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_data(folder: Path) -> Path:
    """60 train, 20 val and 20 test rows as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sentences()
    more = [(f"I think that {text[0].lower()}{text[1:]}", label) for text, label in rows]
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "val.csv", more[:20])
    write_csv(folder / "test.csv", more[20:40])
    return folder


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def interruptible(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """Start a process that heeds SIGINT; at the end of the block it is killed if it still runs.

    One started by a shell's ``&`` ignores it, and so do its children: with `make test &` an
    interrupted spin would go on to its end, as it should, and the test of it would fail.
    """
    with subprocess.Popen(
        command, env=ENV, text=True, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def run_quietly(*args) -> str:
    """Run spin in this process, for a fixture; what it printed. It has to end well."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        code = run_here(patch, *args)
    assert code == 0, err.getvalue()
    return out.getvalue()


def run_here(patch: pytest.MonkeyPatch, *args, stdin: bytes | TextIO = b"") -> int:
    """Run spin in this process, for speed: no second import of torch."""
    patch.setattr(sys, "argv", ["spin", *map(str, args)])
    made_up = isinstance(stdin, bytes)
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)) if made_up else stdin)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGPIPE)}
    try:
        return spin_cli.cli.run()
    finally:
        terminal.verbosity = 0
        for number, handler in kept.items():
            signal.signal(number, handler)
