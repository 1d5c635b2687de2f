"""One update after another made a LoRA: what its method allows, what stands beside it, what needs the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.errors import CannotRepresent
from adapterops.methods import METHODS
from adapterops.operations.kept import Keeper
from adapterops.operations.lora_factors import Budget, Factors, kernel_shape, of_factors, of_matrix
from adapterops.operations.own_parameters import OwnParameters
from adapterops.proof import check_finite
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor

if TYPE_CHECKING:
    import torch

AS_THEY_ARE = ("saved", "trainable_tokens", "bundled")
"""Methods whose updates stand beside a LoRA unchanged."""


_TRAINING = ("monteclora_sampler.", "velora_embed")
"""The beginnings of the roles that only training reads."""


def _after_training(update: Update) -> Update:
    """The update without what only training reads."""
    tensors = {role: t for role, t in update.tensors.items() if not role.startswith(_TRAINING)}
    own = {k: v for k, v in update.options.items() if k not in ("monteclora_config", "velora_config")}
    return replace(update, tensors=tensors, options=own)


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What became of one module.

    `kept` is the share of ‖ΔW‖² that the factors hold, `error` ‖ΔW − s·B·A‖ / ‖ΔW‖ with the rounding to the written dtype.
    `rank` is None for what is no LoRA and stands beside it.
    """

    component: str
    module: str
    method: str
    rank: int | None
    kept: float = 1.0
    error: float = 0.0
    note: str = ""


