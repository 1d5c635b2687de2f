"""The values of tensors: no numbers, only zeros, far too large ones, the same ones twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from math import isfinite
from statistics import median

from adapterops.adapter import Update
from adapterops.errors import AdapterOpsError
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor
from adapterops.storage.dtypes import NUMBERS
from adapterops.storage.tensor import same_bytes
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Needs, Rule, Severity
from adapterops.validation.scan import Statistics
from adapterops.validation.subject import Subject

NOT_FINITE = Rule(
    "T110",
    "not-finite",
    Severity.ERROR,
    why="NaN or infinity in one factor makes everything that the model computes NaN.",
    remedy="Use an earlier checkpoint, and train in bfloat16 or with a lower learning rate.",
    fires="lora_B.weight holds NaN",
    passes="lora_B.weight holds numbers",
    needs=Needs.TENSORS,
    faults=("not-finite",),
)
UNTRAINED = Rule(
    "T111",
    "untrained",
    Severity.WARNING,
    why="Every update is as it was before the first step, so the adapter changes nothing.",
    remedy="Save after training, from the model that was trained; look whether its parameters required gradients.",
    fires="every lora_B.weight is zero",
    passes="lora_B.weight of some module holds other numbers than zero",
    needs=Needs.TENSORS,
)
DEAD_MODULES = Rule(
    "T112",
    "dead-modules",
    Severity.WARNING,
    why="Some modules' updates never left their start: training did not reach these modules, or froze them.",
    remedy="See whether the training runs through them (frozen parts, weights used without calling the module); "
    "else leave them out of target_modules.",
    fires="lora_B.weight is zero in the 12 modules of the encoder and in no other",
    passes="every lora_B.weight holds other numbers than zero",
    needs=Needs.TENSORS,
)
ZERO_FIRST = Rule(
    "T113",
    "zero-first-factor",
    Severity.WARNING,
    why="The factor that is drawn at random is zero, and the one that starts at zero is not: no training gives that.",
    remedy="Look whether the halves were swapped or a tool lost one; then save the adapter again.",
    fires="lora_A.weight is zero, lora_B.weight is not",
    passes="lora_A.weight holds other numbers than zero",
    needs=Needs.TENSORS,
)
DEAD_COMPONENTS = Rule(
    "T114",
    "dead-components",
    Severity.INFO,
    why="Some of the ranks do nothing, as where an adapter was padded to a larger rank: the file is larger than it need be.",
    remedy="Leave it, or resize the adapter to the rank that it uses.",
    fires="columns 4 to 7 of lora_B.weight [64, 8] are zero",
    passes="every column of lora_B.weight holds some number",
    needs=Needs.TENSORS,
)
TWIN_COMPONENTS = Rule(
    "T115",
    "twin-components",
    Severity.WARNING,
    why="Rows of the first factor are equal bit by bit, so the ranks were never told apart and train as one.",
    remedy="Look at how the factor is initialised; train again, or resize to the rank that is used.",
    fires="rows 0 and 1 of lora_A.weight are the same",
    passes="all rows of lora_A.weight differ",
    needs=Needs.TENSORS,
)
OUTLIER = Rule(
    "T116",
    "huge-module",
    Severity.WARNING,
    why="One module's update is more than a thousand times larger than the others', as after a step that diverged.",
    remedy="Compare with an earlier checkpoint; leave the module out, or train with gradient clipping.",
    fires="largest |B|·|A|·scale of one module is 5000 times the median of all",
    passes="all modules within a few hundred times the median",
    needs=Needs.TENSORS,
)
TWIN_MODULES = Rule(
    "T141",
    "twin-modules",
    Severity.WARNING,
    why="Two modules have the same update bit by bit, which training does not give: a script wrote one of them twice.",
    remedy="Convert or save the adapter again from its source.",
    fires="layers.0.q_proj and layers.1.q_proj with equal lora_A.weight and equal lora_B.weight",
    passes="equal lora_A.weight and different lora_B.weight",
    needs=Needs.TENSORS,
)

_PRODUCTS = {
    "lora": (("A",), ("B",), ("mid",)),
    "lora_parameters": (("A",), ("B",)),
    "lora_merged": (("A",), ("B",)),
    "bdlora": (("A",), ("B",)),
    "qalora": (("A",), ("B",)),
    "alora": (("A",), ("B",)),
    "arrow": (("A",), ("B",)),
    "hira": (("A",), ("B",)),
    "adalora": (("A",), ("B",), ("E",)),
    "loha": (("w1_a",), ("w1_b",), ("w2_a",), ("w2_b",), ("t1",), ("t2",)),
    "lokr": (("w1", "w1_a"), ("w1_b",), ("w2", "w2_a"), ("w2_b",), ("t2",)),
}
"""Methods whose update is a product: nothing, where one of its factors is."""
_PASSIVE = frozenset({"saved", "bundled", "trainable_tokens", "ln_tuning"})
"""Methods that replace parameters: their values say nothing about training."""
_MOST_READ = 1 << 26
"""Bytes of an update that a method of its own way may read to say whether it is nothing."""
_OUTLIER = 1000.0
_FEW = 8
"""Modules below which no median is taken."""


class _Values:
    """The statistics of one adapter, by tensor."""

    def __init__(self, subject: Subject) -> None:
        self._of: Mapping[str, Statistics] = subject.statistics
        # Tensors keep the keys of the file, and `statistics` may have better names for them.
        self._names = subject.renamed

    def of(self, tensor: LazyTensor) -> Statistics | None:
        """The statistics of a tensor of an update; None for one that is no tensor of the file as it stands."""
        return self._of.get(self._names.get(tensor.key, tensor.key))

    def zero(self, tensor: LazyTensor) -> bool:
        found = self.of(tensor)
        return found is not None and found.zero

    def finite(self, update: Update) -> bool:
        return all((s := self.of(t)) is None or s.finite for t in update.tensors.values())


@checker(NOT_FINITE)
def not_finite(subject: Subject) -> Iterator[Finding]:
    """NaN and infinities, in adapters that no format knows too."""
    _ = subject.adapter  # which tells of alphas that are none
    told = {key for fault in subject.faults if fault.fault in NOT_FINITE.faults for key in fault.keys}
    bad = {key: s for key, s in subject.statistics.items() if not s.finite and subject.tensors[key].key not in told}
    if not bad:
        return
    key, first = next(iter(bad.items()))
    tensor = subject.tensors[key]
    counts = [f"{n} {what}" for n, what in ((first.nans, "NaN"), (first.infinities, "infinities")) if n]
    more = f"; {len(bad) - 1} more tensors do" if len(bad) > 1 else ""
    yield NOT_FINITE.found(
        subject.weights,
        f"{tensor.key!r} holds {' and '.join(counts)} among {tensor.numel} numbers, the first at {_place(tensor, first)}{more}",
        [subject.tensors[k].key for k in bad],
    )


def _place(tensor: LazyTensor, found: Statistics) -> list[int]:
    """The indices of the first number that is none."""
    at, out = found.first, []
    for size in reversed(tensor.shape):
        out.append(at % size)
        at //= size
    return out[::-1]


@checker(UNTRAINED, DEAD_MODULES, ZERO_FIRST)
def idle(subject: Subject) -> Iterator[Finding]:
    """Updates that change nothing."""
    known = _Values(subject)
    acting = [
        u
        for u in subject.updates
        if u.method not in _PASSIVE
        and any(t.numel for t in u.tensors.values())
        and not (u.method in _PRODUCTS and any(t.dtype not in NUMBERS for t in u.tensors.values()))  # told of as such
    ]
    dead = [u for u in acting if known.finite(u) and is_nothing(u, known)]
    if not dead:
        return
    rest = len(subject.updates) - len(acting)
    if len(dead) == len(acting):
        others = f" (only the {rest} parameters that are saved whole do anything)" if rest else ""
        yield UNTRAINED.found(
            subject.weights,
            f"{_zeros(dead[0], known)}: {_all(len(dead))} unchanged from the start, so the adapter does nothing{others}",
            _zero_keys(dead, known),
        )
        return
    swapped = [u for u in dead if _first_is_zero(u, known)]
    frozen = [u for u in dead if u not in swapped]
    if frozen:
        yield DEAD_MODULES.found(
            subject.weights,
            f"{len(frozen)} of {len(acting)} modules {_do(frozen)} nothing, such as {frozen[0].name}: {_zeros(frozen[0], known)}",
            _zero_keys(frozen, known),
        )
    if swapped:
        yield ZERO_FIRST.found(
            subject.weights,
            f"{len(swapped)} of {len(acting)} modules {_do(swapped)} nothing, such as {swapped[0].name}: "
            f"{_zeros(swapped[0], known)}, and the other factor is not",
            _zero_keys(swapped, known),
        )


def is_nothing(update: Update, known: _Values) -> bool:
    """Whether an update leaves its module exactly as it is."""
    factors = _PRODUCTS.get(update.method)
    if factors is None:
        if sum(t.nbytes for t in update.tensors.values()) > _MOST_READ:
            return False
        try:
            return METHODS[update.method].is_nothing(update)
        except (AdapterOpsError, KeyError):  # a fact or a tensor that it needs is not there: then nobody can say
            return False
    if "magnitude" in update.tensors:
        return False  # which may differ from the norms that it started with
    bias = update.tensors.get("bias")
    if bias is not None and not known.zero(bias):
        return False
    return any(known.zero(update.tensors[r]) for roles in factors for r in roles if r in update.tensors)


def _first_is_zero(update: Update, known: _Values) -> bool:
    """Whether it is LoRA's A that is zero, and B is not."""
    a, b = update.tensors.get("A"), update.tensors.get("B")
    return update.method == "lora" and a is not None and b is not None and known.zero(a) and not known.zero(b)


