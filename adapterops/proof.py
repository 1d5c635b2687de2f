"""Proof: the output, read back from disk, does to every module what the source does.

Tensors that are the same bytes are the same; where bytes differ (another dtype, folded scales), the weight deltas
are compared in factor space, without building a product.  The pass over the source's bytes also looks for NaN
and infinities, which no adapter may hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapterops.adapter import Adapter, Update
from adapterops.errors import BrokenAdapter, ProofFailed
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor, dtypes
from adapterops.storage.output import Progress, nothing


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared.  `largest_error` is relative (Frobenius norms of the deltas); 0 means bit for bit."""

    modules: int
    tensors: int
    identical: int
    largest_error: float
    worst: str
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether every tensor is bit-identical and every scale the same."""
        return self.largest_error == 0.0 and self.identical == self.tensors

    def __str__(self) -> str:
        if self.exact:
            return f"{self.modules} modules, every tensor bit-identical, every scale equal"
        return (
            f"{self.modules} modules, {self.identical} of {self.tensors} tensors bit-identical, largest relative error "
            f"of a weight delta {self.largest_error:.2e} ({self.worst}), allowed {self.tolerance:.0e}"
        )


def tolerance(adapter: Adapter, written: Adapter, rounded: bool) -> float:
    """The largest relative error that rounding to the written dtypes explains.

    1e-9 (float64 arithmetic on scales) where nothing was asked to be `rounded`.

    A rounded factor is off by at most half a spacing, a product of two by about one; twice that is allowed.
    """
    worst = 1e-9
    for update in written:
        source = adapter.updates.get(update.key)
        if source is None:
            continue
        for role, tensor in update.tensors.items():
            before = source.tensors.get(role)
            if rounded and before is not None and tensor.dtype in dtypes.EPSILON:
                worst = max(worst, 2 * dtypes.EPSILON[tensor.dtype])
    return worst


def prove(
    adapter: Adapter, written: Adapter, path: str, rounded: bool = False, progress: Progress = nothing
) -> Proof:
    """Compare the source with what was read back; `rounded` allows the error of one rounding a tensor.

    Raises `ProofFailed` naming the first difference, and `BrokenAdapter` for a source that holds NaN or infinity.
    """
    missing = adapter.updates.keys() - written.updates.keys()
    extra = written.updates.keys() - adapter.updates.keys()
    if missing or extra:
        component, module, method = sorted(missing or extra)[0]
        what = "is missing from" if missing else "appears only in"
        raise ProofFailed(f"{path}: {method} of {component}: {module} {what} the output ({len(missing | extra)} such)")
    allowed = tolerance(adapter, written, rounded)
    tensors = identical = 0
    worst, where = 0.0, ""
    for update in adapter:
        other = written.updates[update.key]
        same = _same_bytes(update, other, progress)
        tensors += len(update.tensors)
        identical += sum(same)
        error = _scale_error(update, other) if all(same) else METHODS[update.method].error(update, other)
        if not error <= allowed:
            raise ProofFailed(
                f"{path}: {update.method} of {update.name} differs from the source by {error:.2e} (relative), more than "
                f"the {allowed:.0e} that rounding explains; nothing was written"
            )
        if error > worst:
            worst, where = error, update.name
    return Proof(len(adapter), tensors, identical, worst, where, allowed)


def check_finite(updates: Iterable[Update], progress: Progress = nothing) -> None:
    """Raise `BrokenAdapter` for a tensor with NaN or infinity: what `prove` does on the way, for `--no-verify`."""
    for update in updates:
        for tensor in update.tensors.values():
            for chunk in tensor.chunks():
                _insist_finite(tensor, chunk, update)
                progress(len(chunk))


def _insist_finite(tensor: LazyTensor, chunk: bytearray, update: Update) -> None:
    if dtypes.has_non_finite(tensor.dtype, chunk):
        raise BrokenAdapter(
            f"{tensor.where}: holds NaN or infinity ({update.name}); the training broke, or the file did: "
            "use an earlier checkpoint"
        )


def _same_bytes(update: Update, other: Update, progress: Progress) -> list[bool]:
    """Whether each tensor of `update` has the same bytes in `other`; looks for NaN on the way."""
    out = []
    for role, tensor in update.tensors.items():
        twin = other.tensors.get(role)
        same = twin is not None and (twin.dtype, twin.numel) == (tensor.dtype, tensor.numel)
        others = twin.chunks() if same and twin is not None else iter(())
        for chunk in tensor.chunks():
            _insist_finite(tensor, chunk, update)
            if same and chunk != next(others):
                same = False
            progress(len(chunk))
        out.append(same)
    return out


def _scale_error(update: Update, other: Update) -> float:
    """The relative difference of two updates with equal tensors; inf where their options differ."""
    if dict(update.options) != dict(other.options):
        return float("inf")
    method = METHODS[update.method]
    one, two = method.scale(update), method.scale(other)
    if one is None or two is None:
        return 0.0 if one == two else float("inf")
    return abs(one - two) / abs(one) if one else abs(two)
