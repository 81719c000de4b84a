"""Reading pooled vectors out of a forward pass.

`read` is the one way in which spin gets features: ``extract`` and ``predict`` both call it, so
they cannot drift apart. Vectors are pooled inside the hooks, so no layer's (B, T, F) tensor
outlives its layer, and the pass is broken off behind the last vector that is wanted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spin_cli.backbone.discovery import probe_inputs
from spin_cli.backbone.hooks import Take, hooked
from spin_cli.backbone.loading import Backbone
from spin_cli.choices import Pooling, Site
from spin_cli.errors import ModelError
from spin_cli.pooling import find_real, pool, send

Wanted = Mapping[tuple[str, Site], Sequence[Pooling]]
"""Which poolings are wanted of which (layer, site)."""
Sink = Callable[[str, Site, Pooling, torch.Tensor], None]
"""Takes (layer, site, pooling, (B, F) float32) as each becomes known."""

Check = Callable[[], None]
"""Called at every block of a forward pass; what it raises ends the pass."""

_turns: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
"""Hooks are the module's, whoever's pass it is: batches on the same modules take turns."""


def turn_of(model: nn.Module) -> threading.Lock:
    """What is held while a pass of *model* runs, and spin's hooks are on it."""
    return _turns.setdefault(model, threading.Lock())


def unchecked() -> None:
    """Let the pass go on."""


class _Enough(Exception):  # noqa: N818 - not an error: it breaks off a forward pass
    """Everything wanted has been read."""


def read(
    backbone: Backbone,
    batch: Sequence[Sequence[int]],
    wanted: Wanted,
    sink: Sink,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    check: Check = unchecked,
) -> None:
    """Run one batch and hand every wanted vector to *sink*.

    Parameters
    ----------
    backbone : Backbone
    batch : token ids of each text, at least one each; best of similar length
    wanted : the (layer, site) pairs and their poolings
    sink : called once for each of them, with a (B, F) float32 tensor on the model's device
    spans : positions of each text that are pooled; default all
    check : called at every block

    Raises
    ------
    ModelError
        A wanted vector was never computed.
    """
    spans = spans or [(0, len(ids)) for ids in batch]
    real = find_real(spans, max(map(len, batch)), backbone.device)

    def take(layer: str, site: Site, states: torch.Tensor) -> None:
        for pooling, vectors in pool(states, real, wanted[layer, site]).items():
            sink(layer, site, pooling, vectors)

    read_states(backbone, batch, wanted, take, check=check)


@torch.inference_mode()
def read_states(
    backbone: Backbone,
    batch: Sequence[Sequence[int]],
    wanted: Collection[tuple[str, Site]],
    take: Take,
    *,
    check: Check = unchecked,
) -> None:
    """Run one batch and hand the token vectors at every wanted (layer, site) to *take*.

    Parameters
    ----------
    backbone : Backbone
    batch : token ids of each text, at least one each; best of similar length
    wanted : the (layer, site) pairs
    take : called once for each of them, with a (B, T, F) tensor of the model's dtype on its
        device; row *b* is real up to its text's length and padding behind it
    check : called at every block

    Raises
    ------
    ModelError
        A wanted vector was never computed.
    """
    lengths = [len(ids) for ids in batch]
    width = max(lengths)
    padded = [[*ids, *[backbone.pad_id] * (width - len(ids))] for ids in batch]
    ids = send(padded, backbone.device)
    mask = None
    if min(lengths) < width:  # padding is always on the right: see DESIGN on left padding
        mask = send([[1] * length + [0] * (width - length) for length in lengths], backbone.device)
    run_states(backbone, ids, mask, wanted, take, check=check)


def run_states(
    backbone: Backbone,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    wanted: Collection[tuple[str, Site]],
    take: Take,
    *,
    early: bool = True,
    check: Check = unchecked,
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
    sites = {site for _, site in wanted}

    def take_once(layer: str, site: Site, states: torch.Tensor) -> None:
        check()
        if (layer, site) not in missing:
            return
        take(layer, site, states)
        missing.discard((layer, site))
        if early and not missing:
            raise _Enough

    with turn_of(backbone.model), contextlib.suppress(_Enough), contextlib.ExitStack() as undo:
        for stack in backbone.layout.stacks:
            rows, width = ids.shape
            undo.enter_context(hooked(backbone.model, stack, rows, width, take_once, sites))
        backbone.model(**inputs)
    if missing:
        layer, site = sorted(missing)[0]
        raise ModelError(f"{layer} {site.value}: the forward pass did not reach it")
