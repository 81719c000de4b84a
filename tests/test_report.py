"""The report: what is on the page, what a text cannot do to it, what it says is absent."""

from __future__ import annotations

import csv
import json
import re
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from unittest.mock import MagicMock
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from spin_cli import artifacts, atomic, extraction, metrics, reports, selection, training
from spin_cli.choices import HeadKind, Pooling, Site
from spin_cli.cli import app
from spin_cli.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    ReportConfig,
    SelectConfig,
    TrainConfig,
)
from spin_cli.errors import ArtifactError, ModelError
from spin_cli.head import METRICS, load_head, save_head
from spin_cli.reports import charts, drawing, model, neurons, sources, stage

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)> $10$ \x07"
CLASSES = ("<b>good</b> & $new$", "bad</style><script>alert(2)</script>")
FIGURES = (
    "results", "compute", "parameters", "depth", "latency", "eta", "probes", "salient", "neurons",
    "margins", "confusion", "reliability",
)  # fmt: skip
PLAIN = TrainConfig(cv=0, masks_only=True)
NO_MODEL = ReportConfig(use_model=False)


def write_data(folder, splits=("train", "val", "test")):
    """Texts of two classes with markup in texts, ids and class names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = (("lovely", "great", "superb"), ("awful", "dull", "horrid"))
    for split, count in zip(splits, (60, 40, 40), strict=False):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "label"])
            for row in range(count):
                code = row % 2
                word = words[code if rng.random() < 0.85 else 1 - code][row % 3]
                text = f"{HOSTILE} a {word} film, number {split} {row}"
                writer.writerow([f"<i>{split}-{row}", text, CLASSES[code]])
    return folder


def make_run(data, folder, config=PLAIN):
    extract = ExtractConfig(
        DataConfig(id_column="id"), ModelConfig("bundled:minilm"), layers="0-2",
        sites=(Site.HIDDEN, Site.FFN), poolings=(Pooling.MEAN, Pooling.MAX),
    )  # fmt: skip
    extraction.extract(data, folder / "activations", extract)
    selection.select(folder / "activations", folder / "selection", SelectConfig())
    training.train(folder / "selection", folder / "head", config)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return make_run(write_data(folder / "data"), folder / "run")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """The page, its files and the summary, with the model."""
    folder = tmp_path_factory.mktemp("page")
    config = ReportConfig(figures=folder / "figures")
    summary = reports.report(run, folder / "report.html", config)
    return folder, summary, (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.ids, self.shown = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.shown.append(data)


def test_the_page_has_every_figure_and_needs_nothing_from_elsewhere(made):
    _, summary, text = made
    page = Page(text)
    assert summary["left_out"] == []
    assert summary["figures"] == list(FIGURES)
    assert page.tags.count("svg") == len(FIGURES)
    assert not set(page.tags) & {"script", "img", "iframe", "link", "object", "embed", "form"}
    fetched = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action")]
    assert fetched
    assert all(value.startswith("#") for value in fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert not any(name == "style" or name.startswith("on") for name, _ in page.attributes)
    assert summary["bytes"] == len(text.encode()) < 1_000_000


def test_the_policy_allows_the_pages_own_style_and_nothing_else(made):
    import base64
    import hashlib

    text = made[2]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_markup_in_texts_ids_and_class_names_is_only_text(made):
    text = made[2]
    page = Page(text)
    shown = "".join(page.shown)
    assert "<script>" in shown  # in a text, to be read
    assert CLASSES[0] in shown
    assert "<i>test-" in shown
    assert "script" not in page.tags
    assert "b" in page.tags  # the page's own
    assert "<b>good" not in text
    assert "\x07" not in text
    assert text.count("</style>") == 1


def test_figures_are_named_for_who_cannot_see_them(made):
    for svg in re.findall(r"<svg.*?</svg>", made[2], re.DOTALL):
        root = ElementTree.fromstring(svg)
        title, desc = root[0], root[1]
        assert title.tag.endswith("title") and title.text
        assert desc.tag.endswith("desc") and len(desc.text) > 20
        assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert root.get("role") == "img"
        colours = {e.get(k) for e in root.iter() for k in ("fill", "stroke")} - {None, "none"}
        assert colours <= {f"var(--{name})" for name in drawing.COLOURS}


def test_files_of_each_figure(made):
    folder, summary, _ = made
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "csv")}
    assert len(summary["files"]) == len(names)
    for name in FIGURES:
        path = folder / "figures" / f"{name}.png"
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        svg = (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(svg.encode())
        assert "var(" not in svg
        with (folder / "figures" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}


def test_answers_from_stored_activations_are_those_that_train_measured(run):
    found = sources.read_run(run)
    known = json.loads((run / "head" / METRICS).read_text())["spin"]["test"]
    assert found.answers.split == "test"
    table = metrics.confusion(found.answers.codes, found.answers.predicted, 2)
    assert table.tolist() == known["confusion"]
    assert metrics.log_loss(found.answers.codes, found.answers.probs) == pytest.approx(
        known["log_loss"], abs=1e-4
    )


def test_numbers_of_the_costs_are_those_of_the_model(run):
    """Parameters are counted against transformers' own, operations against the formula."""
    import transformers

    from spin_cli.reports import costs

    found = sources.read_run(run)
    loaded = model.open_model(found, ReportConfig(device="cpu"))
    sizes = model.count_parameters(loaded)
    layers = loaded.model.encoder.layer
    assert isinstance(loaded.model, transformers.BertModel)
    assert sizes.total == loaded.model.num_parameters()
    assert sizes.of_layer["layer_00"] == 0
    assert sizes.used == sum(p.numel() for p in layers.parameters())
    made = costs.find_costs(found, sizes)
    tokens = found.samples.n_tokens
    train, val = (tokens[found.samples.splits == name].sum() for name in ("train", "val"))
    assert made.training[0] == 2 * sizes.used * (train + val)
    assert made.training[2] == 6 * sizes.used * train * costs.EPOCHS
    depth = found.metrics["chosen"]["depth"]
    assert made.per_text[1] == pytest.approx(made.per_text[0] * depth / len(layers))
    assert made.trainable[:2] == (384 + 1, found.head.neurons + 1)


