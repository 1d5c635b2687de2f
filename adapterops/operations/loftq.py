"""LoftQ: a LoRA that begins as what quantisation takes from the base.

W ≈ Q + s·B·A, where Q is W as bitsandbytes quantises it and s·B·A the best approximation of rank r of W − Q (one iteration);
more iterations alternate, Q = Q(W − s·B·A), and need a base of their own, since that Q is not the quantised W.  With
W − Q = U·S·Vᵀ, B = U·√(S/s) and A = √(S/s)·Vᵀ.

Source: https://arxiv.org/abs/2310.08659; peft `utils/loftq_utils.py` (`loftq_init`, `replace_lora_weights_loftq`), which does
not divide by s, so that its factors are off by that factor wherever alpha is not r.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterops import api, registry
from adapterops.adapter import Adapter, Update
from adapterops.errors import CannotRepresent, UsageError
from adapterops.linalg.loftq import difference_norm, split
from adapterops.linalg.quant import Quantiser, quantiser
from adapterops.loading import KEPT_FIELDS, insist_on_use
from adapterops.methods import METHODS
from adapterops.operations.kept import Keeper
from adapterops.operations.loftq_weights import LoftqWeights
from adapterops.storage import dtypes
from adapterops.storage.base_copy import BaseCopy
from adapterops.storage.base_weights import open_base
from adapterops.storage.output import Progress, Staged, nothing
from adapterops.storage.spool import Spool
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor, is_zero
from adapterops.strength import insist_on_alphas

if TYPE_CHECKING:
    import torch

Steps = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoftqModule:
    """What became of one module.

    `before` is ‖W − Q(W)‖ and `after` ‖W − Q − s·B·A‖ with the factors as they are stored (Frobenius); both are None for a
    module that was not looked at, and `note` says why.  `rank` is None for what is no LoRA.
    """

    component: str
    module: str
    rank: int | None
    replaced: bool
    before: float | None = None
    after: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class LoftqProposal:
    """A replacement that a callback may reject: W ≈ (W − residual) + scale·b·a.

    `weight` (out_features, in_features) is W, `residual` W − Q of that shape, `b` (out_features, rank) and `a` (rank,
    in_features) are the new factors, all float32 and on the device of the computation.
    """

    component: str
    module: str
    weight: torch.Tensor
    residual: torch.Tensor
    b: torch.Tensor
    a: torch.Tensor
    scale: float
    before: float
    after: float


Callback = Callable[[LoftqProposal], bool]


@dataclass(frozen=True, slots=True)
class LoftqResult:
    """A written adapter, and what became of each module."""

    written: api.Result
    modules: tuple[LoftqModule, ...]
    quant: str
    base_path: str = ""
    """The folder of the base that was written, "" where it stays as it is."""

    @property
    def before(self) -> float:
        """‖W − Q(W)‖ over all modules that were looked at."""
        return sqrt(sum(m.before**2 for m in self.modules if m.before is not None))

    @property
    def after(self) -> float:
        """‖W − Q − s·B·A‖ over the same; where a module was not replaced, its ‖W − Q(W)‖."""
        left = ((m.after if m.replaced else m.before) for m in self.modules)
        return sqrt(sum(norm**2 for norm in left if norm is not None))


def loftq(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base_weights: str | os.PathLike[str],
    quant: str = "nf4",
    block_size: int | None = None,
    double_quant: bool = False,
    iterations: int = 1,
    rank: int | None = None,
    write_base: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    device: str = "auto",
    to: str | None = None,
    reading: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    allow_drop: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Steps = lambda done, total: None,
    copied: Progress = nothing,
) -> LoftqResult:
    """Write the adapter with its LoRA factors replaced by what quantising the base takes from each weight.

    - `base_weights` are the base's own, unquantised weights; one at a time is read;
    - `quant` (nf4, fp4, int8), `block_size` (64) and `double_quant` say how the base will be quantised (by bitsandbytes);
    - `iterations` above 1 alternate between base and factors, and need `write_base`, the folder for the base that comes out:
      the dequantised weights, in the files and types of the base;
    - `rank` is the rank of the new factors, the adapter's own without it; its alpha stays;
    - `callback` may reject a replacement.  One that leaves no less of the weight than quantisation alone is never made.

    Updates that are no plain LoRA on a linear weight, and output heads, which bitsandbytes leaves alone, stay as they are;
    the result says why.

    Raises `UsageError` where bitsandbytes is missing, for options that do not go together, and for a base that is another's
    or quantised; `CannotRepresent` where nothing can be replaced; and what `ao.load` and `ao.save` raise.
    """
    how = _How(
        quantiser(quant, block_size, double_quant), iterations, rank, callback, _device(device), api.dtype_named(dtype)
    )
    _insist_on_numbers(how, write_base)
    adapter = api.load(source, allow_drop=allow_drop, **dict(reading or {}))
    fields = dict((reading or {}).get("fields") or {})
    insist_on_use(adapter, fields, KEPT_FIELDS)
    form, dialect = registry.find(to or adapter.provenance.dialect)
    place = output if output is not None else api.default_output(source, form, dialect, "loftq")
    api.insist_on_place(place, form, [adapter], overwrite)
    target = os.path.abspath(api.place_of(os.fspath(place), form))
    own = LoftqWeights(open_base(base_weights, adapter.components), adapter)
    copy = _copy_of(own, write_base, target, overwrite)
    made, modules = _replaced(adapter, own, how, copy, _disk(target), progress)
    with ExitStack() as stack:
        staged = None
        if copy is not None:
            staged = stack.enter_context(Staged(copy.place, True, overwrite))
            copy.write(staged, verify, copied)
        written = api.save(
            made,
            place,
            format=to,
            fields={name: value for name, value in fields.items() if name in KEPT_FIELDS},
            allow_drop=allow_drop,
            overwrite=overwrite,
            verify=verify,
            progress=copied,
        )
        if staged is not None:
            staged.commit()
    return LoftqResult(written, tuple(modules), str(how.quant), copy.place if copy is not None else "")


def _disk(place: str) -> str:
    """Where computed tensors wait for the output: beside it, or "" where that folder is not there yet."""
    folder = os.path.dirname(os.path.abspath(place))
    return folder if os.path.isdir(folder) else ""


class _How(NamedTuple):
    quant: Quantiser
    iterations: int
    rank: int | None
    callback: Callback | None
    device: torch.device
    dtype: str | None


def _device(name: str) -> torch.device:
    from adapterops.merging.run import devices_of

    device = devices_of(name)[0]
    if device.type == "mps":
        raise UsageError("--device mps: bitsandbytes is bit for bit the same on cpu and cuda only; --device cpu works")
    return device


def _insist_on_numbers(how: _How, write_base: object) -> None:
    if how.iterations < 1:
        raise UsageError(f"--iterations {how.iterations}: 1 or more")
    if how.rank is not None and how.rank < 1:
        raise UsageError(f"--rank {how.rank}: a rank is 1 or more")
    if how.iterations > 1 and write_base is None:
        raise UsageError(
            f"--iterations {how.iterations}: more than one changes the base's weights too; --write-base DIR says where the "
            "base that goes with the adapter is to be written"
        )


def _copy_of(
    own: LoftqWeights, write_base: str | os.PathLike[str] | None, target: str, overwrite: bool
) -> BaseCopy | None:
    if write_base is None:
        return None
    copy = BaseCopy(own.weights, os.path.normpath(os.fspath(write_base)))
    copy.check(overwrite)
    one, two = os.path.realpath(copy.place), os.path.realpath(target)
    if os.path.commonpath([one, two]) in (one, two):
        raise UsageError(f"{copy.place}: the base and the adapter ({target}) each need a folder of their own")
    return copy


def _replaced(
    adapter: Adapter, own: LoftqWeights, how: _How, copy: BaseCopy | None, folder: str, progress: Steps
) -> tuple[Adapter, list[LoftqModule]]:
    """The adapter with its factors replaced, and what became of each module; a new base's weights go into `copy`."""
    _insist_on_published(adapter)
    insist_on_alphas(adapter)
    left = {update.key: own.left(update) for update in adapter}
    if all(left.values()):
        first = next(iter(adapter))
        raise CannotRepresent(
            f"{adapter.provenance.path}: nothing in it is a plain LoRA on a linear weight ({first.name}: {left[first.key]})"
        )
    if copy is not None:
        for update in adapter:
            if not left[update.key] and own.stored(update) is None:
                raise CannotRepresent(
                    f"{update.name}: the base keeps this projection in parts, which --write-base does not write; convert the "
                    "adapter to the base's own names first (adapterops convert)"
                )
    keeper = Keeper(Spool("the LoftQ factors", folder))
    beside = Keeper(Spool("the base", _disk(copy.place) if copy is not None else folder))
    updates, modules, trained = [], [], []
    for done, update in enumerate(adapter):
        progress(done, len(adapter))
        new = None
        if left[update.key]:
            rank = METHODS[update.method].rank(update) if update.method == "lora" else None
            module = LoftqModule(update.component, update.module, rank, False, note=left[update.key])
        else:
            new, base, module = _of_module(update, own, how, keeper, copy is not None)
            if new is not None and not is_zero(update.tensors["B"]):
                trained.append(update.name)
            if new is not None and base is not None and copy is not None:
                _change(copy, own, update, base, beside)
        modules.append(module)
        updates.append(new or _rounded(update, how.dtype))
    progress(len(adapter), len(adapter))
    notes = (*adapter.provenance.notes, *_notes(how, modules, trained, copy))
    config = {name: _fields(own_fields, copy) for name, own_fields in adapter.config.items()}
    provenance = replace(adapter.provenance, notes=notes)
    return replace(adapter.with_updates(updates), config=config, provenance=provenance), modules


