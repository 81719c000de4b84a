"""The folder in which activations are built, and the notes in it by which a run is resumed.

Beside the layer files lie small files of fixed size: whether each *window* of rows is done (one
byte), tokens of each row, overflows and hash of each window and matrix. A window's byte is set
after everything else of it is on the disk. So windows may be done in any order, by any number of
processes, and a kill at any moment loses at most the windows in work. When all are done, the
manifest is written; from then on it stands for the notes, which go before the folder is renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import activations, artifacts, atomic, workers
from spin_cli.activations import Feature, RowWriter, by_file
from spin_cli.errors import ArtifactError
from spin_cli.extraction.planning import Plan
from spin_cli.extraction.windows import settle_overflow, write_at
from spin_cli.samples import samples_bytes

REQUEST, WINDOWS, LENGTHS = "request.json", "windows.bin", "lengths.bin"
OVERFLOWS, HASHES = "overflows.bin", "hashes.bin"
NOTES = (LENGTHS, WINDOWS, OVERFLOWS, HASHES, REQUEST)
RESERVED = ".samples.tmp"
"""Claims the room of what is written at the end: HDF5 may crash on a disk that is full."""
HASH_BYTES = 32
FILES_AT_ONCE = 8
"""Layer files that are made, and matrices that are written, side by side."""


@dataclass(frozen=True)
class Partial:
    """An extraction that is under way."""

    folder: Path
    plan: Plan

    @property
    def whole(self) -> bool:
        """Whether all is written, so that only the notes are to go and the final name to come."""
        return (self.folder / artifacts.MANIFEST).exists()

    @property
    def made(self) -> bool:
        """Whether all files are in place, see `make`."""
        return self.whole or (self.folder / REQUEST).is_file()

    def pending(self) -> list[int]:
        """Numbers of the windows that are still to do."""
        if self.whole:
            return []
        if not self.made:
            return list(range(len(self.plan.windows)))
        done = self._read(WINDOWS, np.uint8, len(self.plan.windows))
        return [int(index) for index in np.flatnonzero(done == 0)]

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, negative where the text was cut."""
        return self._read(LENGTHS, np.int32, len(self.plan.dataset))

    def overflows(self) -> NDArray[np.int64]:
        """(features,) values of each matrix that float16 could not hold."""
        shape = len(self.plan.windows), len(self.plan.features)
        found = self._read(OVERFLOWS, np.int64, shape[0] * shape[1])
        return np.asarray(found.reshape(shape).sum(0))

    def _read(self, name: str, dtype: Any, count: int) -> NDArray[Any]:
        values = np.fromfile(self.folder / name, dtype)
        if len(values) != count:
            raise ArtifactError(
                f"{self.folder / name}: {len(values)} entries, expected {count}",
                "Give --force to start again.",
            )
        return values

    def make(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Make the files, unless an interrupted run has made them.

        Raises
        ------
        InterruptedError
            It was *given_up*.
        OSError
            Among others ``ENOSPC``: all space is claimed here.
        """
        if self.made:
            return
        plan, rows, windows = self.plan, len(self.plan.dataset), len(self.plan.windows)

        def create(mine: list[Feature]) -> bytes:
            if given_up():
                raise InterruptedError
            return activations.create_layer(
                self.folder / mine[0].file, mine, rows, plan.storage_dtype
            )

        # While one file is synced, others are made.
        layers = list(by_file(plan.features).values())
        beside = workers.side_by_side(create, layers, FILES_AT_ONCE)
        np.zeros(rows, np.int32).tofile(self.folder / LENGTHS)
        np.zeros((windows, len(plan.features)), np.int64).tofile(self.folder / OVERFLOWS)
        (self.folder / HASHES).write_bytes(
            bytes(windows * len(plan.features) * HASH_BYTES) + b"".join(beside)
        )
        np.zeros(windows, np.uint8).tofile(self.folder / WINDOWS)
        with (self.folder / RESERVED).open("wb") as file:
            classes, separator = plan.dataset.classes, plan.config.data.label_separator
            atomic.claim(file, samples_bytes(rows, classes, separator))
        for name in (LENGTHS, OVERFLOWS, HASHES, WINDOWS):
            atomic.sync(self.folder / name)
        # Last: its presence means that all is in place.
        atomic.write_json(self.folder / REQUEST, artifacts.to_plain(plan.request))

    def store(
        self, writer: RowWriter, window: int, feature: Feature, block: NDArray[Any]
    ) -> tuple[int, bytes]:
        """Write one feature of a window; how many values float16 could not hold, and its hash."""
        plan, start = self.plan, self.plan.windows[window].start
        compute = str(plan.model.dtype).removeprefix("torch.")
        count = settle_overflow(block, feature, start, plan.storage_dtype, compute)
        writer.write(feature, start, block)
        return count, activations.hash_block(block)

    def note(
        self,
        writer: RowWriter,
        window: int,
        lengths: NDArray[np.int32],
        stored: Sequence[tuple[int, bytes]],
    ) -> None:
        """Sync a window of which every feature is *stored*, and only then note that it is there."""
        writer.sync()
        overflows = np.array([count for count, _ in stored], np.int64)
        hashes = np.frombuffer(b"".join(digest for _, digest in stored), np.uint8)
        start = self.plan.windows[window].start
        write_at(self.folder / LENGTHS, lengths, start * lengths.itemsize)
        write_at(self.folder / OVERFLOWS, overflows, window * overflows.nbytes)
        write_at(self.folder / HASHES, hashes, window * hashes.nbytes)
        write_at(self.folder / WINDOWS, np.ones(1, np.uint8), window)

    def hashed(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each layer file beside its size."""
        plan, files = self.plan, by_file(self.plan.features)
        blocks = len(plan.windows) * len(plan.features)
        found = self._read(HASHES, np.uint8, (blocks + len(files)) * HASH_BYTES)
        shape = len(plan.windows), len(plan.features), HASH_BYTES
        of_blocks = found[: blocks * HASH_BYTES].reshape(shape).swapaxes(0, 1)
        beside = found[blocks * HASH_BYTES :].reshape(-1, HASH_BYTES)
        entries, first = {}, 0
        for name, rest in zip(files, beside, strict=True):
            mine = of_blocks[first : first + len(files[name])]
            total = activations.join_hashes([mine.tobytes()], rest.tobytes())
            entries[name] = {"block_rows": plan.window_rows, "blocks_sha256": total}
            first += len(files[name])
        return entries

    def remove_notes(self) -> None:
        """Remove what only the run itself needed."""
        for name in NOTES:
            (self.folder / name).unlink(missing_ok=True)


def request_of(folder: Path) -> dict[str, Any] | None:
    """What the interrupted run in *folder* was asked for; None: none was begun."""
    request: dict[str, Any] | None = None
    if (folder / REQUEST).is_file():
        request = artifacts.read_json(folder / REQUEST)
    elif (folder / artifacts.MANIFEST).is_file():
        request = artifacts.read_manifest(folder, "activations")["request"]
    return request


def progress_of(folder: Path) -> tuple[dict[str, Any], int, int] | None:
    """Request of the interrupted run in *folder*, its windows done and all; None: none begun."""
    if (request := request_of(folder)) is None:
        return None
    if (folder / artifacts.MANIFEST).is_file():
        rows = sum(source["rows"] for source in request["data"])
        windows = -(-rows // request["batching"]["window_rows"])
        return request, windows, windows
    if not (folder / WINDOWS).is_file():
        return None
    done = np.fromfile(folder / WINDOWS, np.uint8)
    return request, int(np.count_nonzero(done)), len(done)


def prepare(plan: Plan, folder: Path, *, force: bool) -> Partial:
    """Make *folder* for `Partial.make`, or find the files of an interrupted run in it.

    Raises
    ------
    ArtifactError
        The run was begun with other options, data, model or versions; they are named. Or some of
        its files are gone.
    """
    partial = Partial(folder, plan)
    if not force and (begun := request_of(folder)) is not None:
        refuse_other(folder, begun, artifacts.to_plain(plan.request))
        files = by_file(plan.features) if partial.whole else (*by_file(plan.features), *NOTES)
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ArtifactError(
                f"{folder}: {missing[0]} is missing", "Give --force to start again."
            )
        return partial
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REQUEST, artifacts.MANIFEST):  # first: they say that the others are there
        (folder / name).unlink(missing_ok=True)
    atomic.clear(folder)
    return partial


def join(plan: Plan, folder: Path) -> Partial:
    """Find the files that the first rank has made.

    Raises
    ------
    ArtifactError
        They are not here, so the folder is not shared; or this rank has another request.
    """
    begun = request_of(folder)
    if begun is None:
        raise ArtifactError(
            f"{folder}: the first process's files are not here",
            "All processes need one shared folder.",
        )
    refuse_other(folder, begun, artifacts.to_plain(plan.request))
    return Partial(folder, plan)


def refuse_other(folder: Path, begun: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise `ArtifactError` unless the run in *folder* was *begun* with the same *request*."""
    if differing := artifacts.changes(begun, request):
        # What was asked for is why the rest is another.
        differing = tuple(sorted(differing, key=lambda it: not it.field.startswith("options.")))
        raise ArtifactError(
            f"{folder}: begun with another {'; '.join(map(str, differing[:5]))}",
            "Give the options of that run to resume it, or --force to start again.",
        )
