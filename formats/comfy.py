"""Comfy's generic spelling: the model's own module names behind `diffusion_model.`, for every base that Comfy runs.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight
    diffusion_model.double_blocks.0.img_attn.qkv.alpha

ai-toolkit and others write it with peft's `lora_A`, OneTrainer and conversion scripts with Kohya's `lora_down`; the other
methods are spelled as LyCORIS does.  Text encoders stand behind `text_encoders.<name>.transformer.`.  No alpha means
scale 1.  Sources: Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`, `load_lora`),
`comfy/weight_adapter/lora.py`.
"""

from __future__ import annotations

from dataclasses import replace

from adapterops_formats.lycoris_names import DOWN_UP, LYCORIS, UNREAD

from adapterops.plugin import AlphaIn, Dialect, Format, Place, Suffix

_A_B = (Suffix(".lora_A.weight", "lora", "A"), Suffix(".lora_B.weight", "lora", "B"))
_SET = (Suffix(".set_weight", "saved", "weight"),)


def _dialect(name: str, title: str, pair: tuple[Suffix, ...], example: str) -> Dialect:
    suffixes = (*pair, *LYCORIS, *_SET)

    def encoder(component: str, called: str, *only: str) -> Place:
        return Place(component, f"text_encoders.{called}.transformer.", suffixes, only=frozenset(only))

    return Dialect(
        name=name,
        format="comfy",
        title=title,
        places=(
            Place("unet", "diffusion_model.", suffixes, ("transformer",), names="original"),
            encoder("text_encoder", "clip_l", "sd1", "sdxl", "sd3", "flux"),
            encoder("text_encoder", "clip_h", "sd2"),
            encoder("text_encoder_2", "clip_g", "sdxl", "sd3"),
            # T5 is the third encoder of SD3 and the second of Flux.1.
            replace(encoder("text_encoder_3", "t5xxl", "sd3", "flux"), instead=("text_encoder_2",)),
        ),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        unread=UNREAD,
        example=example,
    )


class Comfy(Format):
    """Comfy's generic file."""

    name = "comfy"
    title = "Comfy (the model's own names; ai-toolkit, OneTrainer)"
    limits = ("Modules of a base that is not built in: the names are its authors'.",)
    dialects = (
        _dialect("comfy", "Comfy", _A_B, "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
        _dialect(
            "comfy-down",
            "Comfy with lora_down",
            DOWN_UP,
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
        ),
    )
    file_name = "lora.safetensors"
    foreign = {
        r"\.reshape_weight$": "widens a module of the base (a control adapter converted for Comfy); this version does not "
        "convert it: name the file that it was made from",
        r"^diffusion_model\.blocks\.\d+\.(cross|self)_attn\.": (
            "belongs to an Anima or Wan adapter; no table of that base model is known: give --base CONFIG of a model "
            "whose modules have these names"
        ),
    }


FORMAT = Comfy()
