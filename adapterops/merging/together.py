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


def together(modules: Sequence[Sequence[Term]], device: torch.device, single: bool = False) -> Stacked | None:
    """The terms of each module with their scales, weights aside; None where one has no factors.

    Several modules are all of the same sizes and ranks, and simple.  `single`, which `is_single` must hold for, keeps their
    factors in float32 too.  Raises `BrokenAdapter` for NaN and infinity.
    """
    import torch

    from adapterops.linalg.lowrank import Stacked

    if not all(is_simple(terms) for terms in modules):
        (terms,) = modules
        pairs = [term.pair() for term in terms]
        moved = [(wide(to_device(p[0], device)), wide(to_device(p[1], device))) for p in pairs if p is not None]
        return Stacked.of(moved, [term.scale for term in terms]) if len(moved) == len(pairs) else None
    updates = [[term.update for term in terms] for terms in modules]
    ranks = [update.tensors["B"].shape[1] for update in updates[0]]
    count, rank = len(modules), sum(ranks)
    raw = _raw([update.tensors["A"] for own in updates for update in own], device).view(count, rank, -1)
    left = _raw([update.tensors["B"] for own in updates for update in own], device).view(count, -1)
    rows = left.shape[1] // rank
    b = left.new_empty((count, rows, rank), dtype=torch.float32 if single else torch.float64)
    at = 0
    for own in ranks:
        b[:, :, at : at + own].copy_(left[:, at * rows : (at + own) * rows].view(count, rows, own))
        at += own
    scales = [[term.scale for term in terms] for terms in modules]
    whole = Stacked(b.double(), raw.double(), ranks, scales, (b, raw.float()) if single else None)
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
