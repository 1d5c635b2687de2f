"""Ctrl-C while a module is being imported: it waits for the end of that import.

Libraries try their optional parts and take any exception for their absence: torch, whose import takes a second, so
swallows one interrupt in ten, and the command would go on as if nobody had stopped it.
"""

from __future__ import annotations

import signal
from types import FrameType

_IMPORTING = "<frozen importlib"
_LATER = 0.02  # seconds


def spare_imports() -> None:
    """Let Ctrl-C wait for imports, in a program whose Ctrl-C is still Python's own (nohup's is not)."""
    if hasattr(signal, "setitimer") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None:
        if at.f_code.co_filename.startswith(_IMPORTING):
            signal.signal(signal.SIGALRM, _again)
            signal.setitimer(signal.ITIMER_REAL, _LATER)
            return
        at = at.f_back
    raise KeyboardInterrupt


def _again(number: int, frame: FrameType | None) -> None:
    # To whoever handles it by then: output that is being put in place holds it back.
    signal.raise_signal(signal.SIGINT)
