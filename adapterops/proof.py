"""Proof: the output, read back from disk, does to every module what the source does.

Tensors that are the same bytes are the same; where bytes differ (another dtype, folded scales), the weight deltas
are compared in factor space, without building a product.  The pass over the source's bytes also looks for NaN
and infinities, which no adapter may hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from adapterops.adapter import Adapter, Update
from adapterops.architectures import Architecture
from adapterops.errors import BrokenAdapter, ProofFailed
from adapterops.methods import METHODS
from adapterops.operations.fused import cut, lean
from adapterops.storage import LazyTensor, dtypes
from adapterops.storage.output import Progress, nothing
from adapterops.storage.rounding import beyond_rounding
from adapterops.storage.tensor import CHUNK


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
        modules = f"{self.modules} module" + ("s" if self.modules != 1 else "")
        if self.exact:
            return f"{modules}, every tensor bit-identical, every scale equal"
        if self.largest_error == 0.0:
            return f"{modules}, {self.identical} of {self.tensors} tensors bit-identical, every delta equal"
        return (
            f"{modules}, {self.identical} of {self.tensors} tensors bit-identical, largest relative error "
            f"of a weight delta {self.largest_error:.2e} ({self.worst}), allowed {self.tolerance:.0e}"
        )


def tolerance(pairs: Iterable[tuple[Update, Update]], rounded: bool) -> float:
    """The largest relative error that rounding to the written dtypes explains.

    1e-9 (float64 arithmetic on scales) where nothing was asked to be `rounded`.

    A rounded factor is off by at most half a spacing, a product of two by about one; twice that is allowed.
    """
    worst = 1e-9
    for source, update in pairs if rounded else ():
        for role, tensor in update.tensors.items():
            before = source.tensors.get(role)
            if before is not None and tensor.dtype in dtypes.EPSILON:
                worst = max(worst, 2 * dtypes.EPSILON[tensor.dtype])
    return worst


def prove(adapter: Adapter, written: Adapter, path: str, rounded: bool = False, progress: Progress = nothing) -> Proof:
    """Compare the source with what was read back; `rounded` allows the error of one rounding a tensor.

    Where one of them has fused projections and the other their parts, both are cut into the rows of the parts.

    Raises `ProofFailed` naming the first difference, and `BrokenAdapter` for a source that holds NaN or infinity.
    """
    pairs = _pairs(adapter, written, path)
    allowed = tolerance(pairs, rounded)
    tensors = identical = 0
    worst, where = 0.0, ""
    buffers = bytearray(CHUNK), bytearray(CHUNK)
    for update, other in pairs:
        _insist_on_number(update)
        _same_structure(update, other, path)
        same = _same_bytes(update, other, path, buffers, progress)
        tensors += len(update.tensors)
        identical += sum(same)
        if rounded:
            _insist_on_rounding(update, other, same, path)
        bit_identical = all(same) and len(same) == len(other.tensors)
        error = _scale_error(update, other) if bit_identical else _error(update, other)
        if not error <= allowed:
            hint = "" if not rounded else "; the values do not fit the dtype: --dtype bfloat16 or float32 may hold them"
            raise ProofFailed(
                f"{path}: {update.method} of {update.name} differs from the source by {error:.2e} (relative), more "
                f"than the {allowed:.0e} that rounding explains{hint}; nothing was written"
            )
        if error > worst:
            worst, where = error, update.name
    return Proof(len(adapter), tensors, identical, worst, where, allowed)


def _pairs(adapter: Adapter, written: Adapter, path: str) -> list[tuple[Update, Update]]:
    """Every update of the source beside what the output has for it.

    Raises `ProofFailed` where one of the two has an update that changes something and the other has none.
    """
    pairs = [(u, written.updates[u.key]) for u in adapter if u.key in written.updates]
    missing = {key: u for key, u in adapter.updates.items() if key not in written.updates}
    extra = {key: u for key, u in written.updates.items() if key not in adapter.updates}
    if missing or extra:
        base = adapter.base or written.base
        missing, extra = _cut(missing.values(), base), _cut(extra.values(), base)
        pairs += [(u, extra[key]) for key, u in missing.items() if key in extra]
    lost = [key for key, u in missing.items() if key not in extra and not METHODS[u.method].is_nothing(u)]
    new = [key for key, u in extra.items() if key not in missing and not METHODS[u.method].is_nothing(u)]
    if lost or new:
        component, module, method = sorted(lost or new)[0]
        what = "is missing from" if lost else "appears only in"
        raise ProofFailed(f"{path}: {method} of {component}: {module} {what} the output ({len({*lost, *new})} such)")
    return pairs


def _error(update: Update, other: Update) -> float:
    if any(t.shape != other.tensors[role].shape for role, t in update.tensors.items() if role in other.tensors):
        # A part that was cut from a block diagonal, beside one at its own rank.
        update, other = lean(update), lean(other)
    return METHODS[update.method].error(update, other)


def _cut(updates: Iterable[Update], base: Architecture | None) -> dict[tuple[str, str, str], Update]:
    out: dict[tuple[str, str, str], Update] = {}
    for update in updates:
        component = base.components.get(update.component) if base is not None else None
        spec = component.fused.get(update.module) if component is not None else None
        out |= {part.key: part for part in (cut(update, spec) if spec is not None else [update])}
    return out


def check_finite(updates: Iterable[Update], progress: Progress = nothing) -> None:
    """Raise `BrokenAdapter` for a tensor with NaN or infinity: what `prove` does on the way, for `--no-verify`."""
    buffer = bytearray(CHUNK)
    for update in updates:
        _insist_on_number(update)
        for tensor in update.tensors.values():
            for length in tensor.chunks(buffer):
                _insist_finite(tensor, buffer, length, update)
                progress(length)


def _insist_finite(tensor: LazyTensor, buffer: bytearray, length: int, update: Update) -> None:
    if dtypes.has_non_finite(tensor.dtype, buffer, length):
        raise BrokenAdapter(
            f"{tensor.where}: holds NaN or infinity ({update.name}); the training broke, or the file did: "
            "use an earlier checkpoint"
        )


def _insist_on_number(update: Update) -> None:
    alpha = update.alpha.value if update.alpha is not None else None
    if update.alpha is not None and alpha is not None and not isfinite(alpha):
        first = next(iter(update.tensors.values()))
        raise BrokenAdapter(
            f"{first.where}: the alpha of {update.name} is {alpha} ({update.alpha.source}); the file is damaged: "
            "use an earlier checkpoint"
        )


_FROM_BASE = frozenset({"shape"})
"""Options that the base says, not the file."""


def _same_structure(update: Update, other: Update, path: str) -> None:
    """Raise `ProofFailed` where the two cannot be compared number by number: options, or a tensor's shape.

    Equal bytes under another shape are another matrix.  A kernel may be written out or flattened, and ones added:
    the matrix stays the same.
    """
    names = update.options.keys() | other.options.keys() if update.options or other.options else ()
    for name in sorted(set(names) - METHODS[update.method].compared - _FROM_BASE):
        one, two = update.options.get(name), other.options.get(name)
        if one != two:
            raise ProofFailed(f"{path}: {update.method} of {update.name}: {name} is {one!r}, but {two!r} in the output")
    for role, tensor in update.tensors.items():
        twin = other.tensors.get(role)
        if twin is None or twin.shape == tensor.shape:
            continue
        if twin.numel == tensor.numel and not _same_matrix(tensor.shape, twin.shape):
            raise ProofFailed(
                f"{path}: tensor {twin.key!r} has shape {list(twin.shape)}, but {tensor.key!r} of the source has "
                f"{list(tensor.shape)} ({update.name}); nothing was written"
            )


def _same_matrix(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """Whether shapes of as many elements differ only in ones, or in a kernel flattened into the columns."""
    if [n for n in one if n != 1] == [n for n in two if n != 1]:
        return True
    return one[:1] == two[:1] and 2 in (len(one), len(two))


def _same_bytes(
    update: Update, other: Update, path: str, buffers: tuple[bytearray, bytearray], progress: Progress
) -> list[bool]:
    """Whether each tensor of `update` has the same bytes in `other`.

    Looks for NaN and infinity on the way: in the source, where they break the adapter, and in an output of other
    bytes, where a narrower dtype makes them.  Both are read through `buffers`.
    """
    ours, theirs = buffers
    ours_view, theirs_view = memoryview(ours), memoryview(theirs)
    out = []
    for role, tensor in update.tensors.items():
        twin = other.tensors.get(role)
        same = twin is not None and (twin.dtype, twin.numel) == (tensor.dtype, tensor.numel)
        for done in range(0, tensor.nbytes, CHUNK):
            length = min(CHUNK, tensor.nbytes - done)
            tensor.source.readinto(tensor.start + done, ours_view[:length])
            _insist_finite(tensor, ours, length, update)
            if same and twin is not None:
                part = theirs_view[:length]
                twin.source.readinto(twin.start + done, part)
                # memcmp over the part that was read; comparing memoryviews goes element by element.
                same = ours.startswith(part)
            progress(length)
        out.append(same)
        if twin is not None and not same:
            _insist_held(twin, theirs, path, update)
    return out


def _insist_on_rounding(update: Update, other: Update, same: list[bool], path: str) -> None:
    """Raise `ProofFailed` for a number that one rounding (of the value, or of the value times the scale) does not give.

    The delta's norm alone would not notice one wrong number among many.
    """
    one, two = METHODS[update.method].scale(update), METHODS[other.method].scale(other)
    # What is not the same bytes mostly holds the scale.
    factors = dict.fromkeys((one / two, 1.0)) if one is not None and two else (1.0,)
    for (role, tensor), equal in zip(update.tensors.items(), same, strict=True):
        twin = other.tensors.get(role)
        comparable = twin is not None and twin.numel == tensor.numel and tensor.dtype in dtypes.NUMBERS
        if equal or twin is None or not comparable or twin.dtype not in dtypes.EPSILON:
            continue  # The delta decides.
        first = -1
        for factor in factors:
            wrong = beyond_rounding(tensor, twin, factor)
            if wrong is None:
                break
            first = max(first, wrong)
        else:
            raise ProofFailed(
                f"{path}: tensor {twin.key!r} ({update.name}): element {first} is not that of {tensor.key!r} in the source, "
                f"rounded to {twin.dtype}; nothing was written"
            )


def _insist_held(tensor: LazyTensor, buffer: bytearray, path: str, update: Update) -> None:
    for length in tensor.chunks(buffer):
        if dtypes.has_non_finite(tensor.dtype, buffer, length):
            raise ProofFailed(
                f"{path}: tensor {tensor.key!r} ({update.name}) holds numbers that {tensor.dtype} cannot: they became "
                "NaN or infinity; choose --dtype bfloat16 or float32; nothing was written"
            )


def _scale_error(update: Update, other: Update) -> float:
    """The relative difference of the scales of two updates with equal tensors."""
    method = METHODS[update.method]
    one, two = method.scale(update), method.scale(other)
    if one is None or two is None:
        return 0.0 if one == two else float("inf")
    return abs(one - two) / abs(one) if one else abs(two)
