"""Batches side by side on copies of a model: the same vectors to the bit, nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from spin_cli import backbone
from spin_cli.backbone import Backbone, Encoded
from spin_cli.backbone.discovery import discover, keeps_nothing
from spin_cli.backbone.replicas import models_of, run_on, share_cores
from spin_cli.choices import Long, Pooling, Site
from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError
from tests.test_architectures import EXPERTS, LLAMA, SEQ2SEQ, TABLE, V, build

FAMILIES = {name: entry[:2] for name, entry in {**TABLE, **SEQ2SEQ, **EXPERTS}.items()}


@pytest.fixture
def cores():
    """torch with so many threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def wrap(model: nn.Module, batch_tokens: int = 24) -> Backbone:
    return Backbone(
        model=model, tokenizer=SimpleNamespace(pad_token_id=0), layout=discover(model),
        max_length=16, batch_tokens=batch_tokens, device=torch.device("cpu"), dtype=torch.float32,
        options=ModelConfig("tiny"), identity={},
    )  # fmt: skip


def texts(count: int = 40) -> list[Encoded]:
    draw = random.Random(3)
    return [Encoded([draw.randrange(2, V) for _ in range(draw.randint(2, 9))], False)
            for _ in range(count)]  # fmt: skip


def read(model: Backbone, encoded: list[Encoded], done=None) -> dict:
    layers = model.layout.layers
    wanted = {
        (layer, site): [Pooling.MEAN, Pooling.MAX, Pooling.LAST]
        for layer in layers
        for site in Site
        if site is Site.HIDDEN or model.layout.width(layer, site)
    }
    found = {}

    def store(layer, site, pooling, rows, vectors):
        for row, vector in zip(rows, vectors, strict=True):
            assert (layer, site, pooling, row) not in found
            found[layer, site, pooling, row] = vector.copy()

    backbone.gather(model, encoded, wanted, store, done)
    assert len(found) == 3 * len(wanted) * len(encoded)
    return found


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], vector) for key, vector in expected.items())


def test_two_batches_or_three_share_the_cores():
    assert [share_cores(n) for n in (1, 2, 3, 4, 5, 6, 8, 9, 16)] == [1, 2, 3, 2, 2, 2, 2, 3, 2]
    for cores in range(1, 200):
        count = share_cores(cores)
        assert cores - cores // count * count <= 1  # idle


@pytest.mark.parametrize("name", list(FAMILIES))
def test_side_by_side_every_architecture_gives_the_same_bits(name, cores):
    model = wrap(build(*FAMILIES[name]))
    cores(1)
    expected = read(model, texts())
    assert model.copies == []
    cores(2)
    found = read(model, texts())
    (copy,) = model.copies
    assert_same(found, expected)
    for one, other in zip(model.model.parameters(), copy.parameters(), strict=True):
        assert one is other
    assert not {id(m) for m in model.model.modules()} & {id(m) for m in copy.modules()}
    for one, other in zip(model.model.modules(), copy.modules(), strict=True):
        # transformers leaves hooks of its own, spin none
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)


def test_windows_of_long_texts_are_joined_in_one_order(cores):
    config = ModelConfig("bundled:minilm", max_length=24, long=Long.WINDOW, batch_tokens=48)
    model = backbone.load(config, depth=2)
    encoded = backbone.encode(model, ["a film of many words " * n for n in range(3, 30)])
    assert sum(bool(item.parts) for item in encoded) > 20
    cores(1)
    expected = read(model, encoded)
    cores(2)
    for _ in range(3):
        assert_same(read(model, encoded), expected)
    assert len(model.copies) == 1