def _zeros(update: Update, known: _Values) -> str:
    zero = [repr(t.key) for t in update.tensors.values() if known.zero(t)]
    return f"{zero[0]} is zero" if zero else f"{next(iter(update.tensors.values())).key!r} is as it starts"


def _zero_keys(updates: Iterable[Update], known: _Values) -> list[str]:
    out = []
    for update in updates:
        zero = [t.key for t in update.tensors.values() if known.zero(t)]
        out += zero or [next(iter(update.tensors.values())).key]
    return out


def _all(count: int) -> str:
    return "the only module is" if count == 1 else f"all {count} modules are"


@checker(DEAD_COMPONENTS, TWIN_COMPONENTS)
def components(subject: Subject) -> Iterator[Finding]:
    """Ranks that do nothing, or the same as another."""
    known = _Values(subject)
    dead: list[tuple[Update, list[int]]] = []
    twins: list[tuple[Update, list[int]]] = []
    for update in subject.updates:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if update.method != "lora" or a is None or b is None or "mid" in update.tensors:
            continue
        first, second = known.of(a), known.of(b)
        if first is None or second is None or first.zero or second.zero or not (first.finite and second.finite):
            continue
        if first.rows is not None and len(first.rows) != a.shape[0]:
            continue  # a part of the stored tensor
        idle = sorted({*first.dead_rows, *second.dead_columns})
        if idle:
            dead.append((update, idle))
        same = _equal_rows(a, first)
        if same:
            twins.append((update, same))
    for rule, found, what in (
        (DEAD_COMPONENTS, dead, "do nothing"),
        (TWIN_COMPONENTS, twins, "have the same row of the first factor"),
    ):
        if found:
            update, ranks = found[0]
            shown = ", ".join(map(str, ranks[:4])) + (" …" if len(ranks) > 4 else "")
            more = f"; {len(found) - 1} more modules are like it" if len(found) > 1 else ""
            yield rule.found(
                subject.weights,
                f"{update.name}: {len(ranks)} of {update.tensors['A'].shape[0]} ranks {what} ({shown}){more}",
                [u.tensors["A"].key for u, _ in found],
            )


