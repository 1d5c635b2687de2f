"""Methods in PEFT configs whose tensors stand once for the whole model: VeRA, PVeRA, RandLoRA, VB-LoRA, TinyLoRA, FRoD.

Sources: huggingface/peft 0.21.2 `tuners/{vera,pvera,randlora,vblora,tinylora,frod}/config.py` and `model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from adapterops_formats.peft_kinds.row import (
    LAST_SEED,
    Gathered,
    PeftMethod,
    Setting,
    Shared,
    defaults,
    same_tensor,
    with_tensors,
)
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import Architecture, Group, LazyTensor, Update, errors, maths

_LAYERS = ("layers_to_transform", "layers_pattern")
_FLAG = ("fan_in_fan_out",)
_COMMON: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


def _settled(name: str, default: Any, role: str) -> Any:
    """`options` for a row whose setting `name` says nothing where the tensor `role` is saved."""

    def options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
        return {name: default} if role in entry.tensors and name not in entry.options else {}

    return options


def _saved_all(updates: Sequence[Update], role: str, title: str) -> bool:
    """Whether the updates have the tensor.  Raises `CannotRepresent` where only some have."""
    lacking = [u for u in updates if role not in u.tensors]
    if lacking and len(lacking) < len(updates):
        having = next(u for u in updates if role in u.tensors)
        raise errors.CannotRepresent(
            f"{having.tensors[role].where}: {lacking[0].name} has no such tensor, and a config of {title} says "
            "save_projection for all modules or none; take the tensor out of the file, or get the other ones"
        )
    return bool(updates) and not lacking


def _insist_on_saved(config: Any, updates: Sequence[Update], role: str, name: str) -> Iterator[str]:
    """A sentence where the config says wrongly whether the tensors of a role were saved."""
    said = config.fields.get(name, True)
    for update in updates[:1]:
        if said is not None and bool(said) != (role in update.tensors):
            has = "holds them" if role in update.tensors else "holds none"
            yield (
                f"{next(iter(update.tensors.values())).where}: {config.where} says {name}={str(bool(said)).lower()} of the "
                f"projections ({role}), but the file {has}; --set {name}={str(not said).lower()}"
            )


# ---- VeRA and PVeRA -----------------------------------------------------------------------------------------

_SEED = Setting(
    "projection_prng_key",
    (int,),
    0,
    asked=True,
    about="it is the seed that the projections, which were not saved, are drawn from",
    least=0,
    most=LAST_SEED,
)


def _projection_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    return {"save_projection": _saved_all(updates, "A", "VeRA")}


def _projection_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    return _insist_on_saved(config, updates, "A", "save_projection")


def _projected(updates: list[Update]) -> list[Update]:
    """The updates, those without projections with the size of the largest module, if that of every one is known."""
    largest = maths("shared").largest

    own = [u for u in updates if u.method in ("vera", "pvera", "randlora")]
    shapes = [u.options.get("shape") for u in own]
    if not own or any(shape is None for shape in shapes) or all("A" in u.tensors for u in own):
        return updates
    size = largest([tuple(shape) for shape in shapes if shape])
    return [replace(u, options={**u.options, "projection": size}) if u in own else u for u in updates]


def _cut_from_one(updates: Sequence[Update]) -> str:
    """Projections that were not saved are drawn as large as the largest module needs them."""
    if all("A" in u.tensors for u in updates):
        return ""
    return "the projections, which were not saved, are drawn in the size of the largest module"


def _vera(kind: str, title: str, *more: str, settings: tuple[Setting, ...] = ()) -> PeftMethod:
    name = kind.lower()
    return PeftMethod(
        kind,
        name,
        title,
        ranks_in="",
        rank_default=256,
        shaping=("save_projection",),
        settings=(_SEED, *settings),
        narrowing=_LAYERS,
        flags=_FLAG,
        biases=True,
        bias_only=f"{name}_only",
        known=("bias", f"{name}_dropout", "d_initial", "init_weights", *more),
        defaults=defaults(kind, **_COMMON, **{f"{name}_dropout": 0.0, "d_initial": 0.1, "init_weights": True}),
        shared=("A", "B"),
        fields=_projection_fields,
        problems=_projection_problems,
        options=_settled("projection_prng_key", 0, "A"),
        complete=_projected,
        together=_cut_from_one,
        needs="the module's in_features; the largest module's size where the projections were not saved",
        lost=("projection_prng_key, where the projections were not saved",),
    )


VERA = _vera("VERA", "VeRA")
PVERA = _vera("PVERA", "PVeRA", "generator_seed", settings=(Setting("sample_at_inference", (bool,), False),))

# ---- RandLoRA -----------------------------------------------------------------------------------------------

_SPARSE = tuple(
    Setting(name, (bool,), False, asked=True, about="it says how the projections, which were not saved, are drawn")
    for name in ("sparse", "very_sparse")
)


def _randlora_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """The settings that say nothing where the projections are saved."""
    idle = {"projection_prng_key": 0, "sparse": False, "very_sparse": False}
    return {k: v for k, v in idle.items() if "A" in entry.tensors and k not in entry.options}


def _randlora_gathered(updates: list[Update]) -> Gathered:
    """The projections, of which peft writes a copy under every module, too."""
    shared: dict[str, LazyTensor] = {}
    for update in updates:
        for role in ("A", "B"):
            if role in update.tensors:
                _one(shared, role, update.tensors[role], "RandLoRA")
    return updates, shared


def _one(shared: dict[str, LazyTensor], role: str, tensor: LazyTensor, title: str) -> None:
    """Keep a tensor that stands once.  Raises `CannotRepresent` for another one under the same role."""
    if not same_tensor(shared.setdefault(role, tensor), tensor):
        raise errors.CannotRepresent(
            f"{tensor.where} and {shared[role].where} differ, but PEFT keeps one {role} of {title} for both"
        )


RANDLORA = PeftMethod(
    "RANDLORA",
    "randlora",
    "RandLoRA",
    alpha="randlora_alpha",
    alphas_in="",
    ranks_in="",
    rank_default=32,
    shaping=("save_projection",),
    settings=(_SEED, *_SPARSE),
    narrowing=_LAYERS,
    flags=_FLAG,
    biases=True,
    bias_only="randlora_only",
    known=("bias", "randlora_dropout", "init_weights"),
    defaults=defaults("RANDLORA", **_COMMON, randlora_dropout=0.0, init_weights=True),
    fields=_projection_fields,
    problems=_projection_problems,
    options=_randlora_options,
    gather=_randlora_gathered,
    complete=_projected,
    together=_cut_from_one,
    needs="the module's shape; the largest module's where the projections were not saved",
    lost=("projection_prng_key, sparse and very_sparse, where the projections were not saved",),
)

# ---- VB-LoRA ------------------------------------------------------------------------------------------------

_FEW = "logits_A_topk_indices"


def _vblora_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """K, where only the topk weights were saved."""
    indices = entry.tensors.get(_FEW)
    return {"topk": indices.shape[2]} if indices is not None and len(indices.shape) == 3 else {}


def _vblora_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    bank = updates[0].tensors["bank"]
    few = [u for u in updates if _FEW in u.tensors]
    if few and len(few) < len(updates):
        other = next(u for u in updates if _FEW not in u.tensors)
        raise errors.CannotRepresent(
            f"{few[0].name} has the topk weights alone and {other.name} all logits; a config of VB-LoRA says "
            "save_only_topk_weights for all"
        )
    return {"num_vectors": bank.shape[0], "vector_length": bank.shape[1], "save_only_topk_weights": bool(few)}


def _vblora_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    usual = {"num_vectors": 256, "vector_length": 256, "save_only_topk_weights": False}
    return _differ(config, updates, _vblora_fields(updates, base) if updates else {}, usual)


def _differ(config: Any, updates: Sequence[Update], has: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every field that is not what the tensors have."""
    for name, value in has.items():
        said = config.fields.get(name, usual[name])
        if said is not None and said != value:
            yield (
                f"{next(iter(updates[0].tensors.values())).where}: {name} is {value} by the tensors, but {config.where} says "
                f"{said!r:.60}; --set {name}={str(value).lower() if isinstance(value, bool) else value}"
            )


