"""On a CUDA device: the same features and probes as on the CPU, and memory that runs out."""

from __future__ import annotations

import filecmp
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from spin_cli import backbone, extraction, metrics, probe
from spin_cli.choices import Dtype, Metric, Pooling, Site, StorageDtype
from spin_cli.config import DataConfig, ExtractConfig, ModelConfig, SelectConfig
from tests.helpers import write_csv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TEXTS = ["a film of many words " * n for n in (1, 3, 3, 8, 20)] + ["short"]
WANTED = {("layer_02", Site.HIDDEN): list(Pooling), ("layer_03", Site.FFN): list(Pooling)}


def features(device, dtype=Dtype.FLOAT32):
    model = backbone.load(ModelConfig("bundled:minilm", device=device, dtype=dtype), depth=3)
    found = {}

    def store(layer, site, pooling, rows, vectors):
        for row, vector in zip(rows, vectors, strict=True):
            found[layer, site, pooling, row] = vector.copy()

    backbone.gather(model, backbone.encode(model, TEXTS), WANTED, store)
    return found


@pytest.mark.parametrize("run_bytes", [0, 2**40])  # runs of equal span; masks
@pytest.mark.parametrize(("dtype", "limit"), [(Dtype.FLOAT32, 2e-3), (Dtype.BFLOAT16, 5e-2)])
def test_features_are_those_of_the_cpu(dtype, limit, run_bytes, monkeypatch):
    monkeypatch.setattr("spin_cli.pooling.RUN_BYTES", run_bytes)
    expected, found = features("cpu"), features("cuda", dtype)
    assert expected.keys() == found.keys()
    for key, vector in expected.items():
        apart = np.linalg.norm(found[key] - vector) / np.linalg.norm(vector)
        assert apart < limit, key


def test_a_batch_too_large_for_the_device_is_halved():
    config = ModelConfig("bundled:minilm", device="cuda", dtype=Dtype.FLOAT32, batch_tokens=2**24)
    model = backbone.load(config, depth=2)
    encoded = backbone.encode(model, ["many words in a row " * 100] * 512)
    seen = set()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((total - free + 2 * 2**30) / total)
    try:
        with pytest.warns(backbone.MemoryWarning):
            backbone.gather(
                model,
                encoded,
                {("layer_01", Site.FFN): [Pooling.MEAN]},
                lambda *found: seen.update(found[3]),
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert seen == set(range(512))


def test_batches_stored_beside_the_next_ones_are_those_stored_at_once(tmp_path, monkeypatch):
    """Many windows of many lengths, rounded on the device."""
    rows = [("some words " * (1 + n * 7 % 40), "ab"[n % 2]) for n in range(400)]
    data = write_csv(tmp_path / "texts.csv", rows)
    config = ExtractConfig(
        DataConfig(), ModelConfig("bundled:minilm", device="cuda", batch_tokens=1024),
        storage_dtype=StorageDtype.BFLOAT16,
    )  # fmt: skip
    monkeypatch.setattr("spin_cli.extraction.planning.WINDOW_BYTES", 2**21)
    extraction.extract(data, tmp_path / "beside", config)
    monkeypatch.setattr(extraction.stage, "_storing", lambda _: nullcontext(backbone.at_once))
    made = extraction.extract(data, tmp_path / "at_once", config)
    for name in made["files"]:
        assert filecmp.cmp(tmp_path / "beside" / name, tmp_path / "at_once" / name, shallow=False)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("hold", [True, False])
def test_probes_are_those_of_the_cpu(monkeypatch, n_classes, hold):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(4000, 600)) * rng.uniform(0.1, 5, 600)).astype(np.float16)
    W = rng.normal(size=(n_classes, 600)) * (np.arange(600) < 12)
    y = ((X / X.std(0)).astype(float) @ W.T + rng.gumbel(size=(4000, n_classes))).argmax(1)
    rows = np.arange(3000), np.arange(3000, 4000)
    config = SelectConfig(bootstrap=3, tol=1e-5, max_iter=500, path_points=8)
    options = {"score": metrics.score_function(Metric.LOG_LOSS), "config": config}
    monkeypatch.setattr("spin_cli.probe.device.SHARE", 0.5 if hold else 0.0)
    here = probe.rank_neurons(X, y, *rows, n_classes, **options)
    there = probe.rank_neurons(X, y, *rows, n_classes, device=torch.device("cuda"), **options)
    assert there.converged
    assert there.kkt <= 1e-5
    assert pytest.approx(here.C, rel=1e-6) == there.C
    # A shift of all classes' weights of a column may leave their l1 norm as it is: of an even count
    # of classes the differences alone are unique.
    np.testing.assert_allclose(
        there.coef - there.coef.mean(0), here.coef - here.coef.mean(0), atol=1e-3
    )
    strong = here.importance > 1e-3 * here.importance.max()
    np.testing.assert_array_equal(there.neurons[: strong.sum()], here.neurons[strong])
    again = probe.rank_neurons(X, y, *rows, n_classes, device=torch.device("cuda"), **options)
    assert again.coef.tobytes() == there.coef.tobytes()
