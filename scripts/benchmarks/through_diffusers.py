"""The peer's way from a Kohya file to a diffusers file: `python through_diffusers.py sdxl|flux SOURCE FOLDER`.

What a user of diffusers would write, at its cheapest: no model and no pipeline is built, only the public loader
mixins' class methods are called.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

# diffusers exports its names lazily and its helpers are without types: to mypy they are Any.
import diffusers.loaders
import diffusers.utils

loaders: Any = diffusers.loaders
utils: Any = diffusers.utils

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def sdxl(source: str, folder: str) -> None:
    """`lora_state_dict` gives the alphas apart from the tensors, and a file made of the tensors alone would lose them.

    They go into the header's `lora_adapter_metadata`, so that, as in our own output, every tensor stays as it is.
    """
    mixin = loaders.StableDiffusionXLLoraLoaderMixin
    tensors, alphas = mixin.lora_state_dict(**_local(source), unet_config=SimpleNamespace(layers_per_block=2))
    arguments: dict[str, Any] = {}
    for component in COMPONENTS:
        layers = _of(component, tensors)
        if not layers:
            continue
        if component == "unet":
            layers = utils.convert_unet_state_dict_to_peft(layers)
        else:
            layers = utils.convert_state_dict_to_peft(utils.convert_state_dict_to_diffusers(layers))
        (alpha,) = {v for k, v in alphas.items() if k.startswith(f"{component}.")}
        suffix = ".lora_A.weight"
        down = {k.removesuffix(suffix): v for k, v in layers.items() if k.endswith(suffix)}
        (rank,) = {v.shape[0] for v in down.values()}
        arguments[f"{component}_lora_layers"] = layers
        arguments[f"{component}_lora_adapter_metadata"] = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(down),
        }
    mixin.save_lora_weights(folder, **arguments)


def flux(source: str, folder: str) -> None:
    """`lora_state_dict` splits the fused projections and multiplies alpha / rank into the factors: there is no scale
    left to save.  It leaves the parts of a projection one tensor for their down factors, which safetensors does not
    save under several names: all but the first are copied.
    """
    mixin = loaders.FluxLoraLoaderMixin
    tensors, alphas = mixin.lora_state_dict(**_local(source), return_alphas=True)
    if alphas:
        raise SystemExit(f"diffusers left alphas apart, so that they would be lost: {sorted(alphas)[:3]}")
    layers, seen = {}, set()
    for key, tensor in _of("transformer", tensors).items():
        layers[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    mixin.save_lora_weights(folder, transformer_lora_layers=layers)


def _local(source: str) -> dict[str, Any]:
    """The arguments that name a file on disk."""
    return {
        "pretrained_model_name_or_path_or_dict": os.path.dirname(source),
        "weight_name": os.path.basename(source),
        "local_files_only": True,
    }


def _of(component: str, tensors: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


if __name__ == "__main__":
    {"sdxl": sdxl, "flux": flux}[sys.argv[1]](*sys.argv[2:])
