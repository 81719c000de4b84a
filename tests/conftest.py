"""What every test runs under, and the artifacts that many of them read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"
# The workers of xdist share the cores: more threads than cores only wait for each other. And with
# one thread everywhere, what is computed here is to the byte what child processes compute; with
# several, those forked from a process that has loaded a model would hang.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.helpers import MODEL, Result, Spin, run_here, run_quietly, write_data

Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Shared:
    """A function that gives the folder of a name, filled once for all of xdist's workers.

    Nobody may change what is in it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def get(name: str, fill: Callable[[Path], object]) -> Path:
        folder, whole = base / name, base / f"{name}.whole"
        with FileLock(base / f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                whole.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_run(shared) -> Path:
    """A folder with ``data`` and a whole ``run`` on them: blocks 0 to 2, 60 training rows."""

    def fill(folder: Path) -> None:
        write_data(folder / "data")
        run_quietly("run", folder / "data", "-m", MODEL, "-o", folder / "run", "--layers", "0-2")

    return shared("tiny", fill)


@pytest.fixture(scope="session")
def head(tiny_run) -> Path:
    return tiny_run / "run/head"


@pytest.fixture
def spin(monkeypatch, capsys) -> Spin:
    """A function that runs spin in this process."""

    def runner(*args, stdin: bytes | TextIO = b"") -> Result:
        capsys.readouterr()
        code = run_here(monkeypatch, *args, stdin=stdin)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return runner
