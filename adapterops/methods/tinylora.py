"""TinyLoRA: a handful of numbers that weigh random matrices between frozen factors of the base's weight.

ΔW = B · (Σᵢ v[i] · P[i]) · A, exactly of rank r.  Roles:

- `A` (r, in_features), `B` (out_features, r): of the module, the halves of its base weight's truncated SVD; both are
  always saved.  On an embedding (`options["kind"]`, where the base is known) `A` is (r, embedding_dim) and `B`
  (num_embeddings, r), and ΔW (num_embeddings, embedding_dim): the same product, though its factors are given as a LoRA
  has them, the other way round
- `v` (u,): shared by the modules of a group; peft keeps the vectors of all groups as `tinylora_v.0`, `tinylora_v.1` …
- `P` (u, r, r): of the module, where it was saved (`save_projection`)

The adapter's modules, in the order in which the model has them, are numbered: `options["index"]`.  From this number and
the number of modules follows the group (`group`), so which vector is `v`; without `P`, it is drawn from
`options["projection_seed"]` + index.  Without the base the order is unknown, since files sort their keys; saved
projections give it back (`indices`), as each shows the seed that it was drawn from.

Sources: https://arxiv.org/abs/2602.04118; peft `tuners/tinylora/layer.py`, `tuners/tinylora/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import need
from adapterops.methods.shared import Factored, check_dimensions, check_vector, numbers, seed_of
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


def group(index: int, modules: int, groups: int) -> int:
    """The number of the vector that a module uses: all groups have `modules` // `groups` modules, the last one the rest.

    peft makes max(1, round(modules · (1 − weight_tying))) groups.
    """
    return min(index // max(1, modules // groups), groups - 1)


def drawn(seed: int, size: int, rank: int) -> torch.Tensor:
    """The matrices (size, rank, rank) that peft draws from a seed, in float32."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(size, rank, rank), generator=generator)


def indices(projections: Mapping[str, LazyTensor], seed: int) -> dict[str, int] | None:
    """The index of every module, found by drawing the saved projections (by module) again from the base seed `seed`.

    None where one of them was not drawn from it, here or on another kind of machine.
    """
    import torch

    found: dict[str, int] = {}
    left = {name: tensor.torch().float() for name, tensor in projections.items()}
    for index in range(len(left)):
        made: dict[tuple[int, ...], torch.Tensor] = {}
        for name, values in left.items():
            shape = tuple(values.shape)
            if len(shape) != 3 or 0 in shape:
                return None
            if shape not in made:
                made[shape] = drawn(seed + index, shape[0], shape[1])
            if torch.equal(made[shape], values):
                found[name] = index
                del left[name]
                break
        else:
            return None
    return found


class Tinylora(Factored):
    """TinyLoRA on linear modules and embeddings."""

    name = "tinylora"
    title = "TinyLoRA (random matrices between frozen factors)"
    formula = "ΔW = B·(Σ v_i·P_i)·A, B and A of W's SVD, P_i random"
    form = "rank r"
    source = "https://arxiv.org/abs/2602.04118"
    compared = frozenset({"shape", "index", "group", "kind"})

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        for factor in (a, b):
            check_dimensions(factor, 2)
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )
        v, p = update.tensors.get("v"), update.tensors.get("P")
        if v is not None:
            check_vector(v)
        if p is not None and (len(p.shape) != 3 or p.shape[1:] != (a.shape[0], a.shape[0])):
            raise BrokenAdapter(
                f"{p.where}: shape {list(p.shape)}; matrices ({a.shape[0]}, {a.shape[0]}) stand between {b.key!r} "
                f"{list(b.shape)} and {a.key!r} {list(a.shape)}"
            )
        if v is not None and p is not None and v.numel != p.shape[0]:
            raise BrokenAdapter(
                f"{p.where}: {p.shape[0]} matrices, but {v.key!r} weighs {v.numel}; they are not of one adapter"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            return True  # `check` says it better than a shape could
        return shape == (b.shape[0], a.shape[1])

    def is_nothing(self, update: Update) -> bool:
        v = update.tensors.get("v")
        return v is not None and is_zero(v)

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        out, inputs = update.tensors["B"].shape[0], update.tensors["A"].shape[1]
        return (inputs, out) if _is_embedding(update) else (out, inputs)

    def delta(self, update: Update) -> torch.Tensor:
        made = super().delta(update)
        return made.T.contiguous() if _is_embedding(update) else made

    def factors(self, update: Update) -> tuple[Array, Array]:
        import numpy as np

        v, p = update.tensors.get("v"), update.tensors.get("P")
        if v is None:
            other = "" if p is None else "; so does the seed of its saved projections (--set projection_seed=VALUE)"
            raise CannotRepresent(
                f"{update.name}: which of the adapter's vectors (tinylora_v) it uses follows from the order of the base's "
                f"modules; --base CONFIG says it{other}"
            )
        rank = self.rank(update)
        if p is not None:
            matrices = numbers(p)
        else:
            seed, index = seed_of(update, "projection_seed"), update.options.get("index")
            if index is None:
                raise CannotRepresent(
                    f"{update.name}: its projections were not saved (save_projection), and the seed that draws them depends "
                    "on the order of the base's modules; --base CONFIG says it"
                )
            matrices = drawn(seed + int(index), v.numel, rank).double().numpy()
        middle: Array = np.einsum("i,ijk->jk", numbers(v), matrices)
        b, a = numbers(update.tensors["B"]) @ middle, numbers(update.tensors["A"])
        return (a.T, b.T) if _is_embedding(update) else (b, a)


def _is_embedding(update: Update) -> bool:
    return update.options.get("kind") == "embedding"
