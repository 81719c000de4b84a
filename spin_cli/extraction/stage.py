"""Carrying out a plan.

Rows are worked through in *windows*: runs of consecutive rows, small enough for their vectors to
wait in memory. Within a window, texts are batched by length; a finished window is written as one
block per matrix, synced, and noted. So memory does not depend on the number of rows, the files
keep the input's order, and a run that was killed goes on with the windows that are not noted.
Which rows make a window and a batch depends on nothing but the input and the options, so neither
do the bytes: not on kills, and not on how many processes share the windows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial as bind
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spin_cli import artifacts, atomic, backbone, heap, ranks, workers
from spin_cli.activations import RowWriter
from spin_cli.config import SPLITS, ExtractConfig, Progress, quiet
from spin_cli.dataset import Dataset
from spin_cli.errors import ArtifactError
from spin_cli.extraction.partial import FILES_AT_ONCE, NOTES, Partial, join, prepare
from spin_cli.extraction.planning import Plan, plan
from spin_cli.extraction.windows import Blocks, compute_window, make_blocks
from spin_cli.ranks import Ranks
from spin_cli.samples import SAMPLES, write_samples

logger = logging.getLogger(__name__)


def extract(
    data: Path,
    output: Path,
    config: ExtractConfig,
    *,
    force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write the activations of every text in *data* to the folder *output*.

    A run that was interrupted is taken up where it was; one that was made with other options,
    data, model or library versions is refused by name. Under ``torchrun`` the processes share the
    windows.

    Returns
    -------
    dict
        The manifest, and under ``log`` the time taken.

    Raises
    ------
    SpinError
        See `plan`; `ArtifactError` where *output* is in the way or the disk is full.
    """
    atomic.check_vacant(output, force=force)
    return run(plan(data, config), output, force=force, progress=progress)


def run(
    planned: Plan, output: Path, *, force: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Carry out a plan: see `extract`."""
    started = time.time()
    here = ranks.current()
    folder = atomic.partial_folder(output)
    with atomic.disk_errors(output), atomic.locked(folder, here.first):
        atomic.check_vacant(output, force=force)  # another process may just have finished it
        partial = prepare(planned, folder, force=force) if here.first else None
        if partial and here.size > 1:  # the others look for them
            partial.make()
        here.wait()
        partial = partial or join(planned, folder)
        pending = partial.pending()
        here.wait()  # no rank may note a window before all have read which are left
        tokens = work_through(partial, here.share(pending), progress)
        here.wait()
        if here.first:
            log = _log(planned, started, pending, tokens, here)
            finish(partial, output, log)
        here.wait()
    logger.info("extract: %.1f s", time.time() - started)
    manifest = artifacts.read_manifest(output, "activations")
    return manifest | {"log": artifacts.read_json(output / artifacts.LOG)}


def work_through(partial: Partial, windows: Sequence[int], progress: Progress) -> int:
    """Compute window after window, the one before being synced, the next tokenised; the tokens."""
    plan = partial.plan
    total, done, tokens = sum(len(plan.windows[w]) for w in windows), 0, 0
    room = make_blocks(plan.features, plan.window_rows, plan.storage_dtype)
    if plan.model.device.type == "cpu":
        for block in room.values():
            block.fill(0)  # its pages are there from the start: what grows later is the heap
    with _writing(partial) as (begin, write):
        tidy = heap.watch()
        texts = closing(workers.ahead(_encode_windows(plan, windows)))
        with heap.frozen(), texts as coming, _storing(plan) as later:
            later(begin)
            for window, encoded in coming:
                progress("extract", done, total)
                step = _step(progress, done, total, encoded)
                blocks, lengths = compute_window(
                    plan.model, plan.features, plan.storage_dtype, encoded, step, room, later
                )
                later(bind(write, window, blocks, lengths))
                read = int(np.abs(lengths).sum())
                tokens, done = tokens + read, done + len(encoded)
                tidy(read)
    backbone.release(plan.model)
    progress("extract", total, total)
    return tokens


def _storing(plan: Plan) -> AbstractContextManager[backbone.Later]:
    """Where batches are stored: a GPU goes on with the next two meanwhile."""
    if plan.model.device.type == "cpu":
        return nullcontext(backbone.at_once)
    return workers.in_order(waiting=2)


@contextmanager
def _writing(
    partial: Partial,
) -> Iterator[tuple[Callable[[], None], Callable[[int, Blocks, NDArray[np.int32]], None]]]:
    """A function that makes and opens the files, and one that writes a window into them.

    Blocks are written side by side, and a thread syncs them. When the function returns, they may be
    filled anew: they are in the system's cache. On a CPU nothing is lost by waiting for that: the
    forward pass keeps all cores busy, and waits for the slowest.
    """
    opened: list[RowWriter] = []
    synced: list[Future[None]] = []
    interrupted = threading.Event()
    count = min(workers.worker_count(0), FILES_AT_ONCE)
    with (
        ExitStack() as files, ThreadPoolExecutor(count) as writers, ThreadPoolExecutor(1) as syncer
    ):  # fmt: skip

        def begin() -> None:
            partial.make(interrupted.is_set)
            opened.append(files.enter_context(RowWriter(partial.folder, partial.plan.features)))

        def write(window: int, blocks: Blocks, lengths: NDArray[np.int32]) -> None:
            (writer,) = opened
            store = bind(partial.store, writer, window)
            stored = list(writers.map(store, blocks, blocks.values()))
            while synced:
                synced.pop().result()
            synced.append(syncer.submit(partial.note, writer, window, lengths, stored))

        try:
            yield begin, write
        except BaseException:
            interrupted.set()
            raise
        while synced:
            synced.pop().result()


def _encode_windows(
    plan: Plan, windows: Sequence[int]
) -> Iterator[tuple[int, list[backbone.Encoded]]]:
    """The texts of each window, in one pass over the data."""
    if not windows:
        return
    position = plan.windows[windows[0]].start
    texts = plan.dataset.rows(position)
    for window in windows:
        rows = plan.windows[window]
        found = list(islice(texts, rows.start - position, rows.stop - position))
        if len(found) != len(rows):
            plan.dataset.check_unchanged()
            raise ArtifactError(f"the data ended early, at row {rows.start + len(found)}")
        position = rows.stop
        places = [row.place for row in found]
        yield window, backbone.encode(plan.model, [row.text for row in found], places=places)


def _step(
    progress: Progress, start: int, total: int, encoded: Sequence[backbone.Encoded]
) -> Callable[[int], None]:
    """What is done after every batch of a window: tell how far it is, and hand free pages back."""
    tidy, mean = heap.watch(heap.READ_WITHIN), sum(e.n_tokens for e in encoded) / len(encoded)
    told = 0

    def step(done: int) -> None:
        nonlocal told
        progress("extract", start + done, total)
        tidy(round(mean * (done - told)))
        told = done

    return step


def _log(
    plan: Plan, started: float, pending: Sequence[int], tokens: int, here: Ranks
) -> dict[str, Any]:
    """What is worth knowing of this run, but no part of its result; tokens are this rank's."""
    seconds = time.time() - started
    rows = sum(len(plan.windows[window]) for window in pending)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 2),
        "processes": here.size,
        "rows_per_second": round(rows / seconds, 2),
        "tokens_per_second": round(tokens * here.size / seconds, 1),
        "resumed_at_row": len(plan.dataset) - rows,
    }


