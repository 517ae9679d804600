"""What the commands share: progress bars, checks, and errors of one line. It needs the extra `cli`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
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

from hamblocks_ops.arguments import wrong


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


def check_device(name: str) -> None:
    """Checks that torch can use a device.

    Raises:
        ValueError: it cannot; the message says why.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter in a torch without CUDA
        reason = str(error).splitlines()[0]
        raise wrong("--device", f"a device that torch can use here ({reason})", name) from error


def text_of(file: Path) -> str:
    """The text in a file.

    Raises:
        ValueError: it is not in UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise wrong("--text", f"a file in UTF-8 ({error})", str(file)) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError into a usage error, which is one line and the exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
