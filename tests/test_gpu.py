"""On a CUDA device: the same features as on the CPU, memory that runs out, one rank per device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spin_cli import backbone
from spin_cli.config import Dtype, ModelConfig, Pooling, Site

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


@pytest.mark.parametrize(("dtype", "limit"), [(Dtype.FLOAT32, 2e-3), (Dtype.BFLOAT16, 5e-2)])
def test_features_are_those_of_the_cpu(dtype, limit):
    expected, found = features("cpu"), features("cuda", dtype)
    assert expected.keys() == found.keys()
    for key, vector in expected.items():
        apart = np.linalg.norm(found[key] - vector) / np.linalg.norm(vector)
        assert apart < limit, key


def test_a_batch_too_large_for_the_device_is_halved():
    model = backbone.load(ModelConfig("bundled:minilm", device="cuda", batch_tokens=2**24), depth=2)
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
