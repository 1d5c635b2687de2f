"""Comfy's generic spelling: the model's own module names behind `diffusion_model.`, for every base that Comfy runs.

    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight
    diffusion_model.double_blocks.0.img_attn.qkv.alpha

ai-toolkit and others write it with peft's `lora_A`, OneTrainer and conversion scripts with Kohya's `lora_down`; the other
methods are spelled as LyCORIS does.  Text encoders stand behind `text_encoders.<name>.transformer.`.  No alpha means
scale 1.  SimpleTuner, asked for Comfy's format, puts the prefix before diffusers' names, which is the third dialect.
Sources: Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`, `load_lora`),
`comfy/weight_adapter/lora.py`; bghira/SimpleTuner `simpletuner/helpers/training/lora_format.py`
(`convert_diffusers_to_comfyui`).

OneTrainer's ORIGINAL output is the same without the prefix, of the denoiser alone and always with alphas.  Embeddings that
it bundles stand beside the rest.  Source: Nerogar/OneTrainer `modules/modelSaver/mixin/LoRASaverMixin.py`
(`_save_original`, `_save_comfy`), `modules/util/convert_lora_util.py` (`convert_lora_suffix_ab`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.hunyuan_names import among, behind_transformer, comfys_own, unread_by_comfy
from adapterops_formats.lycoris_names import (
    DOWN_UP,
    EMBEDDINGS,
    LYCORIS,
    ONETRAINER_OFT,
    RENAMED,
    UNREAD,
    embeddings_told,
    insist_on_modules,
    of_adapters,
    unlike_comfy,
    unnamed,
)
from adapterops_formats.modulation import MODULATION, choice, of_blocks, of_parameters, recorded

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Dialect,
    Format,
    Output,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    Target,
    errors,
)

_A_B = (Suffix(".lora_A{adapter}.weight", "lora", "A"), Suffix(".lora_B{adapter}.weight", "lora", "B"))
_SET = (Suffix(".set_weight", "saved", "weight"),)
_EMBEDDINGS_APART = (
    "ComfyUI loads none from a LoRA's file; it does from a copy of it, named after the token, in models/embeddings"
)
"""Source: Comfy-Org/ComfyUI `comfy/lora.py` (`load_lora`), `comfy/sd1_clip.py` (`load_embed`, `bundled_embed`)."""


_ACE = frozenset({"ace_step_1_5"})


def _dialect(name: str, title: str, pair: tuple[Suffix, ...], example: str, *canonical: str) -> Dialect:
    """A dialect whose denoiser's modules are called as the authors do, but of the `canonical` bases as diffusers does."""
    suffixes = (*pair, *LYCORIS, *_SET, MODULATION)
    called = dict.fromkeys(canonical, "canonical")

    def encoder(component: str, name: str, *only: str, stem: str = "") -> Place:
        return Place(component, f"text_encoders.{name}.transformer.{stem}", suffixes, only=frozenset(only))

    return Dialect(
        name=name,
        format="comfy",
        title=title,
        places=(
            # Anima's conditioner is a part of its authors' transformer.
            Place("text_conditioner", "diffusion_model.llm_adapter.", suffixes),
            # ACE-Step's transformer is a part of its authors' model.
            Place(
                "transformer",
                "diffusion_model.decoder.",
                suffixes,
                names="original",
                names_in=called,
                only=_ACE,
                usual=_ACE,
            ),
            Place("unet", "diffusion_model.", suffixes, ("transformer", "prior"), names="original", names_in=called),
            encoder("text_encoder", "clip_l", "sd1", "sdxl", "sd3", "flux"),
            encoder("text_encoder", "clip_h", "sd2"),
            encoder("text_encoder", "qwen3_06b", "anima", stem="model."),
            encoder("text_encoder", "gemma2_2b", "lumina2", stem="model."),
            encoder("text_encoder_2", "clip_g", "sdxl", "sd3"),
            # T5 is the third encoder of SD3, the second of Flux.1 and the only one of Chroma, which is of Flux.1's family.
            replace(
                encoder("text_encoder_3", "t5xxl", "sd3", "flux"),
                instead=("text_encoder_2", "text_encoder"),
                usual=frozenset({"chroma"}),
            ),
            encoder("text_encoder", "qwen25_7b", "qwen_image"),
            # LlamaModel as Comfy wraps it, and as OneTrainer saves it.
            encoder("text_encoder", "llama", "hunyuan_video", stem="model."),
            encoder("text_encoder", "llama", "hunyuan_video"),
            EMBEDDINGS,
        ),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        unread=UNREAD,
        example=example,
    )


