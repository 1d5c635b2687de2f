"""LoRA on stacked experts, merged an expert at a time.

peft keeps the factors of all experts of a layer in one pair of matrices (`methods/lora_parameters.py`).  A stack of weights is
no matrix of low rank, but each of its weights has one: for a merge they are modules, `experts.down_proj[3]`, and what comes
out is put together again.  No byte is read for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from adapterops.adapter import Adapter, Update
from adapterops.architectures import Architecture
from adapterops.errors import CannotRepresent, UsageError
from adapterops.methods.lora_parameters import LORA_PARAMETERS
from adapterops.storage.tensor import stack

METHOD = LORA_PARAMETERS.name
Place = tuple[str, str]
"""Component and module."""
R = TypeVar("R")

_EXPERT = re.compile(r"\[(\d+)\]$")


def stack_of(module: str) -> str:
    """The name of the stack of which a module is an expert by its name; other names themselves."""
    return _EXPERT.sub("", module)


@dataclass(slots=True)
class Experts:
    """The stacks of several adapters: by their places, what each adapter has there."""

    stacks: dict[Place, list[Update]] = field(default_factory=dict)

    def whole(self, component: str, module: str) -> str:
        """The stack of which a module is an expert; other modules themselves."""
        name = stack_of(module)
        return name if (component, name) in self.stacks else module

    def asked(self, function: Callable[[str, str], R]) -> Callable[[str, str], R]:
        """A function of component and module that is asked for an expert's stack, under whose name the user knows it."""

        def ask(component: str, module: str) -> R:
            return function(component, self.whole(component, module))

        return ask if self.stacks else function

    def together(self, updates: Sequence[Update], base: Architecture | None) -> list[Update]:
        """The updates, those of the experts of one stack as one, in the place of the first.

        Raises `CannotRepresent` where nothing tells in which order peft nests parameters of one module.
        """
        found: dict[Place, list[Update]] = {}
        out: list[Update | Place] = []
        for update in updates:
            place = update.component, self.whole(*update.key[:2])
            if place[1] == update.module:
                out.append(update)
                continue
            if place not in found:
                out.append(place)
            found.setdefault(place, []).append(update)
        nesting = self._nesting(found, base)
        return [
            _stacked(found[entry], self.stacks[entry], nesting.get(entry, {})) if isinstance(entry, tuple) else entry
            for entry in out
        ]

    def _nesting(self, places: Iterable[Place], base: Architecture | None) -> dict[Place, dict[str, Any]]:
        """How deep the keys of each parameter stand, by the parameters of its module that are changed now."""
        owners: dict[Place, list[str]] = {}
        for component, module in places:
            if all("parameter_name" in u.options for u in self.stacks[component, module]):
                owners.setdefault((component, module.rpartition(".")[0]), []).append(module)
        out: dict[Place, dict[str, Any]] = {}
        for (component, owner), modules in owners.items():
            order = self._order(component, owner, modules, base)
            out |= {(component, m): {"nesting": len(modules) - 1 - order.index(m)} for m in modules}
        return out

    def _order(self, component: str, owner: str, modules: Sequence[str], base: Architecture | None) -> list[str]:
        if len(modules) == 1:
            return list(modules)
        known = base.components.get(component) if base is not None else None
        if known is not None and all(module in known.parameters for module in modules):
            return [name for name in known.parameters if name in modules]
        # The file of an adapter that has all of them shows it.
        levels: dict[str, dict[str, int]] = {}
        for module in modules:
            for update in self.stacks[component, module]:
                path = update.tensors["A"].source.path
                levels.setdefault(path, {})[module] = int(update.options.get("nesting", 0))
        for own in levels.values():
            if len(own) == len(modules):
                return sorted(modules, key=lambda module: -own[module])
        raise CannotRepresent(
            f"{self.stacks[component, modules[0]][0].tensors['A'].where}: the adapters change different parameters of {owner}, "
            "and nothing here tells in which order peft wraps them; --base CONFIG does"
        )


