"""GLoRA as LyCORIS wrote it before its version 3.0, by that version's arithmetic, and what rs_lora leaves of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from method_updates import relative, update
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own

MODULES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
}
RANK, ALPHA = 4, 2.0


def before(shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a module: KohakuBlueleaf/LyCORIS 1.9.0 `lycoris/modules/glora.py` (`GLoRAModule.__init__`)."""
    generator = torch.Generator().manual_seed(seed)
    out, width, *kernel = shape
    sizes = {"a1": (RANK, width), "a2": (width, RANK), "b1": (RANK, width), "b2": (out, RANK)}
    return {role: torch.randn(*size, *kernel, generator=generator) * 0.1 for role, size in sizes.items()}


def change_of(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What it adds, alpha / rank aside (`GLoRAModule.make_weight` there), with ComfyUI's one factor alpha / rank."""
    a1, a2, b1, b2 = (tensors[role].double().flatten(1) for role in ("a1", "a2", "b1", "b2"))
    rows = weight.double().flatten(1)
    return ((b2 @ b1 + rows @ a2 @ a1) * (ALPHA / RANK)).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(32, 24), (24, 24), (24, 32, 1, 1)])
def test_the_change_is_that_of_its_arithmetic(shape: tuple[int, ...]) -> None:
    tensors, weight = before(shape), torch.randn(shape, generator=torch.Generator().manual_seed(9))
    method = METHODS["lycoris_glora"]
    one = update("lycoris_glora", tensors, ALPHA)
    method.check(one)
    assert method.fits(one, shape)
    assert not method.fits(one, (shape[0] + 1, *shape[1:]))
    now, said = method.today(one)
    assert "before 3.0" in said
    assert method.today(now) == (now, "")
    made = method.change(now, Own(weight)).weight
    assert made is not None
    assert relative(change_of(weight, tensors), made) < 1e-6


def test_todays_are_left_alone() -> None:
    for layer in (nn.Linear(24, 32), nn.Linear(24, 24), nn.Linear(4, 4)):
        module = GLoRAModule("x", layer, 1.0, lora_dim=4)
        state = {
            k.removesuffix(".weight"): v for k, v in module.state_dict().items() if k[:2] in ("a1", "a2", "b1", "b2")
        }
        one = update("lycoris_glora", state, 1.0)
        assert METHODS["lycoris_glora"].today(one) == (one, "")


def a_file(folder: Path) -> Path:
    state: dict[str, Tensor] = {}
    for at, (name, shape) in enumerate(MODULES.items()):
        stem = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{stem}.{role}.weight": tensor for role, tensor in before(shape, at).items()}
        state[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(state, folder / "glora.safetensors")
    return folder / "glora.safetensors"


def test_a_file_of_it_becomes_one_of_todays(tmp_path: Path) -> None:
    source = a_file(tmp_path)
    result = ao.convert(source, "kohya", tmp_path / "now.safetensors")
    assert result.modules == len(MODULES)
    assert any("before 3.0" in note for note in ao.load(source).provenance.notes)
    state = load_file(tmp_path / "now.safetensors")
    for at, (name, shape) in enumerate(MODULES.items()):
        layer: nn.Module = nn.Conv2d(shape[1], shape[0], 1) if len(shape) > 2 else nn.Linear(shape[1], shape[0])
        stem = f"lora_unet_{name.replace('.', '_')}"
        parts = [state.get(f"{stem}.{role}") for role in GLoRAModule.weight_list]
        module = GLoRAModule.make_module_from_state_dict("x", layer, *parts)
        weight = layer.get_parameter("weight").detach()
        assert relative(change_of(weight, before(shape, at)), module.get_diff_weight(1)[0].detach()) < 1e-5


def test_one_that_is_neither_is_broken() -> None:
    tensors = before((32, 24)) | {"b2": torch.zeros(32, 5)}
    with pytest.raises(errors.BrokenAdapter, match="they are not parts of one update"):
        METHODS["lycoris_glora"].check(update("lycoris_glora", tensors, 1.0))


def test_lycoris_itself_forgets_rs_lora() -> None:
    """Its file has the alpha that was asked for, and its own reading of it applies alpha / rank."""
    layer = nn.Linear(24, 32)
    module = GLoRAModule("x", layer, 1.0, lora_dim=4, alpha=2, rs_lora=True)
    for own in (module.a2, module.b2):
        nn.init.normal_(own.weight)
    state = {key: value.detach() for key, value in module.state_dict().items() if "org" not in key}
    again = GLoRAModule.make_module_from_state_dict("x", layer, *(state.get(role) for role in GLoRAModule.weight_list))
    alpha = float(state.pop("alpha"))
    one = update("lycoris_glora", {key.removesuffix(".weight"): value for key, value in state.items()}, alpha)
    made = METHODS["lycoris_glora"].change(one, Own(layer.weight.detach())).weight
    assert made is not None
    assert relative(again.get_diff_weight(1)[0].detach(), made) < 1e-5
    assert relative(module.get_diff_weight(1)[0].detach(), made * 2) < 1e-5
