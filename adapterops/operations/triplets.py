"""AdaLoRA's budget given out anew: which triplets of which modules an adapter keeps.

The budget is one number for the whole adapter, as AdaLoRA's `target_r` is: an average rank.  Training ranks triplets by a
smoothed sensitivity of the loss, which no file holds; here a triplet counts as much as its part of ΔW is large (Frobenius
norm; see `AdaLora.importance`).  What stays keeps its bytes, and its scale, which does not depend on how many triplets
there are.

Source: https://arxiv.org/abs/2303.10512 (section 3.3, global budget).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import CannotRepresent, UsageError
from adapterops.methods.adalora import AdaLora
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor, MemorySource

_ADALORA = AdaLora()


def reallocate(updates: Sequence[Update], budget: float) -> list[Update]:
    """The updates with the most important triplets of all AdaLoRA modules together: `budget` a module on average.

    The number kept is ⌊budget · modules⌋, or all where there are no more; masked triplets (value 0) are never kept.  Equals
    go by the order of the modules, then of the triplets.  A module may end with none: it then has tensors without rows.
    Other updates are passed on as they are.

    Raises `UsageError` for a negative budget or where nothing is AdaLoRA, `CannotRepresent` where a scale is unknown.
    """
    import numpy as np

    own = [u for u in updates if u.method == _ADALORA.name]
    if not budget >= 0:
        raise UsageError(f"--target-rank {budget:g}: an average rank cannot be negative")
    if not own:
        raise UsageError("--target-rank gives AdaLoRA's triplets out anew, and the adapter has none")
    sizes = [_ADALORA.importance(update) for update in own]
    for update, size in zip(own, sizes, strict=True):
        if not np.isfinite(size).all():
            raise CannotRepresent(
                f"{update.tensors['E'].where}: holds NaN or infinity beside it; no triplet can be ranked"
            )
    every = np.concatenate(sizes)
    masked = np.concatenate([update.tensors["E"].numpy().reshape(-1) == 0 for update in own])
    # A stable sort keeps equals in order; masked ones come last and are cut off.
    order = np.lexsort((-every, masked))
    count = int(min(np.floor(budget * len(own) + 1e-9), len(every) - masked.sum()))
    kept = np.zeros(len(every), dtype=bool)
    kept[order[:count]] = True
    starts = np.cumsum([0, *(len(size) for size in sizes)])
    masks = {u.key: kept[starts[i] : starts[i + 1]] for i, u in enumerate(own)}
    return [_narrowed(u, masks[u.key].nonzero()[0].tolist()) if u.key in masks else u for u in updates]


def _narrowed(update: Update, kept: list[int]) -> Update:
    """The update with these triplets alone, in their order."""
    if len(kept) == _ADALORA.rank(update):
        return update
    tensors = {role: _taken(t, kept, role) if role in ("A", "B", "E") else t for role, t in update.tensors.items()}
    options = {name: value for name, value in update.options.items() if name != "rank_pattern"}
    alpha = update.alpha
    if alpha is not None and alpha.value is not None and alpha.value <= 0:
        # Such an alpha stands for the number of triplets, which is to change now.
        alpha = Fact(float(_ADALORA.rank(update)), Certainty.DERIVED, f"alpha {alpha.value:g}: {alpha.source}")
    return replace(update, tensors=tensors, options=options, alpha=alpha)


def _taken(tensor: LazyTensor, kept: list[int], role: str) -> LazyTensor:
    """The rows (A, E) or columns (B) of these triplets; values are copied, not computed."""
    import numpy as np

    bits = dtypes.BITS[tensor.dtype]
    if bits % 8:
        raise CannotRepresent(f"{tensor.where}: triplets of {tensor.dtype} cannot be taken apart")
    axis = 1 if role == "B" else 0
    raw = np.frombuffer(tensor.read(), dtype=np.uint8).reshape(*tensor.shape, bits // 8)
    taken = np.ascontiguousarray(raw.take(kept, axis=axis))
    return LazyTensor(tensor.key, tensor.dtype, taken.shape[:-1], MemorySource(taken.tobytes(), tensor.source.path), 0)
