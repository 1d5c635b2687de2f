"""LoRAs of one rank and one scale: for readers that know one `r` and one `lora_alpha` for all modules.

- A scale that differs is multiplied into B, which rounds B once (powers of two do not round).
- A smaller rank is filled up with zeros: rows of A (r, in_features) and columns of B (out_features, r).  ΔW = s·B·A stays
  what it was, and alpha is restated so that s = alpha/r does too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isclose

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import UnknownFact
from adapterops.methods import METHODS
from adapterops.storage.tensor import LazyTensor, columns, stack, zeros


@dataclass(frozen=True, slots=True)
class Uniform:
    """LoRAs of one rank and one scale, and what was done to them."""

    updates: list[Update]
    rank: int
    scale: float
    rslora: bool
    scaled: tuple[str, ...] = ()
    """The modules whose B took up a part of the scale."""
    filled: tuple[str, ...] = ()
    """The modules whose rank was smaller."""


def uniform(
    updates: Iterable[Update], why: str, rslora: bool = True, scale: float | None = None, dtype: str | None = None
) -> Uniform:
    """The same LoRAs at the largest of their ranks, and at `scale` or else the scale that most of them have.

    alpha/√r stays the rule where all have it, if `rslora` allows that; alpha is stated otherwise, if not, for alpha/r.  What
    is no LoRA stays as it is, rounded to `dtype`.  `why` is the source of every alpha that is made.

    Raises `UnknownFact` for a LoRA without an alpha, `CannotRepresent` for tensors that cannot be scaled.
    """
    updates = list(updates)
    own = [u for u in updates if u.method == "lora"]
    scales = {u.key: _scale(u) for u in own}
    ranks = {u.key: METHODS[u.method].rank(u) or 0 for u in own}
    rank = max(ranks.values(), default=0)
    common = scale if scale is not None else _commonest(list(scales.values()))
    rule = _rule(
        [u for u in own if ranks[u.key] == rank and isclose(scales[u.key], common, rel_tol=1e-12)], own, rslora
    )
    alpha: Fact[float | None] = rule.alpha if rule else _stated(common, rank, why)
    out, scaled, filled = [], [], []
    for update in updates:
        if update.method != "lora":
            out.append(replace(update, tensors={role: t.mapped(dtype) for role, t in update.tensors.items()}))
            continue
        factor = scales[update.key] / common if common else 1.0
        factor = 1.0 if isclose(factor, 1.0, rel_tol=1e-12) else factor
        tensors = {role: t.mapped(dtype, factor if role in _SCALED else 1.0) for role, t in update.tensors.items()}
        if ranks[update.key] < rank:
            tensors |= {"A": _taller(tensors["A"], rank), "B": columns(tensors["B"], 0, rank)}
            filled.append(update.name)
        if factor != 1.0:
            scaled.append(update.name)
        same = update.alpha is not None and update.alpha.value == alpha.value
        kept = update.alpha if same and update.rslora == bool(rule and rule.rslora) else alpha
        out.append(replace(update, tensors=tensors, alpha=kept, rslora=bool(rule and rule.rslora)))
    return Uniform(out, rank, common, bool(rule and rule.rslora), tuple(scaled), tuple(filled))


_SCALED = ("B", "bias")
"""The roles that the scale acts on."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """An alpha and the rule by which it makes the scale."""

    alpha: Fact[float | None]
    rslora: bool


def _rule(fitting: list[Update], own: list[Update], rslora: bool) -> _Rule | None:
    """What an update of the common rank and scale says, if all can say it: its alpha then needs no arithmetic."""
    allowed = [u for u in fitting if u.alpha is not None and (not u.rslora or (rslora and all(o.rslora for o in own)))]
    first = next(iter(allowed), None)
    return _Rule(first.alpha, first.rslora) if first is not None and first.alpha is not None else None


def _scale(update: Update) -> float:
    scale = METHODS[update.method].scale(update)
    if scale is None:
        raise UnknownFact(
            f"{next(iter(update.tensors.values())).where}: the alpha of {update.name} is unknown, so its scale is too; say "
            "it with --alpha X"
        )
    return scale


def _commonest(scales: list[float]) -> float:
    """The scale that most have, those equal but for rounding counted as one; 0 only where all are."""
    counted: Counter[float] = Counter()
    for scale in scales:
        counted[next((s for s in counted if isclose(s, scale, rel_tol=1e-12)), scale)] += 1
    return min(counted, key=lambda s: (s == 0.0, -counted[s], -abs(s), s), default=1.0)


def _stated(scale: float, rank: int, why: str) -> Fact[float | None]:
    """The alpha with which `rank` gives `scale`; whole numbers come out whole."""
    value = scale * rank
    near = round(value)
    value = float(near) if near and isclose(value, near, rel_tol=1e-12) else value
    return Fact(value, Certainty.DERIVED, why)


def _taller(tensor: LazyTensor, rank: int) -> LazyTensor:
    """The matrix (r, …) with rows of zeros below."""
    return stack([tensor, zeros(tensor, (rank - tensor.shape[0], *tensor.shape[1:]))])


def nothing(like: Update, module: str, outputs: int) -> Update:
    """A LoRA of zeros on another module with the same inputs: what stands for no update where readers ask for one.

    A (r, in_features) and B (`outputs`, r), of the types of `like`'s.
    """
    a, b = like.tensors["A"], like.tensors["B"]
    tensors = {"A": zeros(a, a.shape), "B": zeros(b, (outputs, *b.shape[1:]))}
    return replace(like, module=module, tensors=tensors)
