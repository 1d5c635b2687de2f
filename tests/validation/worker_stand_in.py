"""What workers run in the tests of workers, instead of a validation: adapters whose names say what becomes of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from adapterops.errors import AdapterOpsError, UsageError
from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.rule import Rule
from adapterops.validation.subject import Place


def examine(place: Place, options: Options, rules: Sequence[Rule]) -> Checked:
    """Raises, dies, waits, or says which process it was, and of how many rules."""
    if "raises" in place.name:
        raise RuntimeError("a fault\nof ours")
    if "usage" in place.name:
        raise UsageError("--load-test needs peft")
    if "refuses" in place.name:
        raise AdapterOpsError("nobody took this up")
    if "dies" in place.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exits" in place.name:
        os._exit(3)
    if "meets" in place.name:
        Path(place.folder.path, f"{os.getpid()}.pid").touch()
        while len(list(Path(place.folder.path).glob("*.pid"))) < 2:
            time.sleep(0.01)
    if "slow" in place.name:
        Path(place.folder.path, f"{place.name}.pid").write_text(str(os.getpid()))
        time.sleep(60)
    return Checked(place.path, dialect=str(os.getpid()), bytes=len(rules))
