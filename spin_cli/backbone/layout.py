"""What a model offers: its stacks of blocks, and where in each block vectors are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spin_cli.choices import Site


@dataclass(frozen=True)
class Hook:
    """Where a block's vectors of one site are read."""

    path: str
    """Module path in the model."""
    width: int
    side: str
    """``input`` or ``output`` of that module; ``experts``: summed over a token's experts."""

    def __str__(self) -> str:
        return f"{self.path}:{self.side}"


@dataclass(frozen=True)
class Stack:
    """A run of blocks: the whole model, or an encoder-decoder model's encoder or decoder."""

    prefix: str
    """``layer``, ``encoder`` or ``decoder``: how its layers are named."""
    root: str
    """Module path of the stack in the model; empty for the model itself."""
    blocks: tuple[str, ...]
    """Module paths of the distinct block modules (ALBERT calls a shared one several times)."""
    sites: Mapping[Site, tuple[Hook | str, ...]]
    """Of each site but ``hidden``, each block's hook, or why the block cannot be read there."""
    depth: int
    """Calls of blocks in one forward pass: the number of layers."""
    hidden_size: int
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

    def hook(self, layer: str, site: Site) -> Hook | str | None:
        """A layer's hook, or why it cannot be read, or None where no block stands behind it."""
        position = self.layers.index(layer)
        if not 0 < position <= self.depth:
            return None
        return self.sites[site][(position - 1) % len(self.blocks)]


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
        """Width of the vectors at a layer and site; 0 where it has none that can be read."""
        stack = self.stack_of(layer)
        if site is Site.HIDDEN:
            return stack.hidden_size
        hook = stack.hook(layer, site)
        return hook.width if isinstance(hook, Hook) else 0

    def problem(self, layer: str, site: Site) -> str | None:
        """Why a layer cannot be read at a site; None where it can, or has no block."""
        if site is Site.HIDDEN:
            return None
        hook = self.stack_of(layer).hook(layer, site)
        return hook if isinstance(hook, str) else None

    def hookpoint(self, layer: str, site: Site) -> str:
        """Where the vector is read, for people: module path and input or output."""
        stack = self.stack_of(layer)
        if site is not Site.HIDDEN:
            return str(stack.hook(layer, site))
        position = stack.layers.index(layer)
        if position == 0:
            return f"{stack.blocks[0]}:input"
        if position > stack.depth:
            return f"{stack.root or 'model'}:output"
        return f"{stack.blocks[(position - 1) % len(stack.blocks)]}:output"


def summarise(hookpoints: list[str]) -> list[str]:
    """Write alike hookpoints as one: ``layers.{0..29}.mlp.down_proj:input``."""
    groups: dict[str, list[int]] = {}
    for point in hookpoints:
        number = re.search(r"\.(\d+)(?=[.:])", point)
        pattern = (
            point if number is None else point[: number.start(1)] + "{}" + point[number.end(1) :]
        )
        groups.setdefault(pattern, []).append(int(number[1]) if number else 0)
    return [pattern.replace("{}", _ranges(sorted(set(found)))) for pattern, found in groups.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
