"""Stored vectors against an independent plain loop: one text at a time, no padding, no batching.

The loop runs transformers' own ``output_hidden_states`` for hidden states and a hand-placed hook on
the down projection, named here for each architecture, so that it shares no code with spin.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from spin_cli import backbone
from spin_cli.backbone.batching import HALF_OVERHEAD, OVERHEAD
from spin_cli.choices import Dtype, Long, Pooling, Side, Site
from spin_cli.config import ModelConfig
from spin_cli.errors import DataError, ModelError

WORDS = "the a film was not very good bad at all but I liked it never dull and then again".split()  # noqa: SIM905
TEXTS = [
    "the film was not good",
    "a",
    "I liked it",
    "never dull and then again a bad film but not at all bad and I liked it all the very film",
    "bad",
    "it was good",
    "the a film was not very good bad at all but I liked it never dull and then again",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 32}
ALL = tuple(Pooling)

MODELS = {
    "bert": (BertModel, BertConfig(**SIZES, intermediate_size=48), "encoder.layer.{}.output.dense"),
    "gpt2": (
        GPT2Model,
        GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=48, vocab_size=32),
        "h.{}.mlp.c_proj",
    ),
    "llama": (LlamaModel, LlamaConfig(**SIZES, intermediate_size=48), "layers.{}.mlp.down_proj"),
    "gemma3": (
        Gemma3TextModel,
        Gemma3TextConfig(
            **SIZES, intermediate_size=48, head_dim=8, num_key_value_heads=2, sliding_window=4
        ),
        "layers.{}.mlp.down_proj",
    ),
    "t5": (
        T5Model,
        T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=32),
        None,
    ),
}


def save_model(folder, name: str, padding_side: str = "right"):
    """A random model with a word-level tokenizer, as a saved folder."""
    torch.manual_seed(0)
    model_class, config, _ = MODELS[name]
    model = model_class(config).eval()
    for parameter in model.parameters():  # default initialisation is too small to tell tokens apart
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, padding_side)
    return folder


def save_tokenizer(folder, padding_side: str = "right"):
    """A word-level tokenizer beside a saved model."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[BOS]", "[UNK]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]",
        padding_side=padding_side,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def spin_features(folder, texts, wanted_sites=(Site.HIDDEN, Site.FFN), **options):
    """(layer, site, pooling) -> (n, F), through spin."""
    loaded = backbone.load(ModelConfig(str(folder), **options))
    layout = loaded.layout
    wanted = {
        (layer, site): ALL
        for layer in layout.layers
        for site in wanted_sites
        if layout.width(layer, site)
    }
    encoded = backbone.encode(loaded, texts)
    out: dict = {}
    for batch in backbone.plan_batches([len(e.ids) for e in encoded], 64):

        def sink(layer, site, pooling, vectors, at=batch):
            table = out.setdefault(
                (layer, site, pooling), torch.full((len(texts), vectors.shape[1]), torch.nan)
            )
            table[at] = vectors

        backbone.read(loaded, [encoded[row].ids for row in batch], wanted, sink)
    return loaded, out


def pooled(states: torch.Tensor) -> dict[Pooling, torch.Tensor]:
    """The four poolings of one text's (T, F) vectors, one token after the other."""
    total, top = torch.zeros(states.shape[1]), torch.full((states.shape[1],), -torch.inf)
    for vector in states:
        total = total + vector
        top = torch.maximum(top, vector)
    return {
        Pooling.MEAN: total / len(states),
        Pooling.MAX: top,
        Pooling.LAST: states[-1],
        Pooling.FIRST: states[0],
    }


