"""`target_parameters`: LoRA on a module's bare parameters (the stacked experts of a layer), and how its keys nest.

The factors of a module's last adapted parameter stand under the module's own name, those of the ones before under
`base_layer.`, `base_layer.base_layer.` …, in the order in which the module defines its parameters; no key names one.  Here such
an update is called by the parameter (`model.layers.0.mlp.experts.gate_up_proj`) where the base's shapes or the config tell
which it is, and else by its key.  Patterns of ranks and alphas are matched against the parameter's name.

Source: huggingface/peft 0.21.2 `tuners/lora/layer.py` (`ParamWrapper`), `tuners/tuners_utils.py` (`_inject_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterops_formats.peft_patterns import Base

from adapterops.plugin import Architecture, Group, ModuleSpec, Update, errors, which_parameters

METHOD = "lora_parameters"
_WRAPPED = ".base_layer"


def nesting(name: str) -> tuple[str, int]:
    """A module's name without the `base_layer` steps at its end, and how many there were."""
    steps = 0
    while name.endswith(_WRAPPED):
        name, steps = name.removesuffix(_WRAPPED), steps + 1
    return name, steps


def meant(groups: list[Group], config: Any, architecture: Architecture | None) -> list[Group]:
    """The groups of LoRA that act on parameters under their method and, where it is known, their parameter's name.

    Raises `BrokenAdapter` where no parameters of the base's module fit, `AmbiguousFormat` where several do.
    """
    levels: dict[str, list[tuple[int, Group]]] = {}
    for entry in groups:
        if entry.method == "lora" and entry.tensors.keys() == {"A", "B"}:
            module, steps = nesting(entry.name)
            levels.setdefault(module, []).append((steps, entry))
    found: dict[int, Group] = {}
    for module, own in levels.items():
        own.sort(key=lambda level: -level[0])
        own_parameters = _of_base(module, architecture)
        stated = _stated(module, config)
        nested = any(steps for steps, _ in own)
        if not nested and not own_parameters and not (stated and not _is_module(module, config, architecture)):
            continue
        if [steps for steps, _ in own] != list(range(len(own)))[::-1]:
            first = next(iter(own[0][1].tensors.values()))
            raise errors.BrokenAdapter(
                f"{first.where}: of the nested factors of {module} some are missing", fault="missing-half"
            )
        members = [entry._replace(method=METHOD) for _, entry in own]
        names = _names(members, module, own_parameters, stated, config)
        for at, ((steps, entry), member) in enumerate(zip(own, members, strict=True)):
            member.options.update({"nesting": steps} | _rank(member, names[at], config))
            if names[at]:
                spec = own_parameters.get(names[at])
                layout = {"is_transposed": spec.transposed} if spec is not None and len(spec.shape) == 3 else {}
                member.options.update({"parameter_name": names[at], **layout})
                member = member._replace(name=f"{module}.{names[at]}")
            if stated:
                member.options["target_parameters"] = list(config.fields["target_parameters"])
            found[id(entry)] = member
    return [found.get(id(entry), entry) for entry in groups]


def _of_base(module: str, architecture: Architecture | None) -> dict[str, ModuleSpec]:
    """The base's bare parameters of a module that has no weight, by their own names."""
    for part in architecture.components.values() if architecture is not None else ():
        start = module + "."
        own = {p.removeprefix(start): s for p, s in part.parameters.items() if p.rpartition(".")[0] == module}
        if own:
            return own
    return {}


def _stated(module: str, config: Any) -> list[str]:
    """The parameters of a module that a config targets, by their own names.

    Raises `UnreadableFile` for a field that is no list of names.
    """
    targets = (config.fields.get("target_parameters") if config is not None else None) or []
    if not isinstance(targets, Sequence) or isinstance(targets, str) or not all(isinstance(t, str) for t in targets):
        raise errors.UnreadableFile(
            f"{config.where}: target_parameters is {targets!r:.80}, not a list of names", fault="config-type"
        )
    return [
        name for owner, _, name in (t.rpartition(".") for t in targets) if owner and f".{module}".endswith(f".{owner}")
    ]


