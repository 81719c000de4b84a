"""Every architecture against weights: what a block is fed, put through its own matrices by hand.

For each model one text at a time, unpadded, runs through transformers. The test catches only the
input of each block's FFN (or the router and experts) at a module named here, and recomputes the
vectors from the weights in plain torch; hidden states come from ``output_hidden_states``. spin
reads the same texts in one padded batch.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.nn import functional as F  # noqa: N812

from spin_cli.backbone.discovery import discover, probe_inputs
from spin_cli.backbone.hooks import hooked
from spin_cli.backbone.layout import Layout, summarise
from spin_cli.choices import Site
from spin_cli.errors import ModelError

H, N, L, V = 32, 48, 3, 40
TEXTS = [[3, 9, 27, 4, 12, 36, 31], [5, 8], [7, 21, 22, 23]]


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def linear(module, x):
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
    return F.linear(x, weight, module.bias)


def plain(up, act):
    """The FFN without a gate: (ffn, gate) from a module's input."""

    def compute(module, x):
        value = act(linear(module.get_submodule(up) if up else module, x))
        return value, value

    return compute


def gated(gate, up, act):
    def compute(module, x):
        first = act(linear(module.get_submodule(gate), x))
        return first * linear(module.get_submodule(up), x), first

    return compute


def fused(path, act):
    """Gate and up projection in one matrix, the gate first."""

    def compute(module, x):
        gate, up = linear(module.get_submodule(path), x).chunk(2, dim=-1)
        return act(gate) * up, act(gate)

    return compute


SWIGLU = gated("gate_proj", "up_proj", F.silu)
GEGLU = gated("gate_proj", "up_proj", gelu_new)
GPT = plain("c_fc", gelu_new)
PLAIN = {"hidden_size": H, "num_hidden_layers": L, "num_attention_heads": 4, "vocab_size": V}
BERT = PLAIN | {"intermediate_size": N}
LLAMA = BERT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {"head_dim": 8}
ENC, LAY, GPTH = "encoder.layer.{}", "layers.{}", "h.{}"

