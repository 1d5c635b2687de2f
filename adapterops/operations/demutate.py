"""Adapters that were trained on a changed base (PiSSA, OLoRA, CorDA, LoRA-GA), made relative to the published one.

Their training begins with factors B₀·A₀ that were taken out of the base, W_res = W − s·B₀·A₀, so what was trained is

    ΔW = W_res + s·B·A − W = s·(B·A − B₀·A₀),

a LoRA of rank r + r₀ on the published base.  A DoRA magnitude stays as it is: the matrix that it normalises,
W_res + s·B·A = W + ΔW, is the same.

B₀·A₀ comes from the initial adapter; or from W, where it is a function of W: for PiSSA
(https://arxiv.org/abs/2404.02948) s·B₀·A₀ is the best approximation of W of rank r, for OLoRA
(https://arxiv.org/abs/2406.01775) B₀·A₀ is Q[:, :r]·R[:r] of W = Q·R; or from W and W_res.  peft changes linear layers
only, and takes OLoRA's QR of a transformers Conv1D without transposing its weight.  Source: peft `tuners/lora/layer.py`
(`pissa_init`, `olora_init`, `corda_init`, `lora_ga_init`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.errors import CannotRepresent, Conflict, UsageError
from adapterops.linalg.dense import truncated
from adapterops.linalg.loftq import difference_norm
from adapterops.linalg.random import Draw
from adapterops.methods import METHODS
from adapterops.operations.kept import Keeper
from adapterops.operations.own_parameters import OwnParameters
from adapterops.proof import check_finite

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]
"""B (out, r) and A (r, in)."""
_SMALL = 1024
"""The smaller side up to which a weight is decomposed in full."""
_TIGHT = 1e-13
"""How near to the best the leading part of a large weight is taken: its small differences are what was trained."""
_NEAR = 48
"""The rank up to which a search that begins with the trained A, which is near A₀, is shorter than one in narrow blocks that
begins anywhere, by measurement."""
_TRIES = 3
"""How many random starts show how far PiSSA's approximate one can be off."""
_NOISE = 1e-4
"""A share of a residual beyond rank r that is more than float32's rounding."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What B₀·A₀ is taken from: the initial adapter, the base's weights, or these and the changed base's."""

    initial: Adapter | None = None
    base: OwnParameters | None = None
    residual: OwnParameters | None = None
    approximate: bool = False
    """Whether an estimate is good enough where the start was random."""


def demutated(adapter: Adapter, sources: Sources, keeper: Keeper) -> tuple[Adapter, list[str]]:
    """The adapter relative to the published base, each changed module's rank up to twice what it was; and notes.

    Raises `UsageError` where nothing says what was taken out of the base, `Conflict` where the initial adapter is
    another's, `CannotRepresent` where the start cannot be known.
    """
    init = adapter.mutated_init or ""
    _insist_on_source(adapter, sources)
    notes: list[str] = []
    worst: list[tuple[float, str]] = []
    updates = []
    for update in adapter:
        if update.method != "lora":
            _insist_on_plain(update)
            updates.append(update)
            continue
        taken, off = _taken(update, init, adapter, sources)
        worst.append((off, update.name))
        updates.append(update if taken is None else _without(update, taken, keeper))
    if sources.initial is not None:
        _insist_on_all(adapter, sources.initial)
    off, where = max(worst, default=(0.0, ""))
    if off > _NOISE and init.startswith("pissa_niter"):
        notes.append(
            f"approximate: {init} began with a random estimate of the singular vectors; other starts differ from the exact "
            f"one by up to {off:.2g} of ‖ΔW‖ ({where}): that much of the trained change may be wrong"
        )
    elif off > _NOISE:
        notes.append(
            f"the changed base differs from the published one by more than rank r: {off:.2g} of the difference is left out "
            f"({where}; a base that was saved in 16 bits is rounded)"
        )
    notes.append(f"was trained from {init or 'an initial adapter'}: it is relative to the published base now")
    config = {name: _plain(fields) for name, fields in adapter.config.items()}
    return replace(adapter.with_updates(updates), mutated_init=None, config=config), notes


