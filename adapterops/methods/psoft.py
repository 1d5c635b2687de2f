"""PSOFT: a rotation inside the space of a weight's largest singular vectors.

ΔW = B·(M − I)·A with M = diag(b)·R·diag(a) (r, r); from W ≈ U·diag(σ)·Vᵀ, the largest r:

- `options["ab_svd_init"]` "psoft_init" (peft's default): B = U·diag(σ), A = Vᵀ; "pissa_init": B = U·diag(√σ),
  A = diag(√σ)·Vᵀ.  peft divides by psoft_alpha / r first and multiplies by it afterwards: alpha has no effect
- `R` (r·(r−1)/2,): the entries above the diagonal of a skew-symmetric S, R = (I + S)(I − S)⁻¹, or its series where
  `options["use_cayley_neumann"]` (`num_cayley_neumann_terms`; S is first shortened to `cayley_neumann_eps`); or (r, r),
  R itself (`psoft_orth` False)
- `vector_b`, `vector_a` (r,): b and a; ones where they are missing (`psoft_mag_b`, `psoft_mag_a` False)
- `options["psoft_svd"]` "full" (the default), or "lowrank": torch.svd_lowrank's sketch, which `random_seed` and
  `psoft_svd_lowrank_niter` decide

R mixes singular vectors whose signs are arbitrary: the factorisation that made them decides.  So it is done here as peft
does, in float32 by LAPACK; what was trained on another device may have had other signs there, for peft too.

Sources: https://openreview.net/forum?id=FSHrinMArK; peft `tuners/psoft/layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, need
from adapterops.methods.orthogonal import (
    TERMS,
    OfTheWeight,
    blocks_error,
    cayley,
    count,
    flag,
    minus_eye,
    neumann,
    number,
    side,
    skew,
    values,
)

if TYPE_CHECKING:
    import torch

INITS = ("psoft_init", "pissa_init")
"""Where peft puts the singular values."""


class Psoft(OfTheWeight):
    """PSOFT.  peft has it for Linear alone."""

    name = "psoft"
    title = "PSOFT (rotation in the principal subspace)"
    form = "with the base's weight: rank r"
    formula = "ΔW = U·diag(σ) · (diag(b)·R·diag(a) − I) · Vᵀ, of W's r largest singular vectors"
    source = "https://openreview.net/forum?id=FSHrinMArK"
    compared = frozenset({"use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"})

    def check(self, update: Update) -> None:
        need(update, "R")
        r = update.tensors["R"]
        square = len(r.shape) == 2 and r.shape[0] == r.shape[1] > 0
        if not square and (len(r.shape) != 1 or side(r.numel) is None):
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)} is neither a square matrix nor the upper entries of one (r·(r−1)/2)"
            )
        for role in ("vector_a", "vector_b"):
            vector = update.tensors.get(role)
            if vector is not None and vector.shape != (self.rank(update),):
                raise BrokenAdapter(
                    f"{vector.where}: shape {list(vector.shape)}, but {r.key!r} {list(r.shape)} makes a rotation of "
                    f"rank {self.rank(update)}"
                )

    def rank(self, update: Update) -> int:
        r = update.tensors["R"]
        return r.shape[0] if len(r.shape) == 2 else side(r.numel) or 0

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        return "R" not in update.tensors or (len(shape) == 2 and self.rank(update) <= min(shape))

    def is_nothing(self, update: Update) -> bool:
        r = update.tensors["R"].numpy()
        still = (r == 0).all() if r.ndim == 1 else bool(minus_eye(values(update.tensors["R"])).count_nonzero() == 0)
        ones = (update.tensors[role] for role in ("vector_a", "vector_b") if role in update.tensors)
        return bool(still) and all(bool((v.numpy() == 1).all()) for v in ones)

    def matrix_of(self, update: Update) -> torch.Tensor:
        """M (r, r) in float64."""
        r = values(update.tensors["R"])
        if r.ndim == 1:
            s = skew(r.reshape(1, -1))[0]
            if flag(update, "use_cayley_neumann", False):
                limit = update.options.get("cayley_neumann_eps")
                if limit is not None and float(s.norm()) > (eps := number(update, "cayley_neumann_eps", 0.9)):
                    s = s * (eps / float(s.norm()))
                terms = update.options.get("num_cayley_neumann_terms")
                r = neumann(s, TERMS if terms is None else count(update, "num_cayley_neumann_terms", terms))
            else:
                r = cayley(-s)
        if "vector_b" in update.tensors:
            r = values(update.tensors["vector_b"])[:, None] * r
        return r * values(update.tensors["vector_a"]) if "vector_a" in update.tensors else r

    def low_rank_of(self, update: Update, own: Own | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact factors of ΔW, in float64: B·(M − I) (out, r) and A (r, in).

        Raises as `change` does.
        """
        own = self.own(update, own)
        u, sigma, v = self._principal(update, own.weight.float())
        init = update.options.get("ab_svd_init") or INITS[0]
        if init not in INITS:
            raise CannotRepresent(f"{update.name}: ab_svd_init {init!r} of PSOFT is none of {', '.join(INITS)}")
        left, right = (sigma, 1) if init == "psoft_init" else (sigma.sqrt(), sigma.sqrt()[:, None])
        return (u * left) @ minus_eye(self.matrix_of(update)), right * v

    def change(self, update: Update, own: Own | None = None) -> Change:
        left, right = self.low_rank_of(update, own)
        return Change((left @ right).float())

    def _principal(self, update: Update, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U (out, r), σ (r,) and Vᵀ (r, in) in float64, of a float32 weight."""
        import torch

        rank, how = self.rank(update), update.options.get("psoft_svd") or "full"
        if not torch.isfinite(weight).all():
            raise BrokenAdapter(
                f"{update.name}: its weight in the base holds NaN or infinity; it has no singular vectors"
            )
        if how == "full":
            u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
        elif how == "lowrank":
            seed, steps = (int(number(update, n, d)) for n, d in (("random_seed", 0), ("psoft_svd_lowrank_niter", 10)))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                u, sigma, v = torch.svd_lowrank(weight, q=rank, niter=steps)
            v = v.T
        else:
            raise CannotRepresent(f"{update.name}: psoft_svd {how!r} of PSOFT is neither full nor lowrank")
        return u[:, :rank].double(), sigma[:rank].double(), v[:rank].double()

    def error(self, update: Update, other: Update) -> float:
        """How far the matrices M are from each other."""
        return blocks_error(self.matrix_of(update)[None], self.matrix_of(other)[None])
