"""Flux.1: its authors' names keep the fused projections whole, diffusers' and peft's have them split."""

from __future__ import annotations

import torch

from adapterops import architectures
from benchmarks.jobs import converting, copying, through_diffusers
from benchmarks.lora import Lora, Module
from benchmarks.promises import computing, renaming
from benchmarks.workload import Workload

_DOUBLE = ("attn.proj", "attn.qkv", "mlp.0", "mlp.2", "mod.lin")
_SINGLE = ("linear1", "linear2", "modulation.lin")
_RENAMED, _SPLIT, _FOLDED = "a rename", "projections split", "alpha folded"


def _modules() -> list[Module]:
    """What sd-scripts adapts by default: the linear layers of all blocks (`networks/lora_flux.py`, LoRANetwork)."""
    component = architectures.load("flux").components["transformer"]
    by_original = {spec.original: spec for spec in (*component.modules.values(), *component.fused.values())}
    names = [f"double_blocks.{i}.{stream}_{end}" for i in range(19) for stream in ("img", "txt") for end in _DOUBLE]
    names += [f"single_blocks.{i}.{end}" for i in range(38) for end in _SINGLE]
    out = []
    for name in names:
        spec = by_original[name]
        parts = tuple((part, stop - start) for part, start, stop in spec.joins)
        out.append(Module("transformer", spec.name, name, "lora_unet_" + name.replace(".", "_"), spec.shape, parts))
    return out


FLUX = Workload(
    name="flux",
    title="Flux.1, renamed, split and folded",
    modules=_modules,
    lora=Lora(
        rank=16,
        # Half the rank, so that folding has something to multiply by.
        alpha=8.0,
        dtype=torch.bfloat16,
        metadata={"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"},
    ),
    jobs={
        "cp": copying(),
        "comfy-proof": converting("comfy", what=_RENAMED),
        "comfy": converting("comfy", "--no-verify", what=_RENAMED),
        "diffusers": converting("diffusers", what=_SPLIT),
        "peft": converting("peft", what=_SPLIT),
        "folded": converting("comfy", "--fold-alpha", what=_FOLDED),
        "peer": through_diffusers("flux", f"{_SPLIT}, {_FOLDED}", folded=True),
    },
    promises=(
        *renaming("comfy-proof", "through diffusers, which splits and folds"),
        computing("diffusers"),
        computing("peft"),
        computing("folded"),
    ),
)
