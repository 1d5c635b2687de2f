"""What the options of LoRA's config make of its tensors: variants with the same keys, and fields that follow from tensors.

A key says A and B; whether A stands for pooled inputs, B for a block diagonal, or both for something that acts on some tokens
only, is in the config, or in the shapes where they leave no choice.  Source: huggingface/peft 0.21.2 `tuners/lora/config.py`,
`tuners/lora/variants.py`, `tuners/lora/layer.py`; 0.2.0 `tuners/lora.py` (`enable_lora`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterops_formats import peft_parameters
from adapterops_formats.peft_kinds.row import weight_of
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Architecture, Group, Reading, Suffix, Update, as_lora, errors

VARIANTS = ("kasa", "bdlora", "qalora", "alora", "arrow", "lora_merged", "lora_parameters")
"""The methods of updates that a config of LoRA may be for, beside LoRA itself."""
_BY_FIELD = (
    ("arrow_config", "arrow"),
    ("alora_invocation_tokens", "alora"),
    ("enable_lora", "lora_merged"),
)
"""Fields that make every module's LoRA something else."""
_SUBCONFIGS = {"monteclora_config": "monteclora_sampler.", "velora_config": "velora_embed"}
"""Sub-configs of training, and the roles of the tensors that they leave."""
_PLAIN = {"A", "B", "bias", "magnitude"}
"""The roles of LoRA's tensors that no field of FIELDS makes."""
FIELDS = (
    *("kasa_config", "use_bdlora", "use_qalora", "alora_invocation_tokens", "arrow_config", "layer_replication"),
    *("monteclora_config", "velora_config", "target_parameters"),
)
"""The fields that `fields` makes."""


def meant(
    groups: list[Group], config: Any, given: Mapping[str, Any], architecture: Architecture | None, said: list[str]
) -> list[Group]:
    """The groups of LoRA under the methods that the config, the tensors or the base make of them.

    Raises `UnknownFact` where A has fewer columns than the base's module has inputs, and nothing says why.
    """
    groups = peft_parameters.meant(groups, config, architecture)
    return [g._replace(method=_method(g, config, architecture)) if g.method == "lora" else g for g in groups]


def _method(entry: Group, config: Any, architecture: Architecture | None) -> str:
    fields = config.fields if config is not None else {}
    if "diag" in entry.tensors:
        return "kasa"
    for name, method in _BY_FIELD:
        if fields.get(name):
            return method
    a, b = entry.tensors.get("A"), entry.tensors.get("B")
    flat = a is not None and b is not None and len(a.shape) == len(b.shape) == 2
    if a is None or b is None or not flat or entry.options.get("kind") == "embedding":
        return "lora"
    if _has_blocks(entry.name, fields.get("use_bdlora")) or _blocks(a.shape, b.shape):
        return "bdlora"
    weight = weight_of(entry, architecture)
    narrow = len(weight) == 2 and b.shape[0] == weight[0] and a.shape[1] < weight[1] and weight[1] % a.shape[1] == 0
    if fields.get("use_qalora") and (narrow or not weight):
        return "qalora"
    if narrow:
        times = weight[1] // a.shape[1]
        names = json.dumps({"nblocks": times, "target_modules_bd_a": ["…"]})
        raise errors.UnknownFact(
            f"{a.where}: shape {list(a.shape)}, and {entry.name} has {weight[1]} inputs: its lora_A is {times} blocks of a "
            f"block diagonal (BD-LoRA: --set use_bdlora='{names}') or acts on inputs pooled by {times} (QA-LoRA: "
            "--set use_qalora=true); nothing in the tensors tells which"
        )
    return "lora"


