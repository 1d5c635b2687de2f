"""Fused projections: one module of the authors' code base, several of the canonical names (q, k and v in one weight).

The rows of a fused weight are those of its parts, one after another (`ModuleSpec.joins`).  So an update on it is split
by taking rows, exactly; and updates on the parts are joined into one exactly, too:

- where they share their second factor (r, in), their first ones are stacked: the rank stays;
- otherwise the first factors stand in a block diagonal and the second ones are stacked: the ranks add up.

A block diagonal is recognised when it is split again, so that each part gets back the rank it was trained with.  Kohya's
`split_qkv` networks are saved so, with alpha unchanged: source kohya-ss/sd-scripts `networks/lora_flux.py`, `state_dict`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import isclose
from typing import NamedTuple

from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.architectures import ModuleSpec
from adapterops.errors import CannotRepresent, UsageError
from adapterops.methods import METHODS
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor, columns, is_zero, same_bytes, stack, zeros

TRAINED = "--alpha trained"
"""The option that asks for the scale of the training, as the source of an alpha."""


class Block(NamedTuple):
    """One part of a fused module that was joined from parts: its name and its rank (0: it had no update)."""

    module: str
    rank: int


def pieces(spec: ModuleSpec) -> dict[str, list[tuple[int, int]]]:
    """For each part of a fused module: where its rows stand, in the part's own order."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    at = 0
    for name, start, stop in spec.joins:
        found.setdefault(name, []).append((start, at, at + stop - start))
        at += stop - start
    return {name: [(low, high) for _, low, high in sorted(places)] for name, places in found.items()}


def cut(update: Update, spec: ModuleSpec) -> list[Update]:
    """The updates of the parts: rows of the fused update's tensors and nothing else changed.

    Raises `CannotRepresent` where the method does not act on rows one by one.
    """
    method, places = METHODS[update.method], pieces(spec)
    # Norms over all rows do not depend on the rows' order.
    aside = _over_all_rows(update) if len(places) == 1 else {}
    rest = replace(update, tensors={role: t for role, t in update.tensors.items() if role not in aside})
    rest = replace(rest, options={k: v for k, v in rest.options.items() if k != "dora_axis"}) if aside else rest
    return [
        replace(update, module=name, tensors=_in_order(update, {**method.take_rows(rest, at), **aside}))
        for name, at in places.items()
    ]


def _over_all_rows(update: Update) -> dict[str, LazyTensor]:
    """The DoRA magnitude of an update, if it is per input: its norms go over all rows of the module."""
    return {"magnitude": update.tensors["magnitude"]} if update.options.get("dora_axis") == "in" else {}


