"""Loading and running only what a head needs: some blocks, one stack, some rows of a projection.

`depth_for` says which blocks have to be built; `shorten` makes a configuration describe them alone,
so that the weights of the others are never read. `narrow` cuts the projections that feed the last
FFN vector down to the neurons that are wanted, and takes the down projection away. Whether a model
computes each neuron from its own rows is not taken on trust: the narrowed block has to give what
the whole one gives, or it stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spin_cli.backbone.discovery import probe_inputs
from spin_cli.backbone.finding import NOT_FFN
from spin_cli.backbone.layout import Hook, Stack
from spin_cli.backbone.placing import input_device
from spin_cli.choices import Site
from spin_cli.errors import ArtifactError

Depth = int | Mapping[str, int | None] | None
"""Blocks to build: a number, or one for each stack (None: all; 0: the stack is left out)."""
PER_BLOCK_FIELDS = (
    "layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers", "attention_window",
)  # fmt: skip
COUNT_FIELDS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
OTHERS = 64
"""Neurons beside the wanted ones that a narrowed projection is proved with."""


def depth_for(layers: Collection[str]) -> Depth:
    """Blocks that have to be built to read *layers*.

    Returns
    -------
    int, mapping or None
        A number of blocks; for an encoder-decoder model one for each stack; None for all of them
        (a final norm has all blocks before it).
    """
    found = [re.fullmatch(r"(layer|encoder|decoder)_(\d+|final)", name) for name in layers]
    if not all(found):
        return None
    deepest: dict[str, int | None] = {}
    for match in found:
        assert match is not None
        stack, number = match.groups()
        before = deepest.get(stack, 0)
        if number == "final" or before is None:
            deepest[stack] = None
        else:
            deepest[stack] = max(before, int(number))
    if "layer" in deepest:
        # A model without any block is no model that transformers can build.
        return None if deepest["layer"] is None else max(1, deepest["layer"])
    if "decoder" in deepest:
        below = None if deepest["decoder"] is None else max(1, deepest["decoder"])
        return {"encoder": None, "decoder": below}
    below = None if deepest["encoder"] is None else max(1, deepest["encoder"])
    return {"encoder": below, "decoder": 0}


def shorten(config: Any, depth: Depth) -> None:
    """Make *config* describe only the blocks in *depth*, and switch off what spin never needs.

    ``from_pretrained`` reads only the tensors that the model it builds asks for, so blocks that
    the configuration leaves out are never loaded.

    Raises
    ------
    ArtifactError
        The model has fewer blocks.
    """
    config.use_cache = False
    if getattr(config, "chunk_size_feed_forward", 0):
        config.chunk_size_feed_forward = 0  # else one block calls its FFN several times
    if depth is None:
        return
    if isinstance(depth, int):
        if not config.is_encoder_decoder:
            _shorten_stack(config, "num_hidden_layers", "layer", depth)
        return
    for stack, blocks in depth.items():
        name = next(
            (n for n in COUNT_FIELDS[stack] if isinstance(getattr(config, n, None), int)), ""
        )
        if name and blocks is not None:
            _shorten_stack(config, name, stack, blocks)


def _shorten_stack(config: Any, field: str, stack: str, depth: int) -> None:
    blocks = getattr(config, field)
    if depth > blocks:
        raise ArtifactError(f"{stack}_{depth:02d}: the model has {blocks} blocks only")
    for name in PER_BLOCK_FIELDS:
        values = getattr(config, name, None)
        if stack != "decoder" and isinstance(values, list) and len(values) == blocks:
            setattr(config, name, values[:depth])
    setattr(config, field, depth)


class Nothing(nn.Module):
    """Stands where a down projection was: what it put out is not needed."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        # T5 asks for the type of the weights that it is about to use.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Zeros of the width that was put out."""
        return states.new_zeros((*states.shape[:-1], self.width))


