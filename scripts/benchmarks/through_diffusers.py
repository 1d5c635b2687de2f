"""The peer's way from a Kohya file to a diffusers file: `python through_diffusers.py SOURCE FOLDER`.

What a user of diffusers would write, at its cheapest: no model and no pipeline is built, only the public loader
mixin's class methods are called.  `lora_state_dict` gives the alphas apart from the tensors, and a file made of the
tensors alone would lose them: they go into the header's `lora_adapter_metadata`, so that, as in our own output,
every tensor stays as it is.
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


def main(source: str, folder: str) -> None:
    """Convert; the file is `pytorch_lora_weights.safetensors` in `folder`."""
    mixin = loaders.StableDiffusionXLLoraLoaderMixin
    tensors, alphas = mixin.lora_state_dict(
        os.path.dirname(source),
        weight_name=os.path.basename(source),
        local_files_only=True,
        unet_config=SimpleNamespace(layers_per_block=2),
    )
    arguments: dict[str, Any] = {}
    for component in COMPONENTS:
        layers = {k.removeprefix(f"{component}."): v for k, v in tensors.items() if k.startswith(f"{component}.")}
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


if __name__ == "__main__":
    main(*sys.argv[1:])
