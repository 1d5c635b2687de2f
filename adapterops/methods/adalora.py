"""AdaLoRA: triplets of a left vector, a value and a right vector, of which training keeps the important ones.

ΔW = s · B·(A ∘ E) with s = alpha / (n + 10⁻⁵).  Shapes, r being the number of triplets that the file has:

- A (r, in_features), B (out_features, r), E (r, 1); ΔW (out_features, in_features)
- two-dimensional convolution (peft only): A (r, in_channels · kernel), the kernel flattened
- `ranknum` (1,) or (): n, as the authors' loralib stores it

peft does not store n.  Its layers begin with n = `init_r`, the config's, and keep that n when `rank_pattern` makes the tensors
smaller, so that taking triplets away never changes the scale of the others.  Without a rank pattern every module has init_r
triplets.  An alpha that is not positive stands for the number of triplets that the module has (for init_r in loralib, which
keeps masked triplets).  `use_rslora` has no effect in either.

A triplet is masked by its value 0; it adds nothing and is left out of the low-rank form, so ranks differ from module to
module, and a module may have none left.

Sources: https://arxiv.org/abs/2303.10512; peft `tuners/adalora/layer.py`, `tuners/adalora/model.py`
(`resize_modules_by_rank_pattern`); QingruZhang/AdaLoRA `loralib/loralib/adalora.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, setting, tensor_error
from adapterops.methods.lora import as_shaped, factor_norm, product_error
from adapterops.methods.products import Rows

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

EPSILON = 1e-5
"""What both implementations add to n."""


class AdaLora(Method):
    """AdaLoRA."""

    name = "adalora"
    title = "AdaLoRA"
    formula = "ΔW = s·B·(A ∘ E), s = alpha/(ranknum + 1e-5); peft: ranknum = init_r"
    form = "the triplets whose value is not 0"
    source = "https://arxiv.org/abs/2303.10512"
    scaled = True
    rows = frozenset({"B"})
    compared = frozenset({"init_r", "shape", "rank_pattern"})

    def check(self, update: Update) -> None:
        need(update, "A", "B", "E")
        a, b, e = (update.tensors[role] for role in "ABE")
        for factor in (a, b):
            # No triplet at all is what a module has when every one of them was masked.
            if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (a.shape[-1], b.shape[0]):
                raise BrokenAdapter(
                    f"{factor.where}: shape {list(factor.shape)} is no factor of AdaLoRA, which is a matrix (a convolution's "
                    "kernel is flattened)"
                )
        if b.shape[1] != a.shape[0] or e.numel != a.shape[0]:
            raise BrokenAdapter(
                f"{e.where}: shape {list(e.shape)} between {b.key!r} {list(b.shape)} and {a.key!r} {list(a.shape)}; each "
                "triplet has one row of lora_A, one value, one column of lora_B",
                fault="ranks",
            )
        count, stated = update.tensors.get("ranknum"), update.options.get("init_r")
        if count is not None and count.numel != 1:
            raise BrokenAdapter(f"{count.where}: shape {list(count.shape)}; ranknum is one number")
        if count is None and stated is not None and stated < a.shape[0]:
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)} has {a.shape[0]} triplets, and AdaLoRA began with {stated} (init_r); it "
                "only takes triplets away"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def scale(self, update: Update) -> float | None:
        """alpha / (n + 10⁻⁵).  Raises `CannotRepresent` where nothing says n."""
        if update.alpha is None or update.alpha.value is None:
            return None
        alpha = update.alpha.value if update.alpha.value > 0 else float(self.rank(update))
        return alpha / (self.started_with(update) + EPSILON)

    def started_with(self, update: Update) -> float:
        """n, by which alpha is divided.  Raises `CannotRepresent` where nothing says it."""
        count = update.tensors.get("ranknum")
        return count.item() if count is not None else float(setting(update, "init_r"))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        if not update.tensors.keys() >= {"A", "B"}:
            return True  # half an update: `check` says so better than a shape could
        a, b = update.tensors["A"], update.tensors["B"]
        if not a.shape or not b.shape:
            return True
        return len(shape) >= 2 and (b.shape[0], a.shape[-1]) == (shape[0], prod(shape[1:]))

    def triplets(self, update: Update) -> tuple[Array, Array, Array]:
        """B (out, r), E (r,) and A (r, in · kernel) in float64, the scale aside."""
        a, b, e = (update.tensors[role].numpy().astype("f8") for role in "ABE")
        return b, e.reshape(-1), a

    def importance(self, update: Update) -> Array:
        """‖ΔW‖ of each triplet alone, (r,): scale · |E_i| · ‖B_i‖ · ‖A_i‖.

        It is what the module's weight would lose with it.  The importance that AdaLoRA trains with (sensitivity of the loss,
        smoothed over steps) is in no file.  Raises `CannotRepresent` where the scale is unknown.
        """
        import numpy as np

        b, e, a = self.triplets(update)
        size: Array = abs(self._known(update)) * np.abs(e) * np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1)
        return size

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        out, inputs = update.tensors["B"].shape[0], update.tensors["A"].shape[1]
        shape = update.options.get("shape")
        return tuple(shape) if shape is not None and self.fits(update, tuple(shape)) else (out, inputs)

    def exact_rank(self, update: Update) -> int:
        return int((update.tensors["E"].numpy() != 0).sum())

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        """The triplets that are not masked, their values in A, in float64."""
        import torch

        b, a = self._factors(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def change(self, update: Update, own: Own | None = None) -> Change:
        """ΔW in the shape of the base's weight, where that is given.

        Raises `CannotRepresent` where the scale is unknown; `BrokenAdapter` where the base's weight is of another size.
        """
        delta = self.delta(update)
        return Change(delta if own is None else as_shaped(update, delta, own))

    def norm(self, update: Update) -> float:
        b, a = self._factors(update)
        return factor_norm(b * self._known(update), a)

    def matrix(self, update: Update) -> Rows:
        b, a = self._factors(update)
        b = b * self._known(update)
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)

    def error(self, update: Update, other: Update) -> float:
        (b, a), (b2, a2) = self._factors(update), self._factors(other)
        if (len(b), a.shape[1]) != (len(b2), a2.shape[1]):
            return float("inf")
        counts = [u.tensors.get("ranknum") for u in (update, other)]
        if counts[0] is not None and counts[1] is not None and tensor_error(counts[0], counts[1]):
            return float("inf")
        return product_error(b * self._known(update), a, b2 * self._known(other), a2)

    def _factors(self, update: Update) -> tuple[Array, Array]:
        b, e, a = self.triplets(update)
        kept = e != 0
        return b[:, kept], a[kept] * e[kept, None]

    def _known(self, update: Update) -> float:
        scale = self.scale(update)
        if scale is None:
            raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
        return scale
