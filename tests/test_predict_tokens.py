"""`--stream-tokens` against a run of every prefix by itself."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from spin_cli import artifacts, backbone, prediction
from spin_cli.backbone import Encoded
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import ModelConfig, PredictConfig
from spin_cli.errors import ModelError
from spin_cli.head import Head, HeadFeature, blocks_needed, save_head
from spin_cli.prediction.prefixes import prefix_probabilities
from tests.helpers import json_lines
from tests.test_backbone import TEXTS, save_model


def make_head(model, folder, layers, classes=("calm", "alarm")):
    """A head of random neurons of every pooling on a saved model."""
    whole = backbone.load(ModelConfig(str(model)))
    rng = np.random.default_rng(0)
    features = tuple(
        HeadFeature(
            layer, site, pooling, whole.layout.width(layer, site),
            np.sort(rng.permutation(whole.layout.width(layer, site))[:7]).astype(np.int32),
        )
        for layer in layers
        for site in (Site.HIDDEN, Site.FFN)
        for pooling in Pooling
        if whole.layout.width(layer, site)
        and not (layer == layers[-1] and site is Site.HIDDEN)
    )  # fmt: skip
    count = sum(len(f.neurons) for f in features)
    outputs = 1 if len(classes) == 2 else len(classes)
    head = Head(
        classes=classes, features=features,
        weight=rng.normal(scale=0.05, size=(outputs, count)).astype(np.float32),
        bias=rng.normal(size=outputs), threshold=None,
        blocks=blocks_needed([f.layer for f in features]), storage_dtype=StorageDtype.FLOAT32,
        model=whole.identity, reading=artifacts.to_plain(whole.options),
    )  # fmt: skip
    folder.mkdir()
    save_head(folder, head)
    artifacts.write_manifest(folder, "head", {})
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_every_prefix_is_scored_as_if_it_ran_alone(tmp_path, name):
    head = make_head(save_model(tmp_path / "m", name), tmp_path / "head", ["layer_01", "layer_02"])
    predictor = prediction.open_predictor(head, PredictConfig())
    assert predictor.narrowed is not None
    encoded = predictor.encode(TEXTS)
    for one, probs in zip(encoded, prefix_probabilities(predictor, encoded), strict=True):
        assert probs.shape == (len(one.ids), 2)
        for stop in range(1, len(one.ids) + 1):
            alone = predictor.gather([Encoded(one.ids[:stop], False)])
            expected = predictor.classify(predictor.rounded(alone))[0]
            np.testing.assert_allclose(probs[stop - 1], expected, atol=1e-5)


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    head = make_head(save_model(tmp_path / "m", "bert"), tmp_path / "head", ["layer_01"])
    predictor = prediction.open_predictor(head, PredictConfig())
    with pytest.raises(ModelError, match="both directions"):
        prefix_probabilities(predictor, predictor.encode(TEXTS))


def test_the_first_crossing_is_told(spin, tmp_path):
    head = make_head(save_model(tmp_path / "m", "llama"), tmp_path / "head", ["layer_01"])
    stdin = "\n".join(TEXTS).encode()
    final = json_lines(spin("predict", head, "-", stdin=stdin).out)
    for threshold in (0.2, 0.5, 0.9):
        args = ("--stream-tokens", "--watch", "calm", "--threshold", threshold)
        done = spin("predict", head, "-", *args, stdin=stdin)
        assert done.code == 0, done.err
        for found, last, text in zip(json_lines(done.out), final, TEXTS, strict=True):
            assert found["watched"] == "calm"
            assert found["id"] == last["id"]
            assert found["tokens"][1:] == text.split()
            assert found["scores"][-1] == pytest.approx(last["probs"]["calm"], abs=2e-6)
            over = [at for at, score in enumerate(found["scores"]) if score >= threshold]
            if over:
                at = over[0]
                assert found["crossing"] == {
                    "position": at, "token": found["tokens"][at], "prob": found["scores"][at],
                }  # fmt: skip
            else:
                assert found["crossing"] is None
    out = tmp_path / "out.jsonl"
    done = spin("predict", head, "-", "--stream-tokens", "-o", out, "--json", stdin=stdin)
    assert json.loads(done.out)["rows"] == len(TEXTS) == len(json_lines(out.read_text()))
    assert spin("predict", head, "-", "--stream-tokens", "--watch", "x", stdin=stdin).code == 2
    assert spin("predict", head, "-", "--stream-tokens", "--evaluate", stdin=stdin).code == 2


def test_prefixes_are_packed_where_the_name_says_so(spin, tmp_path):
    folder = make_head(save_model(tmp_path / "m", "llama"), tmp_path / "head", ["layer_01"])
    args = ("predict", folder, "-", "--stream-tokens", "--threshold", 0.5)
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert spin(*args, "-o", tmp_path / name, stdin=b"w1 w2\n").code == 0
    packed = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())
    assert packed == (tmp_path / "a.jsonl").read_bytes() != b""
    refused = spin(*args, "-o", tmp_path / "a.csv", stdin=b"w1 w2\n")
    assert (refused.code, "a.csv: the name says csv" in refused.err) == (2, True)
