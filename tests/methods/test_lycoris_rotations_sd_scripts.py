"""sd-scripts' OFT, by its own arithmetic, and the files that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from method_updates import update
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own

ALPHA = 1e-2
MODULES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
}


def turned(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """What kohya-ss/sd-scripts `networks/oft.py` makes of the weight (`OFTModule.get_weight`, `OFTInfModule.merge_to`)."""
    count, size, _ = blocks.shape
    skew = (blocks - blocks.transpose(1, 2)).double()
    norm = torch.linalg.vector_norm(skew)
    skew = skew * ((norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(size, dtype=torch.float64)
    rotation = (eye + skew) @ torch.from_numpy(np.linalg.inv((eye - skew).numpy()))
    rows = weight.double().reshape(count, size, -1)
    return torch.einsum("knm,knp->kmp", rotation, rows).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(64, 48), (64, 16, 1, 1), (64, 16, 3, 3)])
@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 10.0])
def test_it_is_lycoris_oft(shape: tuple[int, ...], alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    blocks = torch.randn(4, 16, 16, generator=generator) * 0.05
    one = update("lycoris_oft", {"blocks": blocks, "constraint": torch.tensor(alpha, dtype=torch.float64)})
    wanted = turned(weight, blocks, alpha) - weight.double()
    made = METHODS["lycoris_oft"].change(one, Own(weight)).weight
    assert made is not None
    assert float((made - wanted).norm() / wanted.norm()) < 1e-5


def a_file(folder: Path, alpha: float = ALPHA, prefix: str = "oft_unet_") -> Path:
    """An OFT of Stable Diffusion 1 as sd-scripts saves it."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, (out, *_) in MODULES.items():
        stem = f"{prefix}{name.replace('.', '_')}"
        state[f"{stem}.oft_blocks"] = torch.randn(10, out // 10, out // 10, generator=generator) * 0.05
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(state, folder / "oft.safetensors", {"ss_network_module": "networks.oft"})
    return folder / "oft.safetensors"


def test_there_and_back(tmp_path: Path) -> None:
    source = a_file(tmp_path)
    result = ao.convert(source, "kohya", tmp_path / "there.safetensors")
    assert result.modules == len(MODULES)
    there = load_file(tmp_path / "there.safetensors")
    assert all(key.startswith("lora_unet_") for key in there)
    ao.convert(tmp_path / "there.safetensors", "sd-scripts-oft", tmp_path / "back.safetensors")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_the_best_lora_of_it(tmp_path: Path) -> None:
    source = a_file(tmp_path)
    generator = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    save_file(weights, tmp_path / "unet.safetensors")
    lora, _, _ = ao.as_lora(ao.load(source), rank=320, base_weights=tmp_path / "unet.safetensors")
    state = load_file(source)
    assert len(lora) == len(MODULES)
    for one in lora:
        weight = weights[f"{one.module}.weight"]
        blocks = state[f"oft_unet_{one.module.replace('.', '_')}.oft_blocks"]
        wanted = (turned(weight, blocks, ALPHA) - weight).reshape(len(weight), -1)
        made = METHODS[one.method].delta(one).reshape(wanted.shape)
        best = torch.linalg.svdvals(wanted)[320:].square().sum().sqrt()
        assert float((made - wanted).norm() - best) < 1e-4 * float(wanted.norm()), one.module


def test_an_alpha_of_zero_is_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(errors.BrokenAdapter, match=r"alpha above zero.*does nothing"):
        ao.load(a_file(tmp_path, alpha=0.0))


def test_one_alpha_that_is_missing_is_one_finding(tmp_path: Path) -> None:
    source = a_file(tmp_path)
    state = load_file(source)
    first = min(key for key in state if key.endswith(".alpha"))
    save_file({key: t for key, t in state.items() if key != first}, source, {"ss_network_module": "networks.oft"})
    found = [f for f in ao.validate(source, ignore=["D601"]) if f.rule.severity == "error"]
    assert ["without an alpha above zero" in f.message for f in found] == [True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, k: s.update({f"{k}.alpha": torch.tensor(0.0)}), "alpha above zero"),
        (lambda s, k: s.update({f"{k}.alpha": torch.tensor(0.5)}), "takes one of each"),
        (lambda s, k: s.update({f"{k}.rescale": torch.ones(320, 1)}), "factors on the outputs"),
        (lambda s, k: s.update({f"{k}.oft_blocks": torch.zeros(2, 32, 10, 10)}), "neither BOFT"),
        (lambda s, k: s.update({f"{k}.oft_blocks": torch.zeros(32, 10, 10)}), "32 blocks, beside"),
    ],
)
def test_what_sd_scripts_would_compute_otherwise_is_not_written(
    change: Callable[[dict[str, Tensor], str], None], said: str, tmp_path: Path
) -> None:
    source = a_file(tmp_path, prefix="lora_unet_")
    state = load_file(source)
    change(state, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q")
    save_file(state, source)
    with pytest.raises(errors.CannotRepresent, match=f"{said}.*--to kohya"):
        ao.convert(source, "sd-scripts-oft", tmp_path / "out.safetensors", arch="sd1")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_lora_is_none_of_it(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{stem}.lora_down.weight": torch.ones(4, 320), f"{stem}.lora_up.weight": torch.ones(320, 4)}
    save_file(factors, tmp_path / "lora.safetensors")
    with pytest.raises(errors.CannotRepresent, match=r"no place for LoRA .*--to kohya"):
        ao.convert(tmp_path / "lora.safetensors", "sd-scripts-oft", tmp_path / "out.safetensors", arch="sd1")
