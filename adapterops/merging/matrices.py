"""The weight deltas of one module, merged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, isclose, isfinite, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterops.architectures import Architecture
from adapterops.errors import CannotRepresent, UsageError
from adapterops.linalg.random import Draw
from adapterops.merging.bases import REPLICATION
from adapterops.merging.deltas import DeltaStack, block_rows, to_device, wide
from adapterops.merging.methods import svd
from adapterops.merging.modules import Module
from adapterops.merging.registry import Kind, Space
from adapterops.merging.settings import Choice, ModuleReport, Settings
from adapterops.merging.stack import TensorStack
from adapterops.merging.terms import Shape, Term, common_shape
from adapterops.merging.together import is_simple, is_single, together
from adapterops.merging.whole import Reduced, weighted_sum
from adapterops.storage.tensor import LazyTensor, same_values

if TYPE_CHECKING:
    import torch

    from adapterops.linalg.lowrank import Pair, Stacked, Svd

_NARROW = 256
"""Up to this sum of ranks the plain sum's singular vectors are worth having as the start of an iteration."""
_WEAK = 0.1
"""Strengths below this cost 16-bit factors digits, if they are multiplied in."""
MOST_DIRECTIONS = 1 << 12
"""Of matrices side by side: a GiB of memory and a minute for each module; twice as many take ten."""
_AHEAD = 8
"""Singular vectors beyond the rank that an iteration is started with."""


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """How the weight deltas of a module are merged, and what comes out: known before anything is computed.

    `rank` None: a whole difference.  `alpha` is what the output's alpha is; None: its rank (scale 1).  `outputs` are roles
    and shapes; `magnitude` a DoRA magnitude that all adapters share.
    """

    module: Module
    choice: Choice
    shape: Shape
    rank: int | None
    outputs: Mapping[str, tuple[int, ...]]
    alpha: float | None = None
    embedding: bool = False
    magnitude: LazyTensor | None = None
    axis: str | None = None

    @property
    def terms(self) -> Sequence[Term]:
        """The adapters' deltas."""
        return self.module.terms


def plan(module: Module, choice: Choice, base: Architecture | None = None) -> MatrixPlan:
    """What merging the module's deltas will give.

    Raises `UsageError` and `CannotRepresent` where the method cannot merge them.
    """
    terms = module.terms
    shape = _kernel_of(base, module, common_shape(terms))
    embedding = terms[0].update.options.get("kind") == "embedding"
    magnitude, axis = _magnitude(module)
    if choice.space is Space.FACTORS and choice.method.kind is Kind.ELEMENTS:
        rank: int | None = _factor_rank(module, choice)
    elif all(term.whole for term in terms):
        rank = None
    else:
        rank = _rank(module, choice, shape)
    _insist_on_room(module, choice, shape)
    if rank is None:
        return MatrixPlan(module, choice, shape, None, {"weight": shape.sizes})
    outputs = {
        "A": (rank, *shape.sizes[1:]),
        "B": (shape.rows, rank, *(1,) * (len(shape.sizes) - 2)),
    }
    # A part of a fused projection is to have the same scale as its other parts; a bias has its scale in it already.
    whole = not any(term.pieces is not None for term in terms) and ("lora", "bias") not in module.vectors
    alpha = _scale_kept(terms) * rank if choice.method.kind is Kind.STACKED and whole else None
    return MatrixPlan(module, choice, shape, rank, outputs, alpha, embedding, magnitude, axis)


def _kernel_of(base: Architecture | None, module: Module, shape: Shape) -> Shape:
    """The shape with the kernel that the base has there: LyCORIS flattens it, and readers insist on it."""
    component = base.components.get(module.component) if base is not None else None
    spec = component.spec(module.name) if component is not None else None
    if spec is None or spec.kind != "conv":
        return shape
    own = Shape(spec.shape)
    return own if len(spec.shape) > 2 and (own.rows, own.columns) == (shape.rows, shape.columns) else shape


def _magnitude(module: Module) -> tuple[LazyTensor | None, str | None]:
    """The DoRA magnitude that all terms share.  Raises `CannotRepresent` where they do not."""
    own = [term.update.tensors.get("magnitude") if term.foreign is None else None for term in module.terms]
    _insist_on_one_update(module)
    first = next((m for m in own if m is not None), None)
    if first is None:
        return None, None
    axes = {term.update.options.get("dora_axis") for term in module.terms}
    shared = all(m is not None and same_values(first, m) for m in own)
    if not shared or len(axes) > 1 or any(term.pieces is not None for term in module.terms):
        what = "not all adapters have one" if None in own else "the adapters' magnitudes differ"
        raise CannotRepresent(
            f"{first.where}: {module.title} has a DoRA magnitude, and {what}: what DoRA does depends on the base weight, so "
            "such adapters cannot be merged without it; --base-weights BASE folds the magnitudes into the deltas"
        )
    return first, axes.pop()


