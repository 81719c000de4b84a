"""What only the model can tell: its size, its speed, and a neuron's value at every token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import artifacts, backbone
from spin_cli.backbone import Backbone
from spin_cli.choices import Site
from spin_cli.config import ModelConfig, ReportConfig
from spin_cli.errors import SpinError
from spin_cli.reports.sources import LeftOut, Run
from spin_cli.typed import from_plain

TIMED_TEXTS, REPEATS = 32, 3
FEWEST_TIMED, SECONDS = 4, 6.0
"""Of a slow model fewer texts are timed, so that all passes take about so long."""
EXPERTS = (
    ("num_experts_per_tok", "num_local_experts"),
    ("num_experts_per_tok", "num_experts"),
    ("num_experts_per_tok", "n_routed_experts"),
)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the frozen model."""

    total: int
    """All of them, embeddings included."""
    of_layer: dict[str, int]
    """Parameters that one token uses in the block behind each layer; 0 for embeddings and norms.
    With experts, only the share that a token is sent to."""

    def up_to(self, layers: Sequence[str], depth: int) -> int:
        """Parameters used by a head of some depth."""
        return sum(self.of_layer[name] for name in layers[: depth + 1])

    @property
    def used(self) -> int:
        """Parameters that one token uses in all blocks."""
        return sum(self.of_layer.values())


@dataclass(frozen=True)
class Speed:
    """Time until each layer is known, measured."""

    milliseconds: dict[str, float]
    """Per text, by layer: the median of `REPEATS` passes."""
    texts: int
    device: str


def open_model(run: Run, config: ReportConfig) -> Backbone:
    """Load the model that the activations were read from.

    Whether foreign code or pickle may be loaded is never taken from a manifest.

    Raises
    ------
    LeftOut
        It cannot be had, or is another one now.
    """
    request = run.activations().manifest["request"]
    try:
        options = from_plain(ModelConfig, request["options"]["model"])
        options = replace(
            options, model=config.model or options.model, device=config.device,
            trust_remote_code=config.trust_remote_code, allow_pickle=config.allow_pickle,
        )  # fmt: skip
        loaded = backbone.load(options)
    except SpinError as error:
        raise LeftOut(f"the model cannot be loaded ({error.message})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise LeftOut(f"the manifest does not say how the model was read ({error})") from error
    changed = artifacts.differing_fields(request["model"], artifacts.to_plain(loaded.identity))
    if changed := [name for name in changed if name != "id"]:
        raise LeftOut(f"the model is another one now: {', '.join(changed)} changed")
    return loaded


def count_parameters(model: Backbone) -> Sizes:
    """Count the parameters of a loaded model, whole and by block."""
    of_layer: dict[str, int] = {}
    share = _expert_share(model.model.config)
    for stack in model.layout.stacks:
        for position, layer in enumerate(stack.layers):
            of_layer[layer] = 0
            if 0 < position <= stack.depth:
                block = model.model.get_submodule(stack.blocks[(position - 1) % len(stack.blocks)])
                of_layer[layer] = _used_by_a_token(block, share)
    return Sizes(sum(map(_count, model.model.parameters())), of_layer)


def _count(parameter: Any) -> int:
    """Numbers in a parameter; one of 4 bits packs two into a byte."""
    packed = getattr(parameter, "quant_state", None)
    shape = parameter.shape if packed is None else packed.shape
    return int(np.prod(tuple(shape), dtype=np.int64))


def _used_by_a_token(block: torch.nn.Module, share: float) -> int:
    total = 0.0
    for name, parameter in block.named_parameters():
        routed = ".experts." in f".{name}" and "shared" not in name
        total += _count(parameter) * (share if routed else 1.0)
    return round(total)


def _expert_share(config: Any) -> float:
    config = config.get_text_config()
    for chosen, there in EXPERTS:
        some, whole = getattr(config, chosen, None), getattr(config, there, None)
        if some and whole:
            return float(some) / float(whole)
    return 1.0


def measure_speed(model: Backbone, texts: Sequence[str]) -> Speed:
    """Time forward passes over *texts*, or a part of them, up to each layer's hidden state."""
    encoded = backbone.encode(model, texts)
    try:
        backbone.refuse_parts(encoded)
    except SpinError as error:
        raise LeftOut("texts of several windows are not timed") from error
    ids = [item.ids for item in encoded]
    few = ids[:: max(1, len(ids) // FEWEST_TIMED)]
    slow = [max(_one_pass(model, few).values()) for _ in range(2)][1]  # the first warms up
    count = min(len(ids), max(FEWEST_TIMED, int(SECONDS * len(few) / (REPEATS * slow))))
    ids = [ids[at] for at in np.linspace(0, len(ids) - 1, count).astype(int)]
    passes = [_one_pass(model, ids) for _ in range(REPEATS)]
    medians = {layer: statistics.median(p[layer] for p in passes) for layer in passes[0]}
    each = {layer: 1000 * seconds / count for layer, seconds in medians.items()}
    return Speed(each, count, model.device.type)


def _one_pass(model: Backbone, ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds until each layer is known, summed over batches of texts (token *ids*)."""
    planned = backbone.plan_for(model, [len(tokens) for tokens in ids])
    batches = [[ids[row] for row in batch] for batch in planned]
    wanted = [(layer, Site.HIDDEN) for layer in model.layout.layers]
    seconds = dict.fromkeys(model.layout.layers, 0.0)
    for batch in batches:
        started = time.perf_counter()

        def take(layer: str, _site: Site, _states: torch.Tensor, started: float = started) -> None:
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            seconds[layer] += time.perf_counter() - started

        backbone.read_states(model, batch, wanted, take)
    return seconds


@dataclass(frozen=True)
class Piece:
    """A stretch of a text that is one token."""

    text: str
    value: float
    """The neuron's value at it."""


def token_values(
    model: Backbone, texts: Sequence[str], layer: str, site: Site, neuron: int
) -> list[list[Piece] | None]:
    """A neuron's value at each token of *texts*; None for a text of several windows.

    Special tokens come as pieces of no text.
    """
    encoded = backbone.encode(model, texts)
    whole = [row for row, item in enumerate(encoded) if not item.parts]
    found: list[list[Piece] | None] = [None] * len(texts)
    for batch in backbone.plan_for(model, [len(encoded[r].ids) for r in whole]):
        rows = [whole[at] for at in batch]

        def take(_layer: str, _site: Site, states: torch.Tensor, rows: list[int] = rows) -> None:
            values = states[:, :, neuron].float().cpu().numpy()
            for at, row in enumerate(rows):
                ids = encoded[row].ids
                found[row] = _pieces(model.tokenizer, ids, values[at, : len(ids)])

        backbone.read_states(model, [encoded[row].ids for row in rows], [(layer, site)], take)
    return found


def _pieces(tokenizer: Any, ids: Sequence[int], values: NDArray[np.float32]) -> list[Piece]:
    """Each token with what it adds to the text that the tokens before it give."""
    pieces, before = [], ""
    for at, value in enumerate(values.tolist()):
        so_far = tokenizer.decode(
            ids[: at + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if so_far.endswith("\ufffd") and at + 1 < len(ids):
            so_far = before  # half of a letter: the next token will show it
        pieces.append(Piece(so_far[len(before) :], value))
        before = so_far
    return pieces
