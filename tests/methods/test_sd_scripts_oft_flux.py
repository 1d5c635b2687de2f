"""sd-scripts' OFT of Flux.1, by its own arithmetic, and the files that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from method_updates import relative
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own

COUNT, ALPHA = 64, 1e-3
MODULES = {
    "double_blocks_0_img_attn_qkv": (3072, [3072] * 3),
    "double_blocks_0_img_attn_proj": (3072, [3072]),
    "double_blocks_18_txt_attn_qkv": (3072, [3072] * 3),
    "single_blocks_0_linear1": (3072, [3072] * 3 + [12288]),
    "single_blocks_0_linear2": (15360, [3072]),
    "single_blocks_37_modulation_lin": (3072, [9216]),
}
"""The inputs of each, and the outputs of its parts (`create_modules`, "split_dims")."""
PARTS = {
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_18_txt_attn_qkv": [f"transformer_blocks.18.attn.add_{part}_proj" for part in "qkv"],
    "single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks_37_modulation_lin": ["single_transformer_blocks.37.norm.linear"],
}


def a_file(folder: Path, alpha: float = ALPHA, dtype: torch.dtype = torch.float32) -> Path:
    generator, state = torch.Generator().manual_seed(0), {}
    for name, (_, splits) in MODULES.items():
        for at, rows in enumerate(splits):
            size = rows // COUNT
            blocks = torch.randn(COUNT, size, size, generator=generator) * 0.02
            state[f"oft_unet_{name}.oft_blocks.{at}"] = blocks.to(dtype)
        state[f"oft_unet_{name}.alpha"] = torch.tensor(alpha).to(dtype)
    save_file(state, folder / "oft.safetensors", {"ss_network_module": "networks.oft_flux"})
    return folder / "oft.safetensors"


def weight_after(weight: Tensor, blocks: list[Tensor], alpha: float) -> Tensor:
    """The weight of kohya-ss/sd-scripts `networks/oft_flux.py` (`OFTModule.get_weight`, `forward`), its parts in order."""
    out, at = [], 0
    for own in blocks:
        count, size, _ = own.shape
        rows = weight[at : at + count * size].double()
        at += count * size
        skew = own.double() - own.double().transpose(1, 2)
        norm = torch.linalg.vector_norm(skew)
        skew = skew * ((norm.clamp(max=alpha * count * size) + 1e-8) / (norm + 1e-8))
        eye = torch.eye(size, dtype=torch.float64)
        turn = (eye + skew) @ torch.from_numpy(np.linalg.inv((eye - skew).numpy()))
        out.append(torch.einsum("knm,knp->kmp", turn, rows.reshape(count, size, -1)).reshape(rows.shape))
    return torch.cat(out)


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_the_parts_do_what_the_whole_does(alpha: float, tmp_path: Path) -> None:
    source = a_file(tmp_path, alpha)
    adapter, state = ao.load(source), load_file(source)
    assert {update.module for update in adapter} == {part for parts in PARTS.values() for part in parts}
    updates = {update.module: update for update in adapter}
    for name, (_, splits) in MODULES.items():
        weight = torch.randn(sum(splits), 16, generator=torch.Generator().manual_seed(1))
        lists = [state[f"oft_unet_{name}.oft_blocks.{at}"] for at in range(len(splits))]
        wanted = weight_after(weight, lists, alpha) - weight
        method, at, made = METHODS["lycoris_oft"], 0, []
        for part, rows in zip(PARTS[name], splits, strict=True):
            change = method.change(updates[part], Own(weight[at : at + rows])).weight
            assert change is not None
            made.append(change)
            at += rows
        assert relative(wanted, torch.cat(made)) < 1e-5, name


@pytest.mark.parametrize("to", ["kohya-diffusers", "onetrainer", "diffusers-lycoris"])
def test_there_and_back(to: str, tmp_path: Path) -> None:
    source = a_file(tmp_path, dtype=torch.bfloat16)
    result = ao.convert(source, to, tmp_path / "there.safetensors")
    assert result.modules == sum(len(parts) for parts in PARTS.values())
    ao.convert(tmp_path / "there.safetensors", "sd-scripts-oft-flux", tmp_path / "back.safetensors")
    before, after = load_file(source), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_a_target_with_one_projection_has_no_place_for_its_parts(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRepresent, match="not one such update on the whole"):
        ao.convert(a_file(tmp_path), "kohya", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_list_that_lacks_an_entry_is_broken(tmp_path: Path) -> None:
    source = a_file(tmp_path)
    state = load_file(source)
    del state["oft_unet_single_blocks_0_linear1.oft_blocks.3"]
    save_file(state, source)
    with pytest.raises(errors.BrokenAdapter, match=r"3 entries of single_blocks_0_linear1, whose weight has 4 parts"):
        ao.load(source)


def test_an_alpha_of_zero_is_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(errors.BrokenAdapter, match=r"alpha above zero.*does nothing"):
        ao.load(a_file(tmp_path, alpha=0.0))


def _whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{stem}.oft_blocks": torch.randn(64, 144, 144) * 0.01, f"{stem}.alpha": torch.tensor(ALPHA)}


def _without_v(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "transformer_blocks_0_attn_to_v" not in key}


@pytest.mark.parametrize(
    ("change", "said"),
    [(_whole, "turns the parts of this projection one by one"), (_without_v, "to_v has no update")],
)
def test_what_it_has_no_list_for_is_not_written(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, tmp_path: Path
) -> None:
    ao.convert(a_file(tmp_path), "kohya-diffusers", tmp_path / "there.safetensors")
    save_file(change(load_file(tmp_path / "there.safetensors")), tmp_path / "there.safetensors")
    with pytest.raises(errors.CannotRepresent, match=f"{re.escape(said)}.*--to kohya"):
        ao.convert(tmp_path / "there.safetensors", "sd-scripts-oft-flux", tmp_path / "out.safetensors", arch="flux")
    assert not (tmp_path / "out.safetensors").exists()
