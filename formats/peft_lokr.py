"""LoKr in PEFT configs: which factors peft makes of `r`, `decompose_both` and `decompose_factor`, and back.

Of a module with `out` outputs and `in` inputs peft makes w1 (o1, i1) and w2 (o2, i2, *kernel) with (o1, o2) and (i1, i2)
by `factors`.  w2 is whole where r ≥ max(o2, i2) / 2, w1 where `decompose_both` is false or r ≥ max(o1, i1) / 2.  So a file
with whole factors needs an r that makes them whole again.  Source: huggingface/peft 0.21.2 `tuners/lokr/layer.py`
(`update_layer`, `factorization`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isqrt, prod
from typing import Any, NamedTuple

from adapterops_formats import peft_conv
from adapterops_formats.peft_conv import KOHYA
from adapterops_formats.peft_patterns import Base

from adapterops.plugin import METHODS, Certainty, Group, LazyTensor, Update, errors

_KERNELS = (1, 9, 3, 25, 49, 5, 7, 4, 16)
"""Kernel sizes to try where one is flattened into a factor and the base is not known."""


def factors(size: int, factor: int) -> tuple[int, int]:
    """The two numbers that peft makes of `size`: `factor` and the rest, or two near √size (not above `factor`)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor == -1 else min(factor, isqrt(size))
    small: int = next((m for m in range(most, 0, -1) if size % m == 0), 1)
    return small, size // small


