"""`docs/formats.md` is what the formats' tables say today."""

from __future__ import annotations

import sys
from pathlib import Path

from adapterops import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import formats as script


def test_the_page_is_todays() -> None:
    again = "run .venv/bin/python scripts/formats.py"
    assert Path(script.TARGET).read_text(encoding="utf-8") == script.page(), again


def test_every_format_says_what_it_is_and_where_that_stands() -> None:
    for form in registry.formats().values():
        text = "\n".join(script._about(form))
        assert "Source" in text, form.name
        assert all(dialect.example for dialect in form.dialects), form.name
