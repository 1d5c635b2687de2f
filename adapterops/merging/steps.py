"""The steps of a recipe: what is merged, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adapterops.errors import UsageError
from adapterops.merging import weights
from adapterops.merging.patterns import insist_on_matches, matches
from adapterops.merging.registry import MergeMethod, Parameter, Space, find

OPTIONS = {
    option.name: option
    for option in (
        Parameter("rank", "the rank of the result", type=int, least=1),
        Parameter("seed", "what random methods draw from", type=int, least=0),
        Parameter("svd", "how a delta is factorised", type=str, choices=("auto", "exact")),
        Parameter("svd_tolerance", "how far from the best approximation that may be", above=0.0, most=1.0),
        Parameter("split", "where the singular values go", type=str, choices=("even", "b", "a")),
        Parameter("saved", "what to do with modules saved whole", type=str, choices=("refuse", "mean", "first")),
    )
}
"""Options of a step's run, beside `space` and `allow_disjoint`."""
FLAGS = ("allow_disjoint",)
"""Such options that are true or false."""
TEXTS = ("base_weights", "base_hash")
"""Such options that are texts: the path of the base weights, and a hash of those that were used."""
READING = ("from", "arch", "base", "layout", "alpha", "set", "rename", "allow_drop")
"""Options of reading a source, by the names that they have on the command line."""
_ARGUMENTS = {"from": "format", "set": "fields"}


@dataclass(frozen=True, slots=True)
class SourceRef:
    """One input of a step: what stands at a path, or the result of an earlier step."""

    path: str = ""
    step: str = ""
    weight: float | Mapping[str, Any] = 1.0
    """As in a weights file, in its canonical form; `rule` makes something of it."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """Options of the reading, by the names that they have on the command line."""
    hash: str = ""
    """Of the content that the recipe was run with; "" where none is stated.  To hold it to the file is the engine's."""
    where: str = field(default="", compare=False)
    weighed: bool = field(default=False, compare=False)
    """Whether somebody stated the weight."""

    @property
    def rule(self) -> weights.WeightRule:
        """The weight, module by module."""
        return weights.entry(self.weight, f"{self.where}: weight".lstrip(": "))

    @property
    def arguments(self) -> dict[str, Any]:
        """The options of the reading as the arguments of `adapterops.load`.  `base` is as written: see `located`."""
        return {_ARGUMENTS.get(key, key): value for key, value in self.reading.items()}

    def data(self) -> dict[str, Any]:
        """Plain data, in the order in which people write it."""
        out: dict[str, Any] = {"step": self.step} if self.step else {"path": self.path}
        if self.weight != 1.0:
            out["weight"] = _fresh(self.weight)
        out |= {key: _fresh(self.reading[key]) for key in READING if key in self.reading}
        return out | ({"hash": self.hash} if self.hash else {})


@dataclass(frozen=True, slots=True)
class Pattern:
    """What holds otherwise for the modules that a glob fits."""

    glob: str
    method: str | None = None
    space: str | None = None
    rank: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """Plain data, without the glob."""
        stated = {"method": self.method, "space": self.space, "rank": self.rank}
        return {key: value for key, value in stated.items() if value is not None} | dict(self.parameters)


class Setting(NamedTuple):
    """What a step does to one module."""

    method: str
    """Its own name, where an alias was written."""
    space: Space
    parameters: dict[str, Any]
    """Every parameter of the method."""
    rank: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One merge."""

    method: str
    sources: tuple[SourceRef, ...]
    name: str = ""
    """What later steps call its result; "" where none does."""
    space: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The method's parameters that are given; the others have their defaults."""
    patterns: tuple[Pattern, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run that are given: those of `OPTIONS`, and `allow_disjoint`."""
    where: str = field(default="recipe", compare=False)
    """File and step, for messages."""

    def for_module(self, component: str, module: str) -> Setting:
        """What the step does to a module: for each key, the last pattern that fits and has it, or the step itself.

        A parameter that the module's method does not have is passed over there.  A space that was said before the
        method was (for another one) holds where the method can act in it, else the method's own does; so does a rank where
        the method gives one that its inputs decide.

        Raises `UsageError` where a parameter is missing, or method and space do not go together.
        """
        method, space, inherited, older = self.method, self.space, False, False
        parameters, rank = dict(self.parameters), self.options.get("rank")
        for pattern in self.patterns:
            if not matches(pattern.glob, component, module):
                continue
            if pattern.method is not None:
                method, inherited, older = pattern.method, True, True
            if pattern.space is not None:
                space, inherited = pattern.space, False
            parameters |= pattern.parameters
            if pattern.rank is not None:
                rank, older = pattern.rank, False
        try:
            found, acts = _find(method, space, inherited)
            return Setting(
                found.name, acts, settle(found, parameters), None if older and found.keeps_factors(acts) else rank
            )
        except UsageError as error:
            raise UsageError(f"{self.where}: {component}.{module}: {error}") from error

    def check(self, modules: Iterable[tuple[str, str]]) -> None:
        """Raise `UsageError` for a pattern that fits none of the step's modules (component, name)."""
        insist_on_matches((pattern.glob for pattern in self.patterns), modules, f"{self.where}: patterns")

    def data(self) -> dict[str, Any]:
        """Plain data, in the order in which people write it; patterns are pairs, since their order counts."""
        out: dict[str, Any] = {"name": self.name} if self.name else {}
        out["method"] = self.method
        if self.space is not None:
            out["space"] = self.space
        out["sources"] = [source.data() for source in self.sources]
        out |= {**self.parameters, **self.options}
        if self.patterns:
            out["patterns"] = [[pattern.glob, pattern.data()] for pattern in self.patterns]
        return out


def settle(method: MergeMethod, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The method's parameters, of those given for several.  Raises `UsageError` where one is missing."""
    own = {parameter.name for parameter in method.parameters}
    return method.settle({key: value for key, value in parameters.items() if key in own})


def _find(method: str, space: str | None, inherited: bool) -> tuple[MergeMethod, Space]:
    if inherited and space is not None:
        try:
            return find(method, space)
        except UsageError:
            return find(method)
    return find(method, space)


def _fresh(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _fresh(item) for key, item in value.items()}
    return [_fresh(item) for item in value] if isinstance(value, list) else value
