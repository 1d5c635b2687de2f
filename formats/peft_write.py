"""The `adapter_config.json` of a PEFT folder, from the config that came along and from the tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from adapterops_formats.peft_config import (
    MUTATING,
    PeftConfig,
    adapted,
    as_json,
    check_given,
    describes,
    from_updates,
    in_short,
    method_of,
    plural,
)
from adapterops_formats.peft_kinds.row import PeftMethod
from adapterops_formats.peft_patterns import Base, named, shuts_out, with_parents

from adapterops.plugin import Adapter, Target, Update, errors

_CLASSIFIERS = ("classifier", "score")
_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
"""What peft's classes for a task add to `modules_to_save` by themselves (`peft_model.py`)."""


def write_config(adapter: Adapter, component: str, target: Target) -> tuple[dict[str, Any], list[str]]:
    """The `adapter_config.json` for the updates of one component, and notes.

    A config that came with the adapter keeps every field that the tensors do not contradict; what no source holds
    is derived from them.

    Raises `UnknownFact` for what neither holds, `CannotRepresent` where peft's matching by name would take in a
    module that the adapter does not have, or where no config makes peft build the adapter's tensors.
    """
    updates = list(adapter)
    method = method_of(updates)
    part = target.architecture.components.get(component) if target.architecture else None
    base = Base.of(part)
    check_given(target.fields, method, target.fields if adapter.config else ())
    derived = from_updates(updates, base, method=method)
    own = dict(adapter.config.get(component, {}))
    if method.rank and method.rank in own and own[method.rank] is None:
        own |= {name: derived[name] for name in (method.rank, method.ranks_in) if name in derived}
    heads = _HEADS.get(str(target.fields.get("task_type", own.get("task_type"))), ())
    saved, notes = _saved_fields(updates, part, method, heads)
    if adapter.mutated_init is None and str(own.get("init_lora_weights", "")).lower().startswith(MUTATING):
        # Said by the header of a file that cannot have been trained so: it would have peft change the base.
        del own["init_lora_weights"]
    before = dict(own)
    dropped = {key.removeprefix("base_model.model.") for key in adapter.provenance.dropped}
    if own and not target.repair and _still_true(own, updates, method, base):
        # The config's own words hold, but for lists of names that would take in more, or that say nothing.
        config = {**method.defaults, **derived, **_unsaid(method), **saved, **own}
        if any(name not in own for name in method.shaping):
            # Fields of `--set` alone say nothing of the others.
            config |= {n: v for n, v in method.fields(adapted(updates, method), base).items() if n not in own}
        lost = _takes_more(own, updates, dropped, method)
        more = lost or _takes_more(own, updates, base.names or (), method)
        if method.targeted and (more or own.get("target_modules") is None):
            config |= {"target_modules": derived["target_modules"], **dict.fromkeys(method.narrowing)}
        if more:
            which = "the modules that are dropped" if lost else "more modules of the base"
            notes.append(f"target_modules is made anew: the one in the config would adapt {which}")
        unsaid = any(name in own and own[name] is None for name in method.shaping if name not in method.nulls)
        if "feedforward_modules" in method.shaping:
            # peft would fill it in by the model's type, and insists on a part of `target_modules`.
            remade = config["target_modules"] is not own.get("target_modules")
            unsaid = remade or own.get("feedforward_modules") is None
        if unsaid:
            config |= method.fields(adapted(updates, method), base)
        if part is not None and _bystander(own.get("modules_to_save") or (), _saved_modules(updates), part.modules):
            config["modules_to_save"] = saved.get("modules_to_save")
            notes.append("modules_to_save is made anew: the one in the config names modules that the file lacks")
    else:
        kept = _travelling(own, method)
        config = {**method.defaults, **kept, **derived, **saved, **method.fields(adapted(updates, method), base)}
        if not all(u.module for u in adapted(updates, method)):
            # Tensors that stand once for all modules do not say for which.
            names = ("target_modules", *method.narrowing) if method.targeted and _is_own(own, method) else ()
            config |= {name: own[name] for name in names if name in own}
        config |= _excluded(own, config, updates, method)
        if own and target.repair:
            config |= _used_targets(own, config, updates, method, {*(base.names or ()), *dropped})
            config = _own_words(own, config, updates, method, base)
            config = {**{name: value for name, value in before.items() if value in _LEAST}, **config}
        elif made := _made_anew(own, config, target.fields):
            notes.append(
                "config fields that do not fit the tensors or the names of their modules are derived anew: "
                + ", ".join(made)
            )
    transposed = any(base.kinds.get(u.module) == "transposed" for u in adapted(updates, method))
    if "fan_in_fan_out" in method.flags and transposed:
        config["fan_in_fan_out"] = True
    said = {k: v for k, v in target.fields.items() if not _answered(k, v, config, method)}
    config |= {n: own[n] for n, within in _tables(method) if within in said and n in own} | said
    whole = next((u for u in adapted(updates, method) if not u.module), None)
    if method.targeted and whole is not None and not config.get("target_modules"):
        raise errors.UnknownFact(
            f"{next(iter(whole.tensors.values())).where}: stands for all modules that were adapted, and nothing says which: "
            "--set target_modules='[\"q_proj\", …]' does"
        )
    for name in method.legacy:
        config.pop(name, None)
    _agrees(config, updates, base, target.fields, method)
    if own and target.repair:
        notes += _changes(before, config, updates, method, base)
    absent = [m for m in config.get("modules_to_save") or () if not _is_saved(m, updates)]
    if absent:
        notes.append(
            f"modules_to_save lists {', '.join(dict.fromkeys(absent))}, of which the file holds nothing: peft cannot load "
            "it into a base that has such a module"
        )
    return config, notes


