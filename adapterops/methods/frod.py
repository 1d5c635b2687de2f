"""FRoD: the base's weight taken apart on a basis that modules of one kind share, and put together with other numbers.

W' = U · (diag(lambda_l) + S) · Vᵀ, where U holds the normed columns of W · V⁻ᵀ, so that W = U · diag(λ₀) · Vᵀ for some λ₀.
Roles:

- `lambda_l` (in_features,), `lambda_s_values` (k,): of the module
- `V` (in_features, in_features), `s_indices` (2, k), `s_size` (2,): of all modules of a category (`category` of their
  names), the same tensors for every update of it.  S (in, in) is sparse: the values stand at the indices

U comes from the base's weight, so ΔW = W' − W needs it.  Without `V` (`save_projection=False`) peft makes it anew by
decomposing the weights of all modules of the category together; as eigenvectors have no sign of their own, it does
not come out alike on every machine, and such a file has no delta here.

peft 0.21 computes U from the basis that it has made anew when the adapter is added, and loads the saved `V` after that.
Where the two differ (a sign is enough), its module computes something else than what was trained; here U belongs to
the saved `V`.

Sources: https://doi.org/10.1609/aaai.v40i31.39813; peft `tuners/frod/layer.py`, `tuners/frod/model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own
from adapterops.methods.shared import check_dimensions, check_integers, check_vector, numbers
from adapterops.storage import dtypes

if TYPE_CHECKING:
    import torch

PROJECTION = ("V", "s_indices", "s_size")
"""The roles that a category shares."""
_LOSS = 1e-3
"""How much of a weight may be lost in the digits of its basis."""
_DEAD = 1e-12
"""Columns of W · V⁻ᵀ that are shorter count as zero."""


def category(module: str) -> str:
    """The category whose projections a module uses: the last two parts of its name, or the last one behind a number."""
    *before, parent, own = ["", "", *module.split(".")]
    if not parent or parent.isdigit():
        return own
    if (before[-1], parent, own) == ("attention", "output", "dense"):
        return "attention_output"
    return f"{parent}_{own}"


class Frod(Method):
    """FRoD on linear modules."""

    name = "frod"
    title = "FRoD (rotation of a shared basis)"
    formula = "W' = U·(diag(λ) + S)·Vᵀ, V shared by a category of modules, S sparse"
    source = "https://doi.org/10.1609/aaai.v40i31.39813"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "lambda_l", "lambda_s_values")
        diagonal, values = update.tensors["lambda_l"], update.tensors["lambda_s_values"]
        check_vector(diagonal)
        if len(values.shape) != 1:
            raise BrokenAdapter(f"{values.where}: shape {list(values.shape)}; a vector of numbers belongs here")
        if not update.tensors.keys() & set(PROJECTION):
            return
        need(update, *PROJECTION)
        basis, places, size = (update.tensors[role] for role in PROJECTION)
        check_dimensions(basis, 2)
        if basis.shape != (diagonal.numel, diagonal.numel):
            raise BrokenAdapter(
                f"{basis.where}: shape {list(basis.shape)}, but {diagonal.key!r} has {diagonal.numel} numbers; the basis of "
                f"that module is ({diagonal.numel}, {diagonal.numel})"
            )
        for tensor in (places, size):
            check_integers(tensor)
        if places.shape != (2, values.numel) or size.numel != 2:
            raise BrokenAdapter(
                f"{places.where}: shape {list(places.shape)}; the {values.numel} numbers of {values.key!r} need positions "
                f"[2, {values.numel}] and a size of 2 numbers ({size.key!r})"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        diagonal = update.tensors.get("lambda_l")
        return diagonal is None or (len(shape) == 2 and shape[1] == diagonal.numel)

    def is_nothing(self, update: Update) -> bool:
        return False  # whether `lambda_l` is the base's own shows only beside its weight

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: FRoD takes the module's weight apart, so its delta needs the base weight (--base-weights)"
        )

    def _insist_on_digits(self, update: Update, basis: torch.Tensor, lengths: torch.Tensor) -> None:
        """Raise `CannotRepresent` for a basis of too few digits to divide by: columns of small length would be rounding."""
        import torch

        kind = update.tensors["V"].dtype
        spread = float(lengths.max()) / max(float(lengths.min()), _DEAD)
        lost = max(float(torch.linalg.cond(basis)), spread) * dtypes.EPSILON.get(kind, 0.0)
        if kind in ("F16", "BF16") and lost > _LOSS:
            raise CannotRepresent(
                f"{update.tensors['V'].where}: the basis was rounded to {kind}, and the weight taken apart on it is off by some "
                f"{min(lost, 1.0):.0%}; a float32 file of the adapter is needed"
            )

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        if "V" not in update.tensors:
            raise CannotRepresent(
                f"{update.name}: its basis (frod_V) was not saved (save_projection=False), and what peft makes of the base "
                "anew has no certain signs; load the adapter in peft where it was trained, and save it with "
                "save_projection=True"
            )
        weight = need_own(update, own).weight
        basis = torch.from_numpy(numbers(update.tensors["V"]))
        places, size = (update.tensors[role].torch() for role in PROJECTION[1:])
        count = basis.shape[0]
        if weight.dim() != 2 or weight.shape[1] != count:
            raise BrokenAdapter(
                f"{update.tensors['V'].where}: a basis for {count} inputs, but the base's {update.name} is "
                f"{list(weight.shape)} (another base?)"
            )
        if size.reshape(-1).tolist() != [count, count]:
            raise BrokenAdapter(
                f"{update.tensors['s_size'].where}: {size.reshape(-1).tolist()} is not [{count}, {count}]"
            )
        if bool(((places < 0) | (places >= count)).any()):
            raise BrokenAdapter(f"{update.tensors['s_indices'].where}: positions outside of ({count}, {count})")
        weight = weight.double()
        try:
            apart = torch.linalg.solve(basis, weight.T).T
        except RuntimeError:  # torch says so of a singular basis
            apart = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
        lengths = apart.norm(dim=0)
        self._insist_on_digits(update, basis, lengths)
        unit = torch.where(lengths > _DEAD, apart / lengths.clamp_min(_DEAD), 0.0)
        diagonal, values = (torch.from_numpy(numbers(update.tensors[role])) for role in ("lambda_l", "lambda_s_values"))
        middle = torch.diag(diagonal)
        rows, columns = places.long()
        middle.index_put_((rows, columns), values, accumulate=True)
        return Change((unit @ middle @ basis.T - weight).float())
