"""Reading pooled vectors out of a forward pass.

`read` is the one way in which spin gets features: ``extract`` and ``predict`` both call it, so
they cannot drift apart. Vectors are pooled inside the hooks, so no layer's (B, T, F) tensor
outlives its layer, and the pass is broken off behind the last vector that is wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from spin_cli.backbone.discovery import Stack, first_tensor, probe_inputs
from spin_cli.backbone.loading import Backbone
from spin_cli.config import Pooling, Site
from spin_cli.errors import ModelError
from spin_cli.pooling import pool

Wanted = Mapping[tuple[str, Site], Sequence[Pooling]]
"""Which poolings are wanted of which (layer, site)."""
Sink = Callable[[str, Site, Pooling, torch.Tensor], None]
"""Takes (layer, site, pooling, (B, F) float32) as each becomes known."""


Take = Callable[[str, Site, torch.Tensor], None]
"""Takes (layer, site, (B, T, F)) as each becomes known."""


class _Enough(Exception):  # noqa: N818 - not an error: it breaks off a forward pass
    """Everything wanted has been read."""


def read(
    backbone: Backbone,
    batch: Sequence[Sequence[int]],
    wanted: Wanted,
    sink: Sink,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Run one batch and hand every wanted vector to *sink*.

    Parameters
    ----------
    backbone : Backbone
    batch : token ids of each text, at least one each; best of similar length
    wanted : the (layer, site) pairs and their poolings
    sink : called once for each of them, with a (B, F) float32 tensor on the model's device
    spans : positions of each text that are pooled; default all

    Raises
    ------
    ModelError
        A wanted vector was never computed.
    """
    spans = spans or [(0, len(ids)) for ids in batch]

    def take(layer: str, site: Site, states: torch.Tensor) -> None:
        for pooling, vectors in pool(states, spans, wanted[layer, site]).items():
            sink(layer, site, pooling, vectors)

    read_states(backbone, batch, wanted, take)


@torch.inference_mode()
def read_states(
    backbone: Backbone,
    batch: Sequence[Sequence[int]],
    wanted: Collection[tuple[str, Site]],
    take: Take,
) -> None:
    """Run one batch and hand the token vectors at every wanted (layer, site) to *take*.

    Parameters
    ----------
    backbone : Backbone
    batch : token ids of each text, at least one each; best of similar length
    wanted : the (layer, site) pairs
    take : called once for each of them, with a (B, T, F) tensor of the model's dtype on its
        device; row *b* is real up to its text's length and padding behind it

    Raises
    ------
    ModelError
        A wanted vector was never computed.
    """
    lengths = [len(ids) for ids in batch]
    width = max(lengths)
    padded = [[*ids, *[backbone.pad_id] * (width - len(ids))] for ids in batch]
    ids = torch.tensor(padded, device=backbone.device)
    mask = None
    if min(lengths) < width:  # padding is always on the right: see DESIGN on left padding
        steps = torch.arange(width, device=backbone.device)
        mask = (steps < torch.tensor(lengths, device=backbone.device)[:, None]).long()
    run_states(backbone, ids, mask, wanted, take)


def run_states(
    backbone: Backbone,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    wanted: Collection[tuple[str, Site]],
    take: Take,
    *,
    early: bool = True,
) -> None:
    """As `read_states`, on tensors: *ids* (B, T) and *mask* (B, T), 1 for real tokens.

    Without *early* the pass runs on to its end, which is what a tracer needs.
    """
    inputs = probe_inputs(backbone.model, ids)
    if mask is not None:
        inputs["attention_mask"] = mask
        if "decoder_input_ids" in inputs:
            inputs["decoder_attention_mask"] = mask
    missing = set(wanted)

    def take_once(layer: str, site: Site, states: torch.Tensor) -> None:
        if (layer, site) not in missing:
            return
        take(layer, site, states)
        missing.discard((layer, site))
        if early and not missing:
            raise _Enough

    with _hooks(backbone, ids.shape[0], ids.shape[1], take_once), contextlib.suppress(_Enough):
        backbone.model(**inputs)
    if missing:
        layer, site = sorted(missing)[0]
        raise ModelError(f"{layer} {site.value}: the forward pass did not reach it")


@contextlib.contextmanager
def _hooks(
    backbone: Backbone, rows: int, width: int, take: Callable[[str, Site, torch.Tensor], None]
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for stack in backbone.layout.stacks:
            handles += _hook_stack(backbone.model, stack, rows, width, take)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_stack(
    model: torch.nn.Module,
    stack: Stack,
    rows: int,
    width: int,
    take: Callable[[str, Site, torch.Tensor], None],
) -> list[Any]:
    """Hook one stack; a shared block is told apart by the number of calls so far."""
    layers = stack.layers
    entered = 0

    def shaped(states: torch.Tensor) -> torch.Tensor:
        if states.dim() == 2:  # OPT hands (B·T, F) to its FFN
            return states.view(rows, width, -1)
        return states.transpose(0, 1) if stack.token_major else states

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal entered
        if entered == 0:
            take(layers[0], Site.HIDDEN, shaped(args[0] if args else kwargs["hidden_states"]))
        entered += 1

    def feed(_module: Any, args: tuple[Any, ...]) -> None:
        take(layers[entered], Site.FFN, shaped(args[0]))

    def leave(_module: Any, _args: Any, output: Any) -> None:
        take(layers[entered], Site.HIDDEN, shaped(first_tensor(output)))

    handles: list[Any] = []
    for path in stack.blocks:
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    handles += [model.get_submodule(p).register_forward_pre_hook(feed) for p in stack.ffns]
    if stack.has_final:

        def finish(_module: Any, _args: Any, output: Any) -> None:
            take(layers[-1], Site.HIDDEN, first_tensor(output))

        handles.append(model.get_submodule(stack.root).register_forward_hook(finish))
    return handles
