"""OneTrainer's OFT by its own arithmetic and by peft's layers, and the files that it writes."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from method_updates import relative, update
from peft import OFTConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own
from adapterops.methods.onetrainer_oft import as_peft

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(24, 32),
    "kernel": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "point": lambda: nn.Conv2d(8, 16, 1),
}


def rotation(r: Tensor, scaled: bool) -> Tensor:
    """What OneTrainer turns by: `OFTRotationModule._cayley_batch` of Nerogar/OneTrainer `modules/module/oft_utils.py`."""
    size = next(b for b in range(2, 999) if b * (b - 1) // 2 == r.shape[1])
    upper = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(r), size, size, dtype=r.dtype)
    skew[:, upper[0], upper[1]] = r / (2 * sqrt(size - 1)) if scaled else r
    skew = skew - skew.transpose(1, 2)
    square = skew @ skew
    return torch.eye(size, dtype=r.dtype) + 2 * skew + 2 * square + 2 * square @ skew + square @ square


def forward(layer: Any, r: Tensor, scaled: bool, x: Tensor) -> Tensor:
    """What the module computes with it: `OFTModule.forward` of Nerogar/OneTrainer `modules/module/LoRAModule.py`."""
    turn = rotation(r, scaled)
    size = turn.shape[1]
    if isinstance(layer, nn.Linear):
        blocks = x.reshape(*x.shape[:-1], -1, size)
        turned: Tensor = layer(
            torch.einsum("...rk,rkc->...rc", blocks, turn.expand(blocks.shape[-2], size, size)).reshape(x.shape)
        )
        return turned
    rows = layer.weight.reshape(len(layer.weight), -1, size)
    weight = torch.einsum("ork,rkc->orc", rows, turn.expand(rows.shape[1], size, size)).reshape(layer.weight.shape)
    return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def inputs(layer: Any, seed: int = 3) -> Tensor:
    shape = (5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(width: int, size: int, share: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(width + size)
    return torch.randn(1 if share else width // size, size * (size - 1) // 2, generator=generator) * 0.1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_change_is_that_of_its_forward(name: str, share: bool, scaled: bool) -> None:
    layer = LAYERS[name]().double()
    r = trained(layer.weight[0].numel(), 4, share)
    one = update("onetrainer_oft", {"R": r}, options={"scaled": True} if scaled else {})
    method = METHODS[one.method]
    method.check(one)
    assert method.fits(one, tuple(layer.weight.shape))
    assert not method.fits(one, (layer.weight.shape[0], layer.weight.shape[1] + 1, *layer.weight.shape[2:]))
    x = inputs(layer)
    wanted = forward(layer, r.double(), scaled, x) - layer(x)
    made = method.change(one, Own(layer.weight.detach().float(), layer.bias.detach().float()))
    assert made.bias is None
    assert made.weight is not None
    layer.weight.data, layer.bias.data = made.weight.double(), torch.zeros_like(layer.bias)
    assert relative(wanted.detach(), layer(x).detach()) < 1e-6


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["linear", "point"])
def test_peft_computes_the_same_of_what_is_written_for_it(name: str, share: bool, scaled: bool) -> None:
    layer = LAYERS[name]().double()
    r = trained(layer.weight[0].numel(), 4, share)
    one = update("onetrainer_oft", {"R": r}, options={"scaled": True} if scaled else {})
    theirs = as_peft(one, tuple(layer.weight.shape))
    x = inputs(layer)
    wanted = forward(layer, r.double(), scaled, x)
    config = OFTConfig(r=0, oft_block_size=4, block_share=share, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(layer), config)  # type: ignore[arg-type]
    tensor = theirs.tensors["R"].torch()
    loaded = set_peft_model_state_dict(model, {"base_model.model.0.oft_R.weight": tensor})
    assert not loaded.unexpected_keys
    model.eval().double()
    assert relative(wanted.detach(), model(x).detach()) < 1e-6
    assert theirs.tensors["R"].read() == one.tensors["R"].read() or name == "point" or scaled


def test_peft_turns_kernels_otherwise() -> None:
    one = update("onetrainer_oft", {"R": trained(72, 4)})
    with pytest.raises(errors.CannotRepresent, match=r"overlapping patches.*to-lora --base-weights"):
        as_peft(one, (16, 8, 3, 3))
    with pytest.raises(errors.CannotRepresent, match="nothing says which this is"):
        as_peft(one, None)


def test_zeros_are_nothing() -> None:
    method = METHODS["onetrainer_oft"]
    assert method.is_nothing(update("onetrainer_oft", {"R": torch.zeros(4, 6)}))
    assert not method.is_nothing(update("onetrainer_oft", {"R": torch.ones(4, 6)}))


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        ({"R": torch.zeros(4, 5)}, {}, "no size has so many"),
        ({"R": torch.zeros(4, 6, 1)}, {}, "no size has so many"),
        ({"R": torch.zeros(4, 6), "magnitude": torch.ones(8)}, {}, "no part of"),
        ({"R": torch.zeros(4, 6)}, {"scaled": False}, "goes by its presence"),
        ({"magnitude": torch.ones(8)}, {}, "half an update"),
    ],
)
def test_what_is_broken_is_said(tensors: dict[str, Tensor], options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.BrokenAdapter, match=said):
        METHODS["onetrainer_oft"].check(update("onetrainer_oft", tensors, options=options))


# Files

MODULES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
}


def a_file(folder: Path, scaled: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """An OFT of Stable Diffusion 1 as OneTrainer saves it: everything in the type that it saves in, the marker too."""
    state: dict[str, Tensor] = {}
    for name, (_, *rest) in MODULES.items():
        stem = f"lora_unet_{name.replace('.', '_')}.oft_R"
        state[f"{stem}.weight"] = trained(torch.Size(rest).numel(), 32).to(dtype)
        if scaled:
            state[f"{stem}.scaled_oft"] = torch.tensor(True).to(dtype)
    save_file(state, folder / "oft.safetensors", {"ot_branch": "master"})
    return folder / "oft.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("to", ["comfy", "kohya-diffusers", "diffusers-lycoris", "lycoris"])
def test_there_and_back(to: str, scaled: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = a_file(tmp_path, scaled, dtype)
    result = ao.convert(source, to, tmp_path / "there.safetensors", arch="sd1")
    assert result.modules == len(MODULES)
    ao.convert(tmp_path / "there.safetensors", "kohya", tmp_path / "back.safetensors")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_flux_fused_and_apart(tmp_path: Path) -> None:
    """A projection that the authors have in one piece has one rotation, as each of its parts then has."""
    r = trained(3072, 32)
    save_file({"diffusion_model.double_blocks.0.img_attn.qkv.oft_R.weight": r}, tmp_path / "oft.safetensors")
    ao.convert(tmp_path / "oft.safetensors", "onetrainer", tmp_path / "apart.safetensors", arch="flux")
    stem = "lora_transformer_transformer_blocks_0_attn_to_"
    apart = load_file(tmp_path / "apart.safetensors")
    assert apart.keys() == {f"{stem}{part}.oft_R.weight" for part in "qkv"}
    assert all(torch.equal(r, own) for own in apart.values())
    ao.convert(tmp_path / "apart.safetensors", "comfy", tmp_path / "back.safetensors", arch="flux")
    assert torch.equal(
        load_file(tmp_path / "back.safetensors")["diffusion_model.double_blocks.0.img_attn.qkv.oft_R.weight"], r
    )
    del apart[f"{stem}v.oft_R.weight"]
    save_file(apart, tmp_path / "apart.safetensors")
    with pytest.raises(errors.CannotRepresent, match="not one such update on the whole"):
        ao.convert(tmp_path / "apart.safetensors", "comfy", tmp_path / "lacking.safetensors", arch="flux")


@pytest.mark.parametrize("scaled", [False, True])
def test_the_best_lora_of_it(scaled: bool, tmp_path: Path) -> None:
    source = a_file(tmp_path, scaled)
    generator = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    save_file(weights, tmp_path / "unet.safetensors")
    lora, _, _ = ao.as_lora(ao.load(source), rank=320, base_weights=tmp_path / "unet.safetensors")
    state = load_file(source)
    assert len(lora) == len(MODULES)
    for one in lora:
        weight = weights[f"{one.module}.weight"]
        turn = rotation(state[f"lora_unet_{one.module.replace('.', '_')}.oft_R.weight"].double(), scaled)
        turn = turn.mT if weight.dim() == 2 else turn
        rows = weight.double().reshape(len(weight), len(turn), -1)
        wanted = (torch.einsum("ork,rkc->orc", rows, turn) - rows).reshape(len(weight), -1)
        made = METHODS[one.method].delta(one).reshape(wanted.shape)
        best = torch.linalg.svdvals(wanted)[320:].square().sum().sqrt()
        assert float((made - wanted).norm() - best) < 1e-4 * float(wanted.norm()), one.module


@pytest.mark.parametrize("scaled", [False, True])
def test_pefts_folder(scaled: bool, tmp_path: Path) -> None:
    source = a_file(tmp_path, scaled)
    with pytest.raises(errors.CannotRepresent, match="overlapping patches"):
        ao.convert(source, "peft", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    state = {key: value for key, value in load_file(source).items() if "resnets" not in key}
    save_file(state, tmp_path / "oft.safetensors")
    result = ao.convert(source, "peft", tmp_path / "peft", arch="sd1")
    assert result.modules == 3
    adapter = ao.load(tmp_path / "peft", arch="sd1")
    assert {update.method for update in adapter} == {"oft"}


def test_a_marker_alone_is_broken(tmp_path: Path) -> None:
    source = a_file(tmp_path, scaled=True)
    state = load_file(source)
    del state[next(key for key in state if key.endswith(".oft_R.weight"))]
    save_file(state, source)
    with pytest.raises(errors.BrokenAdapter, match=r"proj_in.*marker of Scaled OFT.*without its rotations"):
        ao.load(source)
