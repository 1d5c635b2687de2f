"""A base model and modules of it: a few stand for all, of the first and the last blocks, and what tells it from others."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from trainers import Modules

NONE: Modules = MappingProxyType({})


class Base(NamedTuple):
    """A base model, and some of its modules."""

    name: str
    authors: Modules = NONE
    """Of the blocks, by the authors' names, which Comfy has, too, where nothing else is said."""
    around: Modules = NONE
    """What stands around the blocks, by the same names."""
    diffusers: Modules = NONE
    """By diffusers' names; empty where everyone has the same."""
    comfys: Modules = NONE
    """By Comfy's own names."""
    few: Modules = NONE
    """What is enough to tell the base."""
    rows: Mapping[str, tuple[str, int, int] | tuple[str]] = MappingProxyType({})
    """For modules of `diffusers` the authors' one, and which of its rows, where that has more."""
    others: tuple[str, ...] = ()
    """What the modules are also of: later releases with the same ones."""

    @property
    def whole(self) -> Modules:
        """The blocks and what stands around them."""
        return {**self.authors, **self.around}
