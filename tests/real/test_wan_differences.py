"""Whole differences in Wan's files, as diffusers takes them: biases of factors, factors of thin weights, and zeros."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same
from safetensors import safe_open
from safetensors.torch import load_file
from trainers import DOWN_UP, Tensors, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "ffn_dim": 64,
    "text_dim": 32,
    "freq_dim": 16,
    "in_channels": 1,
    "out_channels": 1,
}
WIDTH = 48
MODULES = {
    **{f"blocks.{i}.{a}.{p}": (WIDTH, WIDTH) for i in (0, 1) for a in ("self_attn", "cross_attn") for p in "qkvo"},
    **{f"blocks.{i}.ffn.0": (64, WIDTH) for i in (0, 1)},
    **{f"blocks.{i}.ffn.2": (WIDTH, 64) for i in (0, 1)},
}
"""All that the converter of diffusers insists on."""
BIASED = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) * 31 + len(shape))) / 8


def distilled(alpha: float | None = None) -> Tensors:
    """Factors and differences as ModelTC/LightX2V writes them (`tools/convert/lora_extractor.py`)."""
    tensors = {key: t.float() for key, t in pairs(MODULES, "diffusion_model.", DOWN_UP, alpha).items()}
    tensors |= {f"diffusion_model.{name}.diff_b": numbers(MODULES[name][0]) for name in BIASED}
    return tensors | {
        "diffusion_model.head.head.diff": numbers(4, WIDTH),
        "diffusion_model.head.head.diff_b": numbers(4),
    }


def written(tensors: Tensors, tmp_path: Path, **options: Any) -> Tensors:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = write(tmp_path / "a.safetensors", tensors)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=tmp_path / "config.json", overwrite=True, **options)
    return load_file(tmp_path / "b.safetensors")


def fused(state: Tensors) -> Tensors:
    """What diffusers adds to the parameters of a small Wan when its own loader has loaded `state`."""
    model: Any = importlib.import_module("diffusers").WanTransformer3DModel.from_config(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(dict(state), prefix="transformer", low_cpu_mem_usage=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert left == []
    model.fuse_lora()
    model.unload_lora()
    return {name: value - before[name] for name, value in model.state_dict().items()}


@pytest.mark.parametrize("alpha", [None, 2.0, 3.0])
def test_diffusers_adds_what_its_own_converter_would(alpha: float | None, tmp_path: Path) -> None:
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    tensors = distilled(alpha)
    theirs: Tensors = loaders.WanLoraLoaderMixin.lora_state_dict({key: t.clone() for key, t in tensors.items()})
    ours = written(tensors, tmp_path, fold_alpha=alpha is not None)
    # Its own converter leaves most modules without the bias that it makes the loader expect; these are zeros here.
    lacking = {key for key in ours if key.endswith(".bias") and key not in theirs}
    assert len(lacking) == len(MODULES) - len(BIASED)
    assert not any(ours[key].any() for key in lacking)
    made, wanted = fused(ours), fused({**theirs, **{key: torch.zeros_like(ours[key]) for key in lacking}})
    assert {n for n, change in made.items() if change.any()} == {n for n, change in wanted.items() if change.any()}
    assert [n for n, change in made.items() if not torch.allclose(change, wanted[n], rtol=1e-4, atol=1e-6)] == []
    assert torch.allclose(
        made["blocks.0.attn1.to_q.bias"], tensors["diffusion_model.blocks.0.self_attn.q.diff_b"], atol=1e-6
    )
    assert torch.allclose(made["proj_out.weight"], tensors["diffusion_model.head.head.diff"], atol=1e-6)


def test_biases_keep_their_size_beside_a_scale(tmp_path: Path) -> None:
    """peft scales a factor's bias as it scales the factors; the scale stands in the header, which `load_lora_weights` reads."""
    tensors = distilled(2.0)
    ours = written(tensors, tmp_path)
    bias = ours["transformer.blocks.0.attn1.to_q.lora_B.bias"]
    assert torch.equal(bias * (2 / 4), tensors["diffusion_model.blocks.0.self_attn.q.diff_b"])
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_bias"] is True


def test_biases_come_back(tmp_path: Path) -> None:
    """Those of zeros that a conversion put there do not."""
    tensors = {key: t for key, t in distilled().items() if "head" not in key}
    tensors["diffusion_model.blocks.0.self_attn.k.diff_b"] = torch.zeros(WIDTH)
    written(tensors, tmp_path)
    ao.convert(tmp_path / "b.safetensors", "comfy-down", tmp_path / "c.safetensors", base=tmp_path / "config.json")
    same(load_file(tmp_path / "c.safetensors"), tensors)
    ao.convert(tmp_path / "a.safetensors", "peft", tmp_path / "folder", base=tmp_path / "config.json")
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["lora_bias"] is True
    ao.convert(tmp_path / "folder", "comfy-down", tmp_path / "d.safetensors", base=tmp_path / "config.json")
    back = load_file(tmp_path / "d.safetensors")
    assert {key for key in back if key.endswith("diff_b") and back[key].any()} == {
        f"diffusion_model.{n}.diff_b" for n in BIASED
    }


def test_zeros_are_left_out_and_listed(tmp_path: Path) -> None:
    """The norms' differences of CausVid are zeros, which diffusers takes off in silence."""
    norms = {
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(WIDTH),
        "diffusion_model.blocks.0.norm3.diff_b": torch.zeros(WIDTH),
    }
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = write(tmp_path / "a.safetensors", distilled() | norms)
    done = ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=tmp_path / "config.json")
    (told,) = done.dropped
    assert all(key in told for key in norms)
    assert "change nothing" in told
    path = write(tmp_path / "c.safetensors", distilled() | {key: t + 1 for key, t in norms.items()})
    with pytest.raises(CannotRepresent, match=r"norm2.*has no place for it"):
        ao.convert(path, "diffusers", tmp_path / "d.safetensors", base=tmp_path / "config.json")
    assert not (tmp_path / "d.safetensors").exists()


def test_what_would_be_rounded_is_refused(tmp_path: Path) -> None:
    """peft would have to scale the bias by 3/4; with the scale in the factors, nothing is divided."""
    with pytest.raises(CannotRepresent, match=r"attn1\.to_q"):
        written(distilled(3.0), tmp_path)
    ours = written(distilled(3.0), tmp_path, fold_alpha=True)
    wanted = distilled()["diffusion_model.blocks.0.self_attn.q.diff_b"]
    assert torch.equal(ours["transformer.blocks.0.attn1.to_q.lora_B.bias"], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_small_biases_beside_a_large_scale_keep_their_digits(dtype: torch.dtype, fold: bool, tmp_path: Path) -> None:
    """Divided by 16, float16 has none of them left."""
    tensors = {key: t.to(dtype) if t.dim() else t for key, t in distilled(64.0).items()}
    tensors = {key: t / 1024 if key.endswith("diff_b") else t for key, t in tensors.items()}
    ours = written(tensors, tmp_path, fold_alpha=fold)
    bias = ours["transformer.blocks.0.attn1.to_q.lora_B.bias"].double() * (1 if fold else 64 / 4)
    assert torch.equal(bias, tensors["diffusion_model.blocks.0.self_attn.q.diff_b"].double())


def test_a_scale_of_nothing_takes_no_bias(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match=r"attn1\.to_q"):
        written(distilled(0.0), tmp_path, fold_alpha=True)