def _do(updates: list[Update]) -> str:
    return "does" if len(updates) == 1 else "do"


def _equal_rows(tensor: LazyTensor, found: Statistics) -> list[int]:
    """Rows that are equal to another one, bit by bit."""
    out = set()
    for group in found.like_rows:
        first = tensor.rows([(group[0], group[0] + 1)])
        for at in group[1:]:
            if same_bytes(first, tensor.rows([(at, at + 1)])):
                out |= {group[0], at}
    return sorted(out)


@checker(OUTLIER)
def outliers(subject: Subject) -> Iterator[Finding]:
    """Modules whose update is far larger than all others'."""
    known = _Values(subject)
    sizes: dict[str, dict[str, tuple[float, Update]]] = {}
    for update in subject.updates:
        size = _size(update, known)
        if size is not None and isfinite(size) and size > 0:
            sizes.setdefault(update.component, {})[update.name] = (size, update)
    for component, own in sizes.items():
        if len(own) < _FEW:
            continue
        middle = median(size for size, _ in own.values())
        huge = sorted((e for e in own.values() if e[0] > _OUTLIER * middle), key=lambda e: -e[0])
        if huge:
            size, update = huge[0]
            more = f" ({len(huge) - 1} more like it)" if len(huge) > 1 else ""
            yield OUTLIER.found(
                subject.weights,
                f"{update.name}: its update is {size / middle:,.0f} times as large as the middle one of {component}'s "
                f"{len(own)} modules{more}",
                [t.key for _, u in huge for t in u.tensors.values()],
            )


