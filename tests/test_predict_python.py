"""`Classifier` by scikit-learn's own rules, and reasons that add up."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.exceptions import NotFittedError

from spin_cli import Classifier, artifacts, backbone, heap, prediction
from spin_cli.activations import Feature, from_disk, to_disk
from spin_cli.backbone import read_states
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.config import ModelConfig, PredictConfig
from spin_cli.errors import ArtifactError, DataError, ModelError, UsageError
from spin_cli.extraction.windows import settle_overflow
from spin_cli.head import load_head, save_head
from spin_cli.prediction.reasons import contributions, explain
from tests.helpers import ENV, PATIENCE, json_lines, sentences
from tests.test_backbone import MODELS, save_model
from tests.test_loading import KINDS, save_adapter
from tests.test_predict_tokens import make_head

TEXTS = [text for text, _ in sentences()[:20]]


def test_threads_may_share_a_classifier(head):
    clf = Classifier.load(head)
    parts = [TEXTS[start:] for start in range(4)]
    expected = [clf.predict_proba(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, one in zip(pool.map(clf.predict_proba, parts), expected, strict=True):
                np.testing.assert_array_equal(found, one)


def three_classes(head: Path, folder: Path) -> Path:
    """The head with a third class that has random weights."""
    shutil.copytree(head, folder)
    tensors = {key: value.copy() for key, value in load_file(folder / "head.safetensors").items()}
    rng = np.random.default_rng(0)
    scale = np.abs(tensors["weight"]).mean()
    tensors["weight"] = rng.normal(
        scale=scale, size=(3, tensors["weight"].shape[1])
    ).astype(np.float32)  # fmt: skip
    tensors["bias"] = rng.normal(size=3)
    save_file(tensors, folder / "head.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"classes": ["bad", "good", "so so"], "threshold": None}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    for name in ("kind", "schema", "versions", "files", "fingerprint"):
        del manifest[name]
    artifacts.write_manifest(folder, "head", manifest)
    return folder


# -- scikit-learn ----------------------------------------------------------------------------


def test_the_classifier_answers_as_the_command_line(spin, head):
    clf = Classifier.load(head)
    found = json_lines(spin("predict", head, "-", stdin="\n".join(TEXTS).encode()).out)
    assert clf.classes_.tolist() == ["bad", "good"]
    probs = clf.predict_proba(TEXTS)
    assert probs.shape == (20, 2)
    np.testing.assert_allclose(probs[:, 1], [f["probs"]["good"] for f in found], atol=1e-6)
    np.testing.assert_allclose(clf.predict_log_proba(TEXTS), np.log(probs))
    assert clf.predict(np.array(TEXTS)).tolist() == [f["label"] for f in found]
    assert clf.predict_proba([]).shape == (0, 2)


def test_the_classifier_keeps_scikit_learns_rules(head):
    from sklearn.base import clone, is_classifier
    from sklearn.metrics import get_scorer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    clf = Classifier(head, device="cpu")
    with pytest.raises(NotFittedError):
        clf.predict(TEXTS)
    assert is_classifier(clf)
    assert clone(clf).get_params() == clf.get_params()
    labels = clf.fit(TEXTS, None).predict(TEXTS)
    assert clf.score(TEXTS, labels) == 1.0
    assert get_scorer("accuracy")(clf, TEXTS, labels) == 1.0
    lower = make_pipeline(FunctionTransformer(lambda X: [x.lower() for x in X]), clf)
    assert (
        lower.fit(TEXTS).predict(TEXTS).tolist() == clf.predict([t.lower() for t in TEXTS]).tolist()
    )
    with pytest.raises(DataError, match="one text"):
        clf.predict("a film")
    with pytest.raises(DataError, match="item 1"):
        clf.predict(["a film", 3])
    with pytest.raises(ArtifactError, match="no such folder"):
        Classifier.load("no/such/head")


def test_a_classifier_goes_to_other_processes(head):
    clf = Classifier.load(head, device="cpu", threshold=0.9)
    expected = clf.predict_proba(TEXTS)
    packed = pickle.dumps(clf)
    assert len(packed) < 10_000  # no weights of a model
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(clf.predict_proba, TEXTS).result(PATIENCE)
        records = pool.submit(clf.predict_records, TEXTS[:3]).result(PATIENCE)
    np.testing.assert_array_equal(found, expected)
    assert records == clf.predict_records(TEXTS[:3])
    again = pickle.loads(packed)
    assert again.get_params() == clf.get_params()
    assert again.classes_.tolist() == ["bad", "good"]
    with ThreadPoolExecutor(4) as pool:
        models = set(pool.map(lambda _: id(again._loaded()), range(8)))
    assert len(models) == 1
    np.testing.assert_array_equal(again.predict_proba(TEXTS), expected)
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(Classifier(head))).predict(TEXTS)


def test_records_are_what_the_command_line_writes(spin, head, tmp_path):
    long = "a great film " * 20_000
    source = tmp_path / "in.jsonl"
    texts = [*TEXTS, long]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    abstains = Path(shutil.copytree(head, tmp_path / "head"))
    probs = Classifier.load(head).predict_proba(texts)
    limit = float(np.median(probs.max(1)))
    rewrite_head(abstains, abstain_below=limit)
    for folder, options, given in (
        (head, {}, ()),
        (abstains, {}, ()),
        (abstains, {"threshold": 0.0}, ("--threshold", 0.0)),
        (head, {"threshold": limit}, ("--threshold", limit)),
    ):
        clf = Classifier.load(folder, **options)
        found = clf.predict_records(texts)
        expected = json_lines(spin("predict", folder, source, *given).out)
        assert [f.label for f in found] == clf.predict(texts).tolist()
        np.testing.assert_array_equal([list(f.probs.values()) for f in found], probs)
        for one, line in zip(found, expected, strict=True):
            assert (one.id, one.label, one.truncated) == tuple(
                line[key] for key in ("id", "label", "truncated")
            )
            assert one.abstained == line.get("abstained")
            assert one.prob == pytest.approx(line["prob"], abs=1e-6)
    assert [f.truncated for f in found] == [False] * 20 + [True]
    assert [f.abstained for f in found] == (probs.max(1) < limit).tolist()
    assert {f.abstained for f in found} == {True, False}
    assert clf.predict_records([]) == []
    with pytest.raises(DataError, match="item 1: an empty text"):
        clf.predict_records(["a film", ""])
    with pytest.raises(UsageError, match="threshold"):
        Classifier.load(head, threshold=1.5)


REFUSED = {
    "an empty text": ["", "   \n", "\u00a0\u2003"],
    "a NUL character": ["a\0b"],
    "surrogate": ["half \ud83d of it"],
    "5,000,000 characters": ["ab cd" * 1_000_000],
}


@pytest.mark.parametrize(("what", "text"), [(k, text) for k in REFUSED for text in REFUSED[k]])
def test_the_classifier_refuses_what_the_command_line_refuses(spin, head, tmp_path, what, text):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("good", text)))
    done = spin("predict", head, source)
    assert done.code == 3
    assert what in done.err
    with pytest.raises(DataError, match=f"item 1: .*{what}"):
        Classifier.load(head).predict_proba(["good", text])


@pytest.mark.parametrize("value", [None, float("nan"), 3, b"text", ["a text"], np.array(["a"])])
def test_an_item_that_is_no_text_is_refused(head, value):
    with pytest.raises(DataError, match=f"item 1: {type(value).__name__}, where a text"):
        Classifier.load(head).predict(["good", value])


@pytest.mark.parametrize("value", [None, 5, 0.5, True])
def test_what_holds_no_texts_is_refused(head, value):
    with pytest.raises(DataError, match=f"^{type(value).__name__}, where a list of texts"):
        Classifier.load(head).predict_proba(value)


def test_a_classifier_hands_free_pages_back_and_sets_nothing(head, monkeypatch):
    called = []
    found = lambda name: lambda *values: called.append((name, *values))  # noqa: E731
    monkeypatch.setattr(heap, "_find", found)
    before = dict(os.environ)
    clf = Classifier.load(head)
    clf.predict(["a film"])
    assert not called
    for _ in range(2):
        clf.predict(["a film " * 250] * 10)
    assert called == [("malloc_trim", 0)]
    assert dict(os.environ) == before


def test_a_table_is_no_list_of_texts(head):
    with pytest.raises(DataError, match="2 dimensions"):
        Classifier.load(head).predict(np.array([["a text"], ["another"]]))


def test_a_text_of_too_many_tokens_is_named_by_its_place_among_all(tmp_path):
    made = make_head(save_model(tmp_path / "m", "llama"), tmp_path / "head", ["layer_01"])
    reading = load_head(made).reading | {"long": "error", "max_length": 4}
    rewrite_head(made, reading=reading)
    with pytest.raises(DataError, match=r"^item 600\b.* tokens"):
        Classifier.load(made).predict(["good"] * 600 + ["a very very good film"])
    with pytest.raises(DataError, match=r"^item 1\b.* tokens"):
        prediction.open_predictor(made, PredictConfig()).encode(["good", "a very very good film"])


def test_the_package_brings_torch_only_when_asked():
    code = (
        "import sys, spin_cli; assert 'torch' not in sys.modules; assert spin_cli.__version__;"
        "from spin_cli import Classifier; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- reasons ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_contributions_and_bias_add_up_to_the_logit(head, tmp_path, classes):
    folder = head if classes == 2 else three_classes(head, tmp_path / "head")
    predictor = prediction.open_predictor(folder, PredictConfig())
    values, _ = predictor.features(TEXTS)
    probs = predictor.classify(values)
    labels = predictor.decide(probs)
    terms, bias = contributions(predictor.head, values, labels)
    logits = terms.sum(1) + bias
    weight, offset = predictor.head.weight.astype(np.float64), predictor.head.bias
    for row, label in enumerate(labels):  # the long way
        each = [sum(w * float(x) for w, x in zip(weight[k], values[row], strict=True)) + offset[k]
                for k in range(len(weight))]  # fmt: skip
        expected = each[label] if classes == 3 else each[0] * (1 if label else -1)
        assert logits[row] == pytest.approx(expected, abs=1e-9)
        if classes == 2:
            assert probs[row, label] == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-12)
    config = PredictConfig(explain=4)
    for reasons in explain(predictor, predictor.encode(TEXTS), values, labels, config):
        named = sum(reason.contribution for reason in reasons.neurons)
        assert named + reasons.rest + reasons.bias == pytest.approx(reasons.logit, abs=1e-9)
    everything = PredictConfig(explain=predictor.head.neurons)
    for reasons in explain(predictor, predictor.encode(TEXTS), values, labels, everything):
        assert reasons.rest == pytest.approx(0, abs=1e-9)
        found = [reason.contribution for reason in reasons.neurons]
        assert found == sorted(found, reverse=True)


def test_tokens_are_those_behind_the_pooled_value(head):
    predictor = prediction.open_predictor(head, PredictConfig())
    texts = [*TEXTS[:2], "film " * 40]
    encoded = predictor.encode(texts)
    values = predictor.rounded(predictor.gather(encoded))
    labels = predictor.decide(predictor.classify(values))
    config = PredictConfig(explain=predictor.head.neurons, explain_tokens=True)
    weight = predictor.head.weight[0]
    at = {}
    start = 0
    for feature in predictor.head.features:
        for j in feature.neurons.tolist():
            at[feature.layer, feature.site.value, feature.pooling.value, j] = start
            start += 1
    for row, reasons in enumerate(explain(predictor, encoded, values, labels, config)):
        states = {}
        read_states(
            predictor.model, [encoded[row].ids], list(predictor.wanted),
            lambda layer, site, s, states=states: states.update({(layer, site.value): s[0]}),
        )  # fmt: skip
        places = {(la, s.value, po.value): p for (la, s, po), p in predictor.places.items()}
        pieces = predictor.model.tokenizer.convert_ids_to_tokens(encoded[row].ids)
        for reason in reasons.neurons:
            key = (reason.layer, reason.site, reason.pooling, reason.neuron)
            place = places[key[:3]]
            line = states[key[:2]][:, place.picked[at[key] - place.columns.start]]
            first = reason.tokens[0]
            assert pieces[first.position] == first.text
            assert first.value == pytest.approx(float(line[first.position]), abs=1e-5)
            if reason.pooling == Pooling.MAX.value:
                assert first.value == pytest.approx(float(line.max()), abs=1e-5)
                assert len(reason.tokens) == 1
            elif reason.pooling == Pooling.MEAN.value:
                sign = np.sign(weight[at[key]]) * (1 if labels[row] else -1)
                top = torch.topk(line * sign, 3).values * sign
                assert [t.value for t in reason.tokens] == pytest.approx(top.tolist(), abs=1e-5)


def test_reasons_are_written(spin, head):
    done = spin("predict", head, "-", "--explain-tokens", "--explain", "2", stdin=b"a great film")
    why = json_lines(done.out)[0]["why"]
    assert len(why["neurons"]) == 2
    total = sum(n["contribution"] for n in why["neurons"]) + why["rest"] + why["bias"]
    assert total == pytest.approx(why["logit"], abs=1e-5)
    assert all(n["tokens"][0]["text"] for n in why["neurons"])


# -- the early exit, by the command line -----------------------------------------------------


def test_check_exit_agrees_and_tells_when_it_does_not(spin, head, monkeypatch):
    stdin = "\n".join(TEXTS).encode()
    done = spin("predict", head, "-", "--check-exit", "8", stdin=stdin)
    assert done.code == 0, done.err
    assert "8 rows agree" in done.err
    assert len(json_lines(done.out)) == 20
    real = prediction.exits.open_predictor

    def other(folder, config, *, whole=False):
        found = real(folder, config, whole=whole)
        if whole:
            with torch.no_grad():
                found.model.model.encoder.layer[0].output.dense.weight *= 1.1
        return found

    monkeypatch.setattr(prediction.exits, "open_predictor", other)
    done = spin("predict", head, "-", "--check-exit", "8", stdin=stdin)
    assert done.code == 5
    assert "--check-exit: layer_0" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("dtype", list(StorageDtype))
def test_neurons_are_rounded_as_they_are_stored(head, dtype):
    predictor = prediction.open_predictor(head, PredictConfig())
    predictor = replace(predictor, head=replace(predictor.head, storage_dtype=dtype))
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(50, 40)) * 10.0 ** rng.integers(-7, 4, (50, 40))).astype(np.float32)
    expected = from_disk(to_disk(values, dtype), dtype)
    np.testing.assert_array_equal(predictor.rounded(values), expected.astype(np.float32))


def flawed_bert(
    folder: Path, value: float = 0.0, word: str = "[UNK]", embedded: float = 0.0
) -> Path:
    """A head on a BERT of which a neuron that it reads has the bias *value*, and of whose word
    the embedding is *embedded*."""
    made = make_head(
        save_model(folder / "m", "bert"), folder / "head", ["layer_01"], ("a", "b", "c")
    )
    model = backbone.load(ModelConfig(str(folder / "m")))
    neuron = int(load_file(made / "head.safetensors")["neurons.layer_01.ffn.mean"][3])
    model.model.encoder.layer[0].intermediate.dense.bias.data[neuron] = value
    token = model.tokenizer.convert_tokens_to_ids(word)
    model.model.embeddings.word_embeddings.weight.data[token] = embedded
    model.model.save_pretrained(folder / "m")
    identity = backbone.identify(ModelConfig(str(folder / "m")))[1]
    return rewrite_head(made, storage_dtype=StorageDtype.FLOAT16, model=identity)


def rewrite_head(folder: Path, **changes) -> Path:
    """Change fields of a head that was made by `make_head`."""
    save_head(folder, replace(load_head(folder), **changes))
    (folder / artifacts.MANIFEST).unlink()
    artifacts.write_manifest(folder, "head", {})
    return folder


def test_what_float16_cannot_hold_is_what_extract_makes_of_it(head):
    predictor = prediction.open_predictor(head, PredictConfig())
    float16 = replace(predictor.head, storage_dtype=StorageDtype.FLOAT16)
    predictor = replace(predictor, head=float16)
    large = [65_503.0, 65_519.0, 65_521.0, 70_000.0, 3e38, np.inf]
    values = np.array([[*large, *(-value for value in large)]], np.float32)
    stored = to_disk(values, StorageDtype.FLOAT16)
    feature = Feature("layer_01", Site.FFN, Pooling.MEAN, values.shape[1])
    settle_overflow(stored, feature, 0, StorageDtype.FLOAT16, "float32")
    assert np.abs(stored).max() == 65_504
    np.testing.assert_array_equal(predictor.rounded(values), stored.astype(np.float32))


def test_a_text_whose_neuron_overflows_float16_has_probabilities(spin, tmp_path):
    folder = flawed_bert(tmp_path, 2e5)
    done = spin("predict", folder, "-", stdin=b"a great film\nno")
    assert done.code == 0, done.err
    predictor = prediction.open_predictor(folder, PredictConfig())
    values = predictor.gather(predictor.encode(["a great film", "no"]))
    assert values.max() > 65_504
    held = np.clip(values, -65_504, 65_504).astype(np.float16).astype(np.float64)
    logits = held @ predictor.head.weight.T.astype(np.float64) + predictor.head.bias
    powers = np.exp(logits - logits.max(1, keepdims=True))
    expected = powers / powers.sum(1, keepdims=True)
    found = [list(record["probs"].values()) for record in json_lines(done.out)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("options", [(), ("--check-exit", "2")])
def test_nan_from_the_model_is_an_error_and_no_answer(spin, tmp_path, options):
    folder = flawed_bert(tmp_path, word="again", embedded=np.nan)
    done = spin("predict", folder, "-", *options, stdin=b"good\nthen again")
    assert done.code == 5
    assert not done.out
    place = "" if options else "<stdin>, line 2: "
    assert re.search(rf"error: {place}layer_01 ffn mean neuron \d+ is nan, computed in", done.err)


def test_infinity_computed_in_float16_is_an_error(head):
    predictor = prediction.open_predictor(head, PredictConfig())
    predictor = replace(predictor, model=replace(predictor.model, dtype=torch.float16))
    values = np.zeros((3, predictor.head.neurons), np.float32)
    values[2, 1] = np.inf
    with pytest.raises(ModelError, match=r"^third: .* is inf, computed in float16"):
        predictor.rounded(values, ["first", "second", "third"])


def test_a_head_of_a_pickled_model_predicts_where_that_is_allowed(spin, tmp_path):
    folder = save_model(tmp_path / "m", "bert")
    head = make_head(folder, tmp_path / "head", ["layer_01"])
    expected = spin("predict", head, "-", stdin=b"the film was good")
    weights = MODELS["bert"][0].from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    identity = backbone.identify(ModelConfig(str(folder), allow_pickle=True))[1]
    rewrite_head(head, model=identity)
    refused = spin("predict", head, "-", stdin=b"the film was good")
    assert refused.code == 5
    assert "Give --allow-pickle" in refused.err
    done = spin("predict", head, "-", "--allow-pickle", stdin=b"the film was good")
    assert done.code == 0, done.err
    assert done.out == expected.out


def test_a_classifier_is_told_where_its_adapter_lies_now(tmp_path):
    folder = save_model(tmp_path / "m", "llama")
    adapter = save_adapter(tmp_path / "adapter", "llama", KINDS["lora"](["q_proj"]), bare=True)
    made = make_head(folder, tmp_path / "head", ["layer_01"])
    options = ModelConfig(str(folder), adapter=str(adapter))
    identity = backbone.identify(options)[1]
    rewrite_head(made, model=identity, reading=artifacts.to_plain(options))
    expected = Classifier.load(made).predict_proba(["a film"])
    moved = adapter.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="adapter"):
        Classifier.load(made)
    np.testing.assert_array_equal(
        Classifier.load(made, adapter=moved).predict_proba(["a film"]), expected
    )


def test_a_classifier_hands_on_where_the_model_is_to_lie(head, monkeypatch):
    asked = []

    def look(options, *, depth=None):
        asked.append(options)
        raise ModelError("enough")

    monkeypatch.setattr(backbone, "load", look)
    with pytest.raises(ModelError, match="enough"):
        Classifier.load(head, device_map="auto")
    assert asked[0].device_map == "auto"


def test_parameters_that_are_set_are_used(head):
    texts = ["a great film", "an awful meal", "It was fine."]
    clf = Classifier.load(head, device="cpu", decision_thresholds={"good": 0.0})
    assert clf.predict(texts).tolist() == ["good"] * 3
    clf.set_params(decision_thresholds={"good": 1.0})
    assert clf.predict(texts).tolist() == ["bad"] * 3
    assert pickle.loads(pickle.dumps(clf)).predict(texts).tolist() == ["bad"] * 3
    loaded = clf.predictor_
    clf.predict(texts)
    assert clf.predictor_ is loaded  # once
    for wrong in (0.5, {"good": "a"}, {"fine": 0.5}):
        with pytest.raises(UsageError, match="decision threshold"):
            clf.set_params(decision_thresholds=wrong).predict(texts)
