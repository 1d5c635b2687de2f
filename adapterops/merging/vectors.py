"""Biases, norms, the bias of a LoRA's B and the vectors of (IA)³, merged.

The rule: a method that acts entry by entry does so on vectors, too (sign election weighted, whatever it does on factors: a
vector is a delta); one whose result is a weighted sum of the deltas takes a vector for a delta of one column; for any other
one vectors are added up by their weights.  (IA)³ multiplies the weight by m, so what is merged is m − 1, which its delta is
proportional to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterops.errors import CannotRepresent, UsageError
from adapterops.linalg.random import Draw
from adapterops.merging.modules import Module, Vector
from adapterops.merging.registry import Kind, Space
from adapterops.merging.settings import Choice, Settings
from adapterops.merging.stack import TensorStack
from adapterops.proof import check_finite

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """Vectors of one role that are merged into one."""

    module: Module
    method: str
    role: str
    vectors: Sequence[Vector]
    choice: Choice
    shape: tuple[int, ...]


def plan(module: Module, method: str, role: str, choice: Choice) -> VectorPlan:
    """What merging the module's vectors of that method and role will give.

    Raises `UsageError` where their lengths differ, `CannotRepresent` where they do not act alike.
    """
    vectors = module.vectors[method, role]
    first = vectors[0].update
    sizes = {_length(vector): vector for vector in vectors}
    if len(sizes) > 1:
        listed = ", ".join(f"{size} ({v.update.tensors[v.role].where})" for size, v in sizes.items())
        raise UsageError(f"{module.title}: its {role} has different lengths: {listed}: different base models")
    if method == "ia3":
        _insist_alike(module, vectors)
    tensor = first.tensors[role]
    # Which of the axes has the numbers stays as it was.
    length = _length(vectors[0])
    shape = tuple(length if n == tensor.numel else n for n in tensor.shape) if vectors[0].pieces else tensor.shape
    return VectorPlan(module, method, role, vectors, choice, shape)


def _length(vector: Vector) -> int:
    if vector.pieces is not None:
        return sum(stop - start for start, stop in vector.pieces)
    return vector.update.tensors[vector.role].numel


def _insist_alike(module: Module, vectors: Sequence[Vector]) -> None:
    first = vectors[0].update
    for vector in vectors[1:]:
        if any(vector.update.options.get(k) != first.options.get(k) for k in ("on_input", "initial")):
            raise CannotRepresent(
                f"{vector.update.tensors['vector'].where}: {module.title} is multiplied on another side, or spelled from "
                f"another start, than in {first.tensors['vector'].source.path}; convert both to one format first"
            )
    if module.terms:
        raise CannotRepresent(
            f"{first.tensors['vector'].where}: (IA)³ multiplies the weight of {module.title}, to which another adapter "
            "adds: what they do together depends on the order; leave one of them out there (a weights file: weight 0)"
        )


def compute(p: VectorPlan, settings: Settings, dtype: torch.dtype) -> torch.Tensor:
    """The merged vector, in `dtype`."""
    import torch

    check_finite(vector.update for vector in p.vectors)
    initial = float(p.vectors[0].update.options["initial"]) if p.method == "ia3" else 0.0
    rows = [_values(vector) * vector.scale - initial for vector in p.vectors]
    weights = [vector.weight for vector in p.vectors]
    kind = p.choice.method.kind
    if kind is Kind.ELEMENTS and p.choice.method.name != "linear":
        streams = [Draw(settings.seed, p.module.component, p.module.name, p.role, v.adapter) for v in p.vectors]
        absent = p.module.among - len(rows)
        stack = TensorStack([row.reshape(1, -1) for row in rows], weights, streams, absent=absent)
        arguments = Choice(p.choice.method, Space.DELTA, p.choice.parameters).arguments
        merged: torch.Tensor = p.choice.method.function(stack, **arguments).reshape(-1).double()
    else:
        matrix = torch.stack(rows)
        if kind is Kind.SPAN:
            weights = [float(c) for c in p.choice.method.function(matrix @ matrix.T, weights, **p.choice.arguments)]
        merged = (matrix * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(dim=0)
    return (merged + initial).reshape(p.shape).to(dtype)


def _values(vector: Vector) -> torch.Tensor:
    import torch

    values: torch.Tensor = vector.update.tensors[vector.role].torch().double().reshape(-1)
    if vector.pieces is None:
        return values
    return torch.cat([values[start:stop] for start, stop in vector.pieces])
