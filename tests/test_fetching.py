"""What a GPU is told to do by itself, told to a stand-in: `test_gpu` has the real one."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import cycle
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spin_cli.backbone import fetching, gathering
from spin_cli.choices import Bits
from spin_cli.config import ModelConfig
from tests.test_architectures import LLAMA, build
from tests.test_replicas import read, texts, wrap


def on_gpu(model: nn.Module | None = None, **options) -> SimpleNamespace:
    options = ModelConfig("tiny", **options)
    return SimpleNamespace(
        model=model or nn.Linear(2, 2), options=options, device=torch.device("cuda:0")
    )


@pytest.fixture
def pure(monkeypatch):
    """No model keeps anything, as far as the trial can tell; and this is no AMD."""
    monkeypatch.setattr(fetching, "keeps_nothing", lambda _model: True)
    monkeypatch.setattr(torch.version, "hip", None)


def quantised() -> nn.Module:
    model = nn.Linear(2, 2)
    model.hf_quantizer = object()
    return model


def test_batches_overlap_where_no_pass_comes_into_the_way_of_another(pure, monkeypatch):
    overlap = fetching._may_overlap
    assert overlap(on_gpu())
    assert overlap(on_gpu(quantised(), bits=Bits.FOUR))
    assert not overlap(on_gpu(quantised()))
    assert not overlap(on_gpu(trust_remote_code=True))
    assert not overlap(on_gpu(device_map="auto"))
    assert not overlap(SimpleNamespace(**vars(on_gpu()) | {"device": torch.device("cpu")}))
    assert not overlap(SimpleNamespace(**vars(on_gpu()) | {"device": torch.device("mps")}))
    model = nn.Linear(2, 2)
    monkeypatch.setattr(fetching, "keeps_nothing", lambda _model: False)
    assert not overlap(on_gpu(model))
    monkeypatch.setattr(fetching, "keeps_nothing", lambda _model: pytest.fail("tried once"))
    assert not overlap(on_gpu(model))
    monkeypatch.setattr(fetching, "keeps_nothing", lambda _model: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not overlap(on_gpu())


class Stream:
    """Takes down what it waits for."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


def test_batches_take_turns_on_two_streams_that_wait_for_what_came_before(pure, monkeypatch):
    streams, current, entered = [Stream(), Stream()], ["the default"], []

    @contextmanager
    def within(stream):
        entered.append(stream)
        yield

    turns = cycle(streams)
    monkeypatch.setattr(fetching, "_streams", lambda _device: turns)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", within)
    for _ in range(3):
        with fetching.taking_turns(on_gpu()):
            pass
    assert entered == [streams[0], streams[1], streams[0]]
    assert streams[0].waited == ["the default"] * 2
    assert streams[1].waited == ["the default"]


def test_vectors_come_from_a_device_in_one_copy_into_memory_that_is_used_again():
    idle = SimpleQueue()
    vectors = [torch.randn(3, n).to(torch.bfloat16) for n in (5, 1, 8)]
    found, room = fetching.fetch(vectors, idle)
    assert all(torch.equal(a, b) for a, b in zip(found, vectors, strict=True))
    assert {part.untyped_storage().data_ptr() for part in found} == {room.data_ptr()}
    _, other = fetching.fetch(vectors, idle)  # the first one's is in use
    assert other.data_ptr() != room.data_ptr()
    idle.put(room)
    small = [torch.full((2, 2), 7.0)]
    assert fetching.fetch(small, idle)[1] is room
    idle.put(room)
    (large,), grown = fetching.fetch([torch.full((99, 9), 7.0)], idle)  # there it does not fit
    assert len(grown) >= 4 * 99 * 9
    assert torch.equal(large, torch.full((99, 9), 7.0))


@pytest.fixture
def copying(monkeypatch):
    """The CPU as a GPU that copies; the memory it copies to."""
    idle, waited = SimpleQueue(), []
    event = SimpleNamespace(
        record=lambda _stream: waited.append("recorded"), synchronize=lambda: waited.append("over")
    )
    monkeypatch.setattr(fetching, "is_one_gpu", lambda _backbone: True)
    monkeypatch.setattr(fetching, "_idle", lambda _device: idle)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    return idle, waited


def test_vectors_come_in_few_copies_and_give_their_memory_back(copying, monkeypatch):
    idle, waited = copying
    monkeypatch.setattr(fetching, "FETCHED_BYTES", 100)
    vectors = [torch.full((2, n), float(n)) for n in (4, 8, 1, 40, 3)]  # 32, 64, 8, 320, 24 bytes
    fetched = fetching.Fetched(on_gpu())
    for each in vectors:
        fetched.add(each)
    fetched.close()
    assert waited == ["recorded"]
    assert idle.empty()
    found = []
    for each in fetched.used():
        assert waited == ["recorded", "over"]
        found.append(each.clone())
    assert all(torch.equal(one, other) for one, other in zip(found, vectors, strict=True))
    # 32 + 64 and 8 bytes are no more than 100, and 320 are by themselves; each a power of two.
    assert sorted(len(idle.get()) for _ in range(idle.qsize())) == [8, 32, 128, 512]


def test_many_batches_are_stored_out_of_the_same_memory(copying, monkeypatch):
    idle, _ = copying
    model = wrap(build("Llama", LLAMA))
    expected = read(model, texts())
    monkeypatch.setattr(gathering, "STORED_AT_ONCE", ())
    model.copies.append(None)
    found = read(model, texts())
    assert found.keys() == expected.keys()
    for key, vector in expected.items():
        assert (found[key] == vector).all()
    assert idle.qsize() == 1
