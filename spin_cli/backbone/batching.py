"""Texts to token ids, and token ids to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from spin_cli.backbone.loading import Backbone
from spin_cli.backbone.prompting import Tokens, tokenise
from spin_cli.choices import Long, Side
from spin_cli.errors import DataError

OVERHEAD, HALF_OVERHEAD = 32, 16
"""A batch costs this part of the tokens it may have at most, beside its own tokens: 32 on a CPU.
There, 16 to 128 made no difference above the noise (see benchmarks/README.md). In half precision
a CPU rearranges every weight for every batch, for as long as 130 tokens take it."""
ENCODED_AT_ONCE = 128
"""Texts given to the tokenizer at once, which keeps far more of each token than its number: a whole
window of long texts took 40 MB of memory more."""
_NUMBERS: dict[int, int] = {}
"""Each token id that has occurred, once: a window of long texts takes 28 bytes a token less, 10 MB,
than with a number of its own for every token."""


@dataclass(frozen=True)
class Part:
    """One window of a text."""

    ids: list[int]
    start: int
    """First position in ``ids`` whose vector counts."""
    stop: int
    """One behind the last."""

    @property
    def count(self) -> int:
        """Positions that count."""
        return self.stop - self.start


@dataclass(frozen=True)
class Encoded:
    """One text as token ids."""

    ids: list[int]
    truncated: bool
    parts: tuple[Part, ...] = ()
    """The windows of a text of more than one; each of its tokens counts in one of them."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are read, each once."""
        return len(self.ids)


def encode(
    backbone: Backbone, texts: Sequence[str], *, places: Sequence[str] = ()
) -> list[Encoded]:
    """Tokenise *texts*, special tokens included; longer ones than the limit as the options say.

    Of a text that is cut, the special tokens and the prompt template stay whole.

    Raises
    ------
    DataError
        A text of no tokens, or (with ``long=error``) one of too many; *places* say where each
        text stands, for the message, else they are numbered from 0, as items.
    """
    return [
        _fit(backbone, tokens, places[start + offset] if places else f"item {start + offset}")
        for start in range(0, len(texts), ENCODED_AT_ONCE)
        for offset, tokens in enumerate(
            tokenise(backbone.tokenizer, backbone.options, texts[start : start + ENCODED_AT_ONCE])
        )
    ]


def refuse_parts(encoded: Sequence[Encoded]) -> None:
    """Raise `DataError` for a text of several windows, where single tokens are looked at."""
    for number, item in enumerate(encoded, 1):
        if item.parts:
            raise DataError(
                f"text {number} here: {item.n_tokens} tokens are more than one window, and tokens"
                " can be told apart within one only"
            )


def _fit(backbone: Backbone, tokens: Tokens, place: str) -> Encoded:
    """Bring one text to the limit."""
    limit, long = backbone.max_length, backbone.options.long
    ids = [_NUMBERS.setdefault(number, number) for number in tokens.ids]
    head, tail = tokens.head, tokens.tail
    if not ids:
        raise DataError(f"{place}: the text has no tokens")
    if len(ids) <= limit:
        return Encoded(ids, False)
    if long is Long.ERROR:
        raise DataError(
            f"{place}: {len(ids)} tokens, the limit is {limit}",
            "Give --long truncate or window, or a larger --max-length if the model can take it.",
        )
    room = limit - head - tail
    if room < 1:
        raise DataError(
            f"{place}: special tokens and template alone take {head + tail} of {limit} tokens",
            "Give a larger --max-length or a shorter template.",
        )
    if long is Long.WINDOW:
        return Encoded(ids, False, split(ids, head, tail, room, backbone.options.overlap))
    body = ids[head : len(ids) - tail]
    kept = body[:room] if backbone.options.truncation_side is Side.RIGHT else body[-room:]
    return Encoded([*ids[:head], *kept, *ids[len(ids) - tail :]], True)


def split(ids: list[int], head: int, tail: int, room: int, overlap: float) -> tuple[Part, ...]:
    """Cut a long text into overlapping windows in which every token counts once.

    Parameters
    ----------
    ids : tokens of the text, the first *head* and the last *tail* of which every window keeps
    room : tokens of the text itself in one window
    overlap : share of *room* that neighbours have in common

    Notes
    -----
    Where windows overlap, a token counts in the one in which it is farther from the end. The head
    counts in the first window, the tail in the last; so a text of one window is pooled as ever.
    """
    body = ids[head : len(ids) - tail]
    stride = max(1, room - round(room * overlap))
    starts = [*range(0, len(body) - room, stride), len(body) - room]
    # The border between neighbours: the middle of what they share.
    borders = [0, *((s + e + room) // 2 for e, s in pairwise(starts)), len(body)]
    parts = []
    for start, (first, last) in zip(starts, pairwise(borders), strict=True):
        window = [*ids[:head], *body[start : start + room], *ids[len(ids) - tail :]]
        counted = (
            0 if start == 0 else head + first - start,
            len(window) if last == len(body) else head + last - start,
        )
        parts.append(Part(window, *counted))
    return tuple(parts)


def plan_for(backbone: Backbone, lengths: Sequence[int]) -> list[list[int]]:
    """The batches of rows of these *lengths*, see `plan_batches`, as the model reads them."""
    half = backbone.device.type == "cpu" and backbone.dtype is not torch.float32
    return plan_batches(lengths, backbone.batch_tokens, HALF_OVERHEAD if half else OVERHEAD)


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, share: int = OVERHEAD
) -> list[list[int]]:
    """Group rows of similar length into the batches that cost least.

    Parameters
    ----------
    lengths : tokens of each row, at least one
    batch_tokens : most tokens in a batch, padding included (one row may exceed it)
    share : a batch costs that part of *batch_tokens* beside its own tokens

    Returns
    -------
    list of lists of row numbers; every row once; longest first within and between batches

    Notes
    -----
    A batch costs its tokens, padding included, and ``batch_tokens / share`` more. The rows, in
    order of length, are divided where it costs least to do so: the cheapest division down to one
    length follows from those down to longer ones (dynamic programming over the lengths). The plan
    depends on these three alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    sizes = np.array([lengths[row] for row in order], np.int64)
    firsts = np.flatnonzero(np.diff(sizes, prepend=-1))  # of the rows of one length
    lasts = np.append(firsts[1:], len(order))
    overhead = batch_tokens / share
    cheapest = np.zeros(len(firsts) + 1)
    begins = np.zeros(len(firsts), np.int64)
    for end in range(len(firsts)):
        tokens = (lasts[end] - firsts[: end + 1]) * sizes[firsts[: end + 1]]
        costs = cheapest[: end + 1] + tokens + overhead * np.ceil(tokens / batch_tokens)
        begins[end] = int(np.argmin(costs))
        cheapest[end + 1] = costs[begins[end]]
    batches: list[list[int]] = []
    end = len(firsts) - 1
    while end >= 0:  # from the shortest rows to the longest
        part = order[firsts[begins[end]] : lasts[end]]
        most = max(1, batch_tokens // lengths[part[0]])
        batches[:0] = [part[at : at + most] for at in range(0, len(part), most)]
        end = int(begins[end]) - 1
    return batches
