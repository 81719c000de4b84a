"""Masks against brute force, metrics against scikit-learn, pooling against a loop."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from spin_cli import activations, mask, metrics, pooling
from spin_cli.backbone.gathering import STORED, bits
from spin_cli.choices import Pooling, StorageDtype
from spin_cli.pooling import find_real, pool


@pytest.mark.parametrize("eta", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_a_mask_is_the_smallest_set_that_reaches_eta(eta):
    values = mask.importance(np.random.default_rng(3).normal(size=(3, 9)))
    shares = mask.cumulative(values[mask.order(values)])
    count = mask.count_for(shares, eta)
    reach = [
        max(sum(values[list(chosen)]) for chosen in combinations(range(9), size))
        for size in range(10)
    ]
    smallest = next(size for size in range(10) if reach[size] >= eta * values.sum() - 1e-12)
    assert count == smallest


def test_importance_sums_over_classes_and_zero_weights_are_left_out():
    coef = np.array([[0.0, 3.0, 0.0, -1.0], [0.0, 0.0, 0.0, 2.0]])
    assert mask.importance(coef).tolist() == [0, 9, 0, 5]
    assert mask.order(mask.importance(coef)).tolist() == [1, 3]


@pytest.mark.parametrize("n_classes", [2, 4])
def test_metrics_agree_with_scikit_learn(n_classes):
    rng = np.random.default_rng(0)
    y = rng.integers(0, n_classes, 300)
    probs = rng.dirichlet(np.ones(n_classes), 300).round(2)
    probs /= probs.sum(1, keepdims=True)
    found = metrics.evaluate(y, probs, [str(k) for k in range(n_classes)])
    predicted = probs.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    clipped = np.clip(probs, 1e-15, None)
    truth = -np.log(clipped[np.arange(300), y]).mean()
    assert found["log_loss"] == pytest.approx(truth)
    assert found["confusion"] == sk.confusion_matrix(y, predicted).tolist()
    precision, recall, f1, rows = sk.precision_recall_fscore_support(y, predicted)
    for k in range(n_classes):
        expected = {"precision": precision[k], "recall": recall[k], "f1": f1[k], "rows": rows[k]}
        assert found["per_class"][str(k)] == pytest.approx(expected)
    if n_classes == 2:  # rounded probabilities: there are ties
        assert found["auroc"] == pytest.approx(sk.roc_auc_score(y, probs[:, 1]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 7), (0, 6), (2, 5), (0, 3), (0, 3), (6, 7)],  # no position is in all of them
        [(0, 7), (0, 6), (2, 5), (0, 5), (1, 5), (4, 7)],
        [(0, 7), (0, 6), (0, 5), (0, 5), (0, 3), (0, 1)],
    ],
)
def test_pooling_of_ragged_texts_equals_a_loop_over_tokens(spans, dtype, transposed):
    torch.manual_seed(0)
    shape = (7, 6, 11) if transposed else (6, 7, 11)
    states = torch.randn(shape).to(dtype)
    states = states.transpose(0, 1) if transposed else states
    states[1, 6] = torch.nan  # padding may hold anything
    real = find_real(spans, 7, states.device)
    found = pool(states, real, tuple(Pooling))
    wider = pool(torch.cat([states, states], 1), real, tuple(Pooling))
    masked = pooling._pool_masked(states, real, (Pooling.MEAN, Pooling.MAX))
    for row, (start, stop) in enumerate(spans):
        tokens = [states[row, t].float() for t in range(start, stop)]
        largest = torch.stack(tokens).max(0).values
        for way in (found, wider, masked):
            torch.testing.assert_close(way[Pooling.MEAN][row], sum(tokens) / len(tokens))
            assert torch.equal(way[Pooling.MAX][row].float(), largest)
        for way in (found, wider):
            assert torch.equal(way[Pooling.LAST][row], tokens[-1])
            assert torch.equal(way[Pooling.FIRST][row], tokens[0])


def test_pooling_hands_on_what_a_text_holds_that_is_no_number():
    states = torch.ones(2, 3, 4)
    states[0, 1, 2] = torch.nan
    for way, vectors in pool(
        states, find_real([(0, 3)] * 2, 3, states.device), [*Pooling][:2]
    ).items():
        assert torch.isnan(vectors).nonzero().tolist() == [[0, 2]], way


def test_pooled_vectors_do_not_keep_the_token_vectors_in_memory():
    states = torch.randn(3, 50, 8)
    for way, vectors in pool(states, find_real([(0, 50)] * 3, 50, states.device), Pooling).items():
        assert vectors.untyped_storage().nbytes() == vectors.nbytes, way


def test_bfloat16_is_stored_with_the_bits_that_torch_gives():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * 1e3
    values[:4] = [1.00390625, 1.01171875, -0.0, 3e38]  # ties, a signed zero, near the largest
    for dtype in StorageDtype:
        found = bits(torch.from_numpy(values).to(STORED[dtype]))
        assert np.array_equal(found, activations.to_disk(values, dtype))
    stored = activations.to_disk(values, StorageDtype.BFLOAT16)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(stored.view(np.int16), expected.view(torch.int16).numpy())
    back = activations.from_disk(stored, StorageDtype.BFLOAT16)
    assert np.array_equal(back, expected.float().numpy())


@pytest.mark.parametrize("kind", ["multinomial", "labels"])
def test_logits_are_what_probabilities_came_from(kind):
    z = np.random.default_rng(0).normal(size=(50, 4)) * 5
    found = metrics.logits(metrics.probabilities(z, 4, kind), kind)
    moved = 0.0 if kind == "labels" else np.log(np.exp(z).sum(1, keepdims=True))
    np.testing.assert_allclose(found, z - moved, atol=1e-6)
    sure = metrics.logits(np.array([[0.0, 1.0]]), kind)
    assert np.isfinite(sure).all() and sure[0, 0] < -30
