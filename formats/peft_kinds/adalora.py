"""AdaLoRA in PEFT configs.

`init_r` is the number of triplets that every module began with, by which the scale is divided; `rank_pattern` holds for each
module's `lora_E` which of them are left, and the tensors are as small as it says.  `r`, `use_rslora` and patterns of alpha have
no effect.  Source: huggingface/peft 0.21.2 `tuners/adalora/config.py`, `tuners/adalora/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops_formats.peft_kinds.row import PeftMethod, defaults
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Architecture, Group, Update, errors

_DEFAULT = 12
"""peft's `init_r` where a config says none."""


def _meant(
    groups: list[Group], config: Any, given: Mapping[str, Any], architecture: Architecture | None, said: list[str]
) -> list[Group]:
    """Where no config says it, `init_r` is the rank that all modules have: then nothing was taken away.

    Raises `BrokenAdapter` for factors that are no matrices.
    """
    own = [g for g in groups if g.method == "adalora" and "ranknum" not in g.tensors and "A" in g.tensors]
    for factor in (t for g in groups if g.method == "adalora" for role, t in g.tensors.items() if role in "AB"):
        if len(factor.shape) != 2:
            raise errors.BrokenAdapter(f"{factor.where}: shape {list(factor.shape)}; a factor of AdaLoRA is a matrix")
    ranks = {g.tensors["A"].shape[0] for g in own}
    stated = config.fields if config is not None else {}
    if len(ranks) == 1 and "init_r" not in stated and (config is None or stated is given or not _is_read(config)):
        rank = ranks.pop()
        for entry in own:
            entry.options["init_r"] = rank
        said.append(f"every module has {rank} triplets, so init_r is taken to be {rank}; --set init_r=N says otherwise")
    return groups


def _is_read(config: Any) -> bool:
    return str(config.certainty) == "read"


def _options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """`init_r`, and which triplets of the module are left."""
    if config is None:
        return {}
    out: dict[str, Any] = {}
    stated = config.fields.get("init_r")
    if stated is not None or _is_read(config):
        out["init_r"] = _DEFAULT if stated is None else _count(stated, config.where)
    mask = _masks(config).get(entry.name)
    return out | ({"rank_pattern": list(mask)} if mask is not None else {})


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise errors.UnreadableFile(f"{where}: init_r is {value!r:.80}, not a number of triplets", fault="config-type")
    return value


def _masks(config: Any) -> dict[str, Sequence[bool]]:
    """Which triplets are left, by module.  Raises `UnreadableFile` for anything but lists of true and false."""
    pattern = config.fields.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise errors.UnreadableFile(
            f"{config.where}: rank_pattern of AdaLoRA is a list of true and false a module", fault="config-type"
        )
    out = {}
    for key, mask in pattern.items():
        listed = isinstance(mask, Sequence) and not isinstance(mask, str)
        if not listed or not all(type(left) in (bool, int) and left in (0, 1) for left in mask):
            raise errors.UnreadableFile(
                f"{config.where}: rank_pattern[{key!r}] is {mask!r:.60}; AdaLoRA's says of every triplet whether it is left "
                "(true or false)",
                fault="config-type",
            )
        # Saved by hand, a key ends with the adapter's name.
        out[key.partition(".lora_E")[0].removeprefix("base_model.model.")] = mask
    return out


def _started(update: Update) -> int:
    """`init_r`.  Raises `UnknownFact` where nothing says it."""
    value = update.options.get("init_r")
    if value is None:
        raise errors.UnknownFact(
            f"{update.tensors['E'].where}: modules have different numbers of triplets, and init_r, by which AdaLoRA divides "
            "alpha, is not in the tensors; say it with --set init_r=N"
        )
    return int(value)


def _fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`init_r` and `rank_pattern`.  Raises `CannotRepresent` where modules' alphas are divided by different numbers."""
    started = {u.module: _started(u) for u in updates}
    if len(set(started.values())) > 1:
        one, two = sorted(started, key=lambda name: started[name])[:: len(started) - 1]
        raise errors.CannotRepresent(
            f"alpha of {one} is divided by ranknum {started[one]}, and of {two} by {started[two]}; PEFT has one init_r for "
            "all; adapterops to-lora makes plain LoRA of it, with a rank for each module"
        )
    count = next(iter(started.values()), _DEFAULT)
    ranks = {u.module: METHODS[u.method].rank(u) or 0 for u in updates}
    if all(rank == count for rank in ranks.values()):
        return {"init_r": count, "rank_pattern": None}
    return {"init_r": count, "rank_pattern": {f"{u.module}.lora_E": _mask(u, count, ranks[u.module]) for u in updates}}