def _blocks(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether B can only be blocks of a block diagonal."""
    return bool(b[1]) and b[1] < a[0] and a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0


def _has_blocks(name: str, stated: Any) -> bool:
    """Whether BD-LoRA's config gives a module blocks; peft looks for its words anywhere in the module's full name."""
    if not isinstance(stated, Mapping):
        return False
    words = [*(stated.get("target_modules_bd_a") or ()), *(stated.get("target_modules_bd_b") or ())]
    return any(str(word) in name for word in words)


def options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """What the config says of a module, under the names of its fields."""
    fields = config.fields if config is not None else {}
    out: dict[str, Any] = {}
    if fields.get("layer_replication"):
        out["layer_replication"] = _checked(config, "layer_replication", _is_layers, "pairs of layer numbers")
    if entry.method == "kasa":
        out["kasa_config"] = fields.get("kasa_config") or {}
    elif entry.method == "bdlora" and isinstance(fields.get("use_bdlora"), Mapping):
        stated = fields["use_bdlora"]
        out["use_bdlora"] = stated
        out["nblocks"] = stated.get("nblocks", 1)
        if type(out["nblocks"]) is not int or out["nblocks"] < 1:
            raise errors.UnreadableFile(
                f"{config.where}: nblocks of use_bdlora is {out['nblocks']!r:.40}, not a number",
                fault="config-type",
            )
    elif entry.method == "qalora" and (str(config.certainty) == "read" or "qalora_group_size" in fields):
        size = fields.get("qalora_group_size", 16)
        if type(size) is not int or size < 1:
            raise errors.UnreadableFile(
                f"{config.where}: qalora_group_size is {size!r:.40}, not a number of inputs", fault="config-type"
            )
        out["qalora_group_size"] = size
    elif entry.method == "alora":
        out["alora_invocation_tokens"] = _checked(config, "alora_invocation_tokens", _is_numbers, "token numbers")
    elif entry.method == "arrow":
        out["arrow_config"] = fields["arrow_config"]
    elif entry.method == "lora_merged":
        out["enable_lora"] = _checked(
            config, "enable_lora", _is_flags, "as many true and false as the outputs have parts"
        )
    for name, role in _SUBCONFIGS.items():
        if fields.get(name) and any(r.startswith(role) for r in entry.tensors):
            out[name] = fields[name]
    return out


def _checked(config: Any, name: str, sound: Any, wanted: str) -> list[Any]:
    value = config.fields[name]
    if not isinstance(value, Sequence) or isinstance(value, str) or not sound(value):
        raise errors.UnreadableFile(
            f"{config.where}: {name} is {value!r:.80}, not a list of {wanted}", fault="config-type"
        )
    return [list(part) if isinstance(part, Sequence) else part for part in value]


def _is_numbers(value: Sequence[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in value)


def _is_flags(value: Sequence[Any]) -> bool:
    return all(type(flag) is bool for flag in value) and any(value)


def _is_layers(value: Sequence[Any]) -> bool:
    return all(isinstance(part, Sequence) and len(part) == 2 and _is_numbers(part) for part in value)


def fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """The fields of FIELDS that the updates call for.

    Raises `CannotRepresent` where modules differ in what a config says for all, `UnknownFact` where nothing says it.
    """
    out: dict[str, Any] = {}
    for name, method in (("kasa_config", "kasa"), *_BY_FIELD[:2]):
        having = [u for u in updates if u.method == method]
        if having:
            _insist_on_all(having, updates, name)
            out[name] = _agreed(having, name)
    pooled = [u for u in updates if u.method == "qalora"]
    if pooled:
        _insist_on_all(pooled, updates, "use_qalora")
        sizes = {(METHODS["qalora"].weight_shape(u) or (0, 0))[1] // u.tensors["A"].shape[1] for u in pooled}
        if len(sizes) > 1:
            raise errors.CannotRepresent(
                f"{pooled[0].name} and others pool {sorted(sizes)} inputs into one; a PEFT config says one qalora_group_size "
                "for all"
            )
        out |= {"use_qalora": True, "qalora_group_size": sizes.pop()}
    if any(u.method == "bdlora" for u in updates):
        out["use_bdlora"] = _block_config(updates)
    for name, role in _SUBCONFIGS.items():
        leaving = [u for u in updates if any(r.startswith(role) for r in u.tensors)]
        if leaving:
            stated = _agreed(leaving, name)
            out[name] = stated if stated is not None else _subconfig(name, leaving)
    replicated = _agreed(updates, "layer_replication") if updates else None
    out |= peft_parameters.fields(updates, base)
    return out | ({"layer_replication": replicated} if replicated else {})


def _insist_on_all(having: Sequence[Update], updates: Sequence[Update], name: str) -> None:
    lacking = next((u for u in updates if u.method != having[0].method and u.method != "lora_parameters"), None)
    if lacking is not None:
        raise errors.CannotRepresent(
            f"{having[0].name} is {METHODS[having[0].method].title} and {lacking.name} is {METHODS[lacking.method].title}; a "
            f"PEFT config says {name} for all or none"
        )


def _agreed(updates: Sequence[Update], name: str) -> Any:
    """The option that all the updates have; None where none has it."""
    values = {json.dumps(u.options.get(name), sort_keys=True): u.options.get(name) for u in updates}
    if len(values) > 1:
        raise errors.CannotRepresent(
            f"{updates[0].name} and other modules have different {name}; a PEFT config says one for all"
        )
    return next(iter(values.values()))


def _subconfig(name: str, updates: Sequence[Update]) -> dict[str, Any]:
    """A sub-config of training as far as tensors say it; the rest is left to peft's defaults."""
    if name == "velora_config":
        sizes = {
            u.tensors["A"].shape[1] // u.tensors["velora_embed"].numel for u in updates if "velora_embed" in u.tensors
        }
        return {"num_groups": min(sizes)}
    counts = {u.tensors[r].numel for u in updates for r in u.tensors if r.endswith("expert_weights")}
    return {"num_samples": min(counts)} if counts else {}


def _block_config(updates: Sequence[Update]) -> dict[str, Any]:
    """`use_bdlora`: the one that came along, else from the shapes.

    Raises `CannotRepresent` where modules have different numbers of blocks, or no word finds those of them that have blocks.
    """
    blocks = [u for u in updates if u.method == "bdlora"]
    stated = [u.options["use_bdlora"] for u in blocks if "use_bdlora" in u.options]
    if stated and all(_has_blocks(u.module, stated[0]) == (u.method == "bdlora") for u in updates):
        return dict(stated[0])
    counts = {_count(u) for u in blocks}
    if len(counts) > 1:
        raise errors.CannotRepresent(
            f"{blocks[0].name} and other modules have factors of {sorted(counts)} blocks; a PEFT config says one nblocks for all"
        )
    sides: dict[str, list[str]] = {"a": [], "b": []}
    for update in blocks:
        narrow = update.tensors["B"].shape[1] < update.tensors["A"].shape[0]
        sides["b" if narrow else "a"].append(update.module)
    words = {side: _words(names, [u.module for u in updates if u.module not in names]) for side, names in sides.items()}
    return {
        "nblocks": counts.pop(),
        "match_strict": len(blocks) == len(updates),
        **{f"target_modules_bd_{side}": own or None for side, own in words.items()},
    }


def _count(update: Update) -> int:
    """The number of blocks.  Raises `CannotRepresent` where A has them and nothing says how many."""
    a, b = update.tensors["A"], update.tensors["B"]
    wide = METHODS[update.method].weight_shape(update) or a.shape[::-1]
    return a.shape[0] // b.shape[1] if b.shape[1] < a.shape[0] else wide[1] // a.shape[1]


def _words(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Words that stand in each of `names` and in none of `others`, their last segments where those will do."""
    short = sorted({name.rpartition(".")[2] for name in names})
    for words in (short, sorted(names)):
        if not any(word in other for word in words for other in others):
            return words
    raise errors.CannotRepresent(
        f"{names[0]} has block-diagonal factors, and peft looks for words anywhere in a module's name: none finds it and not "
        "another; adapterops to-lora makes plain LoRA of it"
    )


def problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config says a variant that the tensors are not, or the other way round."""
    said = any(config.fields.get(name) for name in FIELDS) or config.fields.get("kasa_config") is not None
    if not said and all(_is_plain(update) for update in updates):
        return
    wanted = fields(updates, base)
    yield from peft_parameters.agree(config, updates)
    for name in FIELDS[:-1]:
        stated, has = config.fields.get(name), wanted.get(name)
        if name in _SUBCONFIGS and not has:
            continue  # what was trained so need not have left a tensor
        if name == "use_qalora" and not has:
            continue  # plain layers take no notice of it
        # An empty sub-config of KaSA says as much as a full one.
        says = bool(stated) or (name == "kasa_config" and stated is not None)
        if says != (has is not None):
            tensor = next(iter(updates[0].tensors.values()))
            yield (
                f"{tensor.where}: {config.where} says {name}={json.dumps(stated, default=str)[:60]}, but the tensors are "
                f"{'those of ' + METHODS[updates[0].method].title if has or has == {} else 'not made so'}; --set {name}="
                f"{json.dumps(has, default=str)[:60]}"
            )


def _is_plain(update: Update) -> bool:
    return update.method == "lora" and update.tensors.keys() <= _PLAIN and not update.options.get("layer_replication")


def fitted(update: Update) -> Update:
    """The update as today's peft has it: what PEFT 0.2 kept in groups is written out as plain LoRA.

    Raises `CannotRepresent` where nothing says which parts of the module they adapt.
    """
    if update.method != "lora_merged":
        return update
    b, shape = update.tensors["B"], update.options.get("shape")
    if "enable_lora" not in update.options and (shape is None or shape[0] != b.shape[0]):
        raise errors.CannotRepresent(f"{b.where}: {unknown_parts(update)}")
    return as_lora(update)


def unknown_parts(update: Update) -> str:
    """What is known of a grouped LoRA, and how to say the rest."""
    a, b = update.tensors["A"], update.tensors["B"]
    groups = max(1, a.shape[0] // max(1, b.shape[1]))
    return (
        f"{list(b.shape)} beside {a.key.rpartition('.')[2]} {list(a.shape)}: {groups} parts of {b.shape[0] // groups} outputs "
        f"each are adapted, of how many is not known (GPT-2's q and v: --set enable_lora='[true, false, true]')"
    )


def loralib_names(reading: Reading) -> Reading:
    """The reading with `lora_A` and `lora_B` without `.weight` as LoRA's, where no `lora_E` makes them AdaLoRA's."""
    triplets = {c.name for c in reading.claims if (c.suffix.method, c.suffix.role) == ("adalora", "E")}
    claims = tuple(
        c._replace(suffix=Suffix(c.suffix.text, "lora", c.suffix.role, c.suffix.options))
        if c.suffix.method == "adalora" and c.suffix.role in ("A", "B") and c.name not in triplets
        else c
        for c in reading.claims
    )
    return reading if claims == reading.claims else reading._replace(claims=claims)
