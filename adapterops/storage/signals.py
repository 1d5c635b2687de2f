"""Signals while output is being written: nothing is left behind, and nothing is torn in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that temporary files are removed.

    Only where they would end the process without that: another handler, and a signal that is ignored (nohup),
    stay as they are.
    """
    with _handlers({n: _raise for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL}):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP until the block is done: for renames and for cleaning up."""
    caught: list[int] = []
    with _handlers({n: lambda number, frame: caught.append(number) for n in _ENDING if callable(signal.getsignal(n))}):
        yield
    for number in caught[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def _handlers(wanted: dict[signal.Signals, Any]) -> Iterator[None]:
    # Handlers run in the main thread and can be set only there; in other threads nothing is interrupted.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in wanted.items():
            before[number] = signal.getsignal(number)
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
