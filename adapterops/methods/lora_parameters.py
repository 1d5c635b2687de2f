"""LoRA on a bare parameter of a module: the stacked weights of experts, which peft targets with `target_parameters`.

The parameter is (E, out, in), or (E, in, out) where the module says `is_transposed` (GPT-OSS, Aria), or (out, in), which is
E = 1.  r being the rank, s = alpha / r, or alpha / √r (rsLoRA):

- A (E · r, in): the row e·r + i is row i of expert e's A (r, in)
- B (out, r · E): the column i·E + e is column i of expert e's B (out, r): experts and ranks stand the other way round
- ΔW[e] = s · B_e·A_e, or (s · B_e·A_e)ᵀ where the parameter is (E, in, out)

`options["shape"]` is the parameter's, `options["num_experts"]` or `options["r"]` gives E where no base is known, and
`options["is_transposed"]` the layout where the shape does not show it (no base, or square weights).  Releases of peft before
the one that looks at `is_transposed` took every parameter as (E, in, out): their A has `shape[1]` columns, so that the shapes
tell them apart but where both sizes are equal.  With one expert peft never transposes.

peft allows neither DoRA, a bias, nor another variant of LoRA beside it.

Several parameters of one module nest: the factors of the first one that peft comes to stand under
`base_layer.base_layer…`, those of the last under the module's own name, and no key says which parameter it is.  peft goes
through a module's parameters in the order in which the module defines them; `which` finds the ones whose shapes fit.

Sources: https://arxiv.org/abs/2106.09685; peft `tuners/lora/layer.py` (`ParamWrapper`), `tuners/tuners_utils.py`
(`_inject_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import AmbiguousFormat, BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need
from adapterops.methods.lora import as_shaped, factor_norm, product_error
from adapterops.methods.products import Rows, alpha_over_rank, known
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class LoraParameters(Method):
    """LoRA on a parameter, one pair of factors an expert."""

    name = "lora_parameters"
    formula = "ΔW of each expert = s·B·A, or its transpose, on a bare parameter"
    form = ""
    title = "LoRA on parameters (experts)"
    source = "peft tuners/lora/layer.py (ParamWrapper)"
    scaled = True
    needs_shape = True
    compared = frozenset({"shape", "num_experts", "r", "is_transposed", "target_parameters"})

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        for factor in (a, b):
            if len(factor.shape) != 2 or 0 in factor.shape:
                raise BrokenAdapter(
                    f"{factor.where}: shape {list(factor.shape)} is no factor of stacked experts, a matrix"
                )
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has {b.shape[1]} columns, but {a.key!r} {list(a.shape)} has {a.shape[0]} "
                "rows (experts · rank); they are not halves of one update",
                fault="ranks",
            )
        count = self._stated_experts(update)
        if count is not None and (count < 1 or a.shape[0] % count):
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)}; {a.shape[0]} rows are no whole rank for each of {count} experts"
            )
        shape = update.options.get("shape")
        if shape is not None and not self.fits(update, tuple(shape)):
            raise BrokenAdapter(
                f"{a.where}: {list(a.shape)} and {b.key!r} {list(b.shape)} make weights {[b.shape[0], a.shape[1]]}, and the "
                f"parameter is {list(shape)} ({update.name})"
            )

    def experts(self, update: Update) -> int:
        """E.  Raises `CannotRepresent` where nothing says it."""
        count = self._stated_experts(update)
        if count is None:
            raise self._unknown(update, "how many experts there are")
        return count

    def _stated_experts(self, update: Update) -> int | None:
        shape, options = update.options.get("shape"), update.options
        if shape is not None:
            return int(shape[0]) if len(shape) == 3 else 1
        if options.get("num_experts") is not None:
            return int(options["num_experts"])
        rank = options.get("r")
        return None if not rank else update.tensors["A"].shape[0] // int(rank)

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0] // self.experts(update)

    def scale(self, update: Update) -> float | None:
        if update.alpha is None or update.alpha.value is None:
            return None
        return alpha_over_rank(update, self.rank(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        if not update.tensors.keys() >= {"A", "B"}:
            return True  # half an update: `check` says so better than a shape could
        a, b = update.tensors["A"].shape, update.tensors["B"].shape
        sizes, rank = (b[0], a[-1]), update.options.get("r")
        count = shape[0] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or not count or a[0] % count or (rank and a[0] != rank * count):
            return False
        if len(shape) == 2:
            return sizes == tuple(shape)
        return sizes == tuple(shape[1:]) or (shape[0] > 1 and sizes == (shape[2], shape[1]))

    def transposed(self, update: Update) -> bool:
        """Whether the parameter is (E, in, out).  Raises `CannotRepresent` where nothing says it."""
        a, b, shape = update.tensors["A"], update.tensors["B"], update.options.get("shape")
        if self.experts(update) == 1:
            return False
        if shape is not None and a.shape[1] != b.shape[0]:
            return (b.shape[0], a.shape[1]) != tuple(shape[1:])
        if update.options.get("is_transposed") is None:
            raise self._unknown(update, "whether the experts' weights are kept transposed")
        return bool(update.options["is_transposed"])

    def _unknown(self, update: Update, what: str) -> CannotRepresent:
        return CannotRepresent(
            f"{update.tensors['A'].where}: nothing in the file tells {what} ({update.name}); --base CONFIG, the base model's "
            "config or folder, does"
        )

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        out, inputs = update.tensors["B"].shape[0], update.tensors["A"].shape[1]
        count, shape = self.experts(update), update.options.get("shape")
        if count == 1 and (shape is None or len(shape) == 2):
            return out, inputs
        return (count, inputs, out) if self.transposed(update) else (count, out, inputs)

    def factors(self, update: Update) -> Iterator[tuple[Array, Array]]:
        """B_e (out, r) and A_e (r, in) of each expert in float64, the scale aside."""
        a, b = (update.tensors[role].numpy().astype("f8") for role in "AB")
        count, rank = self.experts(update), self.rank(update)
        for expert in range(count):
            yield b[:, expert::count], a[expert * rank : (expert + 1) * rank]

    def exact_rank(self, update: Update) -> int | None:
        """r for a single expert.  A stack of weights is no matrix of low rank."""
        return self.rank(update) if len(self.weight_shape(update)) == 2 else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        if len(self.weight_shape(update)) != 2:
            return None
        return update.tensors["B"].torch(), update.tensors["A"].torch()

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32 in the shape of the parameter, an expert at a time."""
        import torch

        scale, shape = known(update, self.scale(update)), self.weight_shape(update)
        out = torch.empty(shape, dtype=torch.float32)
        flip = self.transposed(update)
        for made, (b, a) in zip(out if len(shape) == 3 else [out], self.factors(update), strict=True):
            product = torch.from_numpy(b @ a * scale)
            made.copy_(product.T if flip else product)
        return out

    def change(self, update: Update, own: Own | None = None) -> Change:
        """ΔW of the parameter; `own.weight` is that parameter as the module has it.

        Raises `BrokenAdapter` where it is of another size.
        """
        delta = self.delta(update)
        return Change(delta if own is None else as_shaped(update, delta, own))

    def matrix(self, update: Update) -> Rows:
        """ΔW as (E, out · in), a row an expert."""
        import numpy as np

        scale, shape, flip = known(update, self.scale(update)), self.weight_shape(update), self.transposed(update)
        if len(shape) == 2:
            return super().matrix(update)
        pairs = list(self.factors(update))

        def at(start: int, stop: int) -> Array:
            made = [(b @ a * scale).T if flip else b @ a * scale for b, a in pairs[start:stop]]
            return np.stack([part.reshape(-1) for part in made])

        return Rows((shape[0], prod(shape[1:])), at)

    def norm(self, update: Update) -> float:
        scale = known(update, self.scale(update))
        return sqrt(sum(factor_norm(b * scale, a) ** 2 for b, a in self.factors(update)))

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = known(update, self.scale(update))
        return {role: t.mapped(dtype, scale if role == "B" else 1.0) for role, t in update.tensors.items()}

    def error(self, update: Update, other: Update) -> float:
        if self.weight_shape(update) != self.weight_shape(other):
            return float("inf")
        scales = [known(u, self.scale(u)) for u in (update, other)]
        size = difference = 0.0
        for (b, a), (b2, a2) in zip(self.factors(update), self.factors(other), strict=True):
            own = factor_norm(b * scales[0], a)
            # `product_error` is absolute where there is nothing to be relative to.
            difference += (product_error(b * scales[0], a, b2 * scales[1], a2) * (own or 1.0)) ** 2
            size += own**2
        return sqrt(difference / size) if size else sqrt(difference)


