"""What came of a target is told: on the screen, in metrics.json and on the model card."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from spin_cli import activations, artifacts
from spin_cli.head import load_head
from spin_cli.operating import operating_points
from spin_cli.samples import read_samples
from spin_cli.training import calibration


@pytest.mark.parametrize("label", ["good", "bad"])
def test_the_threshold_of_a_target_and_what_it_reaches(
    spin, tiny_run, tmp_path, monkeypatch, label
):
    monkeypatch.setattr(calibration, "MIN_CLASS_ROWS", 20)
    run, out = tiny_run / "run", tmp_path / "head"
    done = spin(
        "train", run / "selection", "-o", out, "--max-layer", 0, "--target-recall", 0.9,
        "--positive-label", label,
    )  # fmt: skip
    assert done.code == 0, done.err
    head, manifest = load_head(out), artifacts.read_manifest(run / "activations")
    samples = read_samples(run / "activations")
    test = samples.rows("test")
    by_key = {(f.layer, f.site, f.pooling): f for f in activations.features_of(manifest)}
    columns = [
        activations.read_matrix(
            run / "activations", by_key[f.layer, f.site, f.pooling], len(samples.ids),
            head.storage_dtype,
        )[test][:, f.neurons]
        for f in head.features
    ]  # fmt: skip
    found = artifacts.read_json(out / "metrics.json")["target"]
    assert (found["label"], found["recall"]) == (label, 0.9)
    p = head.probabilities(np.hstack(columns))[:, head.classes.index(label)]
    said, true = p >= found["threshold"], np.array(samples.labels)[test] == label
    assert found["reached"]["test"]["recall"] == pytest.approx((said & true).sum() / true.sum())
    assert found["reached"]["test"]["precision"] == pytest.approx((said & true).sum() / said.sum())
    assert found["reached"]["out-of-fold"]["recall"] >= 0.9
    card = (out / "README.md").read_text()
    for name, scores in found["reached"].items():
        told = f"precision {scores['precision']:.3f}, recall {scores['recall']:.3f} on {name} texts"
        assert told in done.err and told in card
    assert f"threshold {found['threshold']:.4g} for '{label}'" in done.err


# -- operating points ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("digits", [1, 2, 16])  # with few digits, many ties
def test_operating_points_are_those_of_scikit_learns_curve(seed, digits):
    rng = np.random.default_rng(seed)
    y = (rng.random(500) < 0.3).astype(int)
    p = np.round(1 / (1 + np.exp(-rng.normal(2 * y - 1, 1.5))), digits)
    probs = np.stack([1 - p, p], 1)
    found = operating_points(y, probs, ("a", "b"))
    for code, name in enumerate("ab"):
        rates, recalls, _ = roc_curve(y == code, probs[:, code], drop_intermediate=False)
        others = (y != code).sum()
        for point in found.get(name, ()):
            most = point["max_false_positive_rate"]
            assert most * others >= 1
            best = recalls[rates <= most].max()
            assert point["recall"] == pytest.approx(best)
            said = probs[:, code] >= point["threshold"]
            assert said[y == code].mean() == pytest.approx(point["recall"])
            assert said[y != code].mean() == point["false_positive_rate"] <= most
            if said.any():
                assert (y == code)[said].mean() == pytest.approx(point["precision"])
            else:
                assert np.isnan(point["precision"])


def test_operating_points_need_rows_and_room():
    head, p = ("a", "b"), np.linspace(0.1, 0.9, 200)
    probs, y = np.stack([1 - p, p], 1), np.repeat([0, 1], 100)
    found = operating_points(y, probs, head)
    assert [point["max_false_positive_rate"] for point in found["b"]] == [0.01, 0.05]
    assert len(str(found["b"][0]["threshold"])) <= 6
    assert operating_points(y[:50], probs[:50], head) == {}  # one class
    assert operating_points(y, np.repeat([[0.0, 1.0]], 200, 0), head).keys() == {"a"}
    three = np.column_stack([probs / 2, np.full(200, 0.5)])
    assert operating_points(y, three, ("a", "b", "c")) == {}
