"""What a merge method is, and the table of those that exist.

A method is a small function under the decorator `merge_method`, which declares its parameters, its space and its
source; help texts, validation and documentation are made from that declaration.  Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from adapterops.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class Space(StrEnum):
    """What a method acts on."""

    FACTORS = "factors"
    """On the A's and on the B's of LoRA, each on its own, as PEFT does."""
    DELTA = "delta"
    """On the weight deltas."""


class Kind(StrEnum):
    """What a method's function is given, and what it gives."""

    ELEMENTS = "elements"
    """`f(stack, **parameters) -> Tensor`: from K tensors of one shape (a `Stack`), one of that shape.  Serves factors,
    deltas and vectors (biases, norms) alike."""
    SPAN = "span"
    """`f(gram, weights, **parameters) -> coefficients`: the result is a weighted sum of the deltas, whose weights depend
    on their inner products only (`gram` (K, K), float64, CPU).  Exact at the rank of the sum."""
    FACTORS = "factors"
    """`f(pairs, weights, rank, **parameters) -> (B, A)`: from exact low-rank factors of each delta, scale included
    (float64), factors of the result, of any rank; the engine truncates them to `rank`.  Where a delta has no such factors,
    `MergeMethod.of_matrices` is asked, as `merging/whole.py` says."""
    STACKED = "stacked"
    """The factors one beside the other: `cat`."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a method, as the command line, recipes and the library take it."""

    name: str
    help: str
    type: type[float] | type[int] | type[str] = float
    default: float | int | str | None = None
    """None: it must be given."""
    choices: tuple[str, ...] = ()
    above: float | None = None
    """The value must be greater than this."""
    least: float | None = None
    most: float | None = None

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """`value` in the parameter's type.  Raises `UsageError` where it is none that the parameter can have."""
        if self.type is str:
            if value not in self.choices:
                raise UsageError(f"{self.option} {value!r} is none of {', '.join(self.choices)}")
            return value
        number: float = 0
        try:
            number = self.type(value)  # type: ignore[assignment]  # a str returned above
            same = number == value if isinstance(value, int) else number == float(value)
            sound = not isinstance(value, bool) and same
        except (TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise UsageError(f"{self.option} {value!r} is no {'whole ' if self.type is int else ''}number")
        low = self.above is not None and number <= self.above
        low = low or (self.least is not None and number < self.least)
        if low or (self.most is not None and number > self.most):
            raise UsageError(f"{self.option} {value}: must be {self.range}")
        return number

    @property
    def range(self) -> str:
        """What values it may have, in words."""
        if self.choices:
            return " or ".join(self.choices)
        low = f"above {self.above:g}" if self.above is not None else ""
        low = f"at least {self.least:g}" if self.least is not None else low
        high = f"at most {self.most:g}" if self.most is not None else ""
        return " and ".join(part for part in (low, high) if part) or "any number"


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A way to make one adapter of several."""

    name: str
    summary: str
    source: str
    """The paper or file that defines it."""
    kind: Kind
    spaces: tuple[Space, ...]
    """Where it can act; the first one where nothing is said."""
    function: Callable[..., Any]
    parameters: tuple[Parameter, ...] = ()
    adapters: int | None = None
    """How many adapters it takes; None: any number."""
    sums: bool = False
    """Whether its result grows with the number of adapters (their weighted sum, and not a mean of some kind)."""
    signs: tuple[float, float] | None = None
    """What the weights of the first and of the other adapters are multiplied by."""
    of_matrices: Callable[..., Any] | None = None
    """What a method of kind `FACTORS` does to deltas that have no low-rank factors."""
    by_rank: bool = False
    """Whether it chooses by the rank what it makes: what it makes of a lower one is not the best approximation of what it makes
    of a higher one."""
    random: bool = False
    """Whether it draws masks."""

    def keeps_factors(self, space: Space) -> bool:
        """Whether the inputs' factors become the result's, so that their ranks decide its own and nothing is decomposed."""
        return self.kind is Kind.STACKED or (self.kind is Kind.ELEMENTS and space is Space.FACTORS)

    def settle(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter's value: given, or the default.

        Raises `UsageError` for one that is missing, unknown, or out of its range.
        """
        known = {p.name for p in self.parameters}
        unknown = sorted(name for name, value in given.items() if name not in known and value is not None)
        if unknown:
            takes = ", ".join(p.option for p in self.parameters) or "none"
            raise UsageError(f"--method {self.name} has no --{unknown[0].replace('_', '-')}; its parameters: {takes}")
        out = {}
        for parameter in self.parameters:
            value = given.get(parameter.name)
            value = parameter.default if value is None else value
            if value is None:
                raise UsageError(f"--method {self.name} needs {parameter.option}: {parameter.help} ({parameter.range})")
            out[parameter.name] = parameter.checked(value)
        return out


METHODS: dict[str, MergeMethod] = {}
"""Every merge method by name; filled by importing `adapterops.merging.methods`."""

ALIASES: dict[str, tuple[str, Space]] = {}
"""PEFT's names that say the space too: `ties_svd` is `ties` on deltas."""


def merge_method(
    name: str,
    *,
    kind: Kind,
    summary: str,
    source: str,
    spaces: Sequence[Space] = (Space.DELTA,),
    parameters: Sequence[Parameter] = (),
    aliases: Mapping[str, Space] | None = None,
    adapters: int | None = None,
    sums: bool = False,
    signs: tuple[float, float] | None = None,
    of_matrices: Callable[..., Any] | None = None,
    by_rank: bool = False,
    random: bool = False,
) -> Callable[[Function], Function]:
    """Enter a function into the table of methods."""

    def enter(function: Function) -> Function:
        METHODS[name] = MergeMethod(
            name,
            summary,
            source,
            kind,
            tuple(spaces),
            function,
            tuple(parameters),
            adapters,
            sums,
            signs,
            of_matrices,
            by_rank,
            random,
        )
        ALIASES.update({alias: (name, space) for alias, space in (aliases or {}).items()})
        return function

    return enter


def find(name: str, space: str | None = None) -> tuple[MergeMethod, Space]:
    """The method of that name or alias, and the space it is to act in.

    Raises `UsageError` for a name that no method has and for a space in which the method does not act.
    """
    import adapterops.merging.methods  # noqa: F401  (fills the table)

    fixed: Space | None = None
    wanted = name.lower() if name.lower() in METHODS or name.lower() in ALIASES else name
    if wanted in ALIASES:
        wanted, fixed = ALIASES[wanted]
    method = METHODS.get(wanted)
    if method is None:
        import difflib

        near = difflib.get_close_matches(name, [*METHODS, *ALIASES], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join([*METHODS, *ALIASES])}"
        raise UsageError(f"unknown merge method {name!r}{hint}")
    if space is None:
        return method, fixed or method.spaces[0]
    if space not in list(Space):
        raise UsageError(f"--space {space!r} is neither factors nor delta")
    if fixed is not None and space != fixed:
        raise UsageError(f"--method {name} acts on {fixed.value}, not on {space}: use --method {wanted} for that")
    if Space(space) not in method.spaces:
        if method.name == "linear":
            raise UsageError("--method linear acts on factors only; the weighted sum of the deltas is --method svd")
        raise UsageError(f"--method {name} acts on {method.spaces[0].value} only")
    return method, Space(space)
