"""What came of a target is told: on the screen, in metrics.json and on the model card."""

from __future__ import annotations

import numpy as np
import pytest

from spin_cli import activations, artifacts
from spin_cli.head import load_head
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