def _plain(fields: Mapping[str, object]) -> dict[str, object]:
    """The config's fields; one that would have peft change the base again says so no more."""
    gone = ("corda_config", "lora_ga_config")
    kept = {k: v for k, v in fields.items() if k not in gone}
    return {**kept, "init_lora_weights": True} if "init_lora_weights" in kept else kept


def _insist_on_source(adapter: Adapter, sources: Sources) -> None:
    init, path = adapter.mutated_init or "", adapter.provenance.path
    if sources.residual is not None and sources.base is None:
        raise UsageError("--residual-base is the changed base; --base-weights says what it was changed from: give both")
    if sources.initial is not None or sources.residual is not None:
        return
    if init.startswith(("corda", "lora_ga")):
        raise UsageError(
            f"{path}: was trained from {init}, whose start depends on data that only the training had: give the adapter as "
            "it was before training (--initial INIT), or the changed base (--base-weights BASE --residual-base DIR)"
        )
    if sources.base is None:
        raise UsageError(
            f"{path}: was trained from {init}, which changed the base weights; what it took out of them comes from the "
            "adapter as it was before training (--initial INIT) or from the base itself (--base-weights BASE)"
        )
    if init.startswith("pissa_niter") and not sources.approximate:
        raise CannotRepresent(
            f"{path}: was trained from {init}, whose start is random: it can be estimated from the base weights only "
            "(--accept-approximate, which also measures how far off that may be); --initial INIT or --residual-base DIR is exact"
        )


def _insist_on_plain(update: Update) -> None:
    if update.method not in ("saved", "trainable_tokens", "bundled"):
        raise CannotRepresent(
            f"{update.name}: {METHODS[update.method].title} beside a start that changed the base is not undone"
        )


def _insist_on_all(adapter: Adapter, initial: Adapter) -> None:
    extra = next((u for u in initial if u.method == "lora" and u.key not in adapter.updates), None)
    if extra is not None:
        raise Conflict(
            f"{next(iter(extra.tensors.values())).where}: {extra.name} was taken out of the base, and "
            f"{adapter.provenance.path} does not adapt it: it is another adapter's start"
        )


def _taken(update: Update, init: str, adapter: Adapter, sources: Sources) -> tuple[Pair | None, float]:
    """B₀ and A₀ (None where nothing was taken out of the module), and how far off they may be, relative to ‖ΔW‖."""
    flipped = init.startswith("olora") and bool(adapter.config.get(update.component, {}).get("fan_in_fan_out"))
    if sources.initial is not None:
        pair = _initial(update, sources.initial)
        return ((pair[1].T, pair[0].T) if flipped and _matrix(update) else pair), 0.0
    if not _matrix(update) or sources.base is None:
        return None, 0.0
    scale = METHODS["lora"].scale(update) or 0.0
    weight = sources.base.of(update).weight
    _insist_on_shape(update, weight)
    rank = METHODS["lora"].rank(update) or 1
    check_finite([update])
    trained = update.tensors["A"].torch().float()
    if sources.residual is not None:
        change = weight - sources.residual.of(update).weight
        b, a = _leading(change, rank, scale, trained, update.module)
        return (b, a), difference_norm(change, scale * b, a) / (float(change.norm()) or 1.0)
    if init.startswith("olora"):
        return _olora(weight.T if flipped else weight, rank, flipped), 0.0
    pair = _leading(weight, rank, scale, trained, update.module)
    return pair, _spread(update, weight, pair, init, scale) if "_niter_" in init else 0.0


def _matrix(update: Update) -> bool:
    """Whether the module is a linear one: peft changes no other."""
    return update.options.get("kind") != "embedding" and len(update.tensors["A"].shape) == 2


