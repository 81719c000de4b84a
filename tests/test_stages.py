"""The stages on real text with a real model: resumed, repeated, and honest about the test split."""

from __future__ import annotations

import csv
import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from spin_cli import (
    activations,
    artifacts,
    backbone,
    extraction,
    metrics,
    prediction,
    selection,
    training,
)
from spin_cli.activations import Feature
from spin_cli.choices import HeadKind, Pooling, Site, StorageDtype
from spin_cli.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    PredictConfig,
    SelectConfig,
    TrainConfig,
)
from spin_cli.errors import ArtifactError, DataError
from spin_cli.extraction import planning
from spin_cli.reports.sources import read_run
from spin_cli.samples import read_samples
from spin_cli.training import contest
from spin_cli.training.pick import best_of
from spin_cli.verification import verify

SAMPLES = Path(__file__).parents[1] / "sample_data"
CONFIG = ExtractConfig(DataConfig(), ModelConfig("bundled:minilm"), layers="0-2")


def cut(source, folder, train, others, step=1):
    """The first rows of each split of the sample data, or every second one."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("val", others), ("test", others)):
        lines = (SAMPLES / source / f"{name}.csv").read_text().splitlines(keepends=True)
        (folder / f"{name}.csv").write_text("".join([lines[0], *lines[1::step][:rows]]))
    return folder


@pytest.fixture(scope="session")
def data(shared):
    """A part of the sample reviews."""
    return shared("stages-data", lambda folder: cut("reviews", folder, 160, 60))


def all_stages(data, folder, config=CONFIG):
    extraction.extract(data, folder / "activations", config)
    selection.select(folder / "activations", folder / "selection", SelectConfig())
    training.train(folder / "selection", folder / "head", TrainConfig(cv=3))
    return folder


@pytest.fixture(scope="session")
def whole(data, shared):
    """All three stages, uninterrupted."""
    return shared("stages", lambda folder: all_stages(data, folder))


def assert_same(one: Path, other: Path):
    names = sorted(path.name for path in one.iterdir() if path.name != artifacts.LOG)
    assert names == sorted(path.name for path in other.iterdir() if path.name != artifacts.LOG)
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_two_runs_give_the_same_bytes(data, whole, tmp_path):
    again = all_stages(data, tmp_path / "again")
    for name in ("activations", "selection", "head"):
        assert_same(whole / name, again / name)


def test_a_run_that_failed_between_windows_is_resumed_to_the_same_bytes(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "WINDOW_BYTES", 2**20)
    extraction.extract(data, tmp_path / "straight", CONFIG)

    def break_off(_what, done, _total):
        if done >= 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extraction.extract(data, tmp_path / "broken", CONFIG, progress=break_off)
    assert not (tmp_path / "broken").exists()
    resumed = extraction.extract(data, tmp_path / "broken", CONFIG)
    assert resumed["log"]["resumed_at_row"] > 0
    assert_same(tmp_path / "straight", tmp_path / "broken")


def test_other_options_are_not_mixed_into_an_unfinished_run(data, tmp_path):
    def break_off(_what, done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extraction.extract(data, tmp_path / "a", CONFIG, progress=break_off)
    other = replace(CONFIG, storage_dtype=StorageDtype.FLOAT32)
    with pytest.raises(ArtifactError, match=r"options\.storage_dtype"):
        extraction.extract(data, tmp_path / "a", other)


def test_data_that_change_during_a_run_are_noticed(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")

    def spoil(_what, done, total):
        if done == total:
            with (copy / "test.csv").open("a") as file:
                file.write("one more,positive\n")

    with pytest.raises(DataError, match=r"test\.csv"):
        extraction.extract(copy, tmp_path / "a", CONFIG, progress=spoil)
    assert not (tmp_path / "a").exists()


def test_rows_are_in_the_order_of_the_files(data, whole):
    samples = read_samples(whole / "activations")
    assert samples.ids[0] == "train-0" and samples.ids[-1] == "test-59"
    assert samples.splits.tolist() == ["train"] * 160 + ["val"] * 60 + ["test"] * 60
    predictor = prediction.open_predictor(whole / "head", PredictConfig())
    with h5py.File(whole / "activations" / "layer_01.h5") as file:
        stored = file["ffn/mean"][:]
        assert dict(file["ffn/mean"].attrs)["hookpoint"] == "encoder.layer.0.output.dense:input"
    alone = extraction.plan(data, replace(CONFIG, storage_dtype=StorageDtype.FLOAT32))
    feature = next(
        f for f in alone.features if f.file == "layer_01.h5" and f.dataset == "/ffn/mean"
    )
    rows = list(alone.dataset.rows())
    for row in (0, 37, 159, 160, 279):
        blocks, _ = extraction.compute_window(
            alone.model,
            alone.features,
            StorageDtype.FLOAT32,
            backbone.encode(alone.model, [rows[row].text]),
        )
        np.testing.assert_allclose(stored[row], blocks[feature][0], rtol=2e-3, atol=1e-4)
    assert predictor.head.neurons > 0


def test_probes_on_raw_features_give_the_probe_score(whole):
    manifest = artifacts.read_manifest(whole / "selection")
    probes = load_file(whole / "selection" / selection.PROBES)
    samples, codes = selection.read_labels(
        whole / "activations", artifacts.read_manifest(whole / "activations")
    )
    val = samples.rows("val")
    feature = Feature("layer_02", Site.FFN, Pooling.MEAN, 1536)
    X = activations.read_matrix(whole / "activations", feature, len(codes), StorageDtype.FLOAT16)
    name = "layer_02.ffn.mean"
    logits = X[val].astype(np.float64) @ probes[f"{name}.weight"][0] + probes[f"{name}.bias"]
    accuracy = float(((logits > 0) == (codes[val] == 1)).mean())
    with h5py.File(whole / "selection" / selection.MASKS) as file:
        group = file["layer_02/ffn/mean"]
        assert accuracy == pytest.approx(group.attrs["val_score"])
        neurons, shares = group["neurons"][:], group["cumulative"][:]
    assert set(neurons) == set(np.flatnonzero(probes[f"{name}.weight"][0]))
    assert np.all(np.diff(shares) > 0) and shares[-1] == pytest.approx(1)
    assert manifest["counts"]["probes"] == 15


def test_the_choice_does_not_look_at_test(data, whole, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    swapped = {"positive": "negative", "negative": "positive"}
    lines = [line.rsplit(",", 1) for line in (data / "test.csv").read_text().splitlines()[1:]]
    (copy / "test.csv").write_text(
        "text,label\n" + "".join(f"{text},{swapped[label]}\n" for text, label in lines)
    )
    other = all_stages(copy, tmp_path / "run")
    for name in ("head.safetensors", "config.json"):
        assert (other / "head" / name).read_bytes() == (whole / "head" / name).read_bytes()
    one, two = (json.loads((run / "head" / "metrics.json").read_text()) for run in (whole, other))
    assert one["spin"]["val"] == two["spin"]["val"]
    assert one["spin"]["test"]["accuracy"] == pytest.approx(1 - two["spin"]["test"]["accuracy"])


def predicted_and_trained(data, run):
    """Probabilities of the training texts: by `predict`, and from the stored activations."""
    predictor = prediction.open_predictor(run / "head", PredictConfig())
    rows = list(prediction.read_input(str(data / "train.csv"), PredictConfig()))
    values, _ = predictor.features([row.text for row in rows])
    stored = []
    for f in predictor.head.features:
        feature = Feature(f.layer, f.site, f.pooling, f.width)
        dtype = predictor.head.storage_dtype
        matrix = activations.read_matrix(run / "activations", feature, 280, dtype)
        stored.append(matrix[:160, f.neurons])
    assert len(predictor.model.model.encoder.layer) == predictor.head.blocks <= 2
    return predictor.classify(values), predictor.classify(np.hstack(stored))


def test_predict_sees_the_features_that_train_saw(data, tmp_path):
    config = replace(CONFIG, storage_dtype=StorageDtype.FLOAT32)
    predicted, trained = predicted_and_trained(data, all_stages(data, tmp_path / "run", config))
    np.testing.assert_allclose(predicted, trained, atol=1e-4)


def test_with_float16_storage_predict_differs_by_rounding_alone(data, whole):
    # Batches of another make-up move a value's last float32 bits, and now and then that tips the
    # rounding to float16, by a step that is large for a neuron with a large mean.
    predicted, trained = predicted_and_trained(data, whole)
    assert np.median(np.abs(predicted - trained)) < 1e-4
    assert np.abs(predicted - trained).max() < 0.05
    assert (predicted.argmax(1) == trained.argmax(1)).mean() > 0.98


def test_more_than_two_classes(tmp_path):
    config = replace(CONFIG, layers="3-4", sites=(Site.HIDDEN,), poolings=(Pooling.MEAN,))
    run = all_stages(cut("requests", tmp_path / "data", 240, 60, step=2), tmp_path / "run", config)
    report = json.loads((run / "head" / "metrics.json").read_text())
    classes = artifacts.read_manifest(run / "head", "head")["classes"]
    assert len(classes) == 7 and report["metric"] == "macro-f1"
    weight = load_file(run / "head" / "head.safetensors")["weight"]
    assert weight.shape[0] == 7
    assert report["spin"]["test"]["macro_f1"] > 0.5 > 1 / 7
    assert set(report["last_layer"]["test"]["per_class"]) == set(classes)


def test_a_selection_of_activations_that_changed_is_refused(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    other = replace(CONFIG, poolings=(Pooling.MEAN,))
    extraction.extract(data, run / "activations", other, force=True)
    with pytest.raises(ArtifactError, match=r"changed since in request\.options\.poolings$"):
        training.train(run / "selection", run / "head", TrainConfig(), force=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m["request"]["data"][0].update(sha256="0" * 64), " in request.data"),
        (lambda m: m["request"]["model"].update(commit="abc"), " in request.model"),
        (lambda m: m["counts"].update(tokens=1), " in counts"),
        (lambda m: m["warnings"].append("new"), " in warnings"),
        (lambda m: m["request"]["options"].update(layers="0-1", storage_dtype="float32"),
         " in request.options.layers, request.options.storage_dtype"),
    ],
)  # fmt: skip
def test_what_changed_of_a_parent_is_named(whole, tmp_path, spoil, words):
    run = shutil.copytree(whole, tmp_path / "run")
    manifest = json.loads((run / "activations/manifest.json").read_text())
    hashed = {
        name: {key: value for key, value in entry.items() if key != "bytes"}
        for name, entry in manifest["files"].items()
    }
    spoil(manifest)
    artifacts.write_manifest(run / "activations", "activations", manifest, hashed=hashed)
    with pytest.raises(ArtifactError) as caught:
        artifacts.read_parent(run / "selection", artifacts.read_manifest(run / "selection"))
    assert caught.value.message.endswith("changed since" + words)
    # A file that is another is all that can differ where the manifest says the same.
    (run / "activations/layer_01.h5").write_bytes(b"other")
    manifest = json.loads((whole / "activations/manifest.json").read_text())
    artifacts.write_manifest(run / "activations", "activations", manifest, hashed=hashed)
    with pytest.raises(ArtifactError, match=r"changed since in files$"):
        artifacts.read_parent(run / "selection", artifacts.read_manifest(run / "selection"))


def test_a_parent_of_a_selection_without_digests_is_refused_all_the_same(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    manifest = json.loads((run / "selection/manifest.json").read_text())
    del manifest["parent"]["digests"]
    manifest["parent"]["sha256"] = "0" * 64
    artifacts.write_manifest(run / "selection", "selection", manifest)
    with pytest.raises(ArtifactError, match=r"changed since$"):
        artifacts.read_parent(run / "selection", artifacts.read_manifest(run / "selection"))


def test_a_head_with_hidden_units_predicts_what_train_measured(data, whole, tmp_path):
    config = TrainConfig(cv=3, head=HeadKind.MLP, abstain_below=0.6)
    made = training.train(whole / "selection", tmp_path / "head", config)
    predictor = prediction.open_predictor(tmp_path / "head", PredictConfig())
    assert predictor.head.hidden is not None
    rows = list(prediction.read_input(str(data / "test.csv"), PredictConfig(evaluate=True)))
    probs = predictor.probabilities([row.text for row in rows])
    codes = np.array([predictor.head.classes.index(row.label) for row in rows])
    measured = made["metrics"]["spin"]["test"]
    assert metrics.log_loss(codes, probs) == pytest.approx(measured["log_loss"], abs=5e-3)
    answered = ~predictor.head.abstains(probs)
    assert made["metrics"]["answered"]["test"]["share"] == pytest.approx(answered.mean(), abs=0.02)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_stack_predicts_what_train_measured(data, whole, tmp_path, monkeypatch, refit, mixed):
    """Alone, and averaged with heads on masked neurons."""

    def deepest_stack(judged, y, metric):
        stacks = [j for j in judged if j.linear is not None and (len(j.parts) > 1) == mixed]
        return stacks[-1] if stacks else best_of(judged, y, metric)

    monkeypatch.setattr(contest, "best_of", deepest_stack)
    config = TrainConfig(cv=0, refit=refit, oof=tmp_path / "oof.csv")
    report = training.train(whole / "selection", tmp_path / "head", config)["metrics"]
    predictor = prediction.open_predictor(tmp_path / "head", PredictConfig())
    assert predictor.head.neurons == report["chosen"]["neurons"]
    assert len(predictor.head.features) == report["chosen"]["matrices"] > 1
    rows = list(prediction.read_input(str(data / "test.csv"), PredictConfig(evaluate=True)))
    probs = predictor.probabilities([row.text for row in rows])
    codes = np.array([predictor.head.classes.index(row.label) for row in rows])
    measured = report["spin"]["test"]["log_loss"]
    assert metrics.log_loss(codes, probs) == pytest.approx(measured, abs=5e-3)
    parts = report["chosen"].get("parts", [])
    assert [part.get("matrices", 0) > 1 for part in parts][:2] == ([True, False] if mixed else [])
    assert ("50% both" in (tmp_path / "head" / "README.md").read_text()) == mixed
    with (tmp_path / "oof.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = [(float(row["prob_positive"]) > 0.5) == (row["label"] == "positive") for row in rows]
    assert np.mean(right) > 0.6
    assert all(check.ok for check in verify(tmp_path / "head"))


def test_out_of_fold_probabilities_are_written_and_are_those_that_were_scored(whole, tmp_path):
    made = training.train(
        whole / "selection", tmp_path / "head", TrainConfig(cv=3, oof=tmp_path / "oof.csv")
    )
    with (tmp_path / "oof.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "prob_negative", "prob_positive"]
    samples = read_samples(whole / "activations")
    kept = samples.splits != "test"
    assert [row["id"] for row in rows] == samples.ids[kept].tolist()
    assert [row["label"] for row in rows] == samples.labels[kept].tolist()
    probs = np.array([[float(row["prob_negative"]), float(row["prob_positive"])] for row in rows])
    codes = (samples.labels[kept] == "positive").astype(int)
    scored = made["metrics"]["spin"]["out-of-fold"]
    assert metrics.log_loss(codes, probs) == pytest.approx(scored["log_loss"], abs=1e-4)
    one, other = (run / "head" / "head.safetensors" for run in (tmp_path, whole))
    assert one.read_bytes() == other.read_bytes()


def test_out_of_fold_probabilities_replace_no_file_unless_told_to(whole, tmp_path, monkeypatch):
    """And that is said before any work."""
    (tmp_path / "oof.csv").write_text("mine")
    config = TrainConfig(cv=0, max_layer=1, oof=tmp_path / "oof.csv")
    with monkeypatch.context() as patch:
        patch.setattr("spin_cli.training.stage.search", None)
        with pytest.raises(ArtifactError, match=r"oof\.csv: exists already"):
            training.train(whole / "selection", tmp_path / "head", config)
        with pytest.raises(ArtifactError, match="is a folder"):
            other = replace(config, oof=tmp_path)
            training.train(whole / "selection", tmp_path / "head", other, force=True)
    assert (tmp_path / "oof.csv").read_text() == "mine"
    training.train(whole / "selection", tmp_path / "head", config, force=True)
    assert (tmp_path / "oof.csv").read_text().startswith("id,label,prob_negative")


def test_the_chosen_head_is_marked_among_those_that_were_tried(whole):
    report = json.loads((whole / "head" / "metrics.json").read_text())
    (marked,) = [entry for entry in report["candidates"] if "chosen" in entry]
    assert marked["judged_on"] == report["judged_on"]["what"] == "out-of-fold"
    for key in ("site", "pooling", "eta", "depth", "strength", "log_loss"):
        assert marked[key] == report["chosen"][key]
    assert marked.get("parts") == report["chosen"].get("parts")
    assert sum("chosen" in entry for entry in report["frontier"]) <= 1


def test_rivals_and_intervals_are_in_the_report(whole):
    report = json.loads((whole / "head" / "metrics.json").read_text())
    assert {"last_layer", "best_layer", "tfidf"} <= set(report)
    for name in ("spin", "last_layer", "best_layer", "tfidf"):
        scores = report[name]["test"]
        for metric in ("accuracy", "macro_f1"):
            low, high = scores["intervals"][metric]
            assert low < scores[metric] < high
    best = report["comparison"]["against"]
    difference = report["comparison"]["difference"]["accuracy"]["value"]
    assert difference == pytest.approx(
        report["spin"]["test"]["accuracy"] - report[best]["test"]["accuracy"]
    )
    assert "TF-IDF" in (whole / "head" / "README.md").read_text()


def test_the_texts_are_found_wherever_spin_is_started(tmp_path, monkeypatch):
    """A file of the same name in another folder is not taken for them."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "texts"):
        folder.mkdir(parents=True)
    cut("reviews", here / "texts", 100, 30)
    (there / "texts" / "train.csv").write_text("text,label\na stranger,positive\n")
    monkeypatch.chdir(here)
    extraction.extract(Path("texts"), Path("activations"), replace(CONFIG, layers="1"))
    selection.select(Path("activations"), Path("selection"), SelectConfig())
    training.train(Path("selection"), Path("head"), TrainConfig(cv=3))
    monkeypatch.chdir(there)
    training.train(Path("../here/selection"), Path("../here/other"), TrainConfig(cv=3))
    assert_same(here / "head", here / "other")
    assert "tfidf" in json.loads((here / "other" / "metrics.json").read_text())
    assert all(check.ok for check in verify(Path("../here/activations")))
    assert isinstance(read_run(Path("../here")).texts, list)
    monkeypatch.chdir(here.rename(tmp_path / "moved"))
    assert isinstance(read_run(tmp_path / "moved").texts, list)


def test_without_the_texts_there_is_no_tfidf_and_the_reason_is_told(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    extraction.extract(copy, tmp_path / "activations", replace(CONFIG, layers="1"))
    selection.select(tmp_path / "activations", tmp_path / "selection", SelectConfig())
    with (copy / "val.csv").open("a") as file:
        file.write("another,positive\n")
    made = training.train(tmp_path / "selection", tmp_path / "head", TrainConfig(cv=0))
    assert "tfidf" not in made["metrics"]
    (told,) = [note for note in made["metrics"]["notes"] if "TF-IDF" in note]
    assert "val.csv changed" in told
    assert "near-duplicates" in told and "another head" in told
    assert made["metrics"]["judged_on"] == {"what": "val", "rows": 60}
