"""docs/formats.md names all that is in a run, and what it tells other programs to write is read."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import h5py
import pytest
from safetensors import safe_open

from spin_cli import artifacts, errors
from tests.helpers import json_lines, sentences

PAGE = (Path(__file__).parents[1] / "docs/formats.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tiny_run) -> Path:
    return tiny_run / "run"


def named(*titles: str) -> set[str]:
    """Every word in code spans of the sections with these titles."""
    words: set[str] = set()
    for title in titles:
        start = re.search(rf"^#+ {re.escape(title)}$", PAGE, re.MULTILINE)
        assert start, title
        level = start[0].index(" ")
        end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(PAGE, start.end())
        text = PAGE[start.end() : end.start() if end else None]
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        words.update(*(re.split(r"[^\w.\-]+", span) for span in spans))
    return words


def keys(value, skipped=()) -> set[str]:
    """All keys of a JSON value; of *skipped* ones (keyed by file, label …) those inside values."""
    if isinstance(value, list):
        return set().union(*(keys(item, skipped) for item in value))
    if not isinstance(value, dict):
        return set()
    found = set(value)
    for key, item in value.items():
        inner = list(item.values()) if key in skipped and isinstance(item, dict) else item
        found |= keys(inner, skipped)
    return found


def general(name: str) -> str:
    """A tensor's name with layer, site and pooling left open, as the page has it."""
    return re.sub(r"layer_\d\d\.(hidden|ffn)\.(mean|max|first)", "LAYER.SITE.POOLING", name)


def h5_names(path: Path) -> set[str]:
    found: set[str] = set()
    with h5py.File(path) as file:

        def look(name, item):
            found.update(item.attrs)
            if isinstance(item, h5py.Dataset):
                found.add(name.rsplit("/", 1)[-1])

        file.visititems(look)
    return found


def in_manifests(kind: str) -> set[str]:
    """The keys that the first table has for manifests of a kind."""
    table = PAGE[PAGE.index("| key | in | value |") : PAGE.index("**fingerprint** and")]
    found: set[str] = set()
    for line in table.strip().splitlines()[2:]:
        _, names, kinds, *_ = line.split("|")
        there = kinds.strip()
        if kind in there or (there.startswith("all") and f"but {kind}" not in there):
            found.update(re.findall(r"`(\w+)`", names))
    return found


@pytest.mark.parametrize("kind", ["activations", "selection", "head"])
def test_manifests_and_logs(run, kind):
    manifest = artifacts.read_json(run / kind / "manifest.json")
    assert keys(manifest, skipped={"files"}) <= named("manifest.json", "head/config.json")
    assert set(manifest) <= in_manifests(kind)
    assert keys(artifacts.read_json(run / kind / "log.json")) <= named("manifest.json")
    files = {re.sub(r"layer_\d\d\.h5", "LAYER.h5", name) for name in manifest["files"]}
    assert files <= named(f"{kind}/") | set(re.findall(r"[\w.]+\.\w+", PAGE.split("##")[0]))


def test_activations(run):
    words = named("activations/")
    assert h5_names(run / "activations/samples.h5") <= words
    layers = sorted((run / "activations").glob("layer_*.h5"))
    assert len(layers) == 3
    for path in layers:
        with h5py.File(path) as file:
            assert set(file) <= words
        assert h5_names(path) <= words


def test_selection(spin, run, tmp_path):
    out = tmp_path / "selection"
    done = spin(
        "select", run / "activations", "-o", out, "--bootstrap", 1, "--control", "labels"
    )  # fmt: skip
    assert done.code == 0, done.err
    words = named("selection/")
    assert {"frequency", "resamples", "control_score"} <= h5_names(out / "masks.h5") <= words
    with safe_open(out / "probes.safetensors", "np") as file:
        assert {general(name) for name in file.keys()} <= words  # noqa: SIM118
    with (out / "scores.csv").open() as file:
        columns = set(next(csv.reader(file)))
    etas = {name for name in columns if name.startswith("neurons_eta_")}
    assert "selectivity" in columns and {"neurons_eta_0.05", "neurons_eta_1"} <= etas
    assert columns - etas <= words


