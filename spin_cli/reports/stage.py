"""The report: everything drawn that can be, everything else named with the reason why not."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spin_cli import atomic
from spin_cli.backbone import Backbone
from spin_cli.config import Progress, ReportConfig, quiet
from spin_cli.errors import ArtifactError
from spin_cli.reports import depths, labels, layers, page, results
from spin_cli.reports.costs import Costs, draw_costs, draw_trainable, find_costs
from spin_cli.reports.curves import Curves, fit_curves
from spin_cli.reports.drawing import Figure, check_installed
from spin_cli.reports.model import (
    TIMED_TEXTS,
    Sizes,
    Speed,
    count_parameters,
    measure_speed,
    open_model,
)
from spin_cli.reports.neurons import Example, Neuron, draw_neurons, find_examples, top_neurons
from spin_cli.reports.sources import LeftOut, Run, read_run

Made = TypeVar("Made")
STEPS = 16


def report(
    source: Path, output: Path, config: ReportConfig, *, force: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:  # fmt: skip
    """Write a page about a run, and the figures as files where a folder is named for them.

    Parameters
    ----------
    source : a run folder, or a head with what it was made from
    output : the page
    config : what it is made with
    force : replace files

    Returns
    -------
    dict
        ``figures``: their names; ``files`` written; ``left_out``: what is not on the page and why;
        ``bytes`` of the page, ``seconds``.

    Raises
    ------
    ArtifactError
        No head, a stale or damaged artifact, or a file in the way.
    ModelError
        A library for drawing is not installed.
    """
    started = time.perf_counter()
    check_installed()
    run = read_run(source)
    atomic.check_free(output, force=force)
    if config.figures and config.figures.exists() and not config.figures.is_dir():
        raise ArtifactError(f"{config.figures}: is a file, where a folder was expected")
    work = _Work(run, config, progress)
    try:
        text, figures = _write(work)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{source}: holds what spin does not write ({type(error).__name__}: {error})",
            "Look at its parts: spin inspect, spin verify.",
        ) from error
    files = figure_files(figures) if config.figures else {}
    if config.figures:
        for name in files:
            atomic.check_free(config.figures / name, force=force)
    if config.figures:
        with atomic.disk_errors(config.figures):
            config.figures.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                atomic.write_bytes(config.figures / name, data)
    atomic.write_named(output, text)
    progress("report", STEPS, STEPS)
    return {
        "figures": [figure.name for figure in figures],
        "files": sorted(str(config.figures / name) for name in files) if config.figures else [],
        "left_out": [{"what": what, "why": why} for what, why in work.left_out],
        "bytes": len(text.encode()),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _confusions(run: Run, files: bool) -> list[tuple[str, Callable[[], Figure]]]:
    if not run.multi_label:
        return [("confusion matrix", lambda: results.draw_confusion(run, files))]
    return [
        ("confusion of each label", lambda: labels.draw_confusions(run, files)),
        ("labels that stand for others", lambda: labels.draw_strays(run, files)),
    ]


def _write(work: _Work) -> tuple[str, list[Figure]]:
    """The page, and the figures on it."""
    figures = work.figures()
    if work.run.multi_label:
        work.left_out += labels.LEFT_OUT
    content = page.Content(
        run=work.run,
        figures={figure.name: figure for figure in figures},
        examples=work.attempt("the texts behind each neuron", work.examples) or [],
        mistakes=work.attempt("the errors of highest confidence", work.mistakes),
        left_out=work.left_out,
        notes=work.notes,
    )
    return page.render(content), figures


def figure_files(figures: Sequence[Figure]) -> dict[str, bytes]:
    """Names and bytes of every figure's files: PNG, SVG, and the numbers behind it as CSV."""
    found: dict[str, bytes] = {}
    for figure in figures:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        table = figure.data or figure.table
        writer.writerow(table.columns)
        writer.writerows(table.rows)
        found[f"{figure.name}.csv"] = text.getvalue().encode()
        found |= {f"{figure.name}.{suffix}": data for suffix, data in figure.files.items()}
    return found


