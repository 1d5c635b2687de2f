"""KaSA: LoRA with a diagonal between its factors, on a base weight without its smallest singular values.

W' = W_k + ΔW with ΔW = s · B·diag(d)·A, s = alpha / r, or alpha / √r (rsLoRA), on linear modules (no Conv1D):

- A (r, in_features), B (out_features, r), `diag` (r,)
- W_k is W with the r smallest of its singular values set to zero.  peft truncates the base whenever it loads the adapter,
  and leaves it truncated when the adapter is taken off; two adapters on one model truncate it twice.

So `delta`, `low_rank`, `factors` and `norm` are ΔW, which is relative to W_k; `change` is all of W' − W (of rank 2r at most)
and needs W.  peft allows no DoRA beside it.

Sources: https://arxiv.org/abs/2412.06071; peft `tuners/lora/variants.py` (`KasaLinearVariant`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Own, need, need_own
from adapterops.methods.lora import Lora, as_shaped

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Kasa(Lora):
    """KaSA."""

    name = "kasa"
    formula = "W' = W's part above its r smallest singular values + s·B·diag·A"
    form = "with the base's weight: rank 2·r"
    title = "KaSA (a diagonal between LoRA's factors, on a truncated base)"
    source = "https://arxiv.org/abs/2412.06071"
    rows = frozenset()  # a part's smallest singular values are not the whole's
    pairs = ()
    needs_weight = True
    compared = frozenset({"kasa_config"})  # it concerns training alone

    def check(self, update: Update) -> None:
        need(update, "A", "B", "diag")
        super().check(update)
        diag, a = update.tensors["diag"], update.tensors["A"]
        if len(a.shape) != 2:
            raise BrokenAdapter(f"{a.where}: shape {list(a.shape)} is no matrix; KaSA acts on linear modules alone")
        if diag.numel != a.shape[0]:
            raise BrokenAdapter(
                f"{diag.where}: shape {list(diag.shape)}, but {a.key!r} {list(a.shape)} has rank {a.shape[0]}; KaSA has one "
                "number a rank",
                fault="ranks",
            )

    def unscaled(self, update: Update) -> tuple[Array, Array]:
        b, a = super().unscaled(update)
        return b * update.tensors["diag"].numpy().astype("f8").reshape(-1), a

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        b, a = self.unscaled(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def change(self, update: Update, own: Own | None = None) -> Change:
        """W_k + ΔW − W, and s · `bias`.

        Raises `CannotRepresent` without `own`; `BrokenAdapter` where W is of another size, or has no more singular values
        than are dropped (peft refuses that, too).
        """
        own = need_own(update, own)
        added = super().change(update, own)
        u, vh = self._dropped(update, own)
        assert added.weight is not None
        return Change((as_shaped(update, added.weight, own).double() - u @ vh).float(), added.bias)

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor] | None:
        """ΔW's factors beside those of what is taken away: rank 2r."""
        import torch

        if "bias" in update.tensors:
            return None
        b, a = (torch.from_numpy(factor) for factor in self.factors(update))
        u, vh = self._dropped(update, own)
        return torch.cat([b, -u], 1), torch.cat([a, vh])

    def _dropped(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor]:
        """W − W_k as (out, r) and (r, in), in float64."""
        import torch

        weight, rank = own.weight.double(), self.rank(update)
        if rank >= min(weight.shape):
            raise BrokenAdapter(
                f"{update.tensors['A'].where}: rank {rank}, and KaSA takes that many singular values away from a weight "
                f"{list(weight.shape)}, which has no more ({update.name})"
            )
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, -rank:] * s[-rank:], vh[-rank:]
