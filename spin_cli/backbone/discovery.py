"""Finding a model's blocks and FFNs by one general rule, proved by running it.

A block is an instance of the class that the model itself records hidden states from, else a member
of the ModuleList of the right length; `finding` tells where in it vectors are read. Nothing is
taken on trust: a tiny batch runs through the model, and every hookpoint has to be called once per
layer, with the expected width and finite values. A layer that fails is known by name and reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spin_cli.backbone.finding import block_count, find_blocks, find_sites
from spin_cli.backbone.hooks import first_tensor, hooked
from spin_cli.backbone.layout import Hook, Layout, Stack
from spin_cli.backbone.placing import input_device
from spin_cli.choices import Site
from spin_cli.errors import ModelError

PROBE_BATCH, PROBE_TOKENS = 2, 5  # unequal, and unlike any width, so that axes can be told apart


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
    stacks = []
    for prefix, root in roots:
        blocks = find_blocks(root, block_count(config, prefix))
        found = [paths[id(block)] for block in blocks]
        stacks.append(_trace(model, prefix, paths[id(root)], found))
    return Layout(_prove(model, stacks), _is_causal(model))


def probe_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass; an encoder-decoder model's decoder gets the same text."""
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids
    return inputs


def probe_ids(model: nn.Module) -> torch.Tensor:
    """Token ids (2, 5) of a trial run, on the model's device."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.arange(3, 3 + PROBE_BATCH * PROBE_TOKENS).reshape(PROBE_BATCH, PROBE_TOKENS)
    return ids.remainder(vocabulary).to(input_device(model))


@torch.inference_mode()
def keeps_nothing(model: nn.Module) -> bool:
    """Whether a pass leaves all tensors of the modules as they are, so that passes may overlap.

    Some rotary embeddings write their frequencies anew in every pass, as its longest text asks for
    (longrope), or keep tables of the last one's width: another pass would read half of each. Nor
    do passes of a model overlap that this trial fails with.
    """
    ids = probe_ids(model)
    try:
        model(**probe_inputs(model, ids))
        before = _tensors(model)
        for other in (ids[:, :-2], torch.cat([ids, ids], 1)):
            model(**probe_inputs(model, other))
    except Exception:  # whatever a module raises that cannot take texts of such lengths
        return False
    return before == _tensors(model)


def _tensors(model: nn.Module) -> list[tuple[int, int | None]]:
    """Which tensors the modules hold, and how often each was written in place."""
    return [
        (id(held), None if held.is_inference() else held._version)
        for module in model.modules()
        for held in (*module._buffers.values(), *vars(module).values())
        if isinstance(held, torch.Tensor)
    ]


@torch.inference_mode()
def _is_causal(model: nn.Module) -> bool:
    """Change the last token and look whether the first one's output moves."""
    ids = probe_ids(model)
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    outputs = [model(**probe_inputs(model, each))[0][:, 0].float() for each in (ids, other)]
    return bool(torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-5))


@torch.inference_mode()
def _trace(model: nn.Module, prefix: str, root: str, blocks: Sequence[str]) -> Stack:
    """See which blocks are called, in which shape, and what the stack puts out."""
    calls: list[tuple[str, torch.Tensor]] = []
    output: list[torch.Tensor] = []
    with ExitStack() as undo:
        for path in blocks:
            handle = model.get_submodule(path).register_forward_hook(
                lambda _m, _i, out, path=path: calls.append((path, first_tensor(out)))
            )
            undo.callback(handle.remove)
        handle = model.get_submodule(root).register_forward_hook(
            lambda _m, _i, out: output.append(first_tensor(out))
        )
        undo.callback(handle.remove)
        own = _own_states(model, prefix)
    depth = len(calls)
    expected = [blocks[index % len(blocks)] for index in range(depth)]
    if not calls or [path for path, _ in calls] != expected:
        raise ModelError(f"blocks of {prefix} {root or 'model'} were not called in turn")
    last = calls[-1][1]
    size, token_major = last.shape[-1], last.shape[:2] == (PROBE_TOKENS, PROBE_BATCH)
    if token_major:
        last = last.transpose(0, 1)
    _compare_with_own([states for _, states in calls], own, token_major, f"{prefix} ({blocks[0]})")
    same = output[-1].shape == last.shape and torch.allclose(
        output[-1].float(), last.float(), atol=1e-6
    )
    sites = [find_sites(model.get_submodule(path), path, size) for path in blocks]
    return Stack(
        prefix=prefix,
        root=root,
        blocks=tuple(blocks),
        sites={s: tuple(each[s] for each in sites) for s in (Site.FFN, Site.GATE, Site.ROUTER)},
        depth=depth,
        hidden_size=int(size),
        token_major=token_major,
        has_final=not same,
    )


