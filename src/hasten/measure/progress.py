"""Progress of a comparison: silent for programs, a bar with the time left for people."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What a comparison tells while it runs."""

    def start(self, rows: int, pictures: int) -> None:
        """So many rows of so many pictures each are to come."""
        ...

    def row(self, name: str) -> None:
        """A row begins."""
        ...

    def advance(self) -> None:
        """One picture is finished."""
        ...

    def skip(self) -> None:
        """A row was refused; its pictures will not be made."""
        ...


class Silent:
    """Says nothing."""

    def start(self, rows: int, pictures: int) -> None:
        """Ignore."""

    def row(self, name: str) -> None:
        """Ignore."""

    def advance(self) -> None:
        """Ignore."""

    def skip(self) -> None:
        """Ignore."""


class OnTerminal:
    """A progress bar over all pictures; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("pictures"))
        self._bar = Bar(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._pictures = 0

    def start(self, rows: int, pictures: int) -> None:
        """Show the bar."""
        self._pictures = pictures
        self._task = self._bar.add_task("starting", total=rows * pictures)

    def row(self, name: str) -> None:
        """Name the row that is running; rows that were not foreseen lengthen the bar."""
        if self._task is None:
            return
        task = self._bar.tasks[0]
        if task.total is not None and task.completed >= task.total:
            self._bar.update(self._task, total=task.total + self._pictures)
        self._bar.update(self._task, description=name[:44])

    def advance(self) -> None:
        """One picture more."""
        if self._task is not None:
            self._bar.advance(self._task)

    def skip(self) -> None:
        """Shorten the bar."""
        if self._task is not None and (total := self._bar.tasks[0].total) is not None:
            self._bar.update(self._task, total=total - self._pictures)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
