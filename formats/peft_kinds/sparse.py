"""SHiRA, DeLoRA and HiRA in PEFT configs.

Sources: huggingface/peft 0.21.2 `tuners/shira/config.py`, `tuners/delora/config.py`, `tuners/hira/config.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterops_formats.peft_kinds.blocks import one_for_all
from adapterops_formats.peft_kinds.row import PeftMethod, Setting, defaults
from adapterops_formats.peft_patterns import Base, looked_up

from adapterops.plugin import METHODS, Group, Update


def _shira_options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """r, where the base shows it: peft keeps r · (in + out) numbers of a module."""
    numbers = entry.tensors.get("weight")
    if numbers is None or len(weight) != 2 or numbers.numel % sum(weight):
        return {}
    return {"r": numbers.numel // sum(weight)}


def _shira_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where no module has as many numbers as the file has for that r."""
    rank = config.fields.get("r", 32)
    for update in updates:
        numbers = update.tensors["weight"]
        if rank and numbers.numel % rank:
            yield (
                f"{numbers.where}: {numbers.numel} numbers of {update.module}, but {config.where} says r={rank}, and peft makes "
                "r · (in + out) of them; --set r=R says it, and --base CONFIG finds it out"
            )


SHIRA = PeftMethod(
    "SHIRA",
    "shira",
    "SHiRA",
    rank="",
    settings=(
        Setting(
            "r",
            (int,),
            default=32,
            asked=True,
            about="a module keeps r · (in_features + out_features) numbers, and --base CONFIG would tell its features",
        ),
    ),
    narrowing=(),
    flags=("fan_in_fan_out",),
    known=("mask_type", "random_seed", "init_weights"),
    defaults=defaults(
        "SHIRA", mask_type="random", random_seed=None, fan_in_fan_out=False, init_weights=True, modules_to_save=None
    ),
    options=_shira_options,
    problems=_shira_problems,
    needs="the module's shape",
)
DELORA = PeftMethod(
    "DELORA",
    "delora",
    "DeLoRA",
    biases=True,
    bias_only="delora_only",
    # The bounds of a config are those that training begins with; a file has its own.
    known=("delora_lambda", "lambda_pattern", "module_dropout", "init_weights", "bias"),
    defaults=defaults(
        "DELORA",
        delora_lambda=15,
        lambda_pattern={},
        module_dropout=0.0,
        init_weights=True,
        bias="none",
        modules_to_save=None,
    ),
)


def _hira_fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """r.  Raises `CannotRepresent` where modules differ in it: peft 0.21 leaves `rank_pattern` out of account."""
    ranks = {u.module: METHODS["hira"].rank(u) for u in updates}
    return {"r": one_for_all(ranks, "r", "HiRA"), "rank_pattern": {}}


def _hira_problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where a rank is neither r, which peft 0.21 takes for every module, nor what `rank_pattern` says."""
    usual, patterns = config.fields.get("r", 32), config.fields.get("rank_pattern")
    for update in updates:
        rank = METHODS["hira"].rank(update)
        stated = (usual, looked_up(patterns if isinstance(patterns, Mapping) else {}, update.module, usual))
        if usual is not None and rank not in stated:
            yield (
                f"{update.tensors['A'].where}: {update.module} has r {rank}, but {config.where} says r={usual}; --set r=null "
                "derives it anew"
            )


HIRA = PeftMethod(
    "HIRA",
    "hira",
    "HiRA",
    rank="",
    shaping=("r",),
    flags=("fan_in_fan_out",),
    known=("hira_dropout", "init_weights", "rank_pattern"),
    fields=_hira_fields,
    problems=_hira_problems,
    defaults=defaults("HIRA", hira_dropout=0.0, fan_in_fan_out=False, init_weights=True, modules_to_save=None),
    needs="the base weight",
)