def _own_states(model: nn.Module, prefix: str) -> Sequence[torch.Tensor]:
    """Run the trial's batch; the hidden states that the model itself gives, if it gives any."""
    inputs = probe_inputs(model, probe_ids(model))
    try:
        output = model(**inputs, output_hidden_states=True)
    except TypeError:  # a stranger's code may not know the word
        model(**inputs)
        return ()
    name = "hidden_states" if prefix == "layer" else f"{prefix}_hidden_states"
    return getattr(output, name, None) or ()


def _compare_with_own(
    outputs: Sequence[torch.Tensor], own: Sequence[torch.Tensor], token_major: bool, name: str
) -> None:
    """Refuse blocks that are only a part of what the model calls a layer, such as its FFN.

    Most models note what enters each block, some (Mamba) what it puts out. The last state is left
    alone, for many note it behind the final norm.
    """
    if len(own) > len(outputs) + 1:
        raise ModelError(
            f"{name}: {len(outputs)} blocks were found, but the model has {len(own)} hidden states"
        )
    if len(own) <= len(outputs):
        return

    def alike(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        return all(
            one.shape == other.shape
            and torch.allclose(one.float().cpu(), other.float().cpu(), equal_nan=True)
            for one, other in pairs
        )

    turned = [states.transpose(0, 1) if token_major else states for states in outputs]
    entering = alike(zip(turned[:-1], own[1:-1], strict=True))
    if not entering and not alike(zip(turned[:-1], own[:-2], strict=True)):
        raise ModelError(
            f"{name}: what these modules put out is not what the model calls its hidden states, so"
            " they are not its blocks"
        )


@torch.inference_mode()
def _prove(model: nn.Module, stacks: Sequence[Stack]) -> tuple[Stack, ...]:
    """Run the very hooks that reading uses; a site that does not hold is kept as its reason."""
    calls: dict[tuple[str, Site], list[str | None]] = {}

    with ExitStack() as undo:
        for stack in stacks:

            def take(layer: str, site: Site, states: torch.Tensor, stack: Stack = stack) -> None:
                hook = stack.hook(layer, site) if site is not Site.HIDDEN else None
                width = hook.width if isinstance(hook, Hook) else stack.hidden_size
                calls.setdefault((layer, site), []).append(_flaw(states, width))

            undo.enter_context(hooked(model, stack, PROBE_BATCH, PROBE_TOKENS, take, tuple(Site)))
        model(**probe_inputs(model, probe_ids(model)))
    return tuple(_judge(stack, calls) for stack in stacks)


def _flaw(states: torch.Tensor, width: int) -> str | None:
    if tuple(states.shape) != (PROBE_BATCH, PROBE_TOKENS, width):
        return f"gave a tensor of shape {tuple(states.shape)}, expected width {width}"
    return None if torch.isfinite(states).all() else "gave NaN or infinity in a trial run"


def _judge(stack: Stack, calls: dict[tuple[str, Site], list[str | None]]) -> Stack:
    """Keep what was called once per layer and gave what was expected."""
    for layer in stack.layers:
        found = calls.get((layer, Site.HIDDEN), [])
        if found != [None]:
            raise ModelError(f"{layer} hidden: {_complaint(found)}")
    sites = {site: list(hooks) for site, hooks in stack.sites.items()}
    for position, layer in enumerate(stack.layers[1 : stack.depth + 1]):
        for site, hooks in sites.items():
            index = position % len(stack.blocks)
            hook, found = hooks[index], calls.get((layer, site), [])
            if isinstance(hook, Hook) and found != [None]:
                hooks[index] = f"{hook} {_complaint(found)}"
    return replace(stack, sites={site: tuple(hooks) for site, hooks in sites.items()})


def _complaint(found: list[str | None]) -> str:
    if len(found) != 1:
        return f"was called {len(found)} times in a trial run, expected once"
    return found[0] or "went well"
