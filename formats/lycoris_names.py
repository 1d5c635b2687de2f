"""The names of the tensors of LyCORIS' methods, which Kohya's, Comfy's and its own files share.

Sources: KohakuBlueleaf/LyCORIS 4.1.3 `lycoris/modules/*.py`; Comfy-Org/ComfyUI `comfy/weight_adapter/*.py`,
`comfy/lora.py`.
"""

from __future__ import annotations

from adapterops.plugin import ANY, Suffix, Target

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
LYCORIS = (*LOHA, *LOKR, *DIFFERENCES, *SCALE)
"""Every method that these files share but LoRA, whose names differ, and (IA)³, which only LyCORIS reads."""
UNREAD = (
    (
        "magnitude",
        "diffusers' own loaders drop DoRA magnitudes that are spelled dora_scale and apply the rest; for it write --to "
        "diffusers, or load through adapterops.integrations.diffusers",
    ),
)
"""What common readers of these files leave out: huggingface/diffusers `loaders/lora_pipeline.py`, "dora_scale"."""


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
