"""Fixtures that several test files share."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models too small to be shared out between threads, which only wait for each other."""
    import torch  # which most tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests of libraries that warn of what the tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
