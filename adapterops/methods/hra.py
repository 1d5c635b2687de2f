"""HRA: the inputs of a module reflected at r hyperplanes, one after another.

W' = W · H_1 ⋯ H_r with H_i = I − 2·u_i·u_iᵀ / ‖u_i‖²; W is (out, n), n = in · kernel; the bias stays.

- `u` (n, r): the u_i, in columns
- `options["apply_GS"]`: Gram and Schmidt make the u_i orthogonal first; False, peft's default, where nothing says it

W' − W = (W·B)·A has rank r: column i of B is −2·H_1 ⋯ H_{i−1}·u_i, row i of A is u_iᵀ.

Sources: https://arxiv.org/abs/2405.17484; peft `tuners/hra/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Own, need
from adapterops.methods.lora import product_error
from adapterops.methods.orthogonal import OfTheWeight, columns, flag, values
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


class Hra(OfTheWeight):
    """HRA.  peft has it for Linear and Conv2d."""

    name = "hra"
    title = "HRA (Householder reflections)"
    form = "with the base's weight: W·B and A, rank r"
    formula = "W' = W · H_1 ⋯ H_r, H_i = I − 2·u_i·u_iᵀ / ‖u_i‖²"
    source = "https://arxiv.org/abs/2405.17484"
    compared = frozenset({"apply_GS"})

    def check(self, update: Update) -> None:
        need(update, "u")
        u = update.tensors["u"]
        if len(u.shape) != 2 or 0 in u.shape:
            raise BrokenAdapter(f"{u.where}: shape {list(u.shape)}; HRA has a column a reflection [inputs, r]")
        if flag(update, "apply_GS", False) and u.shape[1] > u.shape[0]:
            raise BrokenAdapter(
                f"{u.where}: shape {list(u.shape)}; with apply_GS there are no more reflections than inputs"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["u"].shape[1]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        u = update.tensors.get("u")
        if u is None or len(u.shape) != 2:
            return True  # `check` says it better than a shape could
        return len(shape) > 1 and u.shape[0] == columns(shape)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        return dict(update.tensors)  # the inputs of every row are reflected alike

    def is_nothing(self, update: Update) -> bool:
        """Whether each reflection is undone by the next: so peft begins."""
        u = update.tensors["u"].numpy()
        even = u.shape[1] % 2 == 0 and not flag(update, "apply_GS", False)
        return even and bool((u[:, 0::2] == u[:, 1::2]).all())

    def factors(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        """B (n, r) and A (r, n) of H_1 ⋯ H_r = I + B·A, in float64.

        Raises `BrokenAdapter` where a column has no direction.
        """
        import torch

        tensor = update.tensors["u"]
        u, together = values(tensor), flag(update, "apply_GS", False)
        if together:
            for at in range(u.shape[1]):
                for earlier in range(at):
                    u[:, at] -= (u[:, earlier] @ u[:, at]) * u[:, earlier]
                u[:, at] /= u[:, at].norm()
        else:
            u = u / u.norm(dim=0)
        if not torch.isfinite(u).all():
            raise BrokenAdapter(f"{tensor.where}: a column without a direction (zeros, or no numbers) reflects nothing")
        b = torch.zeros_like(u)
        for at in range(u.shape[1]):
            b[:, at] = -2 * (u[:, at] if together else u[:, at] + b[:, :at] @ (u[:, :at].T @ u[:, at]))
        return b, u.T

    def low_rank_of(self, update: Update, own: Own | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact factors of W' − W, in float64: W·B (out, r) and A (r, in · kernel).

        Raises as `change` does.
        """
        own = self.own(update, own)
        b, a = self.factors(update)
        return own.weight.double().reshape(len(own.weight), -1) @ b, a

    def change(self, update: Update, own: Own | None = None) -> Change:
        own = self.own(update, own)
        left, right = self.low_rank_of(update, own)
        return Change((left @ right).float().reshape(own.weight.shape))

    def error(self, update: Update, other: Update) -> float:
        """How far the products of reflections are from each other; relative to what they change."""
        one, two = update.tensors["u"].shape, other.tensors["u"].shape
        if one[0] != two[0]:
            return float("inf")
        if self.is_nothing(update) and self.is_nothing(other):
            return 0.0
        (b, a), (b2, a2) = (self.factors(u) for u in (update, other))
        return product_error(b.numpy(), a.numpy(), b2.numpy(), a2.numpy())
