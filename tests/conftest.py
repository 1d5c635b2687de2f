"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell starts what runs in its background with Ctrl-C ignored, which the programs that tests start and interrupt would
# inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Published adapters, kept beside the repository because their owners state no licence."""
    folder = Path(__file__).parents[2] / "shared" / "corpus"
    if not folder.is_dir():
        pytest.skip("the corpus of published adapters (../shared/corpus) is not here")
    return folder