def test_top_neurons_are_those_that_move_the_logit_most(run):
    found = sources.read_run(run)
    top = neurons.top_neurons(found)
    train = found.samples.rows("train")
    effects = []
    start = 0
    for feature in found.head.features:
        values = found.matrix(feature)[train][:, feature.neurons].astype(np.float64)
        for place, sd in enumerate(values.std(axis=0)):
            name = (feature.layer, feature.site, feature.pooling, int(feature.neurons[place]))
            effects.append((abs(float(found.head.weight[0, start + place])) * sd, name))
        start += len(feature.neurons)
    effects.sort(key=lambda pair: -pair[0])
    assert [(n.layer, n.site, n.pooling, n.index) for n in top] == [
        name for _, name in effects[: len(top)]
    ]
    assert top[0].effect == pytest.approx(effects[0][0], rel=1e-3)


def test_the_texts_of_a_neuron_are_its_largest_and_their_tokens_pool_to_its_value(run):
    found = sources.read_run(run)
    neuron = neurons.top_neurons(found, 1)[0]
    loaded = model.open_model(found, ReportConfig(device="cpu"))
    ((_, listed),) = neurons.find_examples(found, [neuron], loaded)
    assert [e.value for e in listed] == sorted(neuron.values.tolist(), reverse=True)[: len(listed)]
    ids = found.samples.ids.tolist()
    text = found.texts[ids.index(listed[0].id)]
    (pieces,) = model.token_values(loaded, [text], neuron.layer, neuron.site, neuron.index)
    values = [piece.value for piece in pieces]
    pooled = max(values) if neuron.pooling is Pooling.MAX else float(np.mean(values))
    assert pooled == pytest.approx(listed[0].value, rel=2e-2, abs=2e-3)
    squeezed = "".join(piece.text for piece in pieces).replace(" ", "")
    assert "film,number" in squeezed
    assert any(mark.level == neurons.LEVELS for mark in listed[0].marks)


