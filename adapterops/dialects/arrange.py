"""Which modules a dialect names: fused projections of an adapter are split, or joined, as the target has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops.adapter import Adapter, Update
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.dialects.names import spells
from adapterops.dialects.placing import Placing
from adapterops.dialects.table import Dialect, Place
from adapterops.errors import CannotRepresent
from adapterops.methods import METHODS
from adapterops.operations import fused


@dataclass
class Arranger:
    """Turns the updates of an adapter into those of a dialect."""

    dialect: Dialect
    adapter: Adapter
    architecture: Architecture | None
    placing: Placing
    _records: dict[str, list[list[Any]]] = field(default_factory=dict)
    _narrowed: int = 0
    _joined: int = 0
    _split: int = 0

    def groups(self) -> Iterator[list[Update]]:
        """The updates that must be looked at together: those of one fused module of the target, or a single one."""
        together: dict[tuple[str, str, str], list[Update]] = {}
        for update in self.adapter:
            spec = self._unspelled(update)
            whole = self._whole(update, spec.joins[0][0] if spec is not None else update.module)
            at = update.component, whole.name if whole is not None else update.module, update.method
            together.setdefault(at, []).append(update)
        yield from together.values()

    def arrange(self, sources: list[Update]) -> list[Update]:
        """What the dialect has instead of these.  Raises `CannotRepresent` where it has nothing that does the same."""
        parts = [part for update in sources for part in self._parts(update)]
        whole = self._whole(parts[0], parts[0].module)
        if whole is None:
            for part in parts:
                self._keep_record(part)
            return parts
        names = {name for name, _, _ in whole.joins}
        by_name = {part.module: part for part in parts if part.module in names}
        # The source's fused module may have more parts than the target's.
        beside = [part for part in parts if part.module not in names]
        if len(by_name) + len(beside) < len(parts):
            raise CannotRepresent(f"{sources[0].name}: two updates act on the same rows of {whole.name}")
        update, blocks = fused.join(whole, by_name)
        if blocks is not None:
            self._records[f"{update.component}.{update.module}"] = [[b.module, b.rank] for b in blocks]
        self._joined += len(by_name) > 1
        return [update, *beside]

    def _parts(self, update: Update) -> list[Update]:
        spec = self._unspelled(update)
        if spec is None:
            return [update]
        parts = fused.split(update, spec, self._recorded(update))
        own, part = METHODS[update.method].rank(update), METHODS[update.method].rank(parts[0])
        self._narrowed += bool(own and part and own != part)
        self._split += len(parts) > 1
        return parts

    def notes(self) -> list[str]:
        """What the user should know about it."""
        out = []
        if self._split:
            are = "projection is" if self._split == 1 else "projections are"
            out.append(f"{self._split} fused {are} split into their parts, as {self.dialect.title} has them")
        if self._narrowed and any(u.alpha is not None and u.alpha.source == fused.TRAINED for u in self.adapter):
            out.append(
                f"{self._narrowed} of them are block-diagonal: each part gets its own rank back, and the scale of the "
                f"training, alpha over it, as {fused.TRAINED} says"
            )
        elif self._narrowed:
            out.append(
                f"{self._narrowed} of them are block-diagonal (saved so by sd-scripts' split_qkv, or by a conversion that "
                "joined the parts): each part gets its own rank back, and the scale that readers of the file apply, alpha "
                "over the stored rank; for a split_qkv network, --alpha trained gives the scale of the training, alpha "
                "over the part's own rank"
            )
        if self._joined:
            are = "projection is" if self._joined == 1 else "projections are"
            out.append(f"{self._joined} {are} joined from their parts, as {self.dialect.title} has them")
        return out

    def result(self, written: list[Update]) -> Adapter:
        """The adapter with the updates as they are written, and a record of how they were joined."""
        carried = self.adapter.provenance.carried
        # What earlier files were joined from is not true of this one.
        spelling = {n: {k: v for k, v in own.items() if k != "joined"} for n, own in carried.spelling.items()}
        if self._records:
            spelling[self.dialect.name] = {**spelling.get(self.dialect.name, {}), "joined": self._records}
        provenance = replace(self.adapter.provenance, carried=carried._replace(spelling=spelling))
        return replace(self.adapter, provenance=provenance).with_updates(written)

    def _component(self, update: Update) -> Component | None:
        return self.architecture.components.get(update.component) if self.architecture is not None else None

    def _place(self, update: Update) -> Place | None:
        return self.placing.find(update.component)

    def _unspelled(self, update: Update) -> ModuleSpec | None:
        """The fused module that an update is on, where the target has none such."""
        component, place = self._component(update), self._place(update)
        spec = component.fused.get(update.module) if component is not None else None
        if spec is None or place is None or self.architecture is None:
            return None
        return None if spells(place, self.architecture, spec) else spec

    def _whole(self, update: Update, module: str) -> ModuleSpec | None:
        """The fused module of the target that a module is a part of."""
        component, place = self._component(update), self._place(update)
        if component is None or place is None or self.architecture is None or module not in component.whole:
            return None
        candidates = [component.fused[name] for name in component.whole[module]]
        return next((spec for spec in candidates if spells(place, self.architecture, spec)), None)

    def _record(self, update: Update) -> list[list[Any]] | None:
        """What the file says that a fused module was joined from.

        The dialect that wrote it need not be the one by which it is read: two may spell these modules alike.
        """
        at = f"{update.component}.{update.module}"
        found = (own.get("joined", {}).get(at) for own in self.adapter.provenance.carried.spelling.values())
        return next((blocks for blocks in found if blocks is not None), None)

    def _recorded(self, update: Update) -> list[fused.Block] | None:
        blocks = self._record(update)
        return [fused.Block(name, rank) for name, rank in blocks] if blocks is not None else None

    def _keep_record(self, update: Update) -> None:
        """A fused module that stays one was still joined from what it was joined from."""
        component, blocks = self._component(update), self._record(update)
        if component is not None and update.module in component.fused and blocks is not None:
            self._records[f"{update.component}.{update.module}"] = blocks
