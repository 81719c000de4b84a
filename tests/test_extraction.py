"""Extraction killed, shared, out of range or verified: the same bytes, or a plain refusal."""

from __future__ import annotations

import csv
import errno
import filecmp
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spin_cli import activations, artifacts, atomic, backbone, extraction, workers
from spin_cli.activations import features_of
from spin_cli.activations.places import Place
from spin_cli.backbone import gathering
from spin_cli.backbone.batching import split
from spin_cli.choices import Long, Pooling, Site, StorageDtype
from spin_cli.config import MAX_OVERLAP, ModelConfig
from spin_cli.errors import ArtifactError, ModelError, SpinError, UsageError
from spin_cli.extraction import planning
from spin_cli.extraction.windows import settle_overflow, write_at
from spin_cli.verification import verify
from tests import small_windows
from tests.helpers import write_csv
from tests.small_windows import CONFIG

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_data" / "reviews"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The beginnings of 240 sample reviews, in one file."""
    with (SAMPLES / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [(text[:50], label) for text, label in islice(csv.reader(file), 1, 241)]
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", rows)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """The activations of an uninterrupted run in small windows."""
    folder = tmp_path_factory.mktemp("straight") / "activations"
    small_windows.run(data, folder)
    return folder


def assert_same(one: Path, other: Path):
    names = sorted(path.name for path in one.iterdir() if path.name != artifacts.LOG)
    assert names == sorted(path.name for path in other.iterdir() if path.name != artifacts.LOG)
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_no_matrix_is_filled_anew_before_it_is_written(data, straight, tmp_path, monkeypatch):
    """A disk so slow that the next window comes in before the last one is out."""
    write = activations.RowWriter.write

    def slowly(*args):
        time.sleep(0.02)
        write(*args)

    monkeypatch.setattr(activations.RowWriter, "write", slowly)
    small_windows.run_loaded(data, tmp_path / "activations")
    assert_same(straight, tmp_path / "activations")


@pytest.mark.parametrize("broken", ["write", "sync"])
def test_a_window_that_could_not_be_written_is_not_noted(data, straight, tmp_path, broken):
    folder = tmp_path / "activations"
    works, calls = getattr(activations.RowWriter, broken), itertools.count(1)
    features = len(artifacts.read_manifest(straight, "activations")["features"])
    fatal = {"write": features + features // 2, "sync": 2}[broken]  # in the second window

    def breaks(*args):
        if next(calls) == fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations.RowWriter, broken, breaks)
        with pytest.raises(SpinError, match="disk is full"):
            small_windows.run_loaded(data, folder)
    windows = np.fromfile(atomic.partial_folder(folder) / "windows.bin", np.uint8)
    assert windows.nonzero()[0].tolist() == [0]
    assert not folder.exists()
    small_windows.run_loaded(data, folder)
    assert_same(straight, folder)


def test_an_interrupt_does_not_wait_for_files_that_another_thread_makes(
    data, straight, tmp_path, monkeypatch
):
    """As on a GPU, which makes them beside the first window; some disks take minutes."""
    create, before = activations.create_layer, set(threading.enumerate())
    begun, go_on, made = threading.Event(), threading.Event(), []

    def slowly(path, *rest):
        begun.set()
        assert go_on.wait(60)
        made.append(path)
        return create(path, *rest)

    def interrupt(*_args):
        assert begun.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extraction.stage, "_storing", lambda _plan: workers.in_order(waiting=2))
        patch.setattr(extraction.partial, "FILES_AT_ONCE", 1)
        patch.setattr(activations, "create_layer", slowly)
        patch.setattr(extraction.stage, "compute_window", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small_windows.run_loaded(data, tmp_path / "activations")
        assert not made
        go_on.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
        assert len(made) == 1  # the one that was begun, none behind it
    small_windows.run_loaded(data, tmp_path / "activations")
    assert_same(straight, tmp_path / "activations")


def test_a_window_is_noted_when_all_else_of_it_is(data, tmp_path, monkeypatch):
    written = []

    def note(path, values, place):
        written.append(path.name)
        write_at(path, values, place)

    monkeypatch.setattr(extraction.partial, "write_at", note)
    small_windows.run_loaded(data, tmp_path / "activations")
    assert len(written) > 4
    for start in range(0, len(written), 4):
        assert set(written[start : start + 3]) == {"lengths.bin", "overflows.bin", "hashes.bin"}
        assert written[start + 3] == "windows.bin"


@pytest.mark.parametrize("name", ["hashes.bin", "lengths.bin", "layer_01.h5"])
def test_a_run_whose_files_are_gone_is_not_gone_on_with(data, straight, tmp_path, name):
    folder = tmp_path / "activations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.stage, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_windows.run_loaded(data, folder)
    (atomic.partial_folder(folder) / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing") as caught:
        small_windows.run_loaded(data, folder)
    assert "--force" in caught.value.hint


def test_a_disk_that_is_full_is_told_as_hdf5_words_it(tmp_path):
    """What it raises where the disk is full when it writes by itself."""
    said = "Can't flush (slist: errno = 28, error message = 'No space left on device', buf = 0x1)"
    with pytest.raises(ArtifactError, match="the disk is full"), atomic.disk_errors(tmp_path):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="anything"), atomic.disk_errors(tmp_path):
        raise RuntimeError("anything else")


def test_the_room_of_what_is_written_last_is_claimed_first(data, straight, tmp_path):
    folder = tmp_path / "activations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.stage, "work_through", lambda partial, *_: partial.make() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small_windows.run_loaded(data, folder)
    kept = (atomic.partial_folder(folder) / ".samples.tmp").stat().st_blocks * 512
    assert kept >= (straight / "samples.h5").stat().st_size
    small_windows.run_loaded(data, folder)
    assert_same(straight, folder)


# -- kills ---------------------------------------------------------------------------------------


def test_twenty_kills_at_random_moments_end_in_the_same_bytes(data, straight, tmp_path):
    # The server loads torch and the model once and forks: each run is a process of its own all the
    # same, and is at work at once. It must not compute with several threads itself: what is forked
    # behind OpenMP's back hangs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked"])
    moments, kills, last = random.Random(0), 0, 0
    folder = tmp_path / "activations"
    partial = atomic.partial_folder(folder)

    def start():
        process = context.Process(target=small_windows.run_side_by_side, args=(data, folder))
        process.start()
        return process

    def finished_windows():
        path = partial / "windows.bin"
        return int(np.fromfile(path, np.uint8).sum()) if path.exists() else 0

    while kills < 20:
        process = start()
        begun = finished_windows()
        if kills % 2:  # every other one in the middle of writing, the rest at any moment at all
            while process.is_alive() and finished_windows() == begun:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
        else:
            process.join(moments.uniform(0.02, 1.0))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster: begin anew, to be killed again
            assert_same(straight, folder)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            continue
        kills += 1
        last = max(last, finished_windows())
    assert last > 0
    if not folder.exists():
        process = start()
        process.join()
        assert process.exitcode == 0
    assert_same(straight, folder)
    assert not partial.exists()


def test_a_run_broken_off_at_its_end_computes_nothing_again(data, straight, tmp_path, monkeypatch):
    """At each change of the folder's files between the last window and the final name."""
    folder = tmp_path / "activations"
    partial = atomic.partial_folder(folder)
    steps = 0

    def stepping(change):
        def step(*args, **options):
            nonlocal steps
            steps -= not folder.exists()
            if steps == 0:
                raise KeyboardInterrupt
            return change(*args, **options)

        return step

    def attempt(breaking_at, *changes):
        nonlocal steps
        steps = breaking_at
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in changes:
                patch.setattr(owner, name, stepping(getattr(owner, name)))
            small_windows.run_loaded(data, folder)

    with pytest.raises(KeyboardInterrupt):
        attempt(1, (extraction.stage, "finish"))
    windows_done = shutil.copytree(partial, tmp_path / "kept")
    monkeypatch.setattr(extraction.stage, "compute_window", None)  # it has been done
    for breaking_at in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(windows_done, partial)
        try:
            changes = ((Path, name) for name in ("unlink", "rename", "replace"))
            attempt(breaking_at, (atomic, "write_bytes"), *changes)
        except KeyboardInterrupt:
            assert not folder.exists()
            small_windows.run_loaded(data, folder)
            assert_same(straight, folder)
        else:
            break
    assert breaking_at > 8  # the log and the manifest, each begun and named; four notes; the name
    assert_same(straight, folder)
    assert not list(tmp_path.glob(".*"))  # no lock stays


def test_batches_stored_while_the_next_are_read_give_the_same_files(
    data, straight, tmp_path, monkeypatch
):
    """What a GPU does, on the CPU: a thread stores."""
    write, threads = activations.RowWriter.write, []

    def slowly(*args):
        time.sleep(0.02)  # a block that were filled anew too early would be written so
        write(*args)

    @contextmanager
    def storing(_plan):
        with workers.in_order(waiting=2) as later:
            yield lambda task: later(lambda: (threads.append(threading.get_ident()), task()))

    monkeypatch.setattr(extraction.stage, "_storing", storing)
    monkeypatch.setattr(gathering, "STORED_AT_ONCE", ())
    monkeypatch.setattr(activations.RowWriter, "write", slowly)
    small_windows.run_loaded(data, tmp_path / "later")
    windows = artifacts.read_manifest(straight, "activations")["request"]["batching"]["window_rows"]
    assert len(threads) > 2 * (240 // windows)  # every window, and a batch or more in each
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads
    assert_same(straight, tmp_path / "later")


def test_a_second_process_is_kept_out(spin, data, tmp_path):
    with atomic.locked(tmp_path / "a.partial"):  # an open file's lock, whosever process it is
        found = spin("extract", data, "-m", "bundled:minilm", "-o", tmp_path / "a", "--layers", "0")
    assert found.code == 4
    assert "another process is writing it" in found.err
    assert "Traceback" not in found.err


# -- several processes -----------------------------------------------------------------------------


def torchrun(data, folder, *options):
    """Start two ranks; without ``--max-restarts`` in *options*, none of them dies."""
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from tests import small_windows\n"
        "data, folder, mark = map(Path, sys.argv[1:])\n"
        "if os.environ['RANK'] == '1' and not mark.exists():\n"
        "    from spin_cli.extraction import partial\n"
        "    store = partial.Partial.store\n"
        "    def once(self, *rest):\n"
        "        store(self, *rest)\n"
        "        while not any((self.folder / partial.WINDOWS).read_bytes()):  # rank 0 has some\n"
        "            time.sleep(0.01)\n"
        "        mark.write_text('died'); os.kill(os.getpid(), 9)\n"
        "    partial.Partial.store = once\n"
        "small_windows.run(data, folder)\n"
    )
    path = folder.parent / "rank.py"
    path.write_text(code)
    mark = folder.parent / "mark"
    if "--max-restarts" not in options:
        mark.write_text("nobody dies")
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--standalone", *options, path, data, folder, mark),
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    ), mark  # fmt: skip