def finish(partial: Partial, output: Path, log: dict[str, Any]) -> None:
    """Complete the folder, unless that was done before a kill, and give it its final name."""
    if not partial.whole:
        complete(partial, log)
    partial.remove_notes()
    atomic.publish(partial.folder, output)


def complete(partial: Partial, log: dict[str, Any]) -> None:
    """Write the samples, the log and at last the manifest.

    Raises
    ------
    ArtifactError
        A window is missing.
    DataError
        The data changed while they were read.
    """
    plan, folder = partial.plan, partial.folder
    if missing := partial.pending():
        rows = plan.windows[missing[0]]
        raise ArtifactError(
            f"{folder}: {len(missing)} of {len(plan.windows)} windows are missing, first rows"
            f" {rows.start} to {rows.stop - 1}",
            "Run the same command again.",
        )
    plan.dataset.check_unchanged()
    lengths, overflows = partial.lengths(), partial.overflows()
    for path in folder.glob(".*.tmp"):  # the room kept, and what a kill left of a small file
        path.unlink()
    write_samples(
        folder / SAMPLES,
        ids=(row.id for row in plan.dataset.rows()),
        labels=plan.dataset.codes,
        classes=plan.dataset.classes,
        separator=plan.config.data.label_separator,
        splits=plan.dataset.splits,
        n_tokens=np.abs(lengths),
        truncated=lengths < 0,
    )
    seen = [artifacts.seen_from(folder, source.path) for source in plan.dataset.sources]
    artifacts.write_log(folder, log | {"data": seen})
    content = _content(plan, lengths, overflows)
    artifacts.write_manifest(
        folder, "activations", content, leave_out=NOTES, hashed=partial.hashed()
    )


def _content(
    plan: Plan, lengths: NDArray[np.int32], overflows: NDArray[np.int64]
) -> dict[str, Any]:
    dataset = plan.dataset
    return {
        "request": plan.request,
        "classes": dataset.classes,
        "counts": {
            "rows": len(dataset),
            **_split_counts(dataset),
            "tokens": int(np.abs(lengths).sum()),
            "truncated": int((lengths < 0).sum()),
            "overflowed": int(overflows.sum()),
        },
        "layers": plan.model.layout.layers,
        "causal": plan.model.layout.causal,
        "features": [
            {
                "layer": feature.layer,
                "site": feature.site,
                "pooling": feature.pooling,
                "width": feature.width,
                "hookpoint": feature.hookpoint,
                "overflowed": int(count),
            }
            for feature, count in zip(plan.features, overflows, strict=True)
        ],
        "storage_dtype": plan.storage_dtype,
        "warnings": [*dataset.warnings, *plan.notes],
    }


def _split_counts(dataset: Dataset) -> dict[str, int]:
    return {name: int((dataset.splits == index).sum()) for index, name in enumerate(SPLITS)}
