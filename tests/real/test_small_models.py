"""Readers' own loaders take what we write: every update reaches its module of a small model, and nothing else changes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import added
from small_models import SMALL, Place
from trainers import AB, DOWN_UP, Modules, Tensors, comfy, musubi, write

import adapterops as ao

CASES = [(name, reader) for name in SMALL for reader in ("diffusers", "peft")]
CASES.remove(("PixArtTransformer2DModel", "diffusers"))  # which has no loader of its adapters


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize(("name", "reader"), CASES)
def test_the_class_takes_what_we_write(
    name: str, reader: str, writer: Callable[[Modules], Tensors], tmp_path: Path
) -> None:
    """From the authors' names, which are known for a model that is built from its config, too."""
    config = {"_class_name": name, **SMALL[name].config}
    base = tmp_path / "config.json"
    base.write_text(json.dumps(config))
    torch.manual_seed(0)
    model: Any = getattr(importlib.import_module("diffusers"), name).from_config(config)
    linear = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    places = SMALL[name].places or {n: Place((w.shape[0], w.shape[1]), (n,)) for n, w in linear.items()}
    tensors = {key: t.float() for key, t in writer({n: place.shape for n, place in places.items()}).items()}
    path = write(tmp_path / "a.safetensors", tensors)
    there = tmp_path / ("folder" if reader == "peft" else "b.safetensors")
    ao.convert(path, reader, there, base=base, fold_alpha=True)
    change = added(model, there)
    for n, place in places.items():
        made = torch.cat([change.pop(f"{module}.weight") for module in place.own])
        made = torch.cat(made.chunk(2)[::-1]) if place.turned else made
        assert torch.allclose(made, delta(tensors, n, writer is musubi), atol=1e-5)
    assert [key for key, value in change.items() if value.any()] == []


def delta(tensors: Tensors, name: str, flat: bool) -> torch.Tensor:
    """What a module is changed by; Kohya's alpha is a quarter of the rank."""
    stem = f"lora_unet_{name.replace('.', '_')}" if flat else f"diffusion_model.{name}"
    first, second = (tensors[stem + end] for end in (DOWN_UP if flat else AB))
    return second @ first * (0.25 if flat else 1.0)
