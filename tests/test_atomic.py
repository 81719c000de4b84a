"""Folders that are whole under their final name, whoever else is at work and whatever fails."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spin_cli import artifacts, atomic
from spin_cli.cli import terminal
from spin_cli.errors import ArtifactError
from spin_cli.fields import MANIFEST

STEPS = ((atomic, "sync"), (Path, "rename"), (Path, "unlink"), (atomic.shutil, "rmtree"))
"""What changes the disk when a folder gets its final name."""


def build(folder, who, *, force=False):
    with atomic.building(folder, force=force) as partial:
        for name in ("first", "second", MANIFEST):
            (partial / name).write_text(who)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def whole(who):
    return dict.fromkeys(("first", "second", MANIFEST), who)


def hook(patch, before):
    """Have *before* called ahead of every step."""
    for owner, name in STEPS:
        step = getattr(owner, name)

        def stepping(*args, step=step, **options):
            before()
            return step(*args, **options)

        patch.setattr(owner, name, stepping)


@pytest.mark.parametrize("force", [False, True])
def test_a_second_run_is_kept_out_until_the_first_one_is_done(tmp_path, monkeypatch, force):
    folder, refused, inside = tmp_path / "head", [], []
    if force:
        build(folder, "old")

    def intrude():
        if not inside:
            inside.append(True)
            with pytest.raises(ArtifactError) as caught:
                build(folder, "B", force=True)
            refused.append(caught.value.message)
            inside.clear()

    hook(monkeypatch, intrude)
    build(folder, "A", force=force)
    monkeypatch.undo()
    # Each file and two folders are synced, one or two are renamed; the lock goes after all that.
    assert len(refused) >= 8
    assert all("another process is writing it" in message for message in refused)
    assert content(folder) == whole("A")
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_one_that_waited_at_the_lock_of_another_finds_its_artifact(tmp_path, monkeypatch):
    """It has opened the lock file that the other one removes before it is locked."""
    folder, lock = tmp_path / "head", atomic.fcntl.flock

    def late(*args):
        monkeypatch.undo()
        # What the other one does at its end: the artifact is there, and its lock file is not.
        folder.mkdir()
        (folder / MANIFEST).write_text("A")
        (tmp_path / ".head.partial.lock").unlink()
        return lock(*args)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    with pytest.raises(ArtifactError, match="already holds a complete artifact"):
        build(folder, "B")
    assert content(folder) == {MANIFEST: "A"}
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_the_lock_file_of_a_killed_run_keeps_nobody_out_and_goes(tmp_path):
    (tmp_path / ".head.partial.lock").touch()
    build(tmp_path / "head", "A")
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize("failing", [1, 2])
def test_where_the_new_one_cannot_be_renamed_the_old_one_stays(tmp_path, monkeypatch, failing):
    folder, rename, calls = tmp_path / "head", Path.rename, []
    build(folder, "old")

    def breaks(path, target):
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", breaks)
    with pytest.raises(ArtifactError, match="the disk is full") as caught:
        build(folder, "new", force=True)
    assert "nothing was left" not in caught.value.message
    assert content(folder) == whole("old")
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests import test_atomic
left = int(sys.argv[2])
def count():
    global left
    left -= 1
    if left < 0:
        os._exit(9)
with pytest.MonkeyPatch.context() as patch:
    test_atomic.hook(patch, count)
    test_atomic.build(Path(sys.argv[1]), "new", force=True)
"""


def test_killed_at_any_step_the_old_or_the_new_one_is_whole(tmp_path):
    for step in range(50):
        folder = tmp_path / str(step) / "head"
        build(folder, "old")
        command = [sys.executable, "-c", KILLED, folder, str(step)]
        code = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False).returncode
        if code == 0:
            break
        assert code == 9
        seen = folder if folder.exists() else folder.with_name("head.old")
        assert content(seen) in (whole("old"), whole("new"))
        build(folder, "next", force=True)
        assert content(folder) == whole("next")
        assert [path.name for path in folder.parent.iterdir()] == ["head"]
    assert step > 8
    assert content(folder) == whole("new")
    assert [path.name for path in folder.parent.iterdir()] == ["head"]


def test_the_old_one_of_a_killed_run_is_kept_until_there_is_another(tmp_path, monkeypatch):
    """A kill between the two renames leaves the only whole one as NAME.old."""
    folder = tmp_path / "head"
    build(folder, "old")
    folder.rename(tmp_path / "head.old")
    rename = Path.rename

    def breaks(path, target):
        if path.name == "head.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", breaks)
    with pytest.raises(OSError, match="Input/output"):
        build(folder, "new")
    assert content(folder) == whole("old")


def test_what_is_no_number_is_null_in_json(tmp_path, capsys):
    value = {"a": float("nan"), "b": [1.5, np.float64("inf"), (-np.inf,)]}
    plain = {"a": None, "b": [1.5, None, [None]]}
    atomic.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == plain
    terminal.print_json(value)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == plain
    assert artifacts.read_json(tmp_path / "a.json") == plain
    for word in ("NaN", "Infinity", "-Infinity"):
        (tmp_path / "b.json").write_text(f'{{"a": [{word}]}}')
        assert artifacts.read_json(tmp_path / "b.json") == {"a": [None]}
        with pytest.raises(ArtifactError, match=f"not valid JSON .{word}"):
            artifacts.read_json(tmp_path / "b.json", strict=True)
