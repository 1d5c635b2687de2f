"""The same work on many things, in as many threads as there are cores; what comes of it does not depend on how many."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 8
"""More threads would wait for the interpreter."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(items: Sequence[T], worker: Callable[[], Callable[[T], R]], threads: int) -> list[R]:
    """What the function that `worker` makes, anew for each thread, returns for each item, in order.

    The calling thread is one of `threads`.  Whatever an item raises is raised here, after the work that was begun; where
    several raise, it is the first in order, as with one thread.
    """
    todo = deque(enumerate(items))
    done: dict[int, R] = {}
    failed: list[tuple[int, Exception]] = []

    def work() -> None:
        do = worker()
        while True:
            try:
                at, item = todo.popleft()
            except IndexError:
                return
            try:
                done[at] = do(item)
            except Exception as error:  # noqa: BLE001 (raised below, in the thread that asked)
                failed.append((at, error))
                todo.clear()

    others = [Thread(target=work) for _ in range(min(threads, len(items), MOST) - 1)]
    try:
        for other in others:
            other.start()
        work()
    finally:
        todo.clear()  # interrupted: the others have nothing more to do
        for other in others:
            if other.ident is not None:
                other.join()
    if failed:  # all items before the first that failed were done
        raise min(failed, key=lambda entry: entry[0])[1]
    return [done[at] for at in range(len(items))]
