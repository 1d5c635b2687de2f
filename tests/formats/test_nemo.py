"""Megatron's LoRA names, held to what Megatron's attention and MLP take out of their fused weights.

`megatrons_qkv` cuts the output of `linear_qkv` as megatron-core does (`core/transformer/attention.py`,
`get_query_key_value_tensors`); what transformers' projections give with the converted adapter must be the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, OlmoConfig, Qwen2Config, Qwen3Config

import adapterops as ao
from adapterops.errors import BrokenAdapter, CannotRepresent, UnknownFact, UnsupportedFormat

HIDDEN, HEADS, GROUPS, SIZE, INNER, RANK, ALPHA = 24, 6, 2, 8, 20, 3, 6.0
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE,
    "intermediate_size": INNER,
    "num_hidden_layers": 2, "vocab_size": 11,
}  # fmt: skip
QKV = (HEADS + 2 * GROUPS) * SIZE


def base(tmp_path: Path, config: type = LlamaConfig) -> Path:
    name = config.__name__.removesuffix("Config") + "ForCausalLM"
    config(**SHAPE, architectures=[name], tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base" / "config.json"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(stem: str, wide: int, deep: int, seed: int, magnitude: bool = False) -> dict[str, Tensor]:
    out = {f"{stem}.linear_in.weight": noise(RANK, deep, seed=seed)}
    out[f"{stem}.linear_out.weight"] = noise(wide, RANK, seed=seed + 1000)
    return out | ({f"{stem}.weight_magnitude": noise(wide, seed=seed + 2000).abs()} if magnitude else {})


def native(prefix: str = "decoder.", magnitude: bool = False) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for layer in range(2):
        start = f"{prefix}layers.{layer}."
        shapes = {"self_attention.linear_qkv": (QKV, HIDDEN), "self_attention.linear_proj": (HIDDEN, HEADS * SIZE)}
        shapes |= {"mlp.linear_fc1": (2 * INNER, HIDDEN), "mlp.linear_fc2": (HIDDEN, INNER)}
        for at, (name, (wide, deep)) in enumerate(shapes.items()):
            out |= pair(f"{start}{name}.adapter", wide, deep, 10 * layer + at, magnitude)
    return out


def applied(x: Tensor, tensors: dict[str, Tensor], stem: str) -> Tensor:
    """What the adapter of a Megatron module adds to its output."""
    down, up = tensors[f"{stem}.linear_in.weight"], tensors[f"{stem}.linear_out.weight"]
    return ALPHA / RANK * (x @ down.T) @ up.T


def peft_applied(x: Tensor, tensors: dict[str, Tensor], stem: str) -> Tensor:
    return ALPHA / RANK * (x @ tensors[f"{stem}.lora_A.weight"].T) @ tensors[f"{stem}.lora_B.weight"].T


def megatrons_qkv(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (n, heads, d), k and v (n, groups, d) out of the fused projection's output (n, …)."""
    grouped = mixed.view(len(mixed), GROUPS, (HEADS // GROUPS + 2) * SIZE)
    q, k, v = torch.split(grouped, [HEADS // GROUPS * SIZE, SIZE, SIZE], dim=2)
    return q.reshape(len(mixed), HEADS, SIZE), k, v


def converted(path: Path, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    result = ao.convert(path, "peft", tmp_path / "out", **{"alpha": ALPHA, **options})
    assert result.source_dialect == "nemo"
    assert result.proof is not None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["decoder.", "module.decoder.", "model.decoder."])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config, Gemma2Config])
def test_every_module_gets_what_megatron_gives_it(tmp_path: Path, config: type, prefix: str) -> None:
    tensors = native(prefix)
    save_file(tensors, tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path, config))
    x, wide, inner = noise(4, HIDDEN, seed=1), noise(4, HEADS * SIZE, seed=2), noise(4, INNER, seed=3)
    for layer in range(2):
        theirs, ours = f"{prefix}layers.{layer}", f"model.layers.{layer}"
        parts = megatrons_qkv(applied(x, tensors, f"{theirs}.self_attention.linear_qkv.adapter"))
        for name, part in zip("qkv", parts, strict=True):
            got = peft_applied(x, out, f"{ours}.self_attn.{name}_proj").unflatten(-1, (-1, SIZE))
            torch.testing.assert_close(got, part)
        gate, up = applied(x, tensors, f"{theirs}.mlp.linear_fc1.adapter").chunk(2, dim=-1)
        torch.testing.assert_close(peft_applied(x, out, f"{ours}.mlp.gate_proj"), gate)
        torch.testing.assert_close(peft_applied(x, out, f"{ours}.mlp.up_proj"), up)
        whole = (
            ("self_attention.linear_proj", "self_attn.o_proj", wide),
            ("mlp.linear_fc2", "mlp.down_proj", inner),
        )
        for own, name, values in whole:
            want = applied(values, tensors, f"{theirs}.{own}.adapter")
            torch.testing.assert_close(peft_applied(values, out, f"{ours}.{name}"), want)
    assert len(out) == 2 * 2 * 7


def test_parts_that_stand_by_themselves(tmp_path: Path) -> None:
    """Canonical LoRA: q, k, v, gate and up have adapters of their own, in transformers' order already."""
    stem = "decoder.layers.0"
    shapes = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "v": GROUPS * SIZE}
    tensors: dict[str, Tensor] = {}
    for at, (name, wide) in enumerate(shapes.items()):
        tensors |= pair(f"{stem}.self_attention.linear_qkv.adapter.adapter_{name}", wide, HIDDEN, at)
    for at, name in enumerate(("gate", "up")):
        tensors |= pair(f"{stem}.mlp.linear_fc1.adapter.adapter_{name}", INNER, HIDDEN, 10 + at)
    save_file(tensors, tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path)  # nothing depends on the heads
    for name in shapes:
        own = tensors[f"{stem}.self_attention.linear_qkv.adapter.adapter_{name}.linear_out.weight"]
        assert torch.equal(out[f"model.layers.0.self_attn.{name}_proj.lora_B.weight"], own)
    for name in ("gate", "up"):
        own = tensors[f"{stem}.mlp.linear_fc1.adapter.adapter_{name}.linear_in.weight"]
        assert torch.equal(out[f"model.layers.0.mlp.{name}_proj.lora_A.weight"], own)