def _is_module(module: str, config: Any, architecture: Architecture | None) -> bool:
    """Whether the factors are rather those of the module's weight."""
    for part in architecture.components.values() if architecture is not None else ():
        spec = part.spec(module)
        if spec is not None and spec.shape:
            return True
    wanted = config.fields.get("target_modules")
    return bool(wanted) and bool(config.targets(module))


def _names(
    members: Sequence[Group], module: str, own: Mapping[str, ModuleSpec], stated: Sequence[str], config: Any
) -> list[str]:
    """The parameter of each nested level, from the innermost; "" where nothing tells."""
    if own:
        updates = [Update("", module, METHOD, m.tensors, options=_rank(m, "", config)) for m in members]
        return which_parameters(updates, {name: spec.shape for name, spec in own.items()}, stated or None)
    return list(stated) if len(stated) == len(members) == 1 else [""] * len(members)


def _rank(entry: Group, parameter: str, config: Any) -> dict[str, Any]:
    """r, where the config says it of this parameter: with it, the number of experts follows."""
    if config is None or ("r" not in config.fields and "rank_pattern" not in config.fields):
        return {}
    if config.fields.get("rank_pattern") and not parameter:
        return {}
    rank = config.rank(f"{nesting(entry.name)[0]}.{parameter}" if parameter else entry.name)
    return {} if rank is None else {"r": rank}


def key_name(update: Update) -> str:
    """The name that stands in the update's keys."""
    module = update.module
    name = update.options.get("parameter_name")
    if name:
        module = module.removesuffix(f".{name}") + _WRAPPED * int(update.options.get("nesting", 0))
    return module


def fields(updates: Iterable[Update], base: Base) -> dict[str, Any]:
    """`target_parameters`.  Raises `UnknownFact` where nothing tells which parameters the factors are for."""
    own = [u for u in updates if u.method == METHOD]
    if not own:
        return {}
    recorded = next((u.options["target_parameters"] for u in own if "target_parameters" in u.options), None)
    if recorded is not None and all(_targeted(u, recorded) for u in own):
        return {"target_parameters": list(recorded)}
    paths: set[str] = set()
    for update in own:
        if update.options.get("parameter_name"):
            paths.add(update.module)
        else:
            raise errors.UnknownFact(
                f"{update.tensors['A'].where}: acts on a parameter of {nesting(update.module)[0]}, and no key says on which; "
                "--base CONFIG finds it by its shape, or say it with --set target_parameters='[\"experts.gate_up_proj\", …]'",
                fault="parameters-ambiguous",
            )
    endings = sorted({".".join(path.split(".")[-2:]) for path in paths})
    exact = base.parameters and all(
        path in paths for path in base.parameters for ending in endings if f".{path}".endswith(f".{ending}")
    )
    return {"target_parameters": endings if exact else sorted(paths)}


def _targeted(update: Update, targets: Sequence[str]) -> bool:
    """Whether a list of targets may mean the update's parameter (an unnamed one is any)."""
    if not update.options.get("parameter_name"):
        return bool(targets)
    return any(f".{update.module}".endswith(f".{target}") for target in targets)


def agree(config: Any, updates: Iterable[Update]) -> Iterable[str]:
    """Sentences where a config targets other parameters than the updates act on."""
    targets = config.fields.get("target_parameters") or []
    own = [u for u in updates if u.method == METHOD]
    if targets and not own:
        yield f"{config.where} says target_parameters={targets!r:.60}, but no factors of such are in the file"
    for update in own:
        if not _targeted(update, targets):
            yield (
                f"{update.tensors['A'].where}: acts on the parameter {update.module}, which {config.where} does not target; "
                "--set target_parameters=null derives it anew"
            )
