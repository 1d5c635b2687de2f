"""MiSS, Bone, GraLoRA and C3A in PEFT configs: blocks of a weight, whose sizes the tensors' shapes show.

Sources: huggingface/peft 0.21.2 `tuners/miss/config.py`, `tuners/gralora/config.py`, `tuners/c3a/config.py` and
`tuners/c3a/model.py`; peft 0.17.1 `tuners/bone/config.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterops_formats.peft_kinds.row import PeftMethod, defaults, weight_of
from adapterops_formats.peft_patterns import Base, pattern_table, shortest_suffixes

from adapterops.plugin import Architecture, Certainty, Group, LazyTensor, Update, errors

STANDARD, MINI, BAT = "standard MiSS", "mini", "bat"
"""The kinds of MiSS, as messages call them."""
_LAYERS = ("layers_to_transform", "layers_pattern")


def one_for_all(values: Mapping[str, Any], name: str, title: str) -> Any:
    """The value that all modules have.  Raises `CannotRepresent` where they differ, since the config says one."""
    first, value = next(iter(values.items()))
    other = next((module for module in values if values[module] != value), None)
    if other is not None:
        raise errors.CannotRepresent(
            f"{first} has {name} {value} and {other} {values[other]}; a config of {title} says one for all: split the "
            "adapter into two files"
        )
    return value


def shape_of(update: Update, base: Base) -> tuple[int, ...] | None:
    """The shape of the module's weight, where the base is known."""
    shape = base.shapes.get(update.module) or update.options.get("shape")
    return None if shape is None else tuple(shape)


def stated_of(config: Any, name: str, default: Any) -> Any:
    """What a `PeftConfig` says of a field, or leaves to peft; None where only the user speaks, and not of this."""
    if config is None or (config.certainty is Certainty.GIVEN and name not in config.fields):
        return None
    return config.fields.get(name, default)


# ---- MiSS and Bone ------------------------------------------------------------------------------------------


def _kind(update: Update, base: Base) -> str | None:
    """Which MiSS the tensor is of; None where it may be standard or mini."""
    block, shape = update.tensors["block"], shape_of(update, base)
    if len(block.shape) == 3:
        return BAT
    if shape is None:
        return None
    return STANDARD if block.shape[1] == shape[0] else MINI


def _miss_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """What a config says of the kind, unless the tensor is plainly of another (which `_miss_problems` then tells)."""
    block = entry.tensors.get("block")
    if block is None or len(block.shape) < 2 or "init_weights" in entry.options:
        return {}  # `check` says what is wrong with it
    stated = True if _is_bone(block) and len(block.shape) == 2 else stated_of(config, "init_weights", True)
    if stated is None or (stated == "bat") != (len(block.shape) == 3):
        return {}
    if stated == "mini":
        return {"init_weights": "mini", "mini_r": block.shape[1]}
    fitting = stated == "bat" or not weight or weight[0] == block.shape[1]
    return {"init_weights": stated} if fitting else {}


def _miss_meant(
    groups: list[Group], config: Any, given: Mapping[str, Any], architecture: Architecture | None, said: list[str]
) -> list[Group]:
    """The groups; blocks of different widths are standard, whatever a config says, since mini has one mini_r for all."""
    blocks = {g.name: (g, t) for g in groups if g.method == "miss" and (t := g.tensors.get("block")) is not None}
    flat = {name: t for name, (g, t) in blocks.items() if len(t.shape) == 2 and not _is_bone(t)}
    if len({t.shape[1] for t in flat.values()}) > 1 and stated_of(config, "init_weights", True) == "mini":
        for name in flat:
            blocks[name][0].options["init_weights"] = True
    open_ = {name: t for name, t in flat.items() if not weight_of(blocks[name][0], architecture)}
    if not open_ or stated_of(config, "init_weights", True) is not None:
        return groups
    if _either(open_):
        said.append(f"unknown: init_weights of MiSS: {_ask(open_)}")
    else:
        said.append(
            "no config is beside the tensors: blocks (r, n) of modules that no base shows are taken for standard MiSS of "
            "modules with n outputs; for mini say --set init_weights=mini"
        )
    return groups


def _either(blocks: Mapping[str, LazyTensor]) -> bool:
    """Whether blocks of modules of unknown size may as well be mini's as standard ones.

    Standard blocks are as wide as their modules have outputs; one width for modules of several names is rather a mini_r, and
    so is one that is not above r.
    """
    names = {name.rpartition(".")[2] for name in blocks}
    if len({block.shape[1] for block in blocks.values()}) > 1:
        return False
    return len(names) > 1 or any(block.shape[1] <= block.shape[0] for block in blocks.values())


