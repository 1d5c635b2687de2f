"""The canonical representation: what an adapter is, whatever file it came from.

An `Adapter` is a set of `Update`s, each an instance of a method on one module of one component of a base
model.  Facts that a reader needs and a file may or may not state (alpha, the scale rule, the architecture) are
`Fact`s: a value with its certainty and its source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

from adapterops.architectures import Architecture
from adapterops.carried import Carried
from adapterops.storage.tensor import LazyTensor

T = TypeVar("T")

COMPONENTS = (
    *("model", "unet", "transformer", "prior"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner"),
)
"""The names of components: a lone model, and the parts of a pipeline as diffusers calls them."""


class Certainty(StrEnum):
    """How a fact is known."""

    READ = "read"
    """Stated in the file."""
    GIVEN = "given"
    """Stated by the user (an option)."""
    DERIVED = "derived"
    """Follows from the tensors."""
    ASSUMED = "assumed"
    """The convention of the format where the file says nothing."""
    UNKNOWN = "unknown"
    """No source holds it."""


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """A value, how it is known, and where it stands (a tensor, a header field, a config field, an option)."""

    value: T
    certainty: Certainty
    source: str = ""
    others: tuple[T, ...] = ()
    """Of an assumed one: what it may be as well."""

    def __str__(self) -> str:
        return f"{self.value} ({self.certainty}{': ' + self.source if self.source else ''})"


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one module.

    `module` is the dotted Hugging Face name inside `component`; `method` names an entry of
    `adapterops.methods`, which owns the meaning of the `tensors` (role to tensor) and of the `options`.
    `alpha` is None for methods without a scale.
    """

    component: str
    module: str
    method: str
    tensors: Mapping[str, LazyTensor]
    alpha: Fact[float | None] | None = None
    rslora: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies an update inside its adapter."""
        return self.component, self.module, self.method

    @property
    def name(self) -> str:
        """Component and module, for messages."""
        return f"{self.component}: {self.module}" if self.module else self.component


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an adapter came from and what was learnt on the way.

    `spelling` holds the choices of a dialect that its keys leave open (prefix, adapter name, order …), so that
    writing the same dialect again gives the same keys.
    """

    path: str = ""
    format: str = ""
    dialect: str = ""
    spelling: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    folded: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """The key of each update's alpha tensor, which became a fact."""
    stated: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """The names that the file has for modules that were renamed to be the base's."""
    dropped: tuple[str, ...] = ()
    """Keys lost under `--allow-drop`."""
    size: int = 0
    """Bytes of tensors in the source."""
    carried: Carried = Carried()
    """What earlier formats said and this one has no place for."""
    given: tuple[str, ...] = ()
    """The fields of `--set` that reading took."""


class VerbatimRow(NamedTuple):
    """How a component's names are spelled: behind which prefix, whose they are, and whether dots have become underscores."""

    prefix: str
    column: str
    flat: bool


@dataclass(frozen=True, slots=True)
class Verbatim:
    """Module names kept as a file spells them, since no known base model has them."""

    rows: Mapping[str, VerbatimRow]
    """For each component."""
    why: str
    """What is said where they would have to be known."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The whole set of updates of one file or folder.

    `config` holds, for each component, the facts of a PEFT config that belong to no module (task type, base
    model, dropout …); `metadata` the strings of the source's header; `base` the table behind `architecture`;
    `mutated_init` names a way of initialising (PiSSA …) that changed the base weights, which the deltas then
    are relative to; `verbatim` tells how names are spelled that are nobody's known.
    """

    updates: Mapping[tuple[str, str, str], Update]
    architecture: Fact[str | None]
    provenance: Provenance = Provenance()
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: Architecture | None = None
    mutated_init: str | None = None
    verbatim: Verbatim | None = None

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates.values())

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that have updates, in order of first appearance."""
        return tuple(dict.fromkeys(u.component for u in self))

    def of(self, component: str) -> list[Update]:
        """The updates of one component."""
        return [u for u in self if u.component == component]

    def as_stated(self) -> list[Update]:
        """The updates under the module names of their file: those that the file's own config speaks of."""
        stated = self.provenance.stated
        return [replace(u, module=stated[u.key]) if u.key in stated else u for u in self]

    def with_updates(self, updates: Iterable[Update]) -> Adapter:
        """The same adapter with other updates.  Raises `ValueError` if two of them have one key."""
        table: dict[tuple[str, str, str], Update] = {}
        for update in updates:
            if update.key in table:
                raise ValueError(f"two {update.method} updates for {update.name}")
            table[update.key] = update
        return replace(self, updates=table)