def apart(adapters: Sequence[Adapter]) -> tuple[list[Adapter], Experts]:
    """The adapters with an update for each expert, and what puts them together again.

    Raises `UsageError` where two have other experts, `CannotRepresent` where what is to be merged with a stack is none, or
    where nothing tells how many experts there are.
    """
    found = Experts()
    for adapter in adapters:
        for update in adapter:
            if update.method == METHOD:
                found.stacks.setdefault((update.component, update.module), []).append(update)
    if not found.stacks:
        return list(adapters), found
    flip = {place: _insist_alike(updates) for place, updates in found.stacks.items()}
    out = []
    for adapter in adapters:
        updates: list[Update] = []
        for update in adapter:
            place = update.component, update.module
            if update.method == METHOD:
                updates += _experts(update, flip[place])
            elif place in found.stacks:
                raise CannotRepresent(
                    f"{next(iter(update.tensors.values())).where}: {update.name} is changed by {update.method} here, and in "
                    f"{found.stacks[place][0].tensors['A'].source.path} by LoRA on its experts: these two do not merge"
                )
            else:
                updates.append(update)
        out.append(adapter.with_updates(updates))
    return out, found


def _count(update: Update) -> int:
    try:
        return LORA_PARAMETERS.experts(update)
    except CannotRepresent as error:
        raise CannotRepresent(
            f"{update.tensors['A'].where}: nothing here tells how many experts {update.name} has; --base CONFIG does"
        ) from error


def _layout(update: Update) -> bool | None:
    """Whether the parameter is (E, in, out); None where nothing says it."""
    try:
        return LORA_PARAMETERS.transposed(update)
    except CannotRepresent:
        return None


def _insist_alike(updates: Sequence[Update]) -> bool | None:
    """That all are of one size; returns the layout of the first where others have the other one."""
    first = updates[0]
    layouts = [_layout(update) for update in updates]
    known = set(layouts) - {None}
    mixed = len(known) > 1
    for update, layout in zip(updates, layouts, strict=True):
        if None in layouts and known:
            raise CannotRepresent(
                f"{updates[layouts.index(None)].tensors['A'].where}: nothing here tells whether the experts of {first.name} are "
                "kept transposed, as those of another adapter say; --base CONFIG does"
            )
        sizes = [(_count(u), u.tensors["B"].shape[0], u.tensors["A"].shape[1]) for u in (first, update)]
        if mixed and layout != layouts[0]:
            sizes[1] = (sizes[1][0], sizes[1][2], sizes[1][1])
        if sizes[0] != sizes[1]:
            shown = [f"{count} experts of {[rows, columns]}" for count, rows, columns in sizes]
            raise UsageError(
                f"{update.tensors['A'].where}: {update.name} has {shown[1]} here and {shown[0]} in "
                f"{first.tensors['A'].source.path}: the adapters are for different base models, and cannot be merged"
            )
    return layouts[0] if mixed else None


def _experts(update: Update, layout: bool | None) -> list[Update]:
    """A LoRA for each expert; turned round where its layout is not the one that is asked for."""
    count, rank = _count(update), LORA_PARAMETERS.rank(update)
    turned = layout is not None and LORA_PARAMETERS.transposed(update) != layout
    a, b = update.tensors["A"], update.tensors["B"]
    rows = b.shape[0]
    # (out, r · E) as (out · r, E), the other way round: (E · out, r).
    apart = b.reshape((rows * rank, count)).transposed().reshape((count * rows, rank)) if count > 1 else b
    out = []
    for expert in range(count):
        own_a = a.rows([(expert * rank, (expert + 1) * rank)])
        own_b = apart.rows([(expert * rows, (expert + 1) * rows)])
        factors = {"A": own_b.transposed(), "B": own_a.transposed()} if turned else {"A": own_a, "B": own_b}
        name = f"{update.module}[{expert}]"
        out.append(Update(update.component, name, "lora", factors, update.alpha, update.rslora))
    return out


def _stacked(experts: Sequence[Update], sources: Sequence[Update], nesting: Mapping[str, Any]) -> Update:
    """One update of those of all experts, which are in their order, with the options of the sources."""
    first = experts[0]
    if {update.method for update in experts} != {"lora"} or any(u.tensors.keys() != {"A", "B"} for u in experts):
        raise CannotRepresent(f"{first.name}: what comes out is no LoRA, and experts take no other change")
    rank, rows, count = first.tensors["A"].shape[0], first.tensors["B"].shape[0], len(experts)
    a = stack([update.tensors["A"] for update in experts])
    b = stack([update.tensors["B"] for update in experts])
    if count > 1:
        b = b.reshape((count, rows * rank)).transposed().reshape((rows, rank * count))
    options = {**sources[0].options, **nesting, "num_experts": count, "r": rank}
    targets = [list(u.options["target_parameters"]) for u in sources if "target_parameters" in u.options]
    options.pop("target_parameters", None)
    if len(targets) == len(sources):
        options["target_parameters"] = list(dict.fromkeys(name for own in targets for name in own))
    return replace(first, module=sources[0].module, method=METHOD, tensors={"A": a, "B": b}, options=options)
