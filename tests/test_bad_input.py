"""Bad input of every kind: the right exit code, a message that says where, nothing left over."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spin_cli import Classifier, artifacts, backbone, prediction, reports
from spin_cli.config import PredictConfig
from spin_cli.errors import ArtifactError, ModelError
from spin_cli.reports.model import open_model
from spin_cli.reports.sources import LeftOut, read_run
from tests.helpers import MODEL, Result, sentences, write_csv, write_data

LABELS = ("text", "label")


@pytest.fixture
def run_copy(tiny_run, tmp_path) -> Path:
    """A whole run that may be damaged."""
    return Path(shutil.copytree(tiny_run / "run", tmp_path / "copy"))


def assert_refused(done: Result, code: int, *words: object) -> None:
    """The exit code is right, the message names all of *words*, and no traceback is shown."""
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert len(done.err) < 4000
    for word in words:
        assert str(word) in done.err


# -- data that extract refuses ---------------------------------------------------------------


def missing_column(folder: Path) -> list[str]:
    write_csv(folder / "train.csv", sentences(), ("body", "label"))
    return ["train.csv", "'text'", "body"]


def missing_label(folder: Path) -> list[str]:
    write_csv(folder / "val.csv", sentences(), ("text", "class"))
    return ["val.csv", "'label'", "class"]


def empty_text(folder: Path) -> list[str]:
    rows = sentences()
    rows[4] = ("  ", "good")
    write_csv(folder / "train.csv", rows)
    return ["train.csv", "line 6"]


def empty_label(folder: Path) -> list[str]:
    rows = sentences()
    rows[7] = (rows[7][0], "")
    write_csv(folder / "train.csv", rows)
    return ["train.csv", "line 9"]


def one_class(folder: Path) -> list[str]:
    for name in ("train", "val", "test"):
        write_csv(folder / f"{name}.csv", [(text, "good") for text, _ in sentences()])
    return ["good", "two"]


def unknown_label(folder: Path) -> list[str]:
    write_csv(folder / "test.csv", [*sentences()[:5], ("What a film.", "strange")])
    return ["test.csv", "strange", "line 7"]


def not_utf8(folder: Path) -> list[str]:
    (folder / "train.csv").write_bytes(b"text,label\nfine,good\ncaf\xe9,bad\n")
    return ["train.csv", "line 3", "UTF-8", "0xe9"]


def nul_byte(folder: Path) -> list[str]:
    (folder / "train.csv").write_bytes(b"text,label\nfine,good\nca\0fe,bad\n")
    return ["train.csv", "line 3", "NUL"]


def huge_line(folder: Path) -> list[str]:
    write_csv(folder / "train.csv", [*sentences()[:9], ("x " * 2_500_000, "good")])
    return ["train.csv", "line 11", "characters"]


def open_quote(folder: Path) -> list[str]:
    (folder / "train.csv").write_text('text,label\nfine,good\n"never closed,bad\nfine,good\n')
    return ["train.csv", "line 3"]


def wrong_width(folder: Path) -> list[str]:
    (folder / "train.csv").write_text("text,label\nfine,good\na, b, c,bad\n")
    return ["train.csv", "line 3"]


def no_rows(folder: Path) -> list[str]:
    write_csv(folder / "train.csv", [])
    return ["train.csv"]


def empty_file(folder: Path) -> list[str]:
    (folder / "train.csv").write_bytes(b"")
    return ["train.csv"]


def no_train(folder: Path) -> list[str]:
    (folder / "train.csv").unlink()
    return [str(folder), "train"]


def broken_json(folder: Path) -> list[str]:
    (folder / "train.csv").unlink()
    line = json.dumps({"text": "fine", "label": "good"})
    (folder / "train.jsonl").write_text(f'{line}\n{line}\n{{"text": \n')
    return ["train.jsonl", "line 3"]


def two_trains(folder: Path) -> list[str]:
    shutil.copy(folder / "train.csv", folder / "train.tsv")
    return ["train.csv", "train.tsv"]


def broken_gzip(folder: Path) -> list[str]:
    (folder / "train.csv").rename(folder / "train.csv.gz")
    return ["train.csv.gz", "gzip"]


BAD_DATA = (
    missing_column, missing_label, empty_text, empty_label, one_class, unknown_label, not_utf8,
    nul_byte, huge_line, open_quote, wrong_width, no_rows, empty_file, no_train, broken_json,
    two_trains, broken_gzip,
)  # fmt: skip


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda f: f.__name__)
def test_bad_data_is_refused_by_place(spin, tmp_path, spoil):
    words = spoil(write_data(tmp_path / "data"))
    done = spin("extract", tmp_path / "data", "-m", MODEL, "-o", tmp_path / "out")
    assert_refused(done, 3, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_duplicate_ids_are_refused(spin, tmp_path):
    rows = [(f"n{i}", *row) for i, row in enumerate(sentences())]
    rows[8] = ("n3", *rows[8][1:])
    source = write_csv(tmp_path / "in.csv", rows, ("key", *LABELS))
    done = spin("extract", source, "-m", MODEL, "-o", tmp_path / "out", "--id-column", "key")
    assert_refused(done, 3, "in.csv", "n3", "line 10")
    assert not (tmp_path / "out").exists()


def test_absent_data_is_refused(spin, tmp_path):
    done = spin("extract", tmp_path / "nowhere.csv", "-m", MODEL, "-o", tmp_path / "out")
    assert_refused(done, 3, tmp_path / "nowhere.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--site", "attention"], 2, ["--site", "attention", "hidden, ffn"]),
        (["--site", ","], 2, ["--site"]),
        (["--pooling", "median"], 2, ["--pooling", "median", "mean"]),
        (["--layers", "0-99"], 2, ["--layers", "0-99", "0 to 6"]),
        (["--layers", "x"], 2, ["--layers", "'x'"]),
        (["--layers", "2-0"], 2, ["--layers", "2-0"]),
        (["--layers", ""], 2, ["--layers"]),
        (["--layers", "²"], 2, ["--layers"]),
        (["--max-length", "0"], 2, ["--max-length"]),
        (["--val-fraction", "1.5"], 2, ["--val-fraction"]),
        (["--storage-dtype", "int8"], 2, ["--storage-dtype"]),
        (["--prompt-template", "nowhere.txt"], 2, ["--prompt-template", "nowhere.txt"]),
        (["-m", "bundled:nonsense"], 5, ["bundled:nonsense", "minilm"]),
        (["-m", "./no/such/folder"], 5, ["no/such/folder"]),
        (["-m", "nobody/no-such-model"], 5, ["nobody/no-such-model"]),
        (["-m", "nowhere.gguf"], 5, ["nowhere.gguf"]),
        (["--device", "nonsense"], 5, ["nonsense"]),
    ],
)
def test_bad_options_are_refused_by_name(spin, tiny_run, tmp_path, options, code, words):
    out = tmp_path / "out"
    done = spin("extract", tiny_run / "data", "-m", MODEL, "-o", out, *options)
    assert_refused(done, code, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_not_spins_is_never_replaced(spin, tiny_run, tmp_path, there):
    out = tmp_path / "out"
    mine = out if there == "file" else out / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    for command in (
        ("extract", tiny_run / "data", "-m", MODEL),
        ("select", tiny_run / "run/activations"),
        ("train", tiny_run / "run/selection"),
    ):
        assert_refused(spin(*command, "-o", out), 4, out)
        assert mine.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- artifacts that later stages refuse ------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "before"), [("select", "extract"), ("train", "select"), ("predict", "train")]
)
def test_an_absent_artifact_names_the_stage_to_run(spin, tmp_path, command, before):
    rest = ["-"] if command == "predict" else []
    done = spin(command, tmp_path / "nowhere", *rest)
    assert_refused(done, 4, tmp_path / "nowhere", f"spin {before}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["select", "train", "predict"])
def test_the_wrong_artifact_is_named(spin, tiny_run, command):
    wrong = {"select": "head", "train": "activations", "predict": "selection"}[command]
    rest = ["-"] if command == "predict" else []
    done = spin(command, tiny_run / "run" / wrong, *rest)
    assert_refused(done, 4, f"'{wrong}'")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path: Path) -> None:
    path.write_bytes(b"not HDF5" * (path.stat().st_size // 8 + 1))


def overwrite_at_size(path: Path) -> None:
    path.write_bytes((b"not HDF5" * (path.stat().st_size // 8 + 1))[: path.stat().st_size])


def put_nan(path: Path) -> None:
    size = path.stat().st_size
    with h5py.File(path, "r+") as file:
        file["/hidden/mean"][3, 5] = np.nan
    assert path.stat().st_size == size


@pytest.mark.parametrize("harm", [cut, overwrite, overwrite_at_size, put_nan, Path.unlink])
def test_select_refuses_a_damaged_layer_file(spin, run_copy, harm):
    shutil.rmtree(run_copy / "selection")
    harm(run_copy / "activations/layer_01.h5")
    done = spin("select", run_copy / "activations")
    assert_refused(done, 4, run_copy / "activations/layer_01.h5")
    assert sorted(p.name for p in run_copy.iterdir()) == ["activations", "head", "spin.toml"]


def test_select_refuses_an_edited_manifest(spin, run_copy):
    path = run_copy / "activations/manifest.json"
    path.write_text(path.read_text().replace('"good"', '"well"'))
    done = spin("select", run_copy / "activations", "--force")
    assert_refused(done, 4, path, "changed")


@pytest.mark.parametrize("harm", [cut, overwrite_at_size])
@pytest.mark.parametrize("name", ["masks.h5", "probes.safetensors"])
def test_train_refuses_a_damaged_selection(spin, run_copy, harm, name):
    if (harm, name) == (overwrite_at_size, "probes.safetensors"):
        pytest.skip("train reads the masks alone")
    shutil.rmtree(run_copy / "head")
    harm(run_copy / "selection" / name)
    done = spin("train", run_copy / "selection")
    assert_refused(done, 4, run_copy / "selection" / name)
    assert not (run_copy / "head").exists()


def lacking(manifest: dict, *place: str) -> None:
    *above, name = place
    for step in above:
        manifest = manifest[step]
    del manifest[name]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: lacking(m, "request", "model", "architecture"), "'request.model.architecture'"),
        (lambda m: lacking(m, "request"), "'request' is missing"),
        (lambda m: lacking(m, "counts", "rows"), "'counts.rows' is missing"),
        (lambda m: m.update(classes=["good", 1]), "'classes' is [\"good\", 1], expected a list of"),
        (lambda m: m.update(storage_dtype="int7"), 'is "int7", expected one of'),
        (lambda m: m["request"].update(options=None), "'request.options' is null"),
    ],
)
def test_what_a_strangers_manifest_lacks_is_named_with_its_file(spin, run_copy, spoil, words):
    """A manifest of another program agrees with its checksum; nothing else is sure."""
    source = run_copy / "activations"
    manifest = json.loads((source / "manifest.json").read_text())
    spoil(manifest)
    made = artifacts.write_manifest(source, "activations", manifest)
    selection = json.loads((run_copy / "selection/manifest.json").read_text())
    selection["parent"]["sha256"] = made["fingerprint"]
    artifacts.write_manifest(run_copy / "selection", "selection", selection)
    done = spin("train", run_copy / "selection", "-o", run_copy / "other")
    assert_refused(done, 4, source / "manifest.json", words)
    assert not (run_copy / "other").exists()


def test_texts_that_say_nothing_about_the_classes_end_with_a_word(spin, tmp_path):
    """Six texts, each as often good as bad: nothing is chased that rounding has left."""
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    words = ["a film", "the play", "one song", "this tale", "that dance", "some rhyme"]
    for name, times in (("train", 10), ("val", 4), ("test", 4)):
        rows = [(word, label) for word in words for label in ("good", "bad")] * times
        write_csv(data / f"{name}.csv", rows)
    activations, selection = out / "activations", out / "selection"
    options = ("--model", MODEL, "--layers", "0-1", "--pooling", "mean")
    assert spin("extract", data, "-o", activations, *options).code == 0
    done = spin("select", activations, "-o", selection)
    assert done.code == 0 and "no neuron says anything about the classes" in done.err
    assert spin("inspect", selection).code == 0
    done = spin("train", selection, "-o", out / "head")
    assert_refused(done, 3, "the selection has no neurons", "--max-length")
    assert not (out / "head").exists()


def test_a_metric_that_says_nothing_of_the_val_rows_is_refused_before_any_fit(spin, tmp_path):
    """Val rows of one class: there is no area under a curve, and all else is as ever."""
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    write_csv(data / "val.csv", [row for row in sentences() if row[1] == "good"])
    write_csv(data / "test.csv", [row for row in sentences() if row[1] == "bad"])
    activations, selection, head = out / "activations", out / "selection", out / "head"
    options = ("--model", MODEL, "--layers", "1", "--pooling", "mean")
    assert spin("extract", data, "-o", activations, *options).code == 0
    refusal = "--metric auroc: all 30 val rows have the same class"
    assert_refused(spin("select", activations, "--metric", "auroc"), 3, refusal)
    assert spin("select", activations).code == 0
    for folds in ("0", "5"):
        done = spin("train", selection, "--metric", "auroc", "--cv", folds)
        assert_refused(done, 3, refusal)
    assert not head.exists()
    done = spin("train", selection, "--json")
    assert done.code == 0
    said = [json.loads(done.out, parse_constant=pytest.fail)["metrics"]]
    said.append(json.loads((head / "metrics.json").read_text(), parse_constant=pytest.fail))
    done = spin("inspect", head, "--json")
    said.append(json.loads(done.out, parse_constant=pytest.fail)["metrics"])
    for report in said:  # out of fold there are both classes
        assert report["spin"]["val"]["auroc"] is report["spin"]["test"]["auroc"] is None
        assert report["spin"]["out-of-fold"]["auroc"] > 0.5
    shown = spin("inspect", head)
    assert shown.code == 0 and "nan" not in shown.out.lower() and "None" not in shown.out
    table = tmp_path / "given.csv"
    done = spin("predict", head, data / "test.csv", "--evaluate", "-o", table, "--json")
    assert done.code == 0, done.err
    assert "NaN" not in done.out
    assert_refused(spin("ablate", out, "--metric", "auroc"), 3, refusal)


def test_texts_that_are_all_alike_are_trained_on_with_a_word(spin, tmp_path):
    """Each text has most of its words from the one before it, so that all are one group."""
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    stories = [" ".join(f"word{k}" for k in range(3 * i, 3 * i + 12)) for i in range(40)]
    rows = [(f"{s} {('good', 'bad')[i % 2]}", "yn"[i % 2]) for i, s in enumerate(stories)]
    write_csv(data / "train.csv", rows)
    options = ("--layers", "1-2", "--pooling", "mean")
    assert spin("extract", data, "-m", MODEL, "-o", out / "activations", *options).code == 0
    assert spin("select", out / "activations").code == 0
    for options, rows_of in (((), 40), (("--masks-only",), 40), (("--cv", "0"), 36)):
        done = spin("train", out / "selection", "-o", out / "head", "--force", *options)
        assert done.code == 0, done.err
        assert f"note: {rows_of} of {rows_of} texts have so much of their wording in" in done.err
    done = spin("train", out / "selection", "-o", out / "head", "--force", "--masks-only", "--cv=0")
    assert done.code == 0 and "their wording" in done.err and " folds" not in done.err


def test_train_refuses_activations_that_were_made_again(spin, tiny_run, run_copy):
    shutil.rmtree(run_copy / "head")
    out = run_copy / "activations"
    args = ("extract", tiny_run / "data", "-m", MODEL, "-o", out, "--layers", "0-1", "--force")
    assert spin(*args).code == 0
    done = spin("train", run_copy / "selection")
    assert_refused(done, 4, run_copy / "selection", out, "spin select")
    assert not (run_copy / "head").exists()


# -- what predict refuses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "fine"}\n{"text": \n', ["line 2"]),
        ('{"text": "fine"}\n{"body": "fine"}\n', ["line 2", "text"]),
        ('{"text": "fine"}\n{"text": 5}\n', ["line 2", "5"]),
        ('{"text": "fine"}\n[1]\n', ["line 2"]),
        ('{"text": "fine"}\n{"text": ""}\n', ["line 2"]),
    ],
)
def test_a_bad_line_is_named_and_the_rows_before_it_are_kept(
    spin, tiny_run, tmp_path, content, words
):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    done = spin("predict", tiny_run / "run/head", source, "-o", tmp_path / "out.jsonl")
    assert_refused(done, 3, "in.jsonl", *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.partial"]
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 1


def test_a_bad_first_line_leaves_nothing(spin, tiny_run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": 5}\n')
    done = spin("predict", tiny_run / "run/head", tmp_path / "in.jsonl", "-o", tmp_path / "out")
    assert_refused(done, 3, "in.jsonl", "line 1")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_evaluating_an_unknown_label_is_refused(spin, tiny_run, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("fine", "good"), ("so so", "middling")])
    out = tmp_path / "out.jsonl"
    done = spin("predict", tiny_run / "run/head", source, "--evaluate", "-o", out)
    assert_refused(done, 3, "line 3", "middling", "bad, good")
    assert not out.exists()


def test_an_edited_head_is_refused(spin, run_copy):
    path = run_copy / "head/config.json"
    path.write_text(path.read_text().replace('"bad"', '"evil"'))
    assert_refused(spin("predict", run_copy / "head", "-", stdin=b"fine"), 4, path)


def reseal(folder: Path) -> None:
    """Write a manifest that fits the files, as a forger would."""
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    for name in ("kind", "schema", "versions", "files", "fingerprint"):
        del manifest[name]
    artifacts.write_manifest(folder, "head", manifest)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("tokenizer_sha256", "0" * 64, "tokenizer"),
        ("config_sha256", "0" * 64, "model configuration"),
        ("weights", [{"name": "model.safetensors", "bytes": 1, "sha256": "0" * 64}], "weights"),
    ],
)
def test_a_head_of_another_model_is_refused_by_what_differs(spin, run_copy, field, value, word):
    path = run_copy / "head/config.json"
    config = json.loads(path.read_text())
    config["model"][field] = value
    path.write_text(json.dumps(config))
    reseal(run_copy / "head")
    done = spin("predict", run_copy / "head", "-", stdin=b"fine")
    assert_refused(done, 4, run_copy / "head", f"another {word}", MODEL)


CONFIG_CHANGES = {
    "classes": [None, [], ["good"], ["good", "good"], ["good", 1], "bad", ["a", "b", "c"], {}],
    "features": [None, [], {}, "layer_01", [None], [[]], [{}]],
    "threshold": [-0.1, 1.5, float("nan"), float("inf"), "high", [], {}],
    "abstain_below": [-0.1, 1.5, float("nan"), float("inf"), "high", [], {}, True],
    "hidden": [None, -1, 1, 10**9, 1.0, "none", [], {}],
    "blocks": [-1, 0, 99, 10**9, 1e400, "all", [], {}],
    "storage_dtype": [None, "float8", 16, []],
    "model": [None, [], "bundled:minilm", {}],
    "reading": [None, [], "bundled:minilm", {}],
}
IDENTITY_CHANGES = {
    "config_sha256": [None, "", "0" * 64, 3, [], {}],
    "tokenizer_sha256": [None, "", "0" * 64, 3, [], {}],
    "commit": ["0" * 40, 3, [], {}],
    "adapter": ["some/adapter", 3, [], {"id": "some/adapter"}],
    "weights": [None, [], {}, "model.safetensors", [{}], [None], 3],
}
WEIGHT_CHANGES = {
    "name": [None, "../../model.safetensors", "/etc/passwd", "", 3, []],
    "bytes": [None, 0, -1, 10**30, "many", [], 1.5],
    "sha256": [None, "", "0" * 64, 3, [], {}],
}
FEATURE_CHANGES = {
    "layer": [
        None,
        "layer_99",
        "../../etc/passwd",
        3,
        "",
        "layer_00",
        "final",
        "layer_1",
        [],
        {},
        "layer_-1",
        "encoder_01",
        "decoder_01",
        "layer_01\n",
        "layer_٠١",
        "LAYER_01",
    ],
    "site": [None, "attention", 3, [], {}, "", "Hidden", True],
    "pooling": [None, "median", "mean", 3, [], {}, "", "MAX", True],
    "width": [None, 0, -1, 5, 385, 2**40, "many", [], float("nan"), float("inf"), True, {}, "384"],
    "neurons": [None, 0, -1, 1000, 10**12, "all", [], True, 1.0, "5", {}],
}
READING_CHANGES = {
    "model": [None, 3, [], {}, True],
    "max_length": [None, 0, -5, "long", [], float("inf"), 10**9, 1.5, True, {}],
    "truncation_side": [None, "middle", 3, [], {}, ""],
    "long": [None, "forever", 3, [], {}, ""],
    "overlap": [None, 1.0, -0.1, 0, "half", [], float("nan"), True],
    "dtype": [None, "float64", 3, [], {}, ""],
    "prompt_template": ["no place for it", "{text} {text}", 3, [], {}, "", True],
    "revision": [3, [], {}, True],
    "special_tokens": [None, 0, "yes", [], {}],
    "chat": [None, 1, "yes", [], {}],
    "system_prompt": [3, [], {}, True],
    "adapter": [3, [], {}, True],
    "bits": ["2bit", 8, [], {}, ""],
    "device_map": [3, [], {}, True],
}


CHANGES = (
    ((), CONFIG_CHANGES),
    (("features", 0), FEATURE_CHANGES),
    (("model",), IDENTITY_CHANGES),
    (("model", "weights", 0), WEIGHT_CHANGES),
    (("reading",), READING_CHANGES),
)


def config_mutations():
    """(place in the config, value, whether it is taken away instead)."""
    for place, changes in CHANGES:
        for field, values in changes.items():
            if field not in ("commit", "adapter"):  # which may be absent
                yield (*place, field), None, True
            for value in values:
                yield (*place, field), value, False


def test_no_mutated_config_is_accepted(run_copy, monkeypatch):
    folder = run_copy / "head"
    good = json.loads((folder / "config.json").read_text())
    load, kept = backbone.load, {}

    def load_once(options, *, depth=None):  # only the unchanged request may be kept
        if (options, depth) not in kept:
            kept[options, depth] = load(options, depth=depth)
        return kept[options, depth]

    monkeypatch.setattr(backbone, "load", load_once)
    prediction.open_predictor(folder, PredictConfig())
    accepted, tried = [], 0
    for place, value, remove in config_mutations():
        config = copy.deepcopy(good)
        parent = config
        for key in place[:-1]:
            parent = parent[key]
        there = parent[place[-1]] if not isinstance(parent, dict) else parent.get(place[-1])
        if not remove and value == there and type(value) is type(there):
            continue
        if remove:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))
        reseal(folder)
        tried += 1
        what = (*place, "removed" if remove else value)
        try:
            prediction.open_predictor(folder, PredictConfig())
            accepted.append((what, "accepted"))
        except ArtifactError as error:
            if str(folder) not in error.message:
                accepted.append((what, error.message))
        except Exception as error:
            accepted.append((what, repr(error)))
    assert tried >= 200
    assert not accepted, "\n".join(map(str, accepted))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 5000, "\ud800"])
def test_a_config_that_is_no_object_is_refused(run_copy, text):
    path = run_copy / "head/config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    reseal(run_copy / "head")
    with pytest.raises(ArtifactError, match="head"):
        prediction.open_predictor(run_copy / "head", PredictConfig())


def tensor_mutations(tensors):
    key = next(name for name in tensors if name.startswith("neurons."))
    neurons, weight, bias = tensors[key], tensors["weight"], tensors["bias"]
    yield "no weight", {"weight": None}
    yield "no bias", {"bias": None}
    yield "no neurons", {key: None}
    yield "one too many", {"extra": bias}
    yield "weight of other shape", {"weight": weight[:, :-1].copy()}
    yield "weight flat", {"weight": weight[0].copy()}
    yield "weight for more classes", {"weight": np.repeat(weight, 2, 0)}
    yield "weight float64", {"weight": weight.astype(np.float64)}
    yield "weight NaN", {"weight": np.full_like(weight, np.nan)}
    yield "weight infinite", {"weight": np.full_like(weight, -np.inf)}
    yield "weight empty", {"weight": weight[:0].copy()}
    yield "bias float32", {"bias": bias.astype(np.float32)}
    yield "bias longer", {"bias": np.repeat(bias, 2)}
    yield "bias scalar", {"bias": np.array(0.0)}
    yield "bias NaN", {"bias": np.full_like(bias, np.nan)}
    yield "negative neuron", {key: neurons - 2 * neurons.max() - 1}
    yield "neuron out of range", {key: neurons + np.int32(100_000)}
    yield "fewer neurons", {key: neurons[:-1].copy()}
    yield "more neurons", {key: np.append(neurons, neurons)}
    yield "neurons int64", {key: neurons.astype(np.int64)}
    yield "neurons float", {key: neurons.astype(np.float32)}
    yield "neurons square", {key: np.stack([neurons, neurons])}


def test_a_head_of_a_layer_that_the_model_lacks_is_refused(run_copy):
    folder = run_copy / "head"
    config = json.loads((folder / "config.json").read_text())
    config["blocks"] = 99
    feature = config["features"][0]
    layer, feature["layer"] = feature["layer"], "layer_99"
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "head.safetensors")
    key = f"neurons.{layer}.{feature['site']}.{feature['pooling']}"
    tensors[key.replace(layer, "layer_99")] = tensors.pop(key)
    save_file(tensors, folder / "head.safetensors")
    reseal(folder)
    with pytest.raises(ArtifactError, match="layer_99"):
        prediction.open_predictor(folder, PredictConfig())


def test_no_mutated_tensors_are_accepted(run_copy):
    path = run_copy / "head/head.safetensors"
    tensors = load_file(path)
    for what, change in tensor_mutations(tensors):
        changed = {k: v.copy() for k, v in (tensors | change).items() if v is not None}
        save_file(changed, path)
        reseal(path.parent)
        with pytest.raises(ArtifactError) as caught:
            prediction.open_predictor(path.parent, PredictConfig())
        assert str(path.parent) in caught.value.message, what


def test_no_damaged_tensor_file_is_accepted(run_copy):
    path = run_copy / "head/head.safetensors"
    good = path.read_bytes()
    for bad in (
        b"", good[:7], good[:50], good[:-1], good + b"\0", b"\xff" * 8 + good[8:],
        b"\x80\x04\x95" + good, good.replace(b"I32", b"XXX"), good.replace(b"weight", b"Weight"),
    ):  # fmt: skip
        path.write_bytes(bad)
        reseal(path.parent)
        with pytest.raises(ArtifactError, match="head"):
            prediction.open_predictor(path.parent, PredictConfig())


def test_a_head_cannot_ask_for_foreign_code_or_pickle(run_copy, monkeypatch):
    path = run_copy / "head/config.json"
    config = json.loads(path.read_text())
    config["reading"] |= {"trust_remote_code": True, "allow_pickle": True}
    path.write_text(json.dumps(config))
    reseal(path.parent)
    asked = []

    def look(options, *, depth=None):
        asked.append(options)
        raise ModelError("enough")

    monkeypatch.setattr(backbone, "load", look)
    with pytest.raises(ModelError):
        prediction.open_predictor(path.parent, PredictConfig())
    assert not asked[0].trust_remote_code
    assert not asked[0].allow_pickle


TRUST = ("trust_remote_code", "allow_pickle")


@pytest.mark.parametrize("given", [(), TRUST[:1], TRUST[1:], TRUST])
def test_whoever_runs_a_command_decides_about_foreign_code_and_pickle(
    spin, run_copy, monkeypatch, given
):
    asked = []

    def look(options, *, depth=None):
        asked.append(tuple(name for name in TRUST if getattr(options, name)))
        raise ModelError("enough")

    monkeypatch.setattr(backbone, "load", look)
    options = [f"--{name.replace('_', '-')}" for name in given]
    head = run_copy / "head"
    assert spin("predict", head, "-", *options, stdin=b"a film").code == 5
    assert spin("export", head, run_copy / "out", "--format", "pt2", *options).code == 5
    spin("verify", run_copy / "activations", *options)
    monkeypatch.setattr(
        reports, "report", lambda run, _, config, **_more: open_model(read_run(run), config)
    )
    with pytest.raises(LeftOut, match="enough"):
        spin("report", run_copy, *options)
    with pytest.raises(ModelError, match="enough"):
        Classifier.load(head, **dict.fromkeys(given, True))
    assert asked == [given] * 5
