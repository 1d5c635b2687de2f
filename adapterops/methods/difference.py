"""Differences of a module's own parameters, whole: W' = W + `weight`, b' = b + `bias`.

- `weight`: the shape of the module's weight, or (out, everything else); (dim,) for a norm
- `bias` (out,)
- `bias_indices` (2, k), `bias_values` (k,), `bias_size` (2,), integers but for the values: a sparse matrix
  (out, in · kernel) that is added to the *weight*.  LyCORIS writes it (`utils/__init__.py`, `extract_diff` with
  `use_bias`) beside a LoRA extracted from two models, to hold the largest of what the low rank left over; alpha is the
  rank there, so whether readers apply the LoRA's scale to it makes no difference.

`options["kind"]` is "norm" where the file spells them w_norm and b_norm.  No scale.

Sources: LyCORIS `lycoris/modules/full.py`, `lycoris/modules/norms.py`; ComfyUI `comfy/lora.py` (`.diff`, `.diff_b`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, array_error, need, tensor_error, worst
from adapterops.methods.products import Rows
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

SPARSE = ("bias_indices", "bias_values", "bias_size")
"""The roles of a sparse part."""
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


class Difference(Method):
    """Full, norm and bias differences."""

    name = "diff"
    title = "full, norm and bias differences"
    formula = "W' = W + weight, b' = b + bias"
    source = "LyCORIS lycoris/modules/full.py, lycoris/modules/norms.py"
    rows = frozenset({"weight", "bias"})

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(f"{update.name}: a difference without any tensor", fault="missing-half")
        if update.tensors.keys() & set(SPARSE):
            need(update, *SPARSE)
            indices, values, size = (update.tensors[role] for role in SPARSE)
            for tensor in (indices, size):
                if tensor.dtype not in _INTEGERS:
                    raise BrokenAdapter(
                        f"{tensor.where}: dtype {tensor.dtype}; positions are integers (a tool cast the whole file?)"
                    )
            if indices.shape != (2, values.numel) or size.numel != 2:
                raise BrokenAdapter(
                    f"{indices.where}: shape {list(indices.shape)}; {values.numel} numbers of a sparse matrix need "
                    f"positions [2, {values.numel}] and a size of 2 numbers"
                )
        weight, bias = update.tensors.get("weight"), update.tensors.get("bias")
        if weight is not None and not weight.numel:
            raise BrokenAdapter(f"{weight.where}: shape {list(weight.shape)} holds no weight (an unsharded export?)")
        if bias is not None and (not bias.numel or sum(n != 1 for n in bias.shape) > 1):
            raise BrokenAdapter(f"{bias.where}: shape {list(bias.shape)} is no bias: one number an output")
        if weight is not None and bias is not None and (bias.numel,) != weight.shape[:1]:
            raise BrokenAdapter(
                f"{bias.where}: {bias.numel} numbers, but {weight.key!r} {list(weight.shape)} is no weight "
                f"of {bias.numel} outputs"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        weight, bias = update.tensors.get("weight"), update.tensors.get("bias")
        if bias is not None and bias.numel != (shape[0] if shape else 1):
            return False
        if weight is None:
            return True
        flat = (shape[0], prod(shape[1:])) if shape else ()
        return _without_ones(weight.shape) in (_without_ones(shape), _without_ones(flat))

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        if "bias_indices" in update.tensors:
            raise CannotRepresent(
                f"{update.name}: its sparse part (tensor {update.tensors['bias_indices'].key!r}) is not split into the parts "
                "of a fused projection; a target that keeps the projection whole holds it (--to kohya, --to comfy)"
            )
        flat = {role: t.reshape((t.numel,)) if role == "bias" else t for role, t in update.tensors.items()}
        return {role: t.rows(pieces) for role, t in flat.items()}

    def is_nothing(self, update: Update) -> bool:
        values = update.tensors.get("bias_values")
        return super().is_nothing(update) and (values is None or is_zero(values))

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32: the shape of `weight`; (out, in · kernel) where there is a sparse part alone."""
        import torch

        weight = update.tensors.get("weight")
        sparse = self._sparse(update) if "bias_indices" in update.tensors else None
        if weight is None and sparse is None:
            raise CannotRepresent(f"{update.name}: only its bias changes; there is no weight delta")
        if weight is None:
            return torch.from_numpy(sparse).float()
        made = weight.torch().float()
        if sparse is not None:
            self._insist(update, weight.numel == sparse.size)
            made = (made.double() + torch.from_numpy(sparse).reshape(made.shape)).float()
        return made

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        weight, size = update.tensors.get("weight"), update.tensors.get("bias_size")
        if weight is not None:
            return weight.shape
        return None if size is None else tuple(int(n) for n in size.numpy().reshape(-1))

    def matrix(self, update: Update) -> Rows:
        weight = update.tensors.get("weight")
        if weight is not None and "bias_indices" not in update.tensors and len(weight.shape) > 1:
            rows = weight.reshape((weight.shape[0], weight.numel // weight.shape[0]))
            return Rows(
                (rows.shape[0], rows.shape[1]), lambda start, stop: rows.rows([(start, stop)]).numpy().astype("f8")
            )
        made = self.delta(update)
        values = made.reshape(made.shape[0] if made.dim() > 1 else 1, -1).numpy()
        return Rows(values.shape, lambda start, stop: values[start:stop].astype("f8"))

    def bias_delta(self, update: Update) -> torch.Tensor | None:
        """Δb (out,) in float32; None where the bias stays."""
        bias = update.tensors.get("bias")
        return None if bias is None else bias.torch().float().reshape(-1)

    def norm(self, update: Update) -> float:
        import numpy as np

        parts = [t.numpy().astype("f8") for role, t in update.tensors.items() if role not in SPARSE]
        parts += [self._sparse(update)] if "bias_indices" in update.tensors else []
        return hypot(*(float(np.linalg.norm(part.reshape(-1))) for part in parts))

    def error(self, update: Update, other: Update) -> float:
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        errors = [tensor_error(t, other.tensors[role]) for role, t in update.tensors.items() if role not in SPARSE]
        if "bias_indices" in update.tensors:
            one, two = self._sparse(update), self._sparse(other)
            errors.append(array_error(one, two) if one.shape == two.shape else float("inf"))
        return worst(errors)

    def _sparse(self, update: Update) -> Array:
        """The sparse part (out, in · kernel) in float64; numbers at one position add up."""
        import numpy as np

        indices, values, size = (update.tensors[role].numpy() for role in SPARSE)
        shape = tuple(int(n) for n in size.reshape(-1))
        inside = indices.size == 0 or bool(((indices >= 0) & (indices < size.reshape(2, 1))).all())
        self._insist(update, min(shape) > 0 and inside)
        out = np.zeros(shape, dtype=np.float64)
        np.add.at(out, (indices[0], indices[1]), values.astype(np.float64).reshape(-1))
        return out

    def _insist(self, update: Update, sound: bool) -> None:
        if not sound:
            raise BrokenAdapter(
                f"{update.tensors['bias_indices'].where}: positions outside of the sparse matrix that {SPARSE[2]} describes "
                f"({update.name}); LyCORIS keeps them in 16 bits, which larger matrices overflow"
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
