"""A mixture of experts through the whole command line, from a saved folder to predictions."""

from __future__ import annotations

import csv
import json
import random

import h5py
import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralModel

from tests.helpers import json_lines
from tests.test_backbone import WORDS, save_tokenizer

EXPERTS, WIDTH = 5, 24


def save_mixtral(folder):
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    model = MixtralModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def write_data(folder):
    """Texts of six words; those with *good* in them are positive."""
    draw = random.Random(0)
    others = [word for word in WORDS if word not in ("good", "bad")]
    folder.mkdir()
    for name, count in (("train", 80), ("val", 40), ("test", 40)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(count):
                words = [*draw.sample(others, 5), ("good", "bad")[row % 2]]
                draw.shuffle(words)
                writer.writerow([" ".join(words), ("positive", "negative")[row % 2]])


def test_a_mixture_of_experts_from_texts_to_predictions(tmp_path, spin):
    save_mixtral(tmp_path / "mixtral")
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    for arguments in (
        ("extract", tmp_path / "data", "-m", tmp_path / "mixtral", "-o", run / "activations"),
        ("select", run / "activations"),
        ("train", run / "selection", "--site", "ffn"),
    ):
        done = spin(*arguments)
        assert done.code == 0, done.err
    for layer in ("layer_01", "layer_02"):
        with h5py.File(run / "activations" / f"{layer}.h5") as file:
            assert file["ffn/mean"].shape == (160, WIDTH)
            load = file["router/mean"][:].astype(np.float32)
        # Every token's two weights add up to one, and so do the means over tokens.
        assert load.shape == (160, EXPERTS)
        np.testing.assert_allclose(load.sum(1), 1, atol=2e-3)
        assert (load.mean(0) > 0).sum() >= 2
    config = json.loads((run / "head" / "config.json").read_text())
    assert {feature["site"] for feature in config["features"]} == {"ffn"}
    done = spin("train", run / "selection", "--site", "ffn+router", "-o", run / "other")
    assert done.code == 0, done.err
    config = json.loads((run / "other" / "config.json").read_text())
    assert {feature["site"] for feature in config["features"]} == {"ffn", "router"}
    done = spin("predict", run / "other", tmp_path / "data" / "test.csv", "--check-exit", "20")
    assert done.code == 0, done.err

    done = spin("predict", run / "head", tmp_path / "data" / "test.csv", "--check-exit", "20")
    assert done.code == 0, done.err
    found = json_lines(done.out)
    expected = ["positive", "negative"] * 20
    right = sum(row["label"] == label for row, label in zip(found, expected, strict=True))
    assert right >= 28  # of 40; guessing gives 20
    metrics = json.loads((run / "head" / "metrics.json").read_text())
    assert right / 40 == pytest.approx(metrics["spin"]["test"]["accuracy"], abs=0.03)