def _insist_on_published(adapter: Adapter) -> None:
    if adapter.mutated_init:
        raise CannotRepresent(
            f"{adapter.provenance.path}: was trained from {adapter.mutated_init}, which changed the base weights; LoftQ is a "
            "start of its own: make the adapter relative to the published base first (adapterops to-lora)"
        )


def _fields(fields: Mapping[str, Any], copy: BaseCopy | None) -> dict[str, Any]:
    """The config's fields; none that would have peft initialise again, and the base that the adapter is for."""
    out = dict(fields)
    if str(out.get("init_lora_weights")).startswith("loftq"):
        # peft would quantise the base a second time as it loads the adapter.
        out |= {"init_lora_weights": True, **({"loftq_config": {}} if "loftq_config" in out else {})}
    if copy is not None:
        out["base_model_name_or_path"] = copy.place
        out.pop("revision", None)
    return out


def _notes(how: _How, modules: Sequence[LoftqModule], trained: Sequence[str], copy: BaseCopy | None) -> list[str]:
    place = f"the base in {copy.place}" if copy is not None else "the base"
    notes = [f"the new factors are for {place} as bitsandbytes quantises it ({how.quant}), and for no other"]
    if trained:
        notes.append(
            f"had been trained ({len(trained)} modules, {trained[0]} first): what it had learnt is replaced, and lost"
        )
    if how.rank is not None:
        notes.append(f"--rank {how.rank}: alpha stays, so that the scale of the replaced modules is another")
    if copy is not None:
        missing = list(copy.left_out())
        if missing:
            notes.append(f"beside the base's weights, not copied to {copy.place}: {', '.join(missing)}")
    if not any(m.replaced for m in modules):
        notes.append("no module was replaced: the adapter is what it was")
    return notes


