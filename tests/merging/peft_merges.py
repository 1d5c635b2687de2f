"""A small model with every layer that peft's LoRA merges, adapters for it, and merges by peft and by adapterops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapterops.linalg.random import Draw

PREFIX = "base_model.model."
COMMON = ["embed", "first", "blocks.0.mix", "blocks.1.mix", "square", "point", "flipped"]
"""Modules that every adapter changes, in the order of the model."""
Model = Any
"""A `PeftModel` over one of the models here, whose modules torch types as tensors or modules."""
Deltas = dict[str, Tensor]
"""Module to ΔW, in the layout of its weight."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 12)


class Tiny(nn.Module):
    """An embedding, linear layers (one of GPT-2's, transposed) and convolutions with kernels of three and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.first = nn.Linear(14, 18)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.square = nn.Conv2d(6, 11, 3)
        self.point = nn.Conv2d(12, 10, 1)
        self.flipped: nn.Module = Conv1D(12, 15)  # type: ignore[no-untyped-call]
        self.lonely = nn.Linear(13, 9)


class Line(nn.Module):
    """One linear layer, with one that peft may save whole."""

    def __init__(self, inputs: int = 12, outputs: int = 10, bias: bool = True) -> None:
        super().__init__()
        self.line = nn.Linear(inputs, outputs, bias=bias)
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(x))  # type: ignore[no-any-return]


def made(make: Callable[[], nn.Module] = Tiny) -> Any:
    torch.manual_seed(0)
    return make().eval()


def config(rank: int, alpha: Any, targets: Sequence[str] | None = None, **more: Any) -> LoraConfig:
    targets = [*COMMON] if targets is None else list(targets)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)


def adapted(configs: Sequence[LoraConfig], make: Callable[[], nn.Module] = Tiny, **options: Any) -> Model:
    """A model with an adapter `a0`, `a1` … for each config, every tensor of which is noise, as after training."""
    base = made(make)
    known = {id(parameter) for parameter in base.parameters()}
    with quiet():
        model = get_peft_model(base, configs[0], "a0", **options)
        for number, other in enumerate(configs[1:], 1):
            model.add_adapter(f"a{number}", other, **options)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.named_parameters():
        if id(parameter) not in known:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's warnings: of densities of 1, of layers that are transposed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(model: Model, folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The folders that peft writes, one an adapter."""
    names = sorted(model.peft_config) if names is None else list(names)
    with quiet():
        model.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
    return [folder / name for name in names]


def loaded(folder: Path | str, make: Callable[[], nn.Module] = Tiny) -> Model:
    """A fresh model with the adapter in `folder`; keys that peft does not take, or misses, are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match|inconsistency).*")
        model = PeftModel.from_pretrained(made(make), str(folder)).eval()
    expected = {key.removesuffix(".weight") for key in weights_of(Path(folder)) if ".lora_" in key}
    factors = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    held = {
        f"{name}.{part}" for name, layer in layers(model).items() for part in factors if len(getattr(layer, part, ()))
    }
    assert {key.removeprefix(PREFIX) for key in expected if not key.endswith(".bias")} == held
    return model


def layers(model: Model) -> dict[str, Any]:
    return {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def deltas(model: Model, adapter: str = "default") -> Deltas:
    """What peft would add to each weight."""
    out = {}
    for name, layer in layers(model).items():
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            out[name] = layer.get_delta_weight(adapter).detach().double()
    return out


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def exact(model: Model, weights: Sequence[float]) -> Deltas:
    """Σ wₖ·sₖ·BₖAₖ in float64, from peft's parameters alone."""
    out: Deltas = {}
    for name, layer in layers(model).items():
        for number, weight in enumerate(weights):
            factors = pair(layer, f"a{number}")
            if factors is not None:
                b, a = factors
                term = weight * layer.scaling[f"a{number}"] * (b.double() @ a.double())
                out[name] = out.get(name, 0) + shaped(term, layer)
    return out


def pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """B (out, r) and A (r, in · kernel) of an adapter."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter].data, layer.lora_embedding_A[adapter].data
    if adapter not in layer.lora_A:
        return None
    return layer.lora_B[adapter].weight.data.flatten(1), layer.lora_A[adapter].weight.data.flatten(1)


def shaped(matrix: Tensor, layer: Any) -> Tensor:
    """A matrix (out, in · kernel) in the layout of the layer's weight."""
    return matrix.T if transposed(layer) else matrix.reshape(layer.get_base_layer().weight.shape)


def transposed(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), (nn.Embedding, Conv1D))


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """‖found − wanted‖ ≤ tolerance · ‖wanted‖ for each of the same names."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.norm() > 0, f"{name}: nothing is compared"
        error = float((found[name] - tensor).norm() / tensor.norm())
        assert error <= tolerance, f"{name}: {error:.2e}"


def ranked(kind: str, rank: int, name: str = "rank") -> dict[str, Any]:
    """The rank as an argument, where the method takes one."""
    return {name: rank} if kind.endswith("svd") else {}


def by_peft(
    model: Model, kind: str, weights: Sequence[float], name: str = "merged", seed: int = 0, **options: Any
) -> None:
    """`add_weighted_adapter` over all adapters of `model`, its random masks replaced by ours."""
    names = [f"a{n}" for n in range(len(weights))]
    masked = "dare" in kind and options["density"] < 1 and len(names) > 1
    with quiet(), our_masks(model, seed, masked):
        model.base_model.add_weighted_adapter(names, list(weights), name, kind, **options)


@contextmanager
def our_masks(model: Model, seed: int, masked: bool) -> Iterator[None]:
    """peft's `random_pruning` with the masks that `adapterops.merging.matrices.draws` states.

    peft prunes a layer's tensors one after the other: the A's of the adapters that have it, then their B's, or their
    deltas, which it lays out as the layer's weight and we as (out, in · kernel).  Unless `masked` it must prune none so.
    """
    waiting: list[tuple[Draw, bool]] = []
    named = {id(layer): name for name, layer in layers(model).items()}

    def announce(method: str, roles: tuple[str, ...]) -> Any:
        own = getattr(LoraModel, method)

        def call(self: LoraModel, kind: str, adapters: list[str], *rest: Any, **more: Any) -> Any:
            layer = next(part for part in rest if isinstance(part, LoraLayer))
            present = [n for n, adapter in enumerate(adapters) if pair(layer, adapter) is not None]
            for role in roles if masked else ():
                turn = role == "delta" and transposed(layer)
                waiting.extend((Draw(seed, "model", named[id(layer)], role, n), turn) for n in present)
            result = own(self, kind, adapters, *rest, **more)
            assert not waiting, "peft pruned fewer tensors than it has"
            return result

        return mock.patch.object(LoraModel, method, call)

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        draw, turn = waiting.pop(0)  # raises where peft prunes more than was announced
        kept = torch.from_numpy(draw.keep(0, tensor.numel(), density))
        mask = kept.reshape(tensor.shape[::-1]).T if turn else kept.reshape(tensor.shape)
        return tensor * mask / density if rescale else tensor * mask

    with (
        announce("_generalized_task_arithmetic_weighted_adapter", ("A", "B")),
        announce("_svd_generalized_task_arithmetic_weighted_adapter", ("delta",)),
        mock.patch.object(merge_utils, "random_pruning", pruned),
    ):
        yield


def linear_by_hand(model: Model, weights: Sequence[float]) -> Deltas:
    """(Σ √|wₖsₖ|·Bₖ)(Σ ±√|wₖsₖ|·Aₖ): what peft's `linear` is meant to give."""
    out = {}
    for name, layer in layers(model).items():
        b, a = torch.zeros(()).double(), torch.zeros(()).double()
        for number, weight in enumerate(weights):
            factors = pair(layer, f"a{number}")
            if factors is not None:
                strength = weight * layer.scaling[f"a{number}"]
                b = b + sqrt(abs(strength)) * factors[0].double()
                a = a + sqrt(abs(strength)) * (1 if strength >= 0 else -1) * factors[1].double()
        if b.ndim:
            out[name] = shaped(b @ a, layer)
    return out


def dtypes_of(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118  (it is no mapping)
