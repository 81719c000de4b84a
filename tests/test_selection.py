"""`spin select`: rows, memory, processes and controls, on real activations."""

from __future__ import annotations

import csv
import filecmp
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spin_cli import artifacts, extraction, mask, metrics, probe, selection
from spin_cli.choices import Control, Metric, Pooling, Solver
from spin_cli.config import DataConfig, ExtractConfig, ModelConfig, SelectConfig
from spin_cli.errors import ModelError, UsageError
from tests.helpers import PATIENCE
from tests.test_probe import alike

SAMPLES = Path(__file__).parents[1] / "sample_data"
SCORE = metrics.score_function(Metric.ACCURACY)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Activations of two layers, mean-pooled: three matrices of 384, 384 and 1,536 columns."""
    folder = tmp_path_factory.mktemp("select")
    (folder / "data").mkdir()
    for name, rows in (("train", 120), ("val", 60)):
        lines = (SAMPLES / "reviews" / f"{name}.csv").read_text().splitlines(keepends=True)
        (folder / "data" / f"{name}.csv").write_text("".join(lines[: rows + 1]))
    config = ExtractConfig(
        DataConfig(), ModelConfig("bundled:minilm"), layers="0-1", poolings=(Pooling.MEAN,)
    )
    extraction.extract(folder / "data", folder / "activations", config)
    return folder / "activations"


@pytest.fixture(scope="module")
def plain(source):
    """The selection with defaults, by one thread."""
    selection.select(source, source.parent / "plain", SelectConfig(workers=1))
    return source.parent / "plain"


@pytest.fixture
def out(source, tmp_path):
    """A folder beside the plain selection, so that the way to the activations is the same."""
    return source.parent / f"{tmp_path.name}_out"


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir() if path.name != artifacts.LOG)
    assert names == sorted(path.name for path in other.iterdir() if path.name != artifacts.LOG)
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def groups(folder):
    with h5py.File(folder / selection.MASKS) as file:
        return {
            name: {key: file[name][key][:] for key in file[name]} | dict(file[name].attrs)
            for name in ("layer_00/hidden/mean", "layer_01/hidden/mean", "layer_01/ffn/mean")
        }


@pytest.mark.parametrize(
    "config",
    [
        SelectConfig(workers=2),
        SelectConfig(workers=2, memory_limit=600_000),  # the two small matrices would fit in turn
        SelectConfig(workers=1, memory_limit=0),
    ],
)
def test_threads_and_memory_do_not_change_a_byte(source, plain, out, config):
    selection.select(source, out, config)
    assert_same(plain, out)


def test_a_device_of_torch_finds_the_same(source, plain, out, monkeypatch):
    """What a GPU does, on torch's CPU device: rows are read in blocks, straight from the disk."""
    monkeypatch.setattr(selection.stage.placing, "choose", lambda _: torch.device("cpu"))
    monkeypatch.setattr(selection.stage, "_read", None)
    manifest = selection.select(source, out, SelectConfig())
    assert manifest["counts"] == {"probes": 3, "unconverged": 0}
    assert manifest["device"] == "cpu"
    wanted = artifacts.read_manifest(plain)["request"]
    assert manifest["request"] == wanted  # a selection is not stale because of where it was made
    for name, found in groups(out).items():
        expected = groups(plain)[name]
        assert abs(found["val_score"] - expected["val_score"]) <= 2 / 60
        if found["C"] == pytest.approx(expected["C"], rel=1e-5):
            np.testing.assert_array_equal(found["neurons"][:5], expected["neurons"][:5])


def test_where_probes_are_solved(monkeypatch):
    from spin_cli.selection import placing

    monkeypatch.setattr(placing, "DRIVER", "libof-no-such-driver.so")
    assert placing.choose(SelectConfig()) is None
    assert placing.choose(SelectConfig(device="cpu")) is None
    with pytest.raises(UsageError, match="reference"):
        placing.choose(SelectConfig(device="cuda", solver=Solver.REFERENCE))
    with pytest.raises(ModelError, match="--device nonsense"):
        placing.choose(SelectConfig(device="nonsense"))


def test_large_matrices_are_solved_one_by_one_unless_asked_otherwise(monkeypatch):
    from spin_cli.activations import Feature
    from spin_cli.choices import Site
    from spin_cli.selection import memory

    monkeypatch.setattr(os, "sysconf", lambda name: 2**20 if name == "SC_AVPHYS_PAGES" else 2**16)
    feature = Feature("layer_01", Site.FFN, Pooling.MEAN, 1000)
    for rows, workers, expected in ((1000, 0, 4), (300_000, 0, 1), (300_000, 4, 4)):
        config = SelectConfig(workers=workers)
        monkeypatch.setattr(memory, "worker_count", lambda wanted: wanted or 4)
        assert memory.plan([feature], rows, config, 1) == (expected, frozenset())


