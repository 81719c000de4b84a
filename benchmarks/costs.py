"""What an answer costs: FLOPs and texts a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.scoring import fastest

SAMPLE = 64
"""Texts on which costs are measured."""


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""torch's counter knows attention on GPUs alone."""


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and attention in a call, by torch's count."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return int(counter.get_total_flops())


def answering(call: Callable[[list[str]], Any], texts: list[str]) -> dict[str, float]:
    """Texts a second and FLOPs a text of a function that answers texts."""
    texts = texts[:SAMPLE]
    return {
        "texts_per_second": len(texts) / fastest(lambda: call(texts)),
        "gflops_per_text": flops(lambda: call(texts)) / len(texts) / 1e9,
    }
