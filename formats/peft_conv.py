"""How peft's LoHa and LoKr keep convolutions, and what of LyCORIS' way fits.

Both flatten a kernel into the inputs of the second factor, so the numbers and their order are the same; a Tucker core
stands in four dimensions, also that of a 1-d convolution (r, r, k, 1).  One field of the config, `use_effective_conv2d`,
says for the whole adapter whether convolutions have cores; those with a kernel of one have none.

peft adapts no 3-d convolution in these ways, and of a 1-d convolution it multiplies a whole second factor of LoKr along
the wrong axes (`make_kron` lifts the first one for four dimensions only).  Sources: huggingface/peft 0.21.2
`tuners/loha/layer.py`, `tuners/lokr/layer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from adapterops_formats.peft_patterns import Base

from adapterops.plugin import LazyTensor, Update, errors

KOHYA = "write it as --to kohya"
"""The way that works where peft's does not."""
_FACTORS = {"loha": ("w1_a", "w1_b", "w2_a", "w2_b"), "lokr": ("w1", "w1_a", "w1_b", "w2_a", "w2_b")}
"""The roles that are matrices in peft."""
_CORES = ("t1", "t2")


def as_peft(update: Update, base: Base) -> Update:
    """The update with its tensors in peft's shapes: the same numbers in the same order.

    Raises `CannotRepresent` where peft has no such shape.
    """
    if update.method not in _FACTORS:
        return update
    if "magnitude" in update.tensors:
        raise errors.CannotRepresent(
            f"{update.name}: has a DoRA magnitude (tensor {update.tensors['magnitude'].key!r}), and {_of(update)} has none; "
            f"{KOHYA}"
        )
    kind, dims = base.kinds.get(update.module), len(base.shapes.get(update.module, ()))
    if kind not in (None, "linear", "conv"):
        raise errors.CannotRepresent(f"{update.name}: {_of(update)} adapts linear and convolution layers only; {KOHYA}")
    tensors = dict(update.tensors)
    for role, tensor in update.tensors.items():
        if role in _FACTORS[update.method]:
            tensors[role] = tensor.reshape((tensor.shape[0], tensor.numel // tensor.shape[0]))
        elif role in _CORES:
            tensors[role] = _core(update, tensor)
        elif role == "w2":
            tensors[role] = _whole(update, tensor, base.shapes.get(update.module, ()))
    if max(dims, *(len(t.shape) for t in update.tensors.values())) > 4:
        raise errors.CannotRepresent(f"{update.name}: {_of(update)} adapts no 3-d convolution; {KOHYA}")
    return replace(update, tensors=tensors)


def _of(update: Update) -> str:
    return f"peft's {'LoHa' if update.method == 'loha' else 'LoKr'}"


def _core(update: Update, tensor: LazyTensor) -> LazyTensor:
    """A core as (r, r, k, 1) where it is that of a 1-d convolution, (r, r, k)."""
    return tensor.reshape((*tensor.shape, 1)) if len(tensor.shape) == 3 else tensor


def _whole(update: Update, tensor: LazyTensor, weight: tuple[int, ...]) -> LazyTensor:
    """LoKr's whole second factor, with the kernel that the module has."""
    if len(weight) == 3 or (not weight and len(tensor.shape) == 3):
        raise errors.CannotRepresent(
            f"{update.name}: tensor {tensor.key!r} {list(tensor.shape)} is LoKr's whole second factor of a 1-d "
            f"convolution, which peft multiplies along the wrong axes; {KOHYA}"
        )
    if not weight:
        return tensor
    inputs = tensor.numel // (tensor.shape[0] * prod(weight[2:]))
    return tensor.reshape((tensor.shape[0], inputs, *weight[2:]))


def refuse_1d(tensors: Mapping[str, LazyTensor], module: str) -> None:
    """Raise `UnsupportedFormat` for a LoKr read from peft whose training took the wrong axes."""
    tensor = tensors.get("w2")
    if tensor is not None and len(tensor.shape) == 3:
        raise errors.UnsupportedFormat(
            f"{tensor.where}: is LoKr's whole second factor of a 1-d convolution ({module}); peft multiplies it along the "
            "wrong axes, so its training and every other reader disagree about what it means; this version does not "
            "convert it"
        )


def kernel(update: Update, base: Base) -> tuple[int, ...] | None:
    """The module's kernel, () for a linear layer; None where neither the base nor a tensor shows it."""
    weight = base.shapes.get(update.module)
    if weight is not None:
        return weight[2:]
    shown = next((update.tensors[r] for r in ("t2", "w2") if r in update.tensors), None)
    if shown is None or (len(shown.shape) == 2 and update.method == "lokr"):
        return None
    return shown.shape[2:]


def effective(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`use_effective_conv2d` for these LoHa or LoKr updates.

    Raises `CannotRepresent` where some convolutions have cores and some have none, or one has a kernel of one.
    """
    having = [u for u in updates if "t2" in u.tensors]
    for update in having:
        core = update.tensors["t2"]
        if prod(core.shape[2:]) == 1:
            raise errors.CannotRepresent(
                f"{update.name}: tensor {core.key!r} {list(core.shape)} is a Tucker core with a kernel of one, and "
                f"{_of(update)} has none there; {KOHYA}"
            )
    lacking = next((u for u in updates if _flat(u, base)), None)
    if having and lacking is not None:
        raise errors.CannotRepresent(
            f"{having[0].name} has a Tucker core and the convolution {lacking.name} has none; a PEFT config says "
            f"use_effective_conv2d for all or none; {KOHYA}"
        )
    return {"use_effective_conv2d": bool(having)}


def _flat(update: Update, base: Base) -> bool:
    """Whether the update surely is of a convolution and its decomposed second factor has no core."""
    return not {"t2", "w2"} & update.tensors.keys() and prod(kernel(update, base) or ()) > 1


def problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where `use_effective_conv2d` is not what the tensors show."""
    stated = config.fields.get("use_effective_conv2d", False)
    for update in updates if stated is not None else ():
        core = update.tensors.get("t2")
        if core is not None and not stated:
            has = "has a Tucker core"
        elif core is None and stated and _flat(update, base):
            has = "is of a convolution without a Tucker core"
        else:
            continue
        tensor = core or next(iter(update.tensors.values()))
        yield (
            f"{tensor.where}: the update {has}, but {config.where} says use_effective_conv2d={str(stated).lower()}; "
            "--set use_effective_conv2d=null derives it anew"
        )