def _in_order(update: Update, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {role: tensors[role] for role in update.tensors}


def split(update: Update, spec: ModuleSpec, recorded: Sequence[Block] | None = None) -> list[Update]:
    """As `cut`, each part at the rank it was trained with where the factors are a block diagonal.

    `recorded` says what the update was joined from, if it was; parts that had no update then are left out again.
    """
    parts = cut(update, spec)
    blocks = block_ranks(update, spec, recorded)
    if blocks is not None:
        parts = _narrow(update, parts, blocks)
    if recorded is not None and any(block.rank for block in recorded):
        absent = {block.module for block in recorded if not block.rank}
        method = METHODS[update.method]
        parts = [p for p in parts if p.module not in absent or not method.is_nothing(p)]
    return parts


def block_ranks(update: Update, spec: ModuleSpec, recorded: Sequence[Block] | None = None) -> dict[str, int] | None:
    """The rank of each part where the row factors are block-diagonal, None where they are not.

    Without a record the blocks are of one size, as sd-scripts makes them.
    """
    method = METHODS[update.method]
    places = pieces(spec)
    rank = method.rank(update) or 0
    if not method.pairs or len(places) < 2 or any(row not in update.tensors for row, _ in method.pairs):
        return None
    if recorded is not None:
        ranks = {block.module: block.rank for block in recorded}
    else:
        ranks = dict.fromkeys(places, rank // len(places))
    if ranks.keys() != places.keys() or sum(ranks.values()) != rank or min(ranks.values()) < 0:
        return None
    if sum(1 for r in ranks.values() if r) < 2:
        return None
    for row, _ in method.pairs:
        factor = update.tensors[row]
        # Zeros show no blocks, and 4-bit types have no columns of their own.
        if dtypes.BITS[factor.dtype] % 8 or (recorded is None and is_zero(factor)):
            return None
        start = 0
        for name, at in places.items():
            own = factor.rows(at)
            # A look at one row tells nearly always, and needs no numpy.
            line, width = own.rows([(0, 1)]).read(), own.nbytes // own.shape[0] // rank
            if any(line[: start * width]) or any(line[(start + ranks[name]) * width :]):
                return None
            # What stands before and behind the part's own columns must be zero.
            before, behind = columns(own, 0, start), columns(own, -(start + ranks[name]), rank - start - ranks[name])
            if not is_zero(before) or not is_zero(behind):
                return None
            start += ranks[name]
    return ranks


def lean(update: Update) -> Update:
    """The same update without the outer columns of its row factors that are zero: a block of a block diagonal."""
    pairs = METHODS[update.method].pairs
    tensors = dict(update.tensors)
    if not pairs or any(role not in tensors or len(tensors[role].shape) < 2 for pair in pairs for role in pair):
        return update
    rank = tensors[pairs[0][0]].shape[1]
    rows = [tensors[row].numpy().reshape(-1, rank) for row, _ in pairs if tensors[row].shape[1] == rank]
    used = [at for at in range(rank) if any(values[:, at].any() for values in rows)]
    if len(rows) < len(pairs) or not used or len(used) == rank:
        return update
    first, last = used[0], used[-1] + 1
    for row, shared in pairs:
        tensors[row] = columns(tensors[row], -first, last - first)
        tensors[shared] = tensors[shared].rows([(first, last)])
    # The scale is that of the whole rank, not of what is left.
    scale = METHODS[update.method].scale(update)
    slim = replace(update, tensors=tensors, rslora=False)
    if update.alpha is None or scale is None:
        return slim
    return replace(slim, alpha=replace(update.alpha, value=scale * (METHODS[update.method].rank(slim) or 1)))


def with_trained_scale(adapter: Adapter) -> Adapter:
    """The adapter with the scale of the training where fused projections are block-diagonal (`--alpha trained`).

    sd-scripts trains the parts at alpha over their own rank r and saves alpha unchanged beside a rank of n·r, so every
    reader applies an n-th of it.  Raises `UsageError` where no fused projection is block-diagonal.
    """
    updates, found = [], 0
    for update in adapter:
        component = adapter.base.components.get(update.component) if adapter.base is not None else None
        spec = component.fused.get(update.module) if component is not None else None
        ranks = block_ranks(update, spec) if spec is not None and update.alpha is not None else None
        if ranks is not None and update.alpha is not None and update.alpha.value is not None:
            found += 1
            alpha: Fact[float | None] = Fact(update.alpha.value * len(ranks), Certainty.GIVEN, TRAINED)
            update = replace(update, alpha=alpha)
        updates.append(update)
    if not found:
        raise UsageError(
            f"{adapter.provenance.path}: --alpha trained, but no fused projection of it is block-diagonal, as sd-scripts' "
            "split_qkv saves them; leave it out"
        )
    return adapter.with_updates(updates)


def _narrow(update: Update, parts: list[Update], ranks: Mapping[str, int]) -> list[Update]:
    """The parts of a block-diagonal update, each at its own rank and with the scale that the whole has."""
    method = METHODS[update.method]
    whole, start, out = method.rank(update) or 1, 0, []
    for part in parts:
        rank = ranks[part.module]
        if not rank:
            out.append(part)
            continue
        tensors = dict(part.tensors)
        for row, shared in method.pairs:
            tensors[row] = columns(tensors[row], -start, rank)
            tensors[shared] = tensors[shared].rows([(start, start + rank)])
        alpha = _alpha(method.scale(update), part, whole, rank)
        out.append(replace(part, tensors=tensors, alpha=alpha, rslora=False))
        start += rank
    return out


def _alpha(scale: float | None, update: Update, whole: int, rank: int) -> Fact[float | None] | None:
    """The alpha with which `rank` gives the scale that `update` has at rank `whole`."""
    if update.alpha is None or update.alpha.value is None or scale is None:
        return update.alpha
    value = scale * rank if update.rslora else update.alpha.value * rank / whole
    # Thirds of a power of two come back as themselves.
    near = round(value)
    value = float(near) if near and isclose(value, near, rel_tol=1e-12) else value
    return Fact(value, Certainty.DERIVED, f"the scale {scale:g} of the fused projection: {update.alpha.source}")


def join(spec: ModuleSpec, parts: Mapping[str, Update]) -> tuple[Update, list[Block] | None]:
    """One update on the fused module from those of its parts, and what it was joined from where that does not show.

    Parts without an update get rows of zeros.  The tensors keep the first part's keys.

    Raises `CannotRepresent` where no single update does what they do.
    """
    sizes = {name: sum(high - low for low, high in at) for name, at in pieces(spec).items()}
    present = [parts[name] for name in sizes if name in parts]
    first = present[0]
    method = METHODS[first.method]
    units = _insist_on_joinable(spec, sizes, present)
    ranks = {u.module: method.rank(u) or 0 for u in present}
    shared = {role for u in present for role in u.tensors if role not in units}
    if all(same_bytes(first.tensors[role], u.tensors[role]) for u in present[1:] for role in shared):
        blocks = None
        tensors = {role: first.tensors[role] for role in shared}
        alpha, rslora = first.alpha, first.rslora
    elif method.pairs and shared == {s for _, s in method.pairs}:
        blocks = ranks
        tensors = {s: _stacked([u.tensors[s] for u in present], spec) for s in shared}
        own = ranks[first.module]
        alpha, rslora = _alpha(method.scale(first), first, own, sum(ranks.values())), False
    else:
        raise _no_join(first, spec)
    rank, start = sum(ranks.values()), 0
    rows: dict[str, list[LazyTensor]] = {role: [] for u in present for role in u.tensors if role in units}
    for name, size in sizes.items():
        update = parts.get(name)
        for role, into in rows.items():
            tensor = update.tensors.get(role) if update is not None else None
            like = next(u.tensors[role] for u in present if role in u.tensors)
            width = rank if blocks is not None and any(role == row for row, _ in method.pairs) else 0
            if tensor is None:
                if size % units[role]:
                    raise _no_join(first, spec)
                count = size // units[role]
                tensor = zeros(like, (count, width, *like.shape[2:]) if width else (count, *like.shape[1:]))
            elif width:
                tensor = _beside(tensor, start, rank, spec)
            into.append(tensor)
        start += ranks.get(name, 0)
    for role, into in rows.items():
        tensors[role] = _stacked(into, spec)
        if _swapped(spec):
            pieces_of_whole = _order(spec)
            if any(at % units[role] for piece in pieces_of_whole for at in piece):
                raise _no_join(first, spec)
            tensors[role] = tensors[role].rows([(a // units[role], b // units[role]) for a, b in pieces_of_whole])
    ordered = {role: tensors[role] for role in dict.fromkeys(r for u in present for r in u.tensors)}
    record = [Block(name, ranks.get(name, 0) or (1 if name in parts else 0)) for name in sizes]
    uneven = len({block.rank for block in record}) > 1
    unseen = blocks is not None and any(is_zero(tensors[row]) for row, _ in method.pairs)
    update = replace(first, module=spec.name, tensors=ordered, alpha=alpha, rslora=rslora)
    return update, record if uneven or unseen else None


def _insist_on_joinable(spec: ModuleSpec, sizes: Collection[str], present: Sequence[Update]) -> dict[str, int]:
    """How many rows of the module a row of each tensor stands for, of updates that can stand on one fused module.

    Raises `CannotRepresent` for others.
    """
    first = present[0]
    units = _units(first)
    if units is None or any(not _WHOLE.isdisjoint(update.tensors) for update in present):
        raise _no_join(first, spec)
    if _over_all_rows(first):
        units.pop("magnitude", None)
    for update in present[1:]:
        _insist_alike(first, update, spec)
    if len(sizes) > 1 and any(u.options.get("dora_axis") == "in" for u in present):
        raise CannotRepresent(
            f"{first.name}: its DoRA magnitude (tensor {first.tensors['magnitude'].key!r}) is per input: its norms go over "
            f"the rows of this module alone, and one on the whole of {spec.name}, which this target keeps fused, over all "
            "of them; a target with separate projections holds it (--to kohya-diffusers)"
        )
    if len(present) < len(sizes) and not _may_lack_parts(first):
        raise _no_join(first, spec)
    if any("magnitude" in u.tensors for u in present) and len(present) < len(sizes):
        own = {update.module for update in present}
        lacking = next(name for name in sizes if name not in own)
        raise CannotRepresent(
            f"{first.component}: {lacking} has no DoRA magnitude, but {first.module} has; in one fused projection "
            f"({spec.name}) all or none have: its magnitude would be the norm of the base's weight"
        )
    return units


_WHOLE = frozenset({"mid", "t1", "t2", "bias_indices"})
"""Roles of tensors that are not rows and say something of all rows: cores, and positions in the whole matrix."""


def _units(update: Update) -> dict[str, int] | None:
    """The roles whose first axis is the module's outputs, with the number of outputs that one row of it makes.

    None for a method that does not act on rows one by one.
    """
    if update.method == "lokr":
        # Row i of w1 makes the rows of block i, which w2 shapes: parts that share w2 are joined by their rows of w1.
        second = update.tensors["w2" if "w2" in update.tensors else "w2_a"]
        return {"w1" if "w1" in update.tensors else "w1_a": second.shape[0], "magnitude": 1}
    if update.method == "onetrainer_oft":
        return {}  # it turns the inputs, of every row alike
    if update.method == "ia3":
        vector = update.tensors["vector"]
        if update.options["on_input"]:
            return {}
        return {"vector": 1} if vector.shape[0] == vector.numel else None
    return dict.fromkeys(METHODS[update.method].rows, 1) or None


def _may_lack_parts(update: Update) -> bool:
    """Whether rows of zeros leave a part as it is: not where they replace its weight, or multiply it."""
    if update.method == "ia3":
        return not update.options["on_input"] and not update.options["initial"]
    return update.method not in ("saved", "onetrainer_oft")


def _no_join(update: Update, spec: ModuleSpec) -> CannotRepresent:
    # Whole parameters and peft's own (IA)³ stand in no Kohya file.
    only_peft = update.method == "saved" or (update.method == "ia3" and update.options.get("initial"))
    # peft has no whole differences, and its (IA)³ is another than LyCORIS'.
    only_kohya = update.method in ("diff", "ia3")
    ways = "--to peft" if only_peft else "--to kohya-diffusers" if only_kohya else "--to peft, --to kohya-diffusers"
    return CannotRepresent(
        f"{update.name}: {METHODS[update.method].title} on the parts of {spec.name}, which this target keeps fused, is not "
        f"one such update on the whole; a target with separate projections holds it ({ways})"
    )


def _insist_alike(one: Update, two: Update, spec: ModuleSpec) -> None:
    method = METHODS[one.method]
    scales = method.scale(one), method.scale(two)
    if one.method == two.method and dict(one.options) == dict(two.options) and _close(*scales):
        if {r for r in one.tensors if r != "bias"} == {r for r in two.tensors if r != "bias"}:
            return
        what = f"have different tensors ({', '.join(sorted(one.tensors))}; {', '.join(sorted(two.tensors))})"
    elif one.method != two.method or dict(one.options) != dict(two.options):
        what = f"are of different kinds ({method.title}; {METHODS[two.method].title})"
    else:
        what = f"have different scales ({scales[0]}; {scales[1]}): --fold-alpha bakes them into the factors"
    raise CannotRepresent(
        f"{one.component}: {one.module} and {two.module} are one fused projection here ({spec.name}), but {what}"
    )


def _close(one: float | None, two: float | None) -> bool:
    return one == two or (one is not None and two is not None and isclose(one, two, rel_tol=1e-12))


def _beside(tensor: LazyTensor, start: int, width: int, spec: ModuleSpec) -> LazyTensor:
    try:
        return columns(tensor, start, width)
    except ValueError as error:
        raise CannotRepresent(
            f"{error}: it is part of one fused projection here ({spec.name}); --dtype float16 gives it whole bytes"
        ) from error


def _stacked(tensors: list[LazyTensor], spec: ModuleSpec) -> LazyTensor:
    try:
        return stack(tensors)
    except ValueError as error:
        raise CannotRepresent(
            f"{error}: they are parts of one fused projection here ({spec.name}); --dtype makes their dtypes equal"
        ) from error


def _swapped(spec: ModuleSpec) -> bool:
    return len({name for name, _, _ in spec.joins}) != len(spec.joins) or any(start for _, start, _ in spec.joins)


def _order(spec: ModuleSpec) -> list[tuple[int, int]]:
    """For each piece of the fused weight: where it stands when the parts, each whole, are stacked."""
    begin, at = {}, 0
    for name, places in pieces(spec).items():
        begin[name] = at
        at += sum(high - low for low, high in places)
    return [(begin[name] + start, begin[name] + stop) for name, start, stop in spec.joins]
