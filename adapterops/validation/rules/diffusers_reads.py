"""Which spellings of each base's LoRAs diffusers reads, and what of them it does not.  Every row holds for diffusers 0.42.1.

The tables are data for the rules in `loader_diffusers` and `diffusers_facts`, and tell the load test which class loads what.  A
base that is built in has a row in `LORA` and in `LOADERS`, its own or its family's: a test fails for one without, and tries each
row, and each spelling without a row, on diffusers itself.  Patterns are of canonical modules; the parts of a fused module count
as that module's.  Sources: huggingface/diffusers `loaders/lora_pipeline.py` (`lora_state_dict`, `_lora_loadable_modules`),
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from adapterops import architectures
from adapterops.validation.subject import Subject


class Alphas(StrEnum):
    """What becomes of alpha tensors."""

    TAKEN = "taken"
    REFUSED = "refused"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Reads:
    """What diffusers makes of one base's files in a spelling that it reads.

    `loses`, `turns` and `refuses` are patterns of modules: left out, put into the wrong rows, refused and the file with
    them.  A file without a key that `sign` fits is not known for what it is.  Where `alphas_of` is given, `alphas` holds of
    those modules alone.  Every module of the base that `whole` fits must be there, or (`counted`) every one in as many of the
    first blocks as the file has, `whole` catching a block's number; what `optional` fits, all or none.  `alone`: no other
    component than the transformer is looked for.
    """

    alphas: Alphas = Alphas.TAKEN
    alphas_of: str = ""
    sign: str = ""
    loses: str = ""
    turns: str = ""
    refuses: str = ""
    whole: str = ""
    counted: bool = False
    optional: str = ""
    alone: bool = False


class Loader(NamedTuple):
    """A class of diffusers that loads LoRAs into a pipeline, by the first part of its name (`…LoraLoaderMixin`); empty where the
    base's pipelines have none."""

    mixin: str
    components: tuple[str, ...]
    """Those of the pipeline's that it gives adapters."""


READ = Reads()
_BARE = Reads(Alphas.REFUSED)
_SIGNED = Reads(sign=r"\.alpha$")
_OWN = {"diffusers": READ, "diffusers-bundled": READ}
"""What diffusers itself writes; bundled embeddings have a rule of their own."""
_OWN_WITHOUT_ALPHA = {**_OWN, "diffusers-alpha": _BARE}
_UNET = {
    **_OWN_WITHOUT_ALPHA,
    **dict.fromkeys(("kohya", "kohya-diffusers", "diffusers-lora", "diffusers-mixed", "diffusers-attn"), READ),
}

_FLUX_ENDS = r"x_embedder|context_embedder|time_text_embed|norm_out|proj_out$"
_FLUX_KOHYA = Reads(loses=rf"^({_FLUX_ENDS})")
_FLUX = {
    **_OWN,
    "diffusers-alpha": READ,
    "diffusers-lycoris": Reads(Alphas.IGNORED, alone=True),
    "kohya": _FLUX_KOHYA,
    "comfy-down": _FLUX_KOHYA,
    "onetrainer": READ,  # what it takes is a rule of its own
    "xlabs": READ,
}
_FLUX_BLOCKS = r"^(?:single_)?transformer_blocks\.(\d+)\."
_GUIDANCE = r"^distilled_guidance_layer"
_FLUX2_TURNED = r"^norm_out"
_FLUX2_KOHYA = r"stream_modulation|^norm_out|guidance_embedder"
_HUNYUAN = Reads(Alphas.REFUSED, sign=r"img_attn_qkv", turns=r"^norm_out|refiner_blocks\.\d+\.attn\.to_(qkv|[qkv]$)")
_LTX = Reads(Alphas.REFUSED, loses=r"^(proj_in$|time_embed)")
_WAN_BLOCKS = r"^blocks\.(\d+)\.(?:attn[12]\.|ffn\.)"
_WAN_OTHERS = r"^(patch_embedding|vace_|pose_patch_embedding|motion_encoder|face_)"
"""The modules that the converter of Wan's files does not know, those of its variants among them."""
_WAN = Reads(Alphas.REFUSED, alphas_of=r"^(?!blocks\.)", sign=r"^diffusion_model\.blocks\.", refuses=_WAN_OTHERS)
_QWEN = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "kohya-peft", "kohya-diffusers-peft")
_QWEN_2_1_AROUND = r"^(modulation|txt_in)\."
_QWEN_2_1 = Reads(loses=r"img_mlp\.(gate_up|gate_layer|proj)$")
_MINIMAX = ("comfy", "comfy-down", "kohya", "kohya-peft", "onetrainer-original", "original-down")
_Z_ENDS = r"^all_(x_embedder|final_layer)"
_Z_QKV = rf"{_Z_ENDS}|attention\.to_(qkv|[qkv]$)"
_Z_COMFY = Reads(Alphas.REFUSED, alphas_of=r"attention\.to_out", loses=rf"{_Z_QKV}|attention\.to_out")