def test_memory_comes_before_threads():
    from spin_cli.activations import Feature
    from spin_cli.choices import Site
    from spin_cli.selection import memory

    small = Feature("layer_01", Site.HIDDEN, Pooling.MEAN, 100)
    large = Feature("layer_01", Site.FFN, Pooling.MEAN, 400)
    one = memory.need(large, 1000)
    for limit, expected in (
        (4 * one, (4, set())),
        (2 * one + 1, (2, set())),
        (one, (1, set())),
        (one - 1, (3, {large})),
        (0, (1, {small, large})),
    ):
        config = SelectConfig(workers=4, memory_limit=limit)
        threads, streamed = memory.plan([small, large], 1000, config, 1)
        assert (threads, set(streamed)) == expected


@pytest.mark.parametrize("large", [False, True])
def test_a_streamed_probe_holds_no_matrix(large, monkeypatch):
    """Blocks of rows are all that is ever asked for, and none is large."""
    monkeypatch.setattr("spin_cli.probe.ranking.LARGE_MATRIX", 0 if large else 2**62)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40_000, 200)).astype(np.float16)
    y = (X[:, 0] + rng.normal(size=len(X)) > 0).astype(int)
    asked = []

    def read(rows):
        asked.append(rows.stop - rows.start)
        return X[rows]

    lazy = probe.Blocks(read, X.shape, X.dtype)
    rows = np.arange(36_000), np.arange(36_000, 40_000)
    config = SelectConfig(path_points=4, path_ratio=0.3)
    options = {"score": SCORE, "config": config}
    found = probe.rank_neurons(lazy, y, *rows, 2, stream=True, **options)
    held = probe.rank_neurons(X, y, *rows, 2, **options)
    assert max(asked) * 200 * 8 <= 4 * 2**20
    np.testing.assert_array_equal(found.neurons, held.neurons)
    np.testing.assert_array_equal(found.coef, held.coef)
    assert found.neurons[0] == 0


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("rest", [0, 1, 2, 5, 8, 63, 64])
def test_streaming_changes_no_bit_of_a_large_matrix(rest, n_classes, monkeypatch):
    """However many rows are left for the last block: BLAS has its own ways with a few."""
    monkeypatch.setattr("spin_cli.probe.ranking.LARGE_MATRIX", 0)
    rng = np.random.default_rng(rest)
    n = 2 * probe.blocks.PANEL + rest
    X = rng.normal(size=(n + 200, 40)).astype(np.float16)
    y = (X[:, :n_classes] + rng.gumbel(size=(n + 200, n_classes))).argmax(1)
    rows = np.arange(n), np.arange(n, n + 200)
    held, streamed = (
        probe.rank_neurons(
            X, y, *rows, n_classes, score=SCORE, config=SelectConfig(), stream=stream
        )
        for stream in (False, True)
    )
    for name in ("C", "kkt", "val_score", "neurons", "importance", "coef", "intercept"):
        np.testing.assert_array_equal(getattr(held, name), getattr(streamed, name))


@pytest.mark.parametrize("stream", [False, True])
def test_scattered_rows_are_the_same_as_a_matrix_of_them(stream):
    """What a fold of cross-validation asks for."""
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(300, 30)) * 3 + 1).astype(np.float16)
    y = (X[:, :3].sum(1) + rng.normal(size=300) > 3).astype(int)
    order = rng.permutation(300)
    train, val = order[:200], order[200:280]
    options = {"score": SCORE, "config": SelectConfig(bootstrap=2)}
    found = probe.rank_neurons(X, y, train, val, 2, stream=stream, **options)
    alone = probe.rank_neurons(
        X[np.r_[train, val]], y[np.r_[train, val]], np.arange(200), np.arange(200, 280), 2,
        **options,
    )  # fmt: skip
    for name in ("neurons", "importance", "coef", "intercept", "frequency"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
    assert found.val_score == alone.val_score


def test_top_k_keeps_the_front_of_the_ordering(source, plain, tmp_path):
    selection.select(source, tmp_path / "out", SelectConfig(top_k=5))
    for whole, cut in zip(groups(plain).values(), groups(tmp_path / "out").values(), strict=True):
        assert len(cut["neurons"]) == 5 < len(whole["neurons"])
        for name in ("neurons", "importance", "cumulative"):
            np.testing.assert_array_equal(cut[name], whole[name][:5])
        np.testing.assert_array_equal(cut["class_importance"], whole["class_importance"][:, :5])
        np.testing.assert_array_equal(cut["kept"], np.minimum(whole["kept"], 5))


def test_frequency_is_that_of_fits_to_repeated_rows():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(260, 12))
    y = (X[:, 0] + 0.5 * X[:, 1] + rng.normal(size=260) > 0).astype(int)
    train, val = np.arange(200), np.arange(200, 260)
    config = SelectConfig(bootstrap=8, tol=1e-7, max_iter=500, seed=3)
    found = probe.rank_neurons(X, y, train, val, 2, score=SCORE, config=config)
    standard = probe.standardise(X[train]).X
    chosen = np.zeros(12)
    for turn in range(8):
        drawn = np.random.default_rng([3, 1, turn]).integers(0, 200, 200)
        again = probe.fit(standard[drawn], y[drawn], 2, l1=1 / found.C, tol=1e-7)
        chosen += again.coef[0] != 0
    np.testing.assert_allclose(found.frequency, chosen / 8)
    assert found.frequency[0] == 1