@pytest.mark.slow  # the next test asks for more
def test_two_processes_give_the_same_bytes(data, straight, tmp_path):
    done, _ = torchrun(data, tmp_path / "activations")
    assert done.returncode == 0, done.stderr
    assert artifacts.read_json(tmp_path / "activations" / "log.json")["processes"] == 2
    assert_same(straight, tmp_path / "activations")


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_and_resumes(data, straight, tmp_path):
    done, mark = torchrun(data, tmp_path / "activations", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert mark.read_text() == "died"
    assert artifacts.read_json(tmp_path / "activations" / "log.json")["resumed_at_row"] > 0
    assert_same(straight, tmp_path / "activations")


def test_a_missing_window_is_not_published(data, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction.stage, "work_through", lambda *_: 0)
    with pytest.raises(ArtifactError, match="windows are missing, first rows 0 to"):
        extraction.extract(data, tmp_path / "a", CONFIG)
    assert not (tmp_path / "a").exists()


# -- numbers that do not fit -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """MiniLM with one neuron of block 2 beyond float16."""
    folder = tmp_path_factory.mktemp("huge")
    model = backbone.load(ModelConfig("bundled:minilm"))
    with np.errstate(all="ignore"):
        model.model.encoder.layer[1].intermediate.dense.bias.data[7] = 2e5
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_storage_is_switched_where_a_trial_overflows_float16(data, huge, tmp_path):
    config = replace(CONFIG, model=ModelConfig(str(huge)))
    planned = extraction.plan(data, config)
    assert planned.storage_dtype is StorageDtype.FLOAT32
    assert "layer_02 ffn reaches 2" in planned.notes[0]
    manifest = extraction.run(planned, tmp_path / "a")
    assert manifest["storage_dtype"] == "float32"
    assert any("float16 could overflow" in warning for warning in manifest["warnings"])
    with pytest.raises(ModelError, match="float16 ends at 65,504"):
        extraction.plan(data, replace(config, storage_dtype=StorageDtype.FLOAT16))


def test_overflow_after_the_trial_is_counted_and_never_stored_as_infinity(
    data, huge, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "_largest", lambda *_: (None, 1.0))  # a trial that saw nothing
    config = replace(CONFIG, model=ModelConfig(str(huge)))
    manifest = extraction.extract(data, tmp_path / "a", config)
    rows = manifest["counts"]["rows"]
    by_feature = {(f["layer"], f["site"]): f["overflowed"] for f in manifest["features"]}
    assert by_feature["layer_02", "ffn"] == rows
    assert by_feature["layer_01", "ffn"] == 0
    feature = next(f for f in features_of(manifest) if (f.layer, f.site) == ("layer_02", "ffn"))
    matrix = activations.read_matrix(tmp_path / "a", feature, rows, StorageDtype.FLOAT16)
    assert (matrix[:, 7] == np.float16(65504)).all()
    assert all(check.ok for check in verify(tmp_path / "a", rows=3))


def test_nan_stops_with_row_layer_and_neuron(data, straight):
    feature = features_of(artifacts.read_manifest(straight))[0]
    block = np.zeros((4, feature.width), np.float16)
    block[2, 5] = np.nan
    with pytest.raises(ModelError, match=r"row 102: layer_00 /hidden/mean neuron 5 is nan"):
        settle_overflow(block, feature, 100, StorageDtype.FLOAT16, "float32")
    block[2, 5] = np.inf
    with pytest.raises(ModelError, match="neuron 5 is inf, computed in float16"):
        settle_overflow(block, feature, 100, StorageDtype.FLOAT16, "float16")
    wide = np.full((1, feature.width), np.inf, np.float32)
    with pytest.raises(ModelError, match=f"{feature.width} such values"):
        settle_overflow(wide, feature, 0, StorageDtype.FLOAT32, "float32")


# -- verify ----------------------------------------------------------------------------------------


def test_verify_is_content_with_what_was_written(straight):
    checks = verify(straight, rows=5)
    assert all(check.ok for check in checks), checks
    assert checks[-1].what == "recomputed rows"
    assert "5 rows" in checks[-1].found


def test_a_layer_files_hash_is_that_of_its_blocks_and_of_what_is_beside_them(straight):
    """As docs/formats.md says it, and the places as h5py gives them."""
    manifest = artifacts.read_manifest(straight)
    rows, step = manifest["counts"]["rows"], manifest["request"]["batching"]["window_rows"]
    assert 1 < step < rows
    layers = {name: entry for name, entry in manifest["files"].items() if name != "samples.h5"}
    assert len(layers) > 1
    for name, entry in layers.items():
        beside = np.ones(entry["bytes"], bool)
        hashes = b""
        with h5py.File(straight / name) as file:
            for feature in manifest["features"]:
                if f"{feature['layer']}.h5" != name:
                    continue
                dataset = file[feature["site"]][feature["pooling"]]
                for start in range(0, rows, step):
                    hashes += hashlib.sha256(dataset[start : start + step].tobytes()).digest()
                row_bytes = dataset.dtype.itemsize * dataset.shape[1]
                for index in range(dataset.id.get_num_chunks()):
                    chunk = dataset.id.get_chunk_info(index)
                    held = min(dataset.chunks[0], rows - chunk.chunk_offset[0]) * row_bytes
                    beside[chunk.byte_offset : chunk.byte_offset + held] = False
        assert 0 < beside.sum() < len(beside) // 2
        whole = np.fromfile(straight / name, np.uint8)
        hashes += hashlib.sha256(whole[beside].tobytes()).digest()
        assert entry["blocks_sha256"] == hashlib.sha256(hashes).hexdigest()
        assert entry["block_rows"] == step


def test_rows_that_lie_together_are_one_piece():
    place = Place(chunk_rows=3, row_bytes=10, offsets=[100, 130, 500, 530, 400])
    assert list(place.pieces(0, 1)) == [(100, 10)]
    assert list(place.pieces(1, 7)) == [(110, 50), (500, 20)]
    assert list(place.pieces(8, 6)) == [(520, 40), (400, 20)]
    assert list(place.pieces(4, 0)) == []
    every = [
        byte for start, count in place.pieces(0, 15) for byte in range(start, start + count, 10)
    ]
    plain = [place.offsets[row // 3] + row % 3 * 10 for row in range(15)]
    assert every == plain


@pytest.mark.parametrize(
    "entry",
    [
        {"block_rows": 0}, {"block_rows": -3}, {"block_rows": True}, {"block_rows": "8"},
        {"block_rows": None}, {"block_rows": 2**70}, {"blocks_sha256": None},
        {"blocks_sha256": []}, {"blocks_sha256": "0" * 64},
    ],
    ids=str,
)  # fmt: skip
def test_verify_takes_no_word_of_a_stranger_for_blocks(straight, tmp_path, entry):
    copy = shutil.copytree(straight, tmp_path / "activations")
    manifest = artifacts.read_json(copy / "manifest.json")
    manifest["files"]["layer_01.h5"].update(entry)
    manifest["fingerprint"] = artifacts.fingerprint(manifest)
    manifest["checksum"] = artifacts.checksum(manifest)
    atomic.write_json(copy / "manifest.json", manifest)
    assert [check.what for check in verify(copy, rows=0) if check.ok is False] == ["layer_01.h5"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({}, "not in chunks of whole rows without a filter"),
        ({"chunks": (8, 4)}, "not in chunks of whole rows without a filter"),
        ({"chunks": (8, 6), "compression": "gzip"}, "not in chunks of whole rows without a filter"),
        ({"chunks": (8, 6), "shuffle": True}, "not in chunks of whole rows without a filter"),
        ({"chunks": (8, 6)}, None),
        ({"chunks": (8, 6), "maxshape": (None, 6)}, None),
    ],
)  # fmt: skip
def test_a_layer_file_of_another_program_has_the_same_hash_or_is_refused(tmp_path, made, words):
    values = np.random.default_rng(0).normal(size=(21, 6)).astype(np.float16)
    feature = activations.Feature("layer_00", Site.HIDDEN, Pooling.MEAN, 6)
    path = tmp_path / "layer_00.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("hidden/mean", data=values, **made)
    if words is not None:
        with pytest.raises(ArtifactError, match=words):
            activations.hash_layer(path, [feature], 21, StorageDtype.FLOAT16, 5)
        return
    found = activations.hash_layer(path, [feature], 21, StorageDtype.FLOAT16, 5)
    whole = path.read_bytes()
    beside = whole
    for start in range(0, 21, 8):
        rows = values[start : start + 8].tobytes()
        assert beside.count(rows) == 1
        beside = beside.replace(rows, b"")
    hashes = [activations.hash_block(values[start : start + 5]) for start in range(0, 21, 5)]
    assert found == activations.join_hashes(hashes, hashlib.sha256(beside).digest())


@pytest.mark.parametrize(
    "files", [[["layer_01.h5", {}]], ["ab"], None, 3, True, {"x" * 300: {"bytes": 1}}], ids=str
)  # fmt: skip
def test_verify_of_a_manifest_of_anything_is_an_error(spin, straight, tmp_path, files):
    copy = shutil.copytree(straight, tmp_path / "activations")
    for manifest in ({"files": files}, files):
        (copy / "manifest.json").write_text(json.dumps(manifest))
        for path in (copy, copy / "layer_01.h5"):
            found = spin("verify", path)
            assert found.code == 4
            assert "Traceback" not in found.err


def test_verify_finds_one_flipped_bit_anywhere(straight, tmp_path):
    copy = tmp_path / "activations"
    copy.mkdir()
    for path in straight.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    chance = random.Random(0)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for _ in range(12 if path.suffix == ".h5" else 60):
            place, bit = chance.randrange(len(whole)), chance.randrange(8)
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            failed = [check for check in verify(copy, rows=0) if check.ok is False]
            assert failed, f"{path.name}: bit {bit} of byte {place}"
        path.write_bytes(whole)
    assert all(check.ok for check in verify(copy, rows=0))


def test_verify_recomputes_rows_and_names_the_one_that_differs(straight, tmp_path):
    copy = tmp_path / "activations"
    copy.mkdir()
    for path in straight.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = artifacts.read_manifest(copy)
    feature = next(f for f in features_of(manifest) if f.layer == "layer_01")
    with activations.RowWriter(copy, [feature]) as writer:
        for row in range(manifest["counts"]["rows"]):
            writer.write(feature, row, np.ones((1, feature.width), np.float16))
    content = {
        k: v for k, v in manifest.items()
        if k not in ("kind", "schema", "versions", "files", "fingerprint", "checksum")
    }  # fmt: skip
    artifacts.write_manifest(copy, "activations", content)
    checks = {check.what: check for check in verify(copy, rows=3)}
    assert all(check.ok for name, check in checks.items() if name != "recomputed rows")
    assert checks["recomputed rows"].ok is False
    assert f"layer_01 {feature.dataset}" in checks["recomputed rows"].found


def test_verify_on_the_command_line(spin, straight, tmp_path):
    assert spin("verify", straight, "--rows", "0").code == 0
    nothing = spin("verify", tmp_path / "nothing")
    assert nothing.code == 4
    assert "no such folder" in nothing.err
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in straight.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-1])
    found = spin("verify", broken, "--json")
    assert found.code == 4
    assert json.loads(found.out)["ok"] is False
    assert "Traceback" not in found.err


