"""Mixtures and models beside the model in PEFT configs.

Source: huggingface/peft 0.21.2 `tuners/{lily,poly,xlora,shadow}/config.py`, `tuners/lily/model.py`
(`_post_injection_hook`), `tuners/xlora/classifier.py`, `tuners/shadow/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from adapterops_formats.peft_kinds.odd import alike, contradiction, first, number
from adapterops_formats.peft_kinds.row import Gathered, PeftMethod, Setting, defaults, same_tensor, with_tensors
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Group, LazyTensor, Update, errors

# ---- Lily ---------------------------------------------------------------------------------------------------


def _kinds(updates: Sequence[Update]) -> list[list[Update]]:
    """The modules that share a B, in the order of their names: those of one last segment and shape, as peft takes them
    where its targets are such segments."""
    out: dict[Any, list[Update]] = {}
    for update in sorted(
        updates, key=lambda u: [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in u.module.split(".")]
    ):
        name = update.module.rpartition(".")[2]
        out.setdefault((name, update.tensors["A"].shape, update.tensors["B"].shape), []).append(update)
    return list(out.values())


def _strides(updates: Sequence[Update]) -> list[int]:
    """How many modules in a row share an A, for every kind: the length of each run but the last, which may be short.

    Raises `CannotRepresent` where modules that peft would give one B have several.
    """
    runs: list[int] = []
    for kind in _kinds(updates):
        other = next((u for u in kind if not same_tensor(u.tensors["B"], kind[0].tensors["B"])), None)
        if other is not None:
            raise errors.CannotRepresent(
                f"{other.tensors['B'].where} and {kind[0].tensors['B'].key!r} differ, but Lily keeps one B for all modules of a "
                "kind: peft would load one of them for both"
            )
        length = 1
        for one, two in pairwise(kind):
            if same_tensor(one.tensors["A"], two.tensors["A"]):
                length += 1
            else:
                runs.append(length)
                length = 1
        runs.append(-length)
    return runs


def _lily_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`num_B` and `stride_A`.  Raises `CannotRepresent` where no stride gives these modules these matrices."""
    count = alike(updates, "num_B", {u.module: u.tensors["router"].shape[0] for u in updates})
    runs = _strides(updates)
    whole, least = {n for n in runs if n > 0}, max((-n for n in runs if n < 0), default=1)
    stride = next(iter(whole), least)
    if len(whole) > 1 or least > stride:
        raise errors.CannotRepresent(
            f"{first(updates[0]).where}: its modules share A in runs of {', '.join(map(str, sorted({*whole, least})))}; a config "
            "of Lily says one stride_A for all"
        )
    return {"num_B": count, "stride_A": stride}


def _lily_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        if view.fields.get("num_B", 2) != update.tensors["router"].shape[0]:
            yield contradiction(update, view, "num_B", update.tensors["router"].shape[0])
    stride = number(view, "stride_A", 1)
    for run in _strides(updates):
        if (run > 0 and run != stride) or -run > stride:
            yield contradiction(updates[0], view, "stride_A", abs(run))


LILY = PeftMethod(
    "LILY",
    "lily",
    "Lily",
    ranks_in="",
    rank_default=32,
    shaping=("num_B", "stride_A"),
    settings=(Setting("scaling", (int, float), 1.0, asked=True, about="it multiplies all that Lily adds"),),
    known=("init_weights",),
    defaults=defaults("LILY", init_weights=True, modules_to_save=None),
    fields=_lily_fields,
    problems=_lily_problems,
    lost=("scaling",),
)


# ---- Poly ---------------------------------------------------------------------------------------------------


def _poly_sizes(update: Update) -> dict[str, int]:
    a, logits = update.tensors["lora_A"], update.tensors["router.module_logits"]
    return {"n_tasks": logits.shape[0], "n_skills": a.shape[1], "n_splits": a.shape[0]}


