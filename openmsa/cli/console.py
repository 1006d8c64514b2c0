"""What the user sees: results on stdout, progress on stderr. Plain text where rich is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


def say(line: str) -> None:
    """One line of what is going on, on stderr."""
    print(line, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of results: text to the left, numbers to the right."""
    rows = [[_cell(value) for value in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        return _plain_table(title, columns, rows)
    drawn = Table(title=title, title_justify="left")
    for column, cells in zip(columns, zip(*rows) if rows else [()] * len(columns)):
        numbers = bool(cells) and all(_is_number(cell) for cell in cells)
        drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return Console().print(drawn, markup=False)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    print(title)
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%"))
    except ValueError:
        return cell in ("", "-")
    return True


class Bar:
    """Progress of one piece of work."""

    def __init__(self, progress=None, task=None) -> None:
        self._progress, self._task = progress, task

    def advance(self) -> None:
        """One more step is done."""
        if self._progress:
            self._progress.update(self._task, advance=1)

    def show(self, done: int, total: int) -> None:
        """`done` of `total` steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Bar]:
    """A bar on stderr with the time left, or a moving one where `total` is not known.

    It appears on a terminal only: in a file it would be noise.
    """
    try:
        from rich import progress as bars
        from rich.console import Console
    except ModuleNotFoundError:
        yield Bar()
        return
    columns = [
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        yield Bar(shown, shown.add_task(what, total=total))
