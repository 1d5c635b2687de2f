"""LoRA on linear, convolution and embedding modules, with DoRA magnitudes, bias, rank-stabilised scale, Tucker core.

ΔW = s · B·A with s = alpha / r, or alpha / √r (rsLoRA).  Shapes, r being the rank:

- linear: A (r, in_features), B (out_features, r); ΔW (out_features, in_features)
- convolution: A (r, in_channels, *kernel), B (out_channels, r, 1, …); ΔW (out_channels, in_channels, *kernel)
- convolution with a Tucker core `mid` (r, r, *kernel): A (r, in_channels, 1, …), B (out_channels, r, 1, …)
- embedding: A (r, num_embeddings), B (embedding_dim, r); ΔW = s · (B·A)ᵀ (num_embeddings, embedding_dim)
- `magnitude` (n,): DoRA's m, one number an output (axis "out") or an input (axis "in"):
  W' = m · (W + ΔW) / ‖W + ΔW‖, the norm taken over the other axes
- `bias` (out_features,): of B; s · bias is added to the module's output
- `monteclora_sampler.*`, `velora_embed`: what MonteCLoRA (https://arxiv.org/abs/2411.04358) and VeLoRA
  (https://arxiv.org/abs/2405.17991) draw or project with while they train; inference uses A and B alone

MiCA, LoRA-FA and other ways to start or to train leave nothing behind but A and B.

Sources: LoRA https://arxiv.org/abs/2106.09685; rsLoRA https://arxiv.org/abs/2312.03732; DoRA
https://arxiv.org/abs/2402.09353; layers in peft `tuners/lora/layer.py`, axes and Tucker core in LyCORIS
`lycoris/modules/locon.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, array_error, need, need_own, tensor_error, worst
from adapterops.methods.magnitude import normalised
from adapterops.methods.products import Rows
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Lora(Method):
    """The LoRA family."""

    name = "lora"
    title = "LoRA (with DoRA, rsLoRA, LoCon)"
    formula = "ΔW = s·B·A, s = alpha/r (rsLoRA: alpha/√r); with a magnitude W' = m·(W + ΔW)/‖W + ΔW‖; Δb = s·bias"
    form = "B and A as they are, magnitude and bias kept"
    source = "https://arxiv.org/abs/2106.09685"
    scaled = True
    rows = frozenset({"B", "bias", "magnitude"})
    compared = frozenset({"monteclora_config", "velora_config"})  # they concern training alone
    pairs: ClassVar[tuple[tuple[str, str], ...]] = (("B", "A"),)

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b, mid = update.tensors["A"], update.tensors["B"], update.tensors.get("mid")
        for factor in (a, b):
            if len(factor.shape) < 2 or 0 in factor.shape:
                raise BrokenAdapter(
                    f"{factor.where}: shape {list(factor.shape)} is no low-rank factor (an unsharded export?)",
                    fault="empty" if 0 in factor.shape else "impossible-shape",
                )
        inner = mid.shape[0] if mid is not None else a.shape[0]
        outer = mid.shape[1] if mid is not None and len(mid.shape) > 1 else a.shape[0]
        if b.shape[1] != inner or a.shape[0] != outer:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )
        if prod(b.shape[2:]) != 1:
            raise BrokenAdapter(f"{b.where}: shape {list(b.shape)}; the second factor must have a 1×1 kernel")
        magnitude = update.tensors.get("magnitude")
        if magnitude is not None:
            axis, size = update.options["dora_axis"], self._outputs(update)
            size = a.shape[1] if axis == "in" else size
            if magnitude.numel != size:
                raise BrokenAdapter(
                    f"{magnitude.where}: shape {list(magnitude.shape)}; a DoRA magnitude per {axis}put of this module "
                    f"has {size} elements"
                )

    def _outputs(self, update: Update) -> int:
        """The size of the axis that peft's DoRA keeps."""
        return update.tensors["B"].shape[0]

    def rank(self, update: Update) -> int:
        return update.tensors["B"].shape[1]

    def scale(self, update: Update) -> float | None:
        if update.alpha is None or update.alpha.value is None:
            return None
        rank = self.rank(update)
        return update.alpha.value / (sqrt(rank) if update.rslora else rank)

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None:
            return True  # half an update: `check` says so better than a shape could
        if len(shape) < 2 or len(a.shape) < 2 or len(b.shape) < 2:
            return False
        if update.options.get("kind") == "embedding":
            return (a.shape[1], b.shape[0]) == shape
        mid = update.tensors.get("mid")
        kernel = mid.shape[2:] if mid is not None else a.shape[2:]
        if b.shape[0] != shape[0]:
            return False
        # Some writers keep the 1×1 kernel of a convolution, some drop it, some flatten a larger one into the inputs.
        return (a.shape[1], prod(kernel)) == (shape[1], prod(shape[2:])) or a.shape[1] == prod(shape[1:])

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        if update.options.get("dora_axis") == "in":
            raise CannotRepresent(
                f"{update.name}: its DoRA magnitude (tensor {update.tensors['magnitude'].key!r}) is per input: the norm "
                "goes over all rows of the fused projection, so its parts cannot have magnitudes of their own; a target "
                "that keeps the projection whole holds it (--to kohya, --to comfy)"
            )
        return super().take_rows(update, pieces)

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = self.scale(update)
        assert scale is not None
        return {role: t.mapped(dtype, scale if role in ("B", "bias") else 1.0) for role, t in update.tensors.items()}

    def factors(self, update: Update) -> tuple[Array, Array]:
        """B (out, r) times the scale, and A (r, in · kernel), in float64.

        Raises `CannotRepresent` where alpha is unknown.
        """
        scale = self.scale(update)
        if scale is None:
            raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
        b, a = self.unscaled(update)
        return b * scale, a

    def unscaled(self, update: Update) -> tuple[Array, Array]:
        """B (out, r) and A (r, in · kernel) in float64, the scale aside."""
        import numpy as np

        rank = self.rank(update)
        a = update.tensors["A"].numpy().astype(np.float64)
        mid = update.tensors.get("mid")
        if mid is not None:
            a = np.einsum("rs...,si->ri...", mid.numpy().astype(np.float64), a.reshape(rank, -1))
        b = update.tensors["B"].numpy().astype(np.float64)
        return b.reshape(-1, rank), a.reshape(rank, -1)

    def norm(self, update: Update) -> float | None:
        return factor_norm(*self.factors(update))

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        a, b, mid = update.tensors["A"], update.tensors["B"], update.tensors.get("mid")
        return (b.shape[0], a.shape[1], *(mid.shape[2:] if mid is not None else a.shape[2:]))

    def exact_rank(self, update: Update) -> int | None:
        return self.rank(update)

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        # torch computes with no 8-bit floats.
        a, b = (t.float() if t.element_size() == 1 else t for t in (update.tensors[role].torch() for role in "AB"))
        mid = update.tensors.get("mid")
        if mid is not None:
            rank, inner = b.shape[1], a.shape[0]
            a = torch.einsum("rs...,si->ri...", mid.torch().double(), a.reshape(inner, -1).double())
            return b.reshape(-1, rank).double(), a.reshape(rank, -1)
        return b.reshape(b.shape[0], b.shape[1]), a.reshape(a.shape[0], -1)

    def matrix(self, update: Update) -> Rows:
        b, a = self.factors(update)
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32 before any DoRA normalisation (which needs the base weight)."""
        import torch

        b, a = self.factors(update)
        product = torch.from_numpy(b @ a).float()
        if update.options.get("kind") == "embedding":
            return product.T.contiguous()
        return product.reshape(self.weight_shape(update) or tuple(product.shape))

    def change(self, update: Update, own: Own | None = None) -> Change:
        """ΔW, normalised as DoRA does where there is a magnitude, and s · `bias`.

        Raises `CannotRepresent` where a magnitude needs the base's weight and it is not there; `BrokenAdapter` where that
        weight is of another size.
        """
        delta = self.delta(update)
        bias = update.tensors.get("bias")
        scale = self.scale(update) or 0.0  # known, since `delta` was
        moved = bias.torch().double().reshape(-1) * scale if bias is not None else None
        weight: torch.Tensor = delta
        if own is not None:
            weight = as_shaped(update, delta, own)
        if "magnitude" in update.tensors:
            weight, factor = normalised(update, need_own(update, own).weight, weight)
            if moved is not None and factor is not None:
                moved = moved * factor
        return Change(weight, moved.float() if moved is not None else None)

    def error(self, update: Update, other: Update) -> float:
        extra, others = ({k: v for k, v in u.tensors.items() if k not in _PRODUCT} for u in (update, other))
        if extra.keys() != others.keys() or update.options.get("dora_axis") != other.options.get("dora_axis"):
            return float("inf")
        errors = [tensor_error(t, others[role]) for role, t in extra.items() if role != "bias"]
        if "bias" in extra:
            one, two = (t.numpy().astype("f8") for t in (extra["bias"], others["bias"]))
            # The bias is B's, so the scale acts on it too.
            scales = [1.0 if (s := self.scale(u)) is None else s for u in (update, other)]
            errors.append(array_error(scales[0] * one, scales[1] * two))
        b, a = self.factors(update)
        b2, a2 = self.factors(other)
        if (b.shape[0], a.shape[1]) != (b2.shape[0], a2.shape[1]):
            return float("inf")
        return worst([product_error(b, a, b2, a2), *errors])


_PRODUCT = frozenset({"A", "B", "mid", "diag"})
"""The roles that ΔW is made of."""


def as_shaped(update: Update, delta: torch.Tensor, own: Own) -> torch.Tensor:
    """ΔW in the shape of the base's weight (a file may hold a kernel flattened).

    Raises `BrokenAdapter` where that weight is of another size.
    """
    shape = tuple(own.weight.shape)
    if delta.shape[0] != shape[0] or delta.numel() != prod(shape):
        first = next(iter(update.tensors.values()))
        raise BrokenAdapter(
            f"{first.where}: {update.name} changes a weight {list(delta.shape)}, and the base's is {list(shape)}: the adapter "
            "is for another base model"
        )
    return delta.reshape(shape)


def product_error(b: Array, a: Array, b2: Array, a2: Array) -> float:
    """‖b·a − b2·a2‖ / ‖b·a‖ (Frobenius; absolute where b·a is zero), without forming a product.

    Written as (b − b2)·a + b2·(a − a2) where the ranks agree, so that two nearly equal pairs do not cancel: the
    Gram matrices then carry the small difference itself.
    """
    import numpy as np

    same_a, same_b = (x.shape == y.shape and np.array_equal(x, y) for x, y in ((a, a2), (b, b2)))
    if same_a and same_b:
        return 0.0
    size = factor_norm(b, a)
    if same_a:
        difference = factor_norm(b - b2, a) if b.shape == b2.shape else inf
    elif same_b:
        difference = factor_norm(b, a - a2) if a.shape == a2.shape else inf
    elif b.shape == b2.shape and a.shape == a2.shape:
        difference = factor_norm(np.hstack([b - b2, b2]), np.vstack([a, a - a2]))
    else:
        difference = factor_norm(np.hstack([b, -b2]), np.vstack([a, a2]))
    return difference / size if size else difference


def factor_norm(b: Array, a: Array) -> float:
    """‖b·a‖ (Frobenius) from the two Gram matrices (r, r), without forming the product."""
    import numpy as np

    square = float(np.sum((b.T @ b) * (a @ a.T)))
    # Rounding may leave a zero slightly negative; NaN is to stay NaN.
    return 0.0 if square < 0 else sqrt(square)