LORA_PARAMETERS = LoraParameters()


def which(
    levels: Sequence[Update], parameters: Mapping[str, tuple[int, ...]], named: Sequence[str] | None = None
) -> list[str]:
    """The parameter that each of the nested updates of one module acts on.

    `levels` are the updates from the innermost key (`base_layer.base_layer`) to the module's own; `parameters` the shapes of
    the module's own parameters in the order of their definition, which is the order of the nesting; `named` those that a
    config's `target_parameters` picks, where it is known.

    Raises `BrokenAdapter` where no choice of parameters has these shapes, `AmbiguousFormat` where several have.
    """
    names = [name for name in parameters if named is None or name in named]
    choices = [
        list(chosen)
        for chosen in combinations(names, len(levels))
        if all(LORA_PARAMETERS.fits(u, parameters[name]) for u, name in zip(levels, chosen, strict=True))
    ]
    if len(choices) == 1:
        return choices[0]
    shapes = ", ".join(f"{name} {list(parameters[name])}" for name in names) or "none"
    made = ", ".join(f"{[u.tensors['B'].shape[0], u.tensors['A'].shape[1]]}" for u in levels)
    where = next(iter(levels[0].tensors.values())).where
    if not choices:
        raise BrokenAdapter(
            f"{where}: the factors of {levels[0].name} make weights {made} (first parameter first), and no parameters of the "
            f"base's module fit: {shapes}"
        )
    raise AmbiguousFormat(
        f"{where}: the factors of {levels[0].name} make weights {made}, and that may be {' or '.join(map(_listed, choices))}; "
        f"say which with --set target_parameters='[\"…{choices[0][0]}\"]'",
        fault="parameters-ambiguous",
    )


def _listed(names: Sequence[str]) -> str:
    return " then ".join(names)
