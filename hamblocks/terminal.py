"""What the commands share: progress bars, and errors of one line. It needs the extra `cli`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function `(name, done, total, remark)` that shows one progress bar for every name."""
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int, remark: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, remark="")
            bars.update(tasks[name], completed=done, remark=remark)

        yield progress


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError into a usage error, which is one line and the exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
