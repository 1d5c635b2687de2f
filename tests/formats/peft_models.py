"""Helpers of the PEFT tests: small base models, what peft adapts in them, and folders to compare."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
Outputs = list[Tensor]
Run = Callable[[nn.Module], Outputs]


def fill(model: nn.Module, seed: int = 0, names: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """Give the parameters whose names are wanted seeded noise, each its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if names(name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def cut_from_one_block(model: nn.Module) -> nn.Module:
    """Give a model on the meta device weights: overlapping views of one block of noise, so a large one costs little."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    noise = torch.randn(max(sizes.values()) + len(sizes), generator=torch.Generator().manual_seed(0)) * 0.1
    weights = {
        name: noise[at : at + tensor.numel()].view(tensor.shape)
        for at, (name, tensor) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(weights, assign=True)
    return model


def trained(base: nn.Module, config: LoraConfig, seed: int = 1, **options: Any) -> PeftModel:
    """`base` with an adapter whose every tensor is noise, as after training (peft starts with B = 0)."""
    untouched = {id(parameter) for parameter in base.parameters()}
    model = get_peft_model(base, config, **options)
    added = {name for name, parameter in model.named_parameters() if id(parameter) not in untouched}
    return fill(model, seed, added.__contains__)


def saved(model: PeftModel, folder: Path, **options: Any) -> Path:
    """What peft writes for the adapter of `model`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder."""
    binary = folder / "adapter_model.bin"
    if binary.exists():
        return dict(torch.load(binary, weights_only=True, map_location="cpu"))
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def folder_with(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    """A PEFT folder made by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(base: nn.Module, folder: Path) -> PeftModel:
    """The adapter in `folder`, loaded by peft.  A warning of peft that something did not match is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|did not match|inconsistency).*")
        # peft 0.21 looks for AdaLoRA's keys among the names of modules, and finds none.
        warnings.filterwarnings("ignore", message=r".*rank_pattern keys did not match.*\.lora_E'")
        return PeftModel.from_pretrained(base, str(folder)).eval()


def adapted(model: nn.Module) -> set[str]:
    """The modules that peft adapts."""
    return {
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter")
    }


def wrapped(model: nn.Module) -> set[str]:
    """The parameters and buffers that peft replaces whole."""
    return {
        f"{name.removeprefix(PREFIX)}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key in module.modules_to_save["default"].state_dict()
    }


def token_wrapped(model: nn.Module) -> set[str]:
    """The embeddings of which peft replaces rows."""
    return {
        name.removeprefix(PREFIX)
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper)
    }


def modules_in(keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """The adapted modules and the whole parameters that the keys of a file name."""
    names = {key.removeprefix(PREFIX) for key in keys}
    factors = {name for name in names if ".lora_" in name}
    return {name.rsplit(".lora_", 1)[0] for name in factors}, names - factors


def loaded_tensors(model: PeftModel, embeddings: bool = False) -> dict[str, Tensor]:
    """The adapter's tensors as peft would save them again: what it loaded, and nothing that it did not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(get_peft_model_state_dict(model, save_embedding_layers=embeddings))


def apart(one: Outputs, other: Outputs) -> float:
    """The largest difference of two models' outputs."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k].float().flatten(), other[k].float().flatten())] == []
