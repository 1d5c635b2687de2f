"""SDXL: every tensor is only renamed, whatever the target."""

from __future__ import annotations

import torch

from adapterops import architectures
from benchmarks.jobs import converting, copying, inspecting, through_diffusers
from benchmarks.lora import Lora, Module
from benchmarks.promises import Promise, renaming
from benchmarks.workload import Workload

_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def _modules() -> list[Module]:
    """The linear layers that sd-scripts adapts: of the UNet's attention blocks, and the encoders' layers."""
    out = []
    for component in architectures.load("sdxl").components.values():
        parts = ("attentions",) if component.name == "unet" else ("self_attn", "mlp")
        for spec in component.modules.values():
            if spec.kind == "linear" and not set(parts).isdisjoint(spec.name.split(".")):
                original = spec.original if component.name == "unet" else spec.name
                key = _PREFIXES[component.name] + original.replace(".", "_")
                out.append(Module(component.name, spec.name, original, key, spec.shape))
    return out


SDXL = Workload(
    name="sdxl",
    title="SDXL, every tensor only renamed",
    modules=_modules,
    lora=Lora(
        rank=32,
        alpha=16.0,
        dtype=torch.float16,
        metadata={"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"},
    ),
    jobs={
        "cp": copying(),
        "diffusers-proof": converting("diffusers"),
        "diffusers": converting("diffusers", "--no-verify"),
        "peft": converting("peft"),
        "kohya": converting("kohya-diffusers"),
        "peer": through_diffusers("sdxl"),
        "inspect": inspecting(),
    },
    promises=(
        *renaming("diffusers-proof", "through diffusers"),
        Promise("0.25 s of CPU or less", of=("inspect", "cpu"), most=0.25, digits=3, unit=" s"),
    ),
)