def narrow(model: nn.Module, stack: Stack, neurons: NDArray[np.integer[Any]]) -> bool:
    """Let the last block of *stack* compute only some neurons of its FFN vector, and nothing after.

    Afterwards the vector at the deepest ``ffn`` hookpoint holds *neurons* alone, in their order.
    The matrices that put out the vector (or twice its width, gate and up side by side) keep the
    rows of these neurons.

    Parameters
    ----------
    model : Module
        Changed in place.
    stack : Stack
    neurons : (n,) indices into the FFN vector

    Returns
    -------
    bool
        False where the model cannot be narrowed, and was left as it was: a block that serves
        several layers, or whose neurons are not computed each from its own rows.
    """
    hook = stack.sites[Site.FFN][-1]
    if not isinstance(hook, Hook) or hook.side != "input":
        return False
    if len(stack.blocks) != stack.depth or len(neurons) >= hook.width:
        return False
    block, down, width = stack.blocks[-1], hook.path, hook.width
    kept = dict(_producers(model, block, down, width))
    elsewhere = any(weight.is_meta for weight in model.get_submodule(block).parameters())
    if not kept or elsewhere:
        return False
    kept[down] = model.get_submodule(down)
    more = np.linspace(0, width - 1, OTHERS).astype(np.int64)
    proof = np.concatenate([neurons, np.setdiff1d(more, neurons)])
    nothing = Nothing(stack.hidden_size, next(model.parameters()).dtype)
    try:
        whole = _trial(model, down)
        for path, module in kept.items():
            model.set_submodule(path, nothing if path == down else _rows(module, proof, width))
        found = _trial(model, down)
        right = _same(found, whole[..., torch.as_tensor(proof, device=whole.device)])
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
    ):  # shapes that do not fit
        right = False
    for path, module in kept.items():
        if path != down or not right:
            model.set_submodule(path, _rows(module, neurons, width) if right else module)
    return right


def _producers(
    model: nn.Module, block: str, down: str, width: int
) -> Iterator[tuple[str, nn.Module]]:
    """Plain linear layers of *block* that may put out its FFN vector."""
    for name, module in model.get_submodule(block).named_modules():
        path = f"{block}.{name}"
        if path == down or not name or NOT_FFN.search(name.lower()):
            continue
        if _is_conv1d(module):
            out = int(module.nf)
        elif isinstance(module, nn.Linear) and module.weight.is_floating_point():
            out = module.out_features
        else:
            continue
        if out in (width, 2 * width):
            yield path, module


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _rows(module: Any, neurons: NDArray[np.integer[Any]], width: int) -> nn.Linear:
    """A linear layer with the rows of *neurons*, or of both their halves."""
    weight = module.weight.T if _is_conv1d(module) else module.weight
    rows = torch.as_tensor(neurons, dtype=torch.long, device=weight.device)
    if weight.shape[0] == 2 * width:
        rows = torch.cat([rows, rows + width])
    small = nn.Linear(
        weight.shape[1], len(rows), module.bias is not None, device="meta", dtype=weight.dtype
    )
    small.weight = nn.Parameter(weight[rows].contiguous(), requires_grad=False)
    if module.bias is not None:
        small.bias = nn.Parameter(module.bias[rows].contiguous(), requires_grad=False)
    return small.eval()


@torch.inference_mode()
def _trial(model: nn.Module, path: str) -> torch.Tensor:
    """What enters the module at *path* when a few tokens run through."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.arange(7, 7 + 24).reshape(2, 12).remainder(vocabulary)
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _module, args: caught.append(args[0].detach().clone())
    )
    try:
        model(**probe_inputs(model, ids.to(input_device(model))))
    finally:
        handle.remove()
    return caught[-1]


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of sums taken in another order."""
    if found.shape != expected.shape:
        return False
    share = 1e-4 if found.dtype == torch.float32 else 2e-2
    scale = float(expected.float().abs().max())
    return torch.allclose(found.float(), expected.float(), rtol=share, atol=share * scale)