def _tables(method: PeftMethod) -> list[tuple[str, str]]:
    """The fields that have a table of exceptions, each with that: who says the one means it beside the other."""
    ranked = [(method.rank, method.ranks_in)] if method.rank else []
    scaled = [(method.alpha, method.alphas_in)] if method.alpha else []
    return [pair for pair in (*ranked, *scaled, *((s.name, s.within) for s in method.settings)) if pair[1]]


def _used_targets(
    own: Mapping[str, Any], config: Mapping[str, Any], updates: list[Update], method: PeftMethod, walk: Iterable[str]
) -> dict[str, Any]:
    """The names of a config's list that mean a module of the file, with the fields that narrow down what they mean.

    Nothing where they do not mean all modules of the file, or mean another one of `walk`.
    """
    stated = own.get("target_modules")
    if not method.targeted or not isinstance(stated, list):
        return {}
    modules = {u.module for u in adapted(updates, method)}
    used = [name for name in dict.fromkeys(stated) if any(named(module, [name]) for module in modules)]
    narrowed = {name: own[name] for name in method.narrowing if own.get(name) not in _NO_NAMES}
    fields = {"target_modules": used, **narrowed}
    view = PeftConfig.parse({**config, **fields}, "config", method)
    exact = all(named(m, used) and view.targets(m) for m in modules)
    return fields if exact and not _takes_more(view.fields, updates, walk, method) else {}


def _own_words(
    own: Mapping[str, Any], config: dict[str, Any], updates: list[Update], method: PeftMethod, base: Base
) -> dict[str, Any]:
    """The config with the fields on shapes as `own` says them, where that is true of the tensors."""
    for name in method.shaping:
        trial, problems = {**config, name: own.get(name)}, list[str]()
        if own.get(name) is not None:
            describes(trial, "config", updates, problems.append, method, base)
            config = config if problems else trial
    return config


_NO_NAMES: tuple[Any, ...] = (None, [], "")
"""What a field that narrows down says where it does not (0 is a layer)."""
_LEAST: tuple[Any, ...] = (None, [], {}, "", False)
"""What a field says that says nothing."""


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], updates: list[Update], method: PeftMethod, base: Base
) -> list[str]:
    """A note for each field that says something else now, with the number of modules that call for it and one of them."""
    out = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new or (name not in before and name in after) or (old in _LEAST and new in _LEAST):
            continue
        problems = _problems({**after, name: old}, updates, method, base)
        told = list(filter(None, (in_short(sentence, "the config") for sentence in problems)))
        count = len({text.split("'")[1] for text in told})
        why = f" ({plural(count)}; e.g. {told[0]})" if told else ""
        out.append(f"repaired {name}: {_shown(old)} → {_shown(new)}{why}")
    return out


def _problems(config: Mapping[str, Any], updates: list[Update], method: PeftMethod, base: Base) -> list[str]:
    """Why a config is not that of the updates, as far as that can be said."""
    problems: list[str] = []
    try:
        describes(config, "the config", updates, problems.append, method, base)
    except errors.AdapterOpsError:
        return []  # it is no config at all
    return problems


_LONGEST = 80
"""How much of a value a note shows."""


