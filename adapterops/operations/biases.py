"""Differences of biases as the biases of LoRA's second factors, and back: the same change in two ways of saying it.

    x.diff_b                 (out,)    b' = b + diff_b          Kohya, ComfyUI, LyCORIS, LightX2V
    x.lora_B.bias            (out,)    b' = b + s · bias        peft (`lora_bias`), and so diffusers

A dialect's table says which of the two it has.  peft gives every module of an adapter such a bias or none, and diffusers
leaves a bias that the file lacks without values; so modules without one get zeros.  A difference of a whole weight that
has far fewer outputs than inputs, or the other way round, is a LoRA, too, one of whose factors is the identity.

diffusers says both so of the Wan files that it converts (`loaders/lora_conversion_utils.py`,
`_convert_non_diffusers_wan_lora_to_diffusers`: `.diff_b`, `head.head.diff`); peft 0.21 `tuners/lora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import frexp, prod

from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.architectures import Architecture, ModuleSpec
from adapterops.dialects.table import Dialect
from adapterops.errors import ProofFailed
from adapterops.methods import METHODS
from adapterops.storage.dtypes import encode_scalar
from adapterops.storage.tensor import LazyTensor, MemorySource, is_zero, zeros

_THIN = 8
"""How many times as long as wide a difference of a weight is at least to stand as factors: the identity then adds no more
than an eighth."""
_ROUNDING = 1e-6
"""Of a number that is taken through a scale in float32."""
_FILLED = "filled"
"""The choice of spelling that is recorded: the modules that got a bias of zeros."""


def spoken(adapter: Adapter, dialect: Dialect, fold: bool = False) -> Adapter:
    """The adapter with changes of biases as `dialect` says them; as it is where that makes no difference.

    A bias is taken through a LoRA's scale where that rounds nothing: the scale is a power of two, or will be folded.
    """
    for component in adapter.components:
        in_factors, apart = (_says(dialect, component, method) for method in ("lora", "diff"))
        if in_factors and not apart:
            adapter = _joined(adapter, component, fold)
        elif apart and not in_factors:
            adapter = _parted(adapter, component, fold)
    return adapter


def _says(dialect: Dialect, component: str, method: str) -> bool:
    """Whether the dialect has a place for a bias of that method in a component."""
    places = (p for p in dialect.places if component in (p.component, *p.instead) or p.component == "*")
    return any((s.method, s.role) == (method, "bias") for place in places for s in place.suffixes)


def _joined(adapter: Adapter, component: str, fold: bool) -> Adapter:
    """Differences of biases beside LoRAs, and of thin weights, as LoRAs with biases."""
    own = adapter.of(component)
    loras = {u.module: u for u in own if u.method == "lora"}
    whole = [u for u in own if u.module not in loras and _is_weight(u, adapter.base)]
    made = {u.module: lora for u in whole if (lora := _as_factors(u)) is not None}
    wanted = {u.module: u for u in own if u.method == "diff" and u.tensors.keys() == {"bias"} and u.module in loras}
    # Without any factors nothing says that this is a LoRA's file; peft has no biases for embeddings, nor beside a magnitude.
    odd = any(u.options.get("kind") == "embedding" or "magnitude" in u.tensors for u in loras.values())
    scales = {name: _scale(loras[name]) for name in wanted}
    wanted = {name: u for name, u in wanted.items() if scales[name] and (fold or _is_exact(scales[name]))}
    if not loras or odd or not (made or wanted):
        return adapter
    loras |= {name: _with_bias(loras[name], u.tensors["bias"]) for name, u in wanted.items()} | made
    for name, u in wanted.items():
        _insist_same(u, u.tensors["bias"], loras[name].tensors["bias"], scales[name])
    biased = any("bias" in u.tensors for u in loras.values())
    filled = [name for name, u in loras.items() if biased and "bias" not in u.tensors]
    for name in filled:
        factor = loras[name].tensors["B"]
        loras[name] = _with_bias(loras[name], zeros(factor, factor.shape[:1]), 1.0)
    gone = {u.key for u in own if u.method == "diff" and (u.module in made or u.module in wanted)}
    updates = [loras[u.module] if u.method == "lora" and u.component == component else u for u in adapter]
    out = adapter.with_updates([*(u for u in updates if u.key not in gone), *(loras[name] for name in made)])
    notes = [
        f"{len(wanted)} differences of biases stand as the bias of LoRA's second factor (lora_bias)" if wanted else "",
        f"{len(made)} whole differences stand as factors, one of which is the identity ({next(iter(made))} …)"
        if made
        else "",
        f"{len(filled)} modules got a bias of zeros, as loaders give all of them one" if filled else "",
    ]
    return _noted(out, [f"{component}: {note}" for note in notes if note], [f"{component}.{name}" for name in filled])


def _with_bias(update: Update, bias: LazyTensor, scale: float | None = None) -> Update:
    """The LoRA with a bias that adds as much as this one."""
    scale = _scale(update) if scale is None else scale
    made = bias.reshape((bias.numel,)).mapped(_room(bias, scale), 1.0 / scale)
    return replace(update, tensors={**update.tensors, "bias": made})


def _room(tensor: LazyTensor, scale: float) -> str | None:
    """The type that its numbers times or over the scale need: float16 loses small ones and has no large ones, and 16 bits would
    be rounded by any scale but a power of two."""
    narrow = tensor.dtype == "F16" or (tensor.dtype == "BF16" and not _is_exact(scale))
    return "F32" if narrow and scale != 1.0 else None


def _insist_same(update: Update, before: LazyTensor, after: LazyTensor, factor: float = 1.0) -> None:
    """Raise `ProofFailed` where `after`, times a factor, is not `before`: the output's proof begins with what is made here."""
    one, two = before.numpy().astype("f8").reshape(-1), after.numpy().astype("f8").reshape(-1) * factor
    if not (abs(one - two) <= _ROUNDING * abs(one)).all():
        raise ProofFailed(
            f"{before.where}: is not the same as {after.dtype} times {factor:g}, as which it would have to be written "
            f"({update.name}); --to kohya holds it as it is"
        )


