"""The base model of merged adapters of which some, or all, fit several alike: each thing is told once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterops as ao
from adapterops.adapter import Certainty

BOTH: Mapping[str, tuple[int, int]] = {
    "double_blocks.0.img_attn.proj": (3072, 3072),
    "double_blocks.0.img_mlp.2": (3072, 12288),
    "txt_in": (3072, 4096),
}
"""Modules of Flux.1 and of Chroma; HunyuanVideo refines its text otherwise."""
ANY: Mapping[str, tuple[int, int]] = {"double_blocks.0.img_attn.proj": (3072, 3072)}
"""Also of the smallest Flux.2."""
CHROMA: Mapping[str, tuple[int, int]] = {**ANY, "distilled_guidance_layer.out_proj": (3072, 5120)}


def file(folder: Path, name: str, modules: Mapping[str, tuple[int, int]], value: float = 1.0) -> Path:
    """A LoRA of rank 1."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in modules.items():
        stem = f"diffusion_model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.full((1, columns), value)
        tensors[f"{stem}.lora_B.weight"] = torch.full((rows, 1), value)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path


def merged(folder: Path, *sources: Path, **options: object) -> ao.MergeResult:
    return ao.merge(sources, folder / "merged.safetensors", "cat", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("turned", [False, True])
def test_where_one_source_decides_nothing_is_assumed(turned: bool, tmp_path: Path) -> None:
    sources = [file(tmp_path, "a", BOTH), file(tmp_path, "b", CHROMA)]
    result = merged(tmp_path, *reversed(sources) if turned else sources)
    assert result.written.architecture.value == "chroma"
    assert not any("alike" in note for note in (*result.notes, *result.written.notes))


def test_where_the_user_decides_nothing_is_assumed(tmp_path: Path) -> None:
    result = merged(tmp_path, file(tmp_path, "a", BOTH), file(tmp_path, "b", ANY), reading={"arch": "chroma"})
    assert result.written.architecture.value == "chroma"
    assert not any("alike" in note for note in (*result.notes, *result.written.notes))


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_assumed_of_all_is_told_once(turned: bool, tmp_path: Path) -> None:
    """One of them rules a base out for both."""
    sources = [file(tmp_path, "a", BOTH), file(tmp_path, "b", ANY), file(tmp_path, "c", BOTH, 2.0)]
    assert set(ao.inspect(sources[1]).architecture.others) > set(ao.inspect(sources[0]).architecture.others)
    result = merged(tmp_path, *reversed(sources) if turned else sources)
    fact = result.written.architecture
    assert (fact.value, fact.certainty, fact.others) == ("flux", Certainty.ASSUMED, ("chroma",))
    told = [note for note in (*result.notes, *result.written.notes) if "alike" in note]
    assert told == ["architecture: its modules fit flux and chroma alike; flux is taken (--arch decides)"]


def test_the_one_base_that_all_may_be_of_is_no_guess(tmp_path: Path) -> None:
    """Chroma has no embedder of the time, and the Flux.2 that has the same one has other MLPs."""
    sources = [file(tmp_path, "a", BOTH), file(tmp_path, "b", {"time_in.in_layer": (3072, 256)})]
    others = [set(ao.inspect(source).architecture.others) for source in sources]
    assert all(others)
    assert others[0].isdisjoint(others[1])
    result = merged(tmp_path, *sources, allow_disjoint=True)
    assert (result.written.architecture.value, result.written.architecture.certainty) == ("flux", Certainty.DERIVED)
    assert not any("alike" in note for note in (*result.notes, *result.written.notes))