class Shown(NamedTuple):
    """What the tensors of a LoKr update show: w1 (o1, i1), w2 (o2, i2); `inputs` are what i2 may be."""

    update: Update
    o1: int
    i1: int
    o2: int
    inputs: tuple[int, ...]
    rank: int | None

    @property
    def first(self) -> LazyTensor:
        """The tensor that a message names."""
        return next(iter(self.update.tensors.values()))

    @property
    def whole(self) -> tuple[bool, bool]:
        """Whether w1 and w2 are whole."""
        return "w1" in self.update.tensors, "w2" in self.update.tensors

    def inner(self, factor: int, certain: bool = False) -> int | None:
        """The i2 with which peft makes these factors for a `decompose_factor`; None where it makes others."""
        if factors(self.o1 * self.o2, factor) != (self.o1, self.o2):
            return None
        tried = self.inputs[:1] if certain else self.inputs
        return next((i2 for i2 in tried if factors(self.i1 * i2, factor) == (self.i1, i2)), None)

    def makes_whole(self, rank: int, both: bool, i2: int) -> tuple[bool, bool]:
        """Whether peft keeps w1 and w2 whole."""
        return not (both and 2 * rank < max(self.o1, self.i1)), 2 * rank >= max(self.o2, i2)

    def least(self, both: bool) -> int:
        """The least r with which whole factors stay whole."""
        size = max(self.o2, *self.inputs, *((self.o1, self.i1) if both else ()))
        return -(-size // 2)


def shown(update: Update, base: Base) -> Shown:
    """What one update shows."""
    tensors = update.tensors
    left, right = (tensors["w1"],) * 2 if "w1" in tensors else (tensors["w1_a"], tensors["w1_b"])
    kernel = peft_conv.kernel(update, base)
    if "w2" in tensors:
        outputs, columns = tensors["w2"].shape[0], tensors["w2"].numel // tensors["w2"].shape[0]
    elif "t2" in tensors:
        outputs, columns = tensors["w2_a"].shape[1], tensors["w2_b"].shape[1] * prod(kernel or ())
    else:
        outputs, columns = tensors["w2_a"].shape[0], tensors["w2_b"].numel // tensors["w2_b"].shape[0]
    sizes = (prod(kernel),) if kernel is not None else _KERNELS
    inputs = tuple(columns // size for size in sizes if columns % size == 0)
    return Shown(update, left.shape[0], right.shape[1], outputs, inputs or (columns,), METHODS["lokr"].rank(update))


def ranks(updates: Sequence[Update], base: Base) -> dict[str, int]:
    """r of each module: its own, or one with which peft keeps two whole factors whole.

    Where the file's alpha, which has no effect there, can be r too, it is, and so comes back from the config.
    """
    all_shown = [shown(u, base) for u in updates]
    both = any(not s.whole[0] for s in all_shown)
    free = max((s.least(both) for s in all_shown if s.rank is None), default=0)
    return {s.update.module: _rank(s, s.least(both), free) for s in all_shown}


def _rank(one: Shown, least: int, free: int) -> int:
    if one.rank is not None:
        return one.rank
    alpha = one.update.alpha.value if one.update.alpha is not None else None
    return int(alpha) if alpha is not None and alpha == int(alpha) and alpha >= least else free


def fields(updates: Sequence[Update], base: Base) -> dict[str, Any]:
    """`decompose_both`, `decompose_factor` and `use_effective_conv2d` with which peft makes exactly these factors.

    Raises `CannotRepresent`, naming the module, where no config does, `UnknownFact` where only another r does.
    """
    all_shown = [shown(u, base) for u in updates]
    both = any(not s.whole[0] for s in all_shown)
    factor = _factor(all_shown)
    chosen = ranks(updates, base)
    for one in all_shown:
        rank, i2 = chosen[one.update.module], one.inner(factor)
        assert i2 is not None
        made = one.makes_whole(rank, both, i2)
        if made != one.whole:
            least = one.least(both)
            if all(one.whole) and rank < least:
                name = one.update.module.rpartition(".")[2]
                raise errors.UnknownFact(
                    f"{one.first.where}: two whole factors ({one.update.module}), which peft makes with r of {least} and more, "
                    f"not with r={rank}; which r it was, by which peft divides its alpha, is not in the tensors: say "
                    f"--set rank_pattern='{{\"{name}\": {least}}}' with that r"
                )
            at = 0 if made[0] != one.whole[0] else 1
            raise errors.CannotRepresent(
                f"{one.update.name}: its factor w{at + 1} is {_state(one.whole[at])} at rank {rank}, and peft would make it "
                f"{_state(made[at])} (decompose_both is {str(both).lower()} for all modules); no PEFT config gives this "
                f"file's factors; {KOHYA}"
            )
    return {"decompose_both": both, "decompose_factor": factor, **peft_conv.effective(updates, base)}


def _state(whole: bool) -> str:
    return "whole" if whole else "decomposed"


def _factor(all_shown: Sequence[Shown]) -> int:
    """The `decompose_factor` of all modules."""
    sizes = {n for s in all_shown for n in (s.o1, s.i1)}
    candidates: list[int] = list(dict.fromkeys((-1, *sorted(sizes, reverse=True), *range(1, 2 * max(sizes) + 2))))
    for certain in (True, False):
        for factor in candidates:
            if all(s.inner(factor, certain) is not None for s in all_shown):
                return factor
    best = max(candidates, key=lambda f: sum(s.inner(f) is not None for s in all_shown))
    odd = next(s for s in all_shown if s.inner(best) is None)
    others = f"; {best} gives those of most other modules" if len(all_shown) > 1 else ""
    raise errors.CannotRepresent(
        f"{odd.update.name}: its LoKr factors are {odd.o1}×{odd.i1} and {odd.o2}×{odd.inputs[0]} (tensor "
        f"{odd.first.key!r}), and no decompose_factor makes peft cut all modules as this file does{others}; {KOHYA}"
    )


def problems(config: Any, updates: Sequence[Update], base: Base) -> Iterator[str]:
    """Where the config makes other factors than the tensors are."""
    factor, both = (config.fields.get(n, d) for n, d in (("decompose_factor", -1), ("decompose_both", False)))
    for one in (shown(u, base) for u in updates):
        i2 = one.inner(factor) if factor is not None else one.inputs[0]
        if i2 is None:
            yield (
                f"{one.first.where}: its LoKr factors are {one.o1}×{one.i1} and {one.o2}×{one.inputs[0]}, but "
                f"{config.where} says decompose_factor={factor}, which makes others; --set decompose_factor=null derives "
                "it anew"
            )
            continue
        rank = config.rank(one.update.module)
        if rank is None:
            continue  # it is derived anew, so that it makes these factors
        made = one.makes_whole(rank, bool(both), i2)
        for at, remedy in enumerate(("--set decompose_both=null derives it anew", "the config is not this file's")):
            if made[at] != one.whole[at] and (at or both is not None):
                yield (
                    f"{one.first.where}: the factor w{at + 1} of {one.update.module} is {_state(one.whole[at])}, but by "
                    f"{config.where} (r={rank}, decompose_both={str(bool(both)).lower()}) peft would make it "
                    f"{_state(made[at])}; {remedy}"
                )
    yield from peft_conv.problems(config, updates, base)


def options(entry: Group, config: Any, given: Mapping[str, Any], weight: tuple[int, ...]) -> dict[str, Any]:
    """r of a LoKr with two whole factors, where its scale is not 1: peft applies alpha / r there too.

    Raises `UnknownFact` where only a config could say r, and there is none.
    """
    peft_conv.refuse_1d(entry.tensors, entry.name)
    if not {"w1", "w2"} <= entry.tensors.keys():
        return {}
    alpha = config.rule(entry.name).alpha if config is not None else None
    alpha = given.get("alpha") if alpha is None else alpha
    rank = config.rank(entry.name) if config is not None else None
    if rank is None or (config.certainty is Certainty.GIVEN and "r" not in config.fields):
        if alpha is None:
            return {}
        raise errors.UnknownFact(
            f"{entry.tensors['w1'].where}: peft scales by alpha / r, and with two whole factors ({entry.name}) r stands in "
            "the config only, which does not say it; say it beside alpha with --set r=R"
        )
    return {} if alpha == rank else {"rank": rank}
