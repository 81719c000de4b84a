"""Why a linear head answers as it does: the neurons that speak for it, and their tokens.

A linear head's logit is a sum of one term for each neuron and the bias, so the terms are the whole
truth about it: no method of attribution is needed. For two classes there is one logit, for the
second class; an answer of the first class is explained by the terms' negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import backbone
from spin_cli.backbone import Encoded
from spin_cli.choices import Pooling, Site
from spin_cli.config import PredictConfig
from spin_cli.errors import UsageError
from spin_cli.head import Head
from spin_cli.prediction.predictor import Predictor

TOKENS_OF_A_MEAN = 3
"""Tokens named for a mean-pooled neuron."""


@dataclass(frozen=True)
class Token:
    """A token behind a neuron."""

    text: str
    position: int
    """From 0, special tokens included."""
    value: float
    """The neuron's value at this token."""


@dataclass(frozen=True)
class Reason:
    """One neuron's part in an answer."""

    layer: str
    site: str
    pooling: str
    neuron: int
    value: float = 0.0
    """Pooled over the text."""
    contribution: float = 0.0
    """Weight for the answer times value."""
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Reasons:
    """A logit taken apart: ``logit = sum of contributions + rest + bias``."""

    logit: float
    bias: float
    rest: float
    """Sum of the contributions of all neurons that are not named."""
    neurons: tuple[Reason, ...]
    """Largest contribution first."""


def contributions(
    head: Head, values: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The terms (n, neurons) and biases (n,) whose sums are the logits of the classes *labels*.

    Parameters
    ----------
    head : Head
    values : (n, neurons) rounded as the head wants them
    labels : (n,) class numbers

    Raises
    ------
    UsageError
        The head is not linear.
    """
    if head.hidden is not None:
        raise UsageError(
            "--explain: this head has hidden units, so its logit is no sum over neurons",
            "Train a linear head.",
        )
    weight = head.weight.astype(np.float64)
    if head.outputs == 1:
        sign = np.where(labels == 1, 1.0, -1.0)
        return values * weight[0] * sign[:, None], head.bias[0] * sign
    return values * weight[labels], head.bias[labels]


def explain(
    predictor: Predictor,
    encoded: Sequence[Encoded],
    values: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: PredictConfig,
) -> list[Reasons]:
    """The ``config.explain`` neurons with the largest contribution to each text's answer.

    Parameters
    ----------
    predictor : Predictor
    encoded : n texts
    values : (n, neurons)
    labels : (n,) the answers
    config : PredictConfig
        How many neurons, and whether their tokens are looked up, which takes a second pass.
    """
    terms, biases = contributions(predictor.head, values, labels)
    order = np.argsort(-terms, axis=1, kind="stable")[:, : config.explain]
    names = neuron_names(predictor.head)
    found = []
    for row, top in enumerate(order):
        named = tuple(
            replace(names[j], value=float(values[row, j]), contribution=float(terms[row, j]))
            for j in top.tolist()
        )
        total, shown = float(terms[row].sum()), float(terms[row, top].sum())
        bias = float(biases[row])
        found.append(Reasons(total + bias, bias, total - shown, named))
    if config.explain_tokens and found:
        signs = np.sign(contributions(predictor.head, np.ones_like(values), labels)[0])
        return add_tokens(predictor, encoded, found, order, signs)
    return found


def explain_answers(
    predictor: Predictor,
    encoded: Sequence[Encoded],
    values: NDArray[np.float32],
    probs: NDArray[np.float64],
    config: PredictConfig,
) -> list[Reasons] | list[list[tuple[str, Reasons]]]:
    """`explain` each text's answer.

    Where a text may have any number of labels, each one that is given, with its name; where none
    is, the likeliest.
    """
    head, said = predictor.head, predictor.decide(probs)
    if not head.multi_label:
        return list(explain(predictor, encoded, values, said, config))
    nothing = ~said.any(1)
    said[nothing, probs[nothing].argmax(1)] = 1
    rows, labels = np.nonzero(said)
    texts = [encoded[row] for row in rows.tolist()]
    found = explain(predictor, texts, values[rows], labels, config)
    listed: list[list[tuple[str, Reasons]]] = [[] for _ in encoded]
    for row, label, reasons in zip(rows.tolist(), labels.tolist(), found, strict=True):
        listed[row].append((head.classes[label], reasons))
    return listed


def neuron_names(head: Head) -> list[Reason]:
    """Where each neuron of the head lies, in its order."""
    return [
        Reason(f.layer, f.site.value, f.pooling.value, int(j))
        for f in head.features
        for j in f.neurons
    ]


def add_tokens(
    predictor: Predictor,
    encoded: Sequence[Encoded],
    found: Sequence[Reasons],
    order: NDArray[np.intp],
    signs: NDArray[np.float64],
) -> list[Reasons]:
    """Name the tokens behind each reason: of a maximum one, of a mean those that raise it most."""
    tokens: dict[tuple[int, int], tuple[Token, ...]] = {}
    keys = list(predictor.places)
    ends = np.cumsum([len(feature.neurons) for feature in predictor.head.features])
    backbone.refuse_parts(encoded)
    for batch in backbone.plan_for(predictor.model, [len(e.ids) for e in encoded]):
        places: dict[tuple[str, Site], list[tuple[int, int, int, Pooling]]] = {}
        for at, row in enumerate(batch):
            for j in order[row].tolist():
                feature = int(np.searchsorted(ends, j, side="right"))
                layer, site, pooling = keys[feature]
                place = predictor.places[keys[feature]]
                column = int(place.picked[j - place.columns.start])
                places.setdefault((layer, site), []).append((at, j, column, pooling))

        def take(
            layer: str,
            site: Site,
            states: torch.Tensor,
            rows: list[int] = batch,
            places: dict[tuple[str, Site], list[tuple[int, int, int, Pooling]]] = places,
        ) -> None:
            for at, j, column, pooling in places[layer, site]:
                row = rows[at]
                ids = encoded[row].ids
                line = states[at, : len(ids), column].float().cpu().numpy()
                tokens[row, j] = _behind(predictor, ids, line, pooling, float(signs[row, j]))

        backbone.read_states(predictor.model, [encoded[row].ids for row in batch], places, take)
    return [
        replace(
            reasons,
            neurons=tuple(
                replace(reason, tokens=tokens[row, j])
                for reason, j in zip(reasons.neurons, order[row].tolist(), strict=True)
            ),
        )
        for row, reasons in enumerate(found)
    ]


def _behind(
    predictor: Predictor,
    ids: Sequence[int],
    values: NDArray[np.float32],
    pooling: Pooling,
    sign: float,
) -> tuple[Token, ...]:
    """The tokens that made one pooled value, from the neuron's values (T,) at all of them."""
    if pooling is Pooling.MAX:
        at = [int(values.argmax())]
    elif pooling is Pooling.MEAN:
        at = np.argsort(-values * sign, kind="stable")[:TOKENS_OF_A_MEAN].tolist()
    else:
        at = [len(ids) - 1 if pooling is Pooling.LAST else 0]
    decode = predictor.model.tokenizer.decode
    return tuple(Token(decode([ids[i]]), i, float(values[i])) for i in at)
