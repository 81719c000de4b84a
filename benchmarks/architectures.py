"""What spin can read of every text model that the installed transformers knows.

From each configuration class a tiny random model is built, and hookpoints are searched as they are
for a real model. A find is checked against what was not used to find it: hidden states against the
model's own ``output_hidden_states``, widths against the configuration.

    python benchmarks/architectures.py [NAME …] [--out architectures.csv]
"""

from __future__ import annotations

import sys
from pathlib import Path

# A neighbour of this file is named as a module of the standard library, which it must not shadow.
HERE = Path(__file__).resolve().parent
sys.path = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import argparse  # noqa: E402
import csv  # noqa: E402
import logging  # noqa: E402
import warnings  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Collection, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from spin_cli.backbone.discovery import discover, probe_inputs  # noqa: E402
from spin_cli.backbone.hooks import hooked  # noqa: E402
from spin_cli.backbone.layout import Layout  # noqa: E402
from spin_cli.backbone.partial import shorten  # noqa: E402
from spin_cli.choices import Site  # noqa: E402
from spin_cli.errors import SpinError  # noqa: E402

TASKS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TEXT_ENCODING",
    "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING",
)  # fmt: skip
"""Whoever does one of these reads text."""
FFN, EXPERT, SHARED = 96, 24, 40
SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim"
    " lru_width block_size",
    FFN: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner hidden_dim d_inner"
    " ffn_hidden_size dim_ff feed_forward_size dff block_ff_dim",
    EXPERT: "moe_intermediate_size expert_ffn_size expert_dim",
    SHARED: "shared_expert_intermediate_size shared_intermediate_size"
    " moe_shared_expert_intermediate_size",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk top_k"
    " moe_top_k num_local_heads n_group topk_group",
    4: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
    " num_encoder_layers num_decoder_layers num_attention_heads n_head n_heads num_heads"
    " encoder_attention_heads decoder_attention_heads num_experts num_local_experts"
    " n_routed_experts moe_num_experts num_encoder_attention_heads num_decoder_attention_heads",
    8: "head_dim d_kv attention_head_size kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim"
    " kv_lora_rank q_lora_rank rotary_dim swa_head_dim mamba_d_state state_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    99: "vocab_size",
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
LARGEST = 20_000_000
LEFT_OUT: tuple[Collection[int], ...] = ((), (8,), (8, 2), (8, 2, 64, EXPERT, SHARED))
"""Sizes that are left at their default, where a class does not go together with all of them."""
WIDTHS = {FFN, 4 * 32, EXPERT, SHARED, FFN // 2}
"""Dense FFNs as configured, or four times the hidden size where a class has no field for it."""


def text_types() -> list[str]:
    """Model types that read text."""
    found: set[str] = set()
    for task in TASKS:
        found |= set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    return sorted(found & set(modeling_auto.MODEL_MAPPING_NAMES))


def shrink(config_class: Any, left_out: Collection[int]) -> Any:
    """A configuration of a few small layers, or None where its text part is not the whole."""
    usual = config_class()
    if not usual.is_encoder_decoder and usual.get_text_config() is not usual:
        return None
    fields = {
        name: size
        for size, names in SIZES.items()
        for name in names.split()
        if size not in left_out
        and hasattr(usual, name)
        and not isinstance(getattr(usual, name), list | tuple)
    }
    return config_class(**fields, **{k: v for k, v in TOKENS.items() if hasattr(usual, k)})


@torch.inference_mode()
def build(name: str, left_out: Collection[int]) -> Any:
    """A tiny model that runs on token ids; None for a configuration that is not text alone."""
    config = shrink(CONFIG_MAPPING[name], left_out)
    if config is None:
        return None
    shorten(config, None)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: this configuration was not made small")
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    model(**probe_inputs(model, torch.arange(3, 13).reshape(2, 5)))
    return model


def build_somehow(name: str) -> Any:
    """Try less and less small configurations; raises what the first one raised."""
    first: Exception | None = None
    for left_out in LEFT_OUT:
        try:
            return build(name, left_out)
        except Exception as error:  # noqa: PERF203
            first = first or error
    assert first is not None
    raise first


def alike(mine: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> bool:
    return all(
        one.shape == other.shape and torch.allclose(one, other, atol=1e-5)
        for one, other in zip(mine, own, strict=False)
    )


@torch.inference_mode()
def check(model: Any, layout: Layout) -> list[str]:
    """What a find contradicts: the model's own hidden states, the configured widths."""
    ids = torch.arange(3, 17).reshape(2, 7)
    inputs = probe_inputs(model, ids)
    read: dict[str, torch.Tensor] = {}

    def take(layer: str, site: Site, states: torch.Tensor) -> None:
        if site is Site.HIDDEN:
            read[layer] = states.clone()

    for stack in layout.stacks:
        with hooked(model, stack, *ids.shape, take, (Site.HIDDEN,)):
            output = model(**inputs, output_hidden_states=True)
    wrong = []
    for stack in layout.stacks:
        name = "hidden_states" if stack.prefix == "layer" else f"{stack.prefix}_hidden_states"
        own = output.get(name) or ()
        mine = [read[layer] for layer in stack.layers[: stack.depth]]
        if len(own) > stack.depth and not (alike(mine, own) or alike(mine[1:], own)):
            wrong.append(f"{stack.prefix}: hidden states are not the model's own")
        widths = {layout.width(layer, Site.FFN) for layer in stack.layers} - {0}
        if widths - WIDTHS:
            wrong.append(f"{stack.prefix} ffn of width {sorted(widths - WIDTHS)}")
    return wrong


def judge(name: str) -> tuple[str, str]:
    """(outcome, what more is to say) of one model type."""
    try:
        model = build_somehow(name)
    except Exception as error:
        return "not built or run", f"{type(error).__name__}: {error}"
    if model is None:
        return "not text alone", ""
    try:
        layout = discover(model)
    except SpinError as error:
        return "refused by name", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"
    try:
        wrong = check(model, layout)
    except Exception as error:
        return "found, not checked", f"{type(error).__name__}: {error}"
    blocks = [
        layer
        for stack in layout.stacks
        for layer in stack.layers[1 : stack.depth + 1]
    ]  # fmt: skip
    problems = [p for layer in blocks if (p := layout.problem(layer, Site.FFN))]
    where = "; ".join([*wrong, *dict.fromkeys(problems)])
    if wrong:
        return "found otherwise", where
    if not problems:
        points = dict.fromkeys(layout.hookpoint(layer, Site.FFN) for layer in blocks)
        return "every ffn found", next(iter(points))
    return ("hidden alone" if len(problems) == len(blocks) else "some ffn found"), where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; default: all that read text")
    parser.add_argument("--out", type=Path, help="a CSV file for the whole list")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows = []
    for name in args.names or text_types():
        rows.append((name, *judge(name)))
        print("\t".join(rows[-1]).replace("\n", " ")[:200], flush=True)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("model_type", "outcome", "detail"), *rows])
    print(f"transformers {transformers.__version__}:", dict(Counter(row[1] for row in rows)))


if __name__ == "__main__":
    main()
