"""From an adapter of transformers' modules to what llama.cpp's tensors are given, or why it cannot be."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import isclose
from typing import NamedTuple

from adapterops_formats import gguf_table as table
from adapterops_formats.gguf_entries import ALPHA, EXPERTS
from adapterops_formats.gguf_experts import taken_apart
from adapterops_formats.gguf_rows import with_rows

from adapterops.plugin import (
    METHODS,
    Adapter,
    Architecture,
    Certainty,
    Component,
    Fact,
    ModuleSpec,
    Target,
    Update,
    errors,
)


class Base(NamedTuple):
    """The base model as llama.cpp has it."""

    row: table.Row
    component: Component
    heads: table.Heads | None

    @classmethod
    def of(cls, adapter: Adapter, target: Target) -> Base:
        """Raises `UnknownArchitectureOfFile` without a base, `CannotRepresent` for one that is not in the table."""
        path, base = adapter.provenance.path, target.architecture
        other = next((u for u in adapter if u.component != "model"), None)
        if other is not None:
            raise errors.CannotRepresent(
                f"{other.name}: llama.cpp runs language models, and this is a part of another pipeline; --to peft or --to "
                "diffusers holds it"
            )
        named = next((update.name for update in adapter), "")
        component = base.components.get("model") if isinstance(base, Architecture) else None
        if component is None or not component.class_name:
            raise errors.UnknownArchitectureOfFile(
                f"{path}: GGUF names tensors as llama.cpp's architecture for the base does ({named}), and orders some rows by "
                "its heads; give the base's config.json with --base CONFIG"
            )
        row = table.of_class(component)
        if row is None:
            raise errors.CannotRepresent(
                f"{path}: how llama.cpp lays out the weights of {component.class_name} is not known here ({named}); known: "
                f"{table.known()}"
            )
        return cls(row, component, table.heads_of(row, component))

    def canonical(self, module: str) -> tuple[str, str]:
        """A module in the row's own names: with `{}` for its layer, and the layer's number."""
        class_name = self.component.class_name.rpartition(".")[2]
        return table.pattern(table.as_row(self.row, class_name, module))

    def spelled(self, module: str) -> str:
        """The name in GGUF."""
        name, layer = self.canonical(module)
        return table.names(self.row)[name].format(layer)

    def parts(self, module: str) -> list[str]:
        """The stacks that a parameter of experts becomes; none for what is no such parameter."""
        for parameter, ends in self.row.experts.items():
            if module.endswith("." + parameter):
                return [module.removesuffix(parameter) + end for end in ends]
        return []


def insist(update: Update, base: Base) -> None:
    """Raise `CannotRepresent` for what llama.cpp would not apply, with the reason and the way that works."""
    method, first = METHODS[update.method], next(iter(update.tensors.values()))
    here = f"{first.where} ({update.name})"
    leave = "--allow-drop leaves it out"
    if update.method == "saved" and update.options.get("kind") == "wrapped":
        raise errors.CannotRepresent(
            f"{here}: is a parameter of the base, as peft saves it beside the factors of embeddings; where the training left it "
            "as it was (no tokens were added), the base has it, and --allow-drop leaves it out"
        )
    if update.method in ("saved", "trainable_tokens", "diff", "bundled", "ln_tuning"):
        raise errors.CannotRepresent(
            f"{here}: {method.title}: a GGUF adapter holds low-rank pairs only; convert the base with these parameters in it, "
            f"or {leave}"
        )
    if update.method not in ("lora", "alora", EXPERTS):
        way = "adapterops to-lora makes plain LoRA of it" if method.linear else "only --to peft holds it"
        raise errors.CannotRepresent(f"{here}: llama.cpp knows LoRA, not {method.title}; {way}, or {leave}")
    if "magnitude" in update.tensors:
        raise errors.CannotRepresent(
            f"{here}: has a DoRA magnitude, and llama.cpp adds s·B·A and normalises nothing; adapterops merge SRC "
            f"--method svd --rank R --base-weights BASE folds it into a plain LoRA, or {leave}"
        )
    extra = next((role for role in update.tensors if role not in ("A", "B")), None)
    if extra is not None:
        what = "a bias" if extra == "bias" else f"a tensor {extra}"
        raise errors.CannotRepresent(
            f"{here}: has {what} beside its factors, and llama.cpp's adapters have no place for it; {leave}"
        )
    if update.options.get("layer_replication"):
        raise errors.CannotRepresent(
            f"{here}: is for a base whose layers are repeated (layer_replication), which llama.cpp does not do"
        )
    _insist_on_module(update, base, here)
    for tensor in update.tensors.values():
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise errors.CannotRepresent(
                f"{tensor.where}: llama.cpp's adapters are float32, float16 or bfloat16, and this is {tensor.dtype}; give "
                "--dtype float32"
            )
        if len(tensor.shape) != 2:
            raise errors.CannotRepresent(f"{tensor.where}: shape {list(tensor.shape)} is that of no linear layer")


def _insist_on_module(update: Update, base: Base, here: str) -> None:
    name, _ = base.canonical(update.module)
    spec = base.component.spec(update.module)
    if (update.method == EXPERTS) != bool(base.parts(update.module)) or (
        update.method != EXPERTS and name not in base.row.modules
    ):
        raise errors.CannotRepresent(
            f"{here}: llama.cpp applies no adapter there in {base.row.name} ({base.row.follows}); --allow-drop leaves it out"
        )
    tied = _tied(update.module, spec, base.component)
    if tied is not None:
        raise errors.CannotRepresent(
            f"{here}: {update.module} and {tied} are one weight in this base, and one tensor in llama.cpp, which finds adapters "
            "by its name: this one would act on both, or stop it; --allow-drop leaves it out"
        )
    embeds = spec is not None and spec.kind == "embedding"
    if embeds != (update.options.get("kind") == "embedding"):
        raise errors.CannotRepresent(
            f"{here}: {update.module} is {'an embedding' if embeds else 'no embedding'} of the base, and the factors are not; is "
            "it the right --base?"
        )
    if update.method == "alora" and embeds:
        raise errors.CannotRepresent(
            f"{here}: aLoRA acts on linear layers, and this is an embedding; --allow-drop leaves it out"
        )
    order = base.row.order(name)
    if order is None:
        return
    if base.heads is None:
        raise errors.UnknownFact(
            f"{here}: llama.cpp orders the rows of {update.module} by heads, and the config of the base does not say how many "
            "there are (num_attention_heads); add it to the config of --base"
        )
    try:
        order(update.tensors["B"].shape[0], base.heads)
    except ValueError as error:
        raise errors.CannotRepresent(f"{here}: {error}; is it the right --base?") from error


def _tied(module: str, spec: ModuleSpec | None, component: Component) -> str | None:
    """Another module that has the same weight."""
    if spec is not None and spec.tied_to is not None:
        return spec.tied_to
    return next((name for name, other in component.modules.items() if other.tied_to == module), None)


def _as_float32(value: float) -> float:
    """The nearest number of float32.  Zero means scale 1 to llama.cpp, so that what becomes zero or infinite is 1."""
    try:
        near = float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return 1.0
    return near or 1.0


def _product(update: Update) -> float:
    """The alpha with which scale = alpha / rank holds."""
    method = METHODS[update.method]
    if update.alpha is not None and update.alpha.value is not None and not update.rslora:
        return update.alpha.value
    scale = method.scale(update)
    assert scale is not None  # nothing is written whose alpha is unknown
    rank = method.rank(update) or 1
    product = scale * rank
    near = round(product)
    # √r · √r need not be r.
    return float(near) if near and abs(product - near) < 1e-12 * abs(near) else product


def is_idle(update: Update) -> bool:
    """Whether the scale is zero."""
    return _product(update) == 0.0


def common_alpha(updates: Iterable[Update]) -> tuple[float, bool]:
    """The alpha that most modules have, as float32, and whether it is exact."""
    counts = Counter(_product(update) for update in updates)
    counts.pop(0.0, None)
    if not counts:
        return 1.0, True
    # Of equally frequent ones an exact one, and of those the one that comes first.
    value = max(counts, key=lambda alpha: (counts[alpha], _as_float32(alpha) == alpha))
    near = _as_float32(value)
    return near, near == value


def with_alpha(update: Update, alpha: float, exact: bool) -> Update:
    """The update at the common alpha; what its own scale is more or less is in its second factor."""
    product = _product(update)
    same = product == alpha if exact else isclose(product, alpha, rel_tol=2.0**-24)
    fact: Fact[float | None] = Fact(alpha, Certainty.DERIVED, ALPHA)
    tensors = dict(update.tensors)
    if not same:
        tensors["B"] = tensors["B"].mapped(None, product / alpha)
    return replace(update, tensors=tensors, alpha=fact, rslora=False)


def in_place(update: Update, base: Base) -> list[Update]:
    """The update as llama.cpp has its weight: rows in its order, an embedding's A by tokens, experts in stacks."""
    parts = base.parts(update.module)
    if parts:
        return taken_apart(update, parts)
    tensors = dict(update.tensors)
    if update.options.get("kind") == "embedding":
        tensors["A"] = tensors["A"].transposed()
    order = base.row.order(update.module)
    if order is not None and base.heads is not None:
        tensors["B"] = with_rows(tensors["B"], order(tensors["B"].shape[0], base.heads))
    return [replace(update, tensors=tensors)]
