"""Options that are numbers: what cannot be is refused by name, wherever it is given."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import typer

from spin_cli import config, recipe
from spin_cli.cli import COMMANDS, app
from spin_cli.errors import UsageError
from spin_cli.extraction import extract
from spin_cli.inspection import describe
from spin_cli.prediction import open_predictor, predict, prefixes
from spin_cli.ranges import RANGE, check_ranges
from spin_cli.selection import select
from spin_cli.training import train
from spin_cli.training.ablation import ablate
from spin_cli.verification import verify
from tests.helpers import MODEL


def numeric_options() -> Iterator[tuple[str, str, type]]:
    """Command, option and type of whatever the command line takes as a number."""
    options = {
        (name, option.name): option.opts[0]
        for name, command in typer.main.get_command(app).commands.items()
        for option in command.params
    }
    for command, function in COMMANDS.items():
        for name, hint in typing.get_type_hints(function).items():
            for kind in {hint, *typing.get_args(hint)} & {int, float}:
                yield command, options[command, name], kind
            if name == "eta" and hint is str:
                yield command, "--eta", float


NUMERIC = list(numeric_options())
CONFIGS = [
    kind for kind in vars(config).values() if isinstance(kind, type) and is_dataclass(kind)
    if kind.__module__ == config.__name__
]  # fmt: skip


def numeric_fields(kind: type) -> list[str]:
    """Names of the fields that hold numbers, by their types."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        parts = {hint, *typing.get_args(hint)}
        if parts & {int, float}:
            found.append(name)
    return found


def arguments(command: str, run: Path, out: Path) -> list[object]:
    """What a command has to be given."""
    data = run.parent / "data"
    return {
        "extract": [data, "-m", MODEL, "-o", out, "--dry-run"],
        "run": [data, "-m", MODEL, "-o", out, "--dry-run"],
        "select": [run / "activations", "-o", out],
        "train": [run / "selection", "-o", out],
        "predict": [run / "head", data / "test.csv", "-o", out],
        "inspect": [run / "selection"],
        "verify": [run / "head"],
        "ablate": [run],
    }[command]


def test_all_numeric_options_are_found():
    found = {
        ("select", "--seed", int),
        ("extract", "--val-fraction", float),
        ("train", "--eta", float),
    }
    assert found < set(NUMERIC)
    assert len(NUMERIC) > 35


@pytest.mark.parametrize(("command", "option", "kind"), NUMERIC)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "-1e+30"])
def test_what_is_no_number_or_below_zero_is_refused(spin, tmp_path, command, option, kind, value):
    given = arguments(command, tmp_path / "nowhere/run", tmp_path / "out")
    done = spin(command, *given, f"{option}={value}")
    assert done.code == 2, done.err
    assert option in done.err
    assert value in done.err or kind is int
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option", "kind"), NUMERIC)
@pytest.mark.parametrize("value", ["0", "huge"])
def test_the_ends_of_a_range_are_no_bugs(spin, tiny_run, tmp_path, command, option, kind, value):
    if value == "huge":
        value = str(10**30) if kind is int else "1e300"
    done = spin(command, *arguments(command, tiny_run / "run", tmp_path / "out"), option, value)
    assert done.code in (0, 2, 3), done.err
    assert "Traceback" not in done.err
    if done.code == 2:
        assert option in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("select", "--workers=-1"), "--workers -1: expected at least 0"),
        (("select", "--eta=0.5,nan"), "--eta [0.5, nan]: expected numbers above 0 and up to 1"),
        (("select", "--eta=0"), "--eta [0.0]: expected numbers above 0 and up to 1"),
        (("ablate", "--rows=9"), "--rows 9: expected at least 10"),
        (("train", f"--seed={2**32}"), f"--seed {2**32}: expected from 0 to {2**32 - 1}"),
        (("extract", "--val-fraction=1"), "--val-fraction 1.0: expected from 0 to below 1"),
        (("extract", "--window-overlap=0.95"), "--window-overlap 0.95: expected from 0 to 0.9"),
    ],
)
def test_the_option_the_value_and_the_range_are_named(spin, tmp_path, options, words):
    command, option = options
    done = spin(command, *arguments(command, tmp_path / "run", tmp_path / "out"), option)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_number_of_a_configuration_has_a_range(kind):
    assert [f.name for f in fields(kind) if RANGE in f.metadata] == numeric_fields(kind)


def test_a_file_of_options_is_held_to_the_same_ranges():
    bare = {"data": {"path": "d"}, "model": {"model": "m"}}
    tried = 0
    for section, kind in recipe.CONFIGS.items():
        for name in numeric_fields(kind):
            for value in (-1, math.nan, math.inf):
                if name == "etas":
                    value = [0.5, value]
                asked = bare | {section: bare.get(section, {}) | {name: value}}
                with pytest.raises(UsageError, match=rf"\[{section}\] {name}\b"):
                    recipe.recipe_of(asked, "here")
                tried += 1
    assert tried > 60


NOWHERE = Path("nowhere")
SEEDED = config.ExtractConfig(config.DataConfig(seed=-1), config.ModelConfig(MODEL))
EMPTY = config.ExtractConfig(config.DataConfig(), config.ModelConfig(MODEL, batch_tokens=0))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: extract(NOWHERE, NOWHERE, SEEDED), "--seed -1"),
        (lambda: extract(NOWHERE, NOWHERE, EMPTY), "--batch-tokens 0"),
        (lambda: select(NOWHERE, NOWHERE, config.SelectConfig(tol=math.nan)), "select.tol nan"),
        (lambda: train(NOWHERE, NOWHERE, config.TrainConfig(workers=-1)), "--workers -1"),
        (lambda: ablate(NOWHERE, None, config.AblateConfig(etas=())), "--eta "),
        (lambda: train(NOWHERE, NOWHERE, config.TrainConfig(etas=[0.5, 2])), "--eta "),
        (lambda: open_predictor(NOWHERE, config.PredictConfig(threshold=math.nan)), "--threshold "),
        (lambda: next(predict(None, [], config.PredictConfig(top=0))), "--top 0"),
        (lambda: next(prefixes.trace(None, [], config.PredictConfig(top=0))), "--top 0"),
        (lambda: describe(NOWHERE, eta=math.nan), "--eta nan"),
        (lambda: verify(NOWHERE, rows=-1), "--rows -1"),
    ],
)  # fmt: skip
def test_the_stages_refuse_what_the_command_line_does(call, name):
    with pytest.raises(UsageError, match=name):
        call()


def test_defaults_are_in_range():
    for kind in CONFIGS:
        given = {f.name: f.default for f in fields(kind)} | (
            {"model": "m"} if kind is config.ModelConfig else {}
        )
        if kind is not config.ExtractConfig:
            check_ranges(kind(**given))
