"""Finding a model's blocks and FFNs by one general rule, proved by running it.

A block is an instance of the class that the model itself records hidden states from, else a member
of the ModuleList of the right length. The FFN's down projection is, among a block's linear layers
that put out the hidden size and do not belong to attention, the one with the widest input. Nothing
is taken on trust: a tiny batch runs through the model, and every hookpoint has to be called once
per layer, with the expected width and finite values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spin_cli.config import Site
from spin_cli.errors import ModelError

NOT_FFN = re.compile(r"attn|attention|conv(?!1d)|expert|adapter|per_layer|norm|lora_|router|gate\b")
PROBE_BATCH, PROBE_TOKENS = 2, 5  # unequal, and unlike any width, so that axes can be told apart


@dataclass(frozen=True)
class Stack:
    """A run of blocks: the whole model, or an encoder-decoder model's encoder or decoder."""

    prefix: str
    """``layer``, ``encoder`` or ``decoder``: how its layers are named."""
    root: str
    """Module path of the stack in the model; empty for the model itself."""
    blocks: tuple[str, ...]
    """Module paths of the distinct block modules (ALBERT calls a shared one several times)."""
    ffns: tuple[str, ...]
    """Module path of each block's down projection; empty where blocks have none."""
    depth: int
    """Calls of blocks in one forward pass: the number of layers."""
    hidden_size: int
    ffn_size: int
    token_major: bool
    """Blocks hand on (T, B, H) instead of (B, T, H), as XLNet does."""
    has_final: bool
    """The stack's output differs from the last block's: a final norm stands between them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in order: ``layer_00`` … and ``final`` where there is one."""
        names = [f"{self.prefix}_{index:02d}" for index in range(self.depth + 1)]
        if self.has_final:
            names.append("final" if self.prefix == "layer" else f"{self.prefix}_final")
        return tuple(names)


@dataclass(frozen=True)
class Layout:
    """Every vector that a model offers."""

    stacks: tuple[Stack, ...]
    causal: bool
    """A later token does not change an earlier one's vectors."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names of all stacks, in the order in which they are computed."""
        return tuple(name for stack in self.stacks for name in stack.layers)

    def stack_of(self, layer: str) -> Stack:
        """The stack that has *layer*."""
        return next(stack for stack in self.stacks if layer in stack.layers)

    def width(self, layer: str, site: Site) -> int:
        """Width of the vectors at a layer and site; 0 where the layer has no such site."""
        stack = self.stack_of(layer)
        if site is Site.HIDDEN:
            return stack.hidden_size
        return stack.ffn_size if layer in stack.layers[1 : stack.depth + 1] else 0

    def hookpoint(self, layer: str, site: Site) -> str:
        """Where the vector is read, for people: module path and input or output."""
        stack = self.stack_of(layer)
        position = stack.layers.index(layer)
        if position == 0:
            return f"{stack.blocks[0]}:input"
        if position > stack.depth:
            return f"{stack.root or 'model'}:output"
        index = (position - 1) % len(stack.blocks)
        if site is Site.FFN:
            return f"{stack.ffns[index]}:input"
        return f"{stack.blocks[index]}:output"


def discover(model: nn.Module) -> Layout:
    """Find and prove the hookpoints of *model*.

    Raises
    ------
    ModelError
        Blocks cannot be told, or the trial run did not go as expected; the layer is named.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        roots = [("encoder", model.get_encoder()), ("decoder", model.get_decoder())]  # type: ignore[operator]
    else:
        roots = [("layer", model)]
    paths = {id(module): path for path, module in model.named_modules()}
    causal = _is_causal(model)
    stacks = []
    for prefix, root in roots:
        path = paths[id(root)]
        blocks = _find_blocks(root, _block_count(config, prefix))
        found = [paths[id(block)] for block in blocks]
        ffns = [_find_ffn(block, _hidden_size(config)) for block in blocks]
        stacks.append(_prove(model, prefix, path, found, ffns))
    return Layout(tuple(stacks), causal)


def _hidden_size(config: Any) -> int:
    return int(config.get_text_config().hidden_size)


def _block_count(config: Any, prefix: str) -> int:
    text = config.get_text_config()
    names = {
        "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
        "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        "layer": ("num_hidden_layers",),
    }[prefix]
    for name in names:
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    raise ModelError(f"the configuration of {text.model_type} does not say how many layers it has")


def _find_blocks(root: nn.Module, count: int) -> list[nn.Module]:
    recorded = (getattr(root, "_can_record_outputs", None) or {}).get("hidden_states")
    if isinstance(recorded, list | tuple):
        recorded = recorded[0]
    block_class = getattr(recorded, "target_class", recorded)
    if isinstance(block_class, type):
        blocks = [module for module in root.modules() if isinstance(module, block_class)]
        if blocks:
            return blocks
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError(
            f"{type(root).__name__}: found no list of {count} blocks, so no layer can be read"
        )
    return list(lists[0])


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of anything that acts as a linear layer, else None."""
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _find_ffn(block: nn.Module, hidden: int) -> tuple[nn.Module, int] | None:
    """The down projection of a block's FFN and the width of its input."""
    best: tuple[nn.Module, int] | None = None
    for path, module in block.named_modules():
        sizes = _linear_sizes(module)
        if sizes is None or sizes[1] != hidden or NOT_FFN.search(path.lower()):
            continue
        if best is None or sizes[0] > best[1]:
            best = (module, sizes[0])
    return best if best is not None and best[1] > 0 else None