_LUMINA_BLOCKS = r"^(?:layers|noise_refiner|context_refiner)\.(\d+)\."
_LUMINA_ENDS = r"^(?!layers|noise_refiner|context_refiner)"
_IDEOGRAM = Reads(refuses=r"^(?!layers\.)")
_PEFT = Reads(Alphas.IGNORED, sign=r"^base_model\.model\.")
"""The file of a PEFT folder, without its config."""
_BLOCKWISE = replace(_BARE, refuses=r"^(?!(single_)?transformer_blocks\.)")

LORA: Mapping[str, Mapping[str, Reads]] = {
    "sd1": _UNET,
    "sd2": _UNET,
    "sdxl": _UNET,
    "sd3": _OWN_WITHOUT_ALPHA,
    "flux": {
        **_FLUX,
        "bfl": Reads(
            sign=r"\.query_norm\.scale$",
            turns=r"^norm_out",
            whole=rf"{_FLUX_BLOCKS}|^({_FLUX_ENDS})",
            optional=r"guidance_embedder",
        ),
        "bfl-peft": Reads(whole=rf"{_FLUX_BLOCKS}|^proj_out$", refuses=rf"^(?!proj_out)({_FLUX_ENDS})"),
    },
    "chroma": {
        **_FLUX,
        "kohya": replace(_FLUX_KOHYA, refuses=_GUIDANCE),
        "comfy-down": replace(_FLUX_KOHYA, refuses=_GUIDANCE),
        "onetrainer": Reads(refuses=_GUIDANCE),
    },
    "flux2_dev": {
        **_OWN_WITHOUT_ALPHA,
        "peft": replace(_PEFT, refuses=_BLOCKWISE.refuses),
        "comfy": replace(_BARE, turns=_FLUX2_TURNED),
        "comfy-diffusers": _BLOCKWISE,
        "bfl-peft": Reads(turns=_FLUX2_TURNED),
        "kohya": Reads(loses=_FLUX2_KOHYA),
    },
    "flux3_klein": {
        **_OWN_WITHOUT_ALPHA,
        "comfy": replace(_BARE, loses=r"^(?!(txt_)?mode_blocks\.|single_transformer_blocks\.)"),
        "comfy-diffusers": _BARE,
    },
    "minimax_h3": {**_OWN_WITHOUT_ALPHA, **dict.fromkeys(_MINIMAX, READ), "diffsynth": Reads(sign=r"\.default\.")},
    "hunyuan_video": {**_OWN_WITHOUT_ALPHA, "comfy": _HUNYUAN, "diffusion-pipe": _HUNYUAN},
    "ltx_2b": {**_OWN_WITHOUT_ALPHA, "comfy": _LTX},
    "ltx_2": {**_OWN_WITHOUT_ALPHA, "comfy": _BARE},
    "lumina2": {
        **_OWN_WITHOUT_ALPHA,
        "comfy": replace(_BARE, whole=_LUMINA_BLOCKS, counted=True, refuses=_LUMINA_ENDS),
    },
    # peft has no LoRA for the class of the gate.
    "hidream": {d: replace(r, refuses=r"\.gate$") for d, r in {**_OWN_WITHOUT_ALPHA, "comfy": _BARE}.items()},
    "ideogram4": {
        **_OWN_WITHOUT_ALPHA,
        "comfy": _IDEOGRAM,
        "comfy-down": _IDEOGRAM,
        "onetrainer-original": replace(_IDEOGRAM, sign=r"\.attention\.qkv\."),
        "original-down": replace(_IDEOGRAM, sign=r"\.attention\.qkv\."),
        "diffsynth": replace(_IDEOGRAM, sign=r"\.attention\.qkv\."),
    },
    "auraflow": _OWN_WITHOUT_ALPHA,
    "cogvideox_2b": _OWN_WITHOUT_ALPHA,
    "cogview4": _OWN_WITHOUT_ALPHA,
    "mochi": _OWN_WITHOUT_ALPHA,
    "pixart_alpha": {},
    "hunyuan_video_1_5": {},
    "hunyuan_image": {},
    "hunyuan_dit": {},
    "stable_cascade": {},
    "longcat_image": {},
    "newbie": {},
    "ace_step_1_5": _OWN_WITHOUT_ALPHA,
    "kandinsky5_lite": _OWN_WITHOUT_ALPHA,
    # peft's LoRA of a grouped convolution needs as many ranks as groups, or a multiple.
    "sana_1600m": {d: replace(r, refuses=r"\.conv_depth$") for d, r in _OWN_WITHOUT_ALPHA.items()},
    "ernie_image": {**_OWN_WITHOUT_ALPHA, "comfy": _BARE, "peft": _PEFT},
    "anima": {**_OWN_WITHOUT_ALPHA, "comfy": _BARE},
    "cosmos_predict2_14b": _OWN_WITHOUT_ALPHA,
    "krea2": {**_OWN_WITHOUT_ALPHA, "comfy": _BARE},
    "qwen_image": {
        **_OWN_WITHOUT_ALPHA,
        **dict.fromkeys(_QWEN, READ),
        "diffusers-down": _SIGNED,
        "onetrainer-original": _SIGNED,
        "diffsynth": Reads(sign=r"\.default\."),
    },
    "qwen_image_2_1": {
        **_OWN_WITHOUT_ALPHA,
        **dict.fromkeys(("comfy", "comfy-down"), _QWEN_2_1),
        **dict.fromkeys(("kohya", "kohya-peft"), replace(_QWEN_2_1, refuses=_QWEN_2_1_AROUND)),
        **dict.fromkeys(
            ("kohya-diffusers", "kohya-diffusers-peft"),
            Reads(loses=r"img_mlp\.gate_layer$", refuses=_QWEN_2_1_AROUND),
        ),
        "comfy-diffusers": READ,
        "diffusers-down": _SIGNED,
        **dict.fromkeys(("onetrainer-original", "original-down"), replace(_QWEN_2_1, sign=r"\.alpha$")),
        "diffsynth": Reads(sign=r"\.default\."),
    },
    "wan_animate_2_14b": {},
    "wan_14b": {
        **_OWN_WITHOUT_ALPHA,
        "comfy": _WAN,
        "comfy-down": _WAN,
        "kohya": Reads(
            sign=r"^lora_unet_[^_].*\.alpha$",
            whole=_WAN_BLOCKS,
            counted=True,
            optional=r"\.add_[kv]_proj$",
            refuses=r"^(?!blocks\.)",
        ),
    },
    "z_image": {
        **_OWN_WITHOUT_ALPHA,
        "comfy": _Z_COMFY,
        "comfy-down": Reads(loses=_Z_QKV),
        "comfy-diffusers": READ,
        "kohya": Reads(loses=_Z_ENDS),
        "kohya-diffusers": READ,
        "diffusers-down": _SIGNED,
        "onetrainer-original": replace(_Z_COMFY, sign=r"\.alpha$"),
        "original-down": Reads(sign=r"\.alpha$", loses=_Z_QKV),
        "diffsynth": Reads(sign=r"\.default\."),
    },
}
"""By base (or the family it belongs to), and by spelling: what diffusers reads.  Spellings without a row it does not read."""

