"""The words around a text: prompt templates, chats, and the tokens of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError

PLACE = "{text}"


@dataclass(frozen=True)
class Tokens:
    """A text as token ids, with what stands around it."""

    ids: list[int]
    head: int
    """So many ids at the front are not the text's own: special tokens, words of a template."""
    tail: int
    """The same for the end."""


def settle_prompt(options: ModelConfig, tokenizer: Any) -> ModelConfig:
    """Write a chat as the prompt template that it is, so that it never changes again.

    Raises
    ------
    ModelError
        The tokenizer has no chat template, or cannot tell which token belongs to which character.
    """
    if options.chat:
        options = replace(
            options,
            prompt_template=render_chat(options, tokenizer),
            special_tokens=False,  # a chat template brings its own
            chat=False,
            system_prompt=None,
        )
    if options.prompt_template is not None and not tokenizer.is_fast:
        raise ModelError(f"{options.model}: a prompt template needs a tokenizer of the fast kind")
    return options


def render_chat(options: ModelConfig, tokenizer: Any) -> str:
    """The tokenizer's chat template around one user message, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{options.model}: --chat needs a chat template, and its tokenizer has none",
            "Write the prompt into a file and give --prompt-template.",
        )
    messages = [{"role": "user", "content": PLACE}]
    if options.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": options.system_prompt.strip()})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template itself raises
        raise ModelError(f"{options.model}: its chat template refuses this: {error}") from error
    if text.count(PLACE) != 1:
        raise ModelError(
            f"{options.model}: its chat has {PLACE} {text.count(PLACE)} times, expected once",
            f"A system prompt must not say {PLACE}.",
        )
    return str(text)


def tokenise(tokenizer: Any, options: ModelConfig, texts: Sequence[str]) -> list[Tokens]:
    """Token ids of *texts*, each within the prompt template if there is one.

    Notes
    -----
    Text and template are tokenised as one string, as the model would see it; a token that belongs
    to both counts as the text's. Without a template, names of special tokens in a text mean these
    tokens, as everywhere. Within a template they are plain text: no text can end its own message.
    """
    if options.prompt_template is None:
        rows = tokenizer(
            list(texts),
            add_special_tokens=options.special_tokens,
            return_attention_mask=False,  # neither is used, and they take a third of the time
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        special = set(tokenizer.all_special_ids)
        return [_between_specials(ids, special) for ids in rows]
    before, after = options.prompt_template.split(PLACE)
    found = _within(tokenizer, options, before, list(texts), after)
    names = sorted(map(re.escape, _special_names(tokenizer)), key=len, reverse=True)
    pattern = re.compile("|".join(names)) if names else None
    for row, text in enumerate(texts):
        if pattern is not None and pattern.search(text):
            found[row] = _as_plain(tokenizer, options, before, text, after)
    return found


def _between_specials(ids: list[int], special: set[int]) -> Tokens:
    head = next((i for i, token in enumerate(ids) if token not in special), 0)
    tail = next((i for i, token in enumerate(reversed(ids)) if token not in special), 0)
    return Tokens(ids, head, tail)


def _special_names(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return names - {""}


def _within(
    tokenizer: Any, options: ModelConfig, before: str, texts: list[str], after: str
) -> list[Tokens]:
    """Token ids of each text within the template; which are its own, offsets tell."""
    if not texts:
        return []
    encoded = tokenizer(
        [before + text + after for text in texts],
        add_special_tokens=options.special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    found = []
    for text, ids, offsets in zip(
        texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        first, last = len(before), len(before) + len(text)
        head = tail = 0
        while head < len(ids) and offsets[head][1] <= first:
            head += 1
        # Special tokens around the whole have no place in it: they begin and end at 0.
        while tail < len(ids) - head and (
            offsets[-1 - tail][0] >= last or offsets[-1 - tail] == (0, 0)
        ):
            tail += 1
        found.append(Tokens(ids, head, tail))
    return found


def _as_plain(tokenizer: Any, options: ModelConfig, before: str, text: str, after: str) -> Tokens:
    """Token ids of a text in which names of special tokens are nothing but text."""
    frame = _within(tokenizer, options, before, [""], after)[0]
    own = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids = [*frame.ids[: frame.head], *own["input_ids"], *frame.ids[frame.head :]]
    return Tokens(ids, frame.head, len(frame.ids) - frame.head)
