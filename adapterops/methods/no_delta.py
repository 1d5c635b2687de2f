"""Methods that change no module's parameters: their tensors are carried whole, and nothing can be computed with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NoReturn

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent
from adapterops.methods.base import Change, Method, Own
from adapterops.methods.products import Rows

if TYPE_CHECKING:
    import torch


class NoDelta(Method):
    """A method without a weight delta: `why` ends the sentence that refuses every use but carrying it."""

    linear = False
    why: ClassVar[str]

    def delta(self, update: Update) -> torch.Tensor:
        self._refuse(update)

    def matrix(self, update: Update) -> Rows:
        self._refuse(update)

    def change(self, update: Update, own: Own | None = None) -> Change:
        self._refuse(update)

    def _refuse(self, update: Update) -> NoReturn:
        where = update.name if update.module else update.component
        raise CannotRepresent(
            f"{where}: {self.title} has no weight delta: {self.why}; no LoRA does that, and only a PEFT folder holds it "
            "(adapterops convert --to peft keeps it as it is)"
        )
