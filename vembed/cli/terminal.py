"""What commands show on the way: always on stderr, so that stdout holds results only."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(label: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, when that is a terminal; gives a function that advances it by an amount."""
    console = Console(stderr=True)
    count = MofNCompleteColumn() if total is not None and total > 1 else TextColumn("")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM, too, shall end the processes and remove what is on the disk."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
