"""SHiRA on linear modules: some numbers of the weight change, each by itself.

ΔW[indices[0, t], indices[1, t]] += weight[t], zero elsewhere:

- `weight` (k,)
- `indices` (2, k): row and column of each; integers, or float32 where peft saved on Windows

peft trains k = r · (in_features + out_features) of them, as many as a LoRA of rank r has, and loads no other count; the
delta itself is of high rank.  The size of the module is not in the tensors.

Sources: https://arxiv.org/abs/2406.13175; peft `tuners/shira/layer.py`, `tuners/shira/model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Method, Own, need, need_shape
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

_PLACES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F32", "F64"})
"""Types that can count far enough."""


class Shira(Method):
    """SHiRA."""

    name = "shira"
    title = "SHiRA (sparse difference)"
    formula = "ΔW = the numbers at their indices, 0 elsewhere"
    source = "https://arxiv.org/abs/2406.13175"
    needs_shape = True
    compared = frozenset({"shape"})

    def check(self, update: Update) -> None:
        need(update, "weight", "indices")
        weight, indices = update.tensors["weight"], update.tensors["indices"]
        if len(weight.shape) != 1 or not weight.numel:
            raise BrokenAdapter(f"{weight.where}: shape {list(weight.shape)} is no list of numbers of a weight")
        if indices.shape != (2, weight.numel):
            raise BrokenAdapter(
                f"{indices.where}: shape {list(indices.shape)}; {weight.numel} numbers ({weight.key!r}) need their rows and "
                f"columns: [2, {weight.numel}]"
            )
        if indices.dtype not in _PLACES:
            raise BrokenAdapter(
                f"{indices.where}: dtype {indices.dtype} holds no large integers, so rows and columns are lost (a tool "
                "cast the whole file?)"
            )
        shape = update.options.get("shape")
        if shape is not None and not self.fits(update, tuple(shape)):
            raise self._misfit(update, tuple(shape))

    def budget(self, update: Update) -> int:
        """r of the config: the rank of a LoRA of as many numbers.  Raises `CannotRepresent` without the module's shape."""
        return update.tensors["weight"].numel // sum(need_shape(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        weight = update.tensors.get("weight")
        if weight is None or len(weight.shape) != 1:
            return True  # `check` says it better than a shape could
        return len(shape) == 2 and weight.numel % sum(shape) == 0 and weight.numel <= shape[0] * shape[1]

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["weight"])

    def norm(self, update: Update) -> float:
        import numpy as np

        return float(np.linalg.norm(self._sparse(update)[1]))

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        shape = update.options.get("shape")
        return None if shape is None else tuple(shape)

    def delta(self, update: Update) -> torch.Tensor:
        return self._dense(update, need_shape(update))

    def change(self, update: Update, own: Own | None = None) -> Change:
        """W' − W; `own` says the shape where nothing else did."""
        if own is None:
            return Change(self.delta(update))
        shape = tuple(own.weight.shape)
        if not self.fits(update, shape):
            raise self._misfit(update, shape)
        return Change(self._dense(update, shape))

    def error(self, update: Update, other: Update) -> float:
        import numpy as np

        (one, a), (two, b) = self._sparse(update), self._sparse(other)
        places, where = np.unique(np.vstack([one, two]), axis=0, return_inverse=True)
        difference = np.zeros(len(places))
        where = where.reshape(-1)
        difference[where[: len(one)]] = a
        difference[where[len(one) :]] -= b
        size, apart = float(np.linalg.norm(a)), float(np.linalg.norm(difference))
        return apart / size if size else apart

    def _sparse(self, update: Update) -> tuple[Array, Array]:
        """The places (n, 2), each once and in order, and their numbers (n,) in float64."""
        import numpy as np

        indices = update.tensors["indices"]
        stated = indices.numpy()
        places = stated.astype(np.int64)
        if (places != stated).any() or (places < 0).any():
            raise BrokenAdapter(f"{indices.where}: rows and columns must be whole numbers from 0 on ({update.name})")
        places, where = np.unique(places.T, axis=0, return_inverse=True)
        values = np.zeros(len(places))
        np.add.at(values, where.reshape(-1), update.tensors["weight"].numpy().astype("f8"))
        return places, values

    def _dense(self, update: Update, shape: tuple[int, ...]) -> torch.Tensor:
        """ΔW (out, in) in float32."""
        import torch

        places, values = self._sparse(update)
        if (places >= shape).any():
            indices = update.tensors["indices"]
            raise BrokenAdapter(
                f"{indices.where}: a place at row {places[:, 0].max()} or column {places[:, 1].max()} lies outside of "
                f"{update.module}, whose weight is {list(shape)} (another base model?)"
            )
        out = torch.zeros(shape, dtype=torch.float32)
        out[tuple(torch.from_numpy(places).T)] = torch.from_numpy(values).float()
        return out

    def _misfit(self, update: Update, shape: tuple[int, ...]) -> BrokenAdapter:
        weight = update.tensors["weight"]
        return BrokenAdapter(
            f"{weight.where}: {weight.numel} numbers; SHiRA changes r · (in + out) numbers of {update.module}, whose weight "
            f"is {list(shape)}, and no whole r gives that many (another base model?)"
        )