def _ask(blocks: Mapping[str, LazyTensor]) -> str:
    shape = next(iter(blocks.values())).shape
    return (
        f"every block is {list(shape)}: either every module has {shape[1]} outputs, or it is mini: say --base CONFIG, or "
        "--set init_weights=true, or --set init_weights=mini"
    )


def _miss_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`init_weights` and `mini_r`.

    Raises `CannotRepresent` where modules are of different kinds, `UnknownFact` where nothing tells the kind.
    """
    open_ = {
        u.module: u.tensors["block"] for u in updates if "init_weights" not in u.options and _kind(u, base) is None
    }
    if len(open_) == len(updates) and _either(open_):
        raise errors.UnknownFact(f"{next(iter(open_.values())).where}: {_ask(open_)}")
    kinds = {u.module: MINI if u.options.get("init_weights") == "mini" else _kind(u, base) or STANDARD for u in updates}
    widths = {u.module: u.tensors["block"].shape[1] for u in updates}
    if MINI in kinds.values():
        # mini whose mini_r is a module's own out_features looks like the standard one there.
        usual = next(widths[module] for module, kind in kinds.items() if kind == MINI)
        kinds = {m: MINI if kind == STANDARD and widths[m] == usual else kind for m, kind in kinds.items()}
    kind = one_for_all(kinds, "the kind", "MiSS")
    if kind == MINI:
        return {"init_weights": "mini", "mini_r": one_for_all(widths, "mini_r", "MiSS")}
    return {"init_weights": "bat" if kind == BAT else True}


def _kind_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config is for blocks of another kind."""
    stated = config.fields.get("init_weights", True)
    mini = config.fields.get("mini_r", 1)
    wanted = {"bat": BAT, "mini": MINI}.get(stated if isinstance(stated, str) else "", STANDARD)
    for update in updates:
        block, kind = update.tensors["block"], _kind(update, base)
        fits = wanted != MINI or mini is None or block.shape[1] == mini
        same = kind == wanted or (wanted == MINI and kind == STANDARD) or (kind is None and wanted != BAT)
        if stated is not None and not (same and fits):
            has = f"has mini_r {block.shape[1]}" if same else f"is of {kind or f'{STANDARD} or {MINI}'}"
            says = f"init_weights={json.dumps(stated)}" + (f", mini_r={mini}" if wanted == MINI else "")
            yield (
                f"{block.where}: the block {list(block.shape)} of {update.module} {has}, but {config.where} says {says}; "
                "--set init_weights=null derives it anew" + (" (and --set mini_r=null)" if wanted == MINI else "")
            )


def _miss_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """The same, and modules that have fewer inputs than r."""
    yield from _kind_problems(config, updates, base)
    for update in updates:
        block, shape = update.tensors["block"], shape_of(update, base)
        if shape is not None and len(block.shape) == 2 and block.shape[0] > shape[1]:
            yield (
                f"{block.where}: r is {block.shape[0]}, but {update.module} has {shape[1]} inputs; Bone allowed that, and "
                "peft's MiSS does not: no config makes peft load it"
            )


def _is_bone(block: LazyTensor) -> bool:
    return "bone_block" in block.key.split(".")


def _miss_today(entry: Group, config: Any) -> str:
    """What was done with tensors of Bone."""
    block = entry.tensors.get("block")
    if block is None:
        return ""
    if _is_bone(block):
        return "Bone is read as MiSS: the same update, which peft calls so since 0.17 (bone_block is miss_block now)"
    return ""


MISS = PeftMethod(
    "MISS",
    "miss",
    "MiSS",
    ranks_in="",
    rank_default=64,
    shaping=("init_weights", "mini_r"),
    biases=True,
    bias_only="MiSS_only",
    known=("miss_dropout", "bias"),
    defaults=defaults("MISS", miss_dropout=0.0, mini_r=1, bias="none", modules_to_save=None),
    fields=_miss_fields,
    problems=_miss_problems,
    options=_miss_options,
    today=_miss_today,
    meant=_miss_meant,
    needs="the module's shape; for bat the base weight",
)
BONE = PeftMethod(
    "BONE",
    "miss",
    "Bone",
    now="MISS",
    ranks_in="",
    rank_default=64,
    shaping=("init_weights",),
    biases=True,
    bias_only="bone_only",
    known=("bias",),
    defaults=defaults("BONE", bias="none", modules_to_save=None),
    problems=_kind_problems,
    options=_miss_options,
    today=_miss_today,
    needs="the module's shape; for bat the base weight. peft 0.14 to 0.18 only: it is written as MiSS",
)


# ---- GraLoRA ------------------------------------------------------------------------------------------------


def _gralora_shown(update: Update) -> dict[str, int]:
    """The fields that one update's shapes show."""
    general, a = update.tensors.get("A_general"), update.tensors["A"]
    return {"r": a.shape[2], "gralora_k": a.shape[0], "hybrid_r": general.shape[0] if general is not None else 0}


