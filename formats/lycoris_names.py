"""The names of the tensors of LyCORIS' methods, which Kohya's, Comfy's and its own files share.

Sources: KohakuBlueleaf/LyCORIS 4.1.3 `lycoris/modules/*.py`, `tools/pack_bundle.py`; Comfy-Org/ComfyUI
`comfy/weight_adapter/*.py`, `comfy/lora.py`; Nerogar/OneTrainer `modules/modelSaver/*/*LoRASaver.py` (`_get_state_dict`).
"""

from __future__ import annotations

from collections.abc import Iterable

from adapterops.plugin import ANY, Adapter, Place, Reading, Source, Suffix, Target, errors

SCALE = (Suffix(".alpha", ANY, "alpha"), Suffix(".dora_scale", ANY, "magnitude"))
"""What stands beside the factors of any method with a scale."""

DOWN_UP = (
    Suffix(".lora_down.weight", "lora", "A"),
    Suffix(".lora_up.weight", "lora", "B"),
    Suffix(".lora_mid.weight", "lora", "mid"),
)
LOHA = tuple(Suffix(f".hada_{role}", "loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR = tuple(Suffix(f".lokr_{role}", "lokr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2"))
IA3 = (Suffix(".weight", "ia3", "vector", {"initial": 0}), Suffix(".on_input", "ia3", "on_input", {"initial": 0}))
DIFFERENCES = (
    Suffix(".diff", "diff", "weight"),
    Suffix(".diff_b", "diff", "bias"),
    Suffix(".w_norm", "diff", "weight", {"kind": "norm"}),
    Suffix(".b_norm", "diff", "bias", {"kind": "norm"}),
    *(Suffix(f".{role}", "diff", role) for role in ("bias_indices", "bias_values", "bias_size")),
)
OFT = (Suffix(".oft_blocks", "lycoris_oft", "blocks"), Suffix(".rescale", "lycoris_oft", "rescale"))
GLORA = tuple(Suffix(f".{role}.weight", "lycoris_glora", role) for role in ("a1", "a2", "b1", "b2"))
ONETRAINER_OFT = (
    Suffix(".oft_R.weight", "onetrainer_oft", "R"),
    Suffix(".oft_R.scaled_oft", "onetrainer_oft", "scaled"),
)
LYCORIS = (*LOHA, *LOKR, *OFT, *GLORA, *ONETRAINER_OFT, *DIFFERENCES, *SCALE)
"""Every method that these files share but LoRA, whose names differ, and (IA)³, which only LyCORIS reads."""
EMBEDDINGS = Place(
    "embeddings",
    "bundle_emb.",
    tuple(
        Suffix(f".{name}", "bundled", name)
        for name in (
            *("emb_params", "string_to_param.*", "clip_l", "clip_g", "t5", "t5xxl", "llama", "qwen", "<PAD>"),
            *("clip_l_out", "clip_g_out", "t5_out", "llama_out"),
        )
    ),
    free=True,
)
"""Textual inversions in an adapter's file: OneTrainer puts them into each of its formats, `_out` for vectors that replace
the encoder's output."""
RENAMED = (
    "flux",
    "sd3",
    "z_image",
    "flux2_dev",
    "wan_14b",
    "wan_animate_2_14b",
    "hunyuan_video",
    "ltx_2b",
    "ltx_2",
    "lumina2",
    "auraflow",
    "anima",
    "cosmos_predict2_14b",
    "krea2",
    "ideogram4",
    "cogvideox_2b",
    "mochi",
    "pixart_alpha",
    "hunyuan_video_1_5",
    "hunyuan_image",
    "flux3_klein",
    "qwen_image_2_1",
    "minimax_h3",
    "hunyuan_dit",
    "stable_cascade",
    "ace_step_1_5",
    "longcat_image",
)
"""Every base with a transformer whose modules diffusers names otherwise than its authors."""
UNREAD = (
    (
        "magnitude",
        "diffusers' own loaders drop DoRA magnitudes that are spelled dora_scale and apply the rest; for it write --to "
        "diffusers, or load through adapterops.integrations.diffusers",
    ),
)
"""What common readers of these files leave out: huggingface/diffusers `loaders/lora_pipeline.py`, "dora_scale"."""


def is_in_pefts_folder(source: Source) -> bool:
    """Whether it is LyCORIS' own file under PEFT's names of files, beside a config that repeats its rank and alpha.

    NewBieAI-Lab/NewbieLoraTrainer `train_newbie_lora.py` (`save_lora_model`).
    """
    kind = source.config.get("peft_type") if source.config is not None else None
    return str(kind).upper() == "LYCORIS" and all(key.startswith("lycoris_") for key in source.tensors)


def of_adapters(readings: Iterable[Reading]) -> list[Reading]:
    """The readings of more than embeddings: a file of those alone is LyCORIS' bundle, which is Kohya's."""
    return [reading for reading in readings if not all(claim.place.free for claim in reading.claims)]


def insist_on_modules(adapter: Adapter, target: Target) -> None:
    """Raise `CannotRepresent` for embeddings alone: a file of them is read as LyCORIS' bundle."""
    if len(adapter) and all(update.method == "bundled" for update in adapter):
        raise errors.CannotRepresent(
            f"{next(iter(adapter)).name}: embeddings alone are LyCORIS' bundle, which --to kohya holds; {target.dialect.title} "
            "holds them beside the updates of modules"
        )


def embeddings_told(adapter: Adapter, sentence: str) -> tuple[str, ...]:
    """What to say of a file with embeddings in it, after their tokens' names; nothing where there are none."""
    tokens = sorted({update.module for update in adapter if update.method == "bundled"})
    return (f"bundled embeddings ({', '.join(tokens)[:80]}): {sentence}",) if tokens else ()


def unlike_comfy(adapter: Adapter) -> tuple[str, ...]:
    """What to say of rotations that ComfyUI makes otherwise than LyCORIS: its bound is the alpha alone, not alpha times the
    outputs, and its OFT passes over `rescale` (Comfy-Org/ComfyUI `comfy/weight_adapter/oft.py`, `boft.py`)."""
    odd = []
    for update in adapter:
        blocks, bound = update.tensors.get("blocks"), update.tensors.get("constraint")
        if update.method == "lycoris_oft" and blocks is not None:
            bounded = bound is not None and bound.item() > 0
            if bounded or ("rescale" in update.tensors and len(blocks.shape) == 3):
                odd.append(update.name)
    if not odd:
        return ()
    return (
        f"{len(odd)} modules (first {odd[0]}) have OFT with a constraint or with factors on the outputs, of which ComfyUI makes "
        "something else than LyCORIS; adapterops to-lora --base-weights BASE makes a LoRA of them, which it reads",
    )


def unnamed(target: Target) -> tuple[str, ...]:
    """What to say of a dialect that spells modules as the base's authors do, where only diffusers' names of them are
    known: those of a model that was built from a config, and is no built-in table's."""
    base, places = target.architecture, target.dialect.places
    if base is None or base.builtin:
        return ()
    asked = {place.among(base.components) for place in places if place.column(base.family) == "original"}
    modules = [spec for name in asked if name for spec in base.components[name].modules.values()]
    if not modules or any(spec.original != spec.name for spec in modules):
        return ()
    return (
        f"no table has the authors' names of {base.name}'s modules: they are called as diffusers calls them, and readers "
        f"of {target.dialect.title} pass over those that the authors call otherwise",
    )
