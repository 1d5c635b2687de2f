"""The factors of several modules, read into one place: for many small ones, calls cost more than what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterops.merging.deltas import to_device, wide
from adapterops.merging.terms import Term
from adapterops.storage.dtypes import FLOATS
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor

if TYPE_CHECKING:
    import torch

    from adapterops.linalg.lowrank import Stacked


def is_simple(terms: Sequence[Term]) -> bool:
    """Whether the terms are LoRAs whose bytes are their factors, all of one float type."""
    if not all(term.plain and term.pieces is None for term in terms):
        return False
    kinds = {term.update.tensors[role].dtype for term in terms for role in "AB"}
    return len(kinds) == 1 and kinds <= set(FLOATS)


def is_single(terms: Sequence[Term]) -> bool:
    """Whether they are simple, and float32 holds every number of theirs."""
    return is_simple(terms) and terms[0].update.tensors["A"].dtype != "F64"


def together(modules: Sequence[Sequence[Term]], device: torch.device) -> Stacked | None:
    """The terms of each module with their scales, weights aside; None where one has no factors.

    Several modules are all of the same sizes and ranks, and simple.  Raises `BrokenAdapter` for NaN and infinity.
    """
    from adapterops.linalg.lowrank import Stacked

    if not all(is_simple(terms) for terms in modules):
        (terms,) = modules
        pairs = [term.pair() for term in terms]
        moved = [(wide(to_device(p[0], device)), wide(to_device(p[1], device))) for p in pairs if p is not None]
        return Stacked.of(moved, [term.scale for term in terms]) if len(moved) == len(pairs) else None
    updates = [[term.update for term in terms] for terms in modules]
    ranks = [update.tensors["B"].shape[1] for update in updates[0]]
    a = _raw([update.tensors["A"] for own in updates for update in own], device).double()
    raw = _raw([update.tensors["B"] for own in updates for update in own], device).view(len(modules), -1)
    b = a.new_empty((len(modules), raw.shape[1] // sum(ranks), sum(ranks)))
    at = 0
    for rank in ranks:
        part = raw[:, at * b.shape[1] : (at + rank) * b.shape[1]]
        b[:, :, at : at + rank].copy_(part.view(len(b), b.shape[1], rank))
        at += rank
    whole = Stacked(b, a.view(len(modules), sum(ranks), -1), ranks, [[term.scale for term in own] for own in modules])
    if not whole.is_finite:
        for term in (term for terms in modules for term in terms):
            term.pair()  # which says where
    return whole


def _raw(tensors: Sequence[LazyTensor], device: torch.device) -> torch.Tensor:
    """The numbers of tensors of one type, one after the other, on the device, or on the CPU where that has no float64."""
    import torch

    data = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)
    room: Any = data.numpy()
    at, view = 0, memoryview(room)
    for tensor in tensors:
        tensor.source.readinto(tensor.start, view[at : at + tensor.nbytes])
        at += tensor.nbytes
    raw = data.view(getattr(torch, TORCH_NAMES[tensors[0].dtype]))
    return raw if device.type == "mps" else to_device(raw, device)
