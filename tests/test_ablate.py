"""`spin ablate` on planted neurons, and `spin verify` on damage of every kind."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spin_cli import activations, artifacts, atomic, metrics, selection
from spin_cli.activations import Feature
from spin_cli.choices import Metric, Pooling, Site, Solver, StorageDtype
from spin_cli.config import SelectConfig
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.head import load_head
from spin_cli.samples import read_samples, write_samples
from spin_cli.training.ablation import AblateConfig, ablate
from spin_cli.verification import verify
from tests.helpers import MODEL, sentences, write_csv

PLANTED = (3, 17, 20)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A selection on two matrices of noise in which three neurons of the first know the label."""
    folder = tmp_path_factory.mktemp("planted")
    plant(folder, ["no", "yes"])
    selection.select(folder / "activations", folder / "selection", SelectConfig())
    return folder


def plant(folder: Path, classes: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows, width = 600, 40
    labels = rng.integers(0, len(classes), rows)
    features = [Feature(f"layer_0{k}", Site.HIDDEN, Pooling.MEAN, width, "x") for k in (1, 2)]
    with atomic.building(folder / "activations", force=False) as partial:
        for feature in features:
            X = rng.normal(0, 1, (rows, width)).astype(np.float32)
            if feature.layer == "layer_01":
                X[:, PLANTED] += 1.5 * (2 * labels[:, None] - 1)
            activations.create_layer(partial / feature.file, [feature], rows, StorageDtype.FLOAT32)
            with activations.RowWriter(partial, [feature]) as writer:
                writer.write(feature, 0, X)
        write_samples(
            partial / "samples.h5",
            ids=map(str, range(rows)),
            labels=labels.astype(np.int32),
            classes=classes,
            splits=np.repeat([0, 1, 2], [300, 100, 200]).astype(np.uint8),
            n_tokens=np.ones(rows, np.int32),
            truncated=np.zeros(rows, bool),
        )
        content = {
            "request": {"model": {}, "options": {"data": {}}},
            "classes": classes,
            "counts": {"rows": rows},
            "layers": ["layer_00", "layer_01", "layer_02"],
            "storage_dtype": "float32",
            "features": [
                {"layer": f.layer, "site": f.site, "pooling": f.pooling, "width": width,
                 "hookpoint": "x", "overflowed": 0}
                for f in features
            ],
        }  # fmt: skip
        artifacts.write_manifest(partial, "activations", content)


def test_planted_neurons_are_sufficient_and_their_removal_costs_everything(planted):
    config = AblateConfig(etas=(0.9,), draws=4)
    found = ablate(planted / "selection", None, config)
    assert (found["scored_on"], found["rows"]["test"], found["head"]) == ("test", 200, None)
    refit = found["refit"]
    assert refit["neurons"] == 80
    assert refit["all"] > 0.95
    for point in refit["points"]:
        assert point["kept"] > 0.95
        assert point["removed"] < 0.65
        assert point["random_kept"] < point["kept"] - 0.1
        assert point["random_removed"] > point["removed"] + 0.1
        assert point["sufficiency"] == pytest.approx(refit["all"] - point["kept"])
        assert point["comprehensiveness"] == pytest.approx(refit["all"] - point["removed"])
    assert ablate(planted / "selection", None, config) == found  # random, but from the seed


def test_other_layers_and_options_that_leave_nothing(planted):
    found = ablate(planted / "selection", None, AblateConfig(max_layer=1, etas=(1.0,), draws=1))
    assert found["what"]["layers"] == ["layer_01"]
    with pytest.raises(UsageError, match="no selected neuron"):
        ablate(planted / "selection", None, AblateConfig(poolings=(Pooling.MAX,)))


def test_many_rows_are_thinned_and_it_is_said(planted):
    found = ablate(planted / "selection", None, AblateConfig(etas=(0.9,), draws=1, rows=120))
    assert found["rows"]["train"] == 120
    assert "120 of 300 train rows" in found["notes"][0]


def test_mean_ablation_is_that_of_a_plain_loop(tiny_run):
    run = tiny_run / "run"
    config = AblateConfig(etas=(0.5,), draws=1)
    found = ablate(run / "selection", run / "head", config)
    report = json.loads((run / "head/metrics.json").read_text())
    head = load_head(run / "head")
    manifest = artifacts.read_manifest(run / "activations")
    samples = read_samples(run / "activations")
    by_key = {(f.layer, f.site, f.pooling): f for f in activations.features_of(manifest)}
    X = np.hstack(
        [
            activations.read_matrix(
                run / "activations", by_key[f.layer, f.site, f.pooling], 100, StorageDtype.FLOAT16
            )[:, f.neurons]
            for f in head.features
        ]
    ).astype(np.float64)
    train, test = samples.rows("train"), samples.rows("test")
    y, tested = (samples.labels[test] == head.classes[1]).astype(int), X[test]
    counted = (head.weight[0] * X[train].std(0)) ** 2
    order = np.argsort(-counted)
    shares = np.cumsum(counted[order]) / counted.sum()
    top = order[: int(np.argmax(shares >= 0.5)) + 1]
    for name, left in (("kept", top), ("removed", np.setdiff1d(np.arange(X.shape[1]), top))):
        values = np.tile(X[train].mean(0), (len(test), 1))
        for j in left:
            values[:, j] = tested[:, j]
        expected = metrics.accuracy(y, (head.probabilities(values)[:, 1] > 0.5).astype(int))
        assert found["head"]["points"][0][name] == pytest.approx(expected)
    if head.threshold is None:
        assert found["head"]["all"] == pytest.approx(report["spin"]["test"]["accuracy"])


def test_on_the_command_line(spin, tiny_run, tmp_path):
    done = spin("ablate", tiny_run / "run", "--eta", "0.4,0.9", "-o", tmp_path / "a.csv", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["eta"]) for row in rows] == [
        ("refit", "0.4"), ("refit", "0.9"), ("head", "0.4"), ("head", "0.9"),
    ]  # fmt: skip
    assert float(rows[0]["kept"]) == found["refit"]["points"][0]["kept"]
    assert spin("ablate", tiny_run / "run", "-o", tmp_path / "a.csv").code == 4
    packed = tmp_path / "new" / "folder" / "a.csv.gz"
    assert spin("ablate", tiny_run / "run", "--eta", "0.4,0.9", "-o", packed).code == 0
    assert gzip.decompress(packed.read_bytes()) == (tmp_path / "a.csv").read_bytes()
    assert spin("ablate", tiny_run / "run", "--site", "x").code == 2
    assert spin("ablate", tiny_run).code == 4
    done = spin("ablate", tiny_run / "run", "--eta", "0.4", "--draws", "1")
    assert done.code == 0
    assert "removed" in done.out


