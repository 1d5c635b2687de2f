"""A progress bar on stderr for work that takes a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from adapterops.storage.output import Progress, nothing

WORTHWHILE = 128 << 20
"""Bytes; less is done before a bar could be read."""


@contextlib.contextmanager
def counting(label: str, what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar over things done of how many, with the time left; nothing where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def bar(label: str, total: int, quiet: bool = False) -> Iterator[Progress]:
    """A bar over `total` bytes of work; nothing where stderr is no terminal or the work is short."""
    if quiet or total < WORTHWHILE or not sys.stderr.isatty():
        yield nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)
