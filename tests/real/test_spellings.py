"""Every trainer's spelling of every base model is read as what it is, judged sound, and comes back from everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import comes_back, sound
from spellings import FILES, File
from trainers import ai_toolkit, write

import adapterops as ao
from adapterops.adapter import Certainty


@pytest.mark.parametrize("header", [True, False], ids=["header", "bare"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.base.name}-{file.dialect}")
def test_it_is_read_as_what_it_is(file: File, header: bool, tmp_path: Path) -> None:
    """Whether a header stands there that says nothing of the base, or none."""
    path = (ai_toolkit if header else write)(tmp_path / "a.safetensors", file.tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (file.dialect, file.base.name)
    assert found.architecture.others == file.base.others
    assert found.architecture.certainty is (Certainty.ASSUMED if file.base.others else Certainty.DERIVED)
    if file.dialect == "peft":  # which has no scale without its config
        return
    assert ["alike" in note for note in found.notes] == [True] * bool(file.base.others)
    sound(path)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.ways], ids=lambda file: f"{file.base.name}-{file.dialect}"
)
def test_it_comes_back(file: File, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", file.tensors)
    # DiffSynth-Studio's files have no place for a scale.
    scaled = any(key.endswith(".alpha") for key in file.tensors)
    comes_back(path, file.dialect, tmp_path, tuple(way for way in file.ways if not (scaled and way == "diffsynth")))