def test_columns_that_say_nothing_are_no_neurons():
    X, y = alike(2)
    rows, config = np.arange(600), SelectConfig(bootstrap=2, control=Control.LABELS)
    found = probe.rank_neurons(X, y, rows, rows[:100], 2, score=SCORE, config=config)
    assert len(found.neurons) == 0 and not found.coef.any() and found.converged
    assert not found.frequency.any() and found.control_score == found.val_score == 0.5


def test_random_neurons_have_the_same_counts(source, plain, tmp_path):
    config = SelectConfig(control=Control.RANDOM)
    selection.select(source, tmp_path / "one", config)
    selection.select(source, tmp_path / "two", config)
    assert_same(tmp_path / "one", tmp_path / "two")
    selection.select(source, tmp_path / "other", replace(config, seed=1))
    drawn, other = groups(tmp_path / "one"), groups(tmp_path / "other")
    for name, real in groups(plain).items():
        found = drawn[name]["neurons"]
        assert len(found) == len(set(found.tolist())) == len(real["neurons"])
        assert set(found.tolist()) != set(real["neurons"].tolist())
        assert found.tolist() != other[name]["neurons"].tolist()
        assert 0 <= found.min() <= found.max() < real["width"]
        np.testing.assert_array_equal(drawn[name]["kept"], real["kept"])
    with (tmp_path / "one" / selection.SCORES).open() as file:
        rows = {f"{r['layer']}/{r['site']}/{r['pooling']}": r for r in csv.DictReader(file)}
    name = "layer_01/hidden/mean"
    with h5py.File(source / "samples.h5") as file:
        is_train = file["split"].asstr()[:] == "train"
        y = (file["label"].asstr()[:] == "positive").astype(int)
    with h5py.File(source / "layer_01.h5") as file:
        X = file["hidden/mean"][:][:, np.sort(drawn[name]["neurons"])]
    standard = probe.standardise(X[is_train])
    path = probe.fit_path(
        standard.X, y[is_train], standard.transform(X[~is_train]), y[~is_train], 2, score=SCORE,
        points=config.path_points, tol=config.tol,
    )  # fmt: skip
    assert float(rows[name]["control_score"]) == pytest.approx(path.scores[path.best], abs=1e-6)
    assert float(rows[name]["val_score"]) == pytest.approx(
        groups(plain)[name]["val_score"], abs=1e-6
    )


def test_shuffled_labels_are_at_chance_and_in_the_scores(source, tmp_path):
    config = SelectConfig(control=Control.LABELS, bootstrap=2)
    selection.select(source, tmp_path / "out", config)
    with (tmp_path / "out" / selection.SCORES).open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        gain = float(row["val_score"]) - float(row["control_score"])
        assert float(row["selectivity"]) == pytest.approx(gain, abs=2e-6)
        assert 0 < float(row["stability"]) <= 1
        # The best of 20 points on 60 rows, by luck alone; 0.74 is one in a thousand for one.
        assert 0.4 <= float(row["control_score"]) <= 0.75
        assert row["control"] == "labels"


def test_the_reference_is_the_recipe_on_the_same_rows():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 20))
    y = (X[:, 0] + rng.normal(size=300) > 0).astype(int)
    train, val = np.arange(200), np.arange(200, 300)
    config = SelectConfig(solver=Solver.REFERENCE)
    found = probe.rank_neurons(X, y, train, val, 2, score=SCORE, config=config)
    standard = probe.standardise(X[train])
    from spin_cli.probe.reference import fit_reference

    path = fit_reference(standard.X, y[train], standard.transform(X[val]), y[val], 2, score=SCORE)
    best = path.fits[path.best]
    assert found.C == best.C
    assert found.val_score == path.scores[path.best]
    np.testing.assert_array_equal(
        found.neurons, mask.order((best.coef.astype(np.float64) ** 2).sum(0))
    )
    assert not found.converged  # it never is, and that is stored


def launch(source, output, *options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "spin_cli", "select", str(source), "-o", str(output), *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_two_processes_give_the_bytes_of_one(source, plain, out):
    stale = out.with_name(out.name + ".ranks")
    stale.mkdir()
    (stale / "rank_1.npz").write_bytes(b"what a killed run left")
    process = launch(source, out, "--workers", "1")
    printed, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert printed.count("Best of 3 probes") == 1
    assert_same(plain, out)
    assert not stale.exists()


@pytest.mark.slow
def test_killed_processes_leave_nothing_under_the_final_name(source, plain, out):
    process = launch(source, out, "--bootstrap", "10000")
    deadline = time.time() + PATIENCE
    while not out.with_name(out.name + ".ranks").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.terminate()  # the launcher ends its processes in the same hard way
    process.communicate(timeout=PATIENCE)
    assert not out.exists()
    selection.select(source, out, SelectConfig(workers=1))  # what is left is in nobody's way
    assert_same(plain, out)
    assert not out.with_name(out.name + ".ranks").exists()