def plain_loop(folder, name, texts):
    """The same features, one unpadded text at a time."""
    model = MODELS[name][0].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "t5":
        paths = {
            f"{stack}_{index + 1:02d}": f"{stack}.block.{index}.layer.{last}.DenseReluDense.wo"
            for stack, last in (("encoder", 1), ("decoder", 2))
            for index in range(2)
        }
        blocks = {
            f"{s}_{i + 1:02d}": f"{s}.block.{i}" for s in ("encoder", "decoder") for i in range(2)
        }
    else:
        paths = {f"layer_{i + 1:02d}": MODELS[name][2].format(i) for i in range(3)}
        list_name = MODELS[name][2].split(".{}")[0]
        blocks = {f"layer_{i + 1:02d}": f"{list_name}.{i}" for i in range(3)}
    caught: dict = {}

    def first(value):
        return value if isinstance(value, torch.Tensor) else value[0]

    for layer, path in paths.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, key=(layer, Site.FFN): caught.__setitem__(key, args[0])
        )
    for layer, path in blocks.items():
        model.get_submodule(path).register_forward_hook(
            lambda _m, _a, o, key=(layer, Site.HIDDEN): caught.__setitem__(key, first(o))
        )
    out: dict = {}
    for text in texts:
        caught.clear()
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            if name == "t5":
                got = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
                caught["encoder_00", Site.HIDDEN] = got.encoder_hidden_states[0]
                caught["decoder_00", Site.HIDDEN] = got.decoder_hidden_states[0]
                caught["encoder_final", Site.HIDDEN] = got.encoder_last_hidden_state
                caught["decoder_final", Site.HIDDEN] = got.last_hidden_state
            else:
                got = model(input_ids=ids, output_hidden_states=True)
                caught["layer_00", Site.HIDDEN] = got.hidden_states[0]
                if name != "bert":
                    caught["final", Site.HIDDEN] = got.last_hidden_state
        for (layer, site), states in caught.items():
            for pooling, vector in pooled(states[0]).items():
                out.setdefault((layer, site, pooling), []).append(vector)
    return {key: torch.stack(vectors) for key, vectors in out.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", list(MODELS))
def test_features_equal_a_plain_loop_over_single_texts(tmp_path, name, side):
    folder = save_model(tmp_path / name, name, side)
    _, found = spin_features(folder, TEXTS)
    expected = plain_loop(folder, name, TEXTS)
    assert set(found) == set(expected)
    for key, vectors in expected.items():
        torch.testing.assert_close(found[key], vectors, rtol=1e-5, atol=1e-5, msg=str(key))


def test_causal_and_bidirectional_models_are_told_apart(tmp_path):
    assert backbone.load(ModelConfig(str(save_model(tmp_path / "g", "gpt2")))).layout.causal
    assert not backbone.load(ModelConfig(str(save_model(tmp_path / "b", "bert")))).layout.causal


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3"])
def test_a_shortened_model_gives_the_same_vectors_and_has_no_further_blocks(tmp_path, name):
    folder = save_model(tmp_path / name, name)
    whole, full = spin_features(folder, TEXTS)
    part = backbone.load(ModelConfig(str(folder)), depth=2)
    assert part.layout.stacks[0].depth == 2
    count = sum(p.numel() for p in part.model.parameters())
    assert count < sum(p.numel() for p in whole.model.parameters())
    assert part.identity == whole.identity
    got = {}
    wanted = {("layer_02", Site.FFN): (Pooling.MEAN,)}
    encoded = backbone.encode(part, TEXTS[:1])
    backbone.read(part, [encoded[0].ids], wanted, lambda *item: got.update({item[:3]: item[3]}))
    key = ("layer_02", Site.FFN, Pooling.MEAN)
    torch.testing.assert_close(got[key], full[key][:1], rtol=1e-5, atol=1e-6)


def test_the_pass_stops_behind_the_last_vector_that_is_wanted(tmp_path):
    loaded = backbone.load(ModelConfig(str(save_model(tmp_path / "l", "llama"))))
    ran = []
    for index, layer in enumerate(loaded.model.layers):
        layer.register_forward_hook(lambda *_a, index=index: ran.append(index))
        layer.mlp.down_proj.register_forward_hook(
            lambda *_a, index=index: ran.append(f"down{index}")
        )
    wanted = {("layer_02", Site.FFN): (Pooling.LAST,)}
    backbone.read(loaded, [[1, 5, 6]], wanted, lambda *_a: None)
    assert ran == ["down0", 0]  # block 2 was broken off in front of its down projection


def test_long_texts_are_cut_but_keep_their_special_token(tmp_path):
    folder = save_model(tmp_path / "b", "bert")
    text = " ".join(WORDS)
    right = backbone.load(ModelConfig(str(folder), max_length=6))
    whole = backbone.load(ModelConfig(str(folder)))
    ids = backbone.encode(whole, [text])[0].ids
    cut = backbone.encode(right, [text, "a"])
    assert cut[0].ids == ids[:6] and cut[0].truncated and not cut[1].truncated
    left = backbone.load(ModelConfig(str(folder), max_length=6, truncation_side=Side.LEFT))
    assert backbone.encode(left, [text])[0].ids == [ids[0], *ids[-5:]]
    strict = backbone.load(ModelConfig(str(folder), max_length=6, long=Long.ERROR))
    with pytest.raises(DataError, match=r"row 7: 20 tokens, the limit is 6"):
        backbone.encode(strict, [text], places=["row 7"])


def test_batches_cover_every_row_once_and_keep_to_the_budget():
    lengths = [3, 900, 17, 17, 3, 64, 5, 2000, 17] * 20
    batches = backbone.plan_batches(lengths, 1000)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= 1000


@pytest.mark.parametrize("share", [OVERHEAD, HALF_OVERHEAD])
def test_no_division_of_the_rows_costs_less_than_the_planned_one(share):
    def cost(parts):
        return sum(len(part) * max(part) + 3200 / share for part in parts)

    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 120, 9).tolist()
        planned = backbone.plan_batches(lengths, 3200, share)
        ordered = sorted(lengths, reverse=True)
        cuts = [c for n in range(9) for c in combinations(range(1, 9), n)]
        divisions = [[ordered[a:b] for a, b in pairwise([0, *cut, 9])] for cut in cuts]
        assert all(len(part) * max(part) <= 3200 for parts in divisions for part in parts)
        found = cost([[lengths[row] for row in batch] for batch in planned])
        assert found == min(map(cost, divisions))
        assert [max(lengths[row] for row in batch) for batch in planned] == sorted(
            (max(lengths[row] for row in batch) for batch in planned), reverse=True
        )


