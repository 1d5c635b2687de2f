"""`docs/methods.md` is what the table of methods says today."""

from __future__ import annotations

import sys
from pathlib import Path

from adapterops import registry
from adapterops.cli.methods_text import low_rank
from adapterops.methods import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import methods as script


def test_the_page_is_todays() -> None:
    again = "run .venv/bin/python scripts/methods.py"
    assert Path(script.TARGET).read_text(encoding="utf-8") == script.page(), again


def test_every_method_says_what_it_does_and_what_its_lora_is() -> None:
    for row in (row for form in registry.formats().values() for row in form.types()):
        for name in row.methods:
            if METHODS[name].linear:
                assert METHODS[name].formula, name
                assert low_rank(name), name
        assert row.recognised or row.name == "BONE", row.name
