"""Installed formats are found as the standard library finds entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from adapterops import registry
from adapterops.errors import UnknownFormat


@pytest.fixture
def fresh() -> None:
    registry.formats.cache_clear()


def test_the_same_plugins_as_the_standard_library() -> None:
    assert registry._declared() == {point.name: point.value for point in entry_points(group=registry.GROUP)}


@pytest.mark.usefixtures("fresh")
def test_a_third_partys_plugin_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_format.py").write_text(
        "from adapterops.plugin import Format\n\n\nclass Theirs(Format):\n    name = 'theirs'\n    title = 'Theirs'\n"
        "    dialects = ()\n\n\nFORMAT = Theirs()\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[console_scripts]\nx = y:z\n\n[{registry.GROUP}]\n# theirs\ntheirs = their_format:FORMAT\n\n[other]\na = b:c\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert registry._declared() == {point.name: point.value for point in entry_points(group=registry.GROUP)}
    assert {"theirs", "kohya", "diffusers", "peft"} <= set(registry.formats())
    registry.formats.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_plugin_that_offers_no_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nbroken = json:dumps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnknownFormat, match="broken = json:dumps"):
        registry.formats()
    registry.formats.cache_clear()
