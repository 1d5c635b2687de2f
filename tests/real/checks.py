"""What must hold of a trainer's file: it is sound, comes back from every other dialect, and is what its readers make of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from trainers import AB, Tensors

import adapterops as ao

EVERYWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")
"""The ways that a plain LoRA of most base models can go."""


def sound(path: Path) -> None:
    """`validate` has nothing to say of the file."""
    report = ao.validate(path, ignore=["D601"])
    assert [str(f) for f in report] == []


def same(got: Tensors, wanted: Tensors) -> None:
    """The same tensors under the same keys."""
    assert set(got) == set(wanted)
    assert [key for key in wanted if not torch.equal(got[key], wanted[key])] == []


def comes_back(path: Path, dialect: str, tmp_path: Path, elsewhere: tuple[str, ...] = EVERYWHERE) -> None:
    """The file is the same after a way through every other dialect."""
    before = load_file(path)
    for name in elsewhere:
        there = tmp_path / name.replace("peft", "folder")
        done = ao.convert(path, name, there if name == "peft" else there.with_suffix(".safetensors"))
        assert done.proof is not None
        ao.convert(done.path, dialect, tmp_path / "back.safetensors", overwrite=True)
        same(load_file(tmp_path / "back.safetensors"), before)


def deltas(tensors: Tensors, inputs: int = 0) -> dict[str, torch.Tensor]:
    """What each module is changed by, in a file whose scales are 1: all of it, or what it makes of some random inputs,
    for which no large matrix is built."""
    found = {}
    for key, down in tensors.items():
        stem = key.removesuffix(AB[0])
        if stem != key:
            numbers = torch.Generator().manual_seed(down.shape[1])
            seen = torch.randn(down.shape[1], inputs, generator=numbers) if inputs else torch.eye(down.shape[1])
            found[stem] = tensors[stem + AB[1]].float() @ (down.float() @ seen)
    return found


def ours_and_theirs(mixin: str, path: Path, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What our conversion, and diffusers' own, make of a file: each module's change of the same few inputs."""
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = deltas(getattr(loaders, mixin).lora_state_dict(load_file(path)), inputs=6)
    ao.convert(path, "diffusers", tmp_path / "ours.safetensors", fold_alpha=True, dtype="float32")
    return deltas(load_file(tmp_path / "ours.safetensors"), inputs=6), theirs


def agrees(mixin: str, path: Path, tmp_path: Path, rtol: float = 0.05, atol: float = 0.1) -> None:
    """diffusers' own conversion, which rounds to the file's type, makes the same names and updates of the file as ours."""
    ours, theirs = ours_and_theirs(mixin, path, tmp_path)
    assert set(ours) == set(theirs)
    assert [n for n, delta in ours.items() if not torch.allclose(delta, theirs[n], rtol=rtol, atol=atol)] == []


def added(model: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """What a reader's own loader adds to a model's parameters: diffusers' of a file, peft's of a folder."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if adapter.is_dir():
        peft: Any = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    else:
        model.load_lora_adapter(load_file(adapter), prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    return {name: value - before[name] for name, value in model.state_dict().items()}
