"""Heads on disk and in use: what is saved comes back, what does not fit is refused."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spin_cli import artifacts, metrics
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import ModelConfig
from spin_cli.errors import ArtifactError, UsageError
from spin_cli.head import CONFIG, WEIGHTS, Head, HeadFeature, load_head, save_head

READING = artifacts.to_plain(ModelConfig("m", max_length=8))


def make_head(classes=("a", "b", "c"), units=None, **fields) -> Head:
    rng = np.random.default_rng(0)
    neurons = np.array([4, 0, 2], np.int32)
    feature = HeadFeature("layer_02", Site.FFN, Pooling.MEAN, 6, neurons)
    outputs = 1 if len(classes) == 2 else len(classes)
    normal = rng.standard_normal
    hidden = None if units is None else (normal((units, 3)).astype(np.float32), normal(units))
    head = Head(
        classes=classes,
        features=(feature,),
        weight=normal((outputs, units or 3)).astype(np.float32),
        bias=normal(outputs),
        threshold=None,
        blocks=2,
        storage_dtype=StorageDtype.FLOAT16,
        model={},
        reading=READING,
        hidden=hidden,
    )
    return replace(head, **fields)


@pytest.mark.parametrize("units", [None, 5])
@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_a_head_comes_back_as_it_was_saved(tmp_path, units, classes):
    threshold = 0.3 if len(classes) == 2 else None
    head = make_head(classes, units, threshold=threshold, abstain_below=0.6)
    save_head(tmp_path, head)
    loaded = load_head(tmp_path)
    values = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    np.testing.assert_array_equal(loaded.probabilities(values), head.probabilities(values))
    assert (loaded.threshold, loaded.abstain_below) == (threshold, 0.6)


def test_probabilities_are_those_of_a_plain_loop():
    head = make_head(units=5)
    values = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    for row, probs in zip(values.astype(float), head.probabilities(values), strict=True):
        units = [max(0.0, float(w @ row + b)) for w, b in zip(*head.hidden, strict=True)]
        z = [float(w @ units + b) for w, b in zip(head.weight, head.bias, strict=True)]
        np.testing.assert_allclose(probs, np.exp(z) / np.exp(z).sum())


@pytest.mark.parametrize("units", [None, 5])
def test_many_rows_are_not_all_held_in_float64(units):
    head = make_head(units=units)
    values = np.random.default_rng(1).standard_normal((8_000_000, 3), np.float32)
    tracemalloc.start()
    probs = head.probabilities(values)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The answers are held twice, once as blocks; of all else there is one block.
    assert most < 2 * probs.nbytes + values.size * 8
    at = [0, 3_999_999, 4_000_000, -1]
    np.testing.assert_allclose(probs[at], head.probabilities(values[at]), rtol=1e-12)


def test_threshold_and_abstention_look_at_the_chosen_label():
    head = make_head(("a", "b"), threshold=0.3, abstain_below=0.45)
    probs = np.array([[0.71, 0.29], [0.69, 0.31], [0.56, 0.44], [0.5, 0.5]])
    assert head.decide(probs).tolist() == [0, 1, 1, 1]
    assert head.abstains(probs).tolist() == [False, True, True, False]
    assert not replace(head, abstain_below=None).abstains(probs).any()
    found = head.answered(np.array([0, 1, 1, 0]), probs)  # the first and the last are given
    assert found == {"share": 0.5, "accuracy": 0.5}


@pytest.mark.parametrize("limit", [0.0, 1e-19, 0.1, 0.2, 0.7, 1 - 1e-12, 1.0, "its own"])
@pytest.mark.parametrize("code", [0, 1])
def test_two_classes_are_decided_at_either_ones_threshold(code, limit):
    """Of logits up to where one probability is 1 and the other is not 0."""
    head = make_head(("a", "b"), threshold=0.3)
    z = np.linspace(-60, 60, 501)[:, None]
    probs = metrics.probabilities(z, 2)
    limits = probs[::50, code] if limit == "its own" else [limit]
    for one in limits:
        moved = head.deciding_at({"ab"[code]: float(one)})
        said = np.array(["ab"[k] == "ab"[code] for k in moved.decide(probs)])
        np.testing.assert_array_equal(said, probs[:, code] >= one)
        assert moved.limit(code) == one
        assert moved.limit(1 - code) == 1 - one
        values = np.ones((1, 3), np.float32)
        np.testing.assert_array_equal(moved.probabilities(values), head.probabilities(values))
    assert (
        head.deciding_at({"a": 0.9}).deciding_at({"b": 0.2}).decide(probs).sum()
        == (probs[:, 1] >= 0.2).sum()
    )


def test_a_decision_threshold_that_has_no_meaning_is_refused():
    two, three = make_head(("a", "b")), make_head()
    assert two.limit(0) is two.limit(1) is three.limit(2) is None
    for head, limits, words in (
        (three, {"a": 0.5}, "of 3 classes the likeliest is given"),
        (two, {"c": 0.5}, "decision threshold of 'c': the head's classes are a, b"),
        (two, {"a": 0.5, "b": 0.5}, "give it for one"),
        (two, {"a": "0.5"}, "expected a number"),
        (two, {"b": 1.5}, "decision threshold b = 1.5: expected from 0 to 1"),
        (two, {"b": float("nan")}, "expected from 0 to 1"),
    ):
        with pytest.raises(UsageError, match=words):
            head.deciding_at(limits)


def test_hidden_units_that_do_not_fit_are_refused(tmp_path):
    save_head(tmp_path, make_head(units=5))
    tensors = load_file(tmp_path / WEIGHTS)
    load_head(tmp_path)
    bad = tensors["hidden.bias"].copy()
    bad[0] = np.nan
    for name, tensor in (
        ("hidden.weight", tensors["hidden.weight"][:, :2]),
        ("hidden.weight", tensors["hidden.weight"].astype(np.float64)),
        ("hidden.bias", tensors["hidden.bias"][:4]),
        ("hidden.bias", bad),
        ("weight", tensors["weight"][:, :3]),
    ):
        save_file(tensors | {name: np.ascontiguousarray(tensor)}, tmp_path / WEIGHTS)
        with pytest.raises(ArtifactError, match=name):
            load_head(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    for units in (0, 4, 6):
        (tmp_path / CONFIG).write_text(json.dumps(config | {"hidden": units}))
        with pytest.raises(ArtifactError):
            load_head(tmp_path)
