"""Hooks on a stack of blocks, and what experts hand to them.

The same hooks serve the trial run that proves a layout and every read after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from spin_cli.backbone.layout import Hook, Stack
from spin_cli.choices import Site

Take = Callable[[str, Site, torch.Tensor], None]
"""Takes (layer, site, (B, T, F) states) as each becomes known."""
EXPERTS = "grouped_mm"
"""The one of transformers' implementations whose order of rows is known: sorted by expert."""


def first_tensor(value: Any) -> torch.Tensor:
    """The tensor that a module's output is, or the first one in it."""
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value


@contextmanager
def hooked(  # noqa: C901 - its small hooks share one count of blocks entered
    model: nn.Module, stack: Stack, rows: int, width: int, take: Take, sites: Collection[Site]
) -> Iterator[None]:
    """Hook one stack at *sites*; a shared block is told apart by the number of calls so far."""
    layers, entered = stack.layers, 0

    def shaped(states: torch.Tensor) -> torch.Tensor:
        if states.dim() == 2:  # OPT and experts get (B·T, F)
            return states.view(rows, width, -1)
        return states.transpose(0, 1) if stack.token_major else states

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal entered
        if entered == 0:
            take(layers[0], Site.HIDDEN, shaped(args[0] if args else kwargs["hidden_states"]))
        entered += 1

    def leave(_module: Any, _args: Any, output: Any) -> None:
        take(layers[entered], Site.HIDDEN, shaped(first_tensor(output)))

    def here(site: Site, states: torch.Tensor) -> None:
        take(layers[entered], site, shaped(states))

    def finish(_module: Any, _args: Any, output: Any) -> None:
        take(layers[-1], Site.HIDDEN, first_tensor(output))

    with ExitStack() as undo:
        handles: list[Any] = []
        for path in stack.blocks:
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        for site, hook in _hooks(stack, sites):
            if hook.side != "experts":
                handles.append(_hook_plain(model.get_submodule(hook.path), hook, site, here))
        if stack.has_final:
            handles.append(model.get_submodule(stack.root).register_forward_hook(finish))
        for handle in handles:
            undo.callback(handle.remove)
        for path, read in _expert_paths(stack, sites).items():
            undo.enter_context(_hook_experts(model.get_submodule(path), here, read))
        yield


def _hooks(stack: Stack, sites: Collection[Site]) -> list[tuple[Site, Hook]]:
    """Every hook of *sites* once, shared blocks or not."""
    found = ((site, hook) for site in sites for hook in stack.sites.get(site, ()))
    return [(site, hook) for site, hook in found if isinstance(hook, Hook)]


def _expert_paths(stack: Stack, sites: Collection[Site]) -> dict[str, set[Site]]:
    """Which sites are read at which layers of experts."""
    found: dict[str, set[Site]] = {}
    for site, hook in _hooks(stack, sites):
        if hook.side == "experts":
            found.setdefault(hook.path, set()).add(site)
    return found


def _hook_plain(
    module: nn.Module, hook: Hook, site: Site, here: Callable[[Site, torch.Tensor], None]
) -> Any:
    if hook.side == "input":
        return module.register_forward_pre_hook(lambda _m, args: here(site, args[0]))
    return module.register_forward_hook(lambda _m, _a, output: here(site, first_tensor(output)))


@contextmanager
def _hook_experts(  # noqa: C901 - its small hooks share one routing
    module: Any, here: Callable[[Site, torch.Tensor], None], sites: set[Site]
) -> Iterator[None]:
    """Hand on what a layer of fused experts computes, per token, weighted by its router.

    transformers computes all chosen experts at once, one row for each pair of a token and one of
    its k experts, sorted by expert. For token t with experts E(t) and router weights w:
    ``ffn[t] = Σ_{e ∈ E(t)} w[t, e] · a_e(x_t)``, a_e(x) the vector that enters expert e's down
    projection; ``gate`` likewise; ``router[t, e] = w[t, e]``, and 0 for an expert not chosen.
    """
    weights = chosen = order = None

    def give(site: Site, states: Callable[[], torch.Tensor]) -> None:
        if site in sites:
            here(site, states())

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal weights, chosen, order
        found = [*args, *kwargs.values()]
        chosen = next(x for x in found[1:] if not x.is_floating_point())
        weights = next(x for x in found[1:] if x.is_floating_point())
        order = torch.sort(chosen.reshape(-1))[1]
        give(Site.ROUTER, routed)

    def routed() -> torch.Tensor:
        assert weights is not None and chosen is not None
        table: torch.Tensor = weights.new_zeros(len(chosen), module.num_experts)
        return table.scatter_add_(1, chosen, weights)

    def summed(vectors: torch.Tensor) -> torch.Tensor:
        assert weights is not None and chosen is not None and order is not None
        weighted = vectors.float() * weights.reshape(-1)[order, None].float()
        total: torch.Tensor = weighted.new_zeros(len(chosen), vectors.shape[1])
        return total.index_add_(0, order // chosen.shape[1], weighted)

    def act(_module: Any, _args: Any, output: torch.Tensor) -> None:
        give(Site.GATE, lambda: summed(output))
        if not module.has_gate:
            give(Site.FFN, lambda: summed(output))

    plain_gate = module._apply_gate

    def apply_gate(projected: torch.Tensor) -> Any:
        vectors = plain_gate(projected)
        give(Site.FFN, lambda: summed(vectors))
        return vectors

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True)]
    if isinstance(getattr(module, "act_fn", None), nn.Module):
        handles.append(module.act_fn.register_forward_hook(act))
    module._apply_gate = apply_gate
    implementation = module.config._experts_implementation
    module.config._experts_implementation = EXPERTS
    try:
        yield
    finally:  # the configuration is shared by all layers, and they are let go in reverse order
        module.config._experts_implementation = implementation
        del module._apply_gate
        for handle in handles:
            handle.remove()
