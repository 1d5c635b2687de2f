"""DoRA folded against the base weight: W' − W as a delta of its own, which merges as any other.

W' = m · (W + ΔW) / ‖W + ΔW‖, with the norm of each output (over everything else) or, for a magnitude per input, of each
input.  Sources: DoRA https://arxiv.org/abs/2402.09353; peft `tuners/lora/dora.py`; LyCORIS `lycoris/modules/locon.py`
(`apply_weight_decompose`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from adapterops.adapter import Adapter
from adapterops.architectures import Architecture, ModuleSpec
from adapterops.errors import CannotRepresent, UsageError
from adapterops.merging.modules import Module
from adapterops.merging.terms import Term
from adapterops.methods import METHODS
from adapterops.methods.products import Rows
from adapterops.proof import check_finite
from adapterops.storage import dtypes
from adapterops.storage.base_weights import BaseWeights
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch


def fold(
    modules: Sequence[Module], adapters: Sequence[Adapter], base: BaseWeights, table: Architecture | None
) -> tuple[int, str]:
    """Replace every delta with a magnitude by its change of the base weight.

    How many modules had one, and a hash of the base weights that they were folded against.

    Raises `UsageError` where the base lacks a module, or has another shape for it.
    """
    count, used = 0, hashlib.sha256()
    for module in modules:
        if not any("magnitude" in term.update.tensors for term in module.terms):
            continue
        count += 1
        made = []
        for term in module.terms:
            if "magnitude" in term.update.tensors:
                weight = _base_weight(term, module, adapters[term.adapter], base, table)
                used.update(repr((module.component, term.update.module)).encode())
                for tensor in weight.tensors:
                    used.update(tensor.read())
                term = replace(term, foreign=_folded(term, weight))
            made.append(term)
        module.terms[:] = made
    return count, used.hexdigest() if count else ""


class _Weight(NamedTuple):
    """A weight of the base: its tensors, the rows of each that are taken one after another, and whether they are (in, out)."""

    tensors: list[LazyTensor]
    rows: list[tuple[int, int]] | None
    flipped: bool

    def read(self, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns) in float32.  Raises `UsageError` for NaN and infinity."""
        import torch

        whole = []
        for tensor in self.tensors:
            values = torch.from_numpy(tensor.numpy()).float()
            if not torch.isfinite(values).all():
                raise UsageError(f"{tensor.where}: holds NaN or infinity; the base weights are damaged")
            whole.append(values.T if self.flipped else values.reshape(values.shape[0], -1))
        if self.rows is not None:
            whole = [part[start:stop] for part, (start, stop) in zip(whole, self.rows, strict=True)]
        return torch.cat(whole).reshape(rows, columns)


def _base_weight(
    term: Term, module: Module, adapter: Adapter, base: BaseWeights, table: Architecture | None
) -> _Weight:
    update = term.update
    if update.options.get("kind") == "embedding":
        raise CannotRepresent(f"{term.where}: {module.title}: DoRA on an embedding is not folded against the base")
    component = table.components.get(update.component) if table is not None else None
    spec = component.spec(update.module) if component is not None else None
    names = [update.module, spec.original if spec is not None else ""]
    if spec is not None and spec.joins and not base.has(update.component, names):
        # A fused projection, and a base that has its parts.
        parts = [base.weight(update.component, [part]) for part, _, _ in spec.joins]
        found = _Weight(parts, [(start, stop) for _, start, stop in spec.joins], False)
    else:
        found = _Weight([base.weight(update.component, names)], None, _flipped(term, adapter, base, names, spec))
    _insist_on_shape(term, found)
    return found


def _flipped(term: Term, adapter: Adapter, base: BaseWeights, names: Sequence[str], spec: ModuleSpec | None) -> bool:
    """Whether the base keeps the weight as (in, out), as GPT-2's Conv1D does."""
    if spec is not None:
        return spec.transposed
    rows, columns = _sizes(term)
    tensor = base.weight(term.update.component, names)
    stated = adapter.config.get(term.update.component, {}).get("fan_in_fan_out")
    if len(tensor.shape) != 2:
        return False
    if rows != columns:
        return tensor.shape == (columns, rows)
    if stated is None and adapter.provenance.format == "peft":
        raise UsageError(
            f"{tensor.where}: is square, and nothing says whether it is kept transposed (fan_in_fan_out); name the base's "
            "config, too: --base CONFIG"
        )
    return bool(stated)


def _sizes(term: Term) -> tuple[int, int]:
    """Of the update's whole matrix."""
    own = METHODS[term.update.method].weight_shape(term.update)
    assert own is not None
    return own[0], prod(own[1:])


def _insist_on_shape(term: Term, weight: _Weight) -> None:
    rows, columns = _sizes(term)
    for tensor in weight.tensors:
        if tensor.dtype not in dtypes.FLOATS:
            raise UsageError(f"{tensor.where}: has dtype {tensor.dtype}; the base must not be quantised")
    first = weight.tensors[0]
    taken = [(0, t.shape[0]) for t in weight.tensors] if weight.rows is None else weight.rows
    widths = {t.numel // max(1, t.shape[0]) for t in weight.tensors}
    high = sum(stop - start for start, stop in taken)
    found = {(width, high) if weight.flipped else (high, width) for width in widths}
    if found != {(rows, columns)} or any(stop > t.shape[0] for t, (_, stop) in zip(weight.tensors, taken, strict=True)):
        raise UsageError(
            f"{first.where}: has shape {list(first.shape)}, and the adapter changes a weight {[rows, columns]}: it is for "
            "another base model"
        )


def _folded(term: Term, weight: _Weight) -> Rows:
    """The rows of W' − W of the whole update; a part of a fused projection takes its rows from them."""
    made: list[torch.Tensor] = []

    def at(start: int, stop: int) -> np.typing.NDArray[np.float64]:
        if not made:
            made.append(_change(term, weight))
        rows: np.typing.NDArray[np.float64] = made[0][start:stop].double().numpy()
        return rows

    return Rows(_sizes(term), at)


def _change(term: Term, base: _Weight) -> torch.Tensor:
    """W' − W as a matrix, in float32."""
    import torch

    update = term.update
    check_finite([update])
    weight = base.read(*_sizes(term))
    rows = METHODS[update.method].matrix(update)
    changed = torch.empty_like(weight)
    for start, stop in rows.blocks():
        changed[start:stop] = weight[start:stop] + torch.from_numpy(rows.at(start, stop)).float()
    magnitude = torch.from_numpy(update.tensors["magnitude"].numpy()).float().reshape(-1)
    if update.options["dora_axis"] == "out":
        change: torch.Tensor = changed * _over(magnitude, changed.norm(dim=1))[:, None] - weight
        return change
    own = METHODS[update.method].weight_shape(update)
    assert own is not None
    cube = changed.reshape(own[0], own[1], -1)
    scaled: torch.Tensor = cube * _over(magnitude, cube.square().sum(dim=(0, 2)).sqrt())[None, :, None]
    return scaled.reshape(weight.shape) - weight


def _over(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """m / ‖·‖; 0 where there is nothing to stretch."""
    import torch

    return torch.where(norm > 0, magnitude / norm, torch.zeros_like(norm))
