"""What ``spin predict`` does once its options are settled: read, classify, write, count."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_cli import heap
from spin_cli.cli.style import Style, trace_record
from spin_cli.cli.terminal import is_file, print_json, print_table, progress_bar, say
from spin_cli.cli.writing import partial_path, writing, writing_lines
from spin_cli.config import PredictConfig
from spin_cli.ranks import Ranks

if TYPE_CHECKING:  # torch has to wait until a command runs
    from spin_cli.dataset import BadRow, Row
    from spin_cli.prediction import Prediction


class Run:
    """One run of the command: what it reads, what it has written so far."""

    def __init__(
        self, head: Path, source: str, config: PredictConfig, ranks: Ranks, *, resume: bool
    ) -> None:
        from spin_cli import prediction
        from spin_cli.prediction import resuming

        heap.settle()
        if resume:
            resuming.check_resumable(config)
        config = prediction.settle(head, config)
        self.head, self.source, self.config, self.ranks = head, source, config, ranks
        self.count, self.errors, self.first_error = 0, 0, ""
        self.resume, self.kept = resume, 0
        self.items: Iterator[Row | BadRow] = prediction.read_input(source, config)
        self.predictor = prediction.open_predictor(head, config)
        head_used = self.predictor.head
        self.tally = prediction.Evaluation(head_used)
        self.style = Style(
            head_used.classes, config, head_used.abstain_below is not None,
            head_used.label_separator,
        )  # fmt: skip

    def all(self, check_exit: int = 0) -> tuple[int, dict[str, Any] | None]:
        """Classify everything; the number of rows, and the metrics if they are wanted."""
        if check_exit:
            self._check_exit(check_exit)
        if self.resume:
            self._go_on()
        self._write()
        scored = self.config.evaluate and self.ranks.first
        return self.count, self.tally.result() if scored else None

    def trace(self, json: bool) -> None:
        """Write the score of every prefix of each text."""
        from spin_cli.dataset import is_live
        from spin_cli.prediction import prefixes

        crossed = 0
        with writing_lines(self.config.output) as write:
            live = is_live(self.source)
            for window in prefixes.trace(self.predictor, self.items, self.config, live=live):
                write([trace_record(found) for found in window])
                self.count += len(window)
                self.errors += sum(found.error is not None for found in window)
                crossed += sum(found.crossing is not None for found in window)
        if json:
            print_json(
                {"stage": "predict", "output": self.config.output, "rows": self.count,
                 "errors": self.errors, "crossed": crossed}
            )  # fmt: skip
        elif self.config.output is not None:
            say(f"{crossed:,} of {self.count:,} texts reach the threshold: {self.config.output}")

    def _write(self) -> None:
        config = self.config
        # A bar would run through lines that go to the terminal, be it through another program.
        shown = config.output is not None or is_file(sys.stdout)
        with progress_bar("predict", shown=shown) as progress:
            windows = self._windows(lambda n: progress("predict", n, None))
            if not self.ranks.first:
                for _ in windows:
                    pass
                return
            with writing(config.output, self.style, append=self.kept > 0) as write:
                for window in windows:
                    self._count(window)  # before they are written: a wrong label stops the run
                    write(window)

    def _windows(self, step: Any) -> Iterator[list[Prediction]]:
        from spin_cli import prediction
        from spin_cli.dataset import is_live
        from spin_cli.prediction import sharing

        if self.ranks.size > 1:
            assert self.config.output is not None
            return sharing.predict_shared(
                self.predictor, self.items, self.config, self.config.output, self.ranks, step
            )
        return prediction.predict(
            self.predictor, self.items, self.config,
            live=is_live(self.source), resumed=self.kept > 0, done=step,
        )  # fmt: skip

    def _count(self, window: list[Prediction]) -> None:
        for found in window:
            self.count += 1
            if found.error is not None:
                self.errors += 1
                self.first_error = self.first_error or found.error
            elif self.config.evaluate:
                self.tally.add(found)

    def _go_on(self) -> None:
        """Keep what an interrupted run left, be it under the final name."""
        from spin_cli.prediction import resuming

        output = self.config.output
        assert output is not None
        partial = partial_path(output)
        path = partial if partial.exists() else output
        if not path.exists():
            return
        if self.config.evaluate:
            say("resume: the rows that are kept are classified again for their scores")
        self.kept, end, self.items = resuming.go_on(
            path, self.items, self.predictor, self.config, self.style.names, self._count
        )
        path.replace(partial)  # only now: a file that is refused keeps its name
        os.truncate(partial, end)
        say(f"resume: {self.kept:,} rows are kept")

    def _check_exit(self, rows: int) -> None:
        from spin_cli import prediction
        from spin_cli.dataset import Row

        first = list(islice(self.items, rows))
        texts = [item.text for item in first if isinstance(item, Row)]
        worst = prediction.check_exit(self.predictor, self.head, self.config, texts)
        say(f"check-exit: {len(texts)} rows agree with the whole model (to {worst:.1e})")
        self.items = chain(first, self.items)


def show_scores(scores: dict[str, Any], *, to_stderr: bool) -> None:
    """Metrics of ``--evaluate``; on stderr where predictions take stdout."""
    named = {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
        "auroc": "AUROC",
        "log_loss": "log loss",
    }
    rows = [
        [name, f"{scores[key]:.4f}"]
        + [
            "–" if end is None else f"{end:.4f}"
            for end in scores["intervals"].get(key) or (None, None)
        ]
        for key, name in named.items()
        if scores.get(key) is not None
    ]
    if to_stderr:
        found = ", ".join(f"{row[0]} {row[1]} [{', '.join(row[2:])}]" for row in rows)
        say(f"{scores['rows']:,} rows: {found} (95% bootstrap)")
        return
    print_table(f"{scores['rows']:,} rows, 95% bootstrap", ["", "score", "from", "to"], rows)
    names = list(scores["per_class"])
    print_table(
        "Classes",
        ["class", "precision", "recall", "F1", "rows"],
        [
            [name, *[f"{c[key]:.4f}" for key in ("precision", "recall", "f1")], str(c["rows"])]
            for name, c in scores["per_class"].items()
        ],
    )
    if "confusion" in scores:
        print_table(
            "Confusion matrix",
            ["true \\ answer", *names],
            [
                [name, *[f"{n:,}" for n in row]]
                for name, row in zip(names, scores["confusion"], strict=True)
            ],
        )
    if "operating_points" in scores:
        print_table(
            "Operating points (for --decision-threshold)",
            ["class", "false positives", "threshold", "recall", "precision"],
            [
                [name, f"{p['false_positive_rate']:.2%} (≤ {p['max_false_positive_rate']:.1%})",
                 str(p["threshold"]), f"{p['recall']:.4f}",
                 "–" if p["precision"] is None else f"{p['precision']:.4f}"]
                for name, points in scores["operating_points"].items()
                for p in points
            ],
        )  # fmt: skip
    print_table(
        f"Reliability (calibration error {scores['ece']:.4f})",
        ["probability", "rows", "stated", "right"],
        [
            [f"{b['from']:.1f} to {b['to']:.1f}", f"{b['rows']:,}", f"{b['stated']:.3f}",
             f"{b['accuracy']:.3f}"]
            for b in scores["reliability"]["bins"]
        ],
    )  # fmt: skip
