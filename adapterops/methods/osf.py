"""OSF: the part of the weight with the smallest singular values, trained and put back.

`U_low` (out_features, r), `S_low` (r,), `V_low` (r, in_features); with k = min(out_features, in_features) − r (peft's
`effective_rank`) and W = Σ σᵢ·uᵢ·vᵢᵀ, the largest first,

    ΔW = U_low·diag(S_low)·V_low − Σ_{i > k} σᵢ·uᵢ·vᵢᵀ

so what is taken away comes from the base, and ΔW is of rank 2r at most.  r = 0 is what peft makes of a module whose smaller
side is `effective_rank` at most: nothing.

Where the base is in 16 bits, peft rounds the singular vectors to its type before it takes their product away; so does this,
if the base's weight is given in that type.

Source: https://arxiv.org/abs/2504.07097; peft `tuners/osf/layer.py`, `tuners/osf/utils.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own
from adapterops.methods.own import fitting

if TYPE_CHECKING:
    import torch


class Osf(Method):
    """Orthogonal subspace fine-tuning, on linear modules."""

    name = "osf"
    title = "OSF (the smallest singular values retrained)"
    source = "https://arxiv.org/abs/2504.07097"
    formula = "ΔW = U·diag(S)·V − the part of W with its r smallest singular values"
    form = "with the base's weight: rank 2r"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "U_low", "S_low", "V_low")
        u, s, v = (update.tensors[role] for role in ("U_low", "S_low", "V_low"))
        if len(u.shape) != 2 or len(v.shape) != 2 or not u.shape[0] or not v.shape[1]:
            wrong = u if len(u.shape) != 2 or not u.shape[0] else v
            raise BrokenAdapter(
                f"{wrong.where}: shape {list(wrong.shape)}; OSF keeps (out_features, r) and (r, in_features)"
            )
        rank = u.shape[1]
        for tensor, found in ((v, v.shape[0]), (s, s.numel)):
            if found != rank:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)} has rank {found}, but {u.key!r} {list(u.shape)} has rank "
                    f"{rank}; they are not parts of one decomposition",
                    fault="ranks",
                )
        if rank >= min(u.shape[0], v.shape[1]):
            raise BrokenAdapter(
                f"{u.where}: rank {rank} is the whole of a weight {[u.shape[0], v.shape[1]]}; OSF keeps at least one singular "
                "value as it is"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["U_low"].shape[1]

    def effective_rank(self, update: Update) -> int:
        """How many singular values stay: peft's `effective_rank` for this module."""
        u, v = update.tensors["U_low"], update.tensors["V_low"]
        return min(u.shape[0], v.shape[1]) - u.shape[1]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        u, v = update.tensors.get("U_low"), update.tensors.get("V_low")
        if u is None or v is None or len(u.shape) != 2 or len(v.shape) != 2:
            return True  # `check` says it better than a shape could
        return shape == (u.shape[0], v.shape[1])

    def is_nothing(self, update: Update) -> bool:
        return self.rank(update) == 0

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: OSF replaces a part of the module's weight, so its delta needs the base weight (--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        b, a = self._factors(update, need_own(update, own))
        return Change((b @ a).float())

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.is_nothing(update) else self._factors(update, own)

    def _factors(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, 2r) and (2r, in)."""
        import torch

        own = fitting(self, update, own)
        u, s, v = (update.tensors[role].torch().double() for role in ("U_low", "S_low", "V_low"))
        kept, narrow = self.effective_rank(update), own.weight.element_size() < 4
        parts = torch.linalg.svd(own.weight.float() if narrow else own.weight.double(), full_matrices=False)
        before_u, before_s, before_v = parts[0][:, kept:], parts[1][kept:], parts[2][kept:]
        if narrow:
            before_u, before_s, before_v = (t.to(own.weight.dtype) for t in (before_u, before_s, before_v))
        b = torch.cat([u * s.reshape(-1), -before_u.double() * before_s.double()], dim=1)
        return b, torch.cat([v, before_v.double()])