def _is_exact(scale: float) -> bool:
    """Whether numbers can be multiplied by it and divided again without being rounded."""
    return frexp(scale)[0] == 0.5


def _scale(update: Update) -> float:
    return METHODS[update.method].scale(update) or 0.0


def _spec(update: Update, base: Architecture | None) -> ModuleSpec | None:
    component = base.components.get(update.component) if base is not None else None
    return component.spec(update.module) if component is not None else None


def _is_weight(update: Update, base: Architecture | None) -> bool:
    """Whether an update is the whole difference of the weight of a layer that LoRA knows, and of nothing else but its bias."""
    weight = update.tensors.get("weight") if update.method == "diff" else None
    spec = _spec(update, base)
    known = spec is not None and spec.kind in ("linear", "conv") and not spec.transposed
    return known and weight is not None and len(weight.shape) > 1 and update.tensors.keys() <= {"weight", "bias"}


def _as_factors(update: Update) -> Update | None:
    """The difference as a LoRA of scale 1; None where it is not thin."""
    weight, bias = update.tensors["weight"], update.tensors.get("bias")
    out, inner, *kernel = weight.shape
    columns = inner * prod(kernel)
    rank, ones = min(out, columns), [1] * len(kernel)
    if _THIN * rank > max(out, columns):
        return None
    one = _identity(weight, rank)
    if rank == out:
        tensors = {"A": weight, "B": one.reshape((out, rank, *ones))}
    else:
        tensors = {"A": one.reshape((rank, inner, *kernel)), "B": weight.reshape((out, rank, *ones))}
    tensors |= {"bias": bias.reshape((bias.numel,))} if bias is not None else {}
    alpha: Fact[float | None] = Fact(float(rank), Certainty.DERIVED, "a whole difference")
    options = {name: value for name, value in update.options.items() if name != "kind"}
    return replace(update, method="lora", tensors=tensors, alpha=alpha, options=options)


def _identity(like: LazyTensor, size: int) -> LazyTensor:
    """The identity (size, size) in the dtype of another tensor, under its key."""
    one = encode_scalar(like.dtype, 1.0)
    assert one is not None  # every type that a difference may have holds it
    data = bytearray(size * size * len(one))
    for row in range(size):
        at = row * (size + 1) * len(one)
        data[at : at + len(one)] = one
    return LazyTensor(like.key, like.dtype, (size, size), MemorySource(data, like.source.path), 0)


def _parted(adapter: Adapter, component: str, fold: bool) -> Adapter:
    """The biases of LoRA's factors as differences of the modules' own, but for those of zeros that a conversion put there."""
    own = adapter.of(component)
    taken, filled = {u.module for u in own if u.method == "diff"}, _recorded(adapter)
    # A magnitude scales the bias as well, so that it would be another difference.
    loras = [u for u in own if u.method == "lora" and "bias" in u.tensors and "magnitude" not in u.tensors]
    biased = [u for u in loras if (spec := _spec(u, adapter.base)) is not None and spec.bias]
    moved = {u.key for u in biased if u.module not in taken and _scale(u) and (fold or _is_exact(_scale(u)))}
    if not moved:
        return adapter
    out: list[Update] = []
    for update in adapter:
        if update.key not in moved:
            out.append(update)
            continue
        bias = update.tensors["bias"]
        out.append(replace(update, tensors={role: t for role, t in update.tensors.items() if role != "bias"}))
        if f"{component}.{update.module}" not in filled or not is_zero(bias):
            tensors = {"bias": bias.mapped(_room(bias, _scale(update)), _scale(update))}
            _insist_same(update, bias, tensors["bias"], 1.0 / _scale(update))
            out.append(replace(update, method="diff", tensors=tensors, alpha=None, rslora=False))
    note = f"{component}: the biases of {len(moved)} LoRAs (lora_bias) stand as differences of biases"
    return _noted(adapter.with_updates(out), [note])


def _recorded(adapter: Adapter) -> frozenset[str]:
    """The modules whose bias of zeros a conversion made."""
    return frozenset(n for own in adapter.provenance.carried.spelling.values() for n in own.get(_FILLED, ()))


def _noted(adapter: Adapter, notes: Iterable[str], filled: Iterable[str] = ()) -> Adapter:
    told = adapter.provenance
    carried, names = told.carried, sorted(filled)
    if names:
        own = {**carried.spelling.get(told.dialect, {}), _FILLED: names}
        carried = carried._replace(spelling={**carried.spelling, told.dialect: own})
    return replace(adapter, provenance=replace(told, notes=(*told.notes, *notes), carried=carried))