def _mask(update: Update, count: int, rank: int) -> list[bool]:
    """The recorded positions; where there are none, the first ones (peft draws the others anew and never uses them)."""
    recorded = update.options.get("rank_pattern")
    if recorded is not None and len(recorded) == count and sum(recorded) == rank:
        return [bool(left) for left in recorded]
    return [True] * rank + [False] * (count - rank)


def _problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where `init_r` and `rank_pattern` are not what the tensors show."""
    stated, masks = config.fields.get("init_r"), _masks(config)
    count = _DEFAULT if stated is None else stated
    for update in updates:
        tensor, rank = update.tensors["A"], METHODS[update.method].rank(update)
        mask = masks.get(update.module)
        expected = count if mask is None else sum(mask)
        own = update.options.get("init_r")
        if rank != expected:
            said = f"init_r {count}" if mask is None else f"a rank_pattern that leaves {expected}"
            yield (
                f"{tensor.where} has {rank} triplets, but {config.where} says {said}; --set init_r=N says how many there were "
                "at first, and --set rank_pattern=null derives the rest"
            )
        elif (mask is not None and len(mask) != count) or (own is not None and own != count):
            yield (
                f"{tensor.where}: {config.where} says init_r {count}, but its module began with "
                f"{len(mask) if mask is not None else own} triplets; --set init_r={len(mask) if mask is not None else own}"
            )


def _divided(config: Any, updates: Sequence[Update]) -> dict[str, tuple[int, int]]:
    """`init_r`, and the rank of all modules where they have one and no pattern tells that triplets were taken away."""
    ranks, said = {METHODS[u.method].rank(u) or 0 for u in updates}, config.fields.get("init_r", _DEFAULT)
    if len(ranks) != 1 or type(said) is not int or _masks(config):
        return {}
    return {u.module: (said, rank) for u in updates for rank in ranks}


def _believed(update: Update) -> Update:
    """The update of a module that still has all the triplets it began with."""
    options = {name: value for name, value in update.options.items() if name != "rank_pattern"}
    return replace(update, options={**options, "init_r": METHODS[update.method].rank(update) or 0})


def _fitted(update: Update) -> Update:
    """The update without the tensor `ranknum`, which the authors keep and peft has as `init_r`.

    Raises `CannotRepresent` for one that is no whole number.
    """
    count = update.tensors.get("ranknum")
    if count is None:
        return update
    value = count.item()
    if value != int(value):
        raise errors.CannotRepresent(f"{count.where}: ranknum is {value:g}; PEFT keeps it as init_r, a whole number")
    tensors = {role: tensor for role, tensor in update.tensors.items() if role != "ranknum"}
    return replace(update, tensors=tensors, options={**update.options, "init_r": int(value)})


ADALORA = PeftMethod(
    "ADALORA",
    "adalora",
    "AdaLoRA",
    alpha="lora_alpha",
    alphas_in="",
    rank="",
    shaping=("init_r", "rank_pattern"),
    flags=("fan_in_fan_out",),
    tokens=True,
    biases=True,
    known=(
        *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("lora_dropout", "bias", "init_lora_weights", "use_rslora", "alpha_pattern", "megatron_core", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "monteclora_config"),
        *("runtime_config", "ensure_weight_tying"),
    ),
    refused=dict.fromkeys(
        (
            *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "alora_invocation_tokens"),
            *("layer_replication", "target_parameters", "arrow_config", "megatron_config"),
        ),
        "AdaLoRA's layers have no such form",
    ),
    defaults=defaults(
        "ADALORA",
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
        modules_to_save=None,
        total_step=1,  # peft refuses a config without it; it only concerns training
    ),
    fields=_fields,
    problems=_problems,
    options=_options,
    meant=_meant,
    fitted=_fitted,
    divided=_divided,
    divisor="init_r",
    believed=_believed,
    lost=("init_r, where modules have different ranks",),
)
