"""Flux by its authors' module names, without Comfy's prefix: two dialects that only Flux.1 has, and one of Flux.2, too.

- `bfl`: bare names, peft's factors, as Black Forest Labs' control adapters (Canny, Depth) have them: the factors have a
  bias, `img_in` takes more inputs than the base's, and the norms' scales are replaced (`….query_norm.scale`);
- `bfl-peft`: the same names behind peft's `base_model.model.`, as fal's trainers of Kontext and Flux.2 adapters write them;
- `xlabs`: the factors of attention processors, `double_blocks.0.processor.qkv_lora1.down.weight`; 1 is the image's
  stream, 2 the text's.

No alpha anywhere: scale 1.  Sources: black-forest-labs/flux `src/flux/modules/lora.py`; XLabs-AI/x-flux
`src/flux/modules/layers.py`; huggingface/diffusers `loaders/lora_conversion_utils.py`
(`_convert_bfl_flux_control_lora_to_diffusers`, `_convert_fal_kontext_lora_to_diffusers`,
`_convert_xlabs_flux_lora_to_diffusers`), `loaders/lora_pipeline.py` (Flux2LoraLoaderMixin).
"""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.plugin import AlphaIn, Dialect, Format, Place, Reading, Source, Suffix

_FLUX = frozenset({"flux"})
_FLUXES = frozenset({"flux", "flux2_dev"})
_FACTORS = (
    Suffix(".lora_A.weight", "lora", "A"),
    Suffix(".lora_B.weight", "lora", "B"),
    Suffix(".lora_B.bias", "lora", "bias"),
)
_TAILS = (
    (".img_attn.qkv", ".processor.qkv_lora1"),
    (".txt_attn.qkv", ".processor.qkv_lora2"),
    (".img_attn.proj", ".processor.proj_lora1"),
    (".txt_attn.proj", ".processor.proj_lora2"),
    (".linear1_qkv", ".processor.qkv_lora"),
    (".linear2", ".processor.proj_lora"),
)

BFL = Dialect(
    name="bfl",
    format="flux",
    title="Black Forest Labs (control LoRA)",
    places=(Place("transformer", "", (*_FACTORS, Suffix(".scale", "saved", "weight")), names="original", only=_FLUX),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    widens=True,
    example="double_blocks.0.img_attn.qkv.lora_A.weight",
)
BFL_PEFT = Dialect(
    name="bfl-peft",
    format="flux",
    title="peft on Flux's own names (fal)",
    places=(Place("transformer", "base_model.model.", _FACTORS, names="original", only=_FLUXES),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    example="base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight",
)
XLABS = Dialect(
    name="xlabs",
    format="flux",
    title="XLabs",
    places=(
        Place(
            "transformer",
            "",
            (Suffix(".down.weight", "lora", "A"), Suffix(".up.weight", "lora", "B")),
            names="original",
            only=_FLUX,
            tails=_TAILS,
        ),
    ),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    example="double_blocks.0.processor.qkv_lora1.down.weight",
)


class Flux(Format):
    """Flux.1 and Flux.2 by their authors' names."""

    name = "flux"
    title = "Flux by its authors' names (BFL, fal, XLabs)"
    limits = (
        "Any base but Flux.1 (and Flux.2, in `bfl-peft`), any component but the transformer, and a scale that is not 1 "
        "(`--fold-alpha`).",
    )
    dialects = (BFL, BFL_PEFT, XLABS)
    file_name = "lora.safetensors"

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        """As for any format; but what has a PEFT config beside it is a PEFT folder, whatever its modules are called."""
        return super().recognise(source, [d for d in dialects if d is not BFL_PEFT or source.config is None])


FORMAT = Flux()
