"""Texts with any number of labels, from their cells to their predictions."""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from spin_cli import Classifier, artifacts, atomic, label_metrics, metrics, probe, verification
from spin_cli.choices import Calibration, Metric, Solver
from spin_cli.config import DataConfig, SelectConfig
from spin_cli.dataset import read_rows, scan
from spin_cli.dataset.labels import LabelError, parse_labels
from spin_cli.dataset.stratification import deal_out, pick_val_labels
from spin_cli.errors import ArtifactError, DataError, UsageError
from spin_cli.head import CONFIG, load_head, save_head
from spin_cli.training import baselines, label_decisions, mlp
from spin_cli.training.folds import fold_rows
from spin_cli.training.label_report import paired_p
from spin_cli.training.search import Split
from tests.helpers import BAD, GOOD, json_lines, run_quietly, write_csv
from tests.test_head import make_head
from tests.test_probe import alike

SEVERAL = DataConfig(label_separator="|")
NAMES = tuple("abcde")


@functools.cache
def made_up(rows=300, seed=0):
    """Features, an indicator of labels from frequent to rare, and probabilities for them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 12)).astype(np.float32)
    z = X @ rng.normal(size=(12, 5)) + rng.normal(size=(rows, 5)) - np.array([0, 1, 2, 4, 6])
    Y = (z > 0).astype(np.int64)
    P = metrics.sigmoid(z + rng.normal(size=z.shape) * 2)
    return X, Y, P


# -- scores and thresholds -------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn():
    _, Y, P = made_up()
    thresholds = np.array([0.5, 0.4, 0.3, 0.6, 0.2])
    found = metrics.evaluate(Y, P, NAMES, thresholds)
    said = (thresholds <= P).astype(int)
    expected = {
        "accuracy": reference.accuracy_score(Y, said),
        "micro_f1": reference.f1_score(Y, said, average="micro"),
        "macro_f1": reference.f1_score(Y, said, average="macro"),
        "auroc": reference.roc_auc_score(Y, P, average="macro"),
        "log_loss": np.mean([reference.log_loss(Y[:, k], P[:, k]) for k in range(5)]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    table = reference.precision_recall_fscore_support(Y, said, zero_division=0)
    for k, label in enumerate(found["per_class"].values()):
        one = [label[name] for name in ("precision", "recall", "f1", "rows")]
        assert one == pytest.approx([column[k] for column in table])
        assert label["auroc"] == pytest.approx(reference.roc_auc_score(Y[:, k], P[:, k]))


def test_thresholds_are_those_of_a_plain_loop():
    _, Y, P = made_up()
    grid = [i / 100 for i in range(1, 100)]
    for k, found in enumerate(label_metrics.best_thresholds(Y, P)):
        f1 = []
        for t in grid:
            said = [p >= t for p in P[:, k]]
            right = sum(a and b for a, b in zip(said, Y[:, k], strict=True))
            f1.append(2 * right / (sum(said) + Y[:, k].sum()))
        padded = [f1[0]] * 3 + f1 + [f1[-1]] * 3
        smooth = [sum(padded[i : i + 7]) / 7 for i in range(99)]
        assert smooth[grid.index(round(found, 2))] == pytest.approx(max(smooth))


def test_a_label_without_a_row_has_no_threshold_of_its_own():
    _, Y, P = made_up()
    Y = Y.copy()
    Y[:, 4] = 0
    assert label_metrics.best_thresholds(Y, P)[4] == 0.5
    said = label_metrics.decide(P)
    said[:, 4] = 0
    left = reference.f1_score(Y[:, :4], said[:, :4], average="macro")
    assert label_metrics.macro_f1(Y, said) == pytest.approx(left)


def test_resamples_are_scored_as_if_drawn_row_by_row():
    _, Y, P = made_up()
    said = label_metrics.decide(P)
    samples = metrics.resamples(len(Y), 7)
    found = label_metrics.resampled(Y, said, samples)
    for at, rows in enumerate(samples):
        assert found["micro_f1"][at] == pytest.approx(label_metrics.micro_f1(Y[rows], said[rows]))
        assert found["macro_f1"][at] == pytest.approx(label_metrics.macro_f1(Y[rows], said[rows]))
        assert found["accuracy"][at] == pytest.approx((Y[rows] == said[rows]).all(1).mean())
        recall = reference.recall_score(Y[rows], said[rows], average=None)
        np.testing.assert_allclose(found["recall"][at], recall, rtol=1e-6)
    assert paired_p(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * 2 / 100)
    assert paired_p(np.zeros(4)) == 1.0


def test_certainty_is_the_product_over_labels():
    P = np.array([[0.9, 0.2], [0.4, 0.1]])
    said = np.array([[1, 0], [0, 0]])
    np.testing.assert_allclose(metrics.certainty(P, said), [0.9 * 0.8, 0.6 * 0.9])


# -- fitting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "balanced"), [(0.0, False), (1.0, False), (0.0, True)])
def test_fits_are_those_of_one_versus_rest(share, balanced):
    X, Y, _ = made_up()
    X = X.astype(np.float64)
    weight = probe.balanced_weights(Y, 5) if balanced else None
    fit = probe.fit(X, Y, 5, l1=4 * share, l2=4 * (1 - share), sample_weight=weight, tol=1e-6)
    model = LogisticRegression(
        C=0.25, l1_ratio=share, solver="saga" if share else "lbfgs", tol=1e-8, max_iter=50_000,
        class_weight="balanced" if balanced else None,
    )  # fmt: skip
    expected = OneVsRestClassifier(model).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(probe.predict_proba(fit, X, 5), expected, atol=2e-5)
    assert fit.multi_class == "labels"


@pytest.mark.parametrize("l1", [0.0, 2.0])
def test_labels_of_all_rows_or_none_are_certain(l1):
    X, Y, _ = made_up()
    Y = np.hstack([Y, np.ones((len(Y), 1), int), np.zeros((len(Y), 1), int)])
    probs = probe.predict_proba(probe.fit(X, Y, 7, l1=l1, l2=2.0 - l1, tol=1e-4), X, 7)
    assert probs[:, 5].min() > 1 - 1e-9 and probs[:, 6].max() < 1e-9


@pytest.mark.parametrize("l1", [0.0, 2.0])
def test_a_label_that_no_column_speaks_of_gets_no_weights(l1):
    X, y = alike(2)
    told = (np.arange(600) < 200).astype(int)
    fit = probe.fit(X, np.stack([y, told], 1), 2, l1=l1, l2=2.0 - l1, tol=1e-4)
    assert fit.converged and np.abs(fit.coef[0]).max() < 1e-6 and np.abs(fit.coef[1]).max() > 0.1
    alone = probe.fit(X, y[:, None], 1, l1=l1, l2=2.0 - l1, tol=1e-4)
    assert alone.converged and not alone.coef.any()
    path = probe.fit_path(X, np.stack([y, told], 1), X, told, 2, score=lambda *_: 0.0, points=2)
    assert path.fits[0].converged and path.fits[0].coef.any(1).tolist() == [False, True]


def test_the_path_ranks_neurons_by_all_labels():
    X, Y, _ = made_up()
    noise = np.random.default_rng(1).normal(size=(len(X), 30)).astype(np.float32)
    rows = np.arange(len(X))
    found = probe.rank_neurons(
        np.hstack([X, noise]), Y, rows[:200], rows[200:], 5,
        score=metrics.score_function(Metric.MACRO_F1), config=SelectConfig(bootstrap=2),
    )  # fmt: skip
    assert found.class_importance.shape == (5, len(found.neurons))
    np.testing.assert_allclose(found.class_importance.sum(0), found.importance, rtol=1e-5)
    assert set(found.neurons[:8]) <= set(range(12))
    assert found.frequency is not None and found.frequency[:12].mean() > 0.9
    with pytest.raises(UsageError, match="one label a row"):
        probe.rank_neurons(
            X, Y, rows, rows, 5, score=lambda *_: 0.0, config=SelectConfig(solver=Solver.REFERENCE)
        )


def test_hidden_units_learn_labels():
    X, Y, _ = made_up()
    rows = np.arange(len(X))
    split = Split(Y, rows[:220], rows[220:], 5, Metric.MACRO_F1)
    layers, _ = mlp.fit_mlp(X, split, seed=0)
    assert layers.weight.shape[0] == 5
    assert np.nanmean(label_metrics.auroc(Y[220:], layers.val_probs)) > 0.85
    assert not np.allclose(layers.val_probs.sum(1), 1.0)


def test_words_are_judged_for_each_label():
    texts = [f"{'red' if i % 2 else 'blue'} {'big' if i % 3 else 'small'} thing" for i in range(60)]
    Y = np.array([[i % 2, i % 3 > 0, 1] for i in range(60)], np.int64)
    (probs,) = baselines.by_words(texts, Y, np.arange(40), np.arange(40, 60), 3, [10.0])
    np.testing.assert_array_equal(probs > 0.5, Y[40:] > 0)


# -- decisions -------------------------------------------------------------------------------


def test_scaling_is_the_best_of_a_fine_grid():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(600, 3)) * 2 - np.array([0, 0, 3])
    Y = (rng.random(z.shape) < metrics.sigmoid(0.5 * z)).astype(np.int64)
    Y[:, 2] &= np.arange(600) < 100  # too few for a slope of its own
    probs, notes = metrics.sigmoid(z), []
    known = Y, probs, ("a", "b", "c")
    slope, shift = label_decisions.fit_labels(*known, Calibration.TEMPERATURE, "val", notes)
    for k in range(2):
        grid = np.linspace(0.2, 1.5, 261)
        losses = [reference.log_loss(Y[:, k], metrics.sigmoid(s * z[:, k])) for s in grid]
        assert slope[k] == pytest.approx(grid[int(np.argmin(losses))], abs=0.006)
    assert "c;" in notes[0] and not shift.any()
    _, shift = label_decisions.fit_labels(*known, Calibration.PER_CLASS, "val", notes)
    assert shift[0] != 0 and shift[2] == 0


def test_rare_labels_keep_one_half_and_are_named():
    _, Y, P = made_up()
    Y = Y.copy()
    Y[np.flatnonzero(Y[:, 4])[3:], 4] = 0
    notes: list[str] = []
    found = label_decisions.choose_thresholds(Y, P, NAMES, Metric.MACRO_F1, "val", notes)
    assert found[4] == 0.5 and "e (3)" in notes[0]
    np.testing.assert_array_equal(found[:4], label_metrics.best_thresholds(Y, P)[:4])
    plain = label_decisions.choose_thresholds(Y, P, NAMES, Metric.ACCURACY, "val", notes)
    assert (plain == 0.5).all() and len(notes) == 1


# -- rows and splits -------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_cells_and_lists_hold_any_number_of_labels(tmp_path):
    table = write(tmp_path / "t.csv", "text,label\none,b | a\ntwo,\nthree,a\n")
    lines = write(
        tmp_path / "t.jsonl",
        '{"text": "one", "label": ["b", "a"]}\n{"text": "two", "label": []}\n'
        '{"text": "three", "label": "a"}\n{"text": "four", "label": null}\n',
    )
    for path, count in ((table, 3), (lines, 4)):
        rows = read_rows(path, label_separator="|", require_label=True)
        assert [row.label for row in rows] == ["b|a", "", "a", ""][:count]


def test_parquet_holds_lists_of_labels(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": ["one", "two"], "label": [["b", "a"], []]})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_rows(tmp_path / "t.parquet", label_separator="|", require_label=True)
    assert [row.label for row in rows] == ["b|a", ""]


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("a|b|a", "the label 'a' twice"),
        ("a||b", "an empty name"),
        ("a|", "an empty name"),
        ('["a", "b"]', "a list in one cell"),
        (["a", "a"], "the label 'a' twice"),
        (["a|b"], "holds the separator"),
        (["a", ""], "an empty name"),
        (["a", None], "a list with a NoneType"),
        ([["a"]], "a list with a list"),
    ],
)
def test_cells_that_are_no_labels_are_refused(cell, what):
    with pytest.raises(LabelError, match=what.replace("[", r"\[")):
        parse_labels(cell, "|")


def test_bad_cells_are_named_with_their_line(tmp_path):
    path = write(tmp_path / "t.csv", "text,label\none,a|b\ntwo,a|a\n")
    with pytest.raises(DataError, match=r"line 3, column 'label': the label 'a' twice"):
        scan(path, SEVERAL)
    path = write(tmp_path / "t.jsonl", '{"text": "one", "label": ["a"]}\n')
    with pytest.raises(DataError, match="one label was expected") as found:
        list(read_rows(path, require_label=True))
    assert "--label-separator" in str(found.value.hint)
    for separator in ("", "\n", "x" * 17):
        with pytest.raises(UsageError, match="--label-separator"):
            list(read_rows(path, label_separator=separator))


def rows_of(pairs) -> str:
    return "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(pairs))


def test_what_is_odd_about_labels_is_said(tmp_path):
    found = scan(write(tmp_path / "t.csv", rows_of(["a", "b"] * 20 + [""])), SEVERAL)
    assert any("no row has more than one label" in warning for warning in found.warnings)
    found = scan(write(tmp_path / "t.csv", rows_of(["a|b", "a"] * 20 + ["a|c"])), SEVERAL)
    assert found.classes == ("a", "b", "c")
    assert "every row of train has the label 'a'" in found.warnings
    assert "train has a single row of the class 'c'" in found.warnings
    found = scan(write(tmp_path / "t.csv", rows_of(["a|b", "a"] * 20 + ["a|c", "a|d"])), SEVERAL)
    assert "train has a single row of each of the classes 'c', 'd'" in found.warnings
    (tmp_path / "t.csv").rename(tmp_path / "train.csv")
    write(tmp_path / "test.csv", rows_of(["a", "b|z"]))
    with pytest.raises(DataError, match=r"test.csv, line 3: the label 'z' of test is not in train"):
        scan(tmp_path, SEVERAL)
    with pytest.raises(DataError, match="no row has a label"):
        scan(write(tmp_path / "none.csv", rows_of(["", ""])), SEVERAL)


def test_every_part_gets_its_share_of_every_label():
    _, Y, _ = made_up()
    for shares in ((0.9, 0.1), (0.2,) * 5):
        part = deal_out(Y, shares, seed=3)
        for at, share in enumerate(shares):
            np.testing.assert_allclose((part == at).sum(), share * len(Y), atol=4)
            np.testing.assert_allclose(Y[part == at].sum(0), share * Y.sum(0), atol=2)
    assert (deal_out(Y, (0.9, 0.1), 3) == deal_out(Y, (0.9, 0.1), 3)).all()
    assert (deal_out(Y, (0.9, 0.1), 3) != deal_out(Y, (0.9, 0.1), 4)).any()
    assert set(fold_rows(Y, 4, 0)) == set(range(4))
    lonely = np.hstack([Y, np.eye(len(Y), 1, dtype=int)])
    for seed in range(5):
        val = pick_val_labels(lonely, 0.6, seed)
        assert (lonely[~val].sum(0) > 0).all()


# -- the head --------------------------------------------------------------------------------


def label_head(classes=("a", "b")):
    head = make_head(("a", "b", "c"))
    return replace(
        head, classes=classes, weight=head.weight[: len(classes)], bias=head.bias[: len(classes)],
        thresholds=np.array([0.3, 0.6, 0.5][: len(classes)]), label_separator="|",
    )  # fmt: skip


def test_a_head_of_labels_comes_back_and_decides_label_by_label(tmp_path):
    head = label_head()
    save_head(tmp_path, head)
    loaded = load_head(tmp_path)
    assert loaded.multi_label and loaded.label_separator == "|"
    values = np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)
    probs = loaded.probabilities(values)
    z = values.astype(float) @ head.weight.T.astype(float) + head.bias
    np.testing.assert_allclose(probs, 1 / (1 + np.exp(-z)))
    np.testing.assert_array_equal(loaded.decide(probs), (probs >= [0.3, 0.6]).astype(int))
    assert loaded.names(np.array([1, 0])) == ["a"] and loaded.names(np.array([0, 0])) == []
    moved = loaded.deciding_at({"b": 0.2})
    np.testing.assert_array_equal(moved.decide(probs), (probs >= [0.3, 0.2]).astype(int))
    assert (moved.limit(0), moved.limit(1), loaded.limit(1)) == (0.3, 0.2, 0.6)
    save_head(tmp_path, make_head())
    assert not {"multi_label", "thresholds"} & set(json.loads((tmp_path / CONFIG).read_text()))


@pytest.mark.parametrize(
    "change",
    [
        {"multi_label": 1},
        {"multi_label": False},
        {"thresholds": {"a": 0.5}},
        {"thresholds": {"b": 0.5, "a": 0.5}},
        {"thresholds": {"a": 0.5, "b": 1.5}},
        {"thresholds": {"a": 0.5, "b": float("nan")}},
        {"thresholds": {"a": 0.5, "b": None}},
        {"thresholds": [0.5, 0.5]},
        {"threshold": 0.5},
        {"label_separator": ""},
        {"label_separator": "a"},
        {"label_separator": None},
        {"classes": ["a", "b", "c"]},
    ],
)
def test_forged_heads_of_labels_are_refused(tmp_path, change):
    save_head(tmp_path, label_head())
    load_head(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ArtifactError):
        load_head(tmp_path)


# -- all of it -------------------------------------------------------------------------------


def tagged(words, start) -> list[tuple[str, str]]:
    """Short texts about a meal, a film, both or neither, praised or not."""
    rows = []
    for number, word in enumerate(words):
        for about in (("meal",), ("film",), ("meal", "film"), ("weather",)):
            subject = " and the ".join(about)
            labels = ["praise"] * (word in GOOD) + [tag for tag in about if tag != "weather"]
            rows.append((f"{start} the {subject} as {word} as ever, {number}.", "|".join(labels)))
    return rows


@pytest.fixture(scope="session")
def run(shared) -> Path:
    """All stages on 80 texts, made by the command line."""

    def fill(folder: Path) -> None:
        data = folder / "labels-data"
        data.mkdir()
        for split, start in (("train", "I found"), ("val", "They called"), ("test", "She thought")):
            write_csv(data / f"{split}.csv", tagged(GOOD + BAD, start))
        printed = run_quietly(
            "run", data, "-m", "bundled:minilm", "-o", folder / "run", "--label-separator", "|",
            "--layers", "0-2", "--site", "hidden", "--pooling", "mean",
        )  # fmt: skip
        assert "Labels on test" in printed

    return shared("labels", fill) / "run"


def test_samples_hold_names_and_an_indicator(run):
    with h5py.File(run / "activations" / "samples.h5") as file:
        names, labels = list(file["labels"].attrs["names"]), file["labels"][:]
        text = file["label"].asstr()[:]
    assert names == ["film", "meal", "praise"] and labels.dtype == np.uint8
    for row, cell in zip(labels, text, strict=True):
        assert {names[k] for k in np.flatnonzero(row)} == set(cell.split("|")) - {""}
    request = json.loads((run / "activations" / "manifest.json").read_text())["request"]
    assert request["options"]["data"]["label_separator"] == "|"


def test_the_report_tells_of_every_label(run, spin):
    report = json.loads((run / "head" / "metrics.json").read_text())
    assert report["multi_label"] and report["metric"] == "macro-f1"
    test = report["spin"]["test"]
    assert test["macro_f1"] > 0.8 and test["accuracy"] > 0.5
    assert set(test["intervals"]) == {"accuracy", "micro_f1", "macro_f1"}
    for label in test["per_class"].values():
        low, high = label["intervals"]["f1"]
        assert low <= label["f1"] <= high
    for rival in ("last_layer", "best_layer", "tfidf"):
        assert 0 < report[rival]["test"]["macro_f1"] <= 1
        assert set(report[rival]["threshold"]) == {"film", "meal", "praise"}
    assert "mcnemar_p" not in report["comparison"]
    difference = report["comparison"]["difference"]["macro_f1"]
    against = report[report["comparison"]["against"]]["test"]["macro_f1"]
    assert difference["value"] == pytest.approx(test["macro_f1"] - against)
    assert "Multi-label" in (run / "head" / "README.md").read_text()
    for part in ("activations", "selection", "head"):
        shown = spin("inspect", run / part)
        assert shown.code == 0, shown.err
        assert "any number" in shown.out
    assert "each label has its own" in shown.out and "likeliest" not in shown.out
    assert spin("verify", run, "--rows", "2").code == 0


def test_the_page_of_a_run_counts_every_label(run, tmp_path):
    """Against plain loops over the answers, which are those that train measured."""
    pytest.importorskip("matplotlib")
    from spin_cli import reports
    from spin_cli.config import ReportConfig
    from spin_cli.reports import labels, sources

    summary = reports.report(run, tmp_path / "page.html", ReportConfig(use_model=False))
    assert {"confusion", "strays", "reliability", "margins", "neurons"} <= set(summary["figures"])
    assert "McNemar's test" in {item["what"] for item in summary["left_out"]}
    shown = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "By label" in shown and "all labels right" in shown and "no label" in shown
    found = sources.read_run(run)
    known = json.loads((run / "head" / "metrics.json").read_text())["spin"]["test"]
    assert (found.answers.predicted == found.answers.codes).all(1).mean() == known["accuracy"]
    probs = np.random.default_rng(0).random(found.answers.probs.shape)  # these heads make no errors
    answers = replace(found.answers, probs=probs, predicted=found.head.decide(probs))
    vars(found)["answers"] = answers
    true, given = answers.codes, answers.predicted
    table, strays = labels.counts(found), labels.strays(found)
    pairs = list(zip(true.tolist(), given.tolist(), strict=True))
    for k in range(len(table)):
        for truth, answer in np.ndindex(2, 2):
            assert table[k, truth, answer] == sum((t[k], g[k]) == (truth, answer) for t, g in pairs)
        for j in range(len(table)):
            wrong = [t[k] and (g[j] > t[j] if j != k else not g[j]) for t, g in pairs]
            assert strays[k, j] == sum(wrong)
    errors = labels.worst_mistakes(found)
    assert len(errors) == labels.MOST_ERRORS
    assert [e.prob for e in errors] == sorted((e.prob for e in errors), reverse=True)
    stated = np.where(given == 1, probs, 1 - probs)
    assert errors[0].prob == stated[true != given].max()
    for error in errors:
        given_wrongly = not error.answer.startswith("not ")
        assert (error.answer.removeprefix("not ") in error.truth.split(", ")) != given_wrongly


def test_neurons_of_labels_are_ablated_at_the_heads_own_thresholds(run, spin):
    done = spin("ablate", run, "--eta", "0.9", "--draws", "1", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    known = json.loads((run / "head" / "metrics.json").read_text())["spin"]["test"]
    assert found["metric"] == "macro-f1"
    assert found["head"]["all"] == pytest.approx(known["macro_f1"])
    assert found["head"]["none"] < found["head"]["all"]
    assert found["refit"]["points"][0]["kept"] > found["refit"]["none"]


def test_a_head_of_labels_is_scored_again(run, tmp_path):
    checks = {check.what: check for check in verification.verify(run / "head")}
    assert checks["recomputed test scores"].ok
    assert "micro_f1" in checks["recomputed test scores"].found
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    report = json.loads((copy / "head" / "metrics.json").read_text())
    report["spin"]["test"]["micro_f1"] += 0.01
    atomic.write_json(copy / "head" / "metrics.json", report)
    old = json.loads((copy / "head" / "manifest.json").read_text())
    content = {key: old[key] for key in ("request", "parent", "classes", "multi_label")}
    artifacts.write_manifest(copy / "head", "head", content)
    checks = {check.what: check for check in verification.verify(copy / "head")}
    assert checks["recomputed test scores"].ok is False


def test_predictions_are_lists_in_every_format(run, spin, tmp_path):
    source = run.parent / "labels-data" / "test.csv"
    found = json_lines(spin("predict", run / "head", source, "--explain", "2").out)
    head = load_head(run / "head")
    for row in found:
        probs = np.array([row["probs"][name] for name in head.classes])
        given = [n for n, p, t in zip(head.classes, probs, head.thresholds, strict=True) if p >= t]
        assert row["label"] == given
        sure = np.prod([p if name in given else 1 - p for name, p in row["probs"].items()])
        assert row["prob"] == pytest.approx(sure, abs=1e-5)
        assert list(row["why"]) == (given or [head.classes[int(probs.argmax())]])
        for name, why in row["why"].items():
            total = sum(n["contribution"] for n in why["neurons"]) + why["rest"] + why["bias"]
            assert total == pytest.approx(why["logit"], abs=1e-4)
            p = row["probs"][name]
            assert p == pytest.approx(1 / (1 + np.exp(-why["logit"])), abs=1e-6)
    table = spin("predict", run / "head", source, "--output-format", "csv", "--top", "1").out
    cells = [line["label"] for line in csv.DictReader(io.StringIO(table))]
    assert cells == ["|".join(row["label"]) for row in found]
    parquet = pytest.importorskip("pyarrow.parquet")
    place = tmp_path / "out.parquet"
    spin("predict", run / "head", source, "-o", place, "--output-format", "parquet")
    assert parquet.read_table(place)["label"].to_pylist() == [row["label"] for row in found]


def test_predictions_are_scored_and_resumed(run, spin, tmp_path):
    source, place = run.parent / "labels-data" / "test.csv", tmp_path / "out.csv"
    command = ["predict", run / "head", source, "-o", place, "--output-format", "csv"]
    scores = json.loads(spin(*command, "--evaluate", "--json").out)["metrics"]
    report = json.loads((run / "head" / "metrics.json").read_text())["spin"]["test"]
    for name in ("accuracy", "micro_f1", "macro_f1", "log_loss"):
        assert scores[name] == pytest.approx(report[name], abs=1e-3)
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
    whole = place.read_bytes()
    place.write_bytes(b"".join(whole.splitlines(keepends=True)[:20]))
    again = spin(*command, "--resume", "--evaluate", "--json")
    assert again.code == 0 and place.read_bytes() == whole
    assert json.loads(again.out)["metrics"] == scores
    other = write_csv(tmp_path / "other.csv", [("One.", "meal;praise"), ("Two.", "")])
    done = spin(
        "predict", run / "head", other, "--evaluate", "--label-separator", ";", "--threshold", "0.9"
    )
    assert done.code == 0 and "2 rows: " in done.err
    for limit in (0, 1):
        done = spin("predict", run / "head", source, "--decision-threshold", f"meal={limit}")
        rows = json_lines(done.out)
        assert all(("meal" in row["label"]) == (row["probs"]["meal"] >= limit) for row in rows)
    wrong = write_csv(tmp_path / "wrong.csv", [("One.", "meal|soup")])
    done = spin("predict", run / "head", wrong, "--evaluate")
    assert done.code == 3 and "line 2: label 'soup' is none of" in done.err


def test_the_classifier_keeps_to_scikit_learns_conventions(run, spin):
    rows = tagged(GOOD, "We remember")
    texts = [text for text, _ in rows]
    clf = Classifier.load(run / "head")
    said, probs = clf.predict(texts), clf.predict_proba(texts)
    assert clf.multilabel_ and said.shape == probs.shape == (len(texts), 3)
    assert said.dtype.kind == "i" and set(np.unique(said)) <= {0, 1}
    truth = np.array([[name in cell.split("|") for name in clf.classes_] for _, cell in rows])
    expected = reference.accuracy_score(truth.astype(int), said)
    assert clf.score(texts, truth.astype(int)) == pytest.approx(expected)
    assert reference.f1_score(truth, said, average="macro") > 0.7


@pytest.mark.slow
def test_the_exported_program_gives_independent_probabilities(run, spin, tmp_path):
    done = spin("export", run / "head", tmp_path / "out", "--format", "pt2", "--json")
    assert done.code == 0, done.err
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels["multi_label"] and set(labels["thresholds"]) == {"film", "meal", "praise"}


def test_one_label_a_text_leaves_no_trace_of_several(tmp_path):
    from spin_cli import artifacts
    from spin_cli.typed import from_plain

    plain = artifacts.to_plain(DataConfig())
    assert "label_separator" not in plain
    assert from_plain(DataConfig, plain) == DataConfig()
    assert from_plain(DataConfig, artifacts.to_plain(SEVERAL)) == SEVERAL
    with pytest.raises(TypeError):
        from_plain(DataConfig, plain | {"label_separator": 3})
