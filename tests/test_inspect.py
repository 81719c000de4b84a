"""`spin inspect`: artifacts of spin and files of anybody, the hostile ones too."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from spin_cli import activations, inspection
from spin_cli.activations import Feature
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.cli.terminal import bar, printable
from spin_cli.inspection import overlap, statistics
from spin_cli.inspection.tree import hdf5_tree

# -- numbers ---------------------------------------------------------------------------------


def matrix() -> np.ndarray:
    rng = np.random.default_rng(0)
    X = rng.normal(0, 1, (300, 40)).astype(np.float32)
    X[:, 3] = 0  # dead
    X[:, 4] = 2.5  # constant
    X[7, 5] = 3000  # massive in one row
    X[:, 6] = 150  # above 100, but not 1,000 times the median
    X[rng.random(X.shape) < 0.1] = 0
    X[:, 4] = 2.5
    return X


def write_matrix(folder: Path, X: np.ndarray) -> Feature:
    feature = Feature("layer_01", Site.HIDDEN, Pooling.MEAN, X.shape[1])
    activations.create_layer(folder / feature.file, [feature], len(X), StorageDtype.FLOAT32)
    with activations.RowWriter(folder, [feature]) as writer:
        writer.write(feature, 0, X)
    return feature


def test_statistics_are_those_of_the_whole_matrix(tmp_path, monkeypatch):
    X = matrix()
    feature = write_matrix(tmp_path, X)
    monkeypatch.setattr(statistics, "BLOCK_VALUES", 40 * 17)  # many blocks, the last one short
    found = statistics.summarise(tmp_path, feature, StorageDtype.FLOAT32, [slice(0, 300)], 2)
    assert found.mean == pytest.approx(X.mean(dtype=np.float64), rel=1e-6)
    assert found.sd == pytest.approx(X.std(dtype=np.float64), rel=1e-6)
    assert found.zeros == np.mean(X == 0)
    assert (found.largest, found.largest_neuron) == (3000, 5)
    assert (found.dead, found.constant, found.massive, found.overflowed) == (1, 1, (5,), 2)
    plain = [
        j
        for i, j in product(*map(range, X.shape))
        if abs(X[i, j]) > 100 and abs(X[i, j]) >= 1000 * np.median(np.abs(X[i]))
    ]
    assert sorted(set(plain)) == [5]


def test_a_sample_of_rows_is_spread_and_of_the_size_that_was_asked_for():
    runs = statistics.sample_of(10_000, 320)
    rows = np.concatenate([np.arange(run.start, run.stop) for run in runs])
    assert len(rows) == len(set(rows)) == 320
    assert rows[0] == 0
    assert rows[-1] == 9999
    assert np.diff([run.start for run in runs]).max() < 800
    assert statistics.sample_of(100, 320) == statistics.sample_of(100, 0) == [slice(0, 100)]


def test_overlap_of_masks_is_counted_by_hand(tmp_path):
    with h5py.File(tmp_path / "masks.h5", "w") as file:
        for pooling, neurons in (("max", [1, 2, 3, 9]), ("mean", [2, 3, 4, 8])):
            group = file.create_group(f"layer_01/ffn/{pooling}")
            group["neurons"] = np.array(neurons, np.int32)
            group["cumulative"] = [0.5, 0.7, 0.8, 1.0]
            group["class_importance"] = np.float32([[8, 2, 0, 0], [0, 0, 6, 4], [1, 1, 1, 1]])
            group.attrs["width"] = 100
    found = overlap.overlaps(tmp_path, 0.8, ["a", "b", "c"])
    (pair,) = found["poolings"]
    assert pair["poolings"] == ["max", "mean"]
    assert pair["jaccard"] == pytest.approx(2 / 4)  # {1, 2, 3} and {2, 3, 4}
    assert pair["chance"] == pytest.approx(0.09 / 5.91)
    by_pair = {tuple(e["classes"]): e["jaccard"] for e in found["classes"]}
    assert by_pair[("a", "b")] == 0  # the first, and the third and fourth neuron
    assert by_pair[("a", "c")] == pytest.approx(1 / 4)
    assert overlap.overlaps(tmp_path, 0.8, ["a", "b"])["classes"] == []


def test_chance_is_what_random_masks_give():
    rng = np.random.default_rng(0)
    drawn = [
        overlap.jaccard(set(rng.permutation(200)[:60]), set(rng.permutation(200)[:30]))
        for _ in range(400)
    ]
    assert overlap.by_chance(60, 30, 200) == pytest.approx(np.mean(drawn), abs=0.01)


# -- spin's own ------------------------------------------------------------------------------


def test_every_artifact_and_every_file_of_a_run_is_shown(spin, tiny_run):
    run = tiny_run / "run"
    paths = [run, *(p for p in run.rglob("*") if p.name not in ("README.md", "log.json"))]
    assert len(paths) > 12
    for path in paths:
        done = spin("inspect", path)
        assert done.code == 0, (path, done.err)
        assert done.out.strip()


def test_a_json_file_is_shown_over_lines(spin, tiny_run):
    path = tiny_run / "run/head/metrics.json"
    shown = spin("inspect", path).out
    assert len(shown.splitlines()) > 50
    assert json.loads(shown) == json.loads(path.read_text())


def test_the_numbers_of_a_run_are_in_the_json(spin, tiny_run):
    found = json.loads(spin("inspect", tiny_run / "run", "--json", "--rows", "50").out)
    parts = found["artifacts"]
    assert parts["activations"]["statistics"]["rows"] < 100
    matrices = parts["activations"]["statistics"]["matrices"]
    assert len(matrices) == len(parts["activations"]["features"]) == 15
    first = next(m for m in matrices if (m["layer"], m["pooling"]) == ("layer_00", "first"))
    assert first["dead"] + first["constant"] == 384  # BERT's first token is the same in all texts
    assert len(parts["selection"]["scores"]) == 15
    chosen = parts["head"]["metrics"]["chosen"]["neurons"]
    assert sum(f["neurons"] for f in parts["head"]["neurons"]) == chosen


def test_damaged_artifacts_end_with_code_4(spin, tiny_run, tmp_path):
    for name, old, new in (
        ("selection/scores.csv", b"val_score", b"val_scare"),
        ("head/metrics.json", b'"layers_total"', b'"layers_tatal"'),
        ("head/config.json", b'"reading"', b'"raeding"'),
    ):
        run = Path(shutil.copytree(tiny_run / "run", tmp_path / old.decode().strip('"')))
        content = (run / name).read_bytes()
        assert old in content
        (run / name).write_bytes(content.replace(old, new, 1))
        done = spin("inspect", run / Path(name).parent)
        assert done.code == 4, (name, done.out[-300:])
        assert "Traceback" not in done.err


# -- files of others -------------------------------------------------------------------------


@pytest.fixture
def strange(tmp_path) -> Path:
    """A file with about everything that HDF5 allows."""
    path = tmp_path / "strange.h5"
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
    with h5py.File(path, "w") as file:
        file["a/b/c"] = np.arange(6).reshape(2, 3)
        file["a/compound"] = np.zeros(3, [("x", "f4"), ("y", "S5")])
        file["a/text"] = ["one", "two"]
        file["a/bits"] = np.array([True, False])
        file["a/scalar"] = 3.5
        file["a/none"] = h5py.Empty("f4")
        file.create_dataset("a/huge", (10**9, 10**6), "f8", chunks=(1, 1000))
        file.create_dataset("a/packed", data=np.zeros(1000), compression="gzip", shuffle=True)
        file.create_virtual_dataset("a/virtual", layout)
        file.create_dataset("raw", (4,), "f4", external=[("/etc/hostname", 0, 16)])
        file["soft"] = h5py.SoftLink("/nowhere")
        file["outside"] = h5py.ExternalLink("/etc/passwd", "/x")
        file["a/loop"] = file["a"]
        file["type"] = np.dtype("f4")
        file["\x1b[2J\u202eevil"] = 1
        file.attrs["big"] = np.zeros(5000)
        file.attrs["long"] = "x" * 5000
        file.attrs["escape"] = "\x1b]0;title\x07"
        file["a"].attrs["reference"] = file["a/b"].ref
        file[b"not utf-8 \xff"] = 2
    return path


def test_a_strange_file_is_shown_whole_and_nothing_outside_is_opened(spin, strange, monkeypatch):
    done = spin("inspect", strange)
    assert done.code == 0, done.err
    for words in (
        "(2, 3)", "(1000000000, 1000000)", "shuffle", "/etc/passwd (not opened)", "/nowhere",
        "/etc/hostname (not opened)", "external link → /etc/passwd:/x (not followed)",
        "(seen above)", "empty", "string", "…",
    ):  # fmt: skip
        assert words in done.out, words
    assert "\x1b" not in done.out
    assert "\u202e" not in done.out
    assert max(map(len, done.out.splitlines())) < 400
    found = {e["name"]: e for e in json.loads(spin("inspect", strange, "--json").out)["objects"]}
    assert found["huge"]["bytes"] == 0
    assert found["virtual"]["sources"] == ["/etc/passwd"]
    assert found["soft"]["kind"] == "soft link"


def test_the_tree_has_a_line_for_every_object(strange):
    found = hdf5_tree(strange)
    with h5py.File(strange) as file:
        direct = len(file) + len(file["a"]) + len(file["a/b"])
    assert len(found) == direct + 1


def test_many_objects_and_great_depth_end(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection.tree, "MAX_OBJECTS", 30)
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for i in range(100):
            file[f"d{i}"] = i
    found = hdf5_tree(tmp_path / "many.h5")
    assert found[-1]["kind"] == "left out"
    assert len(found) < 35
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        file.create_group("/".join("x" * 200))
    assert hdf5_tree(tmp_path / "deep.h5")[-1]["kind"] == "left out"


def test_safetensors_of_others_are_shown(spin, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w.1": np.zeros((3, 4), np.float16), "\x1b[31mred": np.ones(2)}, path, {"by": "me"})
    done = spin("inspect", path)
    assert done.code == 0
    assert all(words in done.out for words in ("(3, 4)", "24 B", "by=me", "\\x1b[31mred"))
    assert "\x1b" not in done.out


@pytest.mark.parametrize("suffix", [".h5", ".safetensors", ".json", ".txt"])
@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"\xff" * 100, b"9" * 8 + b"{}"])
def test_garbage_is_refused_without_a_traceback(spin, tmp_path, suffix, content):
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(content)
    done = spin("inspect", path)
    assert done.code == 4
    assert str(path) in done.err
    assert "Traceback" not in done.err


def test_a_truncated_file_is_refused(spin, strange, tmp_path):
    content = strange.read_bytes()
    for length in (100, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.h5").write_bytes(content[:length])
        done = spin("inspect", tmp_path / "cut.h5")
        assert done.code in (0, 4)
        assert "Traceback" not in done.err


def test_bars_and_escapes():
    assert bar(0, 4) == "    "
    assert bar(1, 4) == bar(7, 4) == "████"
    assert bar(0.5, 4) == "██  "
    assert bar(1 / 32, 4) == "▏   "
    assert printable("a\tb\x1b[0m\u202e\udcff") == "a\\tb\\x1b[0m\\u202e\\udcff"
    assert printable("né 日本") == "né 日本"
