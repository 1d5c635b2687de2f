"""LoRA on some of the equal parts of a fused projection, by a grouped convolution: loralib's `MergedLinear`.

`enable_lora` is a list of as many true and false as the module's outputs have parts; e of them are true.

- A (n · q, in), B (rows, q) with rows = out · e / len(enable_lora), and n groups: rows g·rows/n … of B act on rows g·q … of A
- ΔW: the rows of s · B·A stand where `enable_lora` is true, in order, and zeros elsewhere
- s = alpha / r with r = n · q / e

loralib has n = e, so that q = r.  peft 0.1 and 0.2 kept it, B as (rows, q, 1), but with n = 2 whatever `enable_lora` says; what
they merged in evaluation had e groups and failed, and their forward is what is meant here.

n follows from the shapes.  `enable_lora` does from the module's outputs, where it has n parts; otherwise nothing in the
file says which of them are meant.

Sources: microsoft/LoRA `loralib/layers.py` (`MergedLinear`); huggingface/peft 0.2.0 `tuners/lora.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import need, setting
from adapterops.methods.blocks import block_diagonal
from adapterops.methods.lora import Lora
from adapterops.storage.tensor import LazyTensor, MemorySource

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Merged(Lora):
    """LoRA on parts of a fused projection."""

    name = "lora_merged"
    formula = "as LoRA, on some of the parts of a fused projection"
    form = "a block diagonal of the parts"
    title = "LoRA on parts of a projection (MergedLinear)"
    source = "microsoft/LoRA loralib/layers.py (MergedLinear)"
    pairs = ()
    needs_shape = True
    compared = frozenset({"shape", "enable_lora"})

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        flat = len(b.shape) == 2 or (len(b.shape) == 3 and b.shape[2] == 1)
        if len(a.shape) != 2 or not flat or 0 in (*a.shape, *b.shape):
            wrong = b if len(a.shape) == 2 and 0 not in a.shape else a
            raise BrokenAdapter(f"{wrong.where}: shape {list(wrong.shape)} is no factor of a grouped LoRA, a matrix")
        rank, width = a.shape[0], b.shape[1]
        if rank % width or b.shape[0] % (rank // width):
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} beside {a.key!r} {list(a.shape)}: {rank} rows of lora_A are not shared out "
                f"evenly to groups of {width}; they are not halves of one update",
                fault="ranks",
            )
        enabled = update.options.get("enable_lora")
        if enabled is None:
            return
        if not any(enabled) or rank % sum(enabled) or b.shape[0] % sum(enabled):
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} beside {a.key!r} {list(a.shape)} is not for {sum(enabled)} parts "
                f"(enable_lora {list(enabled)})"
            )
        shape = update.options.get("shape")
        if shape is not None and self.outputs(update) != shape[0]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} with enable_lora {list(enabled)} is for {self.outputs(update)} outputs, and "
                f"the module has {shape[0]}"
            )

    def groups(self, update: Update) -> int:
        """n."""
        return update.tensors["A"].shape[0] // update.tensors["B"].shape[1]

    def enabled(self, update: Update) -> list[bool]:
        """Which of the equal parts of the outputs are adapted.  Raises `CannotRepresent` where nothing says it."""
        stated, shape = update.options.get("enable_lora"), update.options.get("shape")
        if stated is None and shape is not None and shape[0] == update.tensors["B"].shape[0]:
            return [True] * self.groups(update)
        return [bool(part) for part in setting(update, "enable_lora")]

    def outputs(self, update: Update) -> int:
        """The module's outputs.  Raises `CannotRepresent` where nothing says which parts of them are adapted."""
        enabled = self.enabled(update)
        return update.tensors["B"].shape[0] // sum(enabled) * len(enabled)

    def rank(self, update: Update) -> int:
        """r, as the config that it was trained with says it."""
        enabled = update.options.get("enable_lora")
        return update.tensors["A"].shape[0] // (sum(enabled) if enabled else self.groups(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        if not update.tensors.keys() >= {"A", "B"}:
            return True  # half an update: `check` says so better than a shape could
        a, b = update.tensors["A"], update.tensors["B"]
        if len(shape) != 2 or a.shape[1] != shape[1]:
            return False
        if update.options.get("enable_lora") is not None:
            return self.outputs(update) == shape[0]
        part = b.shape[0] // self.groups(update)
        return shape[0] >= b.shape[0] and shape[0] % part == 0

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        return self.outputs(update), update.tensors["A"].shape[1]

    def exact_rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        raise CannotRepresent(
            f"{update.name}: its groups (tensor {update.tensors['B'].key!r}) are parts of a projection already; adapterops "
            "to-lora makes plain LoRA of it, which can be split"
        )

    def unscaled(self, update: Update) -> tuple[Array, Array]:
        import numpy as np

        enabled = self.enabled(update)
        a, b = update.tensors["A"].numpy().astype("f8"), update.tensors["B"].numpy().astype("f8")
        made = block_diagonal(b.reshape(b.shape[:2]), self.groups(update))
        out = np.zeros((len(enabled), len(made) // sum(enabled), made.shape[1]))
        out[np.array(enabled)] = made.reshape(sum(enabled), -1, made.shape[1])
        return out.reshape(-1, made.shape[1]), a

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        b, a = self.unscaled(update)
        return torch.from_numpy(b), torch.from_numpy(a)


def as_lora(update: Update) -> Update:
    """The same update as plain LoRA of rank n · q: B with its zeros written out, in its own dtype, and the same scale.

    Raises `CannotRepresent` where nothing says which parts of the module are adapted.
    """
    from adapterops.storage import dtypes

    method = Merged()
    b, stored, rank = method.unscaled(update)[0], update.tensors["B"], method.exact_rank(update)
    dtype = stored.dtype if stored.dtype in dtypes.FLOATS else "F32"
    values = MemorySource(dtypes.from_numpy(dtype, b), stored.source.path)
    wide = LazyTensor(stored.key, dtype, (len(b), rank), values, 0)
    options = {name: value for name, value in update.options.items() if name not in ("enable_lora", "shape")}
    alpha, scale = update.alpha, method.scale(update)
    if alpha is not None and scale is not None:
        alpha = replace(alpha, value=scale * rank)
    tensors = {**update.tensors, "B": wide}
    return replace(update, method="lora", tensors=tensors, alpha=alpha, rslora=False, options=options)