# name: model, configuration, block, module whose input is caught, formula on that module
TABLE = {
    "bert": ("Bert", BERT, ENC, "intermediate.dense", plain("", F.gelu)),
    "distilbert": (
        "DistilBert",
        {"dim": H, "hidden_dim": N, "n_layers": L, "n_heads": 4, "vocab_size": V},
        "transformer.layer.{}",
        "ffn.lin1",
        plain("", F.gelu),
    ),
    "roberta": (
        "Roberta",
        BERT | {"pad_token_id": 0},
        ENC,
        "intermediate.dense",
        plain("", F.gelu),
    ),
    "electra": (
        "Electra",
        BERT | {"embedding_size": 24},
        ENC,
        "intermediate.dense",
        plain("", F.gelu),
    ),
    "albert": (
        "Albert",
        BERT | {"embedding_size": 24},
        "encoder.albert_layer_groups.0.albert_layers.0",
        "ffn",
        plain("", gelu_new),
    ),
    "mpnet": ("MPNet", BERT | {"pad_token_id": 0}, ENC, "intermediate.dense", plain("", F.gelu)),
    "deberta-v2": ("DebertaV2", BERT, ENC, "intermediate.dense", plain("", F.gelu)),
    "modernbert": (
        "ModernBert",
        BERT
        | {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        LAY,
        "mlp",
        fused("Wi", F.gelu),
    ),
    "xlnet": (
        "XLNet",
        {
            "d_model": H,
            "n_layer": L,
            "n_head": 4,
            "d_inner": N,
            "vocab_size": V,
            "ff_activation": "gelu",
        },
        "layer.{}",
        "ff",
        plain("layer_1", F.gelu),
    ),
    "gpt2": (
        "GPT2",
        {"n_embd": H, "n_layer": L, "n_head": 4, "n_inner": N, "vocab_size": V},
        GPTH,
        "mlp",
        GPT,
    ),
    "gpt-neo": (
        "GPTNeo",
        {
            "hidden_size": H,
            "num_layers": L,
            "num_heads": 4,
            "intermediate_size": N,
            "vocab_size": V,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 3,
        },
        GPTH,
        "mlp",
        GPT,
    ),
    "gpt-neox": ("GPTNeoX", BERT, LAY, "mlp", plain("dense_h_to_4h", F.gelu)),
    "gpt-j": (
        "GPTJ",
        {"n_embd": H, "n_layer": L, "n_head": 4, "n_inner": N, "vocab_size": V, "rotary_dim": 4},
        GPTH,
        "mlp",
        plain("fc_in", gelu_new),
    ),
    "opt": (
        "OPT",
        {
            "hidden_size": H,
            "num_hidden_layers": L,
            "num_attention_heads": 4,
            "ffn_dim": N,
            "vocab_size": V,
            "word_embed_proj_dim": H,
        },
        "decoder.layers.{}",
        "fc1",
        plain("", F.relu),
    ),
    "bloom": (
        "Bloom",
        {"hidden_size": H, "n_layer": L, "n_head": 4, "vocab_size": V},
        GPTH,
        "mlp",
        plain("dense_h_to_4h", gelu_new),
    ),
    "falcon": (
        "Falcon",
        PLAIN | {"ffn_hidden_size": N},
        GPTH,
        "mlp",
        plain("dense_h_to_4h", F.gelu),
    ),
    "phi": ("Phi", BERT, LAY, "mlp", plain("fc1", gelu_new)),
    "phi3": ("Phi3", LLAMA, LAY, "mlp", fused("gate_up_proj", F.silu)),
    "llama": ("Llama", LLAMA, LAY, "mlp", SWIGLU),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 3}, LAY, "mlp", SWIGLU),
    "qwen2": ("Qwen2", LLAMA, LAY, "mlp", SWIGLU),
    "qwen3": ("Qwen3", LLAMA | HEAD, LAY, "mlp", SWIGLU),
    "gemma2": ("Gemma2", LLAMA | HEAD | {"sliding_window": 3}, LAY, "mlp", GEGLU),
    "gemma3": ("Gemma3Text", LLAMA | HEAD | {"sliding_window": 3}, LAY, "mlp", GEGLU),
    "olmo2": ("Olmo2", LLAMA, LAY, "mlp", SWIGLU),
    "granite": ("Granite", LLAMA | {"residual_multiplier": 0.5}, LAY, "mlp", SWIGLU),
    "starcoder2": ("Starcoder2", LLAMA, LAY, "mlp", GPT),
    "cohere": ("Cohere", LLAMA, LAY, "mlp", SWIGLU),
    "smollm3": ("SmolLM3", LLAMA, LAY, "mlp", SWIGLU),
    "nemotron": ("Nemotron", LLAMA, LAY, "mlp", plain("up_proj", lambda x: F.relu(x) ** 2)),
}


def build(name, config):
    torch.manual_seed(0)
    model_class = getattr(tf, f"{name}Model")
    config_class = getattr(tf, f"{name}Config")
    model = model_class(config_class(**config)).eval()
    for parameter in model.parameters():  # the default is too small to tell tokens apart
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model.requires_grad_(False)


def read_batch(model, layout: Layout) -> dict[tuple[str, Site], torch.Tensor]:
    """All vectors of all texts in one right-padded batch, through spin's own hooks."""
    width = max(map(len, TEXTS))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in TEXTS])
    inputs = probe_inputs(model, ids) | {"attention_mask": mask}
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = mask
    out: dict = {}
    for stack in layout.stacks:

        def take(layer, site, states):
            assert (layer, site) not in out
            out[layer, site] = states.clone()

        with hooked(model, stack, len(TEXTS), width, take, tuple(Site)):
            model(**inputs)
    return out