def test_head(spin, run, tmp_path):
    out = tmp_path / "head"
    done = spin(
        "train", run / "selection", "-o", out, "--head", "mlp", "--cv", 0, "--max-layer", 1,
        "--abstain-below", 0.6,
    )  # fmt: skip
    assert done.code == 0, done.err
    for head in (run / "head", out):
        config = artifacts.read_json(head / "config.json")
        assert keys(config) <= named("head/config.json", "manifest.json")
        with safe_open(head / "head.safetensors", "np") as file:
            assert {general(n) for n in file.keys()} <= named("head/head.safetensors")  # noqa: SIM118
        report = artifacts.read_json(head / "metrics.json")
        skipped = {"per_class", "operating_points"}
        assert keys(report, skipped) <= named("head/metrics.json")
    assert "hidden.weight" in named("head/head.safetensors")
    assert "answered" in report
    assert "operating_points" in artifacts.read_json(run / "head/metrics.json")


def test_export(spin, run, tmp_path):
    out = tmp_path / "out"
    assert spin("export", run / "head", out, "--format", "pt2").code == 0
    words = named("Exported heads")
    manifest = artifacts.read_json(out / "manifest.json")
    assert {"parent", "head", "neurons", "checks"} <= keys(manifest, skipped={"files", "checks"})
    assert set(manifest) <= in_manifests("export")
    assert keys(manifest, skipped={"files", "checks"}) <= named("manifest.json")
    assert keys(artifacts.read_json(out / "labels.json")) <= words
    files = {path.name for path in out.iterdir()}
    assert {name for name in files if not re.match("tokenizer|special_|vocab|chat_", name)} <= words
    assert {"model.pt2", "model.onnx", "tokenizer.json", "multi_label", "thresholds"} <= words


def test_predictions(spin, run, tmp_path):
    rows = "".join(json.dumps({"text": text, "more": "x"}) + "\n" for text, _ in sentences()[:3])
    (tmp_path / "in.jsonl").write_text(rows + '{"text": 1}\n')
    done = spin(
        "predict", run / "head", tmp_path / "in.jsonl", "--explain-tokens", "--keep-columns",
        "--threshold", 0.5, "--on-error", "skip",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json_lines(done.out)
    assert {"why", "abstained", "columns", "error", "position"} <= keys(found)
    assert keys(found, skipped={"probs", "columns"}) <= named("Predictions")


def test_exit_codes():
    table = PAGE[PAGE.index("## Exit codes") :]
    codes = {int(code) for code in re.findall(r"^\| (\d+)", table, re.MULTILINE)}
    kinds = [kind.exit_code for kind in errors.SpinError.__subclasses__()]
    assert codes >= {0, 1, 130, *kinds}


def test_activations_of_another_program_are_read(spin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = re.search(r"### Written by another program.*?```python\n(.*?)```", PAGE, re.S)
    assert script
    exec(compile(script[1], "docs/formats.md", "exec"), {"__name__": "formats"})
    commands = re.search(r"```sh\n(spin verify foreign.*?)```", PAGE, re.S)
    assert commands
    lines = commands[1].splitlines()
    assert [line.split()[1] for line in lines] == ["verify", "select", "train"]
    for line in lines:
        done = spin(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
    with h5py.File("foreign/selection/masks.h5") as file:
        neurons = file["layer_02/hidden/mean/neurons"][:5]
    assert set(neurons) == set(range(5))
    report = artifacts.read_json(Path("foreign/head/metrics.json"))
    assert report["spin"]["test"]["accuracy"] > 0.7
    assert "next: spin ablate foreign" in done.err
    for command in ("inspect foreign/activations", "inspect foreign/head", "ablate foreign",
                    "report foreign -o report.html", "verify foreign"):  # fmt: skip
        done = spin(*command.split())
        assert done.code == 0, (command, done.err)
    Path("texts.txt").write_text("some text\n")
    for command in ("predict foreign/head texts.txt", "export foreign/head out"):
        done = spin(*command.split())
        assert done.code == 4 and "knows no model" in done.err, (command, done.err)
    done = spin("status", "foreign")
    assert done.code == 4 and "written by another program" in done.err