_LYCORIS_NAMES = (
    r"^(?!(single_)?transformer_blocks\.\d+\.(attn\.(to_([qkv]|out(\.0)?|add_out|qkv_mlp_proj)|add_[qkv]_proj)"
    r"|ff(_context)?\.linear_(in|out))$)"
)
LOKR: Mapping[str, Mapping[str, Reads]] = {
    "flux2_dev": {
        "comfy": Reads(turns=_FLUX2_TURNED),
        "diffusers-down": READ,
        "diffusers-lycoris": _BARE,
        "lycoris": Reads(refuses=_LYCORIS_NAMES),
    },
    "z_image": {
        "comfy": replace(_Z_COMFY, alphas=Alphas.TAKEN),
        "comfy-diffusers": READ,
        "diffusers-down": _SIGNED,
        "onetrainer-original": replace(_Z_COMFY, alphas=Alphas.TAKEN, sign=r"\.alpha$"),
        "diffusers-lycoris": _BARE,
    },
}
"""The same for LoKr, which the loaders of two bases take."""

LOADERS: Mapping[str, Loader] = {
    "sd1": Loader("StableDiffusion", ("unet", "text_encoder")),
    "sd2": Loader("StableDiffusion", ("unet", "text_encoder")),
    "sdxl": Loader("StableDiffusionXL", ("unet", "text_encoder", "text_encoder_2")),
    "sd3": Loader("SD3", ("transformer", "text_encoder", "text_encoder_2")),
    "flux": Loader("Flux", ("transformer", "text_encoder")),
    "chroma": Loader("Flux", ("transformer",)),  # its T5 the loader takes for CLIP, and refuses
    "flux2_dev": Loader("Flux2", ("transformer",)),
    "flux3_klein": Loader("Flux3", ("transformer",)),
    "minimax_h3": Loader("MiniMaxH3", ("transformer", "transformer_ref")),
    "hunyuan_video": Loader("HunyuanVideo", ("transformer",)),
    "ltx_2b": Loader("LTXVideo", ("transformer",)),
    "ltx_2": Loader("LTX2", ("transformer", "connectors")),
    "lumina2": Loader("Lumina2", ("transformer",)),
    "hidream": Loader("HiDreamImage", ("transformer",)),
    "ideogram4": Loader("Ideogram4", ("transformer",)),
    "auraflow": Loader("AuraFlow", ("transformer",)),
    "cogvideox_2b": Loader("CogVideoX", ("transformer",)),
    "cogview4": Loader("CogView4", ("transformer",)),
    "mochi": Loader("Mochi1", ("transformer",)),
    "pixart_alpha": Loader("", ()),
    "hunyuan_video_1_5": Loader("", ()),
    "hunyuan_image": Loader("", ()),
    "hunyuan_dit": Loader("", ()),
    "stable_cascade": Loader("", ()),
    "longcat_image": Loader("", ()),
    "newbie": Loader("", ()),
    "ace_step_1_5": Loader("AceStep", ("transformer",)),
    "kandinsky5_lite": Loader("Kandinsky", ("transformer",)),
    "sana_1600m": Loader("Sana", ("transformer",)),
    "ernie_image": Loader("ErnieImage", ("transformer",)),
    "anima": Loader("Anima", ("transformer", "text_conditioner")),
    # Of Cosmos-Predict2.5; the pipelines of 2 have none.
    "cosmos_predict2_14b": Loader("Cosmos", ("transformer",)),
    "krea2": Loader("Krea2", ("transformer",)),
    "qwen_image": Loader("QwenImage", ("transformer",)),
    "qwen_image_2_1": Loader("QwenImage", ("transformer",)),
    "wan_14b": Loader("Wan", ("transformer", "transformer_2")),
    # Its pipeline has Wan's, which fails: it looks for an `image_dim` in the config, and the model has none.
    "wan_animate_2_14b": Loader("", ()),
    "z_image": Loader("ZImage", ("transformer",)),
}
"""By base, or family: which class of `loaders/lora_pipeline.py` loads its adapters."""


def base_names(subject: Subject) -> tuple[str, ...]:
    """The names under which the tables may have the adapter's base: its own, and its family's; none where it is not known."""
    adapter = subject.adapter
    if adapter is None:
        return ()
    base = adapter.base
    if base is None:
        value = adapter.architecture.value
        if value not in architectures.names():
            return ()
        base = architectures.load(value)
    return (base.name, base.family) if base.builtin else (base.family,)


def loader_of(subject: Subject) -> Loader | None:
    """The class that loads the adapter; None where its base is not known."""
    return next((LOADERS[name] for name in base_names(subject) if name in LOADERS), None)


def row(subject: Subject, table: Mapping[str, Mapping[str, Reads]] = LORA) -> Reads | None:
    """What the table says of the adapter's base and spelling; None where diffusers does not read it, or nothing is said."""
    return spellings(subject, table).get(subject.dialect)


def spellings(subject: Subject, table: Mapping[str, Mapping[str, Reads]] = LORA) -> Mapping[str, Reads]:
    """The spellings of the adapter's base that diffusers reads; empty where the tables do not know the base."""
    return next((table[name] for name in base_names(subject) if name in table), {})


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a row is one, and fits."""
    return bool(pattern) and re.search(pattern, name) is not None