def _insist_on_one_update(module: Module) -> None:
    """Raise `CannotRepresent` where a magnitude stands beside another change of the same adapter."""
    for term in module.terms:
        every = [term.update, *(other.update for other in term.beside)]
        with_magnitude = next((u.tensors["magnitude"] for u in every if "magnitude" in u.tensors), None)
        if with_magnitude is not None and term.beside:
            raise CannotRepresent(
                f"{with_magnitude.where}: {module.title} has a DoRA magnitude and another change beside it in the same file "
                f"({term.kind}); what they do together is not defined, and they are not merged"
            )


def _factor_rank(module: Module, choice: Choice) -> int:
    name = choice.method.name
    other = next((t for t in module.terms if not t.plain), None)
    if other is not None:
        raise UsageError(
            f"{other.where}: --method {name} acts on the two factors of LoRA, and {module.title} is {_named(other)} here"
            f"{_instead(choice)}"
        )
    ranks = {term.rank for term in module.terms}
    if len(ranks) > 1:
        listed = ", ".join(f"{t.rank} ({t.update.tensors['A'].source.path})" for t in module.terms)
        raise UsageError(
            f"{module.title}: --method {name} on factors needs equal ranks, and they are {listed}{_instead(choice)}"
        )
    rank = ranks.pop()
    assert rank is not None
    if choice.rank not in (None, rank):
        raise UsageError(
            f"{module.title}: --method {name} on factors gives the rank of its inputs, {rank}, and not {choice.rank}"
            f"{_instead(choice)}"
        )
    return rank


def _named(term: Term) -> str:
    return f"{term.kind} with a Tucker core" if term.kind == "lora" else term.kind


def _instead(choice: Choice) -> str:
    if Space.DELTA in choice.method.spaces:
        return "; --space delta merges the weight deltas themselves"
    return "; --method svd (the best of a rank) and cat (exact) merge the weight deltas themselves"


def _rank(module: Module, choice: Choice, shape: Shape) -> int:
    terms, kind = module.terms, choice.method.kind
    exact = [term.exact_rank for term in terms]
    total = None if None in exact else sum(r for r in exact if r is not None)
    if kind is Kind.STACKED and total is None:
        other = terms[exact.index(None)]
        raise UsageError(
            f"{other.where}: --method {choice.method.name} needs low-rank factors, and {module.title} has none here "
            f"({other.kind}); --method svd --rank R gives the best of rank R, and adapterops to-lora makes a plain LoRA of it "
            "first"
        )
    if kind is Kind.STACKED:
        assert total is not None
        if choice.rank not in (None, total):
            raise UsageError(
                f"{module.title}: --method cat gives the sum of the ranks, {total}, and not {choice.rank}; --method svd "
                f"--rank {choice.rank} gives the best of that rank"
            )
        return total
    wanted = choice.rank
    if wanted is None:
        ranks = [term.rank for term in terms]
        if None in ranks:
            other = terms[ranks.index(None)]
            raise UsageError(
                f"{other.where}: {module.title} has no rank here ({other.kind}), so the output's is not known; "
                "say it with --rank R"
            )
        wanted = max(rank for rank in ranks if rank is not None)
    most = min(shape.rows, shape.columns)
    if total is not None and kind is not Kind.ELEMENTS:
        most = min(most, total)
    return min(wanted, most)


def _insist_on_room(module: Module, choice: Choice, shape: Shape) -> None:
    """Raise `UsageError` for whole matrices that a method on singular vectors would decompose side by side, too large for it."""
    if choice.method.kind is not Kind.FACTORS or choice.method.by_rank:
        return
    other = next((term for term in module.terms if term.exact_rank is None), None)
    directions = min(shape.rows, len(module.terms) * shape.columns)
    if other is not None and directions > MOST_DIRECTIONS:
        raise UsageError(
            f"{other.where}: {module.title} has no low-rank factors here ({other.kind}), and --method {choice.method.name} would "
            f"decompose {len(module.terms)} whole matrices {shape.rows} × {shape.columns} side by side, {directions} directions "
            f"(at most {MOST_DIRECTIONS}); adapterops to-lora makes plain LoRAs of the adapters first, and tsv and iso_c take "
            "them as they are"
        )


