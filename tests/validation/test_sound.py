"""Sound adapters: nothing is found in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sound import codes, diffusers_file, kohya_file, peft_folder


@pytest.mark.parametrize("make", [peft_folder, kohya_file, diffusers_file])
def test_nothing_is_found_in_a_sound_adapter(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert codes(make(tmp_path)) == []
