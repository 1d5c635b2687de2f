"""Rules about which modules a PEFT config targets, against those that the tensors are for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from adapterops_formats.peft_config import PeftConfig
from adapterops_formats.peft_patterns import Base, in_layers, named, shuts_out, target_modules
from adapterops_formats.peft_rules_view import View, view

from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity, several
from adapterops.validation.subject import Subject

NO_TARGETS = Rule(
    "C240",
    "no-targets",
    Severity.WARNING,
    why="Without target_modules peft takes its own list for the base's model type, and fails for a type that it has none for.",
    remedy="Write the modules that the tensors are for.",
    fires='"target_modules": null',
    passes='"target_modules": ["q_proj", "v_proj"]',
    fixable=True,
    source="peft 0.21 tuners/tuners_utils.py (_prepare_adapter_config), utils/constants.py",
)
WRONG_TARGETS = Rule(
    "C241",
    "targets-match-nothing",
    Severity.ERROR,
    why="target_modules names none of the modules that the file has tensors for, so peft fails or adapts others and drops every "
    "tensor.",
    remedy="Write the modules that the tensors are for; adapterops inspect ADAPTER lists them.",
    fires='"target_modules": ["query"] beside …self_attn.q_proj.lora_A.weight alone',
    passes='"target_modules": ["q_proj"] beside …self_attn.q_proj.lora_A.weight',
    fixable=True,
    source="peft 0.21 tuners/tuners_utils.py (check_target_module_exists)",
)
UNTARGETED = Rule(
    "C242",
    "untargeted-tensors",
    Severity.ERROR,
    why="peft makes no layer for a module that the config does not target, and drops its tensors in silence.",
    remedy="Add the modules to target_modules or layers_to_transform, or take them out of exclude_modules or modules_to_save.",
    fires='"target_modules": ["q_proj"] beside …q_proj.lora_A.weight and …v_proj.lora_A.weight',
    passes='"target_modules": ["q_proj", "v_proj"] beside the same',
    fixable=True,
    source="peft 0.21 tuners/tuners_utils.py (check_target_module_exists), utils/save_and_load.py",
)
DEAD_TARGET = Rule(
    "C243",
    "dead-target",
    Severity.WARNING,
    why="An entry of target_modules that no tensor belongs to adapted nothing in training: a misspelled name, most often.",
    remedy="Take the entry out; if the module was to be trained, correct the name (it is case-sensitive) and train again.",
    fires='"target_modules": ["q", "V"] beside …SelfAttention.q.lora_A.weight alone',
    passes='"target_modules": ["q"] beside …SelfAttention.q.lora_A.weight alone',
    fixable=True,
    source="peft 0.21 tuners/tuners_utils.py (check_target_module_exists)",
)
UNSAVED_TARGET = Rule(
    "C244",
    "unsaved-targets",
    Severity.WARNING,
    why="peft puts fresh layers on modules of the base that the config targets and the file has no tensors for, and warns of "
    "missing keys.",
    remedy="Narrow target_modules to what was trained; if tensors were lost, take an earlier checkpoint.",
    fires='"target_modules": "all-linear" beside tensors for q_proj alone, with --base of a Llama',
    passes='"target_modules": ["q_proj"] beside the same',
    source="peft 0.21 peft_model.py (load_adapter)",
)
LAYER_FIELDS = Rule(
    "C245",
    "layer-fields",
    Severity.ERROR,
    why="peft refuses layers_pattern without layers_to_transform, and either of them beside a target_modules that is a pattern.",
    remedy="Set the field to null, or write target_modules as a list.",
    fires='"layers_pattern": "layers", "layers_to_transform": null',
    passes='"layers_pattern": "layers", "layers_to_transform": [0, 1]',
    fixable=True,
    source="peft 0.21 tuners/lora/config.py (__post_init__)",
)
DEAD_LAYER = Rule(
    "C246",
    "dead-layer",
    Severity.WARNING,
    why="layers_to_transform names a layer that no tensor belongs to, most often one past the base's last.",
    remedy="Take the number out (layers are counted from 0).",
    fires='"layers_to_transform": [0, 1, 32] beside tensors for the layers 0 and 1',
    passes='"layers_to_transform": [0, 1] beside the same',
    fixable=True,
    source="peft 0.21 tuners/tuners_utils.py (check_target_module_exists)",
)
DEAD_PATTERN = Rule(
    "C247",
    "dead-pattern",
    Severity.WARNING,
    why="A key of rank_pattern or alpha_pattern that matches no adapted module does nothing, so a module that was meant has the "
    "common rank or alpha.",
    remedy="Correct the key (it must match the module's name to its end), or take it out.",
    fires='"alpha_pattern": {"k_proj": 32} beside tensors for q_proj and v_proj',
    passes='"alpha_pattern": {"v_proj": 32} beside the same',
    fixable=True,
    source="peft 0.21 utils/other.py (get_pattern_key)",
)

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


@checker(NO_TARGETS, WRONG_TARGETS, UNTARGETED, DEAD_TARGET, UNSAVED_TARGET, LAYER_FIELDS, DEAD_LAYER)
def targets(subject: Subject) -> Iterator[Finding]:
    """target_modules and what narrows it."""
    seen = view(subject)
    parsed, config = seen.parsed, seen.config
    if parsed is None or config is None or seen.is_anothers or not seen.method.targeted or not seen.keys:
        return
    wanted, stated = parsed.fields.get("target_modules"), config.get("target_modules")
    if stated is None and seen.method.kind != "TRAINABLE_TOKENS" and not config.get("target_parameters"):
        change = _derived(seen)
        yield NO_TARGETS.found(
            seen.where,
            f"target_modules is {'null' if 'target_modules' in config else 'missing'}: peft guesses by the base's model type",
            field="target_modules",
            change=change,
        )
    # What is told of as broken by itself needs no target.
    told = {key for fault in subject.faults for key in fault.keys}
    uncovered = [m for m, keys in seen.keys.items() if not parsed.targets(m) and not told.issuperset(keys)]
    if uncovered:
        yield _uncovered(seen, parsed, uncovered)
    yield from _layer_fields(seen, parsed, bool(uncovered))
    if len(uncovered) == len(seen.keys):
        return
    unsaved = _unsaved(seen, parsed)
    # Where modules are left out, what is dead in the list was meant for them.
    if isinstance(wanted, list | tuple) and not uncovered:
        yield from _dead(seen, list(wanted), unsaved, len(set(wanted)) == len(wanted))
    yield from _dead_layers(seen, parsed, not uncovered)
    if unsaved:
        yield UNSAVED_TARGET.found(
            seen.where,
            f"the config targets {len(unsaved)} modules of the base that the file has no tensors for ({several(unsaved, 2)})",
            field="target_modules",
        )


def _uncovered(seen: View, parsed: PeftConfig, uncovered: list[str]) -> Finding:
    wanted = parsed.fields.get("target_modules")
    everything = len(uncovered) == len(seen.keys)
    first = uncovered[0]
    if shuts_out(parsed.fields.get("modules_to_save") or (), first):
        why = f"modules_to_save ({_short(parsed.fields['modules_to_save'])}) shuts it out"
    elif wanted is not None and not named(first, wanted):
        why = f"target_modules is {_short(wanted)}"
    else:
        names = [n for n in _NARROWING if parsed.fields.get(n)]
        why = ", ".join(f"{n} is {_short(parsed.fields[n])}" for n in names)
    change = None if shuts_out(parsed.fields.get("modules_to_save") or (), first) else _derived(seen)
    rule = WRONG_TARGETS if everything else UNTARGETED
    many = f"none of the {len(seen.keys)} adapted modules is targeted" if everything else (
        f"{len(uncovered)} of {len(seen.keys)} adapted modules are not targeted"
    )  # fmt: skip
    effect = (
        "peft finds nothing to adapt, or drops every tensor" if everything else "peft drops their tensors in silence"
    )
    return rule.found(
        seen.where,
        f"{many}, e.g. {first}: {why}; {effect}",
        seen.tensors_of(uncovered),
        field="target_modules",
        change=change,
    )


def _derived(seen: View) -> Change | None:
    """target_modules as the tensors prove it, with nothing that narrows it."""
    stated = seen.config.get("target_modules") if seen.config is not None else None
    twice = isinstance(stated, list) and len({str(name) for name in stated}) < len(stated)
    if not seen.is_whole or _shuts_out_any(seen) or twice:  # what stands twice in the list is mended first
        return None
    fields: dict[str, Any] = {"target_modules": target_modules(set(seen.keys), seen.base or Base())}
    config = seen.config or {}
    fields |= {name: None for name in _NARROWING if config.get(name) is not None}
    return Change(f"set target_modules to the {len(seen.keys)} modules of the tensors", config=fields)


def _shuts_out_any(seen: View) -> bool:
    """Whether modules_to_save keeps an adapted module from being one."""
    saved = seen.parsed.fields.get("modules_to_save") if seen.parsed is not None else None
    return any(shuts_out(saved or (), module) for module in seen.keys)


def _dead(seen: View, wanted: list[str], unsaved: list[str], alone: bool) -> Iterator[Finding]:
    """Entries that no tensor belongs to; mended where nothing else (`alone`) changes the field."""
    names = [*seen.keys, *unsaved, *(seen.saved if seen.method.kind == "TRAINABLE_TOKENS" else ()), *seen.unknown]
    dead = [entry for entry in dict.fromkeys(wanted) if not any(named(module, [entry]) for module in names)]
    if not dead:
        return
    rest = [entry for entry in wanted if entry not in dead]
    change = Change(f"take {several(dead)} out of target_modules", config={"target_modules": rest})
    yield DEAD_TARGET.found(
        seen.where,
        f"{several(dead)} of target_modules {'belongs' if len(dead) == 1 else 'belong'} to no tensor of the file: only "
        f"{several(rest)} {'is' if len(rest) == 1 else 'are'} adapted",
        field="target_modules",
        change=change if seen.is_whole and alone else None,
    )


def _unsaved(seen: View, parsed: PeftConfig) -> list[str]:
    """Modules of a known base that peft would adapt, and the file has no tensors for."""
    base, wanted = seen.base, parsed.fields.get("target_modules")
    if base is None or wanted is None:
        return []
    found = [module for module in base.shapes if module not in seen.keys and parsed.targets(module)]
    if wanted == "all-linear":  # of which peft leaves out the model's outputs
        heads = ("lm_head", *seen.heads)
        found = [
            m for m in found if base.kinds.get(m) in ("linear", "transposed") and m.rpartition(".")[2] not in heads
        ]
    return found


def _layer_fields(seen: View, parsed: PeftConfig, uncovered: bool) -> Iterator[Finding]:
    if "layers_to_transform" not in seen.method.narrowing:
        return
    layers, pattern = parsed.fields.get("layers_to_transform"), parsed.fields.get("layers_pattern")
    wrong: dict[str, Any] = {}
    if isinstance(parsed.fields.get("target_modules"), str):
        wrong = {n: None for n, v in (("layers_to_transform", layers), ("layers_pattern", pattern)) if v is not None}
        why = "target_modules is a pattern"
    elif pattern and layers is None:
        wrong, why = {"layers_pattern": None}, "layers_to_transform is null"
    if wrong:
        name = next(iter(wrong))
        change = None if uncovered else Change(f"set {' and '.join(wrong)} to null", config=wrong)
        yield LAYER_FIELDS.found(
            seen.where,
            f"{name} is {_short(parsed.fields[name])}, but {why}: peft refuses the config",
            field=name,
            change=change,
        )


def _dead_layers(seen: View, parsed: PeftConfig, alone: bool) -> Iterator[Finding]:
    layers, pattern = parsed.fields.get("layers_to_transform"), parsed.fields.get("layers_pattern")
    if isinstance(parsed.fields.get("target_modules"), str) or not isinstance(layers, list) or not layers:
        return
    dead = [n for n in layers if not any(in_layers(module, n, pattern) for module in seen.keys)]
    if dead:
        rest = [n for n in layers if n not in dead]
        change = Change(f"take {_short(dead)} out of layers_to_transform", config={"layers_to_transform": rest})
        yield DEAD_LAYER.found(
            seen.where,
            f"layers_to_transform names {_short(dead)}, and no tensor is of {'that layer' if len(dead) == 1 else 'those layers'}",
            field="layers_to_transform",
            change=change if seen.is_whole and rest and alone else None,
        )


@checker(DEAD_PATTERN)
def patterns(subject: Subject) -> Iterator[Finding]:
    """Exceptions that are none."""
    seen = view(subject)
    parsed = seen.parsed
    if parsed is None or seen.is_anothers or seen.method.kind in ("ADALORA", "OSF") or not seen.keys:
        return
    # A name of which target_modules is told that nothing is called so is not told of here again.
    wanted = parsed.fields.get("target_modules")
    listed = wanted if isinstance(wanted, list | tuple) else ()
    names = [*seen.keys, *(u.module for u in seen.updates), *seen.unknown, *listed]
    changed: dict[str, dict[str, Any]] = {}
    told: list[str] = []
    for field in filter(None, (seen.method.ranks_in if seen.method.rank else "", seen.method.alphas_in)):
        table = parsed.fields.get(field) or {}
        if not isinstance(table, Mapping):
            continue
        dead = [key for key in table if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
        if dead:
            changed[field] = {key: value for key, value in table.items() if key not in dead}
            told.append(f"{several(dead)} of {field} {'matches' if len(dead) == 1 else 'match'} no adapted module")
    if changed:
        change = Change(f"take the dead keys out of {' and '.join(changed)}", config=changed)
        yield DEAD_PATTERN.found(
            seen.where, "; ".join(told), field=next(iter(changed)), change=change if seen.is_whole else None
        )


def _short(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:100]


RULES: tuple[Rule, ...] = (
    NO_TARGETS,
    WRONG_TARGETS,
    UNTARGETED,
    DEAD_TARGET,
    UNSAVED_TARGET,
    LAYER_FIELDS,
    DEAD_LAYER,
    DEAD_PATTERN,
)
CHECKERS: tuple[Checker, ...] = (targets, patterns)