def _initial(update: Update, initial: Adapter) -> Pair:
    other = initial.updates.get(update.key)
    first = next(iter(update.tensors.values()))
    if other is None:
        raise Conflict(
            f"{first.where}: {initial.provenance.path} has nothing for {update.name}: it is another adapter's start"
        )
    one, two = METHODS["lora"].scale(update), METHODS["lora"].scale(other)
    if one is None or two is None or abs(one - two) > 1e-6 * abs(one):
        raise Conflict(
            f"{next(iter(other.tensors.values())).where}: the scale of {update.name} is {two} here and {one} in the trained "
            "adapter: it is another adapter's start (or their configs differ: --set repairs one)"
        )
    b, a, b0, a0 = (u.tensors[role] for u in (update, other) for role in "BA")
    if (b.shape[0], a.shape[1:]) != (b0.shape[0], a0.shape[1:]):
        raise Conflict(f"{b0.where}: shape {list(b0.shape)}, but {b.key!r} {list(b.shape)} is for another module")
    return b0.torch(), a0.torch()


def _insist_on_shape(update: Update, weight: torch.Tensor) -> None:
    a, b = update.tensors["A"], update.tensors["B"]
    if tuple(weight.shape) != (b.shape[0], a.shape[1]):
        raise UsageError(
            f"{b.where}: {update.name} is {[b.shape[0], a.shape[1]]}, and the base's weight {list(weight.shape)}: it is for "
            "another base model"
        )


def _leading(weight: torch.Tensor, rank: int, scale: float, trained: torch.Tensor, module: str) -> Pair:
    """The best approximation of a weight of that rank, divided by the scale; `trained` (rank, in_features) became of its A."""
    import torch

    small = min(weight.shape) <= _SMALL
    if small:
        u, s, vh = (part.float() for part in torch.linalg.svd(weight.double(), full_matrices=False))
    else:
        start = trained.T.to(weight.device) if rank <= _NEAR else None
        found, _ = truncated(weight, rank, tolerance=_TIGHT, start=start, draw=Draw(0, "demutate", module))
        u, s, vh = found.u, found.s, found.vh
    roots = (s[:rank] / scale).sqrt()
    return u[:, :rank] * roots, roots[:, None] * vh[:rank]


def _olora(weight: torch.Tensor, rank: int, flipped: bool) -> Pair:
    """Q[:, :r] and R[:r] of the QR decomposition: Q's first columns depend on the weight's first columns alone."""
    import torch

    q = torch.linalg.qr(weight[:, :rank].double())[0]
    r = q.T @ weight.double()
    return (r.T.float(), q.T.float()) if flipped else (q.float(), r.float())


def _spread(update: Update, weight: torch.Tensor, pair: Pair, init: str, scale: float) -> float:
    """How far a random start's product is from the exact one, relative to ‖ΔW‖: the largest of some."""
    import torch

    steps = int(init.rpartition("_")[2])
    b, a = (t.torch().float() for t in (update.tensors["B"], update.tensors["A"]))
    exact = scale * pair[0] @ pair[1]
    size = float((scale * b @ a - exact).norm()) or 1.0
    worst = 0.0
    for seed in range(_TRIES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, len(pair[1]), niter=steps)
        worst = max(worst, float((u * s @ v.T - exact).norm()) / size)
    return worst


def _without(update: Update, taken: Pair, keeper: Keeper) -> Update:
    """The update less B₀·A₀: the factors side by side, in the wider of the two types."""
    import torch

    b, a = (update.tensors[role].torch() for role in "BA")
    b0, a0 = taken
    kind = torch.promote_types(torch.promote_types(b.dtype, b0.dtype), torch.promote_types(a.dtype, a0.dtype))
    b0, a0 = b0.reshape(b0.shape[0], -1, *b.shape[2:]), a0.reshape(-1, *a.shape[1:])
    tensors = {
        **update.tensors,
        "A": keeper.keep(f"{update.module}.A", torch.cat([a.to(kind), a0.to(kind)])),
        "B": keeper.keep(f"{update.module}.B", torch.cat([b.to(kind), -b0.to(kind)], dim=1)),
    }
    scale = METHODS["lora"].scale(update) or 0.0
    rank = a.shape[0] + a0.shape[0]
    alpha: Fact[float | None] = Fact(scale * rank, Certainty.DERIVED, "to-lora")
    return replace(update, tensors=tensors, alpha=alpha, rslora=False)
