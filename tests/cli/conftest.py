"""Running the command in this process, as the console script does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from outcome import Outcome

from adapterops.cli.main import run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`command("inspect", path)` gives the exit status and what was printed."""

    def call(*arguments: object) -> Outcome:
        code = 0
        try:
            run([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call
