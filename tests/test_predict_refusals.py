"""What `spin predict` refuses, or is refused: what is wrong, where, and one way on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spin_cli import artifacts
from spin_cli.cli.style import Style
from tests.helpers import ENV, PATIENCE, SPIN, sentences, write_csv

TEXTS = [f"{text} It is {i}." for i, (text, _) in enumerate(sentences()[:40])]
EVERYTHING = (
    "--top", "1", "--threshold", "0.8", "--explain", "3", "--explain-tokens", "--keep-columns",
    "--on-error", "skip",
)  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    rows = [(text, "good", "note") for text in TEXTS]
    rows[25] = ("", "good", "note")
    return write_csv(tmp_path / "in.csv", rows, ("text", "label", "why"))


@pytest.fixture
def head_copy(tiny_run, tmp_path) -> Path:
    """A head that may be changed."""
    return Path(shutil.copytree(tiny_run / "run/head", tmp_path / "head"))


def change_head(folder: Path, **changes: object) -> None:
    """Change a head's ``config.json`` (``reading__long`` for a field within another one)."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        inside = config[above[0]] if above else config
        inside[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    for name in ("kind", "schema", "versions", "files", "fingerprint"):
        del manifest[name]
    artifacts.write_manifest(folder, "head", manifest)


# -- going on with other options -------------------------------------------------------------


# -- one advice ------------------------------------------------------------------------------


def fail_at(monkeypatch, row: str, number: int) -> None:
    """Let the disk be full, say, when the row of this id is written."""
    record = Style.record

    def failing(self, found):
        if found.id == row:
            raise OSError(number, os.strerror(number))
        return record(self, found)

    monkeypatch.setattr(Style, "record", failing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["predict", "inspect", "--help"])
def test_a_full_disk_behind_stdout_is_a_plain_error(head, source, what, unbuffered):
    args = {"predict": [head, source, "--on-error", "skip"], "inspect": [head]}.get(what, [])
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*SPIN, what, *map(str, args)], env=ENV | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.startswith("error: stdout: No space left on device\n  ↳ Make room")
    assert done.stderr.count("\n") == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes stdout")
def test_a_closed_stdout_and_a_place_that_is_none_are_no_bugs(spin, head, source, tmp_path):
    program = "import sys; sys.stdout = None; from spin_cli.cli import run; sys.exit(run())"
    args = ["predict", str(head), str(source), "--on-error", "skip"]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], env=ENV, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    refused = spin(*args, "-o", source / "out.jsonl")
    assert refused.code == 4
    assert str(source) in refused.err
    assert "↳" in refused.err


# -- what is no input ------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "selection", "activations", "haed"])
def test_the_head_is_pointed_at_where_it_lies_beside(spin, tiny_run, part):
    done = spin("predict", tiny_run / "run" / part, "-")
    assert done.code == 4
    assert f"Give {tiny_run / 'run/head'}, which is there" in done.err
    assert "first" not in done.err


@pytest.mark.parametrize(("command", "wanted"), [("select", "activations"), ("train", "selection")])
def test_a_run_is_not_what_a_stage_reads(spin, tiny_run, command, wanted):
    done = spin(command, tiny_run / "run")
    assert done.code == 4
    assert f"Give {tiny_run / 'run' / wanted}, which is there" in done.err
