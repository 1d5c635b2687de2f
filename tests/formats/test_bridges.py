"""MLX-LM, PEFT and GGUF: every way between two of them, and round all three, keeps what the adapter does.

Each file is judged by code that is not the product's: a PEFT folder by peft's own merge, an MLX folder by mlx-lm's formula,
ΔW = scale · (lora_a · lora_b)ᵀ, a GGUF file by gguf's reader and what llama.cpp computes (`gguf_peer`), its rows put back
into transformers' order.  All are compared as deltas of transformers' weights (out, in).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_peer as peer
import peft_models as pm
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

import adapterops as ao
from adapterops import errors

SHAPES = ("llama", "qwen2", "gemma", "gpt2")
CASES = {name: peer.CASES[name] for name in SHAPES} | {
    # Heads of 4 rows are the same turned either way; those of 6 tell one way from the other.
    "llama": peer.Case("LlamaForCausalLM", "llama", peer.ALL, {**peer.VALUES, "head_dim": 6})
}
TARGETS = {name: [*peer.ALL] for name in SHAPES} | {"gpt2": ["c_attn", "c_proj", "c_fc"]}
SMALL = dict.fromkeys(SHAPES, "v_proj") | {"gpt2": "mlp.c_proj"}
"""The modules that have another rank or alpha than the others."""
WAYS = (("mlx", "gguf", "peft"), ("gguf", "mlx", "peft"))
"""From PEFT round to PEFT: the steps are all six ordered pairs."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "last layer": {"layers_to_transform": [1]},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": 2},
    "alphas": {"alpha_pattern": 16},
    "odd alphas": {"alpha_pattern": 3},
    "rslora, ranks": {"rank_pattern": 2, "use_rslora": True},
    "negative alpha": {"alpha_pattern": -8},
    "alpha that float32 lacks": {"lora_alpha": 0.1},
}
ROUNDING = {
    # lora_b takes up a quotient of scales that is no power of two: one rounding of float32.
    "odd alphas": 1e-6,
    "rslora, ranks": 1e-6,
    # GGUF's alpha is a float32.
    "alpha that float32 lacks": 1e-6,
}
"""By how much a file may be off, relative to each delta; elsewhere products of the same numbers are compared."""


def made(name: str, kind: str, folder: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """An adapter by peft, the config of its base, and what it adds to each weight (out, in)."""
    case, options = CASES[name], dict(KINDS[kind])
    for field in ("rank_pattern", "alpha_pattern"):
        if field in options:
            options[field] = {SMALL[name]: options[field]}
    model = case.tuned(folder / "peft", **{"target_modules": TARGETS[name], **options})
    return folder / "peft", case.base(folder), peer.deltas_of(model, case.model())


def of_peft(name: str, path: Path) -> dict[str, Tensor]:
    """Deltas by peft's own merge into a fresh base."""
    case = CASES[name]
    return peer.deltas_of(pm.load(case.model(), path), case.model())


def of_mlx(name: str, path: Path) -> dict[str, Tensor]:
    """Deltas by mlx-lm's formula (`mlx_lm/tuner/lora.py`, `LoRALinear.fuse`), under transformers' names."""
    inner = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]
    tensors = {key: value.double() for key, value in load_file(path / "adapters.safetensors").items()}
    out = {}
    for stem in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        a, b = tensors.pop(f"{stem}.lora_a"), tensors.pop(f"{stem}.lora_b")
        assert a.shape[1] == b.shape[0] == inner["rank"]  # one rank for all, or mlx-lm does not load it
        own = stem.replace("model.h.", "transformer.h.") if name == "gpt2" else stem
        out[own] = inner["scale"] * (a @ b).T
    assert not tensors
    return out


HF_NAMES = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    "attn_output": "self_attn.o_proj",
}
GPT2_NAMES = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


def halves(rows: Tensor, heads: int) -> Tensor:
    """Each head's rows from pairs of neighbours back to two halves: `LlamaModel.permute` undone."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def of_gguf(name: str, path: Path) -> dict[str, Tensor]:
    """Deltas by what llama.cpp computes of the file, in transformers' names and rows."""
    config: PretrainedConfig = CASES[name].config()
    out = {}
    for key, delta in peer.applied(path).items():
        block, number, own, weight = key.split(".")
        assert (block, weight) == ("blk", "weight")
        rows = torch.from_numpy(delta)
        if name == "llama" and own in ("attn_q", "attn_k"):
            rows = halves(rows, config.num_attention_heads if own == "attn_q" else config.num_key_value_heads)
        module = (
            f"transformer.h.{number}.{GPT2_NAMES[own]}" if name == "gpt2" else f"model.layers.{number}.{HF_NAMES[own]}"
        )
        out[module] = rows
    return out


JUDGES = {"peft": of_peft, "mlx": of_mlx, "gguf": of_gguf}
# peft merges into a base of about a tenth in float64, with factors in float32; the rest is arithmetic in float64.
FLOOR = {"peft": 1e-6, "mlx": 1e-12, "gguf": 1e-12}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, where: str) -> None:
    assert found.keys() == wanted.keys(), where
    for module, delta in found.items():
        assert delta.shape == wanted[module].shape, (where, module)
        apart = torch.linalg.norm(delta - wanted[module]) / torch.linalg.norm(wanted[module])
        assert apart <= tolerance, (where, module, float(apart))


