"""Layers go by the number in their name, however many of them were extracted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spin_cli import artifacts
from spin_cli.errors import UsageError
from spin_cli.head import load_head
from spin_cli.training.inputs import deepest_layer
from tests.helpers import MODEL, run_quietly, write_data


@pytest.fixture(scope="module")
def some(shared) -> Path:
    """A selection of three layers out of the middle and the end."""

    def fill(folder: Path) -> None:
        write_data(folder / "data")
        run_quietly(
            "extract", folder / "data", "-m", MODEL, "-o", folder / "activations",
            "--layers", "2,4,6", "--pooling", "mean",
        )  # fmt: skip
        run_quietly("select", folder / "activations", "-o", folder / "selection")

    return shared("three-layers", fill)


@pytest.mark.parametrize(("most", "deepest"), [(2, 2), (4, 4), (5, 4), (99, 6)])
def test_the_deepest_layer_allowed_is_told_by_the_number_in_its_name(
    spin, some, tmp_path, most, deepest
):
    head = tmp_path / "head"
    done = spin("train", some / "selection", "-o", head, "--cv", 0, "--max-layer", most)
    assert done.code == 0, done.err
    assert max(int(f.layer[-2:]) for f in load_head(head).features) <= deepest
    report = artifacts.read_json(head / "metrics.json")
    numbers = {int(entry["layer"].removeprefix("layer_")) for entry in report["candidates"]}
    assert max(numbers) == deepest
    assert numbers <= {2, 4, 6}
    for entry in report["candidates"]:
        for part in [entry, *entry.get("parts", [])]:
            assert part["layer"] == ("layer_02", "layer_04", "layer_06")[part["depth"]]


def test_tables_show_a_layer_by_its_number(spin, some, tmp_path):
    head = tmp_path / "head"
    options = ("--cv", 0, "--masks-only", "--site", "hidden", "--max-layer", 2)
    done = spin("train", some / "selection", "-o", head, *options)
    lines = [line.split() for line in done.out.splitlines()]
    (at, *_) = (line.index("layer") for line in lines if line[:1] == ["kind"])
    shown = [line[at] for line in lines if line[:1] in (["hidden"], ["→hidden"])]
    assert shown and set(shown) == {"2"}


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_a_number_above_all_layers_is_refused_with_the_layers_there_are(
    spin, some, tmp_path, command
):
    done = spin(command, some / "selection", "-o", tmp_path / "out", "--max-layer", 1)
    assert done.code == 2
    assert "--max-layer 1" in done.err
    for name in ("layer_02", "layer_04", "layer_06"):
        assert name in done.err
    assert not (tmp_path / "out").exists()


def test_ablate_goes_by_the_same_numbers(spin, some):
    done = spin(
        "ablate", some / "selection", "--max-layer", 4, "--eta", "0.9", "--draws", 1, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["what"]["layers"] == ["layer_02", "layer_04"]


def test_layers_without_a_number_go_by_their_place_in_the_model():
    order = [f"layer_{n:02}" for n in range(5)] + ["final"]
    assert deepest_layer(order, order, None) == 5
    assert deepest_layer(order, order, 4) == 4
    assert deepest_layer(("layer_03", "final"), order, 5) == 1
    with pytest.raises(UsageError, match="--max-layer 2"):
        deepest_layer(("layer_03", "final"), order, 2)
    order = [*(f"encoder_{n:02}" for n in range(3)), *(f"decoder_{n:02}" for n in range(3))]
    assert deepest_layer(order, order, 2) == 2  # the encoder's last
    assert deepest_layer(("encoder_01", "decoder_00", "decoder_02"), order, 4) == 1
    # Another program may name no more than it has.
    assert deepest_layer(("layer_02", "layer_06"), ("layer_02", "layer_06"), 4) == 0
