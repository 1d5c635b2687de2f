"""What replaces something of the base whole: saved modules, rows of trained tokens, bundled embeddings.

Such a thing has no delta without the base.  The rule: one adapter's, or the same in all of them, is kept; rows of different
tokens stand side by side; where adapters disagree the merge is refused, or does what `--saved` says: their weighted mean, or
the first adapter's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent, UsageError
from adapterops.merging.modules import Module
from adapterops.merging.settings import Settings
from adapterops.methods import METHODS
from adapterops.proof import check_finite
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor, same_bytes, stack

if TYPE_CHECKING:
    import torch

Entry = tuple[int, float, Update]
"""Adapter, weight, update."""
Keep = Callable[[str, "torch.Tensor", str], LazyTensor]
"""Stores computed values under a name and a dtype."""


def merge(module: Module, method: str, settings: Settings, keep: Keep) -> tuple[Update, list[str]]:
    """The one update that stands for all, and what the user should know.

    Raises `CannotRepresent` where the adapters disagree and nothing says what to do.
    """
    entries = module.carried[method]
    first = entries[0][2]
    check_finite(update for _, _, update in entries)
    if len(entries) == 1 or all(_same(first, update) for _, _, update in entries[1:]):
        scaled = [weight for _, weight, _ in entries if weight != 1]
        what = METHODS[method].title
        notes = (
            [f"{module.title}: {what} replace the base's and are kept whole, weight {scaled[0]:g} or not"]
            if scaled
            else []
        )
        return replace(first, module=module.name), notes
    if method == "trainable_tokens":
        joined = _side_by_side(entries)
        if joined is not None:
            return replace(joined, module=module.name), []
    if settings.saved == "first":
        return replace(first, module=module.name), [f"{module.title}: kept as in the first adapter (--saved first)"]
    if settings.saved == "mean":
        return _mean(module, entries, keep), [
            f"{module.title}: the weighted mean of {len(entries)} adapters (--saved mean)"
        ]
    tensors = [next(iter(update.tensors.values())) for _, _, update in entries[:2]]
    raise CannotRepresent(
        f"{tensors[0].where}: {module.title} ({METHODS[method].title}) replaces the base's, and {tensors[1].source.path} has "
        "another one: --saved mean takes their weighted mean, --saved first the first adapter's"
    )


def _same(one: Update, two: Update) -> bool:
    if one.tensors.keys() != two.tensors.keys() or one.options != two.options:
        return False
    return all(same_bytes(tensor, two.tensors[role]) for role, tensor in one.tensors.items())


def _side_by_side(entries: Sequence[Entry]) -> Update | None:
    """Rows of different tokens in one; None where a token is in two adapters, or their types differ."""
    indices = [update.options.get("indices") for _, _, update in entries]
    if any(found is None for found in indices):
        return None
    every = [index for found in indices for index in found or ()]
    rows = [update.tensors["delta"] for _, _, update in entries]
    if len(set(every)) != len(every) or len({(t.dtype, t.shape[1:]) for t in rows}) > 1:
        return None
    first = entries[0][2]
    return replace(first, tensors={"delta": stack(rows)}, options={**first.options, "indices": every})


def _mean(module: Module, entries: Sequence[Entry], keep: Keep) -> Update:
    """Σ wₖ·θₖ / Σ wₖ, which is the base plus the weighted mean of the differences from it."""
    import torch

    first = entries[0][2]
    total = sum(weight for _, weight, _ in entries)
    if not total:
        raise UsageError(f"{module.title}: the weights of its saved modules add up to 0 and have no mean")
    roles = first.tensors.keys()
    for _, _, update in entries[1:]:
        shapes = {role: t.shape for role, t in update.tensors.items()}
        if shapes != {role: t.shape for role, t in first.tensors.items()} or update.options != first.options:
            raise UsageError(
                f"{next(iter(update.tensors.values())).where}: {module.title} has other parameters here than in "
                f"{next(iter(first.tensors.values())).source.path}, so they have no mean; --saved first keeps the first's"
            )
    out = {}
    for role in roles:
        own = [update.tensors[role] for _, _, update in entries]
        if own[0].dtype not in dtypes.FLOATS:
            if not all(same_bytes(own[0], other) for other in own[1:]):
                raise UsageError(
                    f"{own[0].where}: numbers of {own[0].dtype} have no mean; --saved first keeps the first's"
                )
            out[role] = own[0]
            continue
        mean = torch.zeros(own[0].shape, dtype=torch.float64)
        for (_, weight, _), tensor in zip(entries, own, strict=True):
            mean += tensor.torch().double() * (weight / total)
        out[role] = keep(f"{module.name}.{role}", mean, own[0].dtype)
    return replace(first, module=module.name, tensors=out)
