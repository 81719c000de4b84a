"""Texts to token ids, and token ids to batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spin_cli.backbone.loading import Backbone
from spin_cli.config import Long, Side
from spin_cli.errors import DataError

ENOUGH_TOKENS = 1024
"""A batch of this many tokens keeps a CPU busy, so it ends where padding would begin."""


@dataclass(frozen=True)
class Encoded:
    """One text as token ids."""

    ids: list[int]
    truncated: bool


def encode(backbone: Backbone, texts: Sequence[str], *, first_row: int = 0) -> list[Encoded]:
    """Tokenise *texts*, special tokens included, cut to the backbone's limit.

    Raises
    ------
    DataError
        A text of no tokens, or (with ``long=error``) one of too many; *first_row* is the number
        of the first text, for the message.
    """
    options = backbone.options
    if options.prompt_template is not None:
        texts = [options.prompt_template.replace("{text}", text) for text in texts]
    backbone.tokenizer.truncation_side = options.truncation_side.value
    rows = backbone.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    encoded = []
    for offset, ids in enumerate(rows):
        long = len(ids) > backbone.max_length
        if not ids:
            raise DataError(f"row {first_row + offset}: the text has no tokens")
        if long and options.long is Long.ERROR:
            raise DataError(
                f"row {first_row + offset}: {len(ids)} tokens, the limit is {backbone.max_length}",
                "Give --long truncate, or a larger --max-length if the model has the positions.",
            )
        encoded.append(Encoded(_cut(backbone, ids) if long else ids, long))
    return encoded


def _cut(backbone: Backbone, ids: list[int]) -> list[int]:
    """Cut the middle of *ids* so that special tokens at either end stay."""
    tokenizer, limit = backbone.tokenizer, backbone.max_length
    special = set(tokenizer.all_special_ids)
    head = next((i for i, token in enumerate(ids) if token not in special), 0)
    tail = next((i for i, token in enumerate(reversed(ids)) if token not in special), 0)
    room = max(limit - head - tail, 1)
    body = ids[head : len(ids) - tail]
    kept = body[:room] if backbone.options.truncation_side is Side.RIGHT else body[-room:]
    return [*ids[:head], *kept, *ids[len(ids) - tail :]][:limit]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group rows of similar length, longest first.

    Parameters
    ----------
    lengths : tokens of each row
    batch_tokens : most tokens in a batch, padding included (one row may exceed it)

    Returns
    -------
    list of lists of row numbers; every row once; longest first within and between batches

    Notes
    -----
    A batch also ends where the length changes once it holds `ENOUGH_TOKENS`: most batches then
    need neither padding nor a mask. The plan depends on *lengths* and *batch_tokens* alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    current: list[int] = []
    for row in order:
        if current:
            width = lengths[current[0]]
            full = (len(current) + 1) * width > batch_tokens
            ragged = lengths[row] < lengths[current[-1]] and len(current) * width >= ENOUGH_TOKENS
            if full or ragged:
                batches.append(current)
                current = []
        current.append(row)
    return [*batches, current] if current else batches
