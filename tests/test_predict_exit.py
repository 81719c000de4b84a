"""The early exit: only what a head reads is built and run, and gives what the whole model gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    FalconConfig,
    FalconModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    ModernBertConfig,
    ModernBertModel,
    OPTConfig,
    OPTModel,
    Phi3Config,
    Phi3Model,
)

from spin_cli import backbone
from spin_cli.backbone.partial import Nothing, depth_for, narrow
from spin_cli.choices import Pooling, Site
from spin_cli.config import ModelConfig
from tests import test_backbone as made
from tests.test_backbone import TEXTS, save_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 32}
NO_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
MORE = {
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(**SMALL, **NO_ENDS, intermediate_size=48, cls_token_id=1, sep_token_id=1),
    ),
    "phi3": (Phi3Model, Phi3Config(**SMALL, **NO_ENDS, intermediate_size=48)),
    "gptneox": (GPTNeoXModel, GPTNeoXConfig(**SMALL, **NO_ENDS, intermediate_size=48)),
    "falcon": (FalconModel, FalconConfig(**SMALL, **NO_ENDS, ffn_hidden_size=48)),
    "opt": (
        OPTModel,
        OPTConfig(**SMALL, **NO_ENDS, ffn_dim=48, word_embed_proj_dim=32),
    ),
    "albert": (AlbertModel, AlbertConfig(**SMALL, **NO_ENDS, intermediate_size=48)),
    "bart": (
        BartModel,
        BartConfig(
            vocab_size=32, d_model=32, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=48,
            decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, **NO_ENDS,
            decoder_start_token_id=1, forced_eos_token_id=1,
        ),
    ),
}  # fmt: skip
POOLINGS = (Pooling.MEAN, Pooling.LAST)


@pytest.fixture(autouse=True)
def more_models(monkeypatch):
    for name, (model, config) in MORE.items():
        monkeypatch.setitem(made.MODELS, name, (model, config, None))


def read_all(loaded, wanted):
    encoded = backbone.encode(loaded, TEXTS)
    found = {}
    backbone.read(
        loaded, [e.ids for e in encoded], wanted, lambda *item: found.update({item[:3]: item[3]})
    )
    return found


@pytest.mark.parametrize(
    ("name", "layer", "narrows"),
    [
        ("bert", "layer_02", True), ("gpt2", "layer_02", True), ("llama", "layer_03", True),
        ("gemma3", "layer_01", True), ("modernbert", "layer_02", True), ("phi3", "layer_02", True),
        ("gptneox", "layer_02", True), ("falcon", "layer_02", True), ("opt", "layer_01", True),
        ("t5", "encoder_01", True), ("t5", "decoder_02", True), ("bart", "encoder_02", True),
        ("bart", "decoder_01", True), ("albert", "layer_02", False),
    ],
)  # fmt: skip
def test_the_selected_rows_alone_give_the_selected_neurons(tmp_path, name, layer, narrows):
    folder = save_model(tmp_path / name, name)
    whole = backbone.load(ModelConfig(str(folder)))
    below = layer.replace("02", "01").replace("03", "02")
    wanted = {(layer, Site.FFN): POOLINGS}
    if below != layer:
        wanted[below, Site.HIDDEN] = POOLINGS
    full = read_all(whole, wanted)
    part = backbone.load(ModelConfig(str(folder)), depth=depth_for([layer]))
    stack = part.layout.stacks[-1]
    neurons = np.array([1, 5, 8, 40, 47], np.int32)
    assert narrow(part.model, stack, neurons) is narrows
    found = read_all(part, wanted)
    for key, vectors in full.items():
        expected = vectors[:, neurons] if narrows and key[0] == layer else vectors
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5, msg=str(key))
    if narrows:
        assert isinstance(part.model.get_submodule(stack.sites[Site.FFN][-1].path), Nothing)
        widths = [m.out_features for m in part.model.modules() if type(m) is nn.Linear]
        assert set(widths) & {len(neurons), 2 * len(neurons)}


class Mixing(nn.Module):
    """An FFN that shuffles its neurons, so that rows and neurons do not belong together."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.up_proj, self.down_proj = inner.up_proj, inner.down_proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(states)).flip(-1))


def test_a_block_whose_neurons_are_not_its_rows_stays_whole(tmp_path):
    loaded = backbone.load(ModelConfig(str(save_model(tmp_path / "l", "llama"))))
    last = loaded.model.layers[-1]
    last.mlp = Mixing(last.mlp)
    before = dict(loaded.model.named_parameters())
    assert not narrow(loaded.model, loaded.layout.stacks[0], np.array([1, 5], np.int32))
    after = dict(loaded.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)


def test_a_head_of_encoder_layers_loads_no_decoder(tmp_path):
    for name in ("t5", "bart"):
        folder = save_model(tmp_path / name, name)
        whole = backbone.load(ModelConfig(str(folder)))
        part = backbone.load(ModelConfig(str(folder)), depth=depth_for(["encoder_01"]))
        names = [key for key, _ in part.model.named_parameters()]
        assert not any("decoder" in key for key in names)
        assert [stack.prefix for stack in part.layout.stacks] == ["encoder"]
        assert part.layout.stacks[0].depth == 1
        assert sum(p.numel() for p in part.model.parameters()) < 0.5 * sum(
            p.numel() for p in whole.model.parameters()
        )
        assert part.identity == whole.identity


@pytest.mark.parametrize(
    ("layers", "depth"),
    [
        (["layer_03", "layer_00"], 3),
        (["layer_00"], 1),
        (["layer_02", "final"], None),
        (["encoder_02", "encoder_01"], {"encoder": 2, "decoder": 0}),
        (["encoder_02", "encoder_final"], {"encoder": None, "decoder": 0}),
        (["encoder_02", "decoder_01"], {"encoder": None, "decoder": 1}),
        (["decoder_final"], {"encoder": None, "decoder": None}),
    ],
)
def test_depth_is_what_the_layers_need(layers, depth):
    assert depth_for(layers) == depth