def exact_delta(path: Path) -> dict[str, Tensor]:
    """What a PEFT folder adds by its factors and config, in float64: the yardstick that peft's merge is held to first."""
    config, tensors = pm.config_of(path), pm.weights_of(path)
    out = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(pm.PREFIX).removesuffix(".lora_A.weight")
        rank = a.shape[0]
        pattern = config["alpha_pattern"]
        alpha = next((v for k, v in pattern.items() if module.endswith(k)), config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        out[module] = scale * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
    return out


def places(folder: Path, way: tuple[str, ...]) -> list[tuple[str, Path]]:
    return [(to, folder / f"{at}{to}{'.gguf' if to == 'gguf' else ''}") for at, to in enumerate(way)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_way_keeps_every_delta(name: str, kind: str, tmp_path: Path) -> None:
    source, base, merged = made(name, kind, tmp_path)
    wanted = exact_delta(source)
    agree(wanted, merged, 1e-6, "peft's merge")
    exact = kind not in ROUNDING
    for way in WAYS:
        before = source
        folder = tmp_path / "-".join(way)
        folder.mkdir()
        for to, path in places(folder, way):
            where = f"{name}, {kind}: {way}, {path.name}"
            # MLX has one scale: what no power of two makes equal has to be baked in.
            fold = to == "mlx" and kind in ("odd alphas", "rslora, ranks") and before == source
            result = ao.convert(before, to, path, base=base, fold_alpha=fold)
            assert result.proof is not None, where
            tolerance = max(FLOOR[to], ROUNDING.get(kind, 0.0))
            agree(JUDGES[to](name, path), wanted, tolerance, where)
            before = path
        # Bit for bit where the target holds it.
        one, two = pm.weights_of(source), pm.weights_of(before)
        assert one.keys() == two.keys()
        if exact and kind not in ("alphas", "negative alpha"):
            pm.same_tensors(one, two)
            assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_one_scale_that_no_power_of_two_makes(name: str, tmp_path: Path) -> None:
    """MLX-LM's one scale is a reason to refuse, with the way that works; GGUF's one alpha is folded and said."""
    source, base, _ = made(name, "odd alphas", tmp_path)
    with pytest.raises(errors.CannotRepresent, match=r"lora_B\.weight.*one for all modules.*--fold-alpha"):
        ao.convert(source, "mlx", tmp_path / "mlx", base=base)
    assert not (tmp_path / "mlx").exists()
    result = ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert any("multiplied into lora_b" in note for note in result.notes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_short_floats_go_round_both_circles_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    source, base, _ = made(name, "ranks", tmp_path)
    path = source / "adapter_model.safetensors"
    short = getattr(torch, dtype)
    save_file({k: v.to(short) for k, v in load_file(path).items()}, path, {"format": "pt"})
    wanted = exact_delta(source)
    for way in (("mlx", "gguf", "peft"), ("gguf", "mlx", "peft")):
        before = source
        folder = tmp_path / "-".join(way)
        folder.mkdir()
        for to, place in places(folder, way):
            result = ao.convert(before, to, place, base=base)
            assert result.proof is not None
            assert result.proof.largest_error == 0.0
            if to != "peft":  # peft merges short floats in their own type
                agree(JUDGES[to](name, place), wanted, 1e-12, f"{name}: {way}, {place.name}")
            before = place
        one, two = load_file(path), load_file(before / "adapter_model.safetensors")
        assert {k: v.dtype for k, v in two.items()} == dict.fromkeys(one, short)
        pm.same_tensors(one, two)


def test_zero_scale_stays_zero(tmp_path: Path) -> None:
    """A module of alpha 0 does nothing, in every file; zero means scale 1 to llama.cpp, so that its alpha is never written."""
    source, base, _ = made("qwen2", "plain", tmp_path)
    config = pm.config_of(source)
    for pattern, alpha in (({"v_proj": 0}, 8), ({}, 0)):
        (source / "adapter_config.json").write_text(
            json.dumps({**config, "alpha_pattern": pattern, "lora_alpha": alpha})
        )
        for to in ("mlx", "gguf"):
            path = tmp_path / f"{alpha}.{to}"
            ao.convert(source, to, path, base=base)
            for module, delta in JUDGES[to]("qwen2", path).items():
                assert (float(delta.abs().max()) == 0.0) == (alpha == 0 or module.endswith("v_proj")), (to, module)
            ao.convert(path, "peft", tmp_path / f"back-{to}{alpha}", base=base)
            for module, delta in exact_delta(tmp_path / f"back-{to}{alpha}").items():
                assert (float(delta.abs().max()) == 0.0) == (alpha == 0 or module.endswith("v_proj")), (to, module)


def test_the_judges_see_a_wrong_delta(tmp_path: Path) -> None:
    """What the tests above rest on: exchanged heads, another scale and another module are seen."""
    source, base, _ = made("llama", "plain", tmp_path)
    wanted = exact_delta(source)
    ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    right = of_gguf("llama", tmp_path / "x.gguf")
    agree(right, wanted, 1e-12, "")
    name = "model.layers.0.self_attn.k_proj"
    again, other = halves(right[name], 2), right["model.layers.1.self_attn.k_proj"]
    for wrong in (again, halves(right[name], 1), right[name] * (1 + 1e-6), other):
        with pytest.raises(AssertionError):
            agree({**right, name: wrong}, wanted, 1e-7, "")
