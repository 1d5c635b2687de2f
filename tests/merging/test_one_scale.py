"""`cat` into a format that has one scale for all modules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import adapterops as ao
from adapterops.errors import CannotRepresent

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
Array = npt.NDArray[np.float64]


def mlx(folder: Path, modules: list[str], scale: float, seed: int) -> Path:
    """An adapter as MLX-LM saves it: ΔW = scale · (a · b)ᵀ (`mlx_lm/tuner/lora.py`)."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_a"] = random.standard_normal((8, 4)).astype("f4")
        tensors[f"{module}.lora_b"] = random.standard_normal((4, 8)).astype("f4")
    save_file(tensors, folder / "adapters.safetensors")
    keys = sorted({module.split(".", 3)[3] for module in modules})
    inner = {"rank": 4, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "lora_parameters": inner, "num_layers": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(folder: Path) -> dict[str, Array]:
    tensors = load_file(folder / "adapters.safetensors")
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    return {
        key.removesuffix(".lora_a"): scale * (a.astype("f8") @ tensors[key.removesuffix("a") + "b"].astype("f8")).T
        for key, a in tensors.items()
        if key.endswith(".lora_a")
    }


@pytest.mark.parametrize(("scale", "rounded"), [(7.0, True), (16.0, False)])
def test_the_factors_take_up_what_one_scale_leaves(scale: float, rounded: bool, tmp_path: Path) -> None:
    one, two = mlx(tmp_path / "one", [Q], 20.0, 1), mlx(tmp_path / "two", [Q, V], scale, 2)
    done = ao.merge([one, two], tmp_path / "out", "cat")
    assert any("one scale for all modules" in note for note in done.notes) is rounded
    before, after = (deltas(one), deltas(two)), deltas(tmp_path / "out")
    for module in (Q, V):
        wanted = sum((own[module] for own in before if module in own), np.zeros((8, 8)))
        assert np.linalg.norm(after[module] - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_no_factor_is_touched_where_the_target_holds_every_scale(tmp_path: Path) -> None:
    one, two = mlx(tmp_path / "one", [Q], 20.0, 1), mlx(tmp_path / "two", [Q, V], 7.0, 2)
    done = ao.merge([one, two], tmp_path / "out", "cat", to="peft")
    assert not any("one scale" in note for note in done.notes)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for role, name in (("a", "A"), ("b", "B")):
        kept = saved[f"base_model.model.{V}.lora_{name}.weight"]
        assert kept.tobytes() == load_file(two / "adapters.safetensors")[f"{V}.lora_{role}"].T.tobytes()


def test_what_one_scale_does_not_mend_is_refused_as_before(tmp_path: Path) -> None:
    one, two = mlx(tmp_path / "one", [Q], 20.0, 1), mlx(tmp_path / "two", [Q, V], 7.0, 2)
    for folder in (one, two):
        tensors = load_file(folder / "adapters.safetensors")
        tensors = {key.replace("self_attn", "attention"): tensor for key, tensor in tensors.items()}
        save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(CannotRepresent) as caught:
        ao.merge([one, two], tmp_path / "out.safetensors", "cat", to="kohya")
    assert not (tmp_path / "out.safetensors").exists()
    assert "scale" not in str(caught.value).replace(str(tmp_path), "")
