"""Rules about ranks, alphas and flags of a PEFT config against the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

from adapterops_formats.peft_config import ALPHA_DEFAULT, contradictions
from adapterops_formats.peft_patterns import Base, pattern_table
from adapterops_formats.peft_rules_view import View, view
from adapterops_formats.peft_trainers import names_of_tinker

from adapterops.plugin import METHODS, Update, errors
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity, several
from adapterops.validation.subject import Subject, in_words

OTHER_RANK = Rule(
    "C230",
    "other-rank",
    Severity.ERROR,
    why="peft makes layers of the config's rank and refuses tensors of another (size mismatch); other loaders divide alpha by "
    "the wrong number.",
    remedy="Say which scale was trained: adapterops convert FOLDER --to peft --repair --alpha X writes r, rank_pattern and "
    "alpha as the tensors have them.",
    fires='"r": 8 beside q_proj.lora_A.weight [4, 2048]',
    passes='"r": 4, or "r": 8 with "rank_pattern": {"q_proj": 4}',
    fixable=True,
    source="peft 0.21 utils/save_and_load.py (set_peft_model_state_dict)",
)
NO_RANK = Rule(
    "C231",
    "no-rank",
    Severity.ERROR,
    why="Without r peft takes its default, and with null it fails before it looks at a tensor.",
    remedy="Write the rank that the tensors have.",
    fires='"r": null beside q_proj.lora_A.weight [4, 2048]',
    passes='"r": 4',
    fixable=True,
    source="peft 0.21 tuners/lora/layer.py (update_layer)",
)
NO_ALPHA = Rule(
    "C232",
    "no-alpha",
    Severity.WARNING,
    why="A config without lora_alpha is read with peft's default of 8, whatever the adapter was trained with, and no tensor "
    "holds the truth.",
    remedy="Write the lora_alpha of the training run.",
    fires='{"peft_type": "LORA", "r": 16}',
    passes='{"peft_type": "LORA", "r": 16, "lora_alpha": 32}',
    source="peft 0.21 tuners/lora/config.py",
)
DORA = Rule(
    "C233",
    "dora-flag",
    Severity.ERROR,
    why="With use_dora and no magnitudes peft starts them anew, and without it drops those that the file holds: both compute "
    "something else than was trained.",
    remedy='Where the file holds magnitudes, write "use_dora": true; where they were lost, take an earlier checkpoint.',
    fires='"use_dora": false beside q_proj.lora_magnitude_vector [2048]',
    passes='"use_dora": true beside q_proj.lora_magnitude_vector [2048]',
    fixable=True,
    source="peft 0.21 tuners/lora/layer.py (use_dora), utils/save_and_load.py",
)
LORA_BIAS = Rule(
    "C234",
    "lora-bias-flag",
    Severity.ERROR,
    why="peft drops the biases of lora_B where lora_bias is false, and starts them at zero where it is true and none is saved.",
    remedy='Where the file holds them, write "lora_bias": true; where they were lost, take an earlier checkpoint.',
    fires='"lora_bias": false beside q_proj.lora_B.bias [2048]',
    passes='"lora_bias": true beside q_proj.lora_B.bias [2048]',
    fixable=True,
    source="peft 0.21 tuners/lora/layer.py (update_layer)",
)
CONTRADICTS = Rule(
    "C235",
    "config-contradicts",
    Severity.ERROR,
    why="A field says of the tensors what they are not, so peft builds other layers than the file is for.",
    remedy="adapterops convert FOLDER --to peft --repair derives the config from the tensors and lists what it changes.",
    fires='"kasa_config": {} beside a LoRA without lora_diag; "num_virtual_tokens": 20 beside prompt_embeddings [8, 1024]',
    passes='"num_virtual_tokens": 8 beside prompt_embeddings [8, 1024]',
    source="peft 0.21 tuners/*/config.py, tuners/*/layer.py",
)
WHICH_PARAMETER = Rule(
    "C236",
    "ambiguous-parameters",
    Severity.INFO,
    why="Keys of factors on bare parameters (target_parameters) do not name the parameter, so which is which depends on the "
    "order in which the installed model defines them.",
    remedy="Validate with --base CONFIG, which tells them apart by their shapes; name the peft and transformers versions in the "
    "card.",
    fires='"target_parameters": ["experts.gate_up_proj", "experts.down_proj"] beside experts.base_layer.lora_A.weight',
    passes='"target_parameters": ["experts.gate_up_proj"] beside experts.lora_A.weight',
    faults=("parameters-ambiguous",),
    source="peft 0.21 tuners/lora/layer.py (ParamWrapper); peft#2710",
)
FAN_IN = Rule(
    "C237",
    "fan-in-fan-out",
    Severity.INFO,
    why="fan_in_fan_out is for layers that store their weight as (in, out), as GPT-2's Conv1D; peft corrects a wrong one with a "
    "warning at each load, other tools may transpose.",
    remedy="Write it as the base's layers are.",
    fires='"fan_in_fan_out": true for a Llama',
    passes='"fan_in_fan_out": true for GPT-2\'s c_attn',
    source="peft 0.21 tuners/lora/model.py (_create_new_module)",
)
TRAINERS_NAMES = Rule(
    "C238",
    "trainers-names",
    Severity.ERROR,
    why="Modules have the names of the trainer's own model (Tinker's unembed_tokens and stacked experts): peft and servers find "
    "none of that name in the published model, and leave them out or stop.",
    remedy="Run adapterops convert FOLDER --to peft, which writes the published model's names and a pair for each expert.",
    fires="base_model.model.model.unembed_tokens.lora_A.weight",
    passes="base_model.model.lm_head.lora_A.weight",
    source="thinking-machines-lab/tinker-cookbook tinker_cookbook/weights/_adapter.py",
)

_DEFAULT_ALPHA = ("LORA", "ADALORA", "LOHA", "LOKR")


@checker(OTHER_RANK, NO_RANK, NO_ALPHA)
def ranks(subject: Subject) -> Iterator[Finding]:
    """r and lora_alpha, for all modules and by pattern."""
    seen = view(subject)
    parsed, config = seen.parsed, seen.config
    if parsed is None or config is None or seen.is_anothers:
        return
    method = seen.method
    if method.rank:
        missing = config.get(method.rank) is None
        yield from _missing_rank(seen, config) if missing else _other_rank(seen)
    if method.kind in _DEFAULT_ALPHA and method.alpha not in config:
        told = ""
        if seen.updates:
            rank = METHODS[seen.updates[0].method].rank(seen.updates[0])
            told = (
                f" ({seen.updates[0].module} has rank {rank}, so its scale is {ALPHA_DEFAULT / rank:g})" if rank else ""
            )
        yield NO_ALPHA.found(
            seen.where, f"{method.alpha} is missing: peft takes {ALPHA_DEFAULT}{told}", field=method.alpha
        )


def _other_rank(seen: View) -> Iterator[Finding]:
    parsed, method = seen.parsed, seen.method
    wrong: dict[str, tuple[int, int]] = {}
    for update in seen.updates:
        rank = METHODS[update.method].rank(update)
        said = parsed.rank(update.module) if parsed is not None else None
        if rank and said is not None and said != rank:
            wrong[update.module] = (said, rank)
    if not wrong or parsed is None or (method.ranks_in and seen.lost(method.ranks_in)):
        return
    module, (said, rank) = next(iter(wrong.items()))
    names = " or ".join(filter(None, (method.rank, method.ranks_in)))
    more = f", and {len(wrong) - 1} more modules differ" if len(wrong) > 1 else ""
    message = (
        f"{names} says rank {said} for {module}, whose tensors have rank {rank}{more}: peft fails with a size mismatch"
    )
    if method.alpha and said < 2**63:
        alpha, rslora = parsed.rule(module)[:2]
        root = sqrt if rslora else float
        message += (
            f"; the scale is {alpha or 0:g}/{'√' if rslora else ''}r = {(alpha or 0) / root(said):.6g} by the config and "
            f"{(alpha or 0) / root(rank):.6g} by the tensors, and nothing tells which was trained"
        )
    change = None if method.alpha else _rank_change(seen)
    yield OTHER_RANK.found(seen.where, message, seen.tensors_of(wrong), field=method.rank, change=change)


def _missing_rank(seen: View, config: Mapping[str, Any]) -> Iterator[Finding]:
    method = seen.method
    found = {u.module: rank for u in seen.updates if (rank := METHODS[u.method].rank(u))}
    if not found:
        return
    is_null = method.rank in config
    stated = set(config.get(method.ranks_in) or ()) if method.ranks_in else set()
    default = not stated and set(found.values()) == {method.rank_default}
    if (is_null and method.kind not in ("LORA", "LOHA", "LOKR")) or (not is_null and (default or stated)):
        return
    what = "is null: peft fails" if is_null else f"is missing: peft takes {method.rank_default}"
    yield NO_RANK.found(
        seen.where,
        f"{method.rank} {what}; the tensors have rank {', '.join(map(str, sorted(set(found.values()))[:5]))}",
        field=method.rank,
        change=_rank_change(seen),
    )


def _rank_change(seen: View) -> Change | None:
    """What the tensors prove of the ranks; alpha stays, and is divided by the rank that the tensors have."""
    method = seen.method
    found = {u.module: METHODS[u.method].rank(u) or 0 for u in seen.updates}
    if not seen.is_whole or not all(found.values()):
        return None
    usual, table = pattern_table(found, Base())
    if table and not method.ranks_in:
        return None
    stated = (seen.config or {}).get(method.ranks_in) if method.ranks_in else None
    fields = {method.rank: usual, **({method.ranks_in: table} if table or stated else {})}
    return Change(f"set {' and '.join(fields)} to the ranks of the tensors", config=fields)


@checker(DORA, LORA_BIAS, CONTRADICTS)
def roles(subject: Subject) -> Iterator[Finding]:
    """Fields that say for all modules whether they have a tensor."""
    seen = view(subject)
    if seen.config is None or seen.parsed is None or seen.is_anothers:
        return
    rules = {"use_dora": DORA, "lora_bias": LORA_BIAS}
    own = [u for u in seen.updates if u.method not in seen.method.bare]
    for name, role in seen.method.roles:
        stated = seen.config.get(name)
        if not isinstance(stated, bool | None) or not own:
            continue
        having = [u for u in own if role in u.tensors]
        wrong = [u for u in own if role not in u.tensors] if stated else having
        if not wrong:
            continue
        proven = not stated and len(having) == len(own) and seen.is_whole
        change = Change(f"set {name} to true", config={name: True}) if proven else None
        keys = [u.tensors[role].key for u in having] if not stated else seen.tensors_of(u.module for u in wrong)
        yield rules.get(name, CONTRADICTS).found(
            seen.where, _role_message(name, role, bool(stated), wrong, own), keys, field=name, change=change
        )


def _role_message(name: str, role: str, stated: bool, wrong: list[Update], own: list[Update]) -> str:
    what = {"magnitude": "magnitude vector", "bias": "bias of lora_B"}.get(role, role)
    many = several((u.module for u in wrong), 1)
    if stated:
        return (
            f"{name} is true, but {len(wrong)} of {len(own)} modules ({many}) have no {what}: peft starts it anew instead of "
            "loading it"
        )
    return (
        f"{name} is false, but {len(wrong)} of {len(own)} modules ({many}) have a {what}, which peft drops in silence"
    )


@checker(CONTRADICTS, WHICH_PARAMETER)
def others(subject: Subject) -> Iterator[Finding]:
    """What else the config says of the tensors; asked where all of them could be understood."""
    seen = view(subject)
    parsed = seen.parsed
    if parsed is None or seen.is_anothers or not seen.updates or {u.module for u in seen.updates} < set(seen.keys):
        return
    # A tensor that nobody knows, or a rank that the config has not, is told of; what else follows from it is not.
    if seen.unknown or (seen.method.rank and next(_other_rank(seen), None) is not None):
        return
    nameless = [u for u in seen.updates if u.method in seen.method.bare and not u.options.get("parameter_name")]
    if nameless:
        yield WHICH_PARAMETER.found(
            seen.weights,
            f"{several((u.module for u in nameless), 2)}: no key says which parameter of its module the factors are for, and "
            f"target_parameters is {json.dumps(parsed.fields.get('target_parameters'))[:120]}",
            (t.key for u in nameless for t in u.tensors.values()),
            field="target_parameters",
        )
        return
    try:
        said = [in_words(errors.Conflict(s), seen.weights) for s in contradictions(parsed, seen.updates)]
    except errors.CannotRepresent as error:
        said = [str(error)]
    except errors.UnknownFact:
        return  # the tensors do not tell, so they cannot contradict
    if said:
        more = f" ({len(said) - 1} more like it)" if len(said) > 1 else ""
        yield CONTRADICTS.found(seen.where, said[0].partition("; --set")[0] + more)


@checker(FAN_IN)
def fan_in(subject: Subject) -> Iterator[Finding]:
    """fan_in_fan_out against a known base."""
    seen = view(subject)
    if seen.config is None or seen.base is None or "fan_in_fan_out" not in seen.method.flags:
        return
    kinds = {seen.base.kinds[m] for m in seen.keys if m in seen.base.kinds}
    stated = bool(seen.config.get("fan_in_fan_out"))
    if (stated and "linear" in kinds and "transposed" not in kinds) or (not stated and kinds == {"transposed"}):
        layers = "store their weight as (out, in)" if stated else "store their weight as (in, out)"
        yield FAN_IN.found(
            seen.where,
            f"fan_in_fan_out is {json.dumps(stated)}, but the base's adapted layers {layers}",
            field="fan_in_fan_out",
        )


@checker(TRAINERS_NAMES)
def trainers_names(subject: Subject) -> Iterator[Finding]:
    """Names that no published model has."""
    if not view(subject).is_peft:
        return
    keys = names_of_tinker({key: tensor.shape for key, tensor in subject.tensors.items()})
    if keys:
        yield TRAINERS_NAMES.found(
            subject.weights, f"{several(keys)} {'has' if len(keys) == 1 else 'have'} Tinker's names", keys
        )


RULES: tuple[Rule, ...] = (
    OTHER_RANK,
    NO_RANK,
    NO_ALPHA,
    DORA,
    LORA_BIAS,
    CONTRADICTS,
    WHICH_PARAMETER,
    FAN_IN,
    TRAINERS_NAMES,
)
CHECKERS: tuple[Checker, ...] = (ranks, roles, others, fan_in, trainers_names)
