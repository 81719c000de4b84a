"""Which of several processes this one is, as PyTorch's launcher says, and waiting for the others.

``torchrun --nproc-per-node 2 -m spin_cli extract …`` starts one process (*rank*) per device and
tells each its number in the environment. Ranks share work by taking turns over a fixed list and
share results through files; all they ever say to each other is "I have come this far".
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from spin_cli.errors import UsageError

Item = TypeVar("Item")
LONGEST_PAUSE = 0.25
"""Seconds between two looks at whether the others have come."""


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that work together; one of one without a launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes on this machine: the number of its GPU."""
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that does what has to be done once."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The contiguous part of *items* that is this rank's; all ranks' parts make the whole."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def wait(self) -> None:
        """Return when every rank has come here. A rank that died ends the others (by torchrun).

        It looks again and again, since within the store's own wait no signal is heeded: torchrun
        would wait half a minute for this rank to end, and then kill it.
        """
        if self.size == 1:
            return
        # After a restart the store may still hold what the ranks before had said.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        meeting = f"spin/{attempt}/{next(_meetings)}"
        store = _store()
        if store.add(f"{meeting}/here", 1) == self.size:
            store.set(f"{meeting}/all", "yes")
        _poll(lambda: store.check([f"{meeting}/all"]))
        if not self.first:
            store.add(f"{meeting}/seen", 1)
            return
        # The first rank may be the one that keeps the store: it leaves last.
        _poll(lambda: store.add(f"{meeting}/seen", 0) >= self.size - 1)


def _poll(arrived: Callable[[], bool]) -> None:
    """Return when *arrived* does not say no any more."""
    pause = 0.005
    while not arrived():
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)


_meetings = itertools.count()


@functools.cache
def _store() -> Any:
    """The launcher's key-value store: enough to meet at, without a process group."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]


def current() -> Ranks:
    """The place that the launcher's environment variables give.

    Raises
    ------
    UsageError
        The variables contradict each other.
    """
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    if not all(name in os.environ for name in names.values()):
        return Ranks()
    try:
        values = {key: int(os.environ[name]) for key, name in names.items()}
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise UsageError(f"{', '.join(names.values())}: not all are numbers ({error})") from error
    if not 0 <= values["rank"] < values["size"]:
        raise UsageError(f"RANK {values['rank']} is not below WORLD_SIZE {values['size']}")
    return Ranks(**values, local_size=local_size)
