"""Bone is MiSS: the files and the outputs of peft 0.17's Bone layers, against our MiSS and against peft's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from method_updates import update
from peft import MissConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from adapterops.methods.base import Own
from adapterops.methods.miss import Miss

BONE = Path(__file__).parents[2] / "fixtures" / "bone"
FOLDERS = ["bone", "bat", "bin"]
MISS = Miss()


class Tiny(nn.Module):
    """The base of the fixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"up": nn.Linear(10, 12), "down": nn.Linear(12, 8, bias=False)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.encoder["down"](torch.tanh(self.encoder["up"](x)))))
        return out


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Config, tensors, and what was measured."""
    folder = BONE / name
    pickled = folder / "adapter_model.bin"
    tensors = torch.load(pickled) if pickled.exists() else load_file(folder / "adapter_model.safetensors")
    return json.loads((folder / "adapter_config.json").read_text()), tensors, load_file(folder / "outputs.safetensors")


def base(measured: dict[str, Tensor]) -> Tiny:
    model = Tiny()
    model.load_state_dict({k.removeprefix("base."): t for k, t in measured.items() if k.startswith("base.")})
    return model.eval()


@pytest.mark.parametrize("name", FOLDERS)
def test_our_miss_gives_bones_outputs(name: str) -> None:
    config, tensors, measured = read(name)
    model = base(measured)
    before = model(measured["input"]).detach()
    for key, values in tensors.items():
        path = key.removeprefix("base_model.model.")
        if path.startswith("head."):
            model.get_parameter(path).data = values
            continue
        one = update("miss", {"block": values}, options={"init_weights": config["init_weights"]})
        layer = model.get_submodule(path.removesuffix(".bone_block"))
        weight = layer.weight.detach()
        one = replace(one, options={**one.options, "shape": tuple(weight.shape)})
        MISS.check(one)
        assert MISS.rank(one) == config["r"]
        change = MISS.change(one, Own(weight)).weight
        assert change is not None
        layer.weight.data = weight + change
    found = model(measured["input"])
    torch.testing.assert_close(found, measured["output"], rtol=1e-5, atol=1e-6)
    assert float((before - measured["output"]).norm()) > 0.1 * float(before.norm())


@pytest.mark.parametrize("name", FOLDERS)
def test_pefts_miss_gives_bones_outputs(name: str) -> None:
    """Under the other name and with the config's fields as they are, today's peft computes the same."""
    config, tensors, measured = read(name)
    fields = {name: config[name] for name in ("r", "init_weights", "target_modules", "modules_to_save")}
    model = get_peft_model(base(measured), MissConfig(**fields)).eval()
    renamed = {key.replace(".bone_block", ".miss_block"): t for key, t in tensors.items()}
    told = set_peft_model_state_dict(model, renamed)
    assert not told.unexpected_keys
    assert not [key for key in told.missing_keys if "miss_" in key]
    torch.testing.assert_close(model(measured["input"]), measured["output"], rtol=1e-5, atol=1e-6)


def test_the_bare_file_is_that_of_bat() -> None:
    bare, tensors = load_file(BONE / "bare.safetensors"), read("bat")[1]
    assert bare.keys() == tensors.keys()
    for key, values in bare.items():
        torch.testing.assert_close(values, tensors[key], rtol=0, atol=0)
