"""Batches side by side on a CPU, each on a copy of the model's modules.

One batch on all cores waits at the end of every operation for the slowest core, and while Python
leads it from one operation to the next. Two batches on half of the cores each fill these gaps, and
what is done with their vectors besides. Modules are copied, since some keep what belongs to one
pass, and so do spin's hooks; parameters and buffers are the same in all copies.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn

from spin_cli.backbone.discovery import keeps_nothing, probe_ids
from spin_cli.backbone.loading import Backbone
from spin_cli.backbone.placing import is_placed
from spin_cli.backbone.reading import Check, read_states, turn_of
from spin_cli.choices import Site

Item = TypeVar("Item")
Result = TypeVar("Result")

_counting = threading.Lock()
"""Held while torch's number of threads, which new threads begin with, is not the process's own."""
_copying = threading.Lock()
"""Held while a model's copies are counted and made."""


class Stopped(Exception):  # noqa: N818 - not an error: the caller is not there any more
    """The results of a batch are not wanted any more."""


def share_cores(cores: int) -> int:
    """Batches to run at once: two, or three where these leave fewer cores idle.

    More would fill the gaps no better, and each takes memory.
    """
    return 1 if cores == 1 else max((2, 3), key=lambda batches: cores // batches * batches)


def models_of(backbone: Backbone, batches: int) -> list[nn.Module]:
    """The models on which so many batches are to run: more than one on a CPU of several cores.

    Copies are made when they are first needed, and have to give what the model itself gives. Where
    its modules cannot be copied, which may be with code of strangers, it is alone; that is tried
    once, not with every window.
    """
    if batches < 2 or backbone.device.type != "cpu" or is_placed(backbone.options):
        return [backbone.model]
    count = min(share_cores(_threads()), batches) - 1
    with _copying:
        while len(backbone.copies) < count:
            backbone.copies.append(_replicate(backbone))
    made = (replica for replica in backbone.copies[:count] if replica is not None)
    return [backbone.model, *made]


def _threads() -> int:
    with _counting:  # a thread that asks for the first time is told what is set now
        return torch.get_num_threads()


def _replicate(backbone: Backbone) -> nn.Module | None:
    """A copy of the modules that shares parameters and buffers; None where that does not work.

    Nor does it where a pass writes into buffers.
    """
    model = backbone.model
    shared: dict[int, Any] = {id(it): it for it in (*model.parameters(), *model.buffers())}
    try:
        with turn_of(model):  # hooks of a pass would be copied too, and stay
            if not keeps_nothing(model):
                return None
            replica = copy.deepcopy(model, shared)
        pairs = zip(_trial(backbone), _trial(replace(backbone, model=replica)), strict=True)
        same = all(torch.equal(one, other) for one, other in pairs)
    except Exception:  # whatever a stranger's module raises
        return None
    return replica if same else None


def _trial(backbone: Backbone) -> list[torch.Tensor]:
    """What every layer hands on when a few tokens run through."""
    found: list[torch.Tensor] = []
    wanted = [
        (layer, site)
        for layer in backbone.layout.layers
        for site in (Site.HIDDEN, Site.FFN)
        if backbone.layout.width(layer, site)
    ]
    ids = probe_ids(backbone.model).tolist()
    read_states(backbone, ids, wanted, lambda _layer, _site, states: found.append(states.clone()))
    return found


@contextmanager
def run_on(
    models: Sequence[nn.Module],
    run: Callable[[nn.Module, Item, Check], Result],
    items: Sequence[Item],
) -> Iterator[Iterator[Result]]:
    """Give the results of *run* for every item, in order; on each of *models* one item at a time.

    When the body ends, by an interrupt or otherwise, items that have not begun are dropped.

    Parameters
    ----------
    models : from `models_of`; with one alone, items are run in this thread on all cores
    run : called with a model, an item, and a function to be called now and then, which raises
        `Stopped` once the result is not wanted any more
    items : best the dearest first, so that no model is left with one when the others are done
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    if len(models) == 1:
        yield (run(models[0], item, check) for item in items)
        return
    idle: SimpleQueue[nn.Module] = SimpleQueue()
    for model in models:
        idle.put(model)

    def one(item: Item) -> Result:
        model = idle.get()
        try:
            return run(model, item, check)
        finally:
            idle.put(model)

    with ThreadPoolExecutor(len(models)) as pool:
        _share_threads(pool, len(models))
        try:
            yield pool.map(one, items)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _share_threads(pool: ThreadPoolExecutor, count: int) -> None:
    """Begin the *count* threads of a pool, each of which is to compute on its share of the cores.

    torch keeps a number of its own for every thread, but what sets it sets the number of threads to
    come, too; so that one is put back when all have begun.
    """
    ready = threading.Barrier(count)  # none takes a second task before all have their first
    with _counting:
        cores = torch.get_num_threads()

        def begin(_number: int) -> None:
            torch.set_num_threads(cores // count)
            torch.get_num_threads()  # a thread that never asked would ask at its first operation
            ready.wait()

        try:
            list(pool.map(begin, range(count)))
        except BaseException:  # an interrupt: none may wait for one that was not begun
            ready.abort()
            pool.shutdown()
            raise
        finally:
            torch.set_num_threads(cores)
