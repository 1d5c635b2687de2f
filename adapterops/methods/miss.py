"""MiSS on linear modules: one block repeated over the whole weight; Bone is the same update under an older name.

`block`, r being the rank along the inputs:

- standard, and Bone's "bone": (r, out_features); ΔW[o, i] = block[i mod r, o]
- mini: (r, mini_r), repeated along the outputs too: ΔW[o, i] = block[i mod r, o mod mini_r]
- bat: (out_features / r, r, r), which mixes the weight's own blocks of r by r: with W_ij the block in row i and
  column j of them, ΔW_ij = W_ij·block_i + block_i

So all but bat are exactly of low rank: with P (r, in_features) that repeats the identity, ΔW = blockᵀ·P.  Where r does not
divide in_features, the last copy is cut off: peft pads the module's input with zeros (and its merge leaves the same
columns out).  bat needs r to divide both sizes.

`options["init_weights"]` is "bat", "mini", or what peft's config has for standard (true, false); the number of axes
tells bat, and the module's shape the other two (mini with mini_r = out_features is standard).  in_features is never in
the tensors.

peft 0.14 to 0.18 called it Bone (`bone_block`): same shapes, same maths, without mini.

Sources: https://arxiv.org/abs/2409.15371 (Bone, later MiSS); peft `tuners/miss/layer.py`; peft 0.17 `tuners/bone/layer.py`.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own, need_shape, tensor_error
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Miss(Method):
    """MiSS and Bone.  Only bat needs the base's weight; the others need the module's shape."""

    name = "miss"
    title = "MiSS (Bone)"
    formula = "ΔW = the block repeated over inputs (mini: and outputs); bat: each block of W times its own"
    form = "but for bat: rank r (mini: the smaller of r and mini_r)"
    source = "https://arxiv.org/abs/2409.15371"
    needs_shape = True
    compared = frozenset({"shape", "init_weights", "mini_r"})

    def check(self, update: Update) -> None:
        need(update, "block")
        block, stated = update.tensors["block"], update.options.get("init_weights")
        if len(block.shape) not in (2, 3) or 0 in block.shape:
            raise BrokenAdapter(
                f"{block.where}: shape {list(block.shape)} is no block of MiSS: (r, out_features), (r, mini_r) or, for "
                "bat, (out_features / r, r, r)"
            )
        if self.is_bat(update) and block.shape[1] != block.shape[2]:
            raise BrokenAdapter(f"{block.where}: shape {list(block.shape)}; the blocks of bat are square: (n, r, r)")
        if stated is not None and (stated == "bat") != self.is_bat(update):
            raise BrokenAdapter(
                f"{block.where}: shape {list(block.shape)} has {len(block.shape)} axes, but init_weights is {stated!r}; "
                "bat has three, the other kinds of MiSS have two (the config is another adapter's?)"
            )
        mini = update.options.get("mini_r")
        if stated == "mini" and mini is not None and block.shape[1] != mini:
            raise BrokenAdapter(
                f"{block.where}: shape {list(block.shape)}, but mini_r is {mini}; mini has a block (r, mini_r)"
            )
        shape = update.options.get("shape")
        if shape is not None and not self.fits(update, tuple(shape)):
            raise self._misfit(update, tuple(shape))

    def is_bat(self, update: Update) -> bool:
        """Whether the update is of the kind that depends on the base's weight."""
        return len(update.tensors["block"].shape) == 3

    def acts_on_base(self, update: Update) -> bool:
        return self.is_bat(update)

    def rank(self, update: Update) -> int:
        """r: the rank along the inputs."""
        block = update.tensors["block"]
        return block.shape[-1] if self.is_bat(update) else block.shape[0]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        block = update.tensors.get("block")
        if block is None or len(block.shape) not in (2, 3) or 0 in block.shape:
            return True  # `check` says it better than a shape could
        if len(shape) != 2:
            return False
        if len(block.shape) == 3:
            return shape[0] == block.shape[0] * block.shape[1] and shape[1] % block.shape[1] == 0
        stated = update.options.get("init_weights")
        if stated is None or stated == "mini":
            return shape[0] % block.shape[1] == 0
        return shape[0] == block.shape[1]

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["block"])

    def norm(self, update: Update) -> float | None:
        """‖ΔW‖; None for bat, and where the module's shape is not known."""
        shape = update.options.get("shape")
        if shape is None or self.is_bat(update):
            return None
        square = self._block(update) ** 2
        out, inputs = (_repeats(size, n) for size, n in zip(shape, reversed(square.shape), strict=True))
        return sqrt(float(inputs @ square @ out))

    def delta(self, update: Update) -> torch.Tensor:
        if self.is_bat(update):
            raise CannotRepresent(
                f"{update.name}: this MiSS is of the kind bat, which multiplies blocks of the base's own weight; its delta "
                "needs the base weight (--base-weights)"
            )
        return self._repeated(update, need_shape(update))

    def change(self, update: Update, own: Own | None = None) -> Change:
        """W' − W; `own` is needed for bat, and says the shape where nothing else did."""
        if not self.is_bat(update):
            if own is None:
                return Change(self.delta(update))
            self._insist(update, own)
            return Change(self._repeated(update, tuple(own.weight.shape)))
        import torch

        own = need_own(update, own)
        self._insist(update, own)
        block = torch.from_numpy(self._block(update))
        count, rank = block.shape[:2]
        weight = own.weight.double().reshape(count, rank, -1, rank)
        made = torch.einsum("iajk,ikb->iajb", weight, block) + block[:, :, None, :]
        return Change(made.float().reshape(own.weight.shape))

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        shape = update.options.get("shape")
        return None if shape is None or self.is_bat(update) else tuple(shape)

    def exact_rank(self, update: Update) -> int | None:
        """r, or mini_r where that is less; None for bat."""
        return None if self.is_bat(update) else min(update.tensors["block"].shape)

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        """blockᵀ repeated along the outputs, and the repeated identity; or, where mini_r < r, the other way round.

        Raises `CannotRepresent` where the module's shape is not known.
        """
        if self.is_bat(update):
            return None
        import torch

        out, inputs = need_shape(update)
        block = update.tensors["block"].torch()
        block = block.float() if block.element_size() == 1 else block  # torch computes with no 8-bit floats
        rank, width = block.shape
        column, row = torch.arange(inputs) % rank, torch.arange(out) % width
        if width < rank:
            return torch.eye(width, dtype=block.dtype)[row], block.T[:, column].contiguous()
        return block.T[row].contiguous(), torch.eye(rank, dtype=block.dtype)[:, column].contiguous()

    def error(self, update: Update, other: Update) -> float:
        one, two = update.tensors["block"], other.tensors["block"]
        return tensor_error(one, two) if one.shape == two.shape else float("inf")

    def _block(self, update: Update) -> Array:
        """The block in float64."""
        values: Array = update.tensors["block"].numpy().astype("f8")
        return values

    def _repeated(self, update: Update, shape: tuple[int, ...]) -> torch.Tensor:
        """ΔW (out, in) in float32."""
        import torch

        out, inputs = shape
        block = update.tensors["block"].torch().float()
        rank, width = block.shape
        return block.T[torch.arange(out) % width][:, torch.arange(inputs) % rank]

    def _insist(self, update: Update, own: Own) -> None:
        if not self.fits(update, tuple(own.weight.shape)):
            raise self._misfit(update, tuple(own.weight.shape))

    def _misfit(self, update: Update, shape: tuple[int, ...]) -> BrokenAdapter:
        block = update.tensors["block"]
        kind = "bat" if self.is_bat(update) else update.options.get("init_weights") or "MiSS"
        return BrokenAdapter(
            f"{block.where}: shape {list(block.shape)} is no block of {kind if isinstance(kind, str) else 'MiSS'} for "
            f"{update.module}, whose weight is {list(shape)} (another base model?)"
        )


def _repeats(size: int, period: int) -> Array:
    """How often each of `period` numbers is used when they are repeated over `size` places (period,)."""
    import numpy as np

    return np.bincount(np.arange(size) % period, minlength=period).astype("f8")