_ALPHA = ".alpha"
ORIGINAL = Dialect(
    name="onetrainer-original",
    format="comfy",
    title="the authors' bare names with alpha (OneTrainer's ORIGINAL)",
    places=(
        # Anima's own checkpoint has its transformer's names behind this, and so has the file.
        Place("transformer", "net.", (*_A_B, *LYCORIS), names="original", only=frozenset({"anima"})),
        Place("unet", "", (*_A_B, *LYCORIS), ("transformer",), names="original"),
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    shown_by=(_ALPHA, ONETRAINER_OFT[0].text),
    example="double_blocks.0.img_attn.qkv.alpha",
)


COMFY = _dialect("comfy", "Comfy", _A_B, "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight")
COMFY_DOWN = _dialect(
    "comfy-down",
    "Comfy with lora_down",
    DOWN_UP,
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
)
ORIGINAL_DOWN = Dialect(
    name="original-down",
    format="comfy",
    title="the authors' bare names, Kohya's factors (LightX2V)",
    places=(Place("transformer", "", (*DOWN_UP, *LYCORIS), names="original", only=frozenset(RENAMED)),),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    shown_by=(DOWN_UP[0].text,),
    example="blocks.0.self_attn.q.lora_down.weight",
)
BEHIND_TRANSFORMER = behind_transformer((*_A_B, *LYCORIS))
WAN_BEHIND_TRANSFORMER = Dialect(
    name="wan-transformer",
    format="comfy",
    title="Wan's authors' names behind transformer.",
    places=(Place("transformer", "transformer.", (*_A_B, *LYCORIS), names="original", only=frozenset({"wan_14b"})),),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    written=False,
    example="transformer.blocks.0.self_attn.q.lora_A.weight",
)
"""Nobody's own spelling, but ComfyUI-WanVideoWrapper reads it."""
HUNYUAN = (comfys_own(COMFY), comfys_own(COMFY_DOWN))


class Comfy(Format):
    """Comfy's generic file."""

    name = "comfy"
    title = "Comfy (the model's own names; ai-toolkit, OneTrainer)"
    limits = (
        "Modules of a base that is not built in, but under names that are Comfy's already: the names are its authors'.",
    )
    dialects = (
        COMFY,
        COMFY_DOWN,
        _dialect(
            "comfy-diffusers",
            "Comfy's prefix before diffusers' names (SimpleTuner)",
            _A_B,
            "diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight",
            *RENAMED,
        ),
        ORIGINAL,
        ORIGINAL_DOWN,
        WAN_BEHIND_TRANSFORMER,
        BEHIND_TRANSFORMER,
        *HUNYUAN,
    )
    file_name = "lora.safetensors"
    # As a checkpoint calls the model; and the wrapper of peft, left in.
    variants: ClassVar = {"diffusion_model.": ("model.diffusion_model.", "diffusion_model.base_model.model.")}
    foreign = {
        r"\.reshape_weight$": "widens a module of the base (a control adapter converted for Comfy); this version does not "
        "convert it: name the file that it was made from",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        """As for any format; a bundle alone is Kohya's."""
        if not set(HUNYUAN).issuperset(dialects):
            dialects = among(source.tensors, dialects, BEHIND_TRANSFORMER, HUNYUAN)
        return list(map(of_parameters, of_adapters(super().recognise(source, dialects))))

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        return recorded(super().read(source, reading, request), reading)

    def spelling(self, adapter: Adapter, target: Target) -> dict[str, Any]:
        names = (target.dialect.name, *(dialect.name for dialect in self.dialects))
        return {**super().spelling(adapter, target), **choice(adapter, *names)}

    def write(self, adapter: Adapter, target: Target) -> Output:
        insist_on_modules(adapter, target)
        out = of_blocks(super().write(adapter, target), self.spelling(adapter, target))
        lacks = ""
        if target.dialect is ORIGINAL and all(update.alpha is None for update in adapter):
            lacks = "whose methods have no alpha"
        elif target.dialect is ORIGINAL_DOWN and all(update.method != "lora" for update in adapter):
            lacks = "without a LoRA"
        if lacks and not target.faithful:
            raise errors.CannotRepresent(
                f"{next(iter(adapter)).name}: in {target.dialect.title} a file {lacks} is nobody's, and no reader would know it; "
                "--to comfy holds it"
            )
        bare = target.dialect in (ORIGINAL, ORIGINAL_DOWN)
        told = () if bare else embeddings_told(adapter, _EMBEDDINGS_APART)
        written = (key for file in out.files for key in file.tensors)
        told += unread_by_comfy(written) if target.dialect in (COMFY, COMFY_DOWN) else ()
        told += unlike_comfy(adapter)
        return out._replace(notes=(*out.notes, *told, *unnamed(target)))


FORMAT = Comfy()
