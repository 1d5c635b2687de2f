"""DEFT: a subspace of the weight's outputs taken away and filled anew; PaRa, which only takes it away.

`P` (out_features, r), `R` (r, in_features); without `R` the update is PaRa's.  With Q and K (out_features, r) made of P,

    W' = (I − Q·Kᵀ)·W + s·Q·R,   so   ΔW = Q·(s·R − Kᵀ·W)   (PaRa: −Q·Kᵀ·W), exactly of rank r

- `options["decomposition_method"]`: "relu" has Q = P, K = relu(P); "qr" has Q = K, the orthonormal factor of P = Q·U
- `options["alpha"]`: s = alpha / r, where peft's default None is s = 1

Neither option shows in the tensors: both ways load, with other results.  The sign of Q's columns matters to Q·R, and is that
of LAPACK's Householder QR, which torch uses.

Source: peft `tuners/deft/layer.py`, `tuners/deft/config.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own, setting
from adapterops.methods.own import fitting

if TYPE_CHECKING:
    import torch

DECOMPOSITIONS = ("relu", "qr")
"""What `decomposition_method` can be."""


class Deft(Method):
    """DEFT and PaRa, on linear modules."""

    name = "deft"
    title = "DEFT (a subspace of the outputs replaced; PaRa)"
    source = "peft tuners/deft/layer.py"
    formula = "W' = (I − Q·Kᵀ)·W + s·Q·R, Q and K of P; without R, PaRa's"
    form = "with the base's weight: Q and s·R − Kᵀ·W, rank r"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "P")
        p, r = update.tensors["P"], update.tensors.get("R")
        for tensor in (p, r) if r is not None else (p,):
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)} is no factor of DEFT, which has two axes"
                )
        if p.shape[1] > p.shape[0]:
            raise BrokenAdapter(
                f"{p.where}: shape {list(p.shape)}; P is (out_features, r), and r is at most out_features (transposed?)"
            )
        if r is not None and r.shape[0] != p.shape[1]:
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)} has rank {r.shape[0]}, but {p.key!r} {list(p.shape)} has rank "
                f"{p.shape[1]}; they are not halves of one update",
                fault="ranks",
            )

    def rank(self, update: Update) -> int:
        return update.tensors["P"].shape[1]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        p, r = update.tensors.get("P"), update.tensors.get("R")
        if p is None or len(p.shape) != 2 or (r is not None and len(r.shape) != 2):
            return True  # `check` says it better than a shape could
        return len(shape) == 2 and p.shape[0] == shape[0] and (r is None or r.shape[1] == shape[1])

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: DEFT replaces a part of the module's weight, so its delta needs the base weight "
            "(--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        q, added = self.low_rank_of(update, need_own(update, own))
        return Change((q @ added).float())

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor]:
        own = fitting(self, update, own)
        q, k = self._project(update)
        taken = k.T @ own.weight.double()
        injected = update.tensors.get("R")
        if injected is None:
            return q, -taken
        alpha = update.options.get("alpha")
        scale = alpha / self.rank(update) if alpha else 1.0
        return q, scale * injected.torch().double() - taken

    def _project(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and K (out, r) in float64."""
        import torch

        method = setting(update, "decomposition_method")
        p = update.tensors["P"].torch().double()
        if method == "relu":
            return p, torch.relu(p)
        if method == "qr":
            q = torch.linalg.qr(p).Q
            return q, q
        raise CannotRepresent(
            f"{update.name}: decomposition_method {method!r} is none of DEFT's: {' or '.join(DECOMPOSITIONS)}"
        )