class Maker:
    """Makes LoRAs of updates."""

    def __init__(
        self, budget: Budget, own: OwnParameters | None, keeper: Keeper, dtype: str | None, adapter: Adapter
    ) -> None:
        self._budget, self._own, self._keeper, self._dtype, self._adapter = budget, own, keeper, dtype, adapter
        self.changed = False
        """Whether any update is of another method now."""

    def make(self, update: Update) -> tuple[list[Update], ModuleReport]:
        """The LoRA of an update (or what stands beside it), and a report."""
        method = METHODS[update.method]
        if update.method in AS_THEY_ARE:
            return [self._rounded(update)], ModuleReport(update.component, update.module, update.method, None)
        if update.method == "lora_parameters":
            return [self._rounded(update)], self._of_parameters(update)
        if update.method == "lora" and any(role.startswith(_TRAINING) for role in update.tensors):
            self.changed = True
            update = _after_training(update)
        plain = update.method == "lora" and "mid" not in update.tensors
        if plain and (self._budget.everything or self._small(update)):
            rank = method.rank(update)
            return [self._rounded(update)], ModuleReport(update.component, update.module, update.method, rank)
        self.changed = self.changed or update.method != "lora"
        check_finite([update])
        if not method.linear:
            method.change(update)  # says why there is none
            raise CannotRepresent(f"{update.name}: {method.title} is no change of a weight; no LoRA does what it does")
        factors, beside, bias = self._factors(update)
        made = self._update(update, factors, beside, bias)
        return [made], ModuleReport(
            update.component, update.module, update.method, factors.rank, factors.kept, factors.error
        )

    def _of_parameters(self, update: Update) -> ModuleReport:
        """A LoRA on a bare parameter is one already.  Raises `CannotRepresent` where the budget would make it smaller."""
        rank = METHODS[update.method].rank(update)
        if not self._budget.everything and not self._small(update):
            raise CannotRepresent(
                f"{update.name}: is LoRA on a stack of {rank} ranks for each expert (tensor {update.tensors['A'].key!r}), which "
                "this version does not make smaller; leave --rank, --energy and --error out, or --rank larger"
            )
        return ModuleReport(update.component, update.module, update.method, rank)

    def _small(self, update: Update) -> bool:
        rank = METHODS[update.method].rank(update)
        return self._budget.rank is not None and rank is not None and rank <= self._budget.rank

    def _factors(self, update: Update) -> tuple[Factors, dict[str, LazyTensor], torch.Tensor | None]:
        """The factors of an update, tensors that stay beside them, and the change of the bias."""
        method = METHODS[update.method]
        dora = "magnitude" in update.tensors
        if dora and not self._budget.everything and self._own is None:
            raise CannotRepresent(
                f"{update.name}: has a DoRA magnitude (tensor {update.tensors['magnitude'].key!r}): what it does to the weight "
                "depends on the base's own; give --base-weights BASE, or leave the budget out, which keeps the magnitude"
            )
        acts_on_base = method.acts_on_base(update) or (dora and not self._budget.everything)
        found = None if acts_on_base else method.low_rank(update)
        if found is not None:
            scale = method.scale(update) if method.scaled else 1.0
            if scale is None:
                raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
            factors = of_factors(*found, scale, self._budget, self._torch)
            beside = {"magnitude": update.tensors["magnitude"]} if dora else {}
            bias = update.tensors.get("bias") if update.method != "diff" else None
            return factors, beside, None if bias is None else bias.torch().double().reshape(-1) * scale
        if acts_on_base and self._own is None:
            more = " and --rank R, --energy E or --error T" if self._budget.everything and not method.form else ""
            raise CannotRepresent(
                f"{update.name}: what {method.title} does to the weight depends on the base's own; give --base-weights BASE{more}"
            )
        own = self._own.of(update) if self._own is not None else None
        exact = method.low_rank_of(update, own) if own is not None and not dora else None
        if exact is not None:
            return of_factors(*exact, 1.0, self._budget, self._torch), {}, None
        change = method.change(update, own)
        if change.weight is None:
            return self._nothing(update, change.bias), {}, change.bias
        if change.weight.dim() < 2:
            raise CannotRepresent(
                f"{update.name}: {method.title} changes {list(change.weight.shape)} numbers of a norm or a scale, and a LoRA "
                "changes matrices only; --allow-drop leaves it out"
            )
        matrix = self._matrix(update, change.weight)
        try:
            return of_matrix(matrix, self._budget, self._torch, update.component, update.module), {}, change.bias
        except CannotRepresent as error:
            raise CannotRepresent(f"{update.name}: {method.title} {error}") from error

    def _nothing(self, update: Update, bias: torch.Tensor | None) -> Factors:
        """Factors of rank one that change no weight, to carry a bias."""
        import torch

        shape = self._weight_shape(update)
        if bias is None or shape is None:
            raise CannotRepresent(
                f"{update.name}: {METHODS[update.method].title} changes the bias alone, and how many inputs the module has is "
                "not known; give --base CONFIG or --base-weights BASE"
            )
        return Factors(torch.zeros(shape[0], 1), torch.zeros(1, prod(shape[1:])))

    def _matrix(self, update: Update, weight: torch.Tensor) -> torch.Tensor:
        """The delta as (out, in · kernel); an embedding's is (embedding_dim, num_embeddings)."""
        return weight.T if self._embedding(update) else weight.reshape(weight.shape[0], -1)

    def _embedding(self, update: Update) -> bool:
        spec = self._spec(update)
        return update.options.get("kind") == "embedding" or (spec is not None and spec.kind == "embedding")

    def _spec(self, update: Update) -> Any:
        base = self._adapter.base
        component = base.components.get(update.component) if base is not None else None
        return component.spec(update.module) if component is not None else None

    def _weight_shape(self, update: Update) -> tuple[int, ...] | None:
        """The shape of the module's weight: the base's where it is known, else what the tensors say."""
        spec = self._spec(update)
        if spec is not None and spec.shape:
            return tuple(spec.shape)
        if self._own is not None:
            return self._own.shape(update)
        return METHODS[update.method].weight_shape(update)

    @property
    def _torch(self) -> torch.dtype | None:
        import torch

        return None if self._dtype is None else getattr(torch, TORCH_NAMES[self._dtype])

    def _update(
        self, update: Update, factors: Factors, beside: Mapping[str, LazyTensor], bias: torch.Tensor | None
    ) -> Update:
        shape = self._weight_shape(update)
        embedding = self._embedding(update)
        a, b = factors.a, factors.b
        if shape is not None and not embedding:
            a = a.reshape(kernel_shape(a, shape))
            b = b.reshape(*b.shape, *(1,) * (a.dim() - 2))
        tensors = {"A": self._keeper.keep(f"{update.module}.A", a), "B": self._keeper.keep(f"{update.module}.B", b)}
        if bias is not None:
            tensors["bias"] = self._keeper.keep(f"{update.module}.bias", (bias / factors.scale).to(b.dtype))
        tensors |= {role: tensor.mapped(self._dtype) for role, tensor in beside.items()}
        options: dict[str, Any] = {"dora_axis": update.options["dora_axis"]} if beside else {}
        if embedding:
            options["kind"] = "embedding"
        alpha: Fact[float | None] = Fact(factors.scale * factors.rank, Certainty.DERIVED, "to-lora")
        return Update(update.component, update.module, "lora", tensors, alpha, False, options)

    def _rounded(self, update: Update) -> Update:
        if self._dtype is None:
            return update
        return replace(update, tensors={role: t.mapped(self._dtype) for role, t in update.tensors.items()})

    def with_biases(self, updates: Iterable[Update]) -> list[Update]:
        """The updates; where some LoRAs of a component have a bias, the others get zeros: a config says all or none."""
        import torch

        updates = list(updates)
        having = {u.component for u in updates if u.method == "lora" and "bias" in u.tensors}
        if not having:
            return updates
        out = []
        for update in updates:
            if update.method == "lora" and update.component in having and "bias" not in update.tensors:
                rows = update.tensors["B"].shape[0]
                zeros = self._keeper.keep(f"{update.module}.bias", torch.zeros(rows))
                update = replace(update, tensors={**update.tensors, "bias": zeros.mapped(update.tensors["B"].dtype)})
            out.append(update)
        return out
