"""Data sets: files of a folder, classes, splits, checks over all rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_cli.choices import Format
from spin_cli.config import DataConfig
from spin_cli.dataset import scan
from spin_cli.dataset.splits import pick_val, sort_labels
from spin_cli.errors import DataError, ModelError, SpinError, UsageError

CONFIG = DataConfig()


def write_rows(path: Path, labels, prefix: str = "", extra: str = "") -> Path:
    lines = [f"{prefix}text {i},{label}\n" for i, label in enumerate(labels)]
    data = ("text,label\n" + "".join(lines) + extra).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fail(data: Path, config: DataConfig = CONFIG, kind=DataError) -> SpinError:
    with pytest.raises(kind) as info:
        scan(data, config)
    assert info.value.exit_code == (3 if kind is DataError else 2)
    return info.value


def make_folder(folder: Path) -> Path:
    write_rows(folder / "train.csv", "abcabcabc", "train ")
    write_rows(folder / "dev.csv", "abc", "dev ")
    write_rows(folder / "test.csv.gz", "cba", "test ")
    return folder


def test_folder(tmp_path):
    data = scan(make_folder(tmp_path), CONFIG)
    assert len(data) == 15
    assert [s.split for s in data.sources] == ["train", "val", "test"]
    assert [s.rows for s in data.sources] == [9, 3, 3]
    assert [s.format for s in data.sources] == [Format.CSV] * 3
    assert data.classes == ("a", "b", "c")
    assert data.codes.dtype == np.int32
    assert data.codes.tolist() == [0, 1, 2] * 4 + [2, 1, 0]
    assert data.splits.dtype == np.uint8
    assert data.splits.tolist() == [0] * 9 + [1] * 3 + [2] * 3
    assert data.warnings == ()
    for source in data.sources:
        content = source.path.read_bytes()
        assert source.sha256 == hashlib.sha256(content).hexdigest()
        assert source.size == len(content)


def test_rows_from_anywhere(tmp_path):
    data = scan(make_folder(tmp_path), CONFIG)
    rows = list(data.rows())
    assert [r.id for r in rows[8:14]] == ["train-8", "val-0", "val-1", "val-2", "test-0", "test-1"]
    assert [data.classes[c] for c in data.codes] == [r.label for r in rows]
    for start in range(17):
        assert list(data.rows(start)) == rows[start:]


def test_single_file_is_split_into_train_and_val(tmp_path):
    path = write_rows(tmp_path / "reviews.csv", ["a"] * 80 + ["b"] * 20)
    data = scan(path, CONFIG)
    val = data.splits == 1
    assert val.sum() == 10
    assert np.bincount(data.codes[val]).tolist() == [8, 2]
    assert not (data.splits == 2).any()
    assert [s.split for s in data.sources] == ["train"]
    assert [r.id for r in data.rows(98)] == ["train-98", "train-99"]
    again = scan(path, CONFIG)
    assert (again.splits == data.splits).all()
    assert (scan(path, replace(CONFIG, seed=1)).splits != data.splits).any()


def test_split_is_the_same_for_ever(tmp_path):
    # Resuming and comparing runs rest on it: a change here is a breaking change.
    val = pick_val(np.arange(40, dtype=np.int32) % 2, 0.2, 0)
    assert np.flatnonzero(val).tolist() == [2, 4, 6, 27, 31, 32, 33, 37]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=300),
    st.floats(0, 0.99),
    st.integers(-5, 2**40),
)
def test_pick_val_properties(labels, fraction, seed):
    codes = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    val = pick_val(codes, fraction, seed)
    sizes, taken = np.bincount(codes), np.bincount(codes[val], minlength=codes.max() + 1)
    assert (taken < sizes).all()
    assert (np.abs(taken - np.minimum(sizes * fraction, sizes - 1)) <= 1).all()
    assert val.sum() <= round(len(codes) * fraction)
    if sizes.min() * (1 - fraction) >= 2:
        assert val.sum() == round(len(codes) * fraction)


def test_many_small_classes_share_val_evenly():
    codes = np.repeat(np.arange(100, dtype=np.int32), 5)
    taken = np.bincount(codes[pick_val(codes, 0.1, 0)], minlength=100)
    assert taken.sum() == 50
    assert taken.max() == 1
    assert 10 < taken[:50].sum() < 40  # not simply the first classes


def test_single_rows_stay_in_train(tmp_path):
    data = scan(
        write_rows(tmp_path / "x.csv", ["a"] * 20 + ["b"]), replace(CONFIG, val_fraction=0.5)
    )
    assert data.splits[20] == 0
    assert any("val has no row of the class 'b'" in w for w in data.warnings)
    assert any("train has a single row of the class 'b'" in w for w in data.warnings)


def test_empty_val_warns(tmp_path):
    path = write_rows(tmp_path / "x.csv", "abab")
    data = scan(path, replace(CONFIG, val_fraction=0))
    assert any("val is empty" in w for w in data.warnings)
    assert (data.splits == 0).all()


@pytest.mark.parametrize("labels, least", [("ab", 6), (range(50), 51)])
def test_too_few_rows_for_val_are_refused_at_once(tmp_path, labels, least):
    """Else all would be extracted before `select` says so."""
    path = write_rows(tmp_path / "x.csv", labels)
    error = fail(path)
    count = len(labels)
    assert f"x.csv: {count} rows of {count} classes leave none for val" in error.message
    assert f"{least} rows or more, two or more of a class" in error.hint
    more = write_rows(tmp_path / "y.csv", [*labels, *labels, *labels][:least])
    assert (scan(more, CONFIG).splits == 1).any()
    write_rows(tmp_path / "val.csv", labels)
    path.rename(tmp_path / "train.csv")
    more.unlink()
    assert len(scan(tmp_path, CONFIG)) == 2 * count


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5])
def test_val_fraction_out_of_range(tmp_path, fraction):
    path = write_rows(tmp_path / "x.csv", "abab")
    error = fail(path, replace(CONFIG, val_fraction=fraction), UsageError)
    assert "--val-fraction" in error.message


def test_label_order():
    assert sort_labels(["10", "2", "-1", "1.5"]) == ("-1", "1.5", "2", "10")
    assert sort_labels({"b", "nan", "A", "7", "inf"}) == ("7", "A", "b", "inf", "nan")


@pytest.mark.parametrize("split", ["val", "dev", "validation", "test"])
def test_label_that_train_lacks(tmp_path, split):
    write_rows(tmp_path / "train.csv", "abab")
    write_rows(tmp_path / f"{split}.csv", "abz")
    error = fail(tmp_path)
    assert f"{split}.csv, line 4: the label 'z'" in error.message
    assert "train has 'a', 'b'" in error.message
    assert "train.csv" in str(error.hint)


def test_classes_absent_from_val_and_test_warn(tmp_path):
    write_rows(tmp_path / "train.csv", "abcabc")
    write_rows(tmp_path / "val.csv", "ab", "v")
    write_rows(tmp_path / "test.csv", "a", "t")
    warnings = scan(tmp_path, CONFIG).warnings
    assert "val has no row of the class 'c'" in warnings
    assert "test has no row of the classes 'b', 'c'" in warnings


def test_texts_shared_with_train_warn(tmp_path):
    write_rows(tmp_path / "train.csv", "abab")
    write_rows(tmp_path / "val.csv", "ab", "other ")
    write_rows(tmp_path / "test.csv", "aba")
    (warning,) = scan(tmp_path, CONFIG).warnings
    assert warning.startswith("3 of the texts of test are in the train file too")


def test_text_as_label_warns(tmp_path):
    data = scan(write_rows(tmp_path / "x.csv", range(50)), replace(CONFIG, val_fraction=0))
    assert any("50 classes in 50 rows" in w for w in data.warnings)


def test_one_class(tmp_path):
    error = fail(write_rows(tmp_path / "x.csv", "aaa"))
    assert "x.csv: all rows have the label 'a'" in error.message


def test_missing_label_column_and_labels(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,lable\na,b\n")
    error = fail(path)
    assert "no column 'label'" in error.message
    assert error.hint == "--label-column lable"
    assert "line 4, column 'label': no label" in fail(write_rows(path, ["a", "b", ""])).message
    lines = tmp_path / "x.txt"
    lines.write_text("one\n")
    assert "hold no labels" in fail(lines, CONFIG, UsageError).message


def test_files_without_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("")
    assert "x.csv: the file is empty" in fail(path).message
    path.write_text("text,label\n")
    assert "x.csv: no rows" in fail(path).message
    path = tmp_path / "x.jsonl"
    path.write_text("\n")
    assert "x.jsonl: no rows" in fail(path).message


def test_duplicate_ids(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("id,text,label\nk,a,x\nm,b,y\nk,c,x\n")
    error = fail(path, replace(CONFIG, id_column="id"))
    assert "x.csv, line 4: the id 'k' of column 'id' is already on line 2" in error.message


def test_ids_with_the_same_hash_are_not_duplicates(tmp_path, monkeypatch):
    from spin_cli.dataset import checks, collection

    for module in (checks, collection):
        monkeypatch.setattr(module, "hash", lambda _: 7, raising=False)
    path = tmp_path / "x.csv"
    path.write_text("id,text,label\nk,a,x\nm,b,y\n")
    assert len(scan(path, replace(CONFIG, id_column="id", val_fraction=0))) == 2


def test_ids_of_two_files_may_overlap(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"id,text,label\n1,{split} a,x\n2,{split} b,y\n")
    data = scan(tmp_path, replace(CONFIG, id_column="id"))
    assert [r.id for r in data.rows()] == ["1", "2", "1", "2"]
    assert "2 ids occur in more than one file" in data.warnings[-1]


# Folders ------------------------------------------------------------------------------------


def test_folder_without_train(tmp_path):
    write_rows(tmp_path / "trian.csv", "ab")
    error = fail(tmp_path)
    assert f"{tmp_path}: no train file; found 'trian.csv'; expected train.*" in error.message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "found nothing" in fail(empty).message


@pytest.mark.parametrize("names", [("train.csv", "train.jsonl.gz"), ("val.csv", "dev.tsv")])
def test_ambiguous_folder(tmp_path, names):
    write_rows(tmp_path / "train.csv", "ab")
    for name in names:
        write_rows(tmp_path / name, "ab")
    error = fail(tmp_path)
    assert "more than one file for" in error.message
    for name in names:
        assert name in error.message


def test_other_files_are_passed_over(tmp_path):
    make_folder(tmp_path)
    for name in ("README.md", "train.md", ".train.csv", "train_old.csv", "train.csv.bak"):
        (tmp_path / name).write_text("x")
    (tmp_path / "train.tsv").mkdir()
    assert len(scan(tmp_path, CONFIG)) == 15


def test_explicit_format_takes_any_extension(tmp_path):
    lines = [json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(20)]
    (tmp_path / "train.json").write_text("\n".join(lines))
    assert "no train file; found 'train.json'" in fail(tmp_path).message
    assert scan(tmp_path, replace(CONFIG, format=Format.JSONL)).classes == ("0", "1")


def test_sources_that_cannot_be_read_twice(tmp_path):
    assert "stdin" in fail(Path("-")).message
    assert "/dev/null: a pipe or a device" in fail(Path("/dev/null")).message
    assert "no such file" in fail(tmp_path / "missing.csv").message


# Changes after the scan ---------------------------------------------------------------------


def test_changed_files_are_noticed(tmp_path):
    data = scan(make_folder(tmp_path), CONFIG)
    data.check_unchanged()
    path = tmp_path / "dev.csv"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"dev text 1", b"dev text 9"))
    with pytest.raises(DataError, match=r"dev\.csv: the file changed"):
        data.check_unchanged()
    for labels in ("ab", "abca"):
        write_rows(path, labels, "dev ")
        with pytest.raises(DataError, match=r"dev\.csv: the file changed"):
            list(data.rows())
    path.unlink()
    with pytest.raises(DataError, match=r"dev\.csv: no such file"):
        data.check_unchanged()


# Folders of the datasets library ------------------------------------------------------------


def test_saved_dataset_needs_the_library(tmp_path, monkeypatch):
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModelError, match=str(tmp_path)) as caught:
        scan(tmp_path, CONFIG)
    assert caught.value.exit_code == 5
    assert caught.value.hint == "pip install datasets"


def test_saved_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})

    def make(split, count):
        rows = {"text": [f"{split} {i}" for i in range(count)], "label": [1, 0] * (count // 2)}
        return datasets.Dataset.from_dict(rows, features=features)

    train = make("train", 12).select(range(11, 1, -1))  # with an index over its rows
    both = datasets.DatasetDict({"train": train, "validation": make("val", 4)})
    both.save_to_disk(str(tmp_path / "both"))
    data = scan(tmp_path / "both", CONFIG)
    assert data.classes == ("neg", "pos")
    assert [(s.split, s.rows) for s in data.sources] == [("train", 10), ("val", 4)]
    rows = list(data.rows(9))
    assert [(r.id, r.text, r.label) for r in rows[:2]] == [
        ("train-9", "train 2", "pos"),
        ("val-0", "val 0", "pos"),
    ]
    data.check_unchanged()
    one = scan(tmp_path / "both" / "train", CONFIG)
    assert len(one) == 10
    assert (one.splits == 1).sum() == 1
    error = fail(tmp_path / "both", replace(CONFIG, text_column="txt"))
    assert error.hint == "--text-column text"
    (tmp_path / "both" / "dataset_dict.json").write_text("[]")
    assert "not a list of splits" in fail(tmp_path / "both").message
    for file in (tmp_path / "both" / "train").glob("*.arrow"):
        file.write_bytes(b"broken")
    assert "not a whole saved data set" in fail(tmp_path / "both" / "train").message


# Speed --------------------------------------------------------------------------------------


def test_scan_of_100k_rows_is_quick(tmp_path):
    path = write_rows(tmp_path / "x.csv", [i % 5 for i in range(100_000)])
    start = time.process_time()
    assert len(scan(path, CONFIG)) == 100_000
    assert time.process_time() - start < 3  # 0.25 s on an idle core
