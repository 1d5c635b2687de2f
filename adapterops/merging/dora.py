"""DoRA folded against the base weight: W' − W as a delta of its own, which merges as any other.

W' = m · (W + ΔW) / ‖W + ΔW‖, with the norm of each output (over everything else) or, for a magnitude per input, of each
input.  Sources: DoRA https://arxiv.org/abs/2402.09353; peft `tuners/lora/dora.py`; LyCORIS `lycoris/modules/locon.py`
(`apply_weight_decompose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterops.architectures import Architecture
from adapterops.errors import CannotRepresent, UsageError
from adapterops.merging.modules import Module
from adapterops.merging.terms import Term
from adapterops.methods import METHODS
from adapterops.methods.products import Rows
from adapterops.storage import dtypes
from adapterops.storage.base_weights import BaseWeights
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


def fold(modules: Sequence[Module], base: BaseWeights, table: Architecture | None) -> int:
    """Replace every delta with a magnitude by its change of the base weight; how many modules had one.

    Raises `UsageError` where the base lacks a module, or has another shape for it.
    """
    count = 0
    for module in modules:
        if not any("magnitude" in term.update.tensors for term in module.terms):
            continue
        count += 1
        module.terms[:] = [
            replace(term, foreign=_folded(term, module, base, table)) if "magnitude" in term.update.tensors else term
            for term in module.terms
        ]
    return count


def _folded(term: Term, module: Module, base: BaseWeights, table: Architecture | None) -> Rows:
    """The rows of W' − W of the whole update; a part of a fused projection takes its rows from them."""
    update = term.update
    if update.options.get("kind") == "embedding":
        raise CannotRepresent(f"{term.where}: {module.title}: DoRA on an embedding is not folded against the base")
    component = table.components.get(update.component) if table is not None else None
    spec = component.spec(update.module) if component is not None else None
    tensor = base.weight(update.component, [update.module, spec.original if spec is not None else ""])
    if tensor.dtype not in dtypes.NUMBERS:
        raise UsageError(f"{tensor.where}: has dtype {tensor.dtype}; the base must not be quantised")
    own = METHODS[update.method].weight_shape(update)
    assert own is not None
    size = 1
    for n in own[1:]:
        size *= n
    flipped = spec.transposed if spec is not None else tensor.shape == (size, own[0]) and size != own[0]
    if tensor.numel != own[0] * size or (tensor.shape[0] != own[0] and not flipped):
        raise UsageError(
            f"{tensor.where}: has shape {list(tensor.shape)}, and the adapter changes a weight {list(own)}: it is for "
            "another base model"
        )
    made: list[torch.Tensor] = []

    def at(start: int, stop: int) -> object:
        if not made:
            made.append(_change(term, tensor, own, flipped))
        return made[0][start:stop].double().numpy()

    return Rows((own[0], size), at)  # type: ignore[arg-type]


def _change(term: Term, tensor: LazyTensor, own: tuple[int, ...], flipped: bool) -> torch.Tensor:
    """W' − W as a matrix, in float32."""
    import torch

    update = term.update
    weight = torch.from_numpy(tensor.numpy()).float()
    weight = (weight.T if flipped else weight).reshape(own[0], -1)
    rows = METHODS[update.method].matrix(update)
    changed = torch.empty_like(weight)
    for start, stop in rows.blocks():
        changed[start:stop] = weight[start:stop] + torch.from_numpy(rows.at(start, stop)).float()
    magnitude = torch.from_numpy(update.tensors["magnitude"].numpy()).float().reshape(-1)
    if update.options["dora_axis"] == "out":
        change: torch.Tensor = changed * (magnitude / changed.norm(dim=1))[:, None] - weight
        return change
    inputs = own[1] if len(own) > 1 else weight.shape[1]
    cube = changed.reshape(own[0], inputs, -1)
    factor = magnitude / cube.square().sum(dim=(0, 2)).sqrt()
    scaled: torch.Tensor = cube * factor[None, :, None]
    return scaled.reshape(weight.shape) - weight