@dataclass
class _Work:
    """Makes the parts of a report, each once, and keeps account of those that cannot be made."""

    run: Run
    config: ReportConfig
    progress: Progress
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: int = 0

    def attempt(self, what: str, make: Callable[[], Made]) -> Made | None:
        """What *make* makes; None where it cannot, and the page will say why."""
        self.progress("report", min(self.done, STEPS), STEPS)
        self.done += 1
        try:
            return make()
        except LeftOut as reason:
            self.left_out.append((what, str(reason)))
            return None

    def figures(self) -> list[Figure]:
        """All figures that can be drawn, in the page's order."""
        run, files = self.run, self.config.figures is not None
        made = [
            self.attempt(what, make)
            for what, make in (
                ("results", lambda: results.draw_results(run, files)),
                ("compute cost", lambda: draw_costs(self.costs, files)),
                ("trainable parameters", lambda: draw_trainable(self.costs, files)),
                ("score against depth", lambda: depths.draw_depth(run, self.curves, files)),
                ("score against latency", lambda: depths.draw_latency(
                    run, self.curves, self.sizes, self.speed, files)),
                ("score against eta", lambda: depths.draw_eta(run, self.curves, files)),
                ("probe scores", lambda: layers.draw_probes(run, files)),
                ("salient neurons over layers", lambda: layers.draw_salient(run, files)),
                ("neurons by class", lambda: draw_neurons(run, self.neurons, files)),
                ("classifier at each depth", lambda: depths.draw_margins(run, self.curves, files)),
                *_confusions(run, files),
                ("reliability", lambda: results.draw_reliability(run, files)),
            )
        ]  # fmt: skip
        return [figure for figure in made if figure is not None]

    @cached_property
    def curves(self) -> Curves:
        """Heads around the chosen one."""
        return fit_curves(self.run)

    @cached_property
    def neurons(self) -> list[Neuron]:
        """The most salient ones."""
        return top_neurons(self.run)

    @property
    def model(self) -> Backbone:
        """The model; `LeftOut` where it cannot be had."""
        if isinstance(self._opened, str):
            raise LeftOut(self._opened)
        return self._opened

    @cached_property
    def _opened(self) -> Backbone | str:
        """The model, or why it cannot be had: to try again for each figure would take as long."""
        if not self.config.use_model:
            return "no model was to be loaded (--no-model)"
        try:
            return open_model(self.run, self.config)
        except LeftOut as reason:
            return str(reason)

    @cached_property
    def sizes(self) -> Sizes:
        """Of the model."""
        return count_parameters(self.model)

    @cached_property
    def costs(self) -> Costs:
        """Operations and parameters."""
        return find_costs(self.run, self.sizes)

    @cached_property
    def speed(self) -> Speed | None:
        """Measured, where there are texts to run."""
        texts = self.run.texts
        if isinstance(texts, str):
            return None
        rows = np.linspace(0, len(texts) - 1, min(TIMED_TEXTS, len(texts))).astype(int)
        with suppress(LeftOut):
            return measure_speed(self.model, [texts[row] for row in rows])
        return None

    def examples(self) -> list[tuple[Neuron, list[Example]]]:
        """Texts behind each neuron, their tokens marked where the model is there."""
        reader = None
        try:
            reader = self.model
        except LeftOut as reason:
            self.notes.append(f"Tokens are not marked: {reason}.")
        return find_examples(self.run, self.neurons, reader)

    def mistakes(self) -> list[results.Mistake]:
        """The errors of highest confidence."""
        results.check_answers(self.run)
        if isinstance(self.run.texts, str):
            self.notes.append(f"Errors are shown without their texts: {self.run.texts}.")
        worst = labels.worst_mistakes if self.run.multi_label else results.worst_mistakes
        return worst(self.run)