def probe_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass; an encoder-decoder model's decoder gets the same text."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids
    return inputs


def _probe_ids(model: nn.Module) -> torch.Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.arange(3, 3 + PROBE_BATCH * PROBE_TOKENS).reshape(PROBE_BATCH, PROBE_TOKENS)
    return ids.remainder(vocabulary).to(next(model.parameters()).device)


@torch.inference_mode()
def _is_causal(model: nn.Module) -> bool:
    """Change the last token and look whether the first one's output moves."""
    ids = _probe_ids(model)
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    outputs = [model(**probe_inputs(model, each))[0][:, 0].float() for each in (ids, other)]
    return bool(torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-5))


@torch.inference_mode()
def _prove(
    model: nn.Module,
    prefix: str,
    root: str,
    blocks: list[str],
    ffns: list[tuple[nn.Module, int] | None],
) -> Stack:
    """Run a tiny batch and check that every hookpoint is called as it should be."""
    calls: list[tuple[str, torch.Tensor]] = []
    paths = {id(module): path for path, module in model.named_modules()}
    ffn_paths = tuple(paths[id(found[0])] for found in ffns if found is not None)
    handles = []
    for path in blocks:
        handles.append(
            model.get_submodule(path).register_forward_hook(
                lambda _m, _i, out, path=path: calls.append((path, first_tensor(out)))
            )
        )
    for path in ffn_paths:
        handles.append(
            model.get_submodule(path).register_forward_pre_hook(
                lambda _m, args, path=path: calls.append((path, args[0]))
            )
        )
    stack_out: list[torch.Tensor] = []
    handles.append(
        model.get_submodule(root).register_forward_hook(
            lambda _m, _i, out: stack_out.append(first_tensor(out))
        )
    )
    try:
        model(**probe_inputs(model, _probe_ids(model)))
    finally:
        for handle in handles:
            handle.remove()
    return _judge(prefix, root, blocks, ffns, ffn_paths, calls, stack_out[-1])


def _judge(
    prefix: str,
    root: str,
    blocks: list[str],
    ffns: list[tuple[nn.Module, int] | None],
    ffn_paths: tuple[str, ...],
    calls: list[tuple[str, torch.Tensor]],
    output: torch.Tensor,
) -> Stack:
    hidden = [(path, value) for path, value in calls if path in set(blocks)]
    depth = len(hidden)
    if [path for path, _ in hidden] != [blocks[i % len(blocks)] for i in range(depth)]:
        raise ModelError(f"blocks of {prefix} {root or 'model'} were not called in turn")
    size = hidden[0][1].shape[-1]
    token_major = hidden[0][1].shape[:2] == (PROBE_TOKENS, PROBE_BATCH)
    for index, (path, value) in enumerate(hidden, 1):
        _check(f"{prefix}_{index:02d} hidden ({path})", value, size)
    widths = {found[1] for found in ffns if found is not None}
    ffn_calls = [(path, value) for path, value in calls if path in set(ffn_paths)]
    usable = len(ffn_paths) == len(blocks) and len(widths) == 1 and len(ffn_calls) == depth
    if usable:
        for index, (path, value) in enumerate(ffn_calls, 1):
            _check(f"{prefix}_{index:02d} ffn ({path})", value, max(widths))
    last = hidden[-1][1]
    if token_major:
        last = last.transpose(0, 1)
    same = output.shape == last.shape and torch.allclose(output.float(), last.float(), atol=1e-6)
    return Stack(
        prefix=prefix,
        root=root,
        blocks=tuple(blocks),
        ffns=ffn_paths if usable else (),
        depth=depth,
        hidden_size=int(size),
        ffn_size=max(widths) if usable else 0,
        token_major=token_major,
        has_final=not same,
    )


def _check(what: str, value: torch.Tensor, width: int) -> None:
    tokens = value.numel() // max(value.shape[-1], 1)
    if value.shape[-1] != width or tokens != PROBE_BATCH * PROBE_TOKENS:
        raise ModelError(
            f"{what}: gave a tensor of shape {tuple(value.shape)}, expected width {width}"
        )
    if not torch.isfinite(value).all():
        raise ModelError(f"{what}: NaN or infinity in a trial run")


def first_tensor(value: Any) -> torch.Tensor:
    """The tensor that a module's output is, or the first one in it."""
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value