class Remembering(nn.Module):
    """An FFN that keeps what belongs to one pass, as some rotary embeddings do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.width = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.width = x.shape[1]
        time.sleep(0.002)  # another batch comes along, where it can
        return self.inner(x) * self.width


def test_what_a_module_keeps_of_one_batch_is_not_seen_by_another(cores):
    model = build("Llama", LLAMA)
    for layer in model.layers:
        layer.mlp = Remembering(layer.mlp)
    wrapped = wrap(model)
    cores(1)
    expected = read(wrapped, texts())
    cores(2)
    assert_same(read(wrapped, texts()), expected)
    assert len(wrapped.copies) == 1


def test_a_model_whose_passes_write_into_its_buffers_is_read_batch_by_batch(cores):
    """Its rotary embedding has other frequencies for long texts than for short ones."""
    model = build("Phi3", {
        **LLAMA, "max_position_embeddings": 64, "original_max_position_embeddings": 5,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 12.8,
            "original_max_position_embeddings": 5,
            "short_factor": [1.0] * 4, "long_factor": [40.0] * 4,
        },
    })  # fmt: skip
    short, whole = model.rotary_emb.inv_freq.clone(), torch.ones(1, 9, dtype=torch.long)
    model(whole)
    assert not torch.equal(model.rotary_emb.inv_freq, short)
    assert not keeps_nothing(model)
    alone, wrapped = wrap(model), wrap(model)
    alone.copies.append(None)
    cores(2)
    assert_same(read(wrapped, texts()), read(alone, texts()))
    assert wrapped.copies == [None]


@pytest.mark.parametrize("name", ["bundled:minilm", "bundled:smollm2"])
def test_passes_of_the_bundled_models_may_overlap(name):
    assert keeps_nothing(backbone.load(ModelConfig(name), depth=2).model)


def test_a_model_that_cannot_be_copied_is_read_all_the_same(cores):
    model = build("Llama", LLAMA)
    model.lock = threading.Lock()
    wrapped = wrap(model)
    cores(2)
    assert models_of(wrapped, 9) == [model]
    assert len(read(wrapped, texts())) > 0
    assert wrapped.copies == [None]  # tried once, not with every window


class Twisted(nn.Linear):
    """Its copies are not what it is."""

    def __deepcopy__(self, _memo: dict) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False)


def lead_back(mlp: nn.Module) -> None:
    mlp.forward = lambda x: type(mlp).forward(mlp, x)  # a copy has this one, of the original


def twist(mlp: nn.Module) -> None:
    mlp.up_proj.__class__ = Twisted


@pytest.mark.parametrize("spoil", [lead_back, twist])
def test_a_copy_that_does_not_give_what_the_original_gives_is_not_used(cores, spoil):
    model = build("Llama", LLAMA)
    spoil(model.layers[1].mlp)
    wrapped = wrap(model)
    cores(2)
    assert models_of(wrapped, 9) == [model]
    assert len(read(wrapped, texts())) > 0


def test_one_batch_and_one_core_need_no_copy(cores):
    wrapped = wrap(build("Llama", LLAMA))
    cores(4)
    assert models_of(wrapped, 1) == [wrapped.model]
    cores(1)
    assert models_of(wrapped, 9) == [wrapped.model]
    cores(3)
    assert len(models_of(wrapped, 9)) == 3
    assert len(models_of(wrapped, 2)) == 2  # a third would leave a core idle
    cores(2)
    assert len(models_of(wrapped, 9)) == 2


@pytest.mark.parametrize("layers", [slice(1, 20), slice(19, 20)])
def test_an_interrupt_ends_the_batches_that_run(cores, layers):
    def slow(_module, args):
        if args[0].shape[1] == 8:
            time.sleep(0.3)

    wrapped = wrap(build("Llama", LLAMA | {"num_hidden_layers": 20}))
    for layer in wrapped.model.layers:
        layer.mlp.register_forward_pre_hook(slow)
    cores(2)
    stored: list[int] = []

    def done(_rows: int) -> None:
        raise KeyboardInterrupt

    encoded = [Encoded([3] * 12, False)] * 2 + [Encoded([3] * 8, False)] * 40
    wanted = {(layer, Site.FFN): [Pooling.MEAN] for layer in wrapped.layout.layers[layers]}
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        backbone.gather(wrapped, encoded, wanted, lambda *a: stored.append(len(a[3])), done)
    assert time.monotonic() - begun < 3  # a batch takes six seconds
    assert torch.get_num_threads() == 2
    now = len(stored)
    time.sleep(0.5)
    assert len(stored) == now
    assert not any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_a_batch_that_fails_ends_the_others_and_is_told(cores):
    wrapped = wrap(build("Llama", LLAMA))
    cores(2)

    def fail(_layer, _site, _pooling, rows, _vectors):
        if 7 in rows:
            raise ModelError("row 7 is wrong")

    wanted = {("layer_01", Site.HIDDEN): [Pooling.MEAN]}
    with pytest.raises(ModelError, match="row 7"):
        backbone.gather(wrapped, texts(), wanted, fail)
    assert torch.get_num_threads() == 2
    assert len(read(wrapped, texts())) > 0


def test_every_batch_has_its_share_of_the_threads(cores):
    cores(4)
    seen = []
    models = [nn.Identity(), nn.Identity()]

    def run(model, item, _check):
        seen.append((id(model), torch.get_num_threads(), threading.get_ident()))
        time.sleep(0.01)
        return item

    with run_on(models, run, range(8)) as results:
        assert list(results) == list(range(8))
    assert {count for _, count, _ in seen} == {2}
    assert len({thread for *_, thread in seen}) == 2
    assert {model for model, *_ in seen} == {id(model) for model in models}
    assert torch.get_num_threads() == 4
    assert threads_of_a_new_thread() == 4


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_the_number_of_threads_stays_whoever_reads_at_the_same_time(cores):
    """A server has a new thread for every request."""
    wrapped = wrap(build("Llama", LLAMA))
    cores(8)
    expected = read(wrapped, texts())
    for _ in range(8):
        with ThreadPoolExecutor(3) as requests:
            found = list(requests.map(lambda _: read(wrapped, texts()), range(3)))
        for one in found:
            assert_same(one, expected)
        assert threads_of_a_new_thread() == 8
    assert torch.get_num_threads() == 8


def test_many_short_runs_end(cores):
    """One of the two threads has hardly begun when the other has done all."""
    cores(2)
    models = [nn.Identity(), nn.Identity()]
    left = 2000

    def run(_model, item, _check):
        if item == left:
            raise ModelError("the first one fails")
        return item

    def work() -> None:
        nonlocal left
        while left:
            left -= 1
            with run_on(models, run, (0, 1)) as results, suppress(ModelError):
                list(results)
            with suppress(ModelError), run_on(models, run, (left, 1)) as results:
                next(results)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(60)
    assert left == 0


def test_a_model_is_not_copied_in_the_middle_of_a_pass(cores):
    """The hooks of the pass would be copied with it."""
    wrapped = wrap(build("Llama", LLAMA))
    arrived, go_on = threading.Event(), threading.Event()

    def wait(*_args) -> None:
        arrived.set()
        assert go_on.wait(60)

    handle = wrapped.model.layers[0].mlp.register_forward_pre_hook(wait)
    one = texts(1)
    cores(2)
    with ThreadPoolExecutor(2) as pool:
        passing = pool.submit(read, wrapped, one)
        assert arrived.wait(60)
        copying = pool.submit(models_of, wrapped, 9)
        time.sleep(0.2)
        assert not copying.done()
        handle.remove()
        go_on.set()
        model, copy = copying.result()
        passing.result()
    for one, other in zip(model.modules(), copy.modules(), strict=True):
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
