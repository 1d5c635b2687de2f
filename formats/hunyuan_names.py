"""Two spellings that only HunyuanVideo has, both of which Comfy reads.

    transformer.double_blocks.0.img_attn_qkv.lora_A.weight        its authors' names behind diffusers' prefix
    diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight   the names of Comfy's own model

diffusion-pipe writes the first, which diffusers reads, too.  The second is what Comfy makes itself (`LoraSave`): its model is
built of Flux.1's layers, so that names and sizes are those of Flux.1 but for the last blocks and the text's refiner.
Sources: tdrussell/diffusion-pipe `models/hunyuan_video.py` (`save_adapter`); Comfy-Org/ComfyUI `comfy/lora.py`
(`model_lora_keys_unet`), `comfy/ldm/hunyuan_video/model.py`, `comfy_extras/nodes_lora_extract.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from adapterops.plugin import AlphaIn, Dialect, LazyTensor, Place, Suffix

_ONLY = frozenset({"hunyuan_video", "hunyuan_video_1_5", "hunyuan_image"})
_FIRST = frozenset({"hunyuan_video"})
_OTHERS = _ONLY - _FIRST
"""Those whose modules are of other sizes than Flux.1's."""
_STREAMS = tuple(
    (f".{stream}_{authors}", f".{stream}_{comfys}")
    for stream in ("img", "txt")
    for authors, comfys in (
        ("attn_qkv", "attn.qkv"),
        ("attn_proj", "attn.proj"),
        ("attn_q_norm", "attn.norm.query_norm"),
        ("attn_k_norm", "attn.norm.key_norm"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        ("mod.linear", "mod.lin"),
    )
)
_SINGLE = (
    (".modulation.linear", ".modulation.lin"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
)
_REFINER = (
    (".self_attn_qkv", ".self_attn.qkv"),
    (".self_attn_proj", ".self_attn.proj"),
    (".mlp.fc1", ".mlp.0"),
    (".mlp.fc2", ".mlp.2"),
)
_EMBEDDERS = tuple(
    (f"{name}.{authors}", f"{name}.{comfys}")
    for name, *own in (
        ("time_in", "mlp.0", "mlp.2"),
        ("guidance_in", "mlp.0", "mlp.2"),
        ("time_r_in", "mlp.0", "mlp.2"),
        ("txt_in.t_embedder", "mlp.0", "mlp.2"),
        ("txt_in.c_embedder", "linear_1", "linear_2"),
    )
    for authors, comfys in zip(own, ("in_layer", "out_layer"), strict=True)
)
_ALIKE = (
    *(".linear1", ".linear2", ".adaLN_modulation.1", ".norm1", ".norm2", "txt_in.input_embedder", "img_in.proj"),
    *("vector_in.in_layer", "vector_in.out_layer", "final_layer.linear", "cond_type_embedding"),
    *(f"byt5_in.{name}" for name in ("layernorm", "fc1", "fc2", "fc3")),
    *(f"vision_in.proj.{number}" for number in (0, 1, 3, 4)),
)
TAILS = (*_STREAMS, *_SINGLE, *_REFINER, *_EMBEDDERS, *((name, name) for name in _ALIKE))
"""How the authors' names of modules end, and Comfy's."""

_FLAT_TAILS = tuple((authors.replace(".", "_"), comfys.replace(".", "_")) for authors, comfys in TAILS)

_OWN = (
    "double_blocks.",
    "single_blocks.",
    "txt_in.",
    "time_in.",
    "guidance_in.",
    "vector_in.",
    "final_layer.",
    "img_in.",
    "byt5_in.",
    "vision_in.",
    "time_r_in.",
    "cond_type_embedding.",
)
"""How the authors' names begin, none of which diffusers has."""
_BEHIND = tuple(f"transformer.{name}" for name in _OWN)
_PREFIXES = ("diffusion_model.", "transformer.")
_BLOCKS = tuple(f"diffusion_model.{name}" for name in _OWN)
_LAST = tuple(
    f"diffusion_model.{name}."
    for name in (
        *("double_blocks.19", "single_blocks.38", "single_blocks.39"),
        *("txt_in.individual_token_refiner", "txt_in.c_embedder", "txt_in.t_embedder"),
    )
)
"""How keys of modules begin that Flux.1 has not."""
_COMFYS = (
    r"\.(img|txt|self)_(attn\.(qkv|proj)|mlp\.[02]|mod\.lin)\.|blocks\.\d+\.mlp\.[02]\.|\.modulation\.lin\."
    r"|\.[ct]_embedder\.(in|out)_layer\."
)
_AUTHORS = r"_attn_(qkv|proj)\.|mlp\.fc[12]\.|(_mod|\.modulation)\.linear\."
"""Parts of names that are Comfy's own, and the authors' own."""


def behind_transformer(suffixes: tuple[Suffix, ...]) -> Dialect:
    """The authors' names behind `transformer.`, with these suffixes."""
    return Dialect(
        name="diffusion-pipe",
        format="comfy",
        title="HunyuanVideo's authors' names behind transformer. (diffusion-pipe)",
        places=(Place("transformer", "transformer.", suffixes, names="original", only=_ONLY),),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        example="transformer.double_blocks.0.img_attn_qkv.lora_A.weight",
    )


def comfys_own(usual: Dialect) -> Dialect:
    """The dialect with Comfy's names for HunyuanVideo, where `usual` has the authors'."""
    (place,) = (place for place in usual.places if place.component == "unet")
    return Dialect(
        name=f"{usual.name}-hunyuan",
        format="comfy",
        title=f"{usual.title}, with Comfy's own names of HunyuanVideo",
        places=(
            Place("transformer", place.prefix, place.suffixes, names="original", only=_ONLY, tails=TAILS),
            Place("text_encoder_2", "text_encoders.clip_l.transformer.", place.suffixes, only=_FIRST),
            *(
                Place("text_encoder", f"text_encoders.llama.transformer.{stem}", place.suffixes, only=_FIRST)
                for stem in ("model.", "")
            ),
        ),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        unread=usual.unread,
        example="diffusion_model.double_blocks.19.img_attn.qkv" + place.suffixes[0].text,
    )


def flat(suffixes: tuple[Suffix, ...]) -> Dialect:
    """Comfy's own names as Kohya writes names, with these suffixes: what scripts make of trainers' files for Comfy."""
    return Dialect(
        name="kohya-hunyuan",
        format="kohya",
        title="Kohya with Comfy's own names of HunyuanVideo",
        places=(
            Place("transformer", "lora_unet_", suffixes, names="original", flat=True, only=_OTHERS, tails=_FLAT_TAILS),
        ),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        example="lora_unet_double_blocks_19_img_mlp_0.lora_down.weight",
    )


def among(keys: Iterable[str], dialects: Sequence[Dialect], behind: Dialect, own: Sequence[Dialect]) -> list[Dialect]:
    """The dialects that a file's keys may be in.

    Comfy's own names are Flux.1's but for the last blocks.  Where it has these, `own` stand in for whatever else reads
    Comfy's prefix, unless the file mixes them with the authors'; else they come after it, for a user who says that the base is
    HunyuanVideo, or a header that does.
    """
    begun = [key for key in keys if key.startswith(_PREFIXES)]
    mixed = any(re.search(_AUTHORS, key) for key in begun)
    if not mixed and any(key.startswith(_LAST) and re.search(_COMFYS, key) for key in begun):
        return [*own]
    idle = [] if any(key.startswith(_BEHIND) for key in begun) else [behind]
    idle += [] if any(key.startswith(_BLOCKS) for key in begun) else own
    return [d for d in dialects if d not in idle]


_FLAT_KEY = re.compile(r"lora_unet_double_blocks_\d+_(img|txt)_(attn_qkv|attn_proj|mlp_[02]|mod_lin)\.lora_down\.")
_FLUX_WIDTHS = (3072, 12288)


def may_be_flat(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a file of Kohya's keys may have Comfy's names of a model that is not of Flux.1's size."""
    first = next((key for key in tensors if key.startswith("lora_unet_double_blocks_")), "")
    if not first:
        return False
    own = next((key for key in tensors if _FLAT_KEY.match(key)), None)
    return own is None or tensors[own].shape[-1] not in _FLUX_WIDTHS


def unread_by_comfy(keys: Iterable[str]) -> tuple[str, ...]:
    """What is to be said of keys of Comfy's prefix that Comfy's own model of HunyuanVideo 1.5 has in one."""
    apart = [key for key in keys if re.search(r"double_blocks\.\d+\.(img|txt)_attn_[qkv]\.", key)]
    if not apart:
        return ()
    return (
        f"{len(apart)} tensors (first {apart[0]!r}) have the authors' names, where q, k and v are apart; ComfyUI's has them "
        "in one, and reads --to comfy-hunyuan",
    )