def test_without_a_model_tokens_and_costs_are_left_out_and_the_page_says_so(run, tmp_path):
    summary = reports.report(run, tmp_path / "page.html", NO_MODEL)
    assert {item["what"] for item in summary["left_out"]} == {
        "compute cost", "trainable parameters", "score against latency"
    }  # fmt: skip
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = "".join(page.shown)
    assert "Tokens are not marked: no model was to be loaded" in shown
    assert "Left out, compute cost" in shown
    assert "mark" not in page.tags
    assert "film, number" in shown


def test_a_model_that_cannot_be_loaded_is_tried_once(run, tmp_path, monkeypatch):
    load, tries = model.backbone.load, []
    monkeypatch.setattr(
        model.backbone, "load", lambda *args, **more: (tries.append(args), load(*args, **more))[1]
    )
    config = ReportConfig(model=str(tmp_path / "nowhere"))
    summary = reports.report(run, tmp_path / "page.html", config)
    assert len(tries) == 1
    why = {item["what"]: item["why"] for item in summary["left_out"]}
    for what in ("compute cost", "trainable parameters", "score against latency"):
        assert "the model cannot be loaded" in why[what]
        assert "nowhere" in why[what]


def test_changed_texts_are_not_shown(run, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(run.parent / "data", copy)
    test = run.parent / "data" / "test.csv"
    before = test.read_bytes()
    try:
        test.write_bytes(before + b"x,another,row\n")
        found = sources.read_run(run)
        assert "changed" in found.texts
        assert all(m.text is None and m.id.startswith("<i>test-") for m in stage._Work(
            found, NO_MODEL, lambda *_: None).mistakes())  # fmt: skip
        with pytest.raises(sources.LeftOut, match="changed"):
            neurons.find_examples(found, neurons.top_neurons(found, 1), None)
    finally:
        test.write_bytes(before)


def test_a_run_without_activations_still_has_its_scores(run, tmp_path):
    shutil.copytree(run / "head", tmp_path / "run" / "head")
    shutil.copytree(run / "selection", tmp_path / "run" / "selection")
    summary = reports.report(tmp_path / "run", tmp_path / "page.html", NO_MODEL)
    assert summary["figures"] == ["results", "confusion"]
    assert "the activations that the head was made from are gone" in str(summary["left_out"])


def test_a_stale_parent_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "selection")
    selection.select(folder / "activations", folder / "selection", SelectConfig(top_k=3))
    with pytest.raises(ArtifactError, match="changed since"):
        reports.report(folder, tmp_path / "page.html", NO_MODEL)
    assert not (tmp_path / "page.html").exists()


def test_what_is_in_the_way_is_refused(run, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        reports.report(run, page, NO_MODEL)
    assert page.read_text() == "mine"
    with pytest.raises(ArtifactError, match="is a folder"):
        reports.report(run, tmp_path, NO_MODEL, force=True)
    with pytest.raises(ArtifactError, match="no such folder"):
        reports.report(tmp_path / "none", tmp_path / "other.html", NO_MODEL)


def test_metrics_of_another_program_are_refused(run, tmp_path):
    folder = tmp_path / "head"
    shutil.copytree(run / "head", folder)
    known = artifacts.read_json(folder / METRICS)
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    for wrong in ({}, [], known | {"metric": "beauty"}, known | {"spin": {"test": {}}}):
        atomic.write_json(folder / METRICS, wrong)
        content = {k: manifest[k] for k in ("request", "parent", "classes")}
        artifacts.write_manifest(folder, "head", content)
        with pytest.raises(ArtifactError, match=f"{METRICS}: (the field|not what `spin train`)"):
            sources.read_run(folder)


def test_a_missing_library_is_named_with_the_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModelError) as error:
        drawing.check_installed()
    assert "pip install 'spin-cli[report]'" in error.value.hint