def _rounded(update: Update, dtype: str | None) -> Update:
    if dtype is None:
        return update
    return replace(update, tensors={role: t.mapped(dtype) for role, t in update.tensors.items()})


def _of_module(
    update: Update, own: LoftqWeights, how: _How, keeper: Keeper, with_base: bool
) -> tuple[Update | None, torch.Tensor | None, LoftqModule]:
    """The update with new factors (None where they are not accepted), the base's new weight (out, in), and a report."""
    tensors = {role: update.tensors[role] for role in "AB"}
    rank = how.rank or tensors["A"].shape[0]
    scale = (update.alpha.value or 0.0) / (sqrt(rank) if update.rslora else rank) if update.alpha is not None else 1.0
    stored = own.stored(update)
    kind = _torch(stored[0].dtype) if with_base and stored is not None else None
    weight = own.of(update).weight.to(how.device)
    found = split(weight, rank, how.quant, how.iterations, kind, ("loftq", update.component, update.module))
    if not isfinite(found.before):
        raise UsageError(
            f"{stored[0].where if stored else update.name}: holds numbers beyond float16, of which int8 is made; give --quant nf4"
        )
    root = sqrt(abs(scale))
    b, a = found.left / root * (1 if scale > 0 else -1), found.right / root
    factors = {"A": a.to(_torch(_kept(tensors["A"], how))), "B": b.to(_torch(_kept(tensors["B"], how)))}
    b, a = factors["B"].float(), factors["A"].float()
    after = difference_norm(found.residual, scale * b, a)
    report = LoftqModule(update.component, update.module, rank, True, found.before, after)
    note = "" if after < found.before else "the residual would not fall"
    if not note and how.callback is not None:
        proposal = LoftqProposal(
            update.component, update.module, weight, found.residual, b, a, scale, found.before, after
        )  # fmt: skip
        note = "" if how.callback(proposal) else "rejected"
    if note:
        return None, None, replace(report, rank=tensors["A"].shape[0], replaced=False, note=note)
    kept = {role: keeper.keep(f"{update.module}.{role}", value.cpu()) for role, value in factors.items()}
    return replace(update, tensors={**update.tensors, **kept}), found.base, report


def _torch(dtype: str) -> torch.dtype:
    import torch

    kind: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return kind


def _kept(tensor: LazyTensor, how: _How) -> str:
    """The type of a new factor: the wanted one, that of the old, or float32 where the old is of eight bits."""
    return how.dtype or (tensor.dtype if tensor.dtype in dtypes.FLOATS else "F32")


def _change(copy: BaseCopy, own: LoftqWeights, update: Update, base: torch.Tensor, keeper: Keeper) -> None:
    stored = own.stored(update)
    assert stored is not None
    tensor, flipped = stored
    copy.change(tensor, keeper.keep(tensor.key, (base.T if flipped else base).cpu()))
