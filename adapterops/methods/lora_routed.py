"""LoRA that acts on some tokens only: aLoRA behind its invocation tokens, Arrow where its router sends them.

Tensors are LoRA's (see `lora`), but no change of a module's weights does what the module then computes, so there is no
delta; such adapters are carried as they are.

- aLoRA: s · B·A·x is added from the last occurrence of `alora_invocation_tokens` in the prompt on, and nowhere before it
- Arrow: a router that mixes the adapters loaded beside it, token by token, by the directions of their own factors; its own A
  and B are there because every LoRA layer has them, and nothing reads them

Sources: https://arxiv.org/abs/2504.12397 and peft `tuners/lora/variants.py` (`ALoraLinearVariant`);
https://arxiv.org/abs/2405.11157 and `tuners/lora/arrow.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent
from adapterops.methods.base import Change, Own
from adapterops.methods.lora import Lora

if TYPE_CHECKING:
    import torch

    from adapterops.methods.products import Rows


class _Routed(Lora):
    """LoRA's tensors without LoRA's delta."""

    linear = False
    pairs = ()
    why: ClassVar[str]

    def low_rank(self, update: Update) -> None:
        return None

    def exact_rank(self, update: Update) -> None:
        return None

    def weight_shape(self, update: Update) -> None:
        return None

    def norm(self, update: Update) -> None:
        return None

    def delta(self, update: Update) -> torch.Tensor:
        raise self._no_delta(update)

    def matrix(self, update: Update) -> Rows:
        raise self._no_delta(update)

    def change(self, update: Update, own: Own | None = None) -> Change:
        raise self._no_delta(update)

    def _no_delta(self, update: Update) -> CannotRepresent:
        return CannotRepresent(f"{update.name}: {self.title} {self.why}: no change of weights does the same")


class ALora(_Routed):
    """Activated LoRA."""

    name = "alora"
    formula = "as LoRA, on the tokens from the invocation tokens on"
    form = ""
    title = "aLoRA"
    source = "https://arxiv.org/abs/2504.12397"
    why = "acts on the tokens from its invocation sequence on, and on none before"

    def error(self, update: Update, other: Update) -> float:
        tokens = [u.options.get("alora_invocation_tokens") for u in (update, other)]
        return super().error(update, other) if tokens[0] == tokens[1] else float("inf")


class Arrow(_Routed):
    """The router of Arrow."""

    name = "arrow"
    formula = "as LoRA, mixed with other adapters by a router"
    form = ""
    title = "Arrow"
    source = "https://arxiv.org/abs/2405.11157"
    why = "mixes the adapters beside it anew for each token"