def _size(update: Update, known: _Values) -> float | None:
    """The largest |B| times the largest |A| and the scale: how large a number of the product can be for each rank."""
    a, b = update.tensors.get("A"), update.tensors.get("B")
    if update.method != "lora" or a is None or b is None:
        return None
    first, second = known.of(a), known.of(b)
    scale = METHODS["lora"].scale(update)
    if first is None or second is None or not (first.finite and second.finite):
        return None
    if first.largest is None or second.largest is None:
        return None
    return first.largest * second.largest * abs(1.0 if scale is None else scale)


@checker(TWIN_MODULES)
def twins(subject: Subject) -> Iterator[Finding]:
    """Modules with the same update, bit by bit."""
    known = _Values(subject)
    groups: dict[tuple[object, ...], list[Update]] = {}
    for update in subject.updates:
        statistics = [known.of(t) for t in update.tensors.values()]
        if (
            update.method not in _PRODUCTS
            or is_nothing(update, known)
            or None in statistics
            or not known.finite(update)
        ):
            continue
        like = tuple((r, t.dtype, t.shape) for r, t in update.tensors.items())
        values = tuple((s.largest, s.head) for s in statistics if s is not None)
        groups.setdefault((update.method, like, values), []).append(update)
    pairs = [
        (one, other)
        for group in groups.values()
        for one, other in pairwise(group)
        if all(same_bytes(t, other.tensors[r]) for r, t in one.tensors.items())
    ]
    if pairs:
        one, other = pairs[0]
        more = f" ({len(pairs) - 1} more such pair{'s' if len(pairs) > 2 else ''})" if len(pairs) > 1 else ""
        keys = [t.key for pair in pairs for u in pair for t in u.tensors.values()]
        yield TWIN_MODULES.found(
            subject.weights, f"{one.name} and {other.name} have the same update, bit by bit{more}", dict.fromkeys(keys)
        )


RULES: tuple[Rule, ...] = (
    NOT_FINITE,
    UNTRAINED,
    DEAD_MODULES,
    ZERO_FIRST,
    DEAD_COMPONENTS,
    TWIN_COMPONENTS,
    OUTLIER,
    TWIN_MODULES,
)
CHECKERS: tuple[Checker, ...] = (not_finite, idle, components, outliers, twins)
