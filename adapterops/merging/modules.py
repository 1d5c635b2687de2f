"""The updates of several adapters, gathered module by module into what is merged together.

A module's updates fall apart into parts that are merged each for itself: its weight deltas (LoRA, LoHa, LoKr, whole
differences), its vectors (biases, norms, the bias of a LoRA's B, (IA)³), and what is carried whole (saved modules, trained
tokens, bundled embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from adapterops.adapter import Adapter, Update
from adapterops.architectures import Architecture
from adapterops.merging.terms import Term
from adapterops.methods import METHODS
from adapterops.operations.fused import pieces

CARRIED = frozenset({"saved", "trainable_tokens", "bundled"})
"""Methods whose tensors replace something whole."""

WeightOf = Callable[[str, str], float]
"""(component, module) to the weight of one adapter there."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One adapter's tensor of one axis on a module: `role` of `update`, times `scale`.

    `pieces` are the elements that this module has of a fused one's.
    """

    adapter: int
    weight: float
    update: Update
    role: str
    scale: float = 1.0
    pieces: Sequence[tuple[int, int]] | None = None


@dataclass(slots=True)
class Module:
    """Everything that the adapters do to one module, in the adapters' order."""

    component: str
    name: str
    among: int
    """How many adapters are merged, with those that leave the module as it is."""
    terms: list[Term] = field(default_factory=list)
    vectors: dict[tuple[str, str], list[Vector]] = field(default_factory=dict)
    """(method, role) to the tensors that are merged together."""
    carried: dict[str, list[tuple[int, float, Update]]] = field(default_factory=dict)
    """Method to adapters and updates."""

    @property
    def title(self) -> str:
        """Component and module, for messages."""
        return f"{self.component}: {self.name}"

    @property
    def adapters(self) -> frozenset[int]:
        """Those that change it."""
        return self.adding | {adapter for group in self.carried.values() for adapter, _, _ in group}

    @property
    def adding(self) -> frozenset[int]:
        """Those that add something to it, and do not just replace it."""
        found = {term.adapter for term in self.terms}
        return frozenset(found | {vector.adapter for group in self.vectors.values() for vector in group})


def gather(adapters: Sequence[Adapter], weights: Sequence[WeightOf], base: Architecture | None) -> list[Module]:
    """The modules that any adapter changes, in the order of their names, numbers in them by size.

    A fused projection is taken apart where another adapter changes one of its parts.  An adapter whose weight at a module
    is 0 is left out there.
    """
    named = {(u.component, u.module) for adapter in adapters for u in adapter}
    cut = {key: spec for key in named if (spec := _to_cut(key, named, base)) is not None}
    found: dict[tuple[str, str], Module] = {}
    for number, adapter in enumerate(adapters):
        for update in adapter:
            parts = cut.get((update.component, update.module))
            for name, rows in parts.items() if parts is not None else [(update.module, None)]:
                # Under the name that the adapter has for it: a weights file speaks of the adapter's own modules.
                weight = weights[number](update.component, update.module)
                if weight:
                    module = found.setdefault((update.component, name), Module(update.component, name, len(adapters)))
                    _enter(module, number, weight, update, rows)
    for module in found.values():
        if ("lora", "bias") in module.vectors and ("diff", "bias") in module.vectors:
            # Both are added to the module's output; no format has a place for both.
            both = [*module.vectors.pop(("lora", "bias")), *module.vectors["diff", "bias"]]
            module.vectors["diff", "bias"] = sorted(both, key=lambda vector: vector.adapter)
    return [found[key] for key in sorted(found, key=_by_number)]


def _by_number(key: tuple[str, str]) -> list[tuple[int, int | str]]:
    # `layers.2` before `layers.10`: the order of the output must not depend on that of the inputs' keys.
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", "\0".join(key)) if part]


def _to_cut(
    key: tuple[str, str], named: Iterable[tuple[str, str]], base: Architecture | None
) -> dict[str, list[tuple[int, int]]] | None:
    """The parts of a fused projection and their rows, if any adapter changes a part by itself."""
    component = base.components.get(key[0]) if base is not None else None
    spec = component.fused.get(key[1]) if component is not None else None
    if component is None or spec is None:
        return None
    parts = pieces(spec)
    others = {name for part in parts for name in component.whole[part]} - {key[1]}
    return parts if any((key[0], name) in named for name in {*parts, *others}) else None


def _enter(module: Module, number: int, weight: float, update: Update, rows: list[tuple[int, int]] | None) -> None:
    if update.method in CARRIED:
        if rows is not None:
            update = replace(update, tensors=METHODS[update.method].take_rows(update, rows))
        module.carried.setdefault(update.method, []).append((number, weight, update))
        return
    method = METHODS[update.method]
    shape = method.weight_shape(update)
    norm = shape is not None and "weight" in update.tensors
    norm = norm and (len(shape or ()) < 2 or update.options.get("kind") == "norm")
    if norm:
        _enter_vector(module, Vector(number, weight, update, "weight", 1.0, rows))
    elif shape is not None:
        _enter_term(module, Term(number, weight, update, rows))
    if "bias" in update.tensors:
        scale = method.scale(update)
        _enter_vector(module, Vector(number, weight, update, "bias", 1.0 if scale is None else scale, rows))
    if "vector" in update.tensors:
        own = None if update.options.get("on_input") else rows
        _enter_vector(module, Vector(number, weight, update, "vector", 1.0, own))


def _enter_term(module: Module, term: Term) -> None:
    last = module.terms[-1] if module.terms else None
    if last is None or last.adapter != term.adapter:
        module.terms.append(term)
    else:
        # In an order of their own, not that of the file's keys: what has a rank and a magnitude goes first.
        every = (replace(last, beside=()), *last.beside, term)
        first, *others = sorted(
            every, key=lambda t: (t.update.method == "diff", t.update.method != "lora", t.update.method)
        )
        module.terms[-1] = replace(first, beside=tuple(others))


def _enter_vector(module: Module, vector: Vector) -> None:
    module.vectors.setdefault((vector.update.method, vector.role), []).append(vector)
