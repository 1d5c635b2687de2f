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
from collections.abc import Iterable, Sequence

from adapterops.plugin import AlphaIn, Dialect, Place, Suffix

_ONLY = frozenset({"hunyuan_video"})
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
        ("txt_in.t_embedder", "mlp.0", "mlp.2"),
        ("txt_in.c_embedder", "linear_1", "linear_2"),
    )
    for authors, comfys in zip(own, ("in_layer", "out_layer"), strict=True)
)
_ALIKE = (
    *(".linear1", ".linear2", ".adaLN_modulation.1", ".norm1", ".norm2", "txt_in.input_embedder", "img_in.proj"),
    *("vector_in.in_layer", "vector_in.out_layer", "final_layer.linear"),
)
TAILS = (*_STREAMS, *_SINGLE, *_REFINER, *_EMBEDDERS, *((name, name) for name in _ALIKE))
"""How the authors' names of modules end, and Comfy's."""

_OWN = (
    "double_blocks.",
    "single_blocks.",
    "txt_in.",
    "time_in.",
    "guidance_in.",
    "vector_in.",
    "final_layer.",
    "img_in.",
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
        places=(Place("transformer", place.prefix, place.suffixes, names="original", only=_ONLY, tails=TAILS),),
        alpha=AlphaIn.TENSOR,
        convention="rank",
        unread=usual.unread,
        example="diffusion_model.double_blocks.19.img_attn.qkv" + place.suffixes[0].text,
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