def catch(model, paths):
    """Hooks that note, call after call, the first input of each module."""
    seen: list = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((m, args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        for path in dict.fromkeys(paths)
    ]
    return seen, handles


def compare(found, key, row, expected):
    """One text's vectors in the batch against the (T, F) truth."""
    got = found[key][row, : len(TEXTS[row])]
    expected = expected.reshape(-1, expected.shape[-1])
    torch.testing.assert_close(
        got, expected.to(got.dtype), rtol=2e-4, atol=2e-4, msg=lambda m: f"{key} text {row}: {m}"
    )


@pytest.mark.parametrize("name", list(TABLE))
def test_vectors_equal_a_forward_by_hand(name):
    family, config, block, inside, formula = TABLE[name]
    model = build(family, config)
    layout = discover(model)
    stack = layout.stacks[0]
    assert stack.depth == L
    found = read_batch(model, layout)
    seen, handles = catch(model, [f"{block.format(i)}.{inside}" for i in range(L)])
    for row, text in enumerate(TEXTS):
        seen.clear()
        states = model(input_ids=torch.tensor([text]), output_hidden_states=True)
        assert len(seen) == L
        hidden = states.hidden_states
        for index in range(L):
            module, x = seen[index]
            ffn, gate = formula(module, x)
            compare(found, (f"layer_{index + 1:02d}", Site.FFN), row, ffn)
            compare(found, (f"layer_{index + 1:02d}", Site.GATE), row, gate)
        for index in range(L):
            compare(found, (f"layer_{index:02d}", Site.HIDDEN), row, hidden[index])
        last = "final" if stack.has_final else f"layer_{L:02d}"
        compare(found, (last, Site.HIDDEN), row, states[0])
    for handle in handles:
        handle.remove()


def rms_norm(module, x):
    return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def shifted_rms_norm(module, x):
    return (1 + module.weight) * x / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()


def layer_norm(module, x):
    shifted = x - x.mean(-1, keepdim=True)
    scale = (shifted.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return module.weight * shifted / scale + module.bias


FINAL_NORMS = {
    "llama": ("norm", rms_norm),
    "qwen3": ("norm", rms_norm),
    "gemma3": ("norm", shifted_rms_norm),
    "gpt2": ("ln_f", layer_norm),
    "gpt-neox": ("final_layer_norm", layer_norm),
    "opt": ("decoder.final_layer_norm", layer_norm),
}


@pytest.mark.parametrize("name", list(FINAL_NORMS))
def test_the_last_block_is_read_before_the_final_norm(name):
    path, norm = FINAL_NORMS[name]
    model = build(*TABLE[name][:2])
    module = model.get_submodule(path)
    torch.nn.init.uniform_(module.weight, 0.5, 2.0)  # else it does hardly anything
    found = read_batch(model, discover(model))
    raw, final = found[f"layer_{L:02d}", Site.HIDDEN], found["final", Site.HIDDEN]
    assert (raw - final).abs().max() > 0.1
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(
            norm(module, raw[row, : len(text)]), final[row, : len(text)], rtol=1e-4, atol=1e-4
        )


SEQ2SEQ = {
    "t5": (
        "T5",
        {"d_model": H, "d_ff": N, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": V},
        "{}.block.{}.layer.{}.DenseReluDense",
        plain("wi", F.relu),
    ),
    "flan-t5": (
        "T5",
        {
            "d_model": H,
            "d_ff": N,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": V,
            "feed_forward_proj": "gated-gelu",
        },
        "{}.block.{}.layer.{}.DenseReluDense",
        gated("wi_0", "wi_1", gelu_new),
    ),
    "bart": (
        "Bart",
        {
            "d_model": H,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": N,
            "decoder_ffn_dim": 56,
            "encoder_attention_heads": 4,
            "vocab_size": V,
            "decoder_attention_heads": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "{}.layers.{}.fc1",
        plain("", F.gelu),
    ),
}


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_encoder_and_decoder_layers_equal_a_forward_by_hand(name):
    family, config, pattern, formula = SEQ2SEQ[name]
    model = build(family, config)
    layout = discover(model)
    found = read_batch(model, layout)
    order = [(side, index) for side in ("encoder", "decoder") for index in range(2)]
    seen, _ = catch(model, [pattern.format(s, i, 1 if s == "encoder" else 2) for s, i in order])
    for row, text in enumerate(TEXTS):
        seen.clear()
        ids = torch.tensor([text])
        states = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
        for (side, index), (module, x) in zip(order, seen, strict=True):
            ffn, gate = formula(module, x)
            compare(found, (f"{side}_{index + 1:02d}", Site.FFN), row, ffn)
            compare(found, (f"{side}_{index + 1:02d}", Site.GATE), row, gate)
            hidden = states[f"{side}_hidden_states"]
            compare(found, (f"{side}_{index:02d}", Site.HIDDEN), row, hidden[index])
        for stack, out in zip(
            layout.stacks, (states.encoder_last_hidden_state, states.last_hidden_state), strict=True
        ):
            compare(found, (stack.layers[-1], Site.HIDDEN), row, out)


def softmax_then_top(module, x, k, renormalise):
    """Router of Mixtral, Qwen3-MoE, OLMoE: (T, E) weights, 0 for experts that are not chosen."""
    probabilities = F.linear(x, module.weight).softmax(-1)
    weights = torch.zeros_like(probabilities)
    for token, row in enumerate(probabilities):
        best = row.argsort(descending=True)[:k]
        total = row[best].sum() if renormalise else 1.0
        weights[token, best] = row[best] / total
    return weights


def top_then_softmax(module, x, k):
    """Router of GPT-OSS."""
    logits = F.linear(x, module.weight, module.bias)
    weights = torch.zeros_like(logits)
    for token, row in enumerate(logits):
        best = row.argsort(descending=True)[:k]
        weights[token, best] = row[best].softmax(-1)
    return weights


def silu_experts(experts, expert, x):
    gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.silu(gate) * up


def oss_experts(experts, expert, x):
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


MOE = LLAMA | {"num_experts_per_tok": 2}
EXPERTS = {
    "mixtral": (
        "Mixtral",
        MOE | {"num_local_experts": 5},
        "gate",
        silu_experts,
        lambda m, x: softmax_then_top(m, x, 2, True),
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        MOE | HEAD | {"num_experts": 5, "moe_intermediate_size": 24, "norm_topk_prob": True},
        "gate",
        silu_experts,
        lambda m, x: softmax_then_top(m, x, 2, True),
    ),
    "olmoe": (
        "Olmoe",
        MOE | {"num_experts": 5, "norm_topk_prob": False},
        "gate",
        silu_experts,
        lambda m, x: softmax_then_top(m, x, 2, False),
    ),
    "gpt-oss": (
        "GptOss",
        MOE
        | HEAD
        | {"num_local_experts": 5, "sliding_window": 3, "layer_types": ["full_attention"] * L},
        "router",
        oss_experts,
        lambda m, x: top_then_softmax(m, x, 2),
    ),
}


@pytest.mark.parametrize("name", list(EXPERTS))
def test_expert_vectors_are_summed_by_router_weight(name):
    family, config, router, expert_vector, route = EXPERTS[name]
    model = build(family, config)
    layout = discover(model)
    found = read_batch(model, layout)
    seen, _ = catch(model, [f"layers.{i}.mlp" for i in range(L)])
    for row, text in enumerate(TEXTS):
        seen.clear()
        states = model(input_ids=torch.tensor([text]), output_hidden_states=True)
        for index, (module, x) in enumerate(seen):
            x = x[0]
            weights = route(getattr(module, router), x)
            assert ((weights > 0).sum(1) == 2).all()
            expected = sum(
                weights[:, e, None] * expert_vector(module.experts, e, x) for e in range(5)
            )
            layer = f"layer_{index + 1:02d}"
            compare(found, (layer, Site.ROUTER), row, weights)
            compare(found, (layer, Site.FFN), row, expected)
            compare(found, (f"layer_{index:02d}", Site.HIDDEN), row, states.hidden_states[index])
        compare(found, ("final", Site.HIDDEN), row, states[0])


def test_layers_of_a_mixed_model_keep_their_own_width():
    config = MOE | HEAD | {"num_experts": 5, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    layout = discover(build("Qwen3Moe", config))
    assert [layout.width(f"layer_{i:02d}", Site.FFN) for i in range(4)] == [0, 24, N, 24]
    assert [layout.width(f"layer_{i:02d}", Site.ROUTER) for i in range(4)] == [0, 5, 0, 5]


def test_an_attention_block_that_is_called_mixer_has_no_ffn():
    config = HEAD | {
        "hidden_size": H, "intermediate_size": N, "num_attention_heads": 4, "vocab_size": V,
        "num_key_value_heads": 2, "layers_block_type": ["attention", "mlp"],
    }  # fmt: skip
    layout = discover(build("NemotronH", config))
    assert layout.width("layer_01", Site.FFN) == 0
    assert "has no feed-forward layer" in layout.problem("layer_01", Site.FFN)
    assert layout.width("layer_02", Site.FFN) == N


def test_a_list_of_ffns_is_not_taken_for_the_blocks():
    config = {
        "emb_dim": H,
        "n_layers": L,
        "n_heads": 4,
        "n_words": V,
        "max_position_embeddings": 32,
    }
    with pytest.raises(ModelError, match="not what the model calls its hidden states"):
        discover(build("XLM", config))


def test_mamba_has_hidden_states_and_says_that_it_has_no_ffn():
    model = build(
        "Mamba", {"hidden_size": H, "num_hidden_layers": L, "vocab_size": V, "state_size": 4}
    )
    layout = discover(model)
    assert layout.width("layer_01", Site.HIDDEN) == H
    assert layout.width("layer_01", Site.FFN) == 0
    assert "layers.0 (MambaBlock) has no feed-forward layer" in layout.problem("layer_01", Site.FFN)
    found = read_batch(model, layout)
    for row, text in enumerate(TEXTS):
        states = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        compare(found, ("layer_00", Site.HIDDEN), row, model.embeddings(torch.tensor(text)))
        for index in range(L):  # Mamba notes a block's output, other models its input
            compare(found, (f"layer_{index + 1:02d}", Site.HIDDEN), row, states[index])
        compare(found, ("final", Site.HIDDEN), row, states[L])


def test_a_layer_that_does_not_behave_is_named_and_the_others_stay():
    model = build("Llama", LLAMA)
    down = model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _m, args: (args[0] * torch.nan,))
    down.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
    layout = discover(model)
    problem = layout.problem("layer_02", Site.FFN)
    assert "layers.1.mlp.down_proj:input" in problem and "NaN" in problem
    assert layout.problem("layer_01", Site.FFN) is None
    assert layout.width("layer_02", Site.HIDDEN) == H


def test_a_block_that_gives_nan_is_refused():
    model = build("Llama", LLAMA)
    model.layers[1].register_forward_hook(lambda _m, _a, out: out * torch.nan)
    with pytest.raises(ModelError, match="layer_02 hidden: gave NaN"):
        discover(model)


def test_alike_hookpoints_are_written_as_one():
    points = [f"h.{i}.mlp:input" for i in (0, 1, 2, 5)] + ["model:output"]
    assert summarise(points) == ["h.{0..2,5}.mlp:input", "model:output"]
    assert summarise(["h.3.mlp:input"]) == ["h.3.mlp:input"]
