"""`spin predict` as a filter: pipes, interrupts, going on, bad rows, formats, processes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spin_cli import Classifier, metrics, prediction
from spin_cli.choices import OnError
from spin_cli.config import PredictConfig
from spin_cli.errors import DataError
from spin_cli.head import load_head
from spin_cli.prediction import sharing
from spin_cli.ranks import Ranks
from tests.helpers import ENV, PATIENCE, SPIN, json_lines, sentences, write_csv
from tests.test_predict_python import rewrite_head


def many(count: int) -> list[str]:
    texts = [text for text, _ in sentences()]
    return [f"{texts[i % 60]} {texts[(i * 7 + 1) % 60]}" for i in range(count)]


def start(*args, **options) -> subprocess.Popen:
    return subprocess.Popen([*SPIN, "predict", *map(str, args)], env=ENV, text=True, **options)


# -- pipes -----------------------------------------------------------------------------------


def test_a_line_that_comes_alone_is_answered_at_once(head):
    pipe = subprocess.PIPE
    with start(head, "-", stdin=pipe, stdout=pipe, stderr=pipe) as process:
        answers = []
        for text in ("a great film", "an awful meal"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            answers.append(json.loads(process.stdout.readline()))  # hangs where it waits for more
        assert [a["id"] for a in answers] == ["0", "1"]
        process.send_signal(signal.SIGTERM)  # while it waits for input
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert (out, err) == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_long_pipe_keeps_its_order_and_its_memory(spin, head):
    lines = [f"{text[:24]}\n" for text in many(2000)]
    pipe = subprocess.PIPE

    def send():
        process.stdin.writelines(lines)
        process.stdin.flush()

    def read(count):
        return [json.loads(process.stdout.readline()) for _ in range(count)]

    def largest():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])

    with start(head, "-", stdin=pipe, stdout=pipe) as process:
        sender = threading.Thread(target=send)
        sender.start()
        found = read(400)
        before = largest()
        found += read(1600)
        after = largest()
        sender.join()
        assert process.communicate()[0] == ""
    assert process.returncode == 0
    assert [f["id"] for f in found] == [str(i) for i in range(2000)]
    assert after < before * 1.1
    alone = json_lines(spin("predict", head, "-", stdin="".join(lines[:400]).encode()).out)
    assert [f["label"] for f in alone] == [f["label"] for f in found[:400]]


@pytest.mark.slow
def test_what_is_broken_off_by_sigterm_is_written_and_can_be_continued(spin, head, tmp_path):
    rows = [(f"id,{i}", text) for i, text in enumerate(many(1100))]
    source = write_csv(tmp_path / "in.csv", rows, ("key", "text"))
    options = ("--id-column", "key", "--output-format", "csv", "-o")
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    partial = tmp_path / "broken.csv.partial"
    assert spin("predict", head, source, *options, whole).code == 0
    with start(head, source, *options, broken, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        while not (partial.exists() and partial.read_text().count("\n") > 200):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert "--resume" in err
    assert "Traceback" not in err
    assert not broken.exists()
    written = partial.read_text()
    assert whole.read_text().startswith(written)
    refused = spin("predict", head, source, *options, broken)
    assert (refused.code, "--resume" in refused.err) == (4, True)
    partial.write_text(written[:-7])  # as after a power cut
    done = spin("predict", head, source, *options, broken, "--resume")
    assert done.code == 0, done.err
    assert broken.read_bytes() == whole.read_bytes()
    assert not partial.exists()


# -- going on --------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> Path:
    rows = [(text, "good" if "great" in text else "bad") for text in many(40)]
    return write_csv(tmp_path / "in.csv", rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_resume_ends_as_an_uninterrupted_run(spin, head, labelled, tmp_path, kind):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--output-format", kind, "--evaluate", "--json", "-o")
    expected = spin("predict", head, labelled, *options, whole)
    content = whole.read_bytes()
    for kept in (0.0, 0.1, 0.5, 0.97, 1.0):
        part.write_bytes(content[: int(len(content) * kept)])  # under its final name
        done = spin("predict", head, labelled, *options, part, "--resume")
        assert done.code == 0, (kept, done.err)
        assert part.read_bytes() == content
        assert json.loads(done.out) == json.loads(expected.out) | {"output": str(part)}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "part", "whole"]


def test_resume_refuses_what_does_not_fit(spin, head, labelled, tmp_path):
    out = tmp_path / "out.jsonl"
    rows = [("other" + text, "good") for text in many(40)]
    other = write_csv(tmp_path / "other.csv", [(f"k{i}", t) for i, (t, _) in enumerate(rows)],
                      ("key", "text"))  # fmt: skip
    assert spin("predict", head, labelled, "-o", out).code == 0
    good = out.read_text()

    def resume(content: str, source: Path, *options):
        out.write_text(content)
        out.with_name("out.jsonl.partial").unlink(missing_ok=True)
        return spin("predict", head, source, "-o", out, "--resume", *options)

    done = resume(good, other, "--id-column", "key")
    assert (done.code, "another input" in done.err) == (4, True)
    shorter = write_csv(tmp_path / "short.csv", [(t,) for t in many(20)], ("text",))
    assert "has ended" in resume(good, shorter).err
    lines = good.splitlines(keepends=True)
    swapped = [
        line.replace('"bad":', '"x":').replace('"good":', '"bad":').replace('"x":', '"good":')
        for line in lines
    ]
    done = resume("".join(swapped), labelled)
    assert (done.code, "by this head" in done.err) == (4, True)
    for bad in ("[1]\n" * 20, "no json\n" * 20, '{"id": "0"}\n' * 20):
        done = resume(bad, labelled)
        assert done.code == 4, bad
        assert "Traceback" not in done.err
    assert spin("predict", head, labelled, "--resume").code == 2
    done = spin("predict", head, labelled, "-o", tmp_path / "p", "--resume",
                "--output-format", "parquet")  # fmt: skip
    assert done.code == 2


# -- bad rows --------------------------------------------------------------------------------


def test_bad_rows_are_skipped_counted_and_kept_in_their_place(spin, head, tmp_path):
    lines = [json.dumps({"text": text}) for text in many(30)]
    lines[4], lines[20], lines[29] = "{", '{"text": ""}', '{"text": null}'
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines))
    out = tmp_path / "out.jsonl"
    args = ("predict", head, source, "-o", out, "--on-error", "skip")
    done = spin(*args, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 30
    assert json.loads(done.out)["errors"] == 3
    assert "3 bad rows" in spin(*args, "--force").err
    found = json_lines(out.read_text())
    assert [f["id"] for f in found] == [str(i) for i in range(30)]
    bad = {i: f for i, f in enumerate(found) if "error" in f}
    assert sorted(bad) == [4, 20, 29]
    assert all(bad[i]["label"] is None and f"line {i + 1}" in bad[i]["error"] for i in bad)
    table = spin("predict", head, source, "--on-error", "skip", "--output-format", "csv")
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert [bool(row["error"]) for row in rows] == [i in bad for i in range(30)]
    assert [row["label"] for row in rows] == [f["label"] or "" for f in found]


def test_a_bad_row_in_a_pipe_stops_behind_the_rows_before_it(spin, head):
    done = spin("predict", head, "-", "--format", "jsonl",
                stdin=b'{"text": "a great film"}\n{"text": 1}\n{"text": "x"}\n')  # fmt: skip
    assert done.code == 3
    assert len(json_lines(done.out)) == 1
    assert "line 2" in done.err


# -- what a row holds ------------------------------------------------------------------------


def test_input_columns_are_carried_through(spin, head, tmp_path):
    rows = [("a great film", "x, y", "7"), ("an awful meal", 'say "z"', "")]
    source = write_csv(tmp_path / "in.csv", rows, ("text", "note", "label"))
    found = json_lines(spin("predict", head, source, "--keep-columns").out)
    assert [f["columns"] for f in found] == [
        dict(zip(("text", "note", "label"), row, strict=True)) for row in rows
    ]
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        done = spin("predict", head, source, "--keep-columns", "--output-format", kind)
        table = list(csv.DictReader(io.StringIO(done.out), delimiter=mark))
        assert [(r["text"], r["note"], r["input_label"]) for r in table] == rows
        assert [r["label"] for r in table] == [f["label"] for f in found]
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "o.parquet"
    done = spin("predict", head, source, "--keep-columns", "--output-format", "parquet", "-o", out)
    assert done.code == 0, done.err
    assert [r["note"] for r in pq.read_table(out).to_pylist()] == ["x, y", 'say "z"']


def test_every_column_of_the_input_has_a_column_of_its_own(spin, head, tmp_path):
    header = ("text", "id", "input_id", "input_input_id", "input_note", "prob_good")
    rows = [("a great film", "a", "b", "c", "d", "e")]
    source = write_csv(tmp_path / "in.csv", rows, header)
    done = spin("predict", head, source, "--keep-columns", "--output-format", "csv")
    names, values = csv.reader(io.StringIO(done.out))
    assert len(set(names)) == len(names)
    assert dict(zip(names[-6:], values[-6:], strict=True)) == {
        "text": "a great film", "input_id": "a", "input_input_id": "b",
        "input_input_input_id": "c", "input_note": "d", "input_prob_good": "e",
    }  # fmt: skip


def test_top_threshold_and_table(spin, head):
    stdin = "\n".join(many(20)).encode()
    plain = json_lines(spin("predict", head, "-", stdin=stdin).out)
    found = json_lines(spin("predict", head, "-", "--top", "1", "--threshold", "0.8",
                            stdin=stdin).out)  # fmt: skip
    for one, two in zip(plain, found, strict=True):
        best = max(one["probs"], key=one["probs"].get)
        assert two["probs"] == {best: one["probs"][best]}
        assert two["abstained"] == (one["prob"] < 0.8)
    table = spin("predict", head, "-", "--top", "1", "--output-format", "csv", stdin=stdin)
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert [float(r["prob_1"]) for r in rows] == [max(f["probs"].values()) for f in plain]
    shown = spin("predict", head, "-", "--output-format", "table", stdin=stdin).out.splitlines()
    assert len(shown) == 21
    assert shown[0].split() == ["id", "label", "prob", "truncated", "prob_bad", "prob_good"]
    assert [line.split()[1] for line in shown[1:]] == [f["label"] for f in plain]


def test_evaluation_tells_intervals_confusion_and_reliability(spin, head, labelled, tmp_path):
    args = ("predict", head, labelled, "--evaluate", "-o", tmp_path / "o", "--force")
    scores = json.loads(spin(*args, "--json").out)["metrics"]
    for name in ("accuracy", "macro_f1", "auroc", "log_loss"):
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
    bins = scores["reliability"]["bins"]
    assert sum(b["rows"] for b in bins) == 40 == sum(map(sum, scores["confusion"]))
    right = sum(b["accuracy"] * b["rows"] for b in bins)
    assert right == pytest.approx(scores["accuracy"] * 40)
    assert 0 <= scores["ece"] <= 1
    assert list(scores["reliability"]) == ["bins"]  # no second calibration error
    shown = " ".join(spin(*args).out.split())
    assert f"calibration error {scores['ece']:.4f}" in shown
    assert all(word in shown for word in ("Confusion", "Reliability", "bootstrap"))


def test_evaluation_tells_what_is_answered_where_some_is_not(spin, head, labelled, tmp_path):
    rows = json_lines(spin("predict", head, labelled, "--threshold", 0.5).out)
    limit = float(np.median([row["prob"] for row in rows])) + 1e-5
    with labelled.open(encoding="utf-8", newline="") as file:
        truth = [row["label"] for row in csv.DictReader(file)]
    right = [r["label"] == t for r, t in zip(rows, truth, strict=True) if r["prob"] >= limit]
    assert 0 < len(right) < 40
    abstains = Path(shutil.copytree(head, tmp_path / "head"))
    rewrite_head(abstains, abstain_below=limit)
    args = ("--evaluate", "-o", tmp_path / "o", "--force")
    plain = json.loads(spin("predict", head, labelled, *args, "--json").out)["metrics"]
    assert "answered" not in plain
    expected = {"share": len(right) / 40, "accuracy": np.mean(right)}
    for folder, options in ((abstains, ()), (head, ("--threshold", limit))):
        done = spin("predict", folder, labelled, *args, "--json", *options)
        scores = json.loads(done.out)["metrics"]
        assert scores.pop("answered") == expected
        assert scores == plain  # which count every answer
        said = f"answers {len(right) / 40:.1%} of 40 texts, {np.mean(right):.4f} of them right"
        assert said in spin("predict", folder, labelled, *args, *options).err
        assert said in spin("predict", folder, labelled, "--evaluate", *options).err


@pytest.mark.parametrize("name", ["bad", "good"])
def test_another_decision_threshold_changes_labels_alone(spin, head, labelled, name):
    plain = json_lines(spin("predict", head, labelled).out)
    limit = float(np.quantile([row["probs"][name] for row in plain], 0.3)) + 1e-5
    option = ("--decision-threshold", f"{name}={limit}")
    found = json_lines(spin("predict", head, labelled, *option, "--evaluate").out)
    assert [row["probs"] for row in found] == [row["probs"] for row in plain]
    assert [row["label"] == name for row in found] == [r["probs"][name] >= limit for r in plain]
    assert all(row["prob"] == row["probs"][row["label"]] for row in found)
    assert {row["label"] for row in found} == {"bad", "good"}
    texts = [row["text"] for row in csv.DictReader(labelled.open(encoding="utf-8", newline=""))]
    clf = Classifier.load(head, decision_thresholds={name: limit})
    assert clf.predict(texts).tolist() == [row["label"] for row in found]


def test_evaluation_tells_thresholds_that_do_what_it_says(spin, head, tmp_path):
    rows = sentences() * 3
    rows = [(text, "bad" if i % 9 == 0 else label) for i, (text, label) in enumerate(rows)]
    source = write_csv(tmp_path / "in.csv", rows)
    args = ("predict", head, source, "--evaluate", "-o", tmp_path / "o", "--force")
    points = json.loads(spin(*args, "--json").out)["metrics"]["operating_points"]
    assert set(points) == {"bad", "good"}
    assert "Operating points" in spin(*args).out
    for name, found in points.items():
        assert [point["max_false_positive_rate"] for point in found] == [0.01, 0.05][-len(found) :]
        for point in found:
            again = spin(*args, "--json", "--decision-threshold", f"{name}={point['threshold']}")
            scores = json.loads(again.out)["metrics"]
            own = scores["per_class"][name]
            assert own["recall"] == pytest.approx(point["recall"])
            assert own["precision"] == pytest.approx(point["precision"] or 0.0)
            assert scores["operating_points"] == points  # of all thresholds, not of this one
            assert point["false_positive_rate"] <= point["max_false_positive_rate"]


def test_scores_of_rows_that_the_head_has_seen_are_called_too_good(spin, tiny_run, tmp_path):
    data, head = tiny_run / "data", tiny_run / "run/head"
    files = {each.name.split(".")[0]: each for each in data.iterdir()}
    assert {"train", "test"} <= set(files)
    for name, path in files.items():
        done = spin("predict", head, path, "--evaluate")
        assert done.code == 0, done.err
        assert (f"is the head's own {name} data" in done.err) == (name != "test")
    piped = spin(
        "predict", head, "-", "--format", "csv", "--evaluate", stdin=files["train"].read_bytes()
    )
    assert piped.code == 0 and "own" not in piped.err


def test_a_bad_row_keeps_its_id(spin, head, tmp_path):
    source = write_csv(
        tmp_path / "in.csv", [("a", "one"), ("b", ""), ("", "three")], ("key", "text")
    )
    done = spin("predict", head, source, "--id-column", "key", "--on-error", "skip")
    rows = json_lines(done.out)
    assert [row["id"] for row in rows] == ["a", "b", None]
    assert ["error" in row for row in rows] == [False, True, True]
    out = tmp_path / "out.jsonl"
    options = ("--id-column", "key", "--on-error", "skip", "-o", out)
    assert spin("predict", head, source, *options).code == 0
    assert spin("predict", head, source, *options, "--resume").code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("good", "expected a class and a probability"),
        ("=0.5", "expected a class and a probability"),
        ("good=much", "expected a class and a probability"),
        ("good=1.5", "--decision-threshold good = 1.5: expected from 0 to 1"),
        ("fine=0.5", "decision threshold of 'fine': the head's classes are bad, good"),
        (("good=0.5", "good = 0.6"), "--decision-threshold good: given twice"),
    ],
)
def test_a_decision_threshold_is_understood_or_refused(spin, head, text, words):
    given = [text] if isinstance(text, str) else text
    options = [part for each in given for part in ("--decision-threshold", each)]
    done = spin("predict", head, "-", *options, stdin=b"A film.")
    assert (done.code, done.out) == (2, "")
    assert words in " ".join(done.err.split())


def test_scores_are_those_of_the_exact_probabilities(spin, head, labelled, tmp_path):
    """As `train` makes them: a head so sure of itself that six digits write 0 and 1."""
    sure = Path(shutil.copytree(head, tmp_path / "sure"))
    found = load_head(sure)
    rewrite_head(sure, weight=found.weight * 2.5, bias=found.bias * 2.5, threshold=None)
    with labelled.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    probs = Classifier.load(sure).predict_proba([row["text"] for row in rows])
    truth = np.array([["bad", "good"].index(row["label"]) for row in rows])
    of_truth = probs[np.arange(len(rows)), truth]
    assert (np.round(of_truth, 6) == 0).any()
    assert of_truth.min() > 1e-15
    options = ("--evaluate", "--json", "-o")
    done = spin("predict", sure, labelled, *options, tmp_path / "out")
    scores = json.loads(done.out)["metrics"]
    assert scores["log_loss"] == pytest.approx(-np.log(of_truth).mean(), rel=1e-9)
    assert scores["ece"] == metrics.calibration_error(truth, probs)
    written = (tmp_path / "out").read_bytes()
    for record, row in zip(json_lines(written.decode()), probs, strict=True):
        assert list(record["probs"].values()) == [round(float(p), 6) for p in row]
        assert record["prob"] == round(float(row.max()), 6)
    (tmp_path / "out").write_bytes(written[: len(written) * 3 // 4])
    resumed = spin("predict", sure, labelled, *options, tmp_path / "out", "--resume")
    assert json.loads(resumed.out)["metrics"] == scores


def test_scores_do_not_depend_on_what_is_shown(spin, head, labelled, tmp_path):
    options = ("--evaluate", "--json", "-o", tmp_path / "out")
    plain = json.loads(spin("predict", head, labelled, *options).out)
    options = ("--top", "1", "--force", *options)
    assert json.loads(spin("predict", head, labelled, *options).out) == plain
    content = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(content[: len(content) // 2])
    assert json.loads(spin("predict", head, labelled, *options, "--resume").out) == plain
    assert (tmp_path / "out").read_bytes() == content


# -- the output's name -----------------------------------------------------------------------


def test_the_name_of_the_output_says_its_format(spin, head, labelled, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    expected = json_lines(spin("predict", head, labelled).out)
    for name in ("a.jsonl", "a.NDJSON", "a.csv", "a.tsv", "a.parquet", "a.pq", "a.json", "a",
                 "a.jsonl.gz", "a.csv.gz", "a.tsv.GZ", "a.gz"):  # fmt: skip
        done = spin("predict", head, labelled, "-o", tmp_path / name)
        assert done.code == 0, (name, done.err)
        content = (tmp_path / name).read_bytes()
        if name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        if ".pq" in name or ".parquet" in name:
            rows = pq.read_table(tmp_path / name).to_pylist()
        elif ".csv" in name or ".tsv" in name:
            mark = "," if ".csv" in name else "\t"
            rows = list(csv.DictReader(io.StringIO(content.decode(), newline=""), delimiter=mark))
        else:
            assert json_lines(content.decode()) == expected, name
            continue
        found = [(row["id"], row["label"], float(row["prob"])) for row in rows]
        assert found == [(e["id"], e["label"], e["prob"]) for e in expected], name


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.csv", ("--output-format", "jsonl"), "the name says csv, where jsonl"),
        ("a.jsonl.gz", ("--output-format", "tsv"), "the name says jsonl, where tsv"),
        ("a.tsv", ("--output-format", "table"), "such as a.txt"),
        ("a.parquet.gz", (), "Take .gz off"),
        ("a.csv.gz", ("--resume",), "gzip files cannot be continued"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(spin, head, labelled, tmp_path, name, options, said):
    done = spin("predict", head, labelled, "-o", tmp_path / name, *options)
    assert (done.code, said in done.err) == (2, True), done.err
    assert list(tmp_path.iterdir()) == [labelled]


def test_a_packed_file_that_was_broken_off_begins_again(spin, head, tmp_path):
    rows = [(text, "good") for text in many(20)] + [("", "good")]
    source, out = write_csv(tmp_path / "in.csv", rows), tmp_path / "a.csv.gz"
    done = spin("predict", head, source, "-o", out)
    assert (done.code, "--resume" in done.err, "--force begins again" in done.err) == (
        3,
        False,
        True,
    )
    assert gzip.decompress((tmp_path / "a.csv.gz.partial").read_bytes()).count(b"\n") == 21
    refused = spin("predict", head, source, "-o", out)
    assert (refused.code, "--resume" in refused.err) == (4, False)
    assert spin("predict", head, source, "-o", out, "--on-error", "skip", "--force").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv.gz", "in.csv"]


# -- several processes -----------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_what_one_writes(spin, head, tmp_path):
    rows = [(text, "good" if "great" in text else "bad") for text in many(700)]
    source = write_csv(tmp_path / "in.csv", rows)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    options = ("--explain", "2", "--evaluate", "--json", "-o")
    alone = spin("predict", head, source, *options, one)
    assert alone.code == 0, alone.err
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(20000 + os.getpid() % 20000), "-m", "spin_cli", "predict", str(head), str(source),
         *options, str(two)],
        env=ENV | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert two.read_bytes() == one.read_bytes()
    assert json.loads(done.stdout) == json.loads(alone.out) | {"output": str(two)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "one.jsonl", "two.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("on_error", list(OnError))
def test_shared_windows_meet_bad_rows_as_one_process_does(head, tmp_path, monkeypatch, on_error):
    monkeypatch.setattr(Ranks, "wait", lambda _: None)  # one after the other, the first last
    predictor = prediction.open_predictor(head, PredictConfig())
    lines = [json.dumps({"text": text}) for text in many(600)]
    lines[20], lines[580] = '{"text": 1}', "{"
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{line}\n" for line in lines))
    config = PredictConfig(on_error=on_error, explain=2, explain_tokens=True)

    def collect(windows):
        found = []
        try:
            for window in windows:
                found += window
        except DataError as error:
            return found, error.message
        return found, None

    alone = collect(
        prediction.predict(predictor, prediction.read_input(str(source), config), config)
    )
    for rank in (2, 1, 0):
        shared = collect(
            sharing.predict_shared(
                predictor, prediction.read_input(str(source), config), config,
                tmp_path / "out", Ranks(rank, 3),
            )
        )  # fmt: skip
        assert shared == ((([], None)) if rank else alone)
    assert len(alone[0]) == (600 if on_error is OnError.SKIP else 20)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