# -- input and estimate ----------------------------------------------------------------------------


def test_stdin_gives_what_the_file_gives(spin, data, tmp_path):
    arguments = ("-m", "bundled:minilm", "--layers", "0-1", "--pooling", "mean")
    assert spin("extract", data, "-o", tmp_path / "file", *arguments).code == 0
    out, into = os.pipe()
    assert os.write(into, data.read_bytes()) == data.stat().st_size < 2**16  # a pipe holds so much
    os.close(into)
    with os.fdopen(out) as pipe:
        done = spin(
            "extract", "-", "-o", tmp_path / "pipe", *arguments, "--format", "csv", stdin=pipe
        )
    assert done.code == 0, done.err
    assert "reads stdin" in done.err
    for name in ("layer_00.h5", "layer_01.h5", "samples.h5"):
        assert filecmp.cmp(tmp_path / "file" / name, tmp_path / "pipe" / name, shallow=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_stdin_needs_a_format(spin, tmp_path):
    arguments = ("extract", "-", "-m", "bundled:minilm", "-o", tmp_path / "a")
    done = spin(*arguments, stdin=b"text,label\n")
    assert done.code == UsageError.exit_code
    assert "--format" in done.err


def test_the_dry_run_foretells_disk_and_tokens(data, straight):
    planned = extraction.plan(data, CONFIG)
    found = extraction.estimate(planned)
    manifest = artifacts.read_manifest(straight)
    disk = sum(entry["bytes"] for entry in manifest["files"].values())
    assert found["rows"] == manifest["counts"]["rows"]
    assert found["tokens"] == pytest.approx(manifest["counts"]["tokens"], rel=0.2)
    assert found["disk_bytes"] == pytest.approx(disk, rel=0.05)
    assert found["seconds"] > 0
    assert found["memory_bytes"] > 100 * 2**20


# -- windows of long texts -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundled:minilm", "bundled:smollm2"])
def test_windows_of_a_long_text_are_pooled_as_one_text(name):
    config = ModelConfig(name, max_length=24, long=Long.WINDOW, overlap=0.25)
    model = backbone.load(config, depth=2)
    texts = ["a film of many words " * 17, "short", "and another one " * 12]
    encoded = backbone.encode(model, texts)
    assert [len(item.parts) > 1 for item in encoded] == [True, False, True]
    assert not any(item.truncated for item in encoded)
    wanted = {("layer_01", Site.HIDDEN): list(Pooling), ("layer_02", Site.FFN): list(Pooling)}
    found = {}

    def store(layer, site, pooling, rows, vectors):
        for row, vector in zip(rows, vectors, strict=True):
            assert found.setdefault((layer, site, pooling, row), vector) is vector

    backbone.gather(model, encoded, wanted, store)
    for row, item in enumerate(encoded):
        kept = {key: [] for key in wanted}  # one vector for each token of the text, in order
        seen = []
        for part in item.parts or (backbone.Part(item.ids, 0, len(item.ids)),):
            assert len(part.ids) <= 24
            seen += part.ids[part.start : part.stop]

            def take(layer, site, states, part=part, kept=kept):
                kept[layer, site] += list(states[0, part.start : part.stop].clone())

            backbone.read_states(model, [part.ids], wanted, take)
        assert seen == item.ids  # every token of the text counts once
        for (layer, site), vectors in kept.items():
            stacked = np.stack([vector.numpy() for vector in vectors])
            for pooling, expected in (
                (Pooling.MEAN, stacked.mean(0)),
                (Pooling.MAX, stacked.max(0)),
                (Pooling.FIRST, stacked[0]),
                (Pooling.LAST, stacked[-1]),
            ):
                np.testing.assert_allclose(
                    found[layer, site, pooling, row], expected, rtol=2e-4, atol=2e-4
                )


@given(st.integers(1, 90), st.integers(0, 2), st.integers(0, 2), st.integers(3, 12),
       st.floats(0, MAX_OVERLAP))  # fmt: skip
def test_every_token_counts_in_one_window(extra, head, tail, room, overlap):
    ids = list(range(head + room + extra + tail))
    parts = split(ids, head, tail, room, overlap)
    assert [i for part in parts for i in part.ids[part.start : part.stop]] == ids
    assert all(len(part.ids) == head + room + tail for part in parts)


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch):
    model = backbone.load(ModelConfig("bundled:minilm"), depth=1)
    encoded = backbone.encode(model, ["one text", "two texts", "three texts", "four texts"])
    wanted = {("layer_01", Site.HIDDEN): [Pooling.MEAN]}
    plain, halved = {}, {}
    backbone.gather(model, encoded, wanted, lambda *a: plain.update(zip(a[3], a[4], strict=True)))
    read = gathering.read

    def small(model, batch, *rest, **options):  # a device with room for two texts
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        read(model, batch, *rest, **options)

    monkeypatch.setattr(gathering, "read", small)
    with pytest.warns(backbone.MemoryWarning, match="4 texts at once did not fit"):
        backbone.gather(
            model, encoded, wanted, lambda *a: halved.update(zip(a[3], a[4], strict=True))
        )
    for row, vector in plain.items():
        np.testing.assert_allclose(halved[row], vector, atol=1e-5)

    def none(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gathering, "read", none)
    with (
        pytest.warns(backbone.MemoryWarning),
        pytest.raises(ModelError, match="do not fit into the memory of cpu"),
    ):
        backbone.gather(model, encoded, wanted, lambda *_: None)
