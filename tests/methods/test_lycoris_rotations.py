"""LyCORIS' OFT, BOFT and GLoRA against its own modules, and the files that it writes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from method_updates import lazy, update
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Update
from adapterops.methods import METHODS
from adapterops.methods.base import Own

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "oft": (DiagOFTModule, {"lora_dim": 4}),
    "oft, constrained": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.02}),
    "oft, rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, {"lora_dim": 4}),
    "boft, constrained and rescaled": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
    "glora": (GLoRAModule, {"lora_dim": 4, "alpha": 2}),
}
LAYERS = {
    "linear": lambda: nn.Linear(24, 32),
    "kernel": lambda: nn.Conv2d(8, 16, 3),
    "point": lambda: nn.Conv2d(8, 16, 1),
    "volume": lambda: nn.Conv3d(4, 8, 3),
}


def trained(kind: str, layer: nn.Module, **other: Any) -> Any:
    """A module of LyCORIS around the layer, its parameters noise."""
    made, options = KINDS[kind]
    module = made("lora_unet_x", layer, 1.0, **{**options, **other})
    own = {id(parameter) for parameter in layer.parameters()}
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if id(parameter) not in own:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def saved(module: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in module.state_dict().items() if "org" not in key}


def read(module: Any) -> Update:
    """What its tensors are, by role."""
    state = saved(module)
    alpha = state.pop("alpha")
    if "a1.weight" in state:
        return update("lycoris_glora", {key.removesuffix(".weight"): t for key, t in state.items()}, float(alpha))
    return update("lycoris_oft", {**{key.removeprefix("oft_"): t for key, t in state.items()}, "constraint": alpha})


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_that_of_lycoris(kind: str, layer: str) -> None:
    base = LAYERS[layer]()
    module = trained(kind, base)
    one, method = read(module), METHODS[read(module).method]
    method.check(one)
    assert method.fits(one, tuple(base.weight.shape))
    assert not method.fits(one, (base.weight.shape[0] * 2, *base.weight.shape[1:]))
    wanted = module.get_diff_weight(1)[0].detach().reshape(base.weight.shape)
    change = method.change(one, Own(base.weight.detach(), base.bias.detach()))
    assert change.weight is not None
    assert change.bias is None
    assert float((change.weight - wanted).norm() / wanted.norm()) < 2e-6
    assert not method.is_nothing(one)
    assert method.error(one, one) == 0
    found = method.low_rank_of(one, Own(base.weight.detach()))
    assert (found is not None) is (kind == "glora" and layer in ("linear", "point"))
    if found is not None:
        torch.testing.assert_close((found[0] @ found[1]).float().reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_trained_is_nothing(kind: str) -> None:
    made, options = KINDS[kind]
    one = read(made("lora_unet_x", nn.Linear(24, 32), 1.0, **options))
    assert METHODS[one.method].is_nothing(one)


@pytest.mark.parametrize("kind", ["oft", "oft, rescaled", "glora"])
def test_rows_of_it_are_the_same_update_on_those_rows(kind: str) -> None:
    base = nn.Linear(24, 32)
    one, weight = read(trained(kind, base)), base.weight.detach()
    method, pieces = METHODS[one.method], [(4, 12), (20, 28)]
    part = Update(one.component, one.module, one.method, method.take_rows(one, pieces), one.alpha)
    rows = torch.cat([torch.arange(*piece) for piece in pieces])
    whole, some = method.change(one, Own(weight)).weight, method.change(part, Own(weight[rows])).weight
    assert whole is not None
    assert some is not None
    torch.testing.assert_close(some, whole[rows])


@pytest.mark.parametrize(
    ("kind", "pieces", "why"),
    [
        ("oft", [(0, 6), (6, 32)], "blocks do not end where the parts do"),
        ("boft", [(0, 16), (16, 32)], "blocks do not end where the parts do"),
        ("oft, constrained", [(0, 16), (16, 32)], "constraint is on all blocks together"),
    ],
)
def test_what_cannot_be_split_says_why(kind: str, pieces: list[tuple[int, int]], why: str) -> None:
    one = read(trained(kind, nn.Linear(24, 32)))
    with pytest.raises(errors.CannotRepresent, match=f"{why}.*--to kohya"):
        METHODS[one.method].take_rows(one, pieces)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"blocks": torch.zeros(4, 3, 2)}, "square blocks"),
        ({"blocks": torch.zeros(3, 2, 4, 4)}, "divisible by 4"),
        ({"blocks": torch.zeros(2, 4, 4), "rescale": torch.ones(6, 1)}, r"\[8, 1 …\]"),
        ({"blocks": torch.zeros(2, 4, 4), "constraint": torch.ones(2)}, "one number"),
        ({"blocks": torch.zeros(2, 4, 4), "constraint": torch.tensor(float("nan"))}, "damaged"),
        ({"blocks": torch.zeros(2, 4, 4), "magnitude": torch.ones(8)}, "no part of"),
        ({"rescale": torch.ones(8, 1)}, "half an update"),
    ],
)
def test_what_is_broken_is_said(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(errors.BrokenAdapter, match=said):
        METHODS["lycoris_oft"].check(update("lycoris_oft", tensors))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("a2", "they are not parts of one update"),
        ("b1", "they are not parts of one update"),
        ("b2", "they are not parts"),
    ],
)
def test_factors_of_other_ranks(changed: str, said: str) -> None:
    one = read(trained("glora", nn.Linear(24, 32)))
    tensors = dict(one.tensors)
    tensors[changed] = lazy(torch.zeros(3, 3))
    with pytest.raises(errors.BrokenAdapter, match=said):
        METHODS["lycoris_glora"].check(Update("unet", "x", "lycoris_glora", tensors, one.alpha))


# Files

MODULES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
}


def a_file(kind: str, folder: Path, prefix: str = "lora_unet_") -> tuple[Path, Path, dict[str, Tensor]]:
    """The file of a Stable Diffusion 1 adapter, the weights that it is for, and what LyCORIS adds to them."""
    state, weights, changes = {}, {}, {}
    for name, shape in MODULES.items():
        layer: nn.Module = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
        module = trained(kind, layer, **({"lora_dim": 10} if kind.startswith("boft") else {}))
        state |= {f"{prefix}{name.replace('.', '_')}.{key}": value for key, value in saved(module).items()}
        weights[f"{name}.weight"] = layer.weight.detach().contiguous()
        changes[name] = module.get_diff_weight(1)[0].detach().reshape(shape)
    save_file(state, folder / "lora.safetensors")
    save_file(weights, folder / "unet.safetensors")
    return folder / "lora.safetensors", folder / "unet.safetensors", changes


@pytest.mark.parametrize("kind", ["oft, rescaled", "boft, constrained and rescaled", "glora"])
@pytest.mark.parametrize("to", ["comfy-down", "kohya-diffusers", "diffusers-lycoris", "lycoris"])
def test_there_and_back(kind: str, to: str, tmp_path: Path) -> None:
    source, _, _ = a_file(kind, tmp_path)
    result = ao.convert(source, to, tmp_path / "there.safetensors", arch="sd1")
    assert result.modules == len(MODULES)
    ao.convert(tmp_path / "there.safetensors", "kohya", tmp_path / "back.safetensors")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("kind", ["oft, constrained", "boft", "glora"])
def test_the_best_lora_of_it(kind: str, tmp_path: Path) -> None:
    source, weights, changes = a_file(kind, tmp_path)
    lora, _, _ = ao.as_lora(ao.load(source), rank=320, base_weights=weights)
    for one in lora:
        wanted = changes[one.module].reshape(changes[one.module].shape[0], -1)
        made = METHODS[one.method].delta(one).reshape(wanted.shape)
        best = torch.linalg.svdvals(wanted.double())[320:].square().sum().sqrt()
        assert float((made - wanted).norm() - best) < 1e-4 * float(wanted.norm()), one.module


def test_peft_has_no_place_for_it(tmp_path: Path) -> None:
    source, _, _ = a_file("oft", tmp_path)
    with pytest.raises(errors.CannotRepresent, match="adapterops to-lora"):
        ao.convert(source, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("kind", "told"), [("oft", False), ("oft, constrained", True), ("oft, rescaled", True), ("boft", False)]
)
def test_what_comfy_makes_otherwise_is_said(kind: str, told: bool, tmp_path: Path) -> None:
    source, _, _ = a_file(kind, tmp_path)
    notes = ao.convert(source, "comfy-down", tmp_path / "there.safetensors", arch="sd1").notes
    assert any("ComfyUI makes something else" in note for note in notes) is told