def _shown(value: Any) -> str:
    text = as_json(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _unsaid(method: PeftMethod) -> dict[str, Any]:
    """What a true config means by the fields on rank and scale that it does not say."""
    out: dict[str, Any] = {method.rank: method.rank_default} if method.rank else {}
    if method.rank and method.ranks_in:
        out[method.ranks_in] = {}
    if method.alpha and method.alphas_in:
        out[method.alphas_in] = {}
    return out


_COMMON = frozenset({"task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"})
"""What every config says, whatever its method."""


def _is_own(own: Mapping[str, Any], method: PeftMethod) -> bool:
    return str(own.get("peft_type") or method.kind).upper() == method.kind


def _travelling(own: Mapping[str, Any], method: PeftMethod) -> dict[str, Any]:
    """The fields of a config that the tensors do not decide; of another method's, only what every method has."""
    if not _is_own(own, method):
        return {k: v for k, v in own.items() if k in _COMMON}
    void = {*method.derived, *method.narrowing, *method.refused, "peft_type"}
    return {k: v for k, v in own.items() if k not in void}


def _excluded(
    own: Mapping[str, Any], config: Mapping[str, Any], updates: list[Update], method: PeftMethod
) -> dict[str, Any]:
    """`exclude_modules` of a config whose other names are made anew, where it takes none of the file's modules away."""
    name = "exclude_modules"
    if name not in method.narrowing or own.get(name) in _NO_NAMES or not config.get("target_modules"):
        return {}
    view = PeftConfig.parse({**config, name: own[name]}, "config", method)
    return {name: own[name]} if all(view.targets(u.module) for u in adapted(updates, method)) else {}


def _made_anew(own: Mapping[str, Any], config: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """The fields of a config that came along which say something else now; what the user gave goes back to what it was."""
    return [n for n, value in own.items() if n not in given and config.get(n) != value and value not in _LEAST]


def _agrees(
    config: Mapping[str, Any], updates: list[Update], base: Base, given: Mapping[str, Any], method: PeftMethod
) -> None:
    """Raise `Conflict` where the finished config, the user's fields in it, does not say what the tensors are."""
    where = f"the config to be written (--set {', '.join(given)})" if given else "the config to be written"
    describes(config, where, updates, conflict, method, base)
    view = PeftConfig.parse(config, where, method)
    for update in adapted(updates, method):
        if update.alpha is not None and not view.agrees(update):
            rule = view.rule(update.module)
            said = f"{method.alpha} {rule.alpha}" + (f", {method.rslora} {rule.rslora}" if method.rslora else "")
            has = f"{update.alpha}" + (f", {method.rslora} {update.rslora}" if method.rslora else "")
            raise errors.Conflict(
                f"{next(iter(update.tensors.values())).where}: {where} says {said} for {update.name}, but the adapter "
                f"has {has}"
            )
    if base.names is not None and "target_modules" in given and _takes_more(config, updates, base.names, method):
        raise errors.Conflict(f"{where}: its target_modules would adapt modules of the base that the file lacks")
    absent = [m for m in given.get("modules_to_save") or () if not _is_saved(m, updates)]
    if absent:
        raise errors.Conflict(f"{where}: modules_to_save names {absent[0]}, of which the file holds no tensor")
    if given.get("trainable_token_indices") and not any(u.method == "trainable_tokens" for u in updates):
        raise errors.Conflict(
            f"{where}: trainable_token_indices names tokens, and the file holds no trained rows: peft would fail with a "
            "KeyError; leave it out"
        )
    layers = [n for n in ("layers_to_transform", "layers_pattern") if given.get(n) is not None]
    if layers and isinstance(config.get("target_modules"), str):
        raise errors.Conflict(
            f"{where}: {layers[0]} beside a target_modules that is a pattern, which peft refuses; leave it out (the pattern "
            "names the layers), or give the modules, too: --set target_modules='[\"q_proj\", …]'"
        )


def conflict(sentence: str) -> None:
    """Raise `Conflict`: what `describes` is given where a contradiction must not stand."""
    raise errors.Conflict(sentence)


def _is_saved(entry: str, updates: list[Update]) -> bool:
    """Whether a saved module of the file is one that peft would find by an entry of `modules_to_save`."""
    return any(path.endswith(entry) for u in updates if u.method == "saved" for path in with_parents([u.module]))


def _answered(name: str, value: Any, config: Mapping[str, Any], method: PeftMethod) -> bool:
    """Whether a field that the user gave only asked for what stands in the config now, or says the same in short."""
    if value is None and (name in method.derived or name not in method.all_fields):
        return True
    return name == "trainable_token_indices" and list((config.get(name) or {}).values()) == [value]


def _still_true(config: Mapping[str, Any], updates: list[Update], method: PeftMethod, base: Base) -> bool:
    """Whether a config that came along says of these updates what they are."""
    problems: list[str] = []
    try:
        describes(config, "config", updates, problems.append, method, base)
        view = PeftConfig.parse(config, "config", method)
    except errors.AdapterOpsError:
        return False
    if problems or not view.states_alpha or view.method is not method:
        return False
    return all(view.agrees(u) for u in adapted(updates, method))


def _takes_more(config: Mapping[str, Any], updates: list[Update], names: Iterable[str], method: PeftMethod) -> bool:
    view = PeftConfig.parse(config, "config", method)
    if not isinstance(config.get("target_modules"), (str, list)):
        return False
    own = {u.module for u in adapted(updates, method)}
    if "" in own:
        return False  # the modules are those that the config names
    return any(view.targets(name) for name in with_parents(names) - own)


def _saved_modules(updates: list[Update]) -> set[str]:
    """The modules that are saved whole, by their own names or those of modules inside them."""
    whole = [u for u in updates if u.method == "saved" and u.options.get("kind") != "wrapped"]
    return {u.module for u in whole if set(u.tensors) != {"bias"}}


def _insist_on_place(updates: Sequence[Update], biases: Sequence[Update], method: PeftMethod) -> None:
    """Raise `CannotRepresent` for what a config of the method cannot say of parameters saved beside it."""
    tokens = [u for u in updates if u.method == "trainable_tokens" and u.method not in method.methods]
    wrong = [(u, "trained token rows", "trainable_token_indices") for u in tokens if not method.tokens]
    wrong += [(u, "a bias alone", "bias") for u in biases if not method.biases]
    whole = [u for u in updates if u.method == "saved" and u not in biases]
    wrong += [(u, "a saved module", "modules_to_save") for u in whole if not method.saves]
    for update, what, name in wrong[:1]:
        raise errors.CannotRepresent(
            f"{update.name}: {what} beside {method.title}, whose PEFT config has no {name}: take "
            f"tensor {next(iter(update.tensors.values())).key!r} out of the file"
        )


def _saved_fields(
    updates: list[Update], base: Any, method: PeftMethod, heads: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """`modules_to_save`, `bias` and `trainable_token_indices`, and notes."""
    own = {u.module for u in adapted(updates, method)}
    biases = [u for u in updates if u.method == "saved" and set(u.tensors) == {"bias"}]
    _insist_on_place(updates, biases, method)
    saved = _saved_modules(updates)
    fields: dict[str, Any] = {}
    notes: list[str] = []
    if biases:
        fields["bias"] = method.bias_only if all(u.module in own for u in biases) else "all"
    if saved:
        # peft would look for a wrapper inside a wrapper, so only the outermost are named.
        outermost = [m for m in saved if with_parents([m]).isdisjoint(saved - {m})]
        fields["modules_to_save"] = sorted({_wrapped(module, heads) for module in outermost})
    tokens = {u.module: _indices(u) for u in updates if u.method == "trainable_tokens" and u.module not in own}
    if tokens:
        fields["trainable_token_indices"] = tokens
    walk = with_parents(own | (set(base.modules) if base is not None else set()))
    for field, inside in (("modules_to_save", saved), ("trainable_token_indices", set(tokens))):
        clash = _bystander(fields.get(field, ()), inside, walk)
        if clash is not None:
            raise errors.CannotRepresent(
                f"{clash[0]} is saved, but peft matches {field} by the bare end of a name, so it would also take "
                f"{clash[1]}, of which the adapter saves nothing; rename the module in the base, or take the saved one "
                "out of the file"
            )
    shut = next((m for m in sorted(own) if shuts_out(fields.get("modules_to_save", ()), m)), None)
    if shut is not None:
        raise errors.CannotRepresent(
            f"{shut} is adapted, but its name holds that of a saved module ({', '.join(fields['modules_to_save'])}), "
            "and peft adapts nothing under such a name; rename one of them in the base, or take the saved one out of "
            "the file"
        )
    for name in sorted(saved):
        spec = base.modules.get(name) if base is not None else None
        if spec is not None and spec.tied_to:
            notes.append(f"{name} is saved, and the base ties it to {spec.tied_to}: peft unties them")
    return fields, notes


def _wrapped(module: str, heads: Sequence[str]) -> str:
    """The module, or the head around it, which peft wraps in any case."""
    around = sorted(with_parents([module]), key=len)
    return next((name for name in around if name.endswith(tuple(heads))), module)


def _indices(update: Update) -> list[int]:
    delta, indices = update.tensors["delta"], update.options.get("indices")
    if indices is None:
        raise errors.UnknownFact(
            f"{delta.where}: which {delta.shape[0]} tokens these rows are for is not among the tensors; say it with "
            "--set trainable_token_indices='[…]'"
        )
    return list(indices)


def _bystander(entries: Iterable[str], inside: set[str], walk: Iterable[str]) -> tuple[str, str] | None:
    """An entry that peft matches by the bare end of a name, and a module outside `inside` that it takes too."""
    mine = with_parents(inside)
    for name in sorted(walk):
        entry = next((e for e in entries if name.endswith(e)), None)
        if entry is not None and name not in mine and with_parents([name]).isdisjoint(inside):
            return entry, name
    return None