VBLORA = PeftMethod(
    "VBLORA",
    "vblora",
    "VB-LoRA",
    ranks_in="",
    rank_default=4,
    shaping=("num_vectors", "vector_length", "save_only_topk_weights"),
    settings=(Setting("topk", (int,), 2, asked=True, about="it says how many vectors of the bank are mixed"),),
    flags=_FLAG,
    biases=True,
    bias_only="vblora_only",
    known=("bias", "vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
    defaults=defaults("VBLORA", **_COMMON, vblora_dropout=0.0),
    shared=("bank",),
    fields=_vblora_fields,
    problems=_vblora_problems,
    options=_vblora_options,
    lost=("topk, where all logits were saved",),
)

# ---- TinyLoRA -----------------------------------------------------------------------------------------------


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _tiny_spread(shared: Shared, members: Sequence[Group], architecture: Architecture | None) -> None:
    """Every module gets the vectors of all groups, and its number where the base says the order.

    Raises `BrokenAdapter` where there is none, or none with the number of a group.
    """
    if not shared:
        raise errors.BrokenAdapter(
            f"{next(iter(members[0].tensors.values())).where}: its counterpart tinylora_v is missing from the file; half an "
            "update cannot be applied"
        )
    # In a state dict that was saved by hand the adapter's name stands before the number.
    shared = {f"v.{role.rpartition('.')[2]}": tensor for role, tensor in shared.items()}
    for number in range(len(shared)):
        if f"v.{number}" not in shared:
            raise errors.BrokenAdapter(
                f"{next(iter(shared.values())).where}: {len(shared)} vectors, but number {number} is missing from the file"
            )
    order = in_order([entry.name for entry in members], architecture)
    parts = architecture.components.values() if architecture is not None else ()
    for entry in members:
        entry.tensors.update(shared)
        if order is not None:
            entry.options["index"] = order[entry.name]
        if any((spec := part.spec(entry.name)) is not None and spec.kind == "embedding" for part in parts):
            entry.options["kind"] = "embedding"


def in_order(names: Sequence[str], architecture: Architecture | None) -> dict[str, int] | None:
    """The number of every module in the order of the base; None where the base is not known, or has others.

    A built-in table has the modules of a base, not the order in which its class makes them.
    """
    if architecture is None or architecture.builtin:
        return None
    wanted = set(names)
    for component in architecture.components.values():
        found = [name for name in component.modules if name in wanted]
        if len(found) == len(wanted):
            return {name: index for index, name in enumerate(found)}
    return None


def _tiny_complete(updates: list[Update]) -> list[Update]:
    """Each update with its group's vector alone, where the order of the modules is known or shows in its matrices."""
    group = maths("tinylora").group
    indices = maths("tinylora").indices

    own = [u for u in updates if u.method == "tinylora"]
    order = {u.module: u.options.get("index") for u in own}
    if None in order.values() and own and all("P" in u.tensors for u in own):
        seed = own[0].options.get("projection_seed", 42)
        order = dict(indices({u.module: u.tensors["P"] for u in own}, seed) or order)
    out = []
    for update in updates:
        vectors = {role: t for role, t in update.tensors.items() if role.startswith("v.")}
        index = order.get(update.module) if update.method == "tinylora" else None
        number = 0 if len(vectors) == 1 else None if index is None else group(index, len(own), len(vectors))
        role = f"v.{number}"
        if role in vectors:
            rest = {r: t for r, t in update.tensors.items() if r not in vectors}
            facts = {"group": number, **({} if index is None else {"index": index})}
            update = replace(update, tensors={**rest, "v": vectors[role]}, options={**update.options, **facts})
        out.append(update)
    return out


def _tiny_together(updates: Sequence[Update]) -> str:
    """A module's vector, and the matrices that were not saved, follow from its number among all modules."""
    if not updates or (_tiny_vectors(updates)[1] == 1 and all("P" in u.tensors for u in updates)):
        return ""
    return "which vector is a module's, and what its matrices are, follows from its number among all modules"


def _tiny_gathered(updates: list[Update]) -> Gathered:
    """The vectors by the numbers of their groups."""
    shared: dict[str, LazyTensor] = {}
    out = []
    for update in updates:
        for role, tensor in update.tensors.items():
            if role == "v":
                _one(shared, f"v.{update.options.get('group', 0)}", tensor, "TinyLoRA")
            elif role.startswith("v."):
                _one(shared, role, tensor, "TinyLoRA")
        out.append(with_tensors(update, {r: t for r, t in update.tensors.items() if r[:2] not in ("v", "v.")}))
    return out, dict(sorted(shared.items(), key=lambda item: int(item[0][2:])))


def _tiny_vectors(updates: Sequence[Update]) -> tuple[LazyTensor, int]:
    """One of the vectors, and how many there are."""
    first = updates[0].tensors
    every = [t for role, t in first.items() if role.startswith("v.")]
    if every:
        return every[0], len(every)
    return first["v"], len({u.options.get("group", 0) for u in updates})


def _tiny_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    vector, groups = _tiny_vectors(updates)
    return {
        "r": max(u.tensors["A"].shape[0] for u in updates),
        "u": vector.numel,
        "weight_tying": 1.0 if groups == 1 else 1 - groups / len(updates),
        "save_projection": _saved_all(updates, "P", "TinyLoRA"),
    }


def _tiny_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    if not updates:
        return
    yield from _insist_on_saved(config, updates, "P", "save_projection")
    vector, groups = _tiny_vectors(updates)
    yield from _differ(config, updates, {"u": vector.numel}, {"u": 64})
    tying = config.fields.get("weight_tying", 0.0)
    if tying is not None and not (_is_share(tying) and max(1, round(len(updates) * (1 - tying))) == groups):
        yield (
            f"{vector.where}: {groups} vectors for {len(updates)} modules, but {config.where} says weight_tying={tying!r:.60}; "
            "--set weight_tying=null derives it anew"
        )
    rank = config.fields.get("r", 2)
    for update in updates:
        a, b = update.tensors["A"], update.tensors["B"]
        if rank is not None and (type(rank) is not int or a.shape[0] != min(rank, a.shape[1], b.shape[0])):
            yield f"{a.where} has rank {a.shape[0]}, but {config.where} says r={rank!r:.60}; --set r=null derives it anew"


TINYLORA = PeftMethod(
    "TINYLORA",
    "tinylora",
    "TinyLoRA",
    rank="",
    shaping=("r", "u", "weight_tying", "save_projection"),
    settings=(
        Setting(
            "projection_seed",
            (int,),
            42,
            asked=True,
            about="it is the seed that the matrices, which were not saved, are drawn from",
            least=0,
            most=LAST_SEED,
        ),
    ),
    narrowing=_LAYERS,
    flags=_FLAG,
    biases=True,
    bias_only="tinylora_only",
    known=("bias", "tinylora_dropout", "init_v_bound", "init_weights"),
    defaults=defaults("TINYLORA", **_COMMON, tinylora_dropout=0.0, init_weights=True),
    fields=_tiny_fields,
    problems=_tiny_problems,
    options=_settled("projection_seed", 42, "P"),
    spread=_tiny_spread,
    gather=_tiny_gathered,
    complete=_tiny_complete,
    together=_tiny_together,
    needs="the order of the base's modules, unless the projections were saved",
    lost=("projection_seed, where the projections were not saved",),
)

# ---- FRoD ---------------------------------------------------------------------------------------------------

_BASIS = ("V", "s_indices", "s_size")


def _frod_spread(shared: Shared, members: Sequence[Group], architecture: Architecture | None) -> None:
    """Every module gets the basis of its category.  Raises `BrokenAdapter` for a basis that no module has."""
    category = maths("frod").category

    # In a state dict that was saved by hand the adapter's name stands behind the category.
    shared = {".".join(name.split(".")[:2]): tensor for name, tensor in shared.items()}
    used: set[str] = set()
    for entry in members:
        for role in _BASIS:
            name = f"{role}.{category(entry.name)}"
            if name in shared:
                entry.tensors[role] = shared[name]
                used.add(name)
    idle = next((name for name in shared if name not in used), None)
    if idle is not None:
        raise errors.BrokenAdapter(
            f"{shared[idle].where}: is for modules whose names end in {idle.partition('.')[2]!r} (two parts joined by an "
            "underscore), and the file has none; its other tensors were renamed, or lost"
        )


def _frod_gathered(updates: list[Update]) -> Gathered:
    category = maths("frod").category

    shared: dict[str, LazyTensor] = {}
    out = []
    for update in updates:
        for role in _BASIS:
            if role in update.tensors:
                _one(shared, f"{role}.{category(update.module)}", update.tensors[role], "FRoD")
        out.append(with_tensors(update, {r: t for r, t in update.tensors.items() if r not in _BASIS}))
    return out, shared


def _frod_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """Raises `CannotRepresent` where no rate makes peft's layers as large as the tensors."""
    return {"save_projection": _saved_all(updates, "V", "FRoD"), "sparse_rate": _rate(updates)}


def _sizes(updates: Iterable[Update]) -> set[tuple[int, int]]:
    """in_features, and how many numbers stand beside the diagonal."""
    return {(u.tensors["lambda_l"].numel, u.tensors["lambda_s_values"].numel) for u in updates}


def _entries(inputs: int, rate: float) -> int:
    """How many numbers peft keeps beside the diagonal of (in, in)."""
    most = inputs * (inputs - 1)
    kept = min(int(inputs * inputs * rate), most)
    return max(1, kept) if rate > 0 and most else kept


def _rate(updates: Sequence[Update]) -> float:
    """The shortest number that gives every module as many entries as it has."""
    sizes = _sizes(updates)
    low = max(Fraction(count if count > 1 else 0, n * n) for n, count in sizes)
    for digits in range(18):
        scale = 10**digits
        rate = -(-low.numerator * scale // low.denominator) / scale or 1 / scale
        for found in (0.01, 0.0, rate):
            if all(_entries(n, found) == count for n, count in sizes):
                return found
    update = updates[0]
    raise errors.CannotRepresent(
        f"{update.tensors['lambda_s_values'].where}: no sparse_rate gives modules with "
        f"{', '.join(str(n) for n, _ in sorted(sizes))} inputs {', '.join(str(k) for _, k in sorted(sizes))} numbers"
    )


def _frod_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    yield from _insist_on_saved(config, updates, "V", "save_projection")
    rate = config.fields.get("sparse_rate", 0.01)
    for update in updates:
        ((inputs, count),) = _sizes([update])
        if rate is not None and not (_is_share(rate) and _entries(inputs, rate) == count):
            yield (
                f"{update.tensors['lambda_s_values'].where}: {count} numbers, but {config.where} says "
                f"sparse_rate={rate!r:.60}; --set sparse_rate=null derives it anew"
            )


FROD = PeftMethod(
    "FROD",
    "frod",
    "FRoD",
    rank="",
    shaping=("save_projection", "sparse_rate"),
    settings=(
        _SEED._replace(about="it is the seed of the sparse part's positions, which were not saved"),
        Setting(
            "regularization_alpha",
            (float,),
            1e-3,
            asked=True,
            about="peft builds its basis from the base's weights with it, also where one was saved",
        ),
    ),
    narrowing=_LAYERS,
    flags=_FLAG,
    biases=True,
    bias_only="frod_only",
    known=("bias", "frod_dropout", "init_weights", "progressbar", "runtime_offload_base_weight"),
    defaults=defaults("FROD", **_COMMON, frod_dropout=0.0, init_weights=True),
    fields=_frod_fields,
    problems=_frod_problems,
    options=_settled("projection_prng_key", 0, "V"),
    spread=_frod_spread,
    gather=_frod_gathered,
    needs="the base's weight; a saved basis",
    lost=("regularization_alpha", "projection_prng_key, where the projections were not saved"),
)
