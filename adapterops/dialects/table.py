"""A dialect as data: how one writer spells components, modules and tensors.  One table reads and writes.

A key is `prefix` + module name + `suffix`:

    lora_unet_  down_blocks_1_attentions_0_proj_in  .lora_down.weight      (Kohya)
    unet.       down_blocks.1.attentions.0.proj_in  .lora_A.weight         (diffusers)

A `Place` says which component a prefix means, which of the architecture's names stand there and how; a `Suffix`
says which method and role a tensor has.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from adapterops.architectures import Architecture

CUSTOM = "custom"
"""Stands for any architecture built by `--base`."""
ONE_ENCODER = "one-encoder"
"""Stands for an architecture without a second text encoder."""
ANY = "*"
"""Stands for any scaled method."""
TWO_ENCODERS = "two-encoders"
"""Stands for an architecture with a second text encoder."""
FLAG_DTYPE = "I64"
"""How a flag is stored where its file said nothing else, as LyCORIS does."""


class AlphaIn(Enum):
    """Where a dialect keeps alpha."""

    TENSOR = "tensor"
    """A scalar tensor beside the factors."""
    CONFIG = "config"
    """A PEFT config: in the header, or in a file beside the weights."""
    NOWHERE = "nowhere"
    """There is no place: readers apply scale 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Suffix:
    """What follows a module's name in a key.

    A `method` of ANY belongs to whatever scaled method the module's other tensors are of (an alpha, a DoRA magnitude).
    `{adapter}` in `text` stands where an adapter's name may be left.  Where `after` is given, the row is written only
    for modules whose names end so (it is read after any); of several rows that fit, the first is written.
    In a `whole` place, a text that ends with a dot is the beginning of several keys, whose rest is part of the role.
    `transposed` says that a matrix stands as its transpose (MLX computes `x @ a @ b`); what has other dimensions than two
    stands as it is.
    """

    text: str
    method: str
    role: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """How one component's modules are spelled.

    `instead` names the components that the prefix means for architectures without the first one (the denoiser is a
    `unet` here and a `transformer` there).
    `names` picks the architecture's column ("canonical" or "original"), `names_in` another one for the
    architectures that it names, `flat` writes dots as underscores,
    `tails` (canonical ending, spelled ending) rewrites the end of a module's name; with tails, no other module
    can be spelled.  `only` limits the row to architectures (names, or CUSTOM, ONE_ENCODER, TWO_ENCODERS).
    `usual` names those for which the row is the usual one though others are read too: of several rows for a component it is
    written, and where modules alone fit several base models, it decides.  `saved` lets a key without a known suffix be a
    saved parameter of its module, of any or of those whose names end so.
    `sure` says that nobody else spells such suffixes, so that names before them need not be a known base's although no
    prefix stands there.
    `free` says that names are nobody's modules (tokens of a bundled embedding) and stand as they are.
    `whole` says that keys are the prefix and a suffix, with no module between them: what the component has once (matrices
    that all modules share, soft prompts); such a place is `free` too.
    """

    component: str
    prefix: str
    suffixes: tuple[Suffix, ...]
    instead: tuple[str, ...] = ()
    names: str = "canonical"
    names_in: Mapping[str, str] = field(default_factory=dict)
    flat: bool = False
    tails: tuple[tuple[str, str], ...] = ()
    only: frozenset[str] = frozenset()
    usual: frozenset[str] = frozenset()
    saved: bool | tuple[str, ...] = False
    sure: bool = False
    free: bool = False
    whole: bool = False

    @property
    def bare(self) -> bool:
        """Whether any writer's keys would read as names here."""
        return not self.prefix and not self.tails and not self.whole and not self.sure

    @property
    def reads(self) -> tuple[object, ...]:
        """All that decides which keys the row reads."""
        return self.component, self.prefix, self.suffixes, self.tails, self.saved, self.whole

    def column(self, family: str) -> str:
        """Which of the names of an architecture of that family stand here."""
        return self.names_in.get(family, self.names)

    def among(self, components: Container[str]) -> str | None:
        """The component that is meant, in a base model that has these."""
        return next((name for name in (self.component, *self.instead) if name in components), None)


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One way to spell an adapter.

    `convention` is what readers assume where no alpha is stored: "rank" (scale 1), or "unknown".  `vectors`
    tells that DoRA magnitudes are flat vectors per output, as peft keeps them, and not columns or rows.
    `exact_shapes` says that readers insist on factors shaped like the module (a 1×1 convolution's factors have
    four dimensions, a linear layer's two), `widens` that they take factors for more inputs than the base has.
    `unread` names roles that a common reader leaves out, with the sentence that warns of it.  `asked` says that keys tell too
    little of it to be recognised: it reads a file only where the user names it (`--from`); so it is too where no key ends
    with one of `shown_by`.  `last` says that it is tried where no other reads all of a file's keys.  `written` says whether it is
    written too: some programs read only what they wrote themselves.
    """

    name: str
    format: str
    title: str
    places: tuple[Place, ...]
    alpha: AlphaIn
    convention: str
    vectors: bool = False
    exact_shapes: bool = False
    widens: bool = False
    unread: tuple[tuple[str, str], ...] = ()
    asked: bool = False
    shown_by: tuple[str, ...] = ()
    last: bool = False
    written: bool = True
    example: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether names stand in its keys without anything before or after them that only this dialect has."""
        return any(place.bare for place in self.places)


def traits(architecture: Architecture) -> frozenset[str]:
    """The words by which a `Place` may ask for an architecture."""
    several = "text_encoder_2" in architecture.components
    own = {architecture.name, architecture.family} if architecture.builtin else {CUSTOM, architecture.family}
    return frozenset({*own, TWO_ENCODERS if several else ONE_ENCODER})
