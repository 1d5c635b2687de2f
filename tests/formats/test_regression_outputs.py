"""The adapters of peft 0.6.1's regression tests: rebuilt without their configs, they give the outputs saved beside them.

Their bases are what torch initialises with seed 0; models and inputs are described in huggingface/peft
`tests/regression/test_regression.py` (MLP and convolution; OPT-350m's weights are not at hand).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from peft_zoo import add, own
from torch import nn

import adapterops as ao
from adapterops.methods import METHODS

INPUT = torch.arange(90).reshape(9, 10).float()


class Line(nn.Module):
    """Two linear layers and log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x).relu()).log_softmax(-1)


class Convolution(nn.Module):
    """A convolution, a linear layer, and log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv2d(x.reshape(2, 5, 3, 3)).relu().flatten(1)).log_softmax(-1)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "lora_mlp": (Line, {"alpha": 8}),
    "lora_mlp_modules_to_save": (Line, {"alpha": 8}),
    "lora_conv2d": (Convolution, {"alpha": 8}),
    "ia3_mlp": (Line, {}),
    "ia3_no_ff_mlp": (Line, {}),
}


def base_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]()


@pytest.mark.parametrize("way", ["peft", "change", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_0_6_1(corpus: Path, name: str, way: str, tmp_path: Path) -> None:
    folder = corpus / "files" / f"peft-regression-0.6.1-{name}"
    expected = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    base, options = base_of(name), CASES[name][1]
    if way == "peft":
        ao.convert(weights, to="peft", output=tmp_path / "again", **options)
        base = pm.load(base, tmp_path / "again")
    elif way == "lora":
        torch.save(base.state_dict(), tmp_path / "base.bin")
        ao.to_lora(weights, tmp_path / "again", to="peft", rank=20, base_weights=tmp_path / "base.bin", reading=options)
        base = pm.load(base, tmp_path / "again")
    else:
        for update in ao.load(weights, **options):
            module = base.get_submodule(update.module)
            if update.method == "saved":
                module.load_state_dict({role: t.torch() for role, t in update.tensors.items()})
            else:
                add(module, METHODS[update.method].change(update, own(module)))
    with torch.no_grad():
        got = base(INPUT)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base_of(name)(INPUT), expected, rtol=1e-2, atol=1e-2)
