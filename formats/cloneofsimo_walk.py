"""The order in which cloneofsimo/lora meets the modules of a model, by their names.

It walks over a model once (`lora_diffusion/lora.py`, `_find_modules_v2`): below every module whose class is a target,
every linear layer, and every convolution where these are asked for, in the order of `named_modules`.  That is the order
in which the classes of diffusers and transformers define their children, so `ORDER` lists those, and `CLASSES` what the
modules of a class are called.

diffusers up to 0.14 defines a transformer block as attn1, ff, attn2; from 0.15 on, which also calls `CrossAttention`
`Attention`, as attn1, attn2, ff.  The U-Net's middle stands after both its halves, and CLIP's attention begins with k.
Sources: diffusers 0.11.1 to 0.18.2 `models/attention.py`, `models/unet_2d_condition.py`, `models/unet_2d_blocks.py`,
`models/resnet.py`; transformers `models/clip/modeling_clip.py`, which in 4.4x had a class of CLIP's attention for each
way to compute it (`CLIP_ATTENTION_CLASSES`), with the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from adapterops.plugin import ModuleSpec

LISTED_KEY = re.compile(r"\[(\d+)\]")
"""The key of a tensor in a list."""
CLASSES: Mapping[str, Mapping[str, str]] = {
    "unet": {
        "Transformer2DModel": r"(^|\.)attentions\.\d+$",
        "BasicTransformerBlock": r"\.transformer_blocks\.\d+$",
        "FeedForward": r"\.ff$",
        "CrossAttention": r"\.attn[12]$",
        "Attention": r"\.attn[12]$",
        "GEGLU": r"\.ff\.net\.0$",
        "ResnetBlock2D": r"(^|\.)resnets\.\d+$",
        "Downsample2D": r"\.downsamplers\.\d+$",
        "Upsample2D": r"\.upsamplers\.\d+$",
    },
    "text_encoder": {
        "CLIPEncoderLayer": r"\.layers\.\d+$",
        "CLIPAttention": r"\.self_attn$",
        "CLIPSdpaAttention": r"\.self_attn$",
        "CLIPFlashAttention2": r"\.self_attn$",
        "CLIPMLP": r"\.mlp$",
    },
}
"""For a component the classes that may be targets, each before those that it holds, and the names of their modules."""

EARLY = ("attn1", "ff", "attn2")
LATE = ("attn1", "attn2", "ff")
"""The children of a transformer block in diffusers up to 0.14, and from 0.15 on."""

_ORDER = (
    ("down_blocks", "up_blocks", "mid_block"),
    ("attentions", "resnets", "downsamplers", "upsamplers"),
    ("proj_in", "transformer_blocks", "proj_out"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    ("self_attn", "mlp"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
    ("fc1", "fc2"),
)
"""Children of one class in the order of their definition."""


def walk(
    specs: Iterable[ModuleSpec], component: str, targets: Collection[str], block: Sequence[str]
) -> list[ModuleSpec]:
    """The linear layers and convolutions below the target classes, in order; a module below two of them stands there twice.

    `block` is EARLY or LATE.
    """
    places = {text for name, text in CLASSES[component].items() if name in targets}
    patterns = [re.compile(text) for text in places]
    rank = {name: number for siblings in (*_ORDER, block) for number, name in enumerate(siblings)}
    found = [
        (tuple(int(part) if part.isdecimal() else rank.get(part, 0) for part in spec.name.split(".")), spec)
        for spec in specs
        if spec.kind in ("linear", "conv")
        for above in _above(spec.name)
        for pattern in patterns
        if pattern.search(above)
    ]
    return [spec for _, spec in sorted(found, key=lambda entry: entry[0])]


def targets_for(
    specs: Sequence[ModuleSpec], component: str, wanted: Collection[str], kinds: Collection[str]
) -> list[str]:
    """The classes whose linear layers (and convolutions, as `kinds` says) are in `wanted`; outer ones go before what
    they hold."""
    chosen: list[str] = []
    covered: set[str] = set()
    for name, text in CLASSES[component].items():
        pattern = re.compile(text)
        own = {s.name for s in specs if s.kind in kinds and any(pattern.search(above) for above in _above(s.name))}
        same = any(CLASSES[component][other] == text for other in chosen)
        if own and own <= set(wanted) and (same or covered.isdisjoint(own)):
            chosen.append(name)
            covered |= own
    return chosen


def missing(
    specs: Sequence[ModuleSpec], component: str, wanted: Collection[str], kinds: Collection[str]
) -> tuple[str, str]:
    """The class that fewest layers are lacking of, of those that some are there of, and one of the lacking; "" where
    none is so."""
    lacking: list[tuple[int, str, str]] = []
    for name, text in CLASSES[component].items():
        pattern = re.compile(text)
        own = [s.name for s in specs if s.kind in kinds and any(pattern.search(above) for above in _above(s.name))]
        gone = [module for module in own if module not in wanted]
        if gone and len(gone) < len(own):
            lacking.append((len(gone), name, gone[0]))
    return min(lacking, default=(0, "", ""))[1:]


def _above(name: str) -> list[str]:
    """The modules that hold a module, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