def _gralora_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """r, `gralora_k` and `hybrid_r`.  Raises `CannotRepresent` where modules differ in one."""
    shown = {u.module: _gralora_shown(u) for u in updates}
    return {name: one_for_all({m: values[name] for m, values in shown.items()}, name, "GraLoRA") for name in _GRALORA}


def _gralora_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        shown = _gralora_shown(update)
        for name, default in _GRALORA.items():
            stated = config.fields.get(name, default)
            if stated is not None and stated != shown[name]:
                yield (
                    f"{update.tensors['A'].where}: {name} of {update.module} is {shown[name]}, but {config.where} says "
                    f"{stated}; --set {name}=null derives it anew"
                )


def _gralora_divided(config: Any, updates: Sequence[Update]) -> dict[str, tuple[int, int]]:
    """r + `hybrid_r`, of which either may be left to the tensors (null)."""
    out = {}
    for update in updates:
        shown = _gralora_shown(update)
        said = {name: config.fields.get(name, _GRALORA[name]) for name in ("r", "hybrid_r")}
        own = [shown[name] if value is None else value for name, value in said.items()]
        out[update.module] = (sum(own), shown["r"] + shown["hybrid_r"])
    return out


_GRALORA = {"r": 32, "gralora_k": 2, "hybrid_r": 0}
"""The fields that shapes show, and what peft takes where a config lacks them."""
GRALORA = PeftMethod(
    "GRALORA",
    "gralora",
    "GraLoRA",
    alpha="alpha",
    alphas_in="",
    rank="",
    shaping=tuple(_GRALORA),
    narrowing=_LAYERS,
    flags=("fan_in_fan_out",),
    biases=True,
    bias_only="gralora_only",
    known=("gralora_dropout", "bias", "init_weights"),
    defaults=defaults(
        "GRALORA", gralora_dropout=0.0, bias="none", fan_in_fan_out=False, init_weights=True, modules_to_save=None
    ),
    fields=_gralora_fields,
    problems=_gralora_problems,
    divided=_gralora_divided,
    divisor="r + hybrid_r",
)


# ---- C3A ----------------------------------------------------------------------------------------------------


def _sizes(updates: Sequence[Update], base: Base) -> dict[str, int]:
    return {u.module: u.tensors["kernel"].shape[2] for u in updates}


def _size_said(fields: Mapping[str, Any], module: str) -> Any:
    """The block size that peft's C3A gives a module: by a pattern behind a dot, or by the whole name."""
    table = fields.get("block_size_pattern") or {}
    key = next((key for key in table if re.match(rf".*\.{key}$", module)), module)
    return table.get(key, fields.get("block_size", 256))


def _c3a_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`block_size` and `block_size_pattern`, whose keys peft does not look up as it does those of other tables.

    Raises `CannotRepresent` where names stand in each other's way.
    """
    sizes = _sizes(updates, base)
    usual, _ = pattern_table(sizes, base)
    table: dict[str, int] = {}
    for size in sorted(set(sizes.values()) - {usual}):
        chosen = {module for module in sizes if sizes[module] == size}
        for name, ending in sorted(shortest_suffixes(chosen, sizes).items()):
            table[name if ending == name else re.escape(ending)] = size
    fields = {"block_size": usual, "block_size_pattern": table}
    wrong = next((m for m in sizes if _size_said(fields, m) != sizes[m]), None)
    if wrong is not None:
        raise errors.CannotRepresent(
            f"{wrong}: no block_size_pattern gives it block_size {sizes[wrong]} and other modules theirs, since its name "
            "is the end of another one"
        )
    return fields


def _c3a_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    for update in updates:
        kernel, stated = update.tensors["kernel"], _size_said(config.fields, update.module)
        if stated is not None and stated != kernel.shape[2]:
            yield (
                f"{kernel.where}: the kernel {list(kernel.shape)} of {update.module} has block_size {kernel.shape[2]}, but "
                f"{config.where} says {stated} for it (block_size or block_size_pattern); --set block_size={kernel.shape[2]}, or "
                f"--set block_size_pattern='{{\"…\": {kernel.shape[2]}}}'"
            )


C3A = PeftMethod(
    "C3A",
    "c3a",
    "C3A",
    rank="block_size",
    ranks_in="block_size_pattern",
    rank_default=256,
    narrowing=_LAYERS,
    biases=True,
    bias_only="c3a_only",
    known=("bias", "init_weights"),
    defaults=defaults("C3A", bias="none", init_weights="xavier_uniform", modules_to_save=None),
    fields=_c3a_fields,
    problems=_c3a_problems,
    ranks=_sizes,
)
