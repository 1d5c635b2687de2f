"""Adapters of LTX-2.3 as their trainers write them, and as their readers take them."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import same, sound
from safetensors.torch import load_file
from trainers import Modules, comfy, write
from video_bases import LTX_2_3, LTX_2_AND_3

import adapterops as ao
from adapterops.adapter import Certainty


def test_what_it_shares_with_ltx_2_is_told(tmp_path: Path) -> None:
    """Lightricks' own trainer takes attention alone: names and sizes are those of both, and the older one is taken."""
    path = write(tmp_path / "a.safetensors", comfy(LTX_2_AND_3))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("ltx_2", Certainty.ASSUMED)
    assert any("fit ltx_2 and ltx_2_3 alike" in note for note in found.notes)
    for base in ("ltx_2", "ltx_2_3"):
        ao.convert(path, "diffusers", tmp_path / f"{base}.safetensors", arch=base)
    same(load_file(tmp_path / "ltx_2.safetensors"), load_file(tmp_path / "ltx_2_3.safetensors"))


@pytest.mark.parametrize(
    ("said", "base"),
    [("Lightricks/LTX-2", "ltx_2"), ("Lightricks/LTX-2.3", "ltx_2_3"), ("ltx2.3", "ltx_2_3"), ("ltx2.5", "ltx_2_3")],
)
def test_what_a_header_says_decides(said: str, base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(LTX_2_AND_3), ss_base_model_version=said)
    found = ao.inspect(path).architecture
    assert (found.value, found.certainty) == (base, Certainty.READ)


@pytest.mark.parametrize("modules", [LTX_2_3.authors, LTX_2_AND_3], ids=["all", "both have"])
def test_ai_toolkits_header_is_not_held_against_the_file(modules: Modules, tmp_path: Path) -> None:
    """It calls every LTX-2 `ltx2`."""
    path = write(tmp_path / "a.safetensors", comfy(modules), ss_base_model_version="ltx2")
    assert ao.inspect(path).architecture.value == ("ltx_2_3" if modules is LTX_2_3.authors else "ltx_2")
    sound(path)
