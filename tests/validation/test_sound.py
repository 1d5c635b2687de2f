"""Sound adapters: nothing is found in them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from sound import codes, diffusers_file, kohya_file, peft_folder

import adapterops as ao
from adapterops.storage.tensor import FileSource


@pytest.mark.parametrize("make", [peft_folder, kohya_file, diffusers_file])
def test_nothing_is_found_in_a_sound_adapter(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert codes(make(tmp_path)) == []


def test_what_was_looked_at_is_let_go(tmp_path: Path) -> None:
    """A tree may hold more adapters than a process may have files open."""
    gc.collect()
    before = sum(isinstance(thing, FileSource) for thing in gc.get_objects())
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        ao.validate(kohya_file(folder))
    gc.collect()
    assert sum(isinstance(thing, FileSource) for thing in gc.get_objects()) <= before