def _scale_kept(terms: Sequence[Term]) -> float:
    """The scale under which stacked factors keep their bytes, where all are of one strength, or their digits, where all are so
    weak that 16 bits would hold few of them; else 1, which every reader applies."""
    strengths = {term.weight * term.scale for term in terms}
    strongest = max(abs(strength) for strength in strengths)
    return strongest if (len(strengths) == 1 and min(strengths) > 0) or strongest < _WEAK else 1.0


def stacked_factors(p: MatrixPlan) -> list[float]:
    """What `cat` multiplies each A by: 1 where the term is as strong as the output's scale says."""
    scale = 1.0 if p.alpha is None or p.rank is None else p.alpha / p.rank
    factors = [term.weight * term.scale / scale for term in p.terms]
    return [1.0 if isclose(factor, 1.0, rel_tol=1e-12) else factor for factor in factors]


Tensors = dict[str, "torch.Tensor"]


def compute(
    p: MatrixPlan, settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[Tensors, ModuleReport]:
    """The tensors of the merged update by role, in `dtype` on the CPU, and what became of the module."""
    kind = p.choice.method.kind
    if kind is Kind.ELEMENTS and p.choice.space is Space.FACTORS:
        return _factors(p, settings, device, dtype)
    if kind is Kind.STACKED and p.rank is not None:
        return _stacked(p, dtype)
    if is_low(p):
        return compute_alike([p], settings, device, dtype)[0]
    import torch

    weights = [term.weight for term in p.terms]
    total = _total_rank(p)
    if kind is Kind.FACTORS and total is not None:
        return _from_factors(p, _pairs(p.terms, device), weights, settings, dtype)
    # Element-wise methods need them for a start only, and not at any price.
    narrow = total is not None and total <= min(_NARROW, p.shape.rows, p.shape.columns)
    whole = together([p.terms], device) if kind in (Kind.SPAN, Kind.STACKED) or narrow else None
    stack = DeltaStack(p.terms, draws(p, settings, "delta"), device, p.module.among - len(p.terms))
    if kind in (Kind.SPAN, Kind.STACKED):  # whole differences are not stacked: their sum is as exact
        merged = _dense_span(p, stack, whole)
    if kind is Kind.ELEMENTS:
        merged = p.choice.method.function(stack, **p.choice.arguments)
    if kind is Kind.FACTORS:
        made = _of_matrices(p, stack, settings)
        if not isinstance(made, torch.Tensor) and p.rank is not None:
            return _reduced(p, *made, settings, dtype)
        merged = made if isinstance(made, torch.Tensor) else (made[0].pair[0] @ made[0].pair[1]).float()
    tensors: Tensors = {"weight": merged.reshape(p.shape.sizes).to("cpu", dtype)} if p.rank is None else {}
    told = report(p)
    if p.rank is not None:
        tensors, told = _refactor(p, merged, whole if narrow else None, settings, dtype)
    if not merged.any() and any(bool(stack.whole(k).any()) for k in range(len(stack))):
        told = replace(told, empty=True)
    return tensors, told


def _total_rank(p: MatrixPlan) -> int | None:
    ranks = [term.exact_rank for term in p.terms]
    return None if None in ranks else sum(rank for rank in ranks if rank is not None)


def is_low(p: MatrixPlan) -> bool:
    """Whether the module is a weighted sum of low rank, which is never a matrix."""
    total = _total_rank(p)
    low = total is not None and total <= min(p.shape.rows, p.shape.columns)
    return low and p.choice.method.kind is Kind.SPAN and p.rank is not None


class Likeness(NamedTuple):
    """The sizes of a module's sum: its weight's, the rank that comes out, and those that go in; and the type of what goes in."""

    rows: int
    columns: int
    rank: int | None
    ranks: tuple[int | None, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        """Of all factors that go in."""
        return (self.rows + self.columns) * sum(rank or 0 for rank in self.ranks)


def likeness(p: MatrixPlan) -> Likeness | None:
    """What modules have in common that `compute_alike` takes together; None for others than simple sums of low rank, which
    take so little that a module is mostly calls."""
    if not is_low(p) or not is_simple(p.terms):
        return None
    dtype = p.terms[0].update.tensors["A"].dtype
    return Likeness(p.shape.rows, p.shape.columns, p.rank, tuple(term.exact_rank for term in p.terms), dtype)


def compute_alike(
    plans: Sequence[MatrixPlan], settings: Settings, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensors, ModuleReport]]:
    """`compute` for modules of one likeness; what becomes of one does not depend on the others."""
    # Sixteen bits hold less than what float32 rounds off.
    single = dtype.itemsize == 2 and all(is_single(p.terms) for p in plans)
    whole = together([p.terms for p in plans], device, single)
    assert whole is not None
    inner = whole.inner
    coefficients = [_coefficients(p, own, [t.weight for t in p.terms]) for p, own in zip(plans, inner, strict=True)]
    found = whole.decompose(coefficients, plans[0].rank, lambda s: _sides(s, settings.split), single)
    out: Tensors = {"A": found.vh.to("cpu", dtype), "B": found.u.to("cpu", dtype)}
    errors = found.errors(out["B"], out["A"])
    made, kept = [], found.kept
    for n, p in enumerate(plans):
        own = {role: tensor[n].reshape(p.outputs[role]) for role, tensor in out.items()}
        if not found.energies[n] and float(inner[n].diagonal().sum()):
            made.append((own, report(p, 1.0, 0.0, empty=True)))
        else:
            made.append((own, report(p, kept[n], errors[n], cancels=found.cancels[n])))
    return made


def strengths(p: MatrixPlan) -> tuple[list[float], list[float]]:
    """What PEFT multiplies the A's and the B's by: the root of weight times scale, with its sign on the A's."""
    own = [term.weight * term.scale for term in p.terms]
    roots = [sqrt(abs(strength)) for strength in own]
    return [root if strength >= 0 else -root for root, strength in zip(roots, own, strict=True)], roots


def draws(p: MatrixPlan, settings: Settings, role: str) -> list[Draw]:
    """A stream of random numbers for each adapter's tensor of that role."""
    return [Draw(settings.seed, p.module.component, p.module.name, role, term.adapter) for term in p.terms]


def _pairs(terms: Sequence[Term], device: torch.device) -> list[Pair]:
    """Every term's factors in float64, the scale included."""
    pairs = [(pair, term.scale) for term in terms if (pair := term.pair()) is not None]
    return [(wide(to_device(b, device)) * scale, wide(to_device(a, device))) for (b, a), scale in pairs]


def _factors(
    p: MatrixPlan, settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[Tensors, ModuleReport]:
    """The A's and the B's, each merged by itself, with the root of the strength on both sides and its sign on A."""
    pairs = [pair for term in p.terms if (pair := term.pair()) is not None]
    out: Tensors = {}
    for role, index, weights in zip("AB", (1, 0), strengths(p), strict=True):
        stack = TensorStack([to_device(pair[index], device) for pair in pairs], weights, draws(p, settings, role))
        merged = p.choice.method.function(stack, **p.choice.arguments)
        out[role] = merged.reshape(p.outputs[role]).to("cpu", dtype)
    empty = not all(bool(tensor.any()) for tensor in out.values())
    return out, report(p, empty=empty and any(bool(b.any()) and bool(a.any()) for b, a in pairs))


def _stacked(p: MatrixPlan, dtype: torch.dtype) -> tuple[Tensors, ModuleReport]:
    import torch

    pairs = [pair for term in p.terms if (pair := term.pair()) is not None]
    factors = stacked_factors(p)
    pairs = [(b, a if f == 1 else a.double() * f) for (b, a), f in zip(pairs, factors, strict=True)]
    a = torch.cat([a.to(dtype) for _, a in pairs], dim=0)
    b = torch.cat([b.to(dtype) for b, _ in pairs], dim=1)
    return {"A": a.reshape(p.outputs["A"]), "B": b.reshape(p.outputs["B"])}, report(p)


def _coefficients(p: MatrixPlan, inner: torch.Tensor, weights: Sequence[float]) -> list[float]:
    """What the method multiplies each delta by; adapters that leave the module alone have none."""
    if p.choice.method.kind is Kind.STACKED:
        return list(weights)
    return [float(c) for c in p.choice.method.function(inner, weights, **p.choice.arguments)]


def _dense_span(p: MatrixPlan, stack: DeltaStack, whole: Stacked | None) -> torch.Tensor:
    import torch

    count = len(stack)
    if whole is not None:
        inner = whole.inner[0]
    else:
        inner = torch.zeros(count, count, dtype=torch.float64)
        for _, _, values in stack.blocks():
            flat = wide(torch.stack([v.reshape(-1) for v in values]))
            inner += (flat @ flat.T).cpu()
    return weighted_sum(stack, _coefficients(p, inner, stack.weights))


def _from_factors(
    p: MatrixPlan, pairs: Sequence[Pair], weights: Sequence[float], settings: Settings, dtype: torch.dtype
) -> tuple[Tensors, ModuleReport]:
    """Held against what the method makes at full rank: a method may make something else of a lower one."""
    from adapterops.linalg.lowrank import CANCELLING, decompose

    assert p.rank is not None
    function, given = p.choice.method.function, _with_draws(p, p.choice.method.function, settings)
    b, a = function(pairs, weights, p.rank, **given)
    found = decompose(b, a, p.rank, exact=True)
    out = _padded(p, _split(p, found, settings, dtype), dtype)
    strength = sum(w * w * _energy(left, right) for (left, right), w in zip(pairs, weights, strict=True))
    cancels = p.choice.method.by_rank and found.energy < CANCELLING**2 * strength
    most = min(p.shape.rows, p.shape.columns, sum(b.shape[1] for b, _ in pairs))
    if b.shape[1] <= p.rank < most:
        b, a = function(pairs, weights, most, **given)
    kept, error, energy = _held(b, a, found) if p.rank < b.shape[1] else (1.0, 0.0, found.energy)
    empty = not found.energy and strength > 0 and not cancels
    error = _rounded(found, out, error, energy)
    return out, report(p, kept, error, cancels=cancels, empty=empty, full=b.shape[1])


def _with_draws(p: MatrixPlan, function: Any, settings: Settings) -> dict[str, Any]:
    """The arguments of a method's function, with random numbers where it takes them."""
    own = {"draws": draws(p, settings, "delta")} if "draws" in inspect.signature(function).parameters else {}
    return {**own, **p.choice.arguments}


def _energy(b: torch.Tensor, a: torch.Tensor) -> float:
    """‖b·a‖²."""
    return float((b.T @ b * (a @ a.T)).sum())


def _held(b: torch.Tensor, a: torch.Tensor, found: Svd) -> tuple[float, float, float]:
    """Of b·a, what a method makes at full rank: the share of its energy in the directions that are there at a lower one, the
    distance from what stands in them, relative to its norm, and that energy."""
    energy = _energy(b, a)
    if energy <= 0:
        return 1.0, 0.0, 0.0
    inside = (found.u.T @ b) @ (a @ found.vh.T)
    within = float(inside.square().sum())
    inside.diagonal().sub_(found.s)
    outside = max(0.0, energy - within)
    return min(1.0, within / energy), sqrt((outside + float(inside.square().sum())) / energy), energy


def _of_matrices(p: MatrixPlan, stack: DeltaStack, settings: Settings) -> torch.Tensor | tuple[Reduced, float]:
    """What a method makes of deltas without low-rank factors: the merged delta, or one of the rank that is wanted, and by how
    much its decompositions may miss the best ones."""
    from adapterops.linalg.dense import truncated

    loose = [0.0]

    def best(matrix: torch.Tensor, rank: int) -> Svd:
        draw = Draw(settings.seed, p.module.component, p.module.name, "start")
        found, excess = truncated(matrix, rank, tolerance=settings.tolerance, draw=draw, exact=settings.exact_svd)
        loose.append(excess)
        return found

    function = p.choice.method.of_matrices
    assert function is not None
    if not p.choice.method.by_rank:
        merged: torch.Tensor = function(stack, **_with_draws(p, function, settings))
        return merged
    rank = min(p.shape.rows, p.shape.columns) if p.rank is None else p.rank
    return function(stack, rank, best, **p.choice.arguments), max(loose)


def _reduced(
    p: MatrixPlan, made: Reduced, excess: float, settings: Settings, dtype: torch.dtype
) -> tuple[Tensors, ModuleReport]:
    from adapterops.linalg.lowrank import decompose

    found = decompose(*made.pair, p.rank, exact=True)
    out = _padded(p, _split(p, found, settings, dtype), dtype)
    if made.error is None:
        return out, report(p, made.kept, None, excess)
    error = _rounded(found, out, made.error, made.energy)
    return out, report(p, made.kept, error, excess, empty=not found.energy, full=made.full)


def _refactor(
    p: MatrixPlan, merged: torch.Tensor, whole: Stacked | None, settings: Settings, dtype: torch.dtype
) -> tuple[Tensors, ModuleReport]:
    """A dense merged delta as factors of the rank asked for."""
    from adapterops.linalg.dense import truncated

    assert p.rank is not None
    start = None
    if whole is not None and not settings.exact_svd:
        # The merged delta leans the way the plain sum does: a start that saves passes over the matrix.
        plain = whole.decompose([[term.weight for term in p.terms]], p.rank + _AHEAD).of(0)
        start = plain.vh.T.float()
    draw = Draw(settings.seed, p.module.component, p.module.name, "start")
    found, excess = truncated(
        merged, p.rank, tolerance=settings.tolerance, start=start, draw=draw, exact=settings.exact_svd
    )
    out = _padded(p, _split(p, found, settings, dtype), dtype)
    return out, report(p, found.kept, _residual(merged, out, found.energy), excess)


def _residual(merged: torch.Tensor, out: Tensors, energy: float) -> float:
    """‖merged − B·A‖ / ‖merged‖, with the factors as they will stand in the output."""
    import torch

    b, a = (out[role].to(merged.device).float() for role in "BA")
    step = block_rows(merged.shape[1], merged.device)
    square = 0.0
    for start in range(0, merged.shape[0], step):
        rows = merged[start : start + step]
        part = torch.addmm(rows, b[start : start + step], a, alpha=-1).reshape(-1)
        own = float(torch.dot(part, part))
        square += own if isfinite(own) else float(wide(part).square().sum())
    return sqrt(square / energy) if energy else sqrt(square)


def _split(p: MatrixPlan, found: Svd, settings: Settings, dtype: torch.dtype) -> Tensors:
    """B (m, k) and A (k, n) of a decomposition, in the shapes of the output where k is its rank."""
    left, right = _sides(found.s, settings.split)
    return {"A": (right[:, None] * found.vh).to("cpu", dtype), "B": (found.u * left).to("cpu", dtype)}


def _sides(s: torch.Tensor, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What u's columns and vh's rows are multiplied by, for singular values (…, k)."""
    s = s.clamp_min(0)
    if split == "even":
        return s.sqrt(), s.sqrt()
    ones = s.new_ones(s.shape)
    return (s, ones) if split == "b" else (ones, s)


def _matrices(p: MatrixPlan) -> dict[str, tuple[int, int]]:
    assert p.rank is not None
    return {"B": (p.shape.rows, p.rank), "A": (p.rank, p.shape.columns)}


def _padded(p: MatrixPlan, out: Tensors, dtype: torch.dtype) -> Tensors:
    """With zeros where the result has a lower rank than was planned."""
    import torch

    full = {}
    for role, shape in _matrices(p).items():
        tensor = out[role]
        if tensor.shape != shape:
            room = torch.zeros(shape, dtype=dtype)
            room[: tensor.shape[0], : tensor.shape[1]] = tensor
            tensor = room
        full[role] = tensor
    return full


def _rounded(found: Svd, out: Tensors, error: float, energy: float) -> float:
    """`error` and that of the rounding to the output's dtype together, relative to the root of `energy`."""
    b, a = out["B"].double(), out["A"].double()
    u, s, vh = (part.double().cpu() for part in (found.u, found.s, found.vh))
    mixed = float(((b.T @ u) * s * (a @ vh.T)).sum())
    square = max(0.0, float((b.T @ b * (a @ a.T)).sum()) - 2 * mixed + float(s.square().sum()))
    return hypot(error, sqrt(square / energy)) if energy else sqrt(square)


def report(
    p: MatrixPlan,
    kept: float | None = None,
    error: float | None = None,
    excess: float = 0.0,
    cancels: bool = False,
    empty: bool = False,
    full: int | None = None,
) -> ModuleReport:
    exact = [term.exact_rank for term in p.terms] if p.choice.method.function in (svd.svd, svd.subtract) else [full]
    whole = None if None in exact else sum(rank for rank in exact if rank is not None)
    return ModuleReport(
        p.module.component, p.module.name, p.choice.method.name, p.rank, kept, error, excess, cancels, whole, empty
    )


def update_options(p: MatrixPlan) -> dict[str, Any]:
    """The options of the merged update."""
    out: dict[str, Any] = {"kind": "embedding"} if p.embedding else {}
    if p.magnitude is not None:
        out["dora_axis"] = p.axis
    replicated = p.terms[0].update.options.get(REPLICATION)
    return out | ({REPLICATION: replicated} if replicated else {})