def _poly_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    sizes = {u.module: _poly_sizes(u) for u in updates}
    return {
        name: alike(updates, name, {m: s[name] for m, s in sizes.items()})
        for name in ("n_tasks", "n_skills", "n_splits")
    }


def _poly_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    usual = {"n_tasks": 1, "n_skills": 4, "n_splits": 1}
    for update in updates:
        for name, has in _poly_sizes(update).items():
            if view.fields.get(name, usual[name]) != has:
                yield contradiction(update, view, name, has)


POLY = PeftMethod(
    "POLY",
    "poly",
    "Poly",
    ranks_in="",
    shaping=("n_tasks", "n_skills", "n_splits"),
    narrowing=("exclude_modules",),
    known=("init_weights", "poly_type"),
    defaults=defaults("POLY", poly_type="poly", init_weights=True, modules_to_save=None),
    fields=_poly_fields,
    problems=_poly_problems,
)


# ---- X-LoRA -------------------------------------------------------------------------------------------------


def _layers(update: Update) -> list[tuple[int, ...]]:
    """The shapes of the classifier's layers, in order."""
    numbers = sorted(int(role.split(".")[2]) for role in update.tensors if role.endswith(".weight"))
    return [update.tensors[f"classifier.layers.{n}.weight"].shape for n in numbers]


def _xlora_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`hidden_size`, `xlora_depth`, `xlora_size`."""
    shapes = _layers(updates[0])
    out = {"hidden_size": shapes[0][1], "xlora_depth": len(shapes)}
    return out | ({"xlora_size": shapes[0][0]} if len(shapes) > 1 else {})


def _xlora_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    usual = {"hidden_size": 4096, "xlora_depth": 1, "xlora_size": 2048}
    for update in updates:
        for name, has in _xlora_fields([update], base).items():
            if view.fields.get(name, usual[name]) != has:
                yield contradiction(update, view, name, has)
        experts, out = len(view.fields.get("adapters") or ()), _layers(update)[-1][0]
        if experts and out % experts:
            yield contradiction(update, view, "adapters", f"{out} outputs, which {experts} experts cannot share")


def _beside(entry: Group, config: Any) -> str:
    return (
        "X-LoRA's experts are in folders of their own beside its classifier (0, 1 …), which are not converted: copy them "
        "beside what is written"
    )


XLORA = PeftMethod(
    "XLORA",
    "xlora",
    "X-LoRA",
    rank="",
    narrowing=(),
    targeted=False,
    saves=False,
    shaping=("hidden_size", "xlora_depth", "xlora_size"),
    settings=(
        Setting("adapters", (dict,), asked=True, about="its names are those of the experts"),
        Setting("layerwise_scalings", (bool,), False),
        Setting("enable_softmax", (bool,), True),
        Setting("enable_softmax_topk", (bool,), False),
        Setting("softmax_temperature", (int, float), 1.0),
        Setting("top_k_lora", (int,)),
        Setting("scaling_pass_value", (int, float), 0.0),
        Setting("global_scaling_weight", (int, float), 1.0),
    ),
    known=("xlora_dropout_p", "use_trainable_adapters"),
    defaults=defaults("XLORA"),
    fields=_xlora_fields,
    problems=_xlora_problems,
    today=_beside,
    lost=("adapters",),
)


# ---- ShadowPEFT ---------------------------------------------------------------------------------------------

_WIDTHS = ("mlp.up_proj", "mlp.gate_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "fc1", "intermediate.dense")
"""What the first linear layer of a block's feed-forward network is called."""


def _is_shared(role: str) -> bool:
    return role.startswith(("backbone.", "projection.", "head."))


def _gather(updates: list[Update]) -> Gathered:
    """The blocks' own tensors, and the shadow, which they all have."""
    shared: dict[str, LazyTensor] = {}
    out = []
    for update in updates:
        for role, tensor in update.tensors.items():
            if _is_shared(role) and not same_tensor(shared.setdefault(role, tensor), tensor):
                raise errors.CannotRepresent(
                    f"{tensor.where} and {shared[role].where} differ, but PEFT keeps one shadow model for all blocks"
                )
        out.append(with_tensors(update, {r: t for r, t in update.tensors.items() if not _is_shared(r)}))
    return out, shared


def _inner(update: Update) -> int:
    """The width of the networks that advance the shadow."""
    return update.tensors["update_gate.0.weight"].shape[0]


def _mirror(update: Update) -> dict[str, Any]:
    """What the shadow's own tensors say of its size: its layers, its width where it is not the base's, its inner width."""
    backbone = {role: t for role, t in update.tensors.items() if role.startswith("backbone.")}
    parts = [role.split(".") for role in backbone]
    numbers = {int(part) for path in parts for part in path[2:4] if part.isdigit()}
    projection = next((t for role, t in update.tensors.items() if role.startswith("projection.")), None)
    wide = next(
        (t for role, t in backbone.items() if role.removesuffix(".weight").endswith(_WIDTHS) and len(t.shape) == 2),
        None,
    )
    width = projection.shape[1] if projection is not None else update.tensors["down.weight"].shape[1]
    return {
        "shadow_num_hidden_layers": len(numbers) or 1,
        "shadow_hidden_size": width,
        "shadow_intermediate_size": None if wide is None else next((n for n in wide.shape if n != width), width),
    }


def _shadow_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """The size of the shadow and of the networks beside the blocks; null where peft comes to the same by itself."""
    rank = METHODS["shadow"].rank(updates[0])
    inner = alike(updates, "update_hidden_size", {u.module: _inner(u) for u in updates})
    size = _mirror(updates[0])
    if size["shadow_num_hidden_layers"] == 1:
        size["shadow_num_hidden_layers"] = None
    own_width = any(role.startswith("projection.") for role in updates[0].tensors)
    if not own_width:
        size["shadow_hidden_size"] = None
    embeds = any(
        ".embed_tokens." in role or ".wte." in role for role in updates[0].tensors if role.startswith("backbone.")
    )
    return {
        **size,
        "update_hidden_size": None if inner == rank else inner,
        "share_embeddings": own_width or not embeds,
        "shadow_model": "mirror",
    }


def _shadow_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        rank, said = METHODS["shadow"].rank(update), view.fields.get("update_hidden_size")
        if (said or rank) != _inner(update):
            yield contradiction(update, view, "update_hidden_size", _inner(update))
    if updates and view.fields.get("shadow_model", "mirror") == "mirror":
        size = _mirror(updates[0])
        for name, usual in (("shadow_num_hidden_layers", 1), ("shadow_hidden_size", size["shadow_hidden_size"])):
            said = view.fields.get(name)
            if (usual if said is None else said) != size[name]:
                yield contradiction(updates[0], view, name, size[name])
        wide, said = size["shadow_intermediate_size"], view.fields.get("shadow_intermediate_size")
        if None not in (wide, said) and wide != said:
            yield contradiction(updates[0], view, "shadow_intermediate_size", wide)


SHADOW = PeftMethod(
    "SHADOW",
    "shadow",
    "ShadowPEFT",
    ranks_in="",
    shared=("backbone", "projection", "head"),
    shaping=(
        *("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_intermediate_size", "update_hidden_size"),
        *("share_embeddings", "shadow_model"),
    ),
    nulls=("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_intermediate_size", "update_hidden_size"),
    settings=(Setting("shadow_alpha", (int, float), 0.1, asked=True, about="it multiplies what the shadow adds"),),
    known=("shadow_dropout", "init_weights", "shadow_num_attention_heads", "auxiliary_loss_weight"),
    defaults=defaults("SHADOW", shadow_dropout=0.2, init_weights=True, modules_to_save=None),
    fields=_shadow_fields,
    problems=_shadow_problems,
    gather=_gather,
    lost=("shadow_alpha", "shadow_num_attention_heads", "task_type"),
)