def test_without_test_rows_train_and_ablate_say_on_what_they_score(spin, tmp_path):
    data, run = write_csv(tmp_path / "rows.csv", sentences()), tmp_path / "run"
    done = spin(
        "run", data, "-m", MODEL, "-o", run, "--layers", "1", "--val-fraction", "0.4",
        "-s", "train.masks_only=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    out = " ".join(done.out.split())
    report = json.loads((run / "head/metrics.json").read_text())
    chosen = report["chosen"]
    kind = f"{chosen['site']} {chosen['pooling']} eta {chosen['eta']:g}"
    assert f"On 60 out-of-fold texts: the chosen head ({kind}, " in out
    assert "no test rows: scores are of out-of-fold rows (60)" in done.err
    for name in ("spin", "last_layer", "best_layer", "tfidf"):
        scores = report[name]["out-of-fold"]
        low, high = scores["intervals"]["accuracy"]
        assert scores["rows"] == 60 and 0 <= low <= scores["accuracy"] <= high <= 1
        assert f"{scores['accuracy']:.4f} ({low:.2f}–{high:.2f})" in out
    assert "comparison" not in report
    card = (run / "head/README.md").read_text()
    assert "| out-of-fold | SPIN | " in card and "| val |" not in card
    assert "Decision thresholds by false positive rate, on out-of-fold texts" in card
    for name, points in report["operating_points"].items():
        for point in points:
            assert 0 < point["false_positive_rate"] <= point["max_false_positive_rate"]
            assert f"| {name} | {point['false_positive_rate']:.2%} | " in card
            assert f" | {point['threshold']} | {point['recall']:.4f} | " in card
    assert f"kind {kind}" in " ".join(spin("inspect", run / "head").out.split())
    assert report["chosen"]["refit"]
    done = spin("ablate", run, "--eta", "0.4", "--draws", "1")
    assert "the trained head was fitted to these val rows too" in done.err
    assert "rows that it was fitted to" in " ".join(done.out.split())
    spin("train", run / "selection", "-o", tmp_path / "other", "--no-refit")
    done = spin("ablate", run, "--head", tmp_path / "other", "--eta", "0.4", "--draws", "1")
    assert "fitted to" not in done.err + done.out


# -- verify ----------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))


def failed(folder: Path, **options) -> list[str]:
    return [check.what for check in verify(folder, **options) if check.ok is False]


def test_a_selection_and_a_head_are_recomputed_and_agree(tiny_run):
    for name, what in (("selection", "recomputed probes"), ("head", "recomputed test scores")):
        checks = {check.what: check for check in verify(tiny_run / "run" / name)}
        assert all(check.ok for check in checks.values()), checks
        assert "agree" in checks[what].found


def test_probes_of_the_papers_recipe_are_recomputed_and_agree(tmp_path):
    """With several classes too, and by a score that sees every probability."""
    plant(tmp_path, ["few", "many", "none", "some"])
    config = SelectConfig(solver=Solver.REFERENCE, metric=Metric.LOG_LOSS)
    selection.select(tmp_path / "activations", tmp_path / "selection", config)
    checks = {check.what: check for check in verify(tmp_path / "selection")}
    assert checks["recomputed probes"].ok, checks["recomputed probes"].found
    assert checks["recomputed probes"].found.startswith("2 probes")


def remake(folder: Path) -> None:
    """Give a forged artifact a manifest that agrees with its files."""
    old = json.loads((folder / "manifest.json").read_text())
    content = {k: old[k] for k in ("request", "parent", "classes", "metric", "counts") if k in old}
    artifacts.write_manifest(folder, old["kind"], content)


def test_weights_that_do_not_fit_their_importance_are_found(copy):
    path = copy / "selection/probes.safetensors"
    save_file({k: v * 2 if "weight" in k else v for k, v in load_file(path).items()}, path)
    remake(copy / "selection")
    assert failed(copy / "selection") == ["recomputed probes"]
    assert failed(copy / "selection", rows=0) == []


def test_a_head_of_better_scores_than_it_has_is_found(copy):
    path = copy / "head/metrics.json"
    report = json.loads(path.read_text())
    report["spin"]["test"]["log_loss"] *= 0.9
    atomic.write_json(path, report)
    remake(copy / "head")
    assert failed(copy / "head") == ["recomputed test scores"]


def test_every_kind_of_damage_is_found(spin, copy):
    for name in ("selection", "head"):
        for path in sorted((copy / name).iterdir()):
            content = path.read_bytes()
            for place in (0, len(content) // 2, len(content) - 1):
                broken = bytearray(content)
                broken[place] ^= 1
                path.write_bytes(broken)
                assert failed(copy / name, rows=0), (path, place)
                assert failed(path), (path, place)
            path.unlink()
            assert path.name == "log.json" or spin("verify", copy / name).code == 4, path
            path.write_bytes(content)
        (copy / name / "extra.txt").write_text("hello")
        assert failed(copy / name, rows=0) == ["other files"]
        assert failed(copy / name / "extra.txt") == ["extra.txt"]
        (copy / name / "extra.txt").unlink()
        assert failed(copy / name, rows=0) == []
    with pytest.raises(ArtifactError, match="beside"):
        verify(copy / "spin.toml")


def test_a_stale_parent_is_found(copy):
    manifest = copy / "selection/manifest.json"
    old = json.loads(manifest.read_text())
    old["request"]["options"]["tol"] = 0.5
    content = {k: old[k] for k in ("request", "parent", "classes", "metric", "counts")}
    artifacts.write_manifest(copy / "selection", "selection", content)
    assert failed(copy / "head", rows=0) == ["parent"]