def test_magnitudes_go_with_their_rows(tmp_path: Path) -> None:
    tensors = native(magnitude=True)
    save_file(tensors, tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path))
    stem = "decoder.layers.1.self_attention.linear_qkv.adapter"
    parts = megatrons_qkv(tensors[f"{stem}.weight_magnitude"][None])
    for name, part in zip("qkv", parts, strict=True):
        got = out[f"model.layers.1.self_attn.{name}_proj.lora_magnitude_vector"]
        assert torch.equal(got, part.flatten())


def test_the_heads_projection(tmp_path: Path) -> None:
    tensors = pair("output_layer.adapter", 11, HIDDEN, 3)
    save_file(tensors | native(), tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path))
    assert torch.equal(out["lm_head.lora_B.weight"], tensors["output_layer.adapter.linear_out.weight"])


def test_what_only_the_user_knows_is_asked_for(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    with pytest.raises(UnknownFact, match="--alpha"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", base=base(tmp_path))
    with pytest.raises(UnknownFact, match="--base CONFIG"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA)
    assert not (tmp_path / "out").exists()
    assert len(ao.load(tmp_path / "adapter.safetensors")) == 8  # to be looked at


def test_a_part_of_one_device_is_no_whole_tensor(tmp_path: Path) -> None:
    tensors = native()
    key = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight"
    tensors[key] = tensors[key][: QKV // 2].clone()
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(BrokenAdapter, match="the part of one device"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA, base=base(tmp_path))


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight",
        "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_q_down_proj.adapter.linear_in.weight",
    ],
)
def test_what_is_not_converted_is_refused_by_name(tmp_path: Path, key: str) -> None:
    save_file({key: noise(RANK, HIDDEN, seed=1), key.replace("_in", "_out"): noise(HIDDEN, RANK, seed=2)},
              tmp_path / "adapter.safetensors")  # fmt: skip
    with pytest.raises(UnsupportedFormat, match="this version does not convert"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA, base=base(tmp_path))


def test_models_that_no_source_maps_are_refused(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    OlmoConfig(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"}, architectures=["OlmoForCausalLM"]
    ).save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedFormat, match="olmo"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA, base=tmp_path / "base")


def test_it_is_never_written(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    with pytest.raises(CannotRepresent, match="--to peft"):
        ao.convert(
            tmp_path / "adapter.safetensors", "nemo", tmp_path / "o.safetensors", alpha=ALPHA, base=base(tmp_path)
        )
