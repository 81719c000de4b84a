"""The command line as people use it: help, every stage, predictions, interrupts."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import tty
from pathlib import Path

import pytest

from spin_cli.cli.selecting import say_doubts, show_selected
from spin_cli.cli.training import print_report
from spin_cli.names import list_names
from tests.helpers import (
    ENV,
    MODEL,
    PATIENCE,
    SPIN,
    Result,
    interruptible,
    json_lines,
    sentences,
    write_csv,
)

COMMANDS = (
    "extract", "select", "train", "predict", "export", "inspect", "ablate", "report", "run",
    "status", "demo",
)  # fmt: skip


# -- help ------------------------------------------------------------------------------------


def test_help_costs_little_more_than_its_libraries():
    def cpu_seconds(*command: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, *command], env=ENV, check=True, capture_output=True)
        after = os.times()
        return (after.children_user - before.children_user) + (
            after.children_system - before.children_system
        )

    libraries = ("-c", "import typer, rich.console, rich.markdown, rich.panel, rich.table")
    pairs = [(cpu_seconds("-m", "spin_cli", "--help"), cpu_seconds(*libraries)) for _ in range(3)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) < 2.5


def test_the_command_line_imports_no_heavy_library():
    code = (
        "import sys, spin_cli.cli;"
        "bad = {'torch', 'transformers', 'numpy', 'h5py', 'sklearn'} & set(sys.modules);"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(spin, command):
    done = spin(command, "--help")
    assert done.code == 0
    assert "Example: " in done.out
    assert f"spin {command}" in done.out


def test_every_command_is_listed_and_the_version_is_printed(spin):
    done = spin("--help")
    assert all(f" {command} " in done.out for command in COMMANDS)
    assert spin("--version").out.startswith("spin ")


@pytest.mark.parametrize("args", [("nonsense",), ("extract",), ("select", "x", "--nonsense")])
def test_a_wrong_call_is_a_usage_error(spin, args):
    done = spin(*args)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.out == ""


# -- stages ----------------------------------------------------------------------------------


def test_run_makes_every_stage_and_then_leaves_it_alone(spin, tiny_run):
    run = tiny_run / "run"
    times = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert {p.name for p in run.iterdir()} == {"activations", "selection", "head", "spin.toml"}
    done = spin("run", tiny_run / "data", "-m", MODEL, "-o", run, "--layers", "0-2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [stage["was"] for stage in found["stages"].values()] == ["fresh"] * 3
    assert found["metrics"]["spin"]["test"]["rows"] == 20
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == times


def test_run_says_why_a_stage_is_made_again(spin, tiny_run, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    layer = tmp_path / "run/head/head.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1])
    done = spin(
        "run", tiny_run / "data", "-m", MODEL, "-o", tmp_path / "run", "--layers", "0-2", "--json"
    )
    assert done.code == 0, done.err
    stages = json.loads(done.out)["stages"]
    assert [stages[name]["was"] for name in stages] == ["fresh", "fresh", "corrupt"]
    same = tiny_run / "run/head/head.safetensors"
    assert layer.read_bytes() == same.read_bytes()


@pytest.mark.parametrize("part", ["", "activations", "selection", "head", "activations/samples.h5"])
def test_inspect_shows_each_artifact(spin, tiny_run, part):
    done = spin("inspect", tiny_run / "run" / part)
    assert done.code == 0, done.err
    assert done.out.strip()
    found = spin("inspect", tiny_run / "run" / part, "--json")
    assert found.code == 0
    json.loads(found.out)


def test_dry_run_writes_nothing(spin, tiny_run, tmp_path):
    before = sorted(tiny_run.rglob("*"))
    args = ("extract", tiny_run / "data", "-m", MODEL, "-o", tmp_path / "out", "--dry-run")
    done = spin(*args, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["rows"] == 100
    assert found["disk_bytes"] > 0 < found["tokens"]
    assert list(tmp_path.iterdir()) == []
    assert sorted(tiny_run.rglob("*")) == before


def test_extract_refuses_to_overwrite_and_force_replaces(spin, tiny_run, tmp_path):
    out = tmp_path / "activations"
    args = ("extract", tiny_run / "data", "-m", MODEL, "-o", out, "--layers", "0-1")
    assert spin("-q", *args).code == 0
    first = (out / "manifest.json").read_bytes()
    refused = spin(*args)
    assert refused.code == 4
    assert str(out) in refused.err
    assert "--force" in refused.err
    assert (out / "manifest.json").read_bytes() == first
    forced = spin(*args, "--force", "--site", "hidden")
    assert forced.code == 0, forced.err
    assert f"spin select {out}" in forced.err
    assert (out / "manifest.json").read_bytes() != first
    assert [p.name for p in tmp_path.iterdir()] == ["activations"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_a_plain_error(spin, tiny_run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = spin("select", tiny_run / "run/activations", "-o", closed / "selection")
    assert done.code == 4
    assert str(closed) in done.err
    assert "Traceback" not in done.err


def test_a_head_on_the_embeddings_alone_predicts(spin, tiny_run, tmp_path):
    head = tmp_path / "head"
    options = ("-o", head, "--max-layer", "0")
    assert spin("train", tiny_run / "run/selection", *options).code == 0
    done = spin("predict", head, "-", stdin=b"The film was great today.")
    assert done.code == 0, done.err
    assert len(json_lines(done.out)) == 1


@pytest.mark.parametrize("first", [True, False])
def test_quiet_is_quiet(spin, tiny_run, tmp_path, first):
    args = ("inspect", tiny_run / "run/selection", "--json")
    done = spin("-q", *args) if first else spin(*args, "--quiet")
    assert done.code == 0
    assert done.err == ""
    args = ("train", tiny_run / "run/selection", "-o", tmp_path / "head", "--max-layer", "1")
    done = spin("-q", *args) if first else spin(*args, "-q")
    assert done.code == 0
    assert done.code == 0
    assert done.err == ""


# -- predict ---------------------------------------------------------------------------------


def test_order_and_ids_are_kept(spin, head, tmp_path):
    rows = [(f"id-{97 - i}", text) for i, (text, _) in enumerate(sentences())]
    rows[3] = ("long", "a great film " * 600)
    source = write_csv(tmp_path / "in.csv", rows, ("key", "text"))
    done = spin("predict", head, source, "--id-column", "key")
    assert done.code == 0, done.err
    found = json_lines(done.out)
    assert [f["id"] for f in found] == [key for key, _ in rows]
    assert [f["truncated"] for f in found] == [key == "long" for key, _ in rows]
    for f in found:
        assert set(f) == {"id", "label", "prob", "probs", "truncated"}
        assert f["probs"][f["label"]] == f["prob"] == max(f["probs"].values())
        assert sum(f["probs"].values()) == pytest.approx(1, abs=1e-5)


def test_predictions_are_those_of_one_text_at_a_time(spin, head):
    texts = [text for text, _ in sentences()[:8]]
    together = json_lines(spin("predict", head, "-", stdin="\n".join(texts).encode()).out)
    alone = json_lines(spin("predict", head, "-", stdin=texts[5].encode()).out)
    assert alone[0]["prob"] == pytest.approx(together[5]["prob"], abs=2e-3)
    assert alone[0]["label"] == together[5]["label"]


def test_every_input_gives_the_same_answers(spin, head, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = sentences()[:20]
    texts = [text for text, _ in rows]
    write_csv(tmp_path / "in.csv", rows)
    (tmp_path / "in.tsv").write_text("text\n" + "\n".join(texts) + "\n")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "in.txt").write_text("\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    with gzip.open(tmp_path / "in.csv.gz", "wb") as file:
        file.write((tmp_path / "in.csv").read_bytes())
    lines = spin("predict", head, "-", stdin="\n".join(texts).encode())
    assert lines.code == 0, lines.err
    expected = [(f["label"], f["probs"]) for f in json_lines(lines.out)]
    assert len(expected) == 20
    for name in ("in.csv", "in.tsv", "in.jsonl", "in.txt", "in.parquet", "in.csv.gz"):
        done = spin("predict", head, tmp_path / name)
        assert done.code == 0, done.err
        assert [(f["label"], f["probs"]) for f in json_lines(done.out)] == expected, name


def test_every_output_format_holds_the_same(spin, head, tmp_path, tiny_run):
    pq = pytest.importorskip("pyarrow.parquet")
    source = tiny_run / "data/test.csv"
    expected = json_lines(spin("predict", head, source).out)
    found = {}
    for kind in ("jsonl", "csv", "tsv", "parquet"):
        path = tmp_path / f"out.{kind}"
        done = spin("predict", head, source, "-o", path, "--output-format", kind)
        assert done.code == 0, done.err
        assert done.out == ""
        assert str(path) in done.err
        found[kind] = path
    assert json_lines(found["jsonl"].read_text()) == expected
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        with found[kind].open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter=mark))
        assert list(rows[0]) == ["id", "label", "prob", "truncated", "prob_bad", "prob_good"]
        assert [(r["id"], r["label"], float(r["prob_good"])) for r in rows] == [
            (e["id"], e["label"], e["probs"]["good"]) for e in expected
        ]
    table = pq.read_table(found["parquet"]).to_pylist()
    assert [(r["id"], r["label"], r["prob_bad"]) for r in table] == [
        (e["id"], e["label"], e["probs"]["bad"]) for e in expected
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in found.values())


def test_json_summary_and_evaluation_agree_with_training(spin, head, tiny_run, tmp_path):
    source = tiny_run / "data/test.csv"
    done = spin("predict", head, source, "-o", tmp_path / "o.jsonl", "--evaluate", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert summary["stage"] == "predict"
    assert summary["rows"] == 20
    expected = json.loads((head / "metrics.json").read_text())["spin"]["test"]
    for name in ("rows", "accuracy", "macro_f1", "auroc", "per_class"):
        assert summary["metrics"][name] == expected[name], name
    assert summary["metrics"]["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-4)


def test_evaluation_leaves_stdout_to_the_predictions(spin, head, tiny_run):
    done = spin("predict", head, tiny_run / "data/test.csv", "--evaluate")
    assert done.code == 0
    assert len(json_lines(done.out)) == 20
    assert "accuracy" in done.err


@pytest.mark.parametrize("where", ["file", "pipe", "terminal"])
def test_predictions_go_where_stdout_goes_with_a_person_at_the_terminal(head, tmp_path, where):
    """What shows progress on stderr must neither take the lines nor break them."""
    lines = [f"{text} and " * 12 for text, _ in sentences()[:40]]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    parent, child = os.openpty()
    tty.setraw(child)  # else it ends lines with a carriage return
    seen: list[bytes] = []

    def watch() -> None:
        with contextlib.suppress(OSError):  # when nobody has the other end open any more
            while part := os.read(parent, 4096):
                seen.append(part)

    watcher = threading.Thread(target=watch)
    watcher.start()
    command = [*SPIN, "predict", head, tmp_path / "texts.txt"]
    with (tmp_path / "found.jsonl").open("w+b") as file:
        out = {"file": file, "pipe": subprocess.PIPE, "terminal": child}[where]
        done = subprocess.run(
            command, env=ENV | {"TERM": "xterm"}, stdin=child, stdout=out, stderr=child,
            timeout=PATIENCE, check=True,
        )  # fmt: skip
        os.close(child)
        watcher.join(PATIENCE)
        os.close(parent)
        file.seek(0)
        shown = b"".join(seen)
        found = {"file": file.read(), "pipe": done.stdout, "terminal": shown}[where]
    records = [json.loads(line) for line in found.splitlines()]
    assert [record["id"] for record in records] == [str(n) for n in range(len(lines))]
    assert (b"predict" in shown) == (where == "file")  # the bar


def test_no_input_gives_no_lines(spin, head, tmp_path):
    assert spin("predict", head, "-") == Result(0, "", "")
    (tmp_path / "empty.txt").touch()
    done = spin("predict", head, tmp_path / "empty.txt")
    assert (done.code, done.out) == (0, "")


def test_an_existing_file_is_kept(spin, head, tiny_run, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    source = tiny_run / "data/test.csv"
    done = spin("predict", head, source, "-o", out)
    assert done.code == 4
    assert str(out) in done.err
    assert out.read_text() == "mine"
    assert spin("predict", head, source, "-o", out, "--force").code == 0
    assert len(json_lines(out.read_text())) == 20
    done = spin("predict", head, source, "-o", source, "--force")
    assert done.code == 2
    assert "is the input" in done.err


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind here")
def test_head_of_a_pipe_ends_quietly(head, tmp_path):
    texts = [text for text, _ in sentences()]
    (tmp_path / "in.txt").write_text("".join(f"{texts[i % 60]}\n" for i in range(2000)))
    command = shlex.join([*SPIN, "predict", str(head), str(tmp_path / "in.txt")])
    done = subprocess.run(
        f"{command} | head -1",
        shell=True,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0
    assert len(json_lines(done.stdout)) == 1
    assert done.stderr == ""


# -- interrupts ------------------------------------------------------------------------------


def test_an_interrupt_says_how_to_go_on(tmp_path):
    texts = [text for text, _ in sentences()]
    rows = [(" ".join(texts[(i + j) % 60] for j in range(3)), i % 2) for i in range(3000)]
    source = write_csv(tmp_path / "big.csv", rows)
    out = tmp_path / "run/activations"
    windows = tmp_path / "run/activations.partial/windows.bin"  # a byte for each, 1 when done
    command = [*SPIN, "extract", str(source), "-m", MODEL, "-o", str(out)]
    command += ["--storage-dtype", "float32"]  # larger rows, so smaller windows
    with interruptible(command) as process:
        deadline = time.monotonic() + PATIENCE
        while not (windows.exists() and any(windows.read_bytes())):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        done = sum(windows.read_bytes())
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert sum(windows.read_bytes()) <= done + 2  # one being written, one just computed
    assert "activations.partial" in err
    assert "same command" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert len(windows.read_bytes()) > done + 2


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("spin_cli.selection.stage._probe_one", ["select", "run/activations", "-o", "other"]),
        ("spin_cli.training.search.fit_columns", ["train", "run/selection", "-o", "other"]),
        ("spin_cli.training.search.fit_columns", ["run", "run/spin.toml", "-s", "train.seed=5"]),
    ],
)
def test_an_interrupt_does_not_wait_for_a_fit(tiny_run, tmp_path, place, command):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    module, name = place.rsplit(".", 1)
    script = (
        f"import sys, time, {module} as module\n"
        f"def slow(*args): print('fitting', file=sys.stderr, flush=True); time.sleep({PATIENCE})\n"
        f"module.{name} = slow\n"
        "import spin_cli.__main__\n"
        f"sys.argv = ['spin', *{command}]\n"
        "spin_cli.__main__.main()\n"
    )
    with interruptible([sys.executable, "-c", script], cwd=tmp_path) as process:
        while "fitting" not in (line := process.stderr.readline()):
            assert line, "spin ended before it began to fit"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE / 2)
    assert process.returncode == 130
    output = "run/head" if command[0] == "run" else "other"
    assert f"stopped before {output} was written: the same command" in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.partial"))


# -- what train shows ------------------------------------------------------------------------


def entry(depth: int, **more) -> dict:
    return {
        "site": "ffn", "pooling": "mean", "eta": 0.4, "depth": depth, "layer": f"layer_{depth:02}",
        "neurons": 9, "score": 0.9, "log_loss": 0.1, "strength": 0.1, "judged_on": "out-of-fold",
    } | more  # fmt: skip


def report_of(**more) -> dict:
    scores = {"accuracy": 1.0, "macro_f1": 1.0, "log_loss": 0.1, "auroc": None}
    few = [entry(depth) for depth in range(8)]
    few[7] |= {"chosen": True, "matrices": 5, "parts": [{}, {}]}
    return {
        "metric": "accuracy", "head": "logistic", "notes": [], "candidates": few,
        "chosen": few[7], "frontier": [entry(0), few[7]],
        "rows": {"train": 90, "val": 10, "test": 1}, "spin": {"test": scores | {"rows": 1}},
        "judged_on": {"what": "out-of-fold", "rows": 100}, "layers_run": 7, "layers_total": 9,
    } | more  # fmt: skip


def test_the_chosen_head_is_shown_among_the_best_however_many_are_before_it(capsys):
    print_report(report_of())
    lines = capsys.readouterr().out.splitlines()
    assert "Best heads on 100 out-of-fold texts (→ the chosen one)" in lines[0]
    marked = [line.split() for line in lines if "→" in line]
    assert [words[:5] for words in marked[1:]] == [["→stack", "of", "5", "+", "masks"]] * 2
    text = " ".join(" ".join(lines).split())
    assert "On 1 test text: the chosen head (stack of 5 + masks, 7 of 9 layers, 9 neurons)" in text
    assert "nan" not in text
    assert max(map(len, lines)) <= 80


def test_tables_of_a_head_with_hidden_units_are_of_the_rows_it_was_chosen_on(capsys):
    mlp = report_of(head="mlp", judged_on={"what": "val", "rows": 10})
    mlp["candidates"] = [*mlp["candidates"], entry(8, judged_on="val", score=0.1234)]
    print_report(mlp)
    out = capsys.readouterr().out
    assert "Best linear heads on 100 out-of-fold texts" in out and "0.1234" not in out
    assert "(hidden units on stack of 5 + masks," in " ".join(out.split())


def test_verbose_says_what_was_chosen_and_the_time(spin, tiny_run, tmp_path):
    source = tiny_run / "run/activations"
    loud = spin("select", source, "-o", tmp_path / "loud", "-v", "--workers", "3")
    plain = spin("select", source, "-o", tmp_path / "plain")  # afterwards: -v is not remembered
    silent = spin("select", source, "-o", tmp_path / "silent", "-q")
    usual = plain.err.replace("plain", "loud")
    assert "side by side" not in usual
    assert silent.err == ""
    more = [line for line in loud.err.splitlines() if line not in usual]
    count = len(json.loads((source / "manifest.json").read_text())["features"])
    assert more[0].startswith(f"probes: {count} matrices by accuracy on cpu, 3 side by side")
    assert re.fullmatch(r"select: \d+\.\d s", more[1])
    assert len(more) == 2


def test_verbose_names_device_and_number_type(spin, head, tmp_path):
    (tmp_path / "in.txt").write_text("one\n")
    done = spin(
        "predict", head, tmp_path / "in.txt", "-v", "--device", "cpu", "--batch-tokens", "77"
    )
    assert done.code == 0, done.err
    assert "tokens of a text" in done.err
    assert "77 in a batch" in done.err


def test_of_many_names_the_first_are_listed():
    assert list_names(["a", "b"]) == "'a', 'b'"
    assert list_names([f"n{i}" for i in range(8)], 5, "") == "n0, n1, n2, n3, n4 and 3 more"
    scores = [
        {"layer": f"layer_{i:02}", "site": "ffn", "pooling": "mean", "converged": False, "1": 3}
        for i in range(7)
    ]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        say_doubts({"scores": scores, "counts": {"unconverged": 7}})
    assert said.getvalue().endswith("layer_04 ffn mean and 2 more\n")


# -- what select shows -----------------------------------------------------------------------


def selected(*, metric: str = "accuracy", asked: str | None = None, **more) -> dict:
    row = {"layer": "layer_06", "site": "hidden", "pooling": "mean", "width": 1536, "C": 0.0123,
           "val_score": 0.9876, "converged": True}  # fmt: skip
    row |= {"control": "random", "control_score": 0.6512, "selectivity": 0.3364}
    row |= {"stability": 0.4167, "neurons_eta_1": 1234}
    return {
        "scores": [row], "metric": metric, "request": {"options": {"metric": asked}},
        "counts": {"unconverged": 0},
    } | more  # fmt: skip


@pytest.mark.parametrize("columns", [80, 200])
def test_every_number_of_a_selection_is_whole_at_80_columns(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    show_selected(selected(), Path("run/selection"), json=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns and "…" not in out
    whole = {"layer_06", "hidden", "mean", "0.9876", "0.6512", "0.3364", "0.4167", "1234"}
    assert whole <= set(out.split())
    assert {"control", "selectivity", "stability", "neurons"} <= set(out.split())
    assert out.count("random") == 1
    assert ("0.0123" in out) == (columns == 200)  # C goes first


def test_a_metric_that_nobody_asked_for_is_explained(capsys):
    for more, said in (
        ({"metric": "macro-f1"}, "by macro-f1 (a class is rare) on val"),
        ({"metric": "macro-f1", "multi_label": True}, "by macro-f1 (labels) on val"),
        ({"metric": "macro-f1", "asked": "macro-f1"}, "by macro-f1 on val"),
        ({}, "by accuracy on val"),
    ):
        show_selected(selected(**more), Path("run/selection"), json=False)
        assert said in capsys.readouterr().out
