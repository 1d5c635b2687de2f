"""Comfy's generic spelling: the model's own module names behind `diffusion_model.`, for every base that Comfy runs.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight
    diffusion_model.double_blocks.0.img_attn.qkv.alpha

ai-toolkit and others write it with peft's `lora_A`, OneTrainer and conversion scripts with Kohya's `lora_down`; the other
methods are spelled as LyCORIS does.  Text encoders stand behind `text_encoders.<name>.transformer.`.  No alpha means
scale 1.  SimpleTuner, asked for Comfy's format, puts the prefix before diffusers' names, which is the third dialect.
Sources: Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`, `load_lora`),
`comfy/weight_adapter/lora.py`; bghira/SimpleTuner `simpletuner/helpers/training/lora_format.py`
(`convert_diffusers_to_comfyui`).
"""

from __future__ import annotations

from dataclasses import replace

from adapterops_formats.lycoris_names import DOWN_UP, LYCORIS, UNREAD, unnamed

from adapterops.plugin import Adapter, AlphaIn, Dialect, Format, Output, Place, Suffix, Target

_A_B = (Suffix(".lora_A.weight", "lora", "A"), Suffix(".lora_B.weight", "lora", "B"))
_SET = (Suffix(".set_weight", "saved", "weight"),)
_NO_TABLE = (
    "no table of that base model is built in; where diffusers has the same names, --base CONFIG of its model is enough"
)


def _dialect(name: str, title: str, pair: tuple[Suffix, ...], example: str, *canonical: str) -> Dialect:
    """A dialect whose denoiser's modules are called as the authors do, but of the `canonical` bases as diffusers does."""
    suffixes = (*pair, *LYCORIS, *_SET)
    called = dict.fromkeys(canonical, "canonical")

    def encoder(component: str, name: str, *only: str) -> Place:
        return Place(component, f"text_encoders.{name}.transformer.", suffixes, only=frozenset(only))

    return Dialect(
        name=name,
        format="comfy",
        title=title,
        places=(
            Place("unet", "diffusion_model.", suffixes, ("transformer",), names="original", names_in=called),
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
        _dialect(
            "comfy-diffusers",
            "Comfy's prefix before diffusers' names (SimpleTuner)",
            _A_B,
            "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
            "flux",
            "sd3",
        ),
    )
    file_name = "lora.safetensors"
    foreign = {
        r"\.reshape_weight$": "widens a module of the base (a control adapter converted for Comfy); this version does not "
        "convert it: name the file that it was made from",
        **{
            rf"^diffusion_model\.{names}": f"belongs to an adapter of {base} by its authors' names; {_NO_TABLE}"
            for base, names in {
                "Wan or Anima": r"blocks\.\d+\.(cross|self)_attn\.",
                "HunyuanVideo": r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\.",
                "Z-Image or Lumina 2": r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|adaLN)",
                "LTX-Video": r"transformer_blocks\.\d+\.attn[12]\.",
                "HiDream": r"(double|single)_stream_blocks\.",
                "Chroma": r"distilled_guidance_layer\.",
            }.items()
        },
    }

    def write(self, adapter: Adapter, target: Target) -> Output:
        out = super().write(adapter, target)
        return out._replace(notes=(*out.notes, *unnamed(target)))


FORMAT = Comfy()
