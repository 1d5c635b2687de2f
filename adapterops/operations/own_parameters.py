"""A module's own parameters, read from the weights of a base model for what depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Adapter, Update
from adapterops.architectures import ModuleSpec
from adapterops.errors import UsageError
from adapterops.methods import METHODS
from adapterops.methods.base import Own
from adapterops.storage import dtypes
from adapterops.storage.base_weights import BaseWeights
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class OwnParameters:
    """The parameters of an adapter's base, as its modules have them."""

    weights: BaseWeights
    adapter: Adapter

    def has(self, update: Update) -> bool:
        """Whether the base has the module's weight under one name, whole or in parts."""
        joins = self._joins(update)
        whole = self.weights.has(update.component, self._names(update, None))
        return whole or (bool(joins) and all(self.weights.has(update.component, [part]) for part, _, _ in joins))

    def shape(self, update: Update) -> tuple[int, ...]:
        """The shape of the module's weight, (out, in, *kernel), from the header alone.

        Raises `UsageError` where the base has no such module.
        """
        parts, flipped = self._parts(update, "weight")
        first = parts[0].shape
        if not first:
            raise UsageError(f"{parts[0].where}: is one number and no weight; is it the base model of this adapter?")
        if flipped:
            return first[::-1]
        rows = sum(stop - start for _, start, stop in self._joins(update)) if len(parts) > 1 else first[0]
        return (rows, *first[1:])

    def of(self, update: Update) -> Own:
        """Weight and bias, in float32: the adapter's own where it replaces the base's.

        Raises `UsageError` where the base has no such module, or holds it quantised or damaged.
        """
        parts, flipped = self._parts(update, "weight")
        saved = self.adapter.updates.get((update.component, update.module, "saved"))
        own = saved.tensors if saved is not None else {}
        weight = _read(own["weight"]) if "weight" in own else self._whole(update, parts)
        bias = _read(own["bias"]) if "bias" in own else self._bias(update)
        outputs = weight.shape[-1 if flipped else 0]
        if bias is not None and bias.numel() != outputs:
            raise UsageError(
                f"{parts[0].where}: its module has {outputs} outputs and a bias of {bias.numel()} numbers: the base weights "
                "are damaged, or of several models"
            )
        return Own(weight.T.contiguous() if flipped else weight, bias)

    def _bias(self, update: Update) -> torch.Tensor | None:
        if not self.weights.has(update.component, self._names(update, None), "bias"):
            joins = self._joins(update)
            if not joins or not all(self.weights.has(update.component, [part], "bias") for part, _, _ in joins):
                return None
        return self._whole(update, self._parts(update, "bias")[0])

    def _whole(self, update: Update, parts: Sequence[LazyTensor]) -> torch.Tensor:
        import torch

        values = [_read(part) for part in parts]
        if len(parts) > 1:
            joins = self._joins(update)
            values = [v[start:stop] for v, (_, start, stop) in zip(values, joins, strict=True)]
        return torch.cat(values) if len(values) > 1 else values[0]

    def _parts(self, update: Update, parameter: str) -> tuple[list[LazyTensor], bool]:
        """The base's tensors that make up the module's, and whether they are kept as (in, out)."""
        spec, joins = self._spec(update), self._joins(update)
        names = self._names(update, spec)
        if joins and not self.weights.has(update.component, names, parameter):
            # A fused projection, and a base that has its parts.
            return [self.weights.weight(update.component, [part], parameter) for part, _, _ in joins], False
        tensor = self.weights.weight(update.component, names, parameter)
        return [tensor], self._flipped(update, spec, tensor)

    def _names(self, update: Update, spec: ModuleSpec | None) -> list[str]:
        spec = spec or self._spec(update)
        stated = self.adapter.provenance.stated.get(update.key, "")
        return [update.module, spec.original if spec is not None else "", stated]

    def _joins(self, update: Update) -> Sequence[tuple[str, int, int]]:
        spec = self._spec(update)
        return spec.joins if spec is not None else ()

    def _spec(self, update: Update) -> ModuleSpec | None:
        component = self.adapter.base.components.get(update.component) if self.adapter.base is not None else None
        return component.spec(update.module) if component is not None else None

    def _flipped(self, update: Update, spec: ModuleSpec | None, tensor: LazyTensor) -> bool:
        """Whether the base keeps the weight as (in, out), as GPT-2's Conv1D does."""
        if len(tensor.shape) != 2:
            return False
        if spec is not None:
            return spec.transposed
        config: Mapping[str, Any] = self.adapter.config.get(update.component, {})
        if "fan_in_fan_out" in config:
            return bool(config["fan_in_fan_out"])
        own = METHODS[update.method].weight_shape(update)
        return own is not None and own != tensor.shape and own == tensor.shape[::-1]


def _read(tensor: LazyTensor) -> torch.Tensor:
    import torch

    if tensor.dtype not in dtypes.FLOATS:
        raise UsageError(f"{tensor.where}: has dtype {tensor.dtype}; the base must not be quantised")
    values = torch.from_numpy(tensor.numpy()).float()
    if not torch.isfinite(values).all():
        raise UsageError(f"{tensor.where}: holds NaN or infinity; the base weights are damaged")
    return values
