"""What replaces something of the base whole: saved modules, rows of trained tokens, bundled embeddings.

Such a thing has no delta without the base.  The rule: one adapter's, or the same in all of them, is kept; rows of different
tokens stand side by side, those of one token by the same rule; where adapters disagree the merge is refused, or does what
`--saved` says: their weighted mean, or the first adapter's.
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
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor, same_values

if TYPE_CHECKING:
    import numpy as np
    import torch

Entry = tuple[int, float, Update]
"""Adapter, weight, update."""
Keep = Callable[[str, "torch.Tensor", str], LazyTensor]
"""Stores computed values under a name and a dtype."""
PIECE = 1 << 20
"""Numbers of a saved parameter that are averaged at a time."""


def merge(module: Module, method: str, settings: Settings, keep: Keep) -> tuple[Update, list[str]]:
    """The one update that stands for all, and what the user should know.

    Raises `CannotRepresent` where the adapters disagree and nothing says what to do.
    """
    entries = module.carried[method]
    first = entries[0][2]
    minus = next((entry for entry in entries if entry[1] < 0), None)
    if minus is not None and settings.saved == "refuse":
        raise CannotRepresent(
            f"{next(iter(minus[2].tensors.values())).where}: {module.title} ({METHODS[method].title}) replaces the base's, and "
            f"cannot be taken away (weight {minus[1]:g}); --saved first keeps that of {_file(first)}, a weights file with 0 "
            "there leaves it out"
        )
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
        joined = _rows_joined(module, entries, settings, keep)
        if joined is not None:
            return joined
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


def _file(update: Update) -> str:
    return next(iter(update.tensors.values())).source.path


def _same(one: Update, two: Update) -> bool:
    if one.tensors.keys() != two.tensors.keys() or one.options != two.options:
        return False
    return all(
        tensor.shape == two.tensors[role].shape and same_values(tensor, two.tensors[role])
        for role, tensor in one.tensors.items()
    )


def _rows_joined(
    module: Module, entries: Sequence[Entry], settings: Settings, keep: Keep
) -> tuple[Update, list[str]] | None:
    """The rows of all tokens, each once, and what the user should know; None where adapters disagree on one and nothing says
    what to do."""
    import numpy as np

    found: dict[int, list[tuple[float, np.typing.NDArray[np.float64]]]] = {}
    for _, weight, update in entries:
        indices = update.options.get("indices")
        if indices is None:
            return None
        rows = update.tensors["delta"].numpy().astype(np.float64)
        for index, row in zip(indices, rows, strict=True):
            found.setdefault(index, []).append((weight, row))
    widths = {update.tensors["delta"].shape[1] for _, _, update in entries}
    if len(widths) > 1:
        raise UsageError(
            f"{entries[1][2].tensors['delta'].where}: the tokens of {module.title} have {' and '.join(map(str, widths))} "
            "numbers each: the adapters are for different base models"
        )
    made = []
    chosen: list[int] = []
    for index, own in found.items():
        alike = all(np.array_equal(own[0][1], row) for _, row in own[1:])
        if len(own) > 1 and not alike and settings.saved == "refuse":
            return None
        chosen += [] if alike else [index]
        total = sum(weight for weight, _ in own)
        if alike or settings.saved == "first":
            made.append(own[0][1])
        elif not total:
            raise UsageError(f"{module.title}: the weights of token {index} add up to 0 and have no mean")
        else:
            made.append(np.sum([row * (weight / total) for weight, row in own], axis=0))
    import torch

    first = entries[0][2]
    dtype = wide([update.tensors["delta"].dtype for _, _, update in entries])
    delta = keep(f"{module.name}.delta", torch.from_numpy(np.stack(made)), dtype)
    joined = replace(
        first, module=module.name, tensors={"delta": delta}, options={**first.options, "indices": list(found)}
    )
    return joined, _row_notes(module, entries, chosen, settings)


def _row_notes(module: Module, entries: Sequence[Entry], chosen: Sequence[int], settings: Settings) -> list[str]:
    notes = []
    if chosen:
        how = "as in the first adapter" if settings.saved == "first" else "the weighted mean"
        tokens = ", ".join(map(str, chosen[:5])) + (" …" if len(chosen) > 5 else "")
        notes.append(
            f"{module.title}: tokens that adapters trained differently ({tokens}): {how} (--saved {settings.saved})"
        )
    scaled = next((weight for _, weight, _ in entries if weight != 1), None)
    if scaled is not None and settings.saved != "mean":
        notes.append(f"{module.title}: trained tokens replace the base's and are kept whole, weight {scaled:g} or not")
    return notes


def wide(names: Sequence[str]) -> str:
    """The narrowest float type that holds every number of all these."""
    found = [name for name in dtypes.FLOATS if name in names]
    if not found:
        return "F16"
    # Neither of the two 16-bit types holds the other's numbers.
    return "F32" if found == ["F16", "BF16"] else found[0]


def _mean(module: Module, entries: Sequence[Entry], keep: Keep) -> Update:
    """Σ wₖ·θₖ / Σ wₖ, which is the base plus the weighted mean of the differences from it."""
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
            if not all(same_values(own[0], other) for other in own[1:]):
                raise UsageError(
                    f"{own[0].where}: numbers of {own[0].dtype} have no mean; --saved first keeps the first's"
                )
            out[role] = own[0]
            continue
        dtype = wide([tensor.dtype for tensor in own])
        mean = _weighted([tensor.torch() for tensor in own], [weight / total for _, weight, _ in entries], dtype)
        out[role] = keep(f"{module.name}.{role}", mean, dtype)
    return replace(first, module=module.name, tensors=out)


def _weighted(tensors: Sequence[torch.Tensor], shares: Sequence[float], dtype: str) -> torch.Tensor:
    """Σ shareₖ·θₖ in float64, rounded to `dtype`; a piece at a time: a language model's head is large as it is."""
    import torch

    flat = [tensor.reshape(-1) for tensor in tensors]
    out = torch.empty(flat[0].shape, dtype=getattr(torch, TORCH_NAMES[dtype]))
    for start in range(0, len(out), PIECE):
        mean = torch.zeros(len(out[start : start + PIECE]), dtype=torch.float64)
        for values, share in zip(flat, shares, strict=True):
            mean += values[start : start + PIECE].double() * share
        out[start : start + PIECE] = mean
    return out.reshape(tensors[0].shape)