def test_without_a_test_split_nothing_is_said_of_rows_the_head_was_fitted_to(run, tmp_path):
    data = write_data(tmp_path / "data", ("train", "val"))
    config = TrainConfig(head=HeadKind.MLP, refit=True, cv=0, masks_only=True)
    folder = make_run(data, tmp_path / "run", config)
    summary = reports.report(folder, tmp_path / "page.html", NO_MODEL)
    left = {item["what"]: item["why"] for item in summary["left_out"]}
    assert "no row is left" in left["reliability"]
    assert "no row is left" in left["the errors of highest confidence"]
    assert {"neurons", "margins", "depth", "eta", "confusion"} <= set(summary["figures"])


def test_where_the_head_abstains_is_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    head = copy / "head"
    config = TrainConfig(cv=0, masks_only=True, abstain_below=0.7)
    training.train(copy / "selection", head, config, force=True)
    manifest = artifacts.read_json(head / artifacts.MANIFEST)
    for name in ("kind", "schema", "versions", "files", "fingerprint"):
        del manifest[name]
    save_head(head, replace(load_head(head), threshold=0.375))
    artifacts.write_manifest(head, "head", manifest)
    found = artifacts.read_json(head / METRICS)
    reports.report(copy, tmp_path / "page.html", NO_MODEL)
    shown = " ".join(Page((tmp_path / "page.html").read_text(encoding="utf-8")).shown)
    answered = found["answered"]["test"]
    assert (
        f"below a probability of 0.700: answers {answered['share']:.1%} of the test rows,"
        f" {answered['accuracy']:.3f} of them right" in shown
    )
    assert "from a probability of 0.375 on" in shown
    before = reports.report(run, tmp_path / "before.html", NO_MODEL)
    assert before and "below a probability" not in (tmp_path / "before.html").read_text()


def test_the_command_line(run, tmp_path):
    page = tmp_path / "page.html"
    args = ["report", str(run), "-o", str(page), "--no-model", "--json"]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout)
    assert summary["stage"] == "report"
    assert summary["output"] == str(page)
    assert summary["bytes"] == page.stat().st_size
    again = CliRunner().invoke(app, args)
    assert isinstance(again.exception, ArtifactError)
    assert again.exception.exit_code == 4


def test_many_classes_and_long_texts_stay_bounded():
    pieces = [model.Piece(f" word{n}", float(n == 150)) for n in range(300)]
    marks = neurons._marks("", pieces, 1.0)
    shown = "".join(mark.text for mark in marks)
    assert len(shown) < 500
    assert [mark.text for mark in marks if mark.level] == ["word150"]
    assert shown.startswith("… ") and shown.endswith(" …")
    assert len(drawing.plain("x" * 10_000, neurons.CHARS)) == neurons.CHARS
    assert drawing.plain("a\x00b\ud800c\x1bd") == "a\ufffdb\ufffdc\ufffdd"
    assert replace(NO_MODEL, device="cpu").device == "cpu"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_class_far_outside_the_span_is_drawn_at_its_end(dtype):
    """In half precision a value that was clipped to the span may lie a little below it."""
    many = np.random.default_rng(0).normal(size=400).astype(dtype)
    axes = MagicMock()
    axes.get_ylim.return_value = (0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.two_densities(axes, [many, np.full(1, -50, dtype)], span=(-0.3, 0.3))
    heights, edges = axes.stairs.call_args.args
    assert np.isfinite(heights).all()
    assert heights[0] * (edges[1] - edges[0]) == pytest.approx(1)