def test_half_precision_is_read_in_fewer_batches_on_a_cpu():
    full = backbone.load(ModelConfig("bundled:minilm", device="cpu"), depth=1)
    half = backbone.load(ModelConfig("bundled:minilm", device="cpu", dtype=Dtype.BFLOAT16), depth=1)
    assert (full.batch_tokens, half.batch_tokens) == (1024, 2048)
    lengths = [5, 9, 14, 20, 31] * 20
    plans = [backbone.plan_for(each, lengths) for each in (full, half)]
    assert plans[0] == backbone.plan_batches(lengths, 1024)
    assert len(plans[1]) < len(plans[0])
    assert sorted(row for batch in plans[1] for row in batch) == list(range(100))


def test_nothing_to_plan():
    assert backbone.plan_batches([], 100) == []


def test_weights_that_a_checkpoint_lacks_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "l", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, first layers\.1\.mlp\.up_proj"):
        backbone.load(ModelConfig(str(folder)))


def test_pickled_weights_are_refused(tmp_path):
    folder = save_model(tmp_path / "l", "llama")
    weights = MODELS["llama"][0].from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors") as caught:
        backbone.load(ModelConfig(str(folder)))
    assert "--allow-pickle" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "name", ["bundled:nothing", "./no/such/model", "/no/model.gguf", "no/hub-id"]
)
def test_models_that_cannot_be_found_are_refused(name):
    with pytest.raises(ModelError) as caught:
        backbone.load(ModelConfig(name))
    assert name in caught.value.message
