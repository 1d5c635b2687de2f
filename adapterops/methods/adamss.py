"""AdaMSS: low-rank updates of groups of rows, in the space of the weight's largest right singular vectors.

- `newB` (R, in_features), or (R, in_features + 1) where the module has a bias, which is its last column: the right singular
  vectors of [W b], as `torch.svd_lowrank` finds them from `options["random_seed"]` (peft's default: 0)
- `A.0`, `A.1` … (rᵢ, R) and `B.0`, `B.1` … (nᵢ, rᵢ), one pair a group i of nᵢ rows

    Δ[W b] of the rows of group i = B.i · A.i · newB, so ΔW is of rank Σ rᵢ at most

Which rows a group has is in no file: they are clusters of the rows of the *left* singular vectors (k-means, `clusters.py`),
which peft computes anew from the base, whenever it loads the adapter.  So does this; and where the right singular vectors
that come out are not the file's, the groups would be others too, and it is refused.  (peft would go on: the rows of another
base's, another seed's or another device's clusters then get each other's updates.)

Source: peft `tuners/adamss/layer.py`, `tuners/adamss/utils.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own
from adapterops.methods.clusters import Undecided, clusters
from adapterops.methods.own import fitting
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import torch

SAME = 1e-2
"""How far a singular vector may be from the file's (1 − |cosine|) and count as the same."""


class Adamss(Method):
    """AdaMSS, on linear modules."""

    name = "adamss"
    title = "AdaMSS (groups of rows in the space of singular vectors)"
    source = "peft tuners/adamss/layer.py"
    formula = "Δ[W b] of the rows of group i = B.i·A.i·newB"
    form = "with the base's weight, where there is no bias: rank Σ rᵢ"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "newB", "A.0", "B.0")
        base, count = update.tensors["newB"], self._count(update)
        stray = sorted(update.tensors.keys() - {"newB", *(f"{side}.{i}" for side in "AB" for i in range(count))})
        if stray:
            tensor = update.tensors[stray[0]]
            raise BrokenAdapter(
                f"{tensor.where}: one of a pair A.i, B.i of AdaMSS whose other half, or an earlier pair, is missing from the "
                f"file ({update.name})",
                fault="missing-half",
            )
        for a, b in self._pairs(update):
            for tensor in (base, a, b):
                if len(tensor.shape) != 2 or (0 in tensor.shape and tensor is not b):
                    raise BrokenAdapter(f"{tensor.where}: shape {list(tensor.shape)} is no factor of AdaMSS")
            if a.shape[1] != base.shape[0]:
                raise BrokenAdapter(
                    f"{a.where}: shape {list(a.shape)}, but {base.key!r} {list(base.shape)} has {base.shape[0]} directions"
                )
            if b.shape[1] != a.shape[0]:
                raise BrokenAdapter(
                    f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                    f"{a.shape[0]}; they are not halves of one update",
                    fault="ranks",
                )

    def rank(self, update: Update) -> int:
        """The sum of the groups' ranks: the rank that ΔW has at most."""
        return sum(a.shape[0] for a, _ in self._pairs(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        base = update.tensors.get("newB")
        if base is None or len(base.shape) != 2:
            return True  # `check` says it better than a shape could
        rows = sum(b.shape[0] for _, b in self._pairs(update))
        return len(shape) == 2 and rows == shape[0] and base.shape[1] in (shape[1], shape[1] + 1)

    def is_nothing(self, update: Update) -> bool:
        return all(is_zero(b) for _, b in self._pairs(update))

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: which rows a group of AdaMSS has is in no file; it follows from the base weight "
            "(--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        b, a = self._factors(update, need_own(update, own))
        made, inputs = b @ a, a.shape[1] - (own is not None and own.bias is not None)
        return Change(made[:, :inputs].float(), made[:, inputs].float() if inputs < a.shape[1] else None)

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if own.bias is not None else self._factors(update, own)

    def _factors(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of Δ[W b]: (out, Σ rᵢ) and (Σ rᵢ, in), or in + 1 with a bias."""
        import torch

        own = fitting(self, update, own)
        base = update.tensors["newB"].torch().double()
        inputs, biased = own.weight.shape[1], own.bias is not None
        if base.shape[1] != inputs + biased:
            raise BrokenAdapter(
                f"{update.tensors['newB'].where}: {base.shape[1]} columns; {update.name} has {inputs} inputs and "
                f"{'a' if biased else 'no'} bias in these base weights, which are another model's"
            )
        left, right = torch.zeros(own.weight.shape[0], self.rank(update), dtype=torch.float64), []
        at = 0
        for (a, b), rows in zip(self._pairs(update), self.groups(update, own), strict=True):
            left[rows, at : at + a.shape[0]] = b.torch().double()
            right.append(a.torch().double() @ base)
            at += a.shape[0]
        return left, torch.cat(right)

    def groups(self, update: Update, own: Own) -> list[torch.Tensor]:
        """The rows of each group, found as peft finds them.

        Raises `CannotRepresent` where the base's singular vectors are not the file's, or the groups' sizes are not.
        """
        import torch

        weight = own.weight.float() if own.bias is None else torch.cat([own.weight, own.bias.reshape(-1, 1)], 1).float()
        base, seed = update.tensors["newB"], update.options.get("random_seed", 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, _, right = torch.svd_lowrank(weight, q=min(base.shape[0], *weight.shape), niter=2)
        meant = base.torch().float()
        cosines = (meant * right.T).sum(1).abs() / meant.norm(dim=1) if meant.shape == right.T.shape else torch.zeros(1)
        if not bool((cosines > 1 - SAME).all()):
            raise CannotRepresent(
                f"{update.name}: the singular vectors of these base weights are not those of the file "
                f"(tensor {base.key!r}), so which rows each of its groups has cannot be found: it was made from another base, "
                f"with another random_seed than {seed} (--set random_seed=N), or on another kind of device"
            )
        try:
            labels = clusters(left.numpy(), self._count(update))
        except Undecided as reason:
            raise CannotRepresent(
                f"{update.name}: which rows each of its groups has cannot be found again: {reason}, so that it hangs on the "
                "processor that runs k-means; fuse the adapter with peft where it was trained"
            ) from reason
        found = [(labels == i).nonzero()[0] for i in range(self._count(update))]
        sizes = [b.shape[0] for _, b in self._pairs(update)]
        if [len(rows) for rows in found] != sizes:
            raise CannotRepresent(
                f"{update.name}: the groups of rows that follow from these base weights have {[len(r) for r in found]} rows, "
                f"those of the file {sizes}; it was made from another base, or by another version of k-means"
            )
        return [torch.from_numpy(rows) for rows in found]

    @staticmethod
    def _count(update: Update) -> int:
        """The number of whole pairs, from 0 on."""
        count = 0
        while {f"A.{count}", f"B.{count}"} <= update.tensors.keys():
            count += 1
        return count

    def _pairs(self, update: Update) -> list[tuple[LazyTensor, LazyTensor]]:
        return [(update.tensors[f"A.{i}"], update.tensors[f"B.{i}"]) for i in range(self._count(update))]
