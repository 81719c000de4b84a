"""Exported programs, run without spin, against `predict`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from spin_cli import artifacts, prediction
from spin_cli.choices import ExportFormat
from spin_cli.config import PredictConfig
from spin_cli.errors import ModelError
from spin_cli.head import load_head, save_head
from spin_cli.prediction import export as exports
from tests.helpers import ENV, json_lines, sentences
from tests.test_backbone import TEXTS, save_model
from tests.test_predict_python import flawed_bert
from tests.test_predict_tokens import make_head

ALONE = """
import json, sys, torch
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
program = torch.export.load(folder + "/model.pt2").module()
batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
probs = program(batch["input_ids"], batch["attention_mask"])
assert "spin_cli" not in sys.modules
print(json.dumps([json.load(open(folder + "/labels.json"))["classes"], probs.tolist()]))
"""


@pytest.mark.slow
def test_the_program_alone_answers_as_predict(spin, head, tmp_path):
    texts = [text for text, _ in sentences()[:12]] + ["no", "a film " * 300]
    out = tmp_path / "out"
    done = spin("export", head, out, "--format", "pt2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"]["model.pt2"]["difference"] < 1e-4
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(out), json.dumps(texts)],
        env=ENV, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    classes, probs = json.loads(alone.stdout)
    found = json_lines(spin("predict", head, "-", stdin="\n".join(texts).encode()).out)
    expected = [[f["probs"][name] for name in classes] for f in found]
    predictor = prediction.open_predictor(head, PredictConfig())
    slack = exports.rounding_slack(predictor, predictor.gather(predictor.encode(texts)))
    apart = np.abs(np.array(probs) - expected).max(1)
    assert (apart < 1e-4 + slack).all()
    assert np.median(apart) < 1e-5
    assert spin("export", head, out).code == 4  # in the way


@pytest.mark.parametrize("onnx", [False, True])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        # MiniLM above is a BERT
        pytest.param("bert", ["layer_01", "layer_02"], marks=pytest.mark.slow),
        ("gpt2", ["layer_00", "layer_02"]),
        pytest.param("llama", ["layer_02"], marks=pytest.mark.slow),
        pytest.param("gemma3", ["layer_03"], marks=pytest.mark.slow),
        pytest.param("t5", ["encoder_01"], marks=pytest.mark.slow),
        pytest.param("t5", ["encoder_02", "decoder_01"], marks=pytest.mark.slow),
    ],
)
def test_batches_and_lengths_are_free(tmp_path, name, layers, onnx):
    """Heads of every pooling and float32 storage agree to 1e-4 whatever the shape."""
    if onnx:
        for package in exports.ONNX_PACKAGES:
            pytest.importorskip(package)
        if name not in ("bert", "llama"):
            pytest.skip("the same program; two are enough")
    model = save_model(tmp_path / "m", name)
    folder = make_head(model, tmp_path / "head", layers, ("a", "b", "c"))
    kind = ExportFormat.ONNX if onnx else ExportFormat.PT2
    exports.export(folder, tmp_path / "out", PredictConfig(), formats=[kind], texts=TEXTS)
    predictor = prediction.open_predictor(folder, PredictConfig())
    if onnx:
        run = exports._onnx_runner(tmp_path / "out/model.onnx")
    else:
        module = torch.export.load(tmp_path / "out/model.pt2").module()
        run = lambda ids, mask: module(ids, mask).numpy()  # noqa: E731
    expected = predictor.probabilities(TEXTS)
    encoded = [e.ids for e in predictor.encode(TEXTS)]
    for batch in ([0], [1], [3, 6], list(range(7)), [2, 2, 2]):
        found = run(*exports.pad(predictor, [encoded[row] for row in batch]))
        np.testing.assert_allclose(found, expected[batch], atol=1e-4)


def test_an_export_is_shown_and_knows_its_head(spin, tmp_path):
    model = save_model(tmp_path / "m", "gpt2")
    folder, out = make_head(model, tmp_path / "head", ["layer_01"], ("a", "b", "c")), tmp_path / "e"
    exports.export(folder, out, PredictConfig(), formats=[ExportFormat.PT2], texts=TEXTS)
    done = spin("inspect", out)
    assert done.code == 0, done.err
    neurons = load_head(folder).neurons
    for words in ("export: ", "a, b, c", "../head", "(gpt2)", "model.pt2", f"{neurons}"):
        assert words in done.out, words
    found = json.loads(spin("inspect", out, "--json").out)
    assert found["neurons"] == neurons
    assert found["formats"]["model.pt2"]["bytes"] == (out / "model.pt2").stat().st_size
    assert found["formats"]["model.pt2"]["difference"] < 1e-4
    assert spin("verify", out).code == 0
    # One of a version that did not note the head is shown all the same.
    manifest = json.loads((out / "manifest.json").read_text())
    content = {name: manifest[name] for name in ("head", "checks")}
    artifacts.write_manifest(out, "export", content)
    done = spin("inspect", out)
    assert done.code == 0, done.err
    assert "unknown" in done.out
    artifacts.write_manifest(out, "export", content | {"parent": manifest["parent"]})
    artifacts.write_manifest(folder, "head", {"request": {"other": 1}})
    done = spin("verify", out)
    assert done.code == 4
    assert "parent" in done.out and "FAILED" in done.out


def test_what_is_in_the_way_and_what_is_abstained_from_are_told(spin, tmp_path):
    made = make_head(save_model(tmp_path / "m", "gpt2"), tmp_path / "head", ["layer_01"])
    save_head(made, replace(load_head(made), abstain_below=0.755))
    (made / artifacts.MANIFEST).unlink()
    artifacts.write_manifest(made, "head", {})
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    assert "another folder as OUT" in spin("export", made, out, "--format", "pt2").err
    shutil.rmtree(out)
    exports.export(made, out, PredictConfig(), formats=[ExportFormat.PT2], texts=TEXTS)
    done = spin("export", made, out, "--format", "pt2")
    assert done.code == 4
    assert "--force to replace it, or another folder as OUT" in done.err
    assert "-o" not in done.err.split()
    card = " ".join((out / "README.md").read_text().split())
    assert "below `abstain_below` in labels.json (0.755)" in card


def test_the_program_holds_no_blocks_that_the_head_does_not_read(tmp_path):
    model = save_model(tmp_path / "m", "llama")
    folder = make_head(model, tmp_path / "head", ["layer_01"])
    predictor = prediction.open_predictor(folder, PredictConfig())
    sizes = {k: v.numel() for k, v in exports.trace_program(predictor).state_dict.items()}
    assert any("layers.0.mlp.up_proj" in name for name in sizes)
    assert not any("layers.1." in name or "layers.2." in name for name in sizes)
    assert sum(size for name, size in sizes.items() if "down_proj" in name) == 0


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    folder = make_head(save_model(tmp_path / "m", "gpt2"), tmp_path / "head", ["layer_01"])
    real = exports.Program

    class Wrong(real):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask) + 0.01

    monkeypatch.setattr(exports, "Program", Wrong)
    with pytest.raises(ModelError, match="differs from predict"):
        exports.export(
            folder, tmp_path / "out", PredictConfig(), formats=[ExportFormat.PT2], texts=TEXTS
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "m"]


def test_onnx_without_its_packages_says_what_to_install(spin, head, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "ONNX_PACKAGES", ("no_such_package",))
    done = spin("export", head, tmp_path / "out", "--format", "onnx")
    assert done.code == 5  # as docs/formats.md says of a package
    assert "pip install" in done.err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("onnx", [False, True])
def test_the_program_holds_what_float16_cannot_as_predict_does(tmp_path, onnx):
    for package in exports.ONNX_PACKAGES if onnx else ():
        pytest.importorskip(package)
    folder = flawed_bert(tmp_path, 2e5)
    predictor = prediction.open_predictor(folder, PredictConfig())
    encoded = predictor.encode(TEXTS)
    assert predictor.gather(encoded).max() > 65_504
    program = exports.trace_program(predictor)
    run = program.module()
    if onnx:
        exports._save_onnx(program, tmp_path / "model.onnx")
        run = exports._onnx_runner(tmp_path / "model.onnx")
    found = np.asarray(run(*exports.pad(predictor, [each.ids for each in encoded])))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, predictor.probabilities(TEXTS), atol=1e-3)
