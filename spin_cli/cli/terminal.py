"""What people see: messages and progress on stderr, results on stdout.

Of several processes that work together, the first alone speaks; errors are told by whoever has one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from spin_cli import ranks
from spin_cli.errors import SpinError

if TYPE_CHECKING:  # rich has to wait until something is shown
    from rich.progress import ProgressColumn

Progress = Callable[[str, int, int | None], None]

verbosity = 0
"""-1 with ``-q``, 1 with ``-v``."""


class Told(logging.Handler):
    """With ``-v`` says what the stages log: what they have chosen, and how long they took."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say a record, unless ``-v`` was not given."""
        if verbosity > 0:
            say(record.getMessage())


def set_verbosity(level: int) -> None:
    """How much is said from now on."""
    global verbosity
    verbosity = level
    logger = logging.getLogger("spin_cli")
    logger.handlers = [Told()]
    logger.setLevel(logging.INFO if level > 0 else logging.WARNING)


def say(message: str) -> None:
    """Print a message to stderr, unless ``-q`` was given or another rank says it."""
    if verbosity >= 0 and ranks.current().first:
        print(message, file=sys.stderr)  # noqa: T201


def print_json(value: Any) -> None:
    """Print one machine-readable object to stdout."""
    from spin_cli.artifacts import to_plain

    if ranks.current().first:
        print(json.dumps(to_plain(value), ensure_ascii=False, allow_nan=False))  # noqa: T201


def print_error(error: SpinError) -> None:
    """Print what went wrong and how to mend it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.hint:
        console.print(Text.assemble(("  ↳ ", "dim"), error.hint))


@contextlib.contextmanager
def progress_bar(label: str, *, shown: bool = True) -> Iterator[Progress]:
    """A bar with rate and time left, on a terminal; nothing elsewhere or with ``-q``."""
    if (
        not shown
        or verbosity < 0
        or not ranks.current().first
        or not sys.stderr.isatty()
        or os.environ.get("TERM") == "dumb"
    ):
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), _times_column()
    )  # fmt: skip
    # What rich redirects it prints on the terminal, but stdout may be a file or a pipe.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(label, total=None)
        yield lambda _what, done, total: bar.update(task, completed=done, total=total)


def _times_column() -> ProgressColumn:
    """Rate, time gone, and time left at the mean rate so far: single steps may differ much."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Times(ProgressColumn):
        first: tuple[float, float] | None = None

        def render(self, task: Task) -> Text:
            gone, rate, left = task.elapsed or 0.0, "", ""
            if task.total is not None or task.completed:
                self.first = self.first or (gone, task.completed)
                seconds, steps = gone - self.first[0], task.completed - self.first[1]
                if seconds > 0 and steps > 0:
                    speed = steps / seconds
                    rate = f"{speed:,.0f}/s  " if speed >= 10 else f"{speed:.1f}/s  "
                    if task.total is not None:
                        left = f", {clock((task.total - task.completed) / speed)} left"
            return Text(f"{rate}{clock(gone)} gone{left}")

    return Times()


def is_file(stream: TextIO) -> bool:
    """Whether *stream* goes to a file on the disk, and not to a terminal or another program."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # closed, or made up
        return False


def print_table(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    *,
    wrapped: bool = False,
    spare: Sequence[str] = (),
) -> None:
    """Print a table to stdout: numbers to the right, a column without a heading to the left.

    *wrapped*: text in every column, to the left; the last one takes as many lines as it needs.
    Where the others would have to be cut, columns stand closer, and those in *spare* are left out,
    the first of them first.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not ranks.current().first:
        return
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        show_header=any(columns),
    )
    console = Console(highlight=False)
    for name in spare:
        if _least_width(columns, rows) + len(columns) + 1 <= console.width:
            break
        at = columns.index(name)
        columns, *rows = [[*cells[:at], *cells[at + 1 :]] for cells in (columns, *rows)]
    if _least_width(columns, rows) + 3 * len(columns) + 1 > console.width:
        table.padding = (0, 0)
    for index, name in enumerate(columns):
        table.add_column(
            name,
            justify="left" if index == 0 or not name or wrapped else "right",
            no_wrap=index < len(columns) - 1,
        )
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    console.print(table)


def _least_width(columns: list[str], rows: list[list[str]]) -> int:
    """Of all cells uncut, but for those of the last column, which may be broken."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    return sum(widths[:-1]) + len(columns[-1])


def print_line(text: str = "") -> None:
    """Print a line of a result to stdout; on a terminal, cut to its width."""
    if not ranks.current().first:
        return
    text = printable(text)
    if sys.stdout.isatty() and len(text) > width():
        text = f"{text[: width() - 1]}…"
    print(text)  # noqa: T201


def printable(text: str) -> str:
    """*text* with everything escaped that could move a terminal's cursor or cannot be encoded."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def bar(share: float, length: int) -> str:
    """A bar of *length* characters, filled to *share* in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * length * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + " ▏▎▍▌▋▊▉"[rest].strip()).ljust(length)


def clock(seconds: float) -> str:
    """A span of time that changes as one looks: ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )
