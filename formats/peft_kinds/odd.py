"""Methods with shapes of their own in PEFT configs: what follows from the tensors, and what does not.

Source: huggingface/peft 0.21.2 `tuners/{deft,supertuning,beft,ln_tuning,adamss,osf,peanut,trainable_tokens}/config.py` and
`model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod
from typing import Any

from adapterops_formats.peft_kinds.row import PeftMethod, Setting, defaults, is_finite
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Certainty, Group, LazyTensor, Update, errors


def first(update: Update) -> LazyTensor:
    """The tensor that a message names."""
    return next(iter(update.tensors.values()))


def contradiction(update: Update, view: Any, name: str, has: Any) -> str:
    """The sentence for a field that says something else than the tensors."""
    from adapterops_formats.peft_config import as_argument, as_json

    return (
        f"{first(update).where}: the tensors show {name} {as_json(has)}, but {view.where} says "
        f"{as_json(view.fields.get(name))}; --set {name}={as_argument(has)}"
    )


def unknown(update: Update, name: str, why: str) -> errors.AdapterOpsError:
    """The error for a field that neither the tensors nor a config nor the user said."""
    return errors.UnknownFact(
        f"{first(update).where}: {name} is not in the tensors, and no config says it: {why}; say it with --set {name}=VALUE"
    )


def stated(config: Any, given: Mapping[str, Any], name: str) -> Any:
    """What a config or the user says of a field; None where neither does."""
    value = given.get(name)
    return value if value is not None or config is None else config.fields.get(name)


def number(view: Any, name: str, default: Any = None, kinds: tuple[type, ...] = (int,)) -> Any:
    """A number that a config says; `default` where it says nothing.  Raises `UnreadableFile` for what is none."""
    value = view.fields.get(name)
    if value is not None and (type(value) not in kinds or not is_finite(value)):
        raise errors.UnreadableFile(
            f"{view.where}: {name} is {value!r:.80}; it must be a finite number", fault="config-type"
        )
    return default if value is None else value


def alike(updates: Sequence[Update], name: str, values: Mapping[str, Any]) -> Any:
    """The one value that all modules have.  Raises `CannotRepresent` where they have several."""
    (one, value), *rest = values.items()
    other = next((module for module, found in rest if found != value), None)
    if other is not None:
        raise errors.CannotRepresent(
            f"{one} has {name} {value!r} and {other} {values[other]!r}; a config of {METHODS[updates[0].method].title} says one "
            "for all"
        )
    return value


# ---- DEFT ---------------------------------------------------------------------------------------------------


def _deft_fits(update: Update, r: int) -> bool:
    """Whether peft makes this module's P for `r`, which it cuts to the module's outputs."""
    out, rank = update.tensors["P"].shape
    return min(r, out) == rank


def _deft_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`r` and `para`.  Raises `CannotRepresent` where modules differ in them."""
    r = max(u.tensors["P"].shape[1] for u in updates)
    other = next((u for u in updates if not _deft_fits(u, r)), None)
    if other is not None:
        raise errors.CannotRepresent(
            f"{other.name} has rank {other.tensors['P'].shape[1]} and another module {r}; a config of DEFT says one r for all"
        )
    return {"r": r, "para": alike(updates, "para", {u.module: "R" not in u.tensors for u in updates})}


def _deft_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    r = number(view, "r", 8)
    for update in updates:
        if not _deft_fits(update, r):
            yield contradiction(update, view, "r", update.tensors["P"].shape[1])
        if bool(view.fields.get("para", False)) != ("R" not in update.tensors):
            yield contradiction(update, view, "para", "R" not in update.tensors)


def _deft_said(entry: Group, config: Any) -> str:
    if config is not None and (config.certainty is Certainty.READ or "alpha" in config.fields):
        return ""
    return (
        "no config is beside the tensors: assumed, as peft does, that alpha is null (what DEFT puts in is not scaled); "
        "--set alpha=N says otherwise"
    )


DEFT = PeftMethod(
    "DEFT",
    "deft",
    "DEFT",
    rank="",
    shaping=("r", "para"),
    settings=(
        Setting(
            "decomposition_method",
            (str,),
            "relu",
            asked=True,
            choices=("relu", "qr"),
            about="relu and qr make another projector of the same tensor, and both load",
        ),
        Setting("alpha", (int, float)),
    ),
    flags=("fan_in_fan_out",),
    biases=True,
    known=("init_scale", "deft_dropout", "init_weights", "bias"),
    defaults=defaults(
        "DEFT", deft_dropout=0.0, bias="none", fan_in_fan_out=False, init_weights=True, modules_to_save=None
    ),
    fields=_deft_fields,
    problems=_deft_problems,
    today=_deft_said,
    needs="the base's weights",
    lost=("decomposition_method", "alpha"),
)


# ---- Super-Tuning -------------------------------------------------------------------------------------------


def _super_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    out = {name: stated(config, given, name) for name in ("select_top", "sparsity")}
    if "lora_A" in entry.tensors:
        out["lora_alpha"] = stated(config, given, "lora_alpha")
    for name, kinds in (("select_top", (bool,)), ("sparsity", (int, float)), ("lora_alpha", (int, float))):
        if out.get(name) is not None and (type(out[name]) not in kinds or not is_finite(out[name])):
            raise errors.UnreadableFile(
                f"{first_of(entry).where}: its config says {name} {out[name]!r:.80}, which it cannot be",
                fault="config-type",
            )
    return {name: value for name, value in out.items() if value is not None}


def _size(update: Update) -> int | None:
    """The number of the weight's entries; None where neither the tensors nor the base say it."""
    shape = METHODS["supertuning"].weight_shape(update)
    return None if shape is None else prod(shape)


def _keeps(size: int, sparsity: float) -> int:
    """How many entries peft trains of `size`."""
    return int(size * (1 - sparsity))


def _sparsity(updates: Sequence[Update]) -> float:
    """A sparsity with which peft trains as many entries of each module as the file has, the shortest to write.

    Raises `UnknownFact` where a module's size is not known, `CannotRepresent` where there is none.
    """
    least, most = -inf, inf
    for update in updates:
        size, count = _size(update), update.tensors["values"].numel
        if size is None:
            found = update.options.get("sparsity")
            if found is None:
                raise unknown(update, "sparsity", "it follows from the modules' sizes, which --base CONFIG says, too")
            return float(found)
        least, most = max(least, 1 - (count + 1) / size), min(most, 1 - count / size)
    for digits in range(1, 17):
        step = 10.0**-digits
        near = round((least + most) / 2 / step) * step
        for tried in (round(near, digits), round(most, digits), round(most - step, digits)):
            if 0 <= tried < 1 and all(_keeps(_size(u) or 0, tried) == u.tensors["values"].numel for u in updates):
                return tried
    raise errors.CannotRepresent(
        f"{first(updates[0]).where}: no one sparsity makes peft train as many entries of every module as the file has"
    )


def _super_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    ranks = {u.module: METHODS["supertuning"].rank(u) for u in updates}
    r = alike(updates, "r", ranks)
    kept = alike(updates, "save_precomputed_indices", {u.module: "indices" in u.tensors for u in updates})
    out: dict[str, Any] = {"r": r, "lora_alpha": None, "save_precomputed_indices": kept, "sparsity": _sparsity(updates)}
    top = {u.module: u.options.get("select_top") for u in updates}
    if None in top.values() and not kept:
        raise unknown(updates[0], "select_top", "whether the largest or the smallest entries of the base are meant")
    out["select_top"] = True if None in top.values() else alike(updates, "select_top", top)
    if r is not None:
        alphas = {u.module: u.options.get("lora_alpha") for u in updates}
        if None in alphas.values():
            raise unknown(updates[0], "lora_alpha", "it scales the LoRA of Supra")
        out["lora_alpha"] = alike(updates, "lora_alpha", alphas)
    return out


def _super_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        rank = METHODS["supertuning"].rank(update)
        if view.fields.get("r") != rank:
            yield contradiction(update, view, "r", rank)
        saved = "indices" in update.tensors
        if bool(view.fields.get("save_precomputed_indices", True)) != saved:
            yield contradiction(update, view, "save_precomputed_indices", saved)
        said, has = number(view, "lora_alpha", kinds=(int, float)), update.options.get("lora_alpha")
        if rank is not None and has is not None and has != (2 * rank if said is None else said):
            yield contradiction(update, view, "lora_alpha", has)
        size, sparsity = _size(update), number(view, "sparsity", 0.99, (int, float))
        if size is not None and _keeps(size, sparsity) != update.tensors["values"].numel:
            yield contradiction(update, view, "sparsity", _sparsity(updates))


SUPERTUNING = PeftMethod(
    "SUPERTUNING",
    "supertuning",
    "Super-Tuning",
    rank="",
    shaping=("r", "lora_alpha", "save_precomputed_indices", "sparsity", "select_top"),
    nulls=("r", "lora_alpha"),
    narrowing=(),
    known=("lora_dropout", "init_weights"),
    defaults=defaults("SUPERTUNING", lora_dropout=0.0, init_weights=True, modules_to_save=None),
    fields=_super_fields,
    problems=_super_problems,
    options=_super_options,
    needs="the modules' shapes; without its indices, the base's weights",
    lost=("lora_alpha", "select_top"),
)


# ---- BEFT, LN tuning ----------------------------------------------------------------------------------------

BEFT = PeftMethod(
    "BEFT",
    "beft",
    "BEFT",
    rank="",
    narrowing=(),
    known=("init_weights",),
    defaults=defaults("BEFT", init_weights=True, modules_to_save=None),
)
LN_TUNING = PeftMethod(
    "LN_TUNING",
    "ln_tuning",
    "LN tuning",
    rank="",
    narrowing=("exclude_modules",),
    defaults=defaults("LN_TUNING", modules_to_save=None),
    needs="the base's weights",
)


# ---- AdaMSS -------------------------------------------------------------------------------------------------


def _pairs(update: Update) -> list[tuple[LazyTensor, LazyTensor]]:
    count = sum(role.startswith("A.") for role in update.tensors)
    return [(update.tensors[f"A.{i}"], update.tensors[f"B.{i}"]) for i in range(count)]


def _largest(update: Update) -> int:
    """The most directions that peft finds of the module."""
    return min(sum(b.shape[0] for _, b in _pairs(update)), update.tensors["newB"].shape[1])


def _adamss_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`r`, `num_subspaces`, `subspace_rank`, `use_dynamic_rank`, of which peft cuts the first three to a module's size.

    Raises `CannotRepresent` where no config makes peft build these shapes.
    """
    pairs = [pair for u in updates for pair in _pairs(u)]
    rank = max(a.shape[0] for a, _ in pairs)
    out = {
        "r": max(u.tensors["newB"].shape[0] for u in updates),
        "num_subspaces": max(len(_pairs(u)) for u in updates),
        "subspace_rank": rank,
        "use_dynamic_rank": any(a.shape[0] != min(b.shape[0], rank) for a, b in pairs),
    }
    for update in updates:
        for name, has, most in _sizes(update):
            if has != min(out[name], most):
                raise errors.CannotRepresent(
                    f"{update.name} has {name} {has} and another module {out[name]}; a config of AdaMSS says one for all"
                )
    return out


def _sizes(update: Update) -> Iterator[tuple[str, int, int]]:
    """What a module has of each field that peft cuts to its size, and that size."""
    yield "r", update.tensors["newB"].shape[0], _largest(update)
    yield "num_subspaces", len(_pairs(update)), sum(b.shape[0] for _, b in _pairs(update))


def _adamss_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    usual = {"r": 100, "num_subspaces": 5}
    for update in updates:
        for name, has, most in _sizes(update):
            if has != min(number(view, name, usual[name]), most):
                yield contradiction(update, view, name, has)
        rank, dynamic = number(view, "subspace_rank", 1), bool(view.fields.get("use_dynamic_rank", False))
        for a, b in _pairs(update):
            most = min(b.shape[0], rank)
            if a.shape[0] > most or (not dynamic and a.shape[0] < most):
                yield contradiction(update, view, "subspace_rank", a.shape[0])
                break


ADAMSS = PeftMethod(
    "ADAMSS",
    "adamss",
    "AdaMSS",
    rank="",
    shaping=("r", "num_subspaces", "subspace_rank", "use_dynamic_rank"),
    settings=(
        Setting("random_seed", (int,), 0, about="it decides which rows belong together", least=0, most=(1 << 32) - 1),
    ),
    narrowing=("layers_to_transform", "layers_pattern"),
    known=(
        *("init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
        *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent", "svd_threshold"),
    ),
    defaults=defaults("ADAMSS", init_weights="orthogonal", modules_to_save=None),
    fields=_adamss_fields,
    problems=_adamss_problems,
    needs="the base's weights",
)


# ---- OSF ----------------------------------------------------------------------------------------------------


def _side(update: Update) -> tuple[int, int]:
    """The smaller side of the weight, and how many singular values stay."""
    u, v = update.tensors["U_low"], update.tensors["V_low"]
    side = min(u.shape[0], v.shape[1])
    return side, side - u.shape[1]


def _kept(value: Any, side: int) -> int:
    """How many singular values a config keeps of a module: a number, a share, or half of them."""
    if value is None:
        return side // 2
    found = int(side * value) if isinstance(value, float) and 0 < value <= 1 else int(value)
    return max(min(side, found), 0)


def _osf_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`effective_rank` and its exceptions, which peft searches for anywhere in a name."""
    sides = {u.module: _side(u) for u in updates}
    if all(_kept(None, side) == kept for side, kept in sides.values()):
        return {"effective_rank": None, "rank_pattern": None}
    # A module that keeps all says only that there is no less to keep.
    counted = [kept for side, kept in sides.values() if kept < side] or [max(side for side, _ in sides.values())]
    usual = max(set(counted), key=lambda kept: (counted.count(kept), kept))
    others = {f"^{re.escape(m)}$": kept for m, (side, kept) in sorted(sides.items()) if _kept(usual, side) != kept}
    return {"effective_rank": usual, "rank_pattern": others or None}


def _found(pattern: str, module: str, where: str) -> bool:
    """Whether peft would find the pattern in a module's name.

    Raises `UnreadableFile` for one that is no regular expression, or may take for ever.
    """
    from adapterops_formats.peft_config import _compile

    _compile(where, "rank_pattern", pattern)
    return re.search(pattern, module) is not None


def _osf_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    patterns = view.fields.get("rank_pattern") or {}
    usual = number(view, "effective_rank", kinds=(int, float))
    if not isinstance(patterns, Mapping) or any(type(v) not in (int, float) for v in patterns.values()):
        raise errors.UnreadableFile(
            f"{view.where}: rank_pattern is {patterns!r:.80}; it must be a table of numbers", fault="config-type"
        )
    for update in updates:
        side, kept = _side(update)
        said = next((v for k, v in patterns.items() if _found(k, update.module, view.where)), usual)
        if _kept(said, side) != kept:
            yield contradiction(update, view, "effective_rank", kept)


OSF = PeftMethod(
    "OSF",
    "osf",
    "OSF",
    rank="",
    shaping=("effective_rank", "rank_pattern"),
    nulls=("effective_rank", "rank_pattern"),
    narrowing=(),
    known=("init_weights", "target_svd_config"),
    defaults=defaults("OSF", init_weights=True, modules_to_save=None),
    fields=_osf_fields,
    problems=_osf_problems,
    needs="the base's weights",
)


# ---- PEANuT -------------------------------------------------------------------------------------------------


def _depth(update: Update) -> int:
    return sum(role.startswith("encoders.") for role in update.tensors)


def _peanut_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    return {"depth": alike(updates, "depth", {u.module: _depth(u) for u in updates})}


def _peanut_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        if view.fields.get("depth", 0) != _depth(update):
            yield contradiction(update, view, "depth", _depth(update))


PEANUT = PeftMethod(
    "PEANUT",
    "peanut",
    "PEANuT",
    ranks_in="",
    rank_default=32,
    shaping=("depth",),
    settings=(
        Setting("act_fn", (str,), "relu", asked=True, about="another activation makes another change of the weight"),
        Setting("scaling", (int, float), 1.0, asked=True, about="it multiplies the whole change"),
    ),
    known=("init_weights",),
    defaults=defaults("PEANUT", init_weights=True, modules_to_save=None),
    fields=_peanut_fields,
    problems=_peanut_problems,
    needs="the base's weights",
    lost=("act_fn", "scaling"),
)


# ---- trainable tokens ---------------------------------------------------------------------------------------


def _token_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    found = stated(config, given, "token_indices")
    if found is None or entry.options.get("kind") != "alone":
        return {}
    if not isinstance(found, Sequence) or not all(type(i) is int and i >= 0 for i in found):
        raise errors.UnreadableFile(
            f"{first_of(entry).where}: token_indices must be a list of token numbers", fault="config-type"
        )
    return {"indices": list(found)}


def first_of(entry: Group) -> LazyTensor:
    """The tensor of a group that a message names."""
    return next(iter(entry.tensors.values()))


def _token_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    silent = next((u for u in updates if "indices" not in u.options), None)
    if silent is not None:
        raise unknown(silent, "token_indices", f"which {silent.tensors['delta'].shape[0]} tokens its rows are for")
    return {"token_indices": alike(updates, "token_indices", {u.module: list(u.options["indices"]) for u in updates})}


def _token_problems(view: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        has = update.options.get("indices")
        if has is not None and view.fields.get("token_indices") != list(has):
            yield contradiction(update, view, "token_indices", has)


TRAINABLE_TOKENS = PeftMethod(
    "TRAINABLE_TOKENS",
    "trainable_tokens",
    "trainable tokens",
    rank="",
    shaping=("token_indices",),
    narrowing=(),
    saves=False,
    known=("init_weights",),
    defaults=defaults("TRAINABLE_TOKENS", init_weights=True),
    fields=_token_fields,
    problems=_token_problems,
    options=_token_options,
    needs="the base's weights",
    lost=("token_indices",),
)
